"""Conditioning of a Gaussian process on a group's answers, after the window's pairs."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ..codes._products import multiply
from ..codes._trees import Form
from ._interface import AbstractGroupPrior, SurrogatePredictions
from ._kernels import safe_sqrt
from ._whitening import cholesky_factor


class GaussianGroupPrior(AbstractGroupPrior):
    """A Gaussian process on groups' data points and coded data points, in this order.

    Attributes:
        mean: The means, given the window.
        covariance: The covariances within each group, in units of the process's variance.
        noise: The variance of the noise, in the same units.
        unit: The process's standard deviation in units of the outputs; infinite where it is
            unknown.
        form: The structure of the outputs.
    """

    mean: Float[Array, "groups points m"]
    covariance: Float[Array, "groups points points"]
    noise: Float[Array, " groups"]
    unit: Float[Array, " groups"]
    form: Form = eqx.field(static=True)

    def condition(
        self,
        y: Float[Array, "groups num_workers m"],
        responded: Bool[Array, "groups num_workers"],
    ) -> SurrogatePredictions:
        known, white = jax.vmap(whiten_group)(self.covariance, self.noise, responded)
        return self.condition_whitened(known, white, y, responded)

    def condition_whitened(
        self,
        known: Float[Array, "groups num_workers points"],
        white: Float[Array, "groups num_workers num_workers"],
        y: Float[Array, "groups num_workers m"],
        responded: Bool[Array, "groups num_workers"],
    ) -> SurrogatePredictions:
        """Condition groups that are whitened already (`whiten_group`)."""
        mean, variance = jax.vmap(_posterior)(
            self.mean, self.covariance, self.noise, known, white, y, responded
        )
        num_data = mean.shape[1] - y.shape[1]
        deviation = self.unit[:, None] * safe_sqrt(variance[:, :num_data])
        return SurrogatePredictions(mean[:, :num_data], mean[:, num_data:], deviation)


def whiten_group(
    covariance: Float[Array, "points points"],
    noise: Float[Array, ""],
    responded: Bool[Array, " num_workers"],
) -> tuple[Float[Array, "num_workers points"], Float[Array, "num_workers num_workers"]]:
    """Return L^-1 C and L^-1, with L the factor of the answers' covariances.

    C are the covariances of the answers that came with all points of the group.
    """
    num_workers = len(responded)
    cross = jnp.where(responded[:, None], covariance[-num_workers:], 0)
    own = jnp.where(responded, cross[:, -num_workers:], 0) + jnp.diag(
        jnp.where(responded, noise, 1)
    )
    factor, _ = cholesky_factor(own)
    right = jnp.concatenate([cross, jnp.eye(num_workers, dtype=cross.dtype)], axis=1)
    both = jax.lax.linalg.triangular_solve(factor, right, left_side=True, lower=True)
    return both[:, : len(covariance)], both[:, len(covariance) :]


def _posterior(
    mean: Float[Array, "points m"],
    covariance: Float[Array, "points points"],
    noise: Float[Array, ""],
    known: Float[Array, "num_workers points"],
    white: Float[Array, "num_workers num_workers"],
    y: Float[Array, "num_workers m"],
    responded: Bool[Array, " num_workers"],
) -> tuple[Float[Array, "points m"], Float[Array, " points"]]:
    """Return one group's posterior mean and variance, noise included."""
    residual = jnp.where(responded[:, None], y.astype(mean.dtype) - mean[-len(responded) :], 0)
    variance = jnp.maximum(jnp.diagonal(covariance) - jnp.sum(known**2, axis=0), 0) + noise
    return mean + multiply(known.T, multiply(white, residual)), variance
