"""What models are refused: one data point at a time, training mode; what runs on the host."""

import functools
import json
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nercc_jax import DevicePool, ExactStragglers, NeRCC, coded_inference, evaluate
from nercc_jax.codes.workers import call_model
from nercc_jax.inference.models import check_model
from nercc_jax.serving import make_servable

K, N = 3, 5
ONE = "takes one data point, not a batch of them: give jax.vmap"


@pytest.fixture
def mlp(key):
    return eqx.nn.MLP(2, 4, 6, 1, key=key)


def test_a_model_of_one_data_point_is_refused_in_words(mlp):
    x, everyone = jnp.ones((K, 2)), jnp.ones(N, bool)
    with pytest.raises(ValueError, match=ONE) as caught:
        coded_inference(mlp, NeRCC(K, N))(x, everyone)
    assert isinstance(caught.value.__cause__, TypeError), "the model's own error goes with it"
    assert coded_inference(jax.vmap(mlp), NeRCC(K, N))(x, everyone).shape == (K, 4)


def test_arguments_and_inputs_of_several_arrays_are_reported_alike():
    def strict(x, scale):
        if x["image"].ndim != 1:
            raise TypeError("a vector")
        return jnp.dot(x["image"], jnp.ones(2)) * scale + x["age"]

    batch = {"image": np.ones((1, 2), np.float32), "age": np.ones((1, 1), np.float32)}
    assert call_model(jax.vmap(strict, (0, None)), batch, 2.0).shape == (1, 1)
    with pytest.raises(ValueError, match=ONE):
        call_model(strict, batch, 2.0)


# Functions that JAX cannot trace run on the host.


def branch(x):
    return x if x.sum() > 0 else -x


def as_json(x):
    rows = json.loads(json.dumps(np.asarray(x).tolist()))  # as a subprocess or a server gets them
    return np.array([[sum(row), max(row)] for row in rows])  # float64


def loop(x):
    return [[float(sum(row)), float(max(row))] for row in x]


def signs(x):  # integers where all are positive, floats where they are not
    return np.array([[1 if sum(row) > 0 else 0.0] for row in np.asarray(x).tolist()])


def logarithm(x):  # at zeros it raises
    return np.array([[math.log(each) for each in row] for row in np.asarray(x).tolist()])


@pytest.mark.parametrize(
    "function", [lambda x: np.tanh(np.asarray(x)), branch, as_json, loop, signs, logarithm]
)
def test_a_function_that_jax_cannot_trace_runs_on_the_host(function):
    rng = np.random.default_rng(0)
    x = rng.uniform(1, 2, (6, K, 2)).astype(np.float32)
    code, mask = NeRCC(K, N), np.arange(N) != 1
    coded = np.asarray(code.encode(x[0]))
    expected = code.decode(np.asarray(function(coded), np.float32), mask)
    infer = coded_inference(function, code)
    np.testing.assert_allclose(infer(x[0], mask), expected, rtol=1e-6)
    groups = infer(x, mask)  # one call for all groups, and one a group: rows are the same
    assert groups.dtype == np.float32
    np.testing.assert_allclose(groups[0], expected, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(lambda x: infer(x, mask))(x), groups, rtol=1e-5)
    mesh = jax.make_mesh((4,), ("workers",))
    np.testing.assert_allclose(coded_inference(function, code, mesh=mesh)(x, mask), groups, 1e-5)
    found = evaluate(
        function, {"": code}, x.reshape(-1, 2), {"": ExactStragglers(1)}, key=jax.random.key(0)
    )
    assert np.isfinite(found[0].mse.mean)


def never(x):
    raise ArithmeticError(f"there is no such case as {np.asarray(x)}")


def test_what_a_function_on_the_host_does_wrong_is_reported():
    x, mask = np.ones((K, 2), np.float32), np.ones(N, bool)

    def fails(x):
        if np.asarray(x).any():
            raise RuntimeError("the simulator failed")
        return x

    with pytest.raises(Exception, match="the simulator failed"):
        jax.block_until_ready(coded_inference(fails, NeRCC(K, N))(x, mask))
    with pytest.raises(Exception, match=rf"\({N}, 2\).*\(1, 2\)"):
        jax.block_until_ready(coded_inference(lambda x: np.asarray(x)[:1], NeRCC(K, N))(x, mask))
    with pytest.raises(ValueError, match=r"called on one data point of zeros, and .*no such"):
        coded_inference(never, NeRCC(K, N))(x, mask)
    with pytest.raises(TypeError, match="no derivative: tuning and gradients need a model of jax"):
        jax.grad(lambda x: coded_inference(np.tanh, NeRCC(K, N))(x, mask).sum())(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda x: None, "the model's answer holds no array: None"),
        (lambda x: np.array(["a"] * len(x)), "must map a batch of .* to arrays of as many answers"),
    ],
)
def test_an_answer_that_is_no_array_is_refused_in_words(model, message):
    x, law = np.ones((K, 2), np.float32), {"": ExactStragglers(1)}
    with pytest.raises(ValueError, match=message):
        coded_inference(model, NeRCC(K, N))(x, np.ones(N, bool))
    with pytest.raises(ValueError, match=message):
        evaluate(model, {"": NeRCC(K, N)}, x, law, key=jax.random.key(0))


def test_an_expensive_function_gets_few_more_rows_than_there_are():
    rows = []

    def counted(x):
        x = np.asarray(x)
        rows.append(len(x))
        return np.tanh(x)

    x, laws = np.ones((4 * K, 2), np.float32), {"": ExactStragglers(1)}
    evaluate(counted, {"": NeRCC(K, N)}, x, laws, key=jax.random.key(0))
    assert sum(rows) <= 2 * 4 * (K + N)  # and a few for the shapes of its answers


def test_other_errors_of_a_model_are_its_own():
    def broken(x):
        raise KeyError("weights")

    def broken_on_values(x):
        y = 2 * x
        if not isinstance(x, jax.core.Tracer):
            raise RuntimeError("no memory left")
        return y

    with pytest.raises(KeyError, match="weights"):
        call_model(broken, jnp.ones((3, 2)))
    with pytest.raises(RuntimeError, match="no memory left"):
        call_model(broken_on_values, jnp.ones((3, 2)))


# Training mode.


class Network(nnx.Module):
    """Every kind of layer that has two modes."""

    def __init__(self, rate=0.5, attention_rate=0.0):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(2, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)])
        self.drop = nnx.Dropout(rate, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            2, 4, 4, dropout_rate=attention_rate, decode=False, rngs=rngs
        )

    def __call__(self, x):
        return self.drop(self.layers[1](self.layers[0](x)))

    def logits(self, x):
        return self(x)


def in_mode(model, **attributes):
    """The model in evaluation mode, but for these attributes of all layers."""
    model.eval()
    model.set_attributes(**attributes)
    return model


DROPOUT = {"deterministic": False}
BATCH_NORM = {"use_running_average": False}


@pytest.mark.parametrize(
    ("build", "layer"),
    [
        (lambda: in_mode(Network(), **DROPOUT), "Dropout at drop"),
        (lambda: in_mode(Network(), **BATCH_NORM), r"BatchNorm at layers.*1"),
        (lambda: in_mode(Network(0.0, 0.1), **DROPOUT), "MultiHeadAttention at attention"),
    ],
)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        lambda model: functools.partial(model.__call__),
        lambda model: jax.tree_util.Partial(model),
        lambda model: functools.partial(lambda model, x: model(x), model),
        lambda model: model.__call__,
        lambda model: jax.jit(jax.vmap(model)),
        lambda model: nnx.jit(model),
    ],
)
def test_flax_layers_in_training_mode_are_found(build, layer, wrap):
    with pytest.raises(ValueError, match=f"in training mode: its {layer}.*model.eval"):
        check_model(wrap(build()))


@pytest.mark.parametrize("model", [None, 3, [], [jnp.tanh, None]])
def test_what_is_no_model_is_refused_before_any_work(model, untyped):
    for use in (lambda: coded_inference(model, NeRCC(2, 4)), lambda: DevicePool(model, 2)):
        with pytest.raises(ValueError, match="a model is a callable on a batch, or several are"):
            use()


def test_the_model_may_be_the_layer_itself_or_any_of_several():
    with pytest.raises(ValueError, match=r"its BatchNorm answers.*model.eval"):
        check_model(nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"its Dropout at \[1\].drop answers"):
        check_model([jnp.tanh, in_mode(Network(), **DROPOUT)])


def test_flax_layers_in_evaluation_mode_pass():
    model = Network()
    model.eval()
    for each in (model, model.logits, jax.jit(model), functools.partial(model)):
        check_model(each)
    check_model(in_mode(Network(rate=0.0), **DROPOUT))  # nothing is dropped


@pytest.mark.parametrize(
    "layer",
    [
        eqx.nn.Dropout(0.5),
        eqx.nn.BatchNorm(4, "batch", mode="batch"),
        eqx.nn.MultiheadAttention(1, 4, dropout_p=0.1, key=jax.random.key(0)),
    ],
)
@pytest.mark.parametrize("wrap", [lambda m: m, jax.vmap, eqx.filter_vmap, eqx.filter_jit])
def test_equinox_layers_in_training_mode_are_found(layer, wrap, key):
    model = eqx.nn.Sequential([eqx.nn.Linear(2, 4, key=key), eqx.nn.Lambda(jnp.tanh), layer])
    message = r"in training mode: its \w+ at .*layers\[2\].*eqx.nn.inference_mode"
    with pytest.raises(ValueError, match=message):
        check_model(wrap(model))
    check_model(wrap(eqx.nn.inference_mode(model)))


def test_other_callables_pass(mlp):
    passive = functools.partial(jnp.sum, axis=1)
    for model in (np.tanh, len, mlp, jax.jit(jnp.sum), passive, eqx.nn.Dropout(0.0)):
        check_model(model)


# Who asks.


def open_pool(model):
    with DevicePool(model, 2, example=np.zeros((1, 2), np.float32)):
        pass


def serve(model):
    make_servable("network", model, (2,))


@pytest.mark.parametrize("use", [open_pool, serve])
def test_pools_and_servers_ask(use, mlp):
    with pytest.raises(ValueError, match=r"its Dropout at drop .*model.eval"):
        use(in_mode(Network(), **DROPOUT))
    use(in_mode(Network()))
    with pytest.raises((ValueError, RuntimeError), match=ONE):
        use(mlp)
    use(jax.vmap(mlp))
