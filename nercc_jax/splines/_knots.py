"""From regression points with a mask to distinct, increasing knots, at a fixed shape.

Points come in any order, may coincide, and some carry no weight in this call. A spline solver wants
none of that. `gather_knots` sorts the points that count to the front, lets coincident ones act as
one knot (the mean of their observations, the sum of their weights), and fills up with knots of
weight zero beyond the last, to which a natural spline simply continues straight: they change
nothing. All of it is gathers and sums at the shape of the input, so one compiled program serves
every mask, and everything is differentiable in the points, weights and observations.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Points this close, in units of the rounding of the span, are the same point: two formulas for one
# Chebyshev point differ by an ulp, and a gap that is all rounding has no slope to tell.
_COINCIDENT_ULPS = 4


class Knots(eqx.Module):
    """Distinct increasing knots and how they came from the points; n slots, at least two.

    `order[j]` is the point in place j after sorting, `knot[j]` the knot it belongs to, and
    `share[j]` its part of that knot's weight (0 for points that do not count).
    """

    t: Float[Array, " n"]
    weights: Float[Array, " n"]
    order: Int[Array, " points"]
    knot: Int[Array, " points"]
    share: Float[Array, " points"]

    def average(self, y: Float[Array, "points m"]) -> Float[Array, "n m"]:
        """Each knot's observation, the weighted mean over its points; linear in y.

        The filling knots repeat the last one's.
        """
        shares = self.share[:, None] * y[self.order]
        means = jax.ops.segment_sum(shares, self.knot, self.t.shape[0], indices_are_sorted=True)
        return means[jnp.minimum(jnp.arange(self.t.shape[0]), self.knot[-1])]

    def spread(self, matrix: Float[Array, "k n"]) -> Float[Array, "k points"]:
        """A matrix on knots as a matrix on points: `matrix @ average(y) == spread(matrix) @ y`."""
        empty = jnp.zeros((matrix.shape[0], self.order.shape[0]), matrix.dtype)
        return empty.at[:, self.order].set(matrix[:, self.knot] * self.share)

    @property
    def number(self) -> Int[Array, ""]:
        """How many knots carry weight; they are the first ones."""
        return jnp.sum(self.weights > 0)


def gather_knots(points: Float[Array, " points"], weights: Float[Array, " points"]) -> Knots:
    """The knots of points with non-negative weights; a weight of zero leaves a point out."""
    size = points.shape[0]
    slots = max(size, 2)
    counts = weights > 0
    order = jnp.argsort(jnp.where(counts, points, jnp.inf))
    t, weights, counts = points[order], weights[order], counts[order]

    fixed = jax.lax.stop_gradient(t)
    span = jnp.max(jnp.where(counts, jnp.abs(fixed), 0))
    tolerance = _COINCIDENT_ULPS * jnp.finfo(t.dtype).eps * span
    opens = jnp.concatenate([jnp.ones(1, bool), jnp.diff(fixed) > tolerance]) & counts
    knot = jnp.maximum(jnp.cumsum(opens) - 1, 0)

    def per_knot(values):
        return jax.ops.segment_sum(values, knot, slots, indices_are_sorted=True)

    knot_weights = per_knot(jnp.where(counts, weights, 0))
    share = jnp.where(counts, weights, 0) / jnp.where(knot_weights > 0, knot_weights, 1)[knot]
    # A knot lies where its points lie; written around the first, which is exact when they coincide.
    first = per_knot(jnp.where(opens, fixed, 0))
    t = first + per_knot(share * jnp.where(counts, t - first[knot], 0))
    number = jnp.sum(opens)
    slot = jnp.arange(slots)
    last = jax.lax.stop_gradient(t[jnp.maximum(number - 1, 0)])
    t = jnp.where(slot < number, t, last + (slot - number + 1).astype(t.dtype))
    return Knots(t, knot_weights, order, knot, share)
