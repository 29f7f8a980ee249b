"""Least squares of a smoothing spline without loops, by nested dissection.

The problem is that of `_filter`. Instead of one knot after the other, every second knot is
eliminated at once, given its two neighbours. The rest couples every second knot to the next one and
is eliminated in the same way, until only the two outermost knots are left. An accelerator runs each
of these log2(n) levels as a few kernels, where the filter takes a few for each knot.

The penalty of the gaps i to j and j to k is, for s = (g, v) at a knot,

    penalty of one gap i to k  +  |M (s_j - H (s_i, s_k) - missed)|^2,

where H is the cubic through s_i and s_k at knot j, M depends on the gaps only, and `missed` is by
how much H misses the data (the bridge of a Markov process). So the penalty of the knots that are
left is known in closed form on every level, and rows hold only what observations add to it. If the
penalty's rows were passed on, their rounding would hide the observations where the penalty is
large: an error of 0.2 for the straight line at n = 100 in float32.

If M is larger than the observations' rows, d = s_j - H (s_i, s_k) - missed is eliminated, in which
M's rows pass on nothing; otherwise s_j itself, in which the observations' rows pass on nothing.
Either way d has the digits that the multipliers of the two gaps need: these are the multipliers of
one gap i to k plus M's forces times d.

A knot of weight zero changes nothing. So all points are knots in one order, available or not, and
knots are filled up to 2^levels + 1. Arrays have knots or gaps on their last axis, which a TPU lays
out along its lanes.

Source: George 1973, "Nested dissection of a regular finite element mesh"; Wecker and Ansley 1983,
JASA 78 (the process); Bierman 1977, as there.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ._problem import Columns, Problem, root

Matrices = Float[Array, "_ _ knots"]  # one small matrix for each knot
Missed = Float[Array, "2 m knots"] | None  # None without columns of data


class Level(NamedTuple):
    """The elimination of knots j from their neighbours' problem, one entry for each j.

    Unknowns are x_j = s_j - base s - start: own x_j + others s = right + own'^-1 force, where s are
    values and slopes of the neighbours. The prior's mean is `mean` s + `missed`; base and start are
    these where the prior is `stiff`, else zero.
    """

    mean: Float[Array, "2 others knots"]
    stiff: Bool[Array, " knots"]
    own: Float[Array, "2 2 knots"]
    others: Float[Array, "2 others knots"]
    missed: Missed
    right: Missed

    def base(self) -> Float[Array, "2 others knots"]:
        return jnp.where(self.stiff, self.mean, 0)

    def force(self, force: Float[Array, "2 m knots"]) -> tuple[Matrices, Matrices]:
        """Return own'^-1 of forces, and the forces that this leaves on the neighbours."""
        first = force[0] / self.own[0, 0]
        here = jnp.stack([first, (force[1] - self.own[0, 1] * first) / self.own[1, 1]])
        left = _product(jnp.swapaxes(self.base(), 0, 1), force)
        return here, left - _product(jnp.swapaxes(self.others, 0, 1), here)

    def solved(
        self, around: Float[Array, "others m knots"] | None, forced: Matrices | None
    ) -> tuple[Matrices, Matrices]:
        """Return s_j and d, given the neighbours' values and slopes (None without neighbours)."""
        right: Any = forced if self.right is None else self.right
        if self.right is not None and forced is not None:
            right = self.right + forced
        if around is not None:
            right = right - _product(self.others, around)
        slope = right[1] / self.own[1, 1]
        x = jnp.stack([(right[0] - self.own[0, 1] * slope) / self.own[0, 0], slope])
        if around is None:
            return x, x
        prior = _product(self.mean, around)
        if self.missed is not None:
            prior = prior + self.missed
        return x + jnp.where(self.stiff, prior, 0), x - jnp.where(self.stiff, 0, prior)


class Dissection(NamedTuple):
    """The levels of one spline's problem; the last two are those of its last and first knot."""

    problem: Problem
    gaps: tuple[Float[Array, " gaps"], ...]  # of each level
    levels: tuple[Level, ...]

    def solve(self, b: Columns) -> Columns:
        """Return x of `_rule.solve` for the forces in b, and the data that `dissect` had."""
        number, *between = len(self.problem.weights), *self.levels[:-2]
        forced: list[Any] = [None] * len(self.levels)
        if b.value is not None:
            force = _filled([b.value, b.slope], self.gaps[0].shape[0] + 1)
            for place, level in enumerate(between):
                forced[place], left = level.force(force[..., 1::2])
                none = jnp.zeros_like(left[:2, :, :1])
                before, after = [left[:2], none], [none, left[2:]]
                force = force[..., ::2] + sum(jnp.concatenate(e, axis=-1) for e in (before, after))
            forced[-2], left = self.levels[-2].force(force[..., 1:])
            forced[-1], _ = self.levels[-1].force(force[..., :1] + left)

        first, _ = self.levels[-1].solved(None, forced[-1])
        last, bent = self.levels[-2].solved(first, forced[-2])
        found = jnp.concatenate([first, last], axis=-1)
        (gap,), mu = self.gaps[-1], self.problem.mu
        shear, bend = _forces(mu, gap, bent)
        for level, gaps, force in list(zip(between, self.gaps, forced, strict=False))[::-1]:
            here, bent = level.solved(jnp.concatenate([found[..., :-1], found[..., 1:]]), force)
            found = jnp.concatenate([_alternating(found[..., :-1], here), found[..., -1:]], axis=-1)
            before, after = gaps[::2], gaps[1::2]
            mirrored = jnp.stack([-bent[0], bent[1]])
            # The same on the other side of the knot, seen from there.
            (left, left_bend), (right, right_bend) = (
                _forces(mu, gap, each) for gap, each in ((before, bent), (after, mirrored))
            )
            bend = _alternating(
                bend + shear * after / 2 + left_bend, bend - shear * before / 2 - right_bend
            )
            shear = _alternating(shear + left, shear + right)
        along = shear[..., : number - 1], bend[..., : number - 1], *found[..., :number]
        return Columns(*(each.T for each in along))


def dissect(problem: Problem, most: int, b: Columns) -> Dissection:
    """Return the factor, with the data in b on its right-hand sides.

    If more than `most` rows couple two knots, a QR reduces them to four.
    """
    gaps, weights, slope_weights, mu = problem
    number = len(weights)
    filling = (0, 2 ** (number - 2).bit_length() - number + 1)
    gaps = jnp.pad(gaps, filling, constant_values=1)
    own = jnp.stack([root(jnp.pad(each, filling)) for each in (weights, slope_weights)])
    rows: Matrices = jnp.zeros((0, 4, len(gaps)), gaps.dtype)
    data = right = None
    if b.shear is not None:
        data = _filled([b.shear, jnp.zeros_like(b.shear) if b.bend is None else b.bend], len(gaps))
        right = jnp.zeros((0, *data.shape[1:]), data.dtype)
    all_gaps, levels = [gaps], []
    while len(gaps) > 1:
        # Every second knot between its neighbours: rows of its observation, and of both its gaps.
        before, after = gaps[::2], gaps[1::2]
        left, ours = rows[..., ::2], rows[..., 1::2]
        none = jnp.zeros_like(left[:, :2])
        nothing = jnp.zeros((2, 4, len(before)), gaps.dtype)
        of_knot = jnp.concatenate([_diagonal(own[:, 1::2]), ours[:, :2], left[:, 2:]])
        of_others = jnp.concatenate(
            [
                nothing,
                jnp.concatenate([none, ours[:, 2:]], axis=1),
                jnp.concatenate([left[:, :2], none], axis=1),
            ]
        )
        *prior, data = _bridge(before, after, mu, data)
        if right is not None:
            observed = jnp.zeros((2, *right.shape[1:-1], len(before)), right.dtype)
            right = jnp.concatenate([observed, right[..., 1::2], right[..., ::2]])
        level, rows, right = _condition(*prior, of_knot, of_others, right)
        if len(rows) > most:
            both = rows if right is None else jnp.concatenate([rows, right], axis=1)
            both = _triangle(both, 4)[0]
            rows, right = both[:, :4], None if right is None else both[:, 4:]
        levels.append(level)
        gaps, own = before + after, own[:, ::2]
        all_gaps.append(gaps)

    # The last knot, whose prior is a straight line through the first.
    shear, bend = Problem(gaps, own[0], own[1], mu).roots()
    none, one = jnp.zeros_like(gaps), jnp.ones_like(gaps)
    precision = jnp.stack([jnp.stack([shear, -shear * gaps / 2]), jnp.stack([none, bend])])
    line = jnp.stack([jnp.stack([one, gaps]), jnp.stack([none, one])])
    nothing = jnp.zeros((2, 2, 1), own.dtype)
    of_last = jnp.concatenate([_diagonal(own[:, 1:]), nothing, rows[:, 2:]])
    of_first = jnp.concatenate([nothing, _diagonal(own[:, :1]), rows[:, :2]])
    missed = None
    if data is not None and right is not None:
        missed = jnp.stack([data[0] + gaps * data[1] / 2, data[1]])
        right = jnp.concatenate([jnp.zeros_like(missed), jnp.zeros_like(missed), right])
    last, rest, right = _condition(precision, line, missed, of_last, of_first, right)

    # The first knot. With one observation its slope is open, with none its value, too: set to zero.
    known = _triangle(rest if right is None else jnp.concatenate([rest, right], axis=1), 2)[0]
    observed = jnp.sum(weights > 0)
    is_open = _diagonal(jnp.stack([observed < 1, observed < 2])[:, None].astype(own.dtype)) > 0
    triangle = jnp.where(is_open, 1, known[:, :2])
    right, nobody = None if right is None else known[:, 2:], triangle[:, :0]
    first = Level(nobody, jnp.ones_like(gaps), triangle, nobody, None, right)
    return Dissection(problem, tuple(all_gaps), (*levels, last, first))


def _condition(
    precision: Float[Array, "2 2 knots"],
    mean: Float[Array, "2 others knots"],
    missed: Missed,
    of_knot: Float[Array, "rows 2 knots"],
    of_others: Float[Array, "rows others knots"],
    right: Float[Array, "rows m knots"] | None,
) -> tuple[Level, Matrices, Matrices | None]:
    """Eliminate s_j from |precision (s_j - mean s - missed)|^2 and the rows.

    Returns the level, and the rows for the others alone with their right-hand sides.
    """
    # Both ways to write s_j have the same result, but not the same rounding. As the distance from
    # the prior's mean it escapes the rounding of a stiff penalty, and as itself the rounding of
    # observations that are larger than the penalty.
    stiff = jnp.sum(of_knot[:, 0] ** 2, axis=0) < precision[0, 0] ** 2
    base = jnp.where(stiff, mean, 0)
    prior = [precision, -_product(precision, mean - base)]
    rows = [of_knot, of_others + _product(of_knot, base)]
    if missed is not None and right is not None:
        start = jnp.where(stiff, missed, 0)
        prior.append(_product(precision, missed - start))
        rows.append(right - _product(of_knot, start))
    both = jnp.concatenate([jnp.concatenate(each, axis=1) for each in (prior, rows)])
    known, rest = _triangle(both, 2)
    others = mean.shape[1]
    own, by_others, by_data = jnp.split(known, (2, 2 + others), axis=1)
    level = Level(mean, stiff, own, by_others, missed, None if missed is None else by_data)
    return level, rest[:, :others], None if missed is None else rest[:, others:]


def _bridge(
    before: Float[Array, " knots"],
    after: Float[Array, " knots"],
    mu: Float[Array, ""],
    data: Float[Array, "2 m gaps"] | None,
) -> tuple[Float[Array, "2 2 knots"], Float[Array, "2 4 knots"], Missed, Missed]:
    """Return M, H, by how much H misses the data of both gaps, and these data as one gap's.

    M, a triangle, is the root of the curvature of the two gaps' penalty at the knot, and H the
    cubic through the neighbours' values and slopes.
    """
    a, b = 1 / before, 1 / after
    value = jnp.sqrt(12 * (a**3 + b**3))
    both = 6 * (b - a) * (b + a) / value
    slope = jnp.sqrt(12.0) * (a + b) ** 2 / value  # by the determinant, 12 (a + b)^4
    rows = [jnp.stack([value, both]), jnp.stack([jnp.zeros_like(value), slope])]
    precision = jnp.sqrt(mu) * jnp.stack(rows)

    gap = before + after
    s, r = before / gap, after / gap
    values = [r * r * (1 + 2 * s), r * r * before, s * s * (1 + 2 * r), -s * s * after]
    slopes = [-6 * s * r / gap, r * (r - 2 * s), 6 * s * r / gap, s * (s - 2 * r)]
    mean = jnp.stack([jnp.stack(values), jnp.stack(slopes)])
    if data is None:
        return precision, mean, None, None

    (shear, bend), (next_shear, next_bend) = data[..., ::2], data[..., 1::2]
    value = r * r * (1 + 2 * s) * shear - s * s * (1 + 2 * r) * next_shear
    value += gap * s * r / 2 * (r * (1 - 2 * s) * bend + s * (1 - 2 * r) * next_bend)
    slope = -6 * s * r / gap * (shear + next_shear)
    slope += (1 - 3 * s * r) * (r * bend - s * next_bend)
    shear = shear + next_shear + (after * bend - before * next_bend) / 2
    return precision, mean, jnp.stack([value, slope]), jnp.stack([shear, bend + next_bend])


def _forces(mu: Float[Array, ""], gap: Array, bent: Matrices) -> tuple[Array, Array]:
    """Return shear and bend of gaps whose right end is off the left one's line by `bent`."""
    return 12 * mu / gap**3 * (bent[0] - gap / 2 * bent[1]), mu / gap * bent[1]


def _filled(parts: list[Array], size: int) -> Float[Array, "2 m all"]:
    """Return both parts, knots or gaps on the last axis, filled up with zeros."""
    both = jnp.moveaxis(jnp.stack(parts), 1, -1)
    return jnp.pad(both, ((0, 0), (0, 0), (0, size - both.shape[-1])))


def _alternating(first: Float[Array, "*m n"], second: Float[Array, "*m n"]) -> Array:
    """Return first[0], second[0], first[1], ... along the last axis."""
    return jnp.stack([first, second], axis=-1).reshape(*first.shape[:-1], -1)


def _product(a: Float[Array, "i j knots"], b: Float[Array, "j k knots"]) -> Matrices:
    return jnp.sum(a[:, :, None] * b[None], axis=1)


def _diagonal(values: Float[Array, "2 knots"]) -> Float[Array, "2 2 knots"]:
    return jnp.eye(2, dtype=values.dtype)[..., None] * values


def _triangle(rows: Matrices, size: int) -> tuple[Matrices, Matrices]:
    """Return the QR of the first `size` columns: the triangle's rows, and the rest without them.

    For each column, one Givens rotation after the other moves all rows' first entries into the
    first row, in closed form: after k of them the first row is sum_{i<=k} a_i row_i / l_k, where
    a_i are the first entries and l_k^2 = sum_{i<=k} a_i^2.
    """
    made = []
    for place in range(size):
        entries = rows[:, 0]
        upto = np.tril(np.ones((len(rows), len(rows)), bool))[..., None, None]
        moments = jnp.sum(jnp.where(upto, entries[:, None] * rows, 0), axis=1)
        square = moments[:, 0]
        some = square > 0
        length = jnp.sqrt(jnp.where(some, square, 1))
        turned = jnp.where(some[:, None], moments / length[:, None], rows[:1])
        cosine = jnp.where(some[1:], jnp.where(some[:-1], length[:-1], 0) / length[1:], 1)
        sine = jnp.where(some[1:], entries[1:] / length[1:], 0)
        rows = cosine[:, None] * rows[1:, 1:] - sine[:, None] * turned[:-1, 1:]
        made.append(jnp.pad(turned[-1], ((place, 0), (0, 0))))
    return jnp.stack(made), rows
