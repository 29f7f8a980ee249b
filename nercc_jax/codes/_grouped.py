"""Regression points that differ from group to group: a code's own are moved inside the program."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._code import AbstractCode
from ._points import coincident


class GroupPoints(eqx.Module):
    """The points (alpha, beta) of each group; `exact` where its answers are not to be smoothed."""

    alpha: Float[Array, "groups num_data"]
    beta: Float[Array, "groups num_workers"]
    exact: bool = eqx.field(static=True, default=False)

    def encoders(self, code: AbstractCode) -> Float[Array, "groups num_workers num_data"]:
        """Return each group's encoder."""
        return jax.vmap(lambda own: own.of(code).encoder_matrix())(self)

    def of(self, code: Any) -> Any:
        """Return the code with these points, of one group (without the axis of groups)."""
        moved = eqx.tree_at(lambda c: (c.alpha, c.beta), code, (self.alpha, self.beta))
        if not self.exact:
            return moved
        none = jnp.zeros_like(moved.lambda_enc)
        return eqx.tree_at(lambda c: (c.lambda_enc, c.lambda_dec), moved, (none, none))


def following_points(
    code: Any, coordinates: Float[Array, "num_data d"]
) -> tuple[Float[Array, " num_data"], Float[Array, " num_workers"]]:
    """Return alphas as far apart as a group's data points are, and betas that go along with them.

    In the order of the code's alphas, chord lengths between neighbours divide the range from the
    first alpha to the last. A beta at an alpha stays at it, one between two stays between them at
    the same share of the gap, and one outside stays. Differentiable in the coordinates, but where
    neighbours are the same.

    Args:
        code: A code with points.
        coordinates: The places of the data points: inputs, features, or the one parameter they
            differ by.
    """
    if code.num_data == 1:
        return code.alpha, code.beta
    alpha, beta = code.alpha, code.beta
    order = jnp.argsort(alpha)
    old = alpha[order]
    square = jnp.sum(jnp.diff(coordinates[order], axis=0) ** 2, axis=1)
    apart = square > 0
    steps = jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1)), 0).astype(alpha.dtype)
    mean = jnp.mean(steps)
    # Alphas stay distinct where data points are the same.
    steps = jnp.maximum(steps, jnp.where(mean > 0, 1e-3 * mean, 1))
    share = jnp.concatenate([jnp.zeros(1, alpha.dtype), jnp.cumsum(steps)]) / jnp.sum(steps)
    new = old[0] + (old[-1] - old[0]) * share
    between = jnp.interp(beta, old, new)
    outside = (beta < old[0]) | (beta > old[-1])
    nearest = jnp.argmin(jnp.abs(beta[:, None] - old), axis=1)
    moved = jnp.where(coincident(beta, old), new[nearest], jnp.where(outside, beta, between))
    return jnp.zeros_like(alpha).at[order].set(new), moved
