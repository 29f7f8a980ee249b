"""Pools inside the caller's mesh: `jax.set_mesh` is no business of theirs."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from nercc_jax import DevicePool, NeRCC, pool_inference
from nercc_jax.pools import run_batches

K, N = 3, 6
WEIGHTS = np.random.default_rng(0).normal(size=(2, 4)).astype("float32")
X = np.random.default_rng(1).normal(size=(2, K, 2)).astype("float32")


class Linear(eqx.Module):
    weights: jax.Array

    def __call__(self, x):
        return x @ self.weights


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit])
def mesh(request):
    return jax.make_mesh((8,), ("workers",), axis_types=(request.param,))


def serve(place):
    """Predictions for X, all of it done within `place`'s contexts: open, ask, close."""
    with place():
        model, code = (
            Linear(jnp.asarray(WEIGHTS)),
            NeRCC(K, N, points="interleaved", lambda_dec=0.0),
        )
        with DevicePool(model, N, example=np.zeros((2, 2), np.float32)) as pool:
            one = pool_inference(pool, code)(X)
            batches = [outcome.result for outcome in run_batches(pool, code, [X])]
            assert batches[0] is not None
            return one, batches[0].decoded.predictions


def test_a_pool_lives_under_its_callers_mesh(mesh):
    for predictions in serve(lambda: jax.set_mesh(mesh)):
        # Each data point has a worker of its own, and all answer: the answers themselves.
        np.testing.assert_allclose(predictions, X @ WEIGHTS, atol=1e-4)


def test_a_pool_is_used_under_a_mesh_that_was_set_later(mesh):
    code = NeRCC(K, N, points="interleaved", lambda_dec=0.0)
    with DevicePool(Linear(jnp.asarray(WEIGHTS)), N) as pool:
        infer = pool_inference(pool, code)
        before = infer(X)
        with jax.set_mesh(mesh):
            again = infer(X)
            assert jax.sharding.get_mesh() == mesh, "the caller's mesh is as it was"
        np.testing.assert_allclose(before, X @ WEIGHTS, atol=1e-4)
        np.testing.assert_array_equal(before, again)
