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
from typing import Literal, TypeAlias, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ._knots import Knots

Ends: TypeAlias = Literal["natural", "not-a-knot"]

# Of a jump that tells anything, times the gap, on knots from -1 to 1: that of t^2 is about 3.
_LEAST = 0.05

Solve: TypeAlias = Callable[[Array], tuple[Array, Array]]


def check_ends(ends: Ends) -> Ends:
    """Return the ends; raise ValueError for unknown ones."""
    if ends not in get_args(Ends):
        raise ValueError(f"ends must be one of {', '.join(get_args(Ends))}, not {ends!r}")
    return ends


def not_a_knot(
    knots: Knots,
    solve: Solve,
    values: Float[Array, "n m"],
    slopes: Float[Array, "n m"],
) -> tuple[Float[Array, "n m"], Float[Array, "n m"]]:
    """Return values and slopes of the spline with these ends, from those of the natural one.

    `solve` fits observations at the knots. With fewer than four of them it stays natural.
    """
    first, second, before, last = _outermost(knots)
    low, high = knots.t[first], knots.t[last]
    middle, half = (low + high) / 2, jnp.where(high > low, (high - low) / 2, 1)
    # Beyond the ends a straight line, as all splines here.
    at = jnp.clip(knots.t, low, high)
    s, beyond = (at - middle) / half, (knots.t - at) / half
    slope = jnp.stack([2 * s, 3 * s**2], axis=1)
    powers = jnp.stack([s**2, s**3], axis=1) + beyond[:, None] * slope
    own = powers[knots.shown]
    shifts, fitted = solve(own)
    fitted_values = own + shifts
    kinks = jnp.stack([second, before])
    wanted, summary = (
        _jumps(knots.t, *curve, kinks) * half**2
        for curve in ((values, slopes), (fitted_values, fitted))
    )
    share = jnp.where(knots.number >= 4, _solved(summary, wanted), 0)
    bent, turned = powers - fitted_values, slope / half - fitted
    return values + _combined(bent, share), slopes + _combined(turned, share)


def _solved(summary: Float[Array, "2 2"], wanted: Float[Array, "2 m"]) -> Float[Array, "2 m"]:
    """Return the c with summary @ c = wanted, by normal equations.

    c goes towards 0 where little is known, as where much is smoothed. Of the first step's bias,
    0.0003 of c where nothing is smoothed, the third leaves the cube.
    """
    first, second = summary[:, :1], summary[:, 1:]
    a, b, d = (jnp.sum(p * q) for p, q in ((first, first), (first, second), (second, second)))
    a, d = a + _LEAST**2, d + _LEAST**2

    def step(left: Array) -> Array:
        e, f = jnp.sum(first * left, axis=0), jnp.sum(second * left, axis=0)
        return jnp.stack([d * e - b * f, a * f - b * e]) / (a * d - b * b)

    share = step(wanted)
    for _ in range(2):
        share = share + step(wanted - _combined(summary, share))
    return share


def _combined(columns: Float[Array, "n 2"], share: Float[Array, "2 m"]) -> Float[Array, "n m"]:
    """Return columns @ share, as sums: accelerators' matrix products have fewer digits."""
    return columns[:, :1] * share[0] + columns[:, 1:] * share[1]


def _outermost(knots: Knots) -> tuple[Int[Array, ""], ...]:
    """Return the first two knots that are observed, and the last two, as far as there are."""
    counts = knots.weights > 0
    seen = jnp.cumsum(counts)
    number = seen[-1]
    return tuple(jnp.argmax(seen >= rank) for rank in (1, 2, number - 1, number))


def _jumps(
    t: Float[Array, " n"],
    values: Float[Array, "n m"],
    slopes: Float[Array, "n m"],
    kinks: Int[Array, " kinks"],
) -> Float[Array, "kinks m"]:
    """Return by how much the third derivative of a piecewise cubic jumps at these knots.

    It is scaled by the shorter of the adjacent gaps, so that one of rounding's size does not drown
    the other.
    """
    gaps = jnp.diff(t)[:, None]
    steps = jnp.diff(values, axis=0) / gaps
    third = 6 * (slopes[:-1] + slopes[1:] - 2 * steps) / gaps**2
    place = jnp.clip(kinks, 1, len(t) - 2)
    shorter = jnp.minimum(gaps[place], gaps[place - 1])
    return (third[place] - third[place - 1]) * shorter
