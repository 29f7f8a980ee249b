"""Distinct, increasing knots, at a fixed shape, from regression points with a mask.

Points may be in any order and may coincide, and some have no weight in a call. `gather_knots` sorts
them and makes one knot of coincident ones, with the mean of their observations and the sum of their
weights. A knot whose points have no weight keeps its place and changes nothing. So the order of the
knots does not depend on the mask: one compiled program serves every mask, and many masks of the
same points share it. Everything is differentiable in the points, weights and observations.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..arrays import constant, namespace, product, taken, where

# Points this close, in units of the rounding of the span, are the same point: two formulas for one
# Chebyshev point differ by an ulp, and a gap that is all rounding has no slope.
_COINCIDENT_ULPS = 4

# Up to this number of pairs, all are compared: one kernel on an accelerator, where a search or a
# scatter takes several, and two loops less to compile for a CPU.
COMPARED_WITH_ALL = 1 << 14


class Knots(NamedTuple):
    """Distinct increasing knots and their points; n slots, at least two.

    `knot[p]` is the knot of point p, and `share[p]` its part of that knot's weight (0 for points
    without weight). `shown[i]` is the knot whose observation knot i repeats: its own if it has
    one, else that of the last knot before it that has one, else that of the first that has one.
    Slots beyond the last knot have weight zero.
    """

    t: Float[Any, " n"]
    weights: Float[Any, " n"]
    knot: Int[Any, " points"]
    share: Float[Any, " points"]
    shown: Int[Any, " n"]

    def average(self, y: Float[Array, "points m"]) -> Float[Array, "n m"]:
        """Return the observation of each knot, the weighted mean over its points; linear in y."""
        slots = len(self.t)
        if slots * len(self.knot) > COMPARED_WITH_ALL:
            return _by_knot(self.share[:, None] * y, self.knot, slots)[self.shown]
        shares = where(self.knot[None] == self.shown[:, None], self.share[None], 0)
        return product(shares.astype(y.dtype), y)

    def spread(self, matrix: Float[Any, "k n"]) -> Float[Any, "k points"]:
        """Return the matrix on points: its product with y is `matrix` times the knots' means."""
        return taken(matrix, self.knot, axis=1) * self.share[None]

    @property
    def number(self) -> Int[Any, ""]:
        """Return the number of knots that carry weight."""
        return namespace(self.weights).sum(self.weights > 0)


def by_observation(
    direct: Float[Array, "k n"], differences: Float[Array, "k gaps"], shown: Int[Array, " n"]
) -> Float[Array, "k n"]:
    """Return the matrix from observations at the knots to `direct @ y + differences @ diff(y)`.

    y repeats observations as `shown` says: see `Knots`.
    """
    none = jnp.zeros_like(differences[:, :1])
    padded = jnp.concatenate([none, differences, none], axis=1)
    matrix = direct + padded[:, :-1] - padded[:, 1:]
    if len(shown) ** 2 > COMPARED_WITH_ALL:
        return _by_knot(matrix.T, shown, len(shown)).T
    belongs = shown[:, None] == jnp.arange(len(shown))[None]
    return product(matrix, belongs.astype(matrix.dtype))


def gather_knots(points: Float[Any, " points"], weights: Float[Any, " points"]) -> Knots:
    """Return the knots of points with non-negative weights.

    A weight of zero leaves a point out, and so does a point that is not finite.
    """
    xp = namespace(points, weights)
    size = points.shape[0]
    slots = max(size, 2)
    slot = xp.arange(slots)

    # The part that depends on the points only: each point's knot, and whether it opens that knot.
    held = xp.isfinite(points)
    fixed = constant(where(held, points, np.inf))
    span = xp.max(where(held, xp.abs(fixed), 0))
    tolerance = _COINCIDENT_ULPS * np.finfo(fixed.dtype).eps * span
    if xp is jnp and size**2 <= COMPARED_WITH_ALL:
        # In a program few points need no sort and no scatter.
        place = xp.arange(size)
        same, before = fixed[None] == fixed[:, None], place[None] < place[:, None]
        earlier = (fixed[None] < fixed[:, None]) | (same & before)
        previous = xp.max(where(earlier, fixed, -np.inf), axis=1)
        opens = held & (fixed - previous > tolerance)
        upto = earlier | (place[None] == place[:, None])
        knot = xp.maximum(xp.sum(opens[None] & upto, axis=1) - 1, 0)
    else:
        order = xp.argsort(fixed)
        ordered, back = taken(fixed, order), xp.argsort(order)
        apart = ordered[1:] - ordered[:-1] > tolerance
        opens = xp.concatenate([xp.ones(1, bool), apart]) & taken(held, order)
        knot = taken(xp.maximum(xp.cumsum(opens) - 1, 0), back)
        opens = taken(opens, back)
    number = xp.sum(opens)
    first = _by_knot(where(opens, fixed, 0), knot, slots)
    last = taken(first, xp.maximum(number - 1, 0))
    first = where(slot < number, first, last + (slot - number + 1).astype(first.dtype))

    # The part that depends on the weights, too.
    weights = where(held, weights, 0)
    total = _by_knot(weights, knot, slots)
    share = weights / taken(where(total > 0, total, 1), knot)
    # A knot lies at the mean of its points, relative to the first: exact when they coincide.
    beside = share * where(weights > 0, points - taken(first, knot), 0)
    t = first + _by_knot(beside, knot, slots)

    # The last knot that carries weight up to each place, or else the first that does.
    counts = total > 0
    own = where(counts, slot, -1)
    if xp is np:
        last = np.maximum.accumulate(own)
    elif slots**2 <= COMPARED_WITH_ALL:
        last = jnp.max(where(slot[None] <= slot[:, None], own[None], -1), axis=1)
    else:
        last = jax.lax.cummax(own)
    shown = where(last < 0, xp.min(where(counts, slot, slots - 1)), last)
    return Knots(t, total, knot, share, shown)


def _by_knot(values: Any, knot: Any, slots: int) -> Any:
    """Return the sum of the values (points, ...) of each knot."""
    xp = namespace(values, knot)
    if xp is np:
        return np.bincount(knot, values, slots).astype(values.dtype)
    if values.ndim > 1 or slots * len(knot) > COMPARED_WITH_ALL:
        return jax.ops.segment_sum(values, knot, slots)
    return jnp.sum(where(knot[None] == jnp.arange(slots)[:, None], values[None], 0), axis=1)


def gap_of(t: Float[Any, " n"], at: Float[Any, " k"]) -> Int[Any, " k"]:
    """Return the gap between knots in which each point lies; beyond the ends, the nearest gap."""
    xp = namespace(t, at)
    if t.shape[0] * at.shape[0] <= COMPARED_WITH_ALL:
        upto = xp.sum(t[None] <= at[:, None], axis=1)
    else:
        upto = xp.searchsorted(t, at, side="right")
    return xp.minimum(xp.maximum(upto - 1, 0), t.shape[0] - 2)


def hermite_basis(left: Any, right: Any, at: Any) -> tuple[Any, tuple[Any, Any, Any, Any]]:
    """Return each point's share of the gap between two knots (0 to 1), and its coefficients.

    The coefficients are those of the left knot's value and slope, and the right one's. Beyond the
    ends there are straight lines.
    """
    h, after = right - left, at - left
    s = after / h
    inside = s = where(s < 0, 0, where(s > 1, 1, s))
    before, after = where(after < 0, after, 0), where(after > h, after - h, 0)
    r = 1 - s
    basis = (
        r * r * (1 + 2 * s),
        s * r * r * h + before,
        s * s * (1 + 2 * r),
        after - s * s * r * h,
    )
    return inside, basis
