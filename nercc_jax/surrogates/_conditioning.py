"""A group's answers beside the window's: the posterior of data points given both."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..codes import Form, multiply
from ._interface import AbstractExpectation, Expected
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
        known, white = jax.vmap(whiten_group)(self.covariance, self.noise, heard)
        return self.told(known, white, y, heard)

    def told(
        self,
        known: Float[Array, "groups num_workers points"],
        white: Float[Array, "groups num_workers num_workers"],
        y: Float[Array, "groups num_workers m"],
        heard: Bool[Array, "groups num_workers"],
    ) -> Expected:
        """As `given`, of groups that are whitened already (`whiten_group`)."""
        mean, variance = jax.vmap(_told)(
            self.mean, self.covariance, self.noise, known, white, y, heard
        )
        num_data = mean.shape[1] - y.shape[1]
        deviation = self.unit[:, None] * root(variance[:, :num_data])
        return Expected(mean[:, :num_data], mean[:, num_data:], deviation)


def whiten_group(
    covariance: Float[Array, "points points"],
    noise: Float[Array, ""],
    heard: Bool[Array, " num_workers"],
) -> tuple[Float[Array, "num_workers points"], Float[Array, "num_workers num_workers"]]:
    """With L the factor of the heard answers' covariances, L^-1 of their covariances with all
    points, and L^-1."""
    num_workers = len(heard)
    cross = jnp.where(heard[:, None], covariance[-num_workers:], 0)
    own = jnp.where(heard, cross[:, -num_workers:], 0) + jnp.diag(jnp.where(heard, noise, 1))
    factor, _ = factorize(own)
    right = jnp.concatenate([cross, jnp.eye(num_workers, dtype=cross.dtype)], axis=1)
    both = jax.lax.linalg.triangular_solve(factor, right, left_side=True, lower=True)
    return both[:, : len(covariance)], both[:, len(covariance) :]


def _told(
    mean: Float[Array, "points m"],
    covariance: Float[Array, "points points"],
    noise: Float[Array, ""],
    known: Float[Array, "num_workers points"],
    white: Float[Array, "num_workers num_workers"],
    y: Float[Array, "num_workers m"],
    heard: Bool[Array, " num_workers"],
) -> tuple[Float[Array, "points m"], Float[Array, " points"]]:
    """One group's posterior mean and variance, noise included."""
    residual = jnp.where(heard[:, None], y.astype(mean.dtype) - mean[-len(heard) :], 0)
    variance = jnp.maximum(jnp.diagonal(covariance) - jnp.sum(known**2, axis=0), 0) + noise
    return mean + multiply(known.T, multiply(white, residual)), variance
