"""A group's answers beside the window's: the posterior of data points given both."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..codes import Form, multiply
from ._expected import AbstractExpectation, Expected
from ._kernels import root
from ._whitening import factorize


class Conditioned(AbstractExpectation):
    """A Gaussian process on groups' data points and coded ones, in this order, after the window.

    `covariance` and `noise` are in units of the process's variance, `unit` is its root in units of
    the outputs: infinite where nothing is known of it.
    """

    mean: Float[Array, "groups points m"]
    covariance: Float[Array, "groups points points"]
    noise: Float[Array, " groups"]
    unit: Float[Array, " groups"]
    form: Form = eqx.field(static=True)

    def given(
        self,
        y: Float[Array, "groups num_workers m"],
        heard: Bool[Array, "groups num_workers"],
    ) -> Expected:
        mean, variance = jax.vmap(_given)(self.mean, self.covariance, self.noise, y, heard)
        num_data = mean.shape[1] - y.shape[1]
        deviation = self.unit[:, None] * root(variance[:, :num_data])
        return Expected(mean[:, :num_data], mean[:, num_data:], deviation)


def _given(
    mean: Float[Array, "points m"],
    covariance: Float[Array, "points points"],
    noise: Float[Array, ""],
    y: Float[Array, "num_workers m"],
    heard: Bool[Array, " num_workers"],
) -> tuple[Float[Array, "points m"], Float[Array, " points"]]:
    """One group's posterior mean and variance, noise included."""
    num_data = len(mean) - len(y)
    cross = jnp.where(heard[:, None], covariance[num_data:], 0)
    own = jnp.where(heard, cross[:, num_data:], 0) + jnp.diag(jnp.where(heard, noise, 1))
    factor, _ = factorize(own)
    residual = jnp.where(heard[:, None], y.astype(mean.dtype) - mean[num_data:], 0)
    right = jnp.concatenate([cross.astype(mean.dtype), residual], axis=1)
    white = jax.lax.linalg.triangular_solve(
        factor.astype(right.dtype), right, left_side=True, lower=True
    )
    known, told = white[:, : len(mean)], white[:, len(mean) :]
    variance = jnp.maximum(jnp.diagonal(covariance) - jnp.sum(known**2, axis=0), 0) + noise
    return mean + multiply(known.T, told), variance
