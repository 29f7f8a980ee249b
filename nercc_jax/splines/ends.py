"""Ends of a spline: natural, or "not-a-knot" with one cubic over the last two gaps.

A natural spline has no curvature at its ends, so near them its error is of the second order in the
gaps; inside it is of the fourth. For T = t^2 and t^3 with their natural fits s_T, E = T - s_T is
zero at all observations that are interpolated, and curved at the ends. With two numbers c,

    u = s_y + E c

is the spline whose third derivative does not jump at the second and at the last but one knot ("not
a knot"). It reproduces cubics. Where lambda smooths over several gaps it approaches the natural
spline.

No large numbers are subtracted. E is the fit to forces at the ends: integrating by parts what s_T
minimises leaves T'' and T''' there. At a knot the third derivative of a fit s jumps by
w (y - s) / mu, so u meets its observations at the second knot and at the last but one.

Source: de Boor 1978, "A Practical Guide to Splines", chapter IV.
"""

from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from jaxtyping import Bool, Float

from ..arrays import namespace, where
from .knots import Knots

Ends: TypeAlias = Literal["natural", "not-a-knot"]

# The least jump, times the gap, that is informative, on knots from -1 to 1; that of t^2 is about 3.
_LEAST = 0.05


def check_ends(ends: Ends) -> Ends:
    """Return the ends; raise ValueError for unknown ones."""
    if ends not in get_args(Ends):
        raise ValueError(f"ends must be one of {', '.join(get_args(Ends))}, not {ends!r}")
    return ends


class NotAKnot(NamedTuple):
    """The kinks of a not-a-knot spline, and the forces that turn natural ends into its ends.

    `kinks` selects the two knots where the third derivative must not jump. `values` and `slopes`
    are the forces on each knot's value and slope whose fit is E, over mu. Jumps are scaled by the
    range of the knots, and by the shorter gap between the knot and its observed neighbours, so that
    a gap as small as rounding does not hide the other jump. With fewer than four knots (not
    `enough`) the spline stays natural.
    """

    kinks: Float[Any, "n 2"]
    values: Float[Any, "n 2"]
    slopes: Float[Any, "n 2"]
    scale: Float[Any, "2 1"]
    enough: Bool[Any, ""]

    def share(self, powers: Float[Any, "2 2"], jumps: Float[Any, "2 m"]) -> Float[Any, "2 m"]:
        """Return c, from the jumps of the third derivatives of T's fits and of the others.

        The normal equations are regularised: c goes to 0 where jumps are not informative, as with
        much smoothing. The bias of one step is 0.0003 of c without smoothing; that of three steps
        is its cube.
        """
        summary, wanted = self.scale * powers, self.scale * jumps
        xp = namespace(summary, wanted)
        first, second = summary[:, 0], summary[:, 1]
        a, b, d = (xp.sum(p * q) for p, q in ((first, first), (first, second), (second, second)))
        a, d = a + _LEAST**2, d + _LEAST**2
        inverse = xp.stack([xp.stack([d, -b]), xp.stack([-b, a])]) / (a * d - b * b)
        bias = _LEAST**2 * inverse
        steps = xp.eye(2, dtype=summary.dtype) + bias + combined(bias, bias)
        c = combined(combined(steps, combined(inverse, summary.T)), wanted)
        return where(self.enough, c, 0)


def not_a_knot(knots: Knots, end_weights: Float[Any, " n"]) -> NotAKnot:
    """Return the kinks and forces of these knots; `end_weights` penalise slopes, over mu."""
    t, dtype = knots.t[:, None], knots.t.dtype
    xp = namespace(t)
    # The first three knots that are observed, and the last three, if there are so many.
    seen, place = xp.cumsum(knots.weights > 0), xp.arange(len(t))[:, None]
    ranks = seen[-1] * np.array([0, 0, 0, 1, 1, 1]) + np.array([1, 2, 3, -2, -1, 0])
    outermost = xp.minimum(xp.sum(seen[:, None] < ranks[None], axis=0), len(t) - 1)
    each = (place == outermost[None]).astype(dtype)
    first, second, _, _, before, last = xp.moveaxis(each, 1, 0)
    apart, both = last - first, last + first
    ends = xp.reshape(xp.sum(each * t, axis=0), (2, 3))
    span = ends[1, 2] - ends[0, 0]
    half = where(span > 0, span / 2, 1)
    # The derivatives of s^2 and s^3 at s = -1 and 1, for s = (t - middle) / half.
    bends = 1 / half**2 + end_weights / half
    values = xp.stack([xp.zeros_like(apart), -6 / half**3 * apart], axis=1)
    slopes = xp.stack([2 * bends * apart, 3 * (bends + 1 / half**2) * both], axis=1)
    kinks = xp.stack([second, before], axis=1)
    behind, after = ends[:, 1] - ends[:, 0], ends[:, 2] - ends[:, 1]
    gaps = where(after < behind, after, behind)[:, None]
    return NotAKnot(kinks, values, slopes, gaps * half**2, knots.number >= 4)


def combined(columns: Float[Any, "n 2"], share: Float[Any, "2 m"]) -> Float[Any, "n m"]:
    """Return columns @ share, as sums: accelerators' matrix products have fewer digits."""
    return columns[:, :1] * share[:1] + columns[:, 1:] * share[1:]
