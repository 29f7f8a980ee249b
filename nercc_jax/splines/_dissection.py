"""Least squares of a smoothing spline without loops, by nested dissection.

The problem is that of `_root_information`. Instead of one knot after the other, every second one is
eliminated at once, each given its two neighbours; what is left joins every second knot to the next,
and is eliminated in the same way, until the two outermost are left. An accelerator runs each of
these log2(n) levels as a few kernels, where the filter takes a few for each knot.

The penalty of the gaps i to j and j to k is, for s = (g, v) at a knot,

    penalty of one gap i to k  +  |M (s_j - H (s_i, s_k))|^2,

where H is the cubic through s_i and s_k at knot j, and M depends on the gaps only: a Markov
process's bridge. So the penalty of what is left is known in closed form on every level, and rows
hold only what observations add to it. Passing on the penalty's rows, instead, would drown the
observations in their rounding where the penalty is large: 0.2 for the straight line at n = 100 in
float32.

Where M is the larger, s_j - H (s_i, s_k) is eliminated, in which M's rows have nothing to pass on;
and where the observations are, s_j itself, in which theirs have not.

A knot of weight zero changes nothing. So whatever is available, all points are knots, in one order,
and knots are filled up to 2^levels + 1. Arrays have knots or gaps on their last axis, where a TPU
has its lanes.

Source: George 1973, "Nested dissection of a regular finite element mesh"; Wecker and Ansley 1983,
JASA 78 (the process); Bierman 1977, as there.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ._root_information import root
from ._small import back, diagonal, forth, product_of, triangle_of

# From so many knots, with so few columns of data, right-hand sides are not kept in general form,
# rows are fewer, and so many are worked on at a time: n = 1e6 took 2.6 GB on an H100.
_MANY_KNOTS, _FEW_COLUMNS = 4096, 8
_FEWER_ROWS, _ROWS_AT_ONCE = 8, 1 << 20


class Level(eqx.Module):
    """The elimination of every second knot j between its neighbours i and k; one entry for each j.

    `value_row` and `slope_row` are rows of the triangular factor, in the order g_j (the first
    only), v_j, g_i, v_i, g_k, v_k. `turn` makes their right-hand sides, and those of the rows that
    now join i to k, of by how much H misses the data, and of those of the rows that joined j to k
    and i to j. `cubic` are the parts of H that make that: see `_missed`.
    """

    value_row: Float[Array, "6 knots"]
    slope_row: Float[Array, "5 knots"]
    turn: Float[Array, "made given knots"]
    cubic: Float[Array, "3 knots"]


class Dissection(eqx.Module):
    """QR factors of one spline's least-squares problem: its levels, and its two outermost knots.

    `triangle` is the factor for (g, v) of the last knot and of the first, and `turn` makes its
    right-hand sides. `problem` are the arguments of `dissect` but for `most`.
    """

    problem: tuple[Array, Array, Array, Array]
    levels: tuple[Level, ...]
    triangle: Float[Array, "4 4"]
    turn: Float[Array, "4 given"]

    def solve(self, y: Float[Array, "n m"]) -> tuple[Float[Array, "n m"], Float[Array, "n m"]]:
        """Return g - y and v at the knots: see `RootInformation.solve`."""
        number = len(y)
        if number >= _MANY_KNOTS and y.shape[1] <= _FEW_COLUMNS:
            return _solve_at_once(*self.problem, y)
        y = jnp.pad(y, ((0, 2 ** len(self.levels) + 1 - number), (0, 0)), mode="edge")
        right, known = jnp.zeros((0, len(y) - 1, y.shape[1]), y.dtype), []
        for level in self.levels:
            missed = _missed(level.cubic[..., None], y[:-1:2], y[1::2], y[2::2])
            given = jnp.concatenate([missed, right[:, 1::2], right[:, ::2]])
            made = jnp.sum(level.turn[..., None] * given, axis=1)
            known.append((level.value_row, level.slope_row, made[:2]))
            right, y = made[2:], y[::2]
        missed = jnp.concatenate([y[:1] - y[1:], jnp.zeros_like(y[:1])])
        given = jnp.concatenate([missed, right[:, 0]])
        ends = back(self.triangle, jnp.sum(self.turn[..., None] * given, axis=1))
        return _substituted(ends, known, number)

    def variance(
        self, gap: Int[Array, " k"], left: Float[Array, "2 k"], right: Float[Array, "2 k"]
    ) -> Float[Array, " k"]:
        """Return the variance of left . s_i + right . s_{i+1}: see `RootInformation.variance`.

        For the coefficients c of all knots it is |R'^-1 c|^2. On each level only one knot that is
        eliminated has coefficients, and passes some on to its neighbours.
        """
        total = jnp.zeros_like(left[0])
        for level in self.levels:
            here = gap % 2 == 1  # the knot is this gap's left one
            own = jnp.where(here, left, right)
            gap = gap // 2
            value_own, shared, *value_row = level.value_row[:, gap]
            slope_own, *slope_row = level.slope_row[:, gap]
            by_value = own[0] / value_own
            by_slope = (own[1] - shared * by_value) / slope_own
            total += by_value**2 + by_slope**2
            passed = jnp.stack(value_row) * by_value + jnp.stack(slope_row) * by_slope
            left = jnp.where(here, 0, left) - passed[:2]
            right = jnp.where(here, right, 0) - passed[2:]
        ends = forth(self.triangle, jnp.concatenate([right, left]))
        return total + jnp.sum(ends**2, axis=0)


def dissect(
    gaps: Float[Array, " gaps"],
    weights: Float[Array, " n"],
    slope_weights: Float[Array, " n"],
    mu: Float[Array, ""],
    most: int,
) -> Dissection:
    """Return the factors for knots as in `_root_information.factorize`.

    At most `most` rows join two knots before a QR makes four of them.
    """
    problem = gaps, weights, slope_weights, mu
    gaps, own = _filled(gaps, weights, slope_weights)
    rows, levels = jnp.zeros((0, 4, len(gaps)), gaps.dtype), []
    while len(gaps) > 1:
        data = _data_unknown(free=2, rows=2 * len(rows), knots=len(gaps) // 2, dtype=gaps.dtype)
        known, rows = _eliminate(mu, gaps, own[:, 1::2], rows, data, most)
        turn = jnp.concatenate([known[:, 6:], rows[:, 4:]])
        levels.append(Level(known[0, :6], known[1, 1:6], turn, _uneven(gaps)))
        gaps, own, rows = gaps[::2] + gaps[1::2], own[:, ::2], rows[:, :4]
    data = _data_unknown(free=4, rows=len(rows), knots=1, dtype=gaps.dtype)
    triangle, turn = _ends(mu, gaps, own, rows, data)
    return Dissection(problem, tuple(levels), _determined(triangle, weights), turn)


def _solve_at_once(
    gaps: Float[Array, " gaps"],
    weights: Float[Array, " n"],
    slope_weights: Float[Array, " n"],
    mu: Float[Array, ""],
    y: Float[Array, "n m"],
) -> tuple[Float[Array, "n m"], Float[Array, "n m"]]:
    """Return `dissect(...).solve(y)` for these right-hand sides only, in parts of the knots."""

    def eliminate(gaps, own, rows, missed, right):
        data = _data_known(2, missed, right[..., 1::2], right[..., ::2])
        return _eliminate(mu, gaps, own, rows, data, _FEWER_ROWS)

    number = len(y)
    gaps, own = _filled(gaps, weights, slope_weights)
    columns = jnp.pad(y.T, ((0, 0), (0, len(gaps) + 1 - number)), mode="edge")
    rows = jnp.zeros((0, 4, len(gaps)), gaps.dtype)
    right = jnp.zeros((0, y.shape[1], len(gaps)), gaps.dtype)
    found = []
    while len(gaps) > 1:
        missed = _missed(
            _uneven(gaps)[:, None], columns[:, :-1:2], columns[:, 1::2], columns[:, 2::2]
        )
        known, made = _in_parts(
            eliminate,
            (gaps, own[:, 1::2], rows, missed, right),
            len(gaps) // 2,
            _ROWS_AT_ONCE // (4 + 2 * len(rows)),
        )
        found.append((known[0, :6], known[1, 1:6], jnp.swapaxes(known[:, 6:], 1, 2)))
        rows, right = made[:, :4], made[:, 4:]
        gaps, own, columns = gaps[::2] + gaps[1::2], own[:, ::2], columns[:, ::2]
    missed = jnp.stack([columns[:, :1] - columns[:, 1:], jnp.zeros_like(columns[:, :1])])
    triangle, made = _ends(mu, gaps, own, rows, _data_known(4, missed, right))
    return _substituted(back(_determined(triangle, weights), made), found, number)


class _Data(NamedTuple):
    """Columns of right-hand sides: by how much the prior misses the data, and those of rows.

    `shared` are further columns of the rows, which `missed` has no part in.
    """

    missed: Float[Array, "2 m knots"]
    right: Float[Array, "rows m knots"]
    shared: Float[Array, "rows p knots"]


def _data_unknown(*, free: int, rows: int, knots: int, dtype: Any) -> _Data:
    """Return a column for each possible right-hand side: the first `free` rows have none."""
    missed, right = np.eye(2), np.zeros((free + rows, 2))
    shared = np.eye(free + rows)[:, free:]
    columns = (missed, right, shared)
    return _Data(
        *(jnp.broadcast_to(jnp.asarray(c, dtype)[..., None], (*c.shape, knots)) for c in columns)
    )


def _data_known(
    free: int, missed: Float[Array, "2 m knots"], *right: Float[Array, "_ m knots"]
) -> _Data:
    """Return these right-hand sides, block by block: the first `free` rows have none."""
    none = jnp.zeros((free, *missed.shape[1:]), missed.dtype)
    columns = jnp.concatenate([none, *right])
    return _Data(missed, columns, columns[:, :0])


def _filled(
    gaps: Float[Array, " gaps"], weights: Float[Array, " n"], slope_weights: Float[Array, " n"]
) -> tuple[Float[Array, " all"], Float[Array, "2 knots"]]:
    """Return a power of two of gaps, and the roots of the weights of the knots between."""
    filling = (0, 2 ** (len(gaps) - 1).bit_length() - len(gaps))
    own = jnp.stack([root(jnp.pad(each, filling)) for each in (weights, slope_weights)])
    return jnp.pad(gaps, filling, constant_values=1), own


def _determined(triangle: Float[Array, "4 4"], weights: Float[Array, " n"]) -> Float[Array, "4 4"]:
    """Return the triangle with zeros for what too few observations leave open.

    With one observation that is the slope, with none all.
    """
    observed = jnp.sum(weights > 0)
    is_open = jnp.stack([jnp.zeros((), bool)] * 2 + [observed < 1, observed < 2])
    return jnp.where(jnp.diag(is_open), 1, triangle)


def _eliminate(
    mu: Float[Array, ""],
    gaps: Float[Array, " gaps"],
    own: Float[Array, "2 knots"],
    rows: Float[Array, "rows 4 gaps"],
    data: _Data,
    most: int,
) -> tuple[Float[Array, "2 _ knots"], Float[Array, "left _ knots"]]:
    """Eliminate every second knot.

    `own` are its observations' weights, `rows` those of its gaps. Returns the rows for it, and
    those that join what is left, with their right-hand sides.
    """
    before, after = gaps[::2], gaps[1::2]
    left, right = rows[..., ::2], rows[..., 1::2]
    none = jnp.zeros_like(left[:, :2])
    of_knot = jnp.concatenate([diagonal(own), right[:, :2], left[:, 2:]])
    of_others = jnp.concatenate(
        [
            jnp.zeros((2, 4, len(before)), gaps.dtype),
            jnp.concatenate([none, right[:, 2:]], axis=1),
            jnp.concatenate([left[:, :2], none], axis=1),
        ]
    )
    prior = _bridge(before, after, mu), _cubic(before, after)
    known, rows = _condition(*prior, of_knot, of_others, data)
    return known, rows if len(rows) <= most else triangle_of(rows, 4)[0]


def _ends(
    mu: Float[Array, ""],
    gap: Float[Array, "1"],
    own: Float[Array, "2 2"],
    rows: Float[Array, "rows 4 1"],
    data: _Data,
) -> tuple[Float[Array, "4 4"], Float[Array, "4 _"]]:
    """Return the triangle for the last knot and the first, and its right-hand sides.

    The last knot's prior is a straight line through the first.
    """
    shear, bend, none = jnp.sqrt(12 * mu / gap) / gap, jnp.sqrt(mu / gap), jnp.zeros_like(gap)
    one = jnp.ones_like(gap)
    precision = jnp.stack([jnp.stack([shear, -shear * gap / 2]), jnp.stack([none, bend])])
    line = jnp.stack([jnp.stack([one, gap]), jnp.stack([none, one])])
    nothing = jnp.zeros((2, 2, 1), own.dtype)
    of_last = jnp.concatenate([diagonal(own[:, 1:]), nothing, rows[:, 2:]])
    of_first = jnp.concatenate([nothing, diagonal(own[:, :1]), rows[:, :2]])
    known, rest = _condition(precision, line, of_last, of_first, data)
    rest = jnp.pad(triangle_of(rest, 2)[0], ((0, 0), (2, 0), (0, 0)))
    found = jnp.concatenate([known, rest])[..., 0]
    return found[:, :4], found[:, 4:]


def _condition(
    precision: Float[Array, "2 2 knots"],
    mean: Float[Array, "2 others knots"],
    of_knot: Float[Array, "rows 2 knots"],
    of_others: Float[Array, "rows others knots"],
    data: _Data,
) -> tuple[Float[Array, "2 _ knots"], Float[Array, "rows _ knots"]]:
    """Eliminate s_j from |precision (s_j - mean s - missed)|^2 and the rows.

    Returns two rows for s_j, with columns for s_j, for the others s, and for the right-hand sides;
    and the rows for the others alone, with the same columns but for s_j.
    """
    missed, right, shared = data
    # The result is the same in whichever way s_j is written. By its distance from the prior's mean
    # it is not rounded as the penalty is, which matters where that is stiff; and by itself not as
    # the observations are, where these are the larger.
    stiff = jnp.sum(of_knot[:, 0] ** 2, axis=0) < precision[0, 0] ** 2
    base, start = jnp.where(stiff, mean, 0), jnp.where(stiff, missed, 0)
    prior = [-product_of(precision, mean - base), product_of(precision, missed - start)]
    rows = [of_others + product_of(of_knot, base), right - product_of(of_knot, start)]
    known, rest = triangle_of(
        jnp.concatenate(
            [
                jnp.concatenate([precision, *prior, jnp.zeros_like(shared[:2])], axis=1),
                jnp.concatenate([of_knot, *rows, shared], axis=1),
            ]
        ),
        2,
    )
    own, by_others, right, shared = jnp.split(
        known, np.cumsum([2, mean.shape[1], missed.shape[1]]), axis=1
    )
    known = [own, by_others - product_of(own, base), right + product_of(own, start), shared]
    return jnp.concatenate(known, axis=1), rest


def _in_parts(
    function: Callable[..., Any], arrays: tuple[Array, ...], knots: int, most: int
) -> Any:
    """Apply a function to arrays along their last axis, to at most `most` knots at a time."""
    parts = 1
    while knots // parts > most:
        parts *= 2
    if parts == 1:
        return function(*arrays)

    def cut(array: Array) -> Array:
        shape = (*array.shape[:-1], parts, array.shape[-1] // parts)
        return jnp.moveaxis(array.reshape(shape), -2, 0)

    def joined(array: Array) -> Array:
        return jnp.moveaxis(array, 0, -2).reshape(*array.shape[1:-1], parts * array.shape[-1])

    made = jax.lax.map(lambda part: function(*part), tuple(map(cut, arrays)))
    return jax.tree.map(joined, made)


def _bridge(
    before: Float[Array, " knots"], after: Float[Array, " knots"], mu: Float[Array, ""]
) -> Float[Array, "2 2 knots"]:
    """Return M, a triangle: the root of the curvature of the two gaps' penalty at the knot."""
    a, b = 1 / before, 1 / after
    value = jnp.sqrt(12 * (a**3 + b**3))
    both = 6 * (b - a) * (b + a) / value
    slope = jnp.sqrt(12.0) * (a + b) ** 2 / value  # by the determinant, 12 (a + b)^4
    rows = [jnp.stack([value, both]), jnp.stack([jnp.zeros_like(value), slope])]
    return jnp.sqrt(mu) * jnp.stack(rows)


def _cubic(
    before: Float[Array, " knots"], after: Float[Array, " knots"]
) -> Float[Array, "2 4 knots"]:
    """Return H: the cubic through the neighbours' values and slopes, at the knot."""
    gap = before + after
    s, r = before / gap, after / gap
    value = [r * r * (1 + 2 * s), r * r * before, s * s * (1 + 2 * r), -s * s * after]
    slope = [-6 * s * r / gap, r * (r - 2 * s), 6 * s * r / gap, s * (s - 2 * r)]
    return jnp.stack([jnp.stack(value), jnp.stack(slope)])


def _uneven(gaps: Float[Array, " gaps"]) -> Float[Array, "3 knots"]:
    """Return what `_missed` takes of H at every second knot."""
    cubic = _cubic(gaps[::2], gaps[1::2])
    return jnp.stack([cubic[0, 0], cubic[0, 2], cubic[1, 2]])


def _missed(
    cubic: Float[Array, "3 ..."], before: Array, here: Array, after: Array
) -> Float[Array, "2 ..."]:
    """Return by how much H, of data without slopes, misses each second knot's data.

    Only differences of the data enter.
    """
    of_before, of_after, slope = cubic
    value = of_before * (before - here) + of_after * (after - here)
    return jnp.stack([value, slope * (after - before)])


def _substituted(
    ends: Float[Array, "4 m"], known: list[tuple[Array, Array, Array]], number: int
) -> tuple[Float[Array, "n m"], Float[Array, "n m"]]:
    """Return values and slopes at the first knots, from those at the last and the first.

    `known` are, for each level, the rows for its knots' values and slopes, and their right-hand
    sides.
    """
    found = ends.reshape(2, 2, -1)[::-1]
    for value_row, slope_row, (value_right, slope_right) in reversed(known):
        around = [found[:-1, 0], found[:-1, 1], found[1:, 0], found[1:, 1]]
        own, *row = slope_row[..., None]
        slope = (slope_right - sum(map(jnp.multiply, row, around))) / own
        own, *row = value_row[..., None]
        value = (value_right - sum(map(jnp.multiply, row, [slope, *around]))) / own
        found = _interleaved(found, jnp.stack([value, slope], axis=1))
    return found[:number, 0], found[:number, 1]


def _interleaved(
    outer: Float[Array, "_ 2 m"], inner: Float[Array, "knots 2 m"]
) -> Float[Array, "both 2 m"]:
    """Return outer[0], inner[0], outer[1], inner[1], ..., the last of outer."""
    pairs = jnp.stack([outer[:-1], inner], axis=1).reshape(-1, *outer.shape[1:])
    return jnp.concatenate([pairs, outer[-1:]])
