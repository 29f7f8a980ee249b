"""Regression points that differ from group to group: a code's own are moved inside the program."""

import dataclasses
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ._code import AbstractCode
from ._points import coincident

_LEAST = 1e-3  # of the mean distance: alphas stay distinct where data points are the same


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


def check_has_points(code: AbstractCode) -> None:
    """Raise ValueError for a code without regression points, or lambdas."""
    if not has_points(code):
        raise ValueError(
            f"{type(code).__name__} has no smoothing splines whose points could be moved: NeRCC has"
        )


def has_points(code: AbstractCode) -> bool:
    """Return whether a code has points and lambdas, as NeRCC has."""
    names = {field.name for field in dataclasses.fields(code)}
    return {"alpha", "beta", "lambda_enc", "lambda_dec"} <= names


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
    steps = jnp.maximum(steps, jnp.where(mean > 0, _LEAST * mean, 1))
    share = jnp.concatenate([jnp.zeros(1, alpha.dtype), jnp.cumsum(steps)]) / jnp.sum(steps)
    new = old[0] + (old[-1] - old[0]) * share
    between = jnp.interp(beta, old, new)
    outside = (beta < old[0]) | (beta > old[-1])
    nearest = jnp.argmin(jnp.abs(beta[:, None] - old), axis=1)
    moved = jnp.where(coincident(beta, old), new[nearest], jnp.where(outside, beta, between))
    return jnp.zeros_like(alpha).at[order].set(new), moved


def copies_of_uncertain(
    deviation: Float[Array, "groups num_data"],
    num_workers: int,
    *,
    lost: float = 0.1,
    budget: float | None = None,
) -> tuple[Int[Array, "groups num_workers"], Array]:
    """Return the data point of each worker in each group, and which workers have one.

    All data points come once, and uncertain ones again: with the share `lost` of the workers, a
    further copy of a data point that c workers have takes deviation^2 lost^c off the expected
    squared error, and copies go, one by one, where that is most.

    Args:
        deviation: The standard deviation of each data point's prediction.
        num_workers: N.
        lost: The share of workers that are expected to straggle.
        budget: The mean number of workers of a group: groups with more uncertainty get more of
            them, up to N, and those left over have nothing to do.

    Raises:
        ValueError: There are fewer workers than data points, or the budget is not between them.
    """
    groups, num_data = deviation.shape
    further = num_workers - num_data
    if further < 0:
        raise ValueError(f"{num_data} data points need as many workers, not {num_workers}")
    if budget is not None and not num_data <= budget <= num_workers:
        raise ValueError(f"budget must be from {num_data} to {num_workers} workers, not {budget}")
    own = jnp.broadcast_to(jnp.arange(num_data), (groups, num_data))
    busy = jnp.ones((groups, num_workers), bool)
    if further == 0:
        return own, busy
    # What is infinite ranks first, and its copies among each other. Roots rank as the gains do, and
    # stay within float32 in any unit.
    worth, kept = jnp.minimum(deviation, jnp.finfo(deviation.dtype).max), math.sqrt(lost)

    def next_copy(worth: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        chosen = jnp.argmax(worth, axis=1)
        gain = jnp.take_along_axis(worth, chosen[:, None], axis=1)[:, 0]
        return worth * jnp.where(jnp.arange(num_data) == chosen[:, None], kept, 1), (chosen, gain)

    _, (chosen, gains) = jax.lax.scan(next_copy, worth, None, length=further)
    holds = jnp.concatenate([own, chosen.T], axis=1)
    if budget is None:
        return holds, busy
    number = round(groups * (budget - num_data))
    rank = jnp.argsort(jnp.argsort(-gains.T.reshape(-1), stable=True)).reshape(groups, further)
    return holds, busy.at[:, num_data:].set(rank < number)
