"""The choice of lambda by generalised cross-validation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._fit import Fit
from ._problem import Columns, steps
from ._rule import solve, variance
from .arrays import taken, where


def cross_validated(found: Fit, y: Float[Array, "n m"]) -> Fit:
    """Return the fit with the lambda of the least generalised cross-validation score.

    The score is, over all coordinates of y and the n available observations,

        sum_i w_i |y_i - u(t_i)|^2 / (1 - trace A / n)^2,

    where A maps observations to fitted values. It is looked for among 33 values of log lambda, five
    times, each time between the best one's neighbours. At first only those count from which the
    score rises on both sides, and the straight line: of two observations that lie close together
    and agree by chance, the score would take all noise for a signal, and interpolate. The
    derivative is that of a root of the slope, to any order, and zero where the best is the first or
    the last. It takes O(n^2) memory.

    Source: Craven and Wahba 1979, Numerische Mathematik 31; with weights: Green and Silverman 1994,
    section 3.5.3.
    """
    knots, slot = found.knots, jnp.arange(len(found.knots.t))
    means, count = knots.average(y), jnp.sum(knots.share > 0).astype(y.dtype)
    # Coincident observations differ from their knot's whatever lambda is.
    by_point = knots.share * taken(knots.weights, knots.knot)
    apart = jnp.sum(by_point[:, None] * (y - taken(means, knots.knot)) ** 2)
    # Each knot's value is that of its gap's right end, the first one's of its left end.
    gap, later = jnp.maximum(slot - 1, 0), (slot > 0).astype(y.dtype)
    left, right = (jnp.stack([each, jnp.zeros_like(each)]) for each in (1 - later, later))

    def with_lambda(log_lambda: Float[Array, ""]) -> Fit:
        return Fit(knots, jnp.exp(log_lambda), found.end_weights, found.ends)

    def score(log_lambda: Float[Array, ""]) -> Float[Array, ""]:
        problem = with_lambda(log_lambda).problem
        shifts = solve(problem, Columns(shear=-steps(means))).value
        squares = apart + jnp.sum(knots.weights[:, None] * shifts**2)
        trace = jnp.sum(knots.weights * variance(problem, gap, left, right)) / problem.mu
        free = 1 - trace / jnp.maximum(count, 1)
        sure = free > 1e3 * jnp.finfo(y.dtype).eps  # below, it is all rounding
        return where(sure, squares / where(sure, free, 1) ** 2, jnp.inf)

    observed = knots.weights > 0
    span = jnp.max(where(observed, knots.t, -jnp.inf)) - jnp.min(where(observed, knots.t, jnp.inf))
    shortest = jnp.min(where(observed[1:] & observed[:-1], steps(knots.t), span))
    enough = knots.number > 2
    low, high = jax.lax.stop_gradient(
        (
            where(enough, 3 * jnp.log(where(enough, shortest, 1) / 10) - jnp.log(count), -1),
            where(enough, 3 * jnp.log(where(enough, span, 1) * 10), 1),
        )
    )

    def search(_: object, start: Float[Array, ""]) -> Float[Array, ""]:
        def closer(turn: Array, kept: tuple[Array, Array]) -> tuple[Array, Array]:
            middle, width = kept
            near = jnp.clip(middle + width * jnp.linspace(-1, 1, 33, dtype=y.dtype), low, high)
            scores = jax.vmap(score)(near)
            known = where(jnp.isfinite(scores), scores, -jnp.inf)
            before, after = jax.lax.cummax(known), jax.lax.cummax(known, reverse=True)
            rises = (before > 1.001 * scores) & (after > 1.001 * scores).at[-1].set(True)
            skipped = (turn == 0) & jnp.any(rises) & ~rises
            return near[jnp.argmin(where(skipped, jnp.inf, scores))], width / 16

        return jax.lax.fori_loop(0, 5, closer, (start, (high - low) / 2))[0]

    def slope(log_lambda: Float[Array, ""]) -> Float[Array, ""]:
        inside = (log_lambda > low) & (log_lambda < high)
        return where(inside, jax.grad(score)(log_lambda), log_lambda)

    def tangent(linear, change):
        curvature = linear(jnp.ones_like(change))
        return where(curvature > 0, change / where(curvature > 0, curvature, 1), 0)

    best = jax.lax.custom_root(slope, (low + high) / 2, search, tangent)
    return with_lambda(best)
