"""What models are refused: one data point at a time, training mode."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nercc_jax import NeRCC, coded_inference
from nercc_jax.inference import call_model

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


def test_arguments_and_inputs_of_several_arrays_are_told_alike():
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
