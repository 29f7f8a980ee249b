"""Workers at another precision, and calibrations that say so where theirs was another."""

import contextlib
import dataclasses
import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import matrices
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from nercc_jax import (
    Berrut,
    DevicePool,
    ExactStragglers,
    NeRCC,
    Replication,
    Scheme,
    calibrate_error_probability,
    coded_inference,
    evaluate,
    pool_inference,
)
from nercc_jax.inference import CalibrationWarning, cast_model
from nercc_jax.inference.models import current_conditions
from nercc_jax.risk import Accuracy
from nercc_jax.serving import CodedBatcher, Coder, calibrate_decoding

K, N, OUTPUTS = 3, 7, 1000
CODE = Berrut(K, N)  # quickly compiled, and decoded as all others
REGRESSION = NeRCC(K, N)
RANDOM = np.random.default_rng(7)
WEIGHTS = RANDOM.normal(size=(5, OUTPUTS)).astype("float32") / 2
X = RANDOM.normal(size=(2, K, 5)).astype("float32")
MASK = np.arange(N) != 2
BFLOAT16 = ml_dtypes.bfloat16


class Linear(eqx.Module):
    weights: jax.Array
    places: jax.Array  # no float: stays

    def __call__(self, x):
        assert x.dtype == self.weights.dtype, "they would be promoted"
        return jnp.tanh(x @ self.weights)[:, self.places]

    def doubled(self, x):
        return 2 * self(x)


class Layer(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(5, OUTPUTS, rngs=nnx.Rngs(0))
        self.linear.kernel[...] = jnp.asarray(WEIGHTS)
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

    def __call__(self, x):
        y = self.dropout(self.linear(x))
        assert y.dtype == x.dtype
        return jnp.tanh(y)


def linear():
    return Linear(jnp.asarray(WEIGHTS), jnp.arange(OUTPUTS))


def layer():
    module = Layer()
    module.eval()
    return module


def by_argument(x, weights, number):
    assert x.dtype == weights.dtype
    assert number.dtype == jnp.int32
    return jnp.tanh(x @ weights)


def closed(x):
    return jnp.tanh(x @ WEIGHTS)  # promoted: only the inputs are rounded


def rounded(values, dtype):
    return np.asarray(values, np.float32).astype(dtype).astype(np.float32)


def by_hand(x, dtype, code=CODE, mask=MASK):
    """Predictions by matrices in float64: inputs and weights are rounded, products are not."""
    coded = rounded(np.einsum("nk,gkd->gnd", matrices.encoder_matrix(code), x), dtype)
    answers = np.tanh(coded.astype(np.float64) @ rounded(WEIGHTS, dtype).astype(np.float64))
    return matrices.decoder_matrix(code, mask) @ answers


def infer(model=None, code=CODE, **options):
    """Return a way of running a model, the linear one if none is given, by its workers' dtype."""
    model = linear() if model is None else model
    return lambda dtype: coded_inference(model, code, worker_dtype=dtype, **options)


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((8,), ("workers",), axis_types=(kind,))


def in_pool(dtype, within=None):
    with contextlib.ExitStack() as stack:
        if within is not None:
            stack.enter_context(jax.set_mesh(mesh(within)))
        pool = stack.enter_context(DevicePool(linear(), 2, worker_dtype=dtype))
        return pool_inference(pool, CODE)(X)


ALL = {"mask": np.ones(N, bool)}
WAYS = {
    "module": (lambda dtype: infer()(dtype)(X, MASK), {}),
    "layers": (lambda dtype: infer(layer())(dtype)(X, MASK), {}),
    "arguments": (
        lambda dtype: infer(by_argument)(dtype)(
            X, MASK, jnp.asarray(WEIGHTS), jnp.arange(3, dtype=jnp.int32)
        ),
        {},
    ),
    "jit": (lambda dtype: jax.jit(infer()(dtype))(X, MASK), {}),
    "vmap": (lambda dtype: jax.vmap(lambda x: infer()(dtype)(x, MASK))(jnp.asarray(X)), {}),
    "mesh": (lambda dtype: infer(mesh=mesh())(dtype)(X, MASK), {}),
    "layers on a mesh": (lambda dtype: infer(layer(), mesh=mesh())(dtype)(X, MASK), {}),
    "scheme": (
        lambda dtype: infer(code=Scheme(REGRESSION))(dtype)(X.reshape(-1, 5), MASK).reshape(
            2, K, OUTPUTS
        ),
        {"code": REGRESSION},
    ),
    "pool": (in_pool, ALL),
    "pool within a mesh": (lambda dtype: in_pool(dtype, AxisType.Auto), ALL),
    "pool within an explicit mesh": (lambda dtype: in_pool(dtype, AxisType.Explicit), ALL),
    **{
        f"module in {name}": (lambda dtype, wrap=wrap: infer(wrap(linear()))(dtype)(X, MASK), {})
        for name, wrap in (
            ("partial", lambda module: functools.partial(lambda module, x: module(x), module)),
            ("method", lambda module: module.__call__),
            ("Partial", lambda m: jax.tree_util.Partial(lambda module, x: module(x), m)),
            ("filter_jit", lambda module: eqx.filter_jit(module)),
        )
    },
}
# A product of five in bfloat16, and the tangent: some roundings of 2^-9, times the decoder's row
# sums. Of float16 2^-12.
BOUND = {"bfloat16": 3e-2, "float16": 4e-3, "float32": 1e-5}
DTYPES = {"bfloat16": BFLOAT16, "float16": np.float16, "float32": np.float32}


@pytest.mark.parametrize(
    ("way", "dtype"),
    [(way, "bfloat16") for way in WAYS]
    + [(way, dtype) for way in ("module", "layers") for dtype in ("float16", "float32")],
)
def test_models_run_in_it(way, dtype):
    run, about = WAYS[way]
    predictions = run(dtype)
    assert predictions.dtype == jnp.float32
    error = np.abs(np.asarray(predictions) - by_hand(X, DTYPES[dtype], **about)).max()
    assert error < BOUND[dtype]
    if dtype != "float32":
        exact = np.abs(np.asarray(predictions) - by_hand(X, np.float32, **about)).max()
        assert exact > BOUND[dtype] / 300, "it ran in float32"


def test_gradients_are_those_of_float32_but_for_rounding():
    def loss(model, x, dtype):
        return jnp.mean(coded_inference(model, CODE, worker_dtype=dtype)(x, MASK)[..., :20] ** 2)

    slopes = (
        eqx.filter_grad(lambda both, dtype=dtype: loss(*both, dtype))((linear(), jnp.asarray(X)))
        for dtype in ("bfloat16", None)
    )
    for by, plain in zip(*slopes, strict=True):
        by, plain = (np.asarray(jax.tree.leaves(each)[0]) for each in (by, plain))
        assert by.dtype == np.float32
        scale = np.abs(plain).max()
        assert 0 < np.abs(by - plain).max() < 0.05 * scale


# Pools.


def test_a_pool_of_threads():
    seen = []

    def remote(batch):  # no JAX function
        seen.append(batch.dtype)
        return np.tanh(batch.astype(np.float32) @ rounded(WEIGHTS, BFLOAT16))

    with DevicePool(remote, 2, compiled=False, worker_dtype="bfloat16") as pool:
        assert pool.worker_dtype == "bfloat16"
        coded = pool_inference(pool, CODE, with_status=True)(X)
    assert set(seen) == {np.dtype(BFLOAT16)}
    assert coded.answers.values.dtype == np.float32
    with DevicePool(linear(), 2, example=X[:, 0], worker_dtype="bfloat16") as pool:
        predictions = pool_inference(pool, CODE)(X)
    np.testing.assert_allclose(predictions, coded.decoded.predictions, atol=3e-2)


def test_a_pool_keeps_its_makers_precision_of_products():
    seen = []

    def model(x):
        seen.append(jax.config.jax_default_matmul_precision)
        return x

    with jax.default_matmul_precision("highest"):
        pool = DevicePool(model, 1)
    with pool:
        pool_inference(pool, CODE)(X)
        assert seen == ["highest"]
        assert pool.conditions.endswith("precision highest")


# Errors.


class Plain(nnx.Module, pytree=False):
    def __init__(self):
        self.linear = nnx.Linear(5, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.linear(x)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda module: jax.vmap(module), "Linear"),
        (lambda module: jax.jit(module), "Linear"),
        (lambda module: Plain(), "Plain"),
    ],
    ids=["vmap", "jit", "no pytree"],
)
def test_a_module_that_cannot_be_cast_is_reported(build, name):
    module = eqx.nn.Linear(5, 3, key=jax.random.key(0))
    with pytest.raises(ValueError, match=rf"the arrays of {name} cannot be cast to bfloat16"):
        coded_inference(build(module), CODE, worker_dtype="bfloat16")
    coded_inference(eqx.filter_vmap(module), CODE, worker_dtype="bfloat16")


def test_answers_beyond_float16_make_stragglers():
    infer = coded_inference(lambda x: 100 * x, CODE, worker_dtype="float16", with_status=True)
    decoded = infer(np.full((K, 5), 1e3, np.float32), MASK)
    assert not decoded.responded.any()


# What is calibrated, and where.

LAWS = {"two": ExactStragglers(2)}
FEW = RANDOM.normal(size=(90, 5)).astype("float32")


def small():
    return Linear(jnp.asarray(WEIGHTS[:, :4]), jnp.arange(4))


@pytest.fixture(scope="module")
def doubts():
    key = jax.random.key(0)
    return {
        dtype: calibrate_error_probability(
            small(), REGRESSION, FEW, LAWS, key=key, num_sets=4, worker_dtype=dtype
        )
        for dtype in (None, "bfloat16")
    }


def test_conditions_are_recorded(doubts):
    here = "float32 workers on platform cpu, matmul precision default"
    assert doubts[None].conditions == current_conditions() == here
    assert doubts["bfloat16"].conditions == current_conditions("bfloat16")
    with jax.default_matmul_precision("highest"), jax.enable_x64(True):
        assert re.match("float64 workers.*precision highest", current_conditions())


def test_workers_own_places_are_answered_in_it_and_the_models_own_outputs_are_not():
    copies, model = Replication(K, N), small()
    workers = {"cast": cast_model(model, "bfloat16")}
    exact, cast = evaluate(
        model, {"": copies, "cast": copies}, FEW, LAWS, key=jax.random.key(1), num_sets=2,
        workers=workers,
    )  # fmt: skip
    assert exact.rmse.mean == 0 < cast.rmse.mean < 2e-2
    assert cast.rel_acc.mean > 0.5


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        ({}, "bfloat16", "ErrorProbability was calibrated on .* float32 workers .* bfloat16 wor"),
        ({"of": "bfloat16"}, None, "Calibrate again"),
        ({"platform": "tpu"}, None, "platform tpu.*platform cpu"),
        ({}, None, None),
        ({"of": "bfloat16"}, "bfloat16", None),
    ],
)
def test_a_scheme_with_anothers_doubt_says_so(doubts, change, dtype, message):
    """On devices, and on a pool."""
    doubt = doubts[change.get("of")]
    there = doubt.conditions.replace("cpu", change.get("platform", "cpu"))
    scheme = Scheme(REGRESSION, None, dataclasses.replace(doubt, conditions=there))
    with DevicePool(small(), 2, worker_dtype=dtype) as pool:
        for use in (
            lambda: coded_inference(small(), scheme, worker_dtype=dtype),
            lambda: pool_inference(pool, scheme),
        ):
            with contextlib.ExitStack() as said:
                if message is not None:
                    said.enter_context(pytest.warns(CalibrationWarning, match=message))
                use()


@pytest.mark.slow
def test_a_servers_calibration_elsewhere_says_so():
    coder = Coder(NeRCC(2, 4, points="interleaved"))
    accuracy, x = Accuracy(max_disagreement=0.1), np.resize(FEW, (64, 5))
    decoding = calibrate_decoding(coder, small(), x, accuracy, worker_dtype="float16")
    with (
        DevicePool(small(), 4, worker_dtype="bfloat16") as pool,
        pytest.warns(CalibrationWarning, match="float16 workers.*bfloat16 workers"),
        CodedBatcher(pool, coder, (5,), (4,), decoding=decoding) as batcher,
    ):
        answer = batcher.submit(FEW[:1], deadline=60.0).result().values
    np.testing.assert_array_equal(answer, cast_model(small(), "bfloat16")(FEW[:1]))
