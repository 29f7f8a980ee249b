"""Ends of a spline: natural ones, or "not-a-knot" with one cubic over the last two gaps.

A natural spline has no curvature at its ends, so near them its error is the second power of the
gaps, where inside it is the fourth. T - s_T, for T = t^2 and t^3 and their own natural fits s_T, is
zero at all observations that are interpolated, and curved at the ends: with two numbers c,

    u = s_y + (T - s_T) c

is the spline whose third derivative does not jump at the second and at the last but one knot ("not
a knot"). It reproduces cubics, unless lambda smooths over several gaps: then it is natural.

Source: de Boor 1978, "A Practical Guide to Splines", chapter IV.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

from jaxtyping import Float, Int

from ._knots import Knots
from ._namespace import namespace

Ends: TypeAlias = Literal["natural", "not-a-knot"]

# Of a jump that tells anything, times the gap, on knots from -1 to 1: that of t^2 is about 3.
_LEAST = 0.05

Solve: TypeAlias = Callable[[Any], tuple[Any, Any]]


def check_ends(ends: Ends) -> Ends:
    """Return the ends; raise ValueError for unknown ones."""
    if ends not in get_args(Ends):
        raise ValueError(f"ends must be one of {', '.join(get_args(Ends))}, not {ends!r}")
    return ends


def not_a_knot(
    knots: Knots,
    solve: Solve,
    values: Float[Any, "n m"],
    slopes: Float[Any, "n m"],
    gaps: Float[Any, "2 1"] | None = None,
) -> tuple[Float[Any, "n m"], Float[Any, "n m"]]:
    """Return values and slopes of the spline with these ends, from those of the natural one.

    `solve` returns how far the fit of observations at the knots is from them, and its slopes.
    `gaps` are `shorter_gaps` where `knots` are not all that there are. With fewer than four knots
    it stays natural.
    """
    xp = namespace(knots.t)
    first, second, before, last = _outermost(knots)
    low, high = knots.t[first], knots.t[last]
    middle, half = (low + high) / 2, xp.where(high > low, (high - low) / 2, 1)
    # Beyond the ends a straight line, as all splines here.
    at = xp.clip(knots.t, low, high)
    s, beyond = (at - middle) / half, (knots.t - at) / half
    slope = xp.stack([2 * s, 3 * s**2], axis=1)
    powers = xp.stack([s**2, s**3], axis=1) + beyond[:, None] * slope
    own = powers[knots.shown]
    shifts, fitted = solve(own)
    fitted_values = own + shifts
    kinks = xp.clip(xp.stack([second, before]), 1, len(knots.t) - 2)
    gaps = shorter_gaps(knots.t, kinks) if gaps is None else gaps
    wanted, summary = (
        _jumps(knots.t, *curve, kinks) * gaps * half**2
        for curve in ((values, slopes), (fitted_values, fitted))
    )
    share = xp.where(knots.number >= 4, _solved(summary, wanted), 0)
    bent, turned = powers - fitted_values, slope / half - fitted
    return values + _combined(bent, share), slopes + _combined(turned, share)


def shorter_gaps(t: Float[Any, " n"], kinks: Int[Any, " kinks"]) -> Float[Any, "kinks 1"]:
    """Return the shorter of the gaps beside each of these knots.

    Jumps are scaled by it, so that one of rounding's size does not drown the other.
    """
    gaps = _gaps(t)
    return namespace(t).minimum(gaps[kinks], gaps[kinks - 1])


def _solved(summary: Float[Any, "2 2"], wanted: Float[Any, "2 m"]) -> Float[Any, "2 m"]:
    """Return the c with summary @ c = wanted, by normal equations.

    c goes towards 0 where little is known, as where much is smoothed. Of the first step's bias,
    0.0003 of c where nothing is smoothed, the third leaves the cube.
    """
    xp = namespace(summary, wanted)
    first, second = summary[:, :1], summary[:, 1:]
    a, b, d = (xp.sum(p * q) for p, q in ((first, first), (first, second), (second, second)))
    a, d = a + _LEAST**2, d + _LEAST**2

    def step(left: Any) -> Any:
        e, f = xp.sum(first * left, axis=0), xp.sum(second * left, axis=0)
        return xp.stack([d * e - b * f, a * f - b * e]) / (a * d - b * b)

    share = step(wanted)
    for _ in range(2):
        share = share + step(wanted - _combined(summary, share))
    return share


def _combined(columns: Float[Any, "n 2"], share: Float[Any, "2 m"]) -> Float[Any, "n m"]:
    """Return columns @ share, as sums: accelerators' matrix products have fewer digits."""
    return columns[:, :1] * share[0] + columns[:, 1:] * share[1]


def _outermost(knots: Knots) -> tuple[Int[Any, ""], ...]:
    """Return the first two knots that are observed, and the last two, as far as there are."""
    xp = namespace(knots.weights)
    seen = xp.cumsum(knots.weights > 0)
    number = seen[-1]
    return tuple(xp.argmax(seen >= rank) for rank in (1, 2, number - 1, number))


def _gaps(t: Float[Any, " n"]) -> Float[Any, "gaps 1"]:
    return namespace(t).diff(t)[:, None]


def _jumps(
    t: Float[Any, " n"],
    values: Float[Any, "n m"],
    slopes: Float[Any, "n m"],
    kinks: Int[Any, " kinks"],
) -> Float[Any, "kinks m"]:
    """Return by how much the third derivative of a piecewise cubic jumps at these knots."""
    gaps = _gaps(t)
    steps = namespace(t).diff(values, axis=0) / gaps
    third = 6 * (slopes[:-1] + slopes[1:] - 2 * steps) / gaps**2
    return third[kinks] - third[kinks - 1]
