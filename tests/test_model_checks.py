"""What models are refused: one data point at a time, training mode."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nercc_jax import DevicePool, NeRCC, coded_inference, pool_inference
from nercc_jax.inference._models import call_model, check_model
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
    def one(x, scale):
        return jnp.dot(x["image"], jnp.ones(2)) * scale + x["age"]

    batch = {"image": np.ones((7, 2), np.float32), "age": np.ones((7, 1), np.float32)}
    assert call_model(jax.vmap(one, (0, None)), batch, 2.0).shape == (7, 1)

    def strict(x, scale):
        if x["image"].ndim != 1:
            raise TypeError("a vector")
        return one(x, scale)

    with pytest.raises(ValueError, match=ONE):
        call_model(strict, batch, 2.0)


@pytest.mark.parametrize(
    "model",
    [lambda x: np.tanh(np.asarray(x)), lambda x: x if x.sum() > 0 else -x],
    ids=["numpy", "branch"],
)
def test_a_model_that_jax_cannot_trace_is_for_a_pool(model):
    x = np.ones((K, 2), np.float32)
    with pytest.raises(TypeError, match=r"JAX cannot trace the model.*Workers of a pool call any"):
        coded_inference(model, NeRCC(K, N))(x, np.ones(N, bool))
    with DevicePool(model, N, compiled=False) as pool:
        assert pool_inference(pool, NeRCC(K, N))(x).shape == (K, 2)


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


def test_the_model_may_be_the_layer_itself():
    with pytest.raises(ValueError, match=r"its BatchNorm answers.*model.eval"):
        check_model(nnx.BatchNorm(2, rngs=nnx.Rngs(0)))


def test_any_of_several_models_may_be_in_training_mode():
    with pytest.raises(ValueError, match=r"its Dropout at \[1\].drop answers"):
        check_model([jnp.tanh, in_mode(Network(), **DROPOUT)])


def test_flax_layers_in_evaluation_mode_pass():
    model = Network()
    model.eval()
    for each in (model, model.logits, jax.jit(model), functools.partial(model)):
        check_model(each)
    check_model(in_mode(Network(rate=0.0), **DROPOUT))  # nothing is dropped


def equinox_network(layer, key):
    return eqx.nn.Sequential([eqx.nn.Linear(2, 4, key=key), eqx.nn.Lambda(jnp.tanh), layer])


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
    model = equinox_network(layer, key)
    message = r"in training mode: its \w+ at .*layers\[2\].*eqx.nn.inference_mode"
    with pytest.raises(ValueError, match=message):
        check_model(wrap(model))
    check_model(wrap(eqx.nn.inference_mode(model)))


def test_other_callables_pass(mlp):
    for model in (jnp.sin, np.tanh, len, mlp, jax.jit(jnp.sum), functools.partial(jnp.sum, axis=1)):
        check_model(model)
    check_model(equinox_network(eqx.nn.Dropout(0.0), jax.random.key(0)))
    check_model(lambda x: x)


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
