"""From regression points with a mask to distinct, increasing knots, at a fixed shape.

Points come in any order, may coincide, and some carry no weight in this call. A spline solver wants
none of that. `gather_knots` sorts the points that count to the front, lets coincident ones act as
one knot (the mean of their observations, the sum of their weights), and fills up with knots of
weight zero beyond the last, to which a natural spline simply continues straight: they change
nothing. All of it is gathers and sums at the shape of the input, so one compiled program serves
every mask, and everything is differentiable in the points, weights and observations.

What eliminates knots in parallel (`_dissection`) rather has every knot in one place whatever is
available: with `in_place` all points are knots, those that do not count with weight zero.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Points this close, in units of the rounding of the span, are the same point: two formulas for one
# Chebyshev point differ by an ulp, and a gap that is all rounding has no slope to tell.
_COINCIDENT_ULPS = 4

# Up to so many pairs, to compare each with each is one kernel, where a search or a scatter is more.
COMPARED_WITH_ALL = 1 << 16


class Knots(eqx.Module):
    """Distinct increasing knots and how they came from the points; n slots, at least two.

    `order[j]` is the point in place j after sorting, `knot[j]` the knot it belongs to, and
    `share[j]` its part of that knot's weight (0 for points that do not count). `shown[i]` is the
    knot whose observation knot i repeats: itself, or if it has none the last one before it that
    has, or else the first that has.
    """

    t: Float[Array, " n"]
    weights: Float[Array, " n"]
    order: Int[Array, " points"]
    knot: Int[Array, " points"]
    share: Float[Array, " points"]
    shown: Int[Array, " n"]

    def average(self, y: Float[Array, "points m"]) -> Float[Array, "n m"]:
        """Each knot's observation, the weighted mean over its points; linear in y."""
        shares = self.share[:, None] * y[self.order]
        means = jax.ops.segment_sum(shares, self.knot, self.t.shape[0], indices_are_sorted=True)
        return means[self.shown]

    def averages(self) -> Float[Array, "n points"]:
        """`average` as a matrix, by comparing each with each: a few kernels on an accelerator."""
        came = self.order == jnp.arange(self.order.shape[0])[:, None]
        knot = jnp.sum(jnp.where(came, self.knot, 0), axis=1)
        share = jnp.sum(jnp.where(came, self.share, 0), axis=1)
        return jnp.where(knot == self.shown[:, None], share, 0)

    def spread(self, matrix: Float[Array, "k n"]) -> Float[Array, "k points"]:
        """A matrix on knots as a matrix on points: `matrix @ average(y) == spread(matrix) @ y`."""
        empty = jnp.zeros((matrix.shape[0], self.order.shape[0]), matrix.dtype)
        return empty.at[:, self.order].set(matrix[:, self.knot] * self.share)

    @property
    def number(self) -> Int[Array, ""]:
        """How many knots carry weight."""
        return jnp.sum(self.weights > 0)


def gather_knots(
    points: Float[Array, " points"], weights: Float[Array, " points"], *, in_place: bool = False
) -> Knots:
    """The knots of points with non-negative weights; a weight of zero leaves a point out.

    The knots that carry weight are the first ones, unless all stay `in_place`.
    """
    size = points.shape[0]
    slots = max(size, 2)
    counts = weights > 0
    held = jnp.isfinite(points) if in_place else counts
    order = jnp.argsort(jnp.where(held, points, jnp.inf))
    t, weights, counts, held = points[order], weights[order], counts[order], held[order]

    fixed = jax.lax.stop_gradient(t)
    span = jnp.max(jnp.where(counts, jnp.abs(fixed), 0))
    if in_place:  # where nothing counts, gaps must not be rounding, either
        span = jnp.where(span > 0, span, jnp.max(jnp.where(held, jnp.abs(fixed), 0)))
    tolerance = _COINCIDENT_ULPS * jnp.finfo(t.dtype).eps * span
    opens = jnp.concatenate([jnp.ones(1, bool), jnp.diff(fixed) > tolerance]) & held
    knot = jnp.maximum(jnp.cumsum(opens) - 1, 0)

    slot = jnp.arange(slots)

    def per_knot(values):
        if in_place and slots * size <= COMPARED_WITH_ALL:
            return jnp.sum(jnp.where(knot == slot[:, None], values, 0), axis=1)
        return jax.ops.segment_sum(values, knot, slots, indices_are_sorted=True)

    knot_weights = per_knot(jnp.where(counts, weights, 0))
    share = jnp.where(counts, weights, 0) / jnp.where(knot_weights > 0, knot_weights, 1)[knot]
    # A knot lies where its points lie; written around the first, which is exact when they coincide.
    first = per_knot(jnp.where(opens, fixed, 0))
    t = first + per_knot(share * jnp.where(counts, t - first[knot], 0))
    number = jnp.sum(opens)
    last = jax.lax.stop_gradient(t[jnp.maximum(number - 1, 0)])
    t = jnp.where(slot < number, t, last + (slot - number + 1).astype(t.dtype))
    shown = _shown(knot_weights > 0) if in_place else jnp.minimum(slot, knot[-1])
    return Knots(t, knot_weights, order, knot, share, shown)


def _shown(counts: Bool[Array, " n"]) -> Int[Array, " n"]:
    """For each the last that counts up to it, or else the first that counts."""
    place = jnp.arange(len(counts))
    if len(counts) ** 2 <= COMPARED_WITH_ALL:
        seen = counts & (place <= place[:, None])
        last = jnp.max(jnp.where(seen, place, -1), axis=1)
    else:
        last = jax.lax.cummax(jnp.where(counts, place, -1))
    return jnp.where(last < 0, jnp.min(jnp.where(counts, place, len(counts) - 1)), last)
