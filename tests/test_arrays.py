"""NumPy's arrays and numbers at every door, and pytrees of arrays.

Byte orders that JAX misreads, kinds it has no type for, and integers that are not Python's.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matrices import decoded_by_hand

from nercc_jax import (
    Berrut,
    DevicePool,
    ExactStragglers,
    Lagrange,
    NeRCC,
    Parity,
    Replication,
    Scheme,
    Uncoded,
    calibrate_error_probability,
    coded_inference,
    evaluate,
    nested_objective,
    pool_inference,
    reexecute,
)
from nercc_jax.codes import decode_groups, regression_points
from nercc_jax.evaluation import record_answers
from nercc_jax.inference import order_points, robust_decode
from nercc_jax.splines import process_variance, smoothing_spline
from nercc_jax.stragglers import (
    ContiguousStragglers,
    ExponentialLatency,
    IndependentStragglers,
    TraceLatency,
    WaitFor,
    straggler_sets,
)
from nercc_jax.surrogates import Surrogate, fit_learner
from nercc_jax.tuning import Descent, Sampling

CODE = NeRCC(4, 9)
MASK = np.arange(9) != 5
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(8, 3)).astype(np.float32), RNG.normal(size=(9, 3)).astype(np.float32)
T = np.linspace(-1, 1, 9).astype(np.float32)
INFER = coded_inference(jnp.tanh, CODE)
ON_HOST = coded_inference(lambda x: np.tanh(np.asarray(x)).astype(">f4"), CODE)


def in_pool(x):
    with DevicePool(lambda batch: np.tanh(np.asarray(batch)), 9, compiled=False) as pool:
        return pool_inference(pool, CODE)(x)


DOORS = {
    "encode": lambda x, y: CODE.encode(x[:4]),
    "decode": lambda x, y: CODE.decode(y, MASK),
    "uncertainty": lambda x, y: CODE.decode(y, MASK, return_uncertainty=True)[1],
    "decode_groups": lambda x, y: decode_groups(CODE, y[None], MASK[None]).predictions,
    "coded_inference": lambda x, y: INFER(x[:4], MASK),
    "arguments of the model": lambda x, y: coded_inference(lambda x, w: x * w, CODE)(
        x[:4], MASK, y[0]
    ),
    "a model on the host": lambda x, y: ON_HOST(x[:4], MASK),
    "robust_decode": lambda x, y: robust_decode(CODE, y, MASK, max_adversaries=1)[0].predictions,
    "smoothing_spline": lambda x, y: smoothing_spline(T, y, 0.1).evaluate(T),
    "process_variance": lambda x, y: process_variance(T, y, 0.1),
    "order_points": lambda x, y: order_points(x, 4, features=x),
    "points of a code": lambda x, y: NeRCC(3, 9, points=(y[0] / 4, T.astype(y.dtype))).alpha,
    "nested_objective": lambda x, y: nested_objective(jnp.tanh, CODE, x[None, :4], MASK[None]),
    "evaluate": lambda x, y: [
        row.mse.mean
        for row in evaluate(
            jnp.tanh, {"n": CODE}, x, {"1": ExactStragglers(1)}, key=jax.random.key(0), num_sets=2
        )
    ],
    "fit_learner": lambda x, y: fit_learner(x, y[:8], capacity=16, tuning=None).predict(X)[0],
    "learner.update": lambda x, y: (
        fit_learner(X, Y[:8], capacity=16, tuning=None).update(x + 1, y[:8]).factor.spread
    ),
    "learner.predict": lambda x, y: fit_learner(X, Y[:8], capacity=16, tuning=None).predict(x)[0],
    "pool_inference": lambda x, y: in_pool(x[:4]),
}


@pytest.mark.parametrize("door", DOORS)
def test_big_endian_arrays_are_read_as_such(door):
    """JAX reads them as native ones once it has compiled a program for that shape."""
    wanted = DOORS[door](X, Y)
    np.testing.assert_array_equal(DOORS[door](X.astype(">f4"), Y.astype(">f4")), wanted)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (lambda y: y.astype(np.longdouble), r"y is float128, .* no type for: convert it"),
        (lambda y: y.astype(object), r"y is object, .* no type for: convert it"),
        (lambda y: np.ma.array(y, mask=y > 1), r"y has \d+ masked values: fill them"),
    ],
    ids=["longdouble", "object", "masked"],
)
def test_what_jax_has_no_type_for_is_refused_by_name(kind, words, untyped):
    with pytest.raises(ValueError, match=words):
        CODE.decode(kind(Y), MASK)


@pytest.mark.parametrize(
    "kind", [np.asfortranarray, memoryview, lambda y: np.ma.array(y), lambda y: y.astype(">f8")]
)
def test_other_arrays_are_what_they_hold(kind, untyped):
    np.testing.assert_array_equal(CODE.decode(kind(Y), MASK), CODE.decode(Y, MASK))


# -- Numbers as they come: NumPy's are integers like Python's --------------------------------------


def static_numbers(module):
    """All integers among a module's fields."""
    numbers = [value for value in vars(module).values() if isinstance(value, int | np.integer)]
    return [number for number in numbers if not isinstance(number, bool)]


@pytest.mark.parametrize(
    "build",
    [
        lambda k, n: NeRCC(k, n),
        lambda k, n: NeRCC(k, n, points="mixed:0.5"),
        lambda k, n: Berrut(k, n),
        lambda k, n: Lagrange(k, n, degree=type(k)(2)),
        lambda k, n: Replication(k, n),
        lambda k, n: Parity(k, type(k)(6)),
        lambda k, n: Uncoded(k),
        lambda k, n: ExactStragglers(k),
        lambda k, n: ContiguousStragglers(k),
        lambda k, n: WaitFor(ExponentialLatency(1.0), k),
        lambda k, n: Descent(steps=k, check_every=n),
        lambda k, n: Sampling(groups_per_step=k),
    ],
)
def test_modules_take_numpys_integers_without_a_warning(build, untyped):
    """Warnings are errors here: Equinox warns of arrays in static fields."""
    plain, given = build(4, 9), build(np.int64(4), np.int64(9))
    assert all(type(number) is int for number in static_numbers(given))
    assert eqx.tree_equal(plain, given)
    assert jax.tree.structure(plain) == jax.tree.structure(given), "one compilation serves both"


def test_points_and_sets_of_numpys_integers(key, untyped):
    alpha, beta = regression_points(np.int64(3), np.int32(5))
    assert (alpha.shape, beta.shape) == ((3,), (5,))
    sets = straggler_sets(ExactStragglers(np.int64(2)), key, np.int64(5), np.int64(64))
    assert sets.shape == (10, 5)
    assert type(IndependentStragglers(np.float64(0.25)).probability) is float
    law = TraceLatency([0.1, 0.2])  # a list
    mask = jax.jit(lambda key: WaitFor(law, 3).available(key, 4))(key)
    assert int(mask.sum()) == 3


def test_a_pool_takes_numpys_integers(untyped):
    with DevicePool(np.tanh, np.int64(2), max_attempts=np.int64(2), compiled=False) as pool:
        batch = pool.dispatch(np.zeros((3, 1, 2), np.float32), needed=np.int64(3))
        assert batch.wait(np.int64(3)).available.all()


# -- Pytrees: one matrix, one mask, every way of running, as the same model on plain vectors -------


K, N, GROUPS = 3, 6, 2
FIVE = np.arange(N) != 2
MIXED = Berrut(K, N)
drawn = np.random.default_rng(0)
TREE = {
    "image": drawn.normal(size=(GROUPS, K, 2, 2)).astype("float32"),
    "meta": drawn.normal(size=(GROUPS, K, 3)).astype("float32"),
}
FLAT = np.concatenate([TREE["image"].reshape(GROUPS, K, 4), TREE["meta"]], axis=-1)


def heads(batch):
    """A dict of heads, one of them a matrix."""
    image = batch["image"].reshape(-1, 4)
    return {
        "label": jnp.sin(image) + batch["meta"][:, :1],
        "box": jnp.tanh(batch["image"]),
    }


def vectors(batch):
    """The same on vectors."""
    label = jnp.sin(batch[:, :4]) + batch[:, 4:5]
    return jnp.concatenate([jnp.tanh(batch[:, :4]), label], axis=-1)


def expected(code, mask):
    """Predictions (box, then label) of the textbook's matrices, in float64."""
    return decoded_by_hand(code, vectors, FLAT, [mask])[0]


def as_vectors(tree):
    flat = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    lead = flat[0].ndim - 2  # of the box
    return np.concatenate([leaf.reshape(*leaf.shape[:lead], -1) for leaf in flat], axis=-1)


def points(x=TREE):
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), x)


def mesh():
    return jax.make_mesh((4,), ("workers",), axis_types=(jax.sharding.AxisType.Auto,))


def tree_in_pool():
    with DevicePool(heads, N) as pool:
        result = pool_inference(pool, Replication(K, N), with_status=True)(TREE)
    assert set(result.answers.values) == {"label", "box"}
    return result.decoded.predictions


PLAIN = NeRCC(K, N, lambda_dec=0.0)
WAYS = {
    "code": (lambda: coded_inference(heads, MIXED)(TREE, FIVE), MIXED, FIVE),
    "mesh": (lambda: coded_inference(heads, MIXED, mesh=mesh())(TREE, FIVE), MIXED, FIVE),
    "jit": (lambda: jax.jit(coded_inference(heads, MIXED))(TREE, FIVE), MIXED, FIVE),
    "pool": (tree_in_pool, Replication(K, N), np.ones(N, bool)),
    "scheme": (
        lambda: coded_inference(heads, Scheme(PLAIN), grouped=True)(TREE, FIVE), PLAIN, FIVE,
    ),
    "scheme on a mesh": (
        lambda: coded_inference(heads, Scheme(PLAIN), grouped=True, mesh=mesh())(TREE, FIVE),
        PLAIN, FIVE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_every_way(way):
    run, *used = WAYS[way]
    got = run()
    assert got["label"].shape == (GROUPS, K, 4)
    assert got["box"].shape == (GROUPS, K, 2, 2)
    np.testing.assert_allclose(as_vectors(got), expected(*used), atol=2e-5)


def test_one_mask_counts_for_all_leaves():
    """What breaks in one head makes a straggler in all."""
    y = {"a": jnp.ones((N, 2)), "b": jnp.ones((N, 3, 1)).at[4, 1, 0].set(jnp.nan)}
    decoded = MIXED.try_decode(y, np.ones(N, bool))
    assert np.flatnonzero(~decoded.responded).tolist() == [4]
    assert np.isfinite(decoded.predictions["a"]).all()
    half = MIXED.try_decode({"a": jnp.ones((N, 2), jnp.bfloat16), "b": jnp.ones((N, 1))}, FIVE)
    assert half.predictions["a"].dtype == half.predictions["b"].dtype == jnp.float32


def test_what_cannot_be_mixed(untyped):
    differs = {**TREE, "task": np.arange(GROUPS * K).reshape(GROUPS, K)}
    message = r"x\['task'\] is int(32|64): .*code their embeddings, and .* a further argument"
    whole = coded_inference(heads, MIXED)
    for infer in (whole, jax.jit(whole), coded_inference(heads, MIXED, mesh=mesh())):
        with pytest.raises(ValueError, match=message):
            infer(differs, FIVE)
    with pytest.raises(ValueError, match=message):
        MIXED.encode(jax.tree.map(lambda leaf: leaf[0], differs))


def test_shapes_that_do_not_fit(untyped):
    with pytest.raises(ValueError, match=r"x\['meta'\] of shape \(2, 2, 3\)"):
        coded_inference(heads, MIXED)({**TREE, "meta": TREE["meta"][:, :2]}, FIVE)
    with pytest.raises(
        ValueError, match=r"y\['b'\] has shape \(5,\); its first axis must be the 6"
    ):
        MIXED.decode({"a": np.ones(N), "b": np.ones(5)}, FIVE)
    with pytest.raises(ValueError, match="holds no array"):
        MIXED.encode({})


def test_evaluation_and_the_objective():
    one = jax.tree.map(lambda leaf: np.concatenate([leaf[:1]] * 4), TREE)
    laws = {"one": ExactStragglers(1)}
    key = jax.random.key(0)
    tree = evaluate(heads, {"c": MIXED}, points(one), laws, key=key, num_sets=3)[0]
    flat = np.concatenate([FLAT[:1]] * 4).reshape(-1, 7)
    plain = evaluate(vectors, {"c": MIXED}, flat, laws, key=key, num_sets=3)[0]
    for metric in ("mse", "rmse", "lost"):
        np.testing.assert_allclose(
            getattr(tree, metric).mean, getattr(plain, metric).mean, rtol=1e-4
        )
    forecast = record_answers(heads, MIXED, points(one))
    np.testing.assert_allclose(forecast.losses(jnp.asarray(FIVE[None]), "mse")[0], nested_objective(
        heads, MIXED, one, FIVE[None]), rtol=1e-4)  # fmt: skip
    # A data point keeps its labels if it keeps them all: along the last axis of every head.
    own = heads(jax.tree.map(jnp.asarray, points(one)))
    decoded = coded_inference(heads, MIXED)(one, FIVE)
    same = [
        (np.argmax(np.asarray(decoded[name]).reshape(own[name].shape), -1)
         == np.argmax(own[name], -1)).reshape(len(flat), -1).all(axis=1)
        for name in own
    ]  # fmt: skip
    wrong = nested_objective(heads, MIXED, one, FIVE[None], criterion="disagreement")
    np.testing.assert_allclose(wrong, 1 - np.mean(np.logical_and(*same)), atol=1e-6)
    labels = {name: np.argmax(own[name], -1) for name in own}
    row = evaluate(heads, {"c": MIXED}, points(one), laws, key=key, num_sets=3, labels=labels)[0]
    assert row.accuracy.mean == row.rel_acc.mean


def test_a_scheme_with_all_that_it_may_have():
    one = jax.tree.map(lambda leaf: np.concatenate([leaf[:1]] * 20), TREE)
    code = NeRCC(K, N, points="repeated")
    surrogate = Surrogate(lambda b: jax.tree.map(lambda leaf: 0.9 * leaf, heads(b)), kappa=1.0)
    laws, key = {"two": ExactStragglers(2)}, jax.random.key(0)
    error_probability = calibrate_error_probability(
        heads, Scheme(code, surrogate), points(one), laws, key=key
    )
    scheme = Scheme(code, surrogate, error_probability, order="pixels")
    mask = np.arange(N) > 1
    assessed = coded_inference(heads, scheme, with_status=True)(points(one), mask)
    own = heads(jax.tree.map(jnp.asarray, points(one)))
    sure = np.asarray(assessed.error_probability) == 0
    assert 0 < sure.sum() < len(sure)
    got = assessed.predictions
    for name in own:
        np.testing.assert_allclose(np.asarray(got[name])[sure], own[name][sure], atol=1e-5)
    again = reexecute(heads, points(one), assessed)
    for name in own:
        np.testing.assert_allclose(again.predictions[name], own[name], atol=1e-5)


def test_lies_are_found_in_any_head():
    code = NeRCC(8, 32)
    t = np.linspace(-1, 1, 8, dtype="float32")[:, None]
    coded = code.encode(t)
    y = {"a": jnp.sin(2 * coded), "b": jnp.cos(coded)[:, None]}
    y["b"] = y["b"].at[7].add(5.0)
    found, suspected = robust_decode(code, y, np.ones(32, bool), max_adversaries=2)
    assert np.flatnonzero(suspected).tolist() == [7]
    np.testing.assert_allclose(found.predictions["b"][:, 0], np.cos(t), atol=1e-3)
