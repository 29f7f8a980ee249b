"""Least squares of a smoothing spline in O(n), by a square-root information filter.

The spline is held by its value g_i and slope v_i at each knot. In these unknowns the penalty of a
natural cubic spline is a sum over gaps h_i (the cubic Hermite form of the integral of u''^2),

    mu (v_{i+1} - v_i)^2 / h_i  +  12 mu (g_{i+1} - g_i - h_i (v_i + v_{i+1}) / 2)^2 / h_i^3,

and a penalty of a knot's slope adds v_i^2. So the fit is a least-squares problem M s = r whose rows
join neighbours only: a shear row and a bend row for each gap, a value row (the weight of the
observation) and a slope row for each knot. `factorize` runs the QR decomposition of those rows
along the knots, two unknowns at a time, by Givens rotations; the methods of `RootInformation` apply
R, Q and their transposes.

Why this form: it takes only first differences. The classical forms (Reinsch; I + mu Q R^-1 Q')
take second differences of values, and a rounding error eps there acts like a term eps / h^2: in
float32 they are off by 6e-4 at n = 100 on Chebyshev knots, and by 0.2 at n = 300 (sin 5t, lambda =
1e-2). Here rotations mix rows of any scale without loss, a knot of weight zero adds nothing, and mu
may go from the interpolating to the straight-line limit.

Source: Bierman 1977, "Factorization Methods for Discrete Sequential Estimation" (the filter);
Wecker and Ansley 1983, JASA 78 (smoothing splines as state-space models).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .arrays import where

Row = tuple[Any, ...]


class Pivots(NamedTuple):
    """Columns on the right of R: two rows for each gap, and two for the last knot."""

    value: Float[Array, "gaps m"]
    slope: Float[Array, "gaps m"]
    last_value: Float[Array, " m"]
    last_slope: Float[Array, " m"]

    def rows(self) -> tuple[Float[Array, "_ m"], ...]:
        """Return all rows, in parts."""
        return self.value, self.slope, self.last_value[None], self.last_slope[None]


class Residuals(NamedTuple):
    """The entries of Q' times columns beside the pivots: two for each gap."""

    first: Float[Array, "gaps m"]
    second: Float[Array, "gaps m"]


class Rows(NamedTuple):
    """Columns over the rows of M, by the kind of row."""

    shear: Float[Array, "gaps m"]
    bend: Float[Array, "gaps m"]
    value: Float[Array, "n m"]
    slope: Float[Array, "n m"]


class RootInformation(eqx.Module):
    """QR factors of one spline's least-squares problem; every field has one entry a gap.

    `steps` are the (cosine, sine) pairs of each gap's elimination, in its order, and the value row
    and the slope row of the triangular factor R, which give g_i and v_i from g_{i+1} and v_{i+1}.
    `last` is the triangle that gives the last knot's.
    """

    shears: Float[Array, " gaps"]
    steps: tuple[Float[Array, "gaps 7 2"], Float[Array, "gaps 2 4"]]
    last: Float[Array, "3"]

    def solve(self, y: Float[Array, "n m"]) -> tuple[Float[Array, "n m"], Float[Array, "n m"]]:
        """Return the fitted spline's values at the knots less the observations y, and its slopes.

        The unknowns are g_i - y_i and v_i here, so that data enter as the differences y_{i+1} -
        y_i, which are exact for neighbours: a slope that carries the spline over a wide gap is not
        made of rounded values. The result is linear in y.
        """
        shear = -self.shears[:, None] * (y[1:] - y[:-1])
        nothing = jnp.zeros_like(shear[0])
        last, pivots = jax.lax.scan(_forward, (nothing, nothing), (self.steps, shear))
        return self._back(Pivots(*pivots, *last))

    def forced(
        self, values: Float[Array, "n m"], slopes: Float[Array, "n m"]
    ) -> tuple[Float[Array, "n m"], Float[Array, "n m"]]:
        """Return values and slopes at the knots under these forces alone, without observations."""
        nothing = jnp.zeros_like(values[0])
        given = self.steps, values[:-1], slopes[:-1]
        passed, pivots = jax.lax.scan(_back_transposed, (nothing, nothing), given)
        return self._back(Pivots(*pivots, *self.last_adjoint(passed, values[-1], slopes[-1])))

    def spread(self, right: Pivots) -> Rows:
        """Return Q of the columns: their entries in all rows of M."""
        given = self.steps, right.value, right.slope
        start = right.last_value, right.last_slope
        (value, slope), rows = jax.lax.scan(_spread, start, given, reverse=True)
        return _rows_of(value, slope, rows)

    def back_and_spread(
        self, right: Pivots, residuals: Residuals
    ) -> tuple[Float[Array, "n columns"], Float[Array, "n columns"], Rows]:
        """Return R^-1 of columns, values and slopes at the knots, and Q of their rows.

        The first k of the columns are on the right of R only, and `residuals` are beside the m
        others, of which Q is taken without what R is solved for.
        """
        count, m = right.value.shape[1], residuals.first.shape[1]
        ours: Any = (np.arange(count) < count - m).astype(right.value.dtype)
        residuals = Residuals(*(jnp.pad(each, ((0, 0), (count - m, 0))) for each in residuals))

        def step(carry, gap):
            made, (pivot, slope, *left) = gap
            solved, spread = carry
            solved, known = _back(solved, (made, pivot, slope))
            spread, rows = _spread(spread, (made, ours * pivot, ours * slope, *left))
            return (solved, spread), jnp.stack([*known, *rows])

        given = jnp.stack([right.value, right.slope, *residuals], axis=1)
        last = self._last_of(right)
        start = last, (ours * right.last_value, ours * right.last_slope)
        (_, ends), found = jax.lax.scan(step, start, (self.steps, given), reverse=True)
        values, slopes, *rows = (found[:, i] for i in range(found.shape[1]))
        values, slopes = _appended(values, last[0]), _appended(slopes, last[1])
        return values, slopes, _rows_of(*ends, tuple(rows))

    def last_adjoint(
        self, passed: tuple[Array, Array], value: Array, slope: Array
    ) -> tuple[Array, Array]:
        """Return R'^-1 of columns for the last knot, by what the others pass on."""
        p = (value - passed[0]) / self.last[0]
        return p, (slope - passed[1] - self.last[1] * p) / self.last[2]

    def _back(self, right: Pivots) -> tuple[Float[Array, "n m"], Float[Array, "n m"]]:
        """Return R^-1 of the columns: values and slopes at the knots."""
        last = self._last_of(right)
        given = self.steps, right.value, right.slope
        _, (gs, vs) = jax.lax.scan(_back, last, given, reverse=True)
        return _appended(gs, last[0]), _appended(vs, last[1])

    def _last_of(self, right: Pivots) -> tuple[Array, Array]:
        """Return R^-1 of the columns for the last knot: its value and slope."""
        v = right.last_slope / self.last[2]
        return (right.last_value - self.last[1] * v) / self.last[0], v

    def variance(
        self, gap: Int[Array, " k"], left: Float[Array, "2 k"], right: Float[Array, "2 k"]
    ) -> Float[Array, " k"]:
        """Return the variance of left . s_i + right . s_{i+1} for these gaps i.

        Observations have the variance 1 / weight.
        """
        covariance, forward, noise = self._covariances()
        left, right = left.T, right.T
        right = right + small_product(left[:, None], forward[gap])[:, 0]
        return _quadratic(right, covariance[gap + 1]) + _quadratic(left, noise[gap])

    def _covariances(
        self,
    ) -> tuple[Float[Array, "n 2 2"], Float[Array, "gaps 2 2"], Float[Array, "gaps 2 2"]]:
        """Return the covariances of s_i = (g_i, v_i) for observations of the variance 1 / weight.

        The triangular factor R is the root of the posterior's precision, so its solution of R s = z
        for unit noise z has the posterior's covariance. From the last knot backwards that is the
        recursion s_i = F_i s_{i+1} + noise of covariance V_i. Returned are the covariances C_i of
        s_i, and F_i and V_i of every gap. All are sums of squares: nothing cancels.
        """
        zero = jnp.zeros_like(self.shears)
        (a0, a1, a2, a3), (b0, b1, b2, _) = jnp.moveaxis(self.steps[1], 0, -1)
        inverse = _triangle_inverse(a0, a1, b0, zero)
        forward = -small_product(
            inverse, jnp.stack([jnp.stack([a2, a3], -1), jnp.stack([b1, b2], -1)], -2)
        )
        noise = small_product(inverse, jnp.swapaxes(inverse, -1, -2))
        a, b, d = (self.last[i] for i in range(3))
        last = _triangle_inverse(a, b, d, jnp.zeros_like(a))

        def backward(covariance, gap):
            forward, noise = gap
            covariance = small_product(small_product(forward, covariance), forward.T) + noise
            return covariance, covariance

        final = small_product(last, last.T)
        _, others = jax.lax.scan(backward, final, (forward, noise), reverse=True)
        return jnp.concatenate([others, final[None]]), forward, noise


def _rotation(a, b):
    """Return the cosine, sine and length that turn (a, b) into (length, 0); the identity for 0."""
    square = a * a + b * b
    empty = square == 0
    # Two `where`s, or the gradient of sqrt at zero is infinite. Products with an inverse root would
    # be fewer kernels, but at n = 200 their rounding doubles float32's error, to 1.1e-5.
    length = jnp.sqrt(where(empty, 1, square))
    return where(empty, 1, a / length), b / length, where(empty, 0, length)


def root(weights: Float[Array, " n"]) -> Float[Array, " n"]:
    """Return the square root, with a finite derivative at zero."""
    return jnp.sqrt(where(weights > 0, weights, 1)) * (weights > 0)


def _rotate(cs, p, q):
    c, s = cs
    return c * p + s * q, c * q - s * p


def _unrotate(cs, p, q):
    c, s = cs
    return c * p - s * q, c * q + s * p


def _eliminate(p: Row, q: Row) -> tuple[Row, Row, Row]:
    """Rotate row q's first entry into row p; return the rotation, p, and q without that entry."""
    c, s, length = _rotation(p[0], q[0])
    tails = [_rotate((c, s), a, b) for a, b in zip(p[1:], q[1:], strict=True)]
    return (c, s), (length, *(t[0] for t in tails)), tuple(t[1] for t in tails)


def factorize(
    gaps: Float[Array, " gaps"],
    weights: Float[Array, " n"],
    slope_weights: Float[Array, " n"],
    mu: Float[Array, ""],
) -> RootInformation:
    """Return the factors for knots with these gaps and weights, and the penalty factor mu > 0.

    The weights are those of the observations; slope weights those of the knots' squared slopes.

    Gaps must be positive. With a single positive weight the fit is a constant, with none it is zero
    (callers report that case).
    """
    return _factorize(gaps, weights, slope_weights, mu, lambda carry, *_: (carry, ()), (), ())[0]


def factorize_beside(
    gaps: Float[Array, " gaps"],
    weights: Float[Array, " n"],
    slope_weights: Float[Array, " n"],
    mu: Float[Array, ""],
    values: Float[Array, "n k"],
    slopes: Float[Array, "n k"],
    observations: Float[Array, "n m"] | None = None,
) -> tuple[RootInformation, Pivots, tuple[Pivots, Residuals] | None]:
    """Return the factors, and what the same pass along the knots can compute, too.

    - R'^-1 of columns with these entries for the knots' values and slopes;
    - for `observations`, Q' r for columns r of value rows: the pivots, and what no solution
      reaches.
    """

    def step(carry, made, given):
        adjoint, observed = carry
        value, slope, *observation = given
        adjoint, pivots = _back_transposed(adjoint, (made, value, slope))
        if not observation:
            return (adjoint, observed), (jnp.stack(pivots), ())
        observed, found = _forward_observation(observed, (made, *observation))
        return (adjoint, observed), (jnp.stack(pivots), jnp.stack(found))

    nothing = jnp.zeros_like(values[0])
    start: Any = (nothing, nothing), ()
    given: Any = values[:-1], slopes[:-1]
    if observations is not None:
        first = observations[0], jnp.zeros_like(observations[0])
        start, given = (start[0], first), (*given, observations[1:])
    factor, (passed, last), (pivots, found) = _factorize(
        gaps, weights, slope_weights, mu, step, start, given
    )
    ends = factor.last_adjoint(passed, values[-1], slopes[-1])
    adjoint = Pivots(pivots[:, 0], pivots[:, 1], *ends)
    if observations is None:
        return factor, adjoint, None
    pivots = Pivots(found[:, 0], found[:, 1], *last)
    return factor, adjoint, (pivots, Residuals(found[:, 2], found[:, 3]))


def _factorize(
    gaps: Array,
    weights: Array,
    slope_weights: Array,
    mu: Array,
    beside: Callable[..., tuple[Any, Any]],
    start: Any,
    given: Any,
) -> tuple[RootInformation, Any, Any]:
    """Return the factors, and what the step `beside` carries and makes along the knots."""
    root_weights, root_slopes = root(weights), root(slope_weights)
    zero = jnp.zeros_like(mu)

    def step(carry, gap):
        # `top` and `low` are the triangle of what knots up to i say about (g_i, v_i).
        ((top_g, top_v), (low_v,)), other = carry
        (shear, half, bend, root_weight, root_slope), more = gap
        # Unknowns in the order g_i, v_i, g_{i+1}, v_{i+1}.
        r0, value_row, top = _eliminate((-shear, -half, shear, -half), (top_g, top_v, zero, zero))
        r1, slope_row, top = _eliminate((-bend, zero, bend), top)
        r2, slope_row, low = _eliminate(slope_row, (low_v, zero, zero))
        r3, top, low = _eliminate(top, low)
        r4, top, rest = _eliminate(top, (root_weight, zero))
        r5, low, _ = _eliminate(low, rest)
        r6, low, _ = _eliminate(low, (root_slope,))
        made = (r0, r1, r2, r3, r4, r5, r6), (value_row, (*slope_row, zero))
        other, found = beside(other, made, more)
        # Two arrays, since each that a loop fills is a kernel to compile.
        turned, triangle = (jnp.stack([jnp.stack(row) for row in rows]) for rows in made)
        return ((top, low), other), ((turned, triangle), found)

    shears = shears_of(gaps, mu)
    halves, bends = shears * gaps / 2, jnp.sqrt(mu / gaps)
    carry = ((root_weights[0], zero), (root_slopes[0],)), start
    own = (shears, halves, bends, root_weights[1:], root_slopes[1:])
    ((top, low), other), (steps, found) = jax.lax.scan(step, carry, (own, given))
    # What too few observations leave open is set to zero: the slope with one, the value with none.
    observed = jnp.sum(weights > 0)
    last = jnp.stack([where(observed < 1, 1, top[0]), top[1], where(observed < 2, 1, low[0])])
    return RootInformation(shears, steps, last), other, found


# Steps along the gaps: each takes what it carries, and the gap's part of the factor with columns.


def _forward(carry, gap):
    """Apply Q' to columns of shear rows: the rows that R is solved for."""
    top, low = carry
    ((r0, r1, r2, r3, r4, r5, r6), _), shear = gap
    pivot, top = _rotate(r0, shear, top)
    # The other rows that come in are zero: to rotate them in only scales.
    slope, top = r1[1] * top, r1[0] * top
    slope, low = _rotate(r2, slope, low)
    top, low = _rotate(r3, top, low)
    top, rest = r4[0] * top, -r4[1] * top
    low = r6[0] * _rotate(r5, low, rest)[0]
    return (top, low), (pivot, slope)


def _forward_observation(carry, gap):
    """Apply Q' to columns of value rows."""
    top, low = carry
    ((r0, r1, r2, r3, r4, r5, r6), _), value = gap
    pivot, top = r0[1] * top, r0[0] * top
    slope, top = r1[1] * top, r1[0] * top
    slope, low = _rotate(r2, slope, low)
    top, low = _rotate(r3, top, low)
    top, rest = _rotate(r4, top, value)
    low, first = _rotate(r5, low, rest)
    low, second = r6[0] * low, -r6[1] * low
    return (top, low), (pivot, slope, first, second)


def _back(carry, gap):
    """Apply R^-1 to columns, from the last gap to the first."""
    g_next, v_next = carry
    (_, (value_row, slope_row)), value, slope = gap
    v = (slope - slope_row[1] * g_next - slope_row[2] * v_next) / slope_row[0]
    g = value - value_row[1] * v - value_row[2] * g_next - value_row[3] * v_next
    g = g / value_row[0]
    return (g, v), (g, v)


def _back_transposed(carry, gap):
    """Apply R'^-1 to columns."""
    (_, (value_row, slope_row)), value, slope = gap
    value, slope = value - carry[0], slope - carry[1]
    p = value / value_row[0]
    q = (slope - value_row[1] * p) / slope_row[0]
    passed = (
        value_row[2] * p + slope_row[1] * q,
        value_row[3] * p + slope_row[2] * q,
    )
    return passed, (p, q)


def _spread(carry, gap):
    """Apply Q to columns, from the last gap to the first."""
    top, low = carry
    ((r0, r1, r2, r3, r4, r5, r6), _), pivot, slope, *left = gap
    first, second = left or (0.0, 0.0)
    low, of_slope = _unrotate(r6, low, second)
    low, rest = _unrotate(r5, low, first)
    top, of_value = _unrotate(r4, top, rest)
    top, low = _unrotate(r3, top, low)
    bend, low = _unrotate(r2, slope, low)
    bend, top = _unrotate(r1, bend, top)
    shear, top = _unrotate(r0, pivot, top)
    return (top, low), (shear, bend, of_value, of_slope)


def _rows_of(value: Array, slope: Array, rows: tuple[Array, ...]) -> Rows:
    shear, bend, values, slopes = rows
    values = jnp.concatenate([value[None], values])
    return Rows(shear, bend, values, jnp.concatenate([slope[None], slopes]))


def _appended(rows: Array, last: Array) -> Array:
    return jnp.concatenate([rows, last[None]])


def shears_of(gaps: Float[Array, " gaps"], mu: Float[Array, ""]) -> Float[Array, " gaps"]:
    """Return the factor of each shear row."""
    return jnp.sqrt(12 * mu / gaps) / gaps


def small_product(a: Float[Array, "*n i j"], b: Float[Array, "*n j k"]) -> Float[Array, "*n i k"]:
    """Return the product of small matrices, as sums: a matrix unit may round their entries.

    It goes term by term: under three vmaps a sum along an axis would be of seven, of which jaxlib
    0.10's code for CPUs dies (a segmentation fault in its YNNPACK).
    """
    terms = [a[..., :, j, None] * b[..., j, None, :] for j in range(a.shape[-1])]
    return functools.reduce(jnp.add, terms)


def _triangle_inverse(a: Array, b: Array, d: Array, zero: Array) -> Float[Array, "*gaps 2 2"]:
    """Return the inverse of [[a, b], [0, d]]."""
    upper = jnp.stack([1 / a, -b / a / d], -1)
    return jnp.stack([upper, jnp.stack([zero, 1 / d], -1)], -2)


def _quadratic(vector: Float[Array, "k 2"], matrix: Float[Array, "k 2 2"]) -> Float[Array, " k"]:
    return small_product(small_product(vector[:, None], matrix), vector[..., None])[:, 0, 0]
