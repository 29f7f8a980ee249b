"""Least squares of a smoothing spline in O(n), by a square-root information filter.

The unknowns are the spline's value g_i and slope v_i at each knot. In these the penalty of a
natural cubic spline is a sum over gaps h_i (the cubic Hermite form of the integral of u''^2),

    mu (v_{i+1} - v_i)^2 / h_i  +  12 mu (g_{i+1} - g_i - h_i (v_i + v_{i+1}) / 2)^2 / h_i^3,

and a penalty of a knot's slope adds v_i^2. So the fit is a least-squares problem M s = r whose rows
couple neighbours only: a shear row and a bend row for each gap, a value row (the weight of the
observation) and a slope row for each knot. `factorize` runs the QR decomposition of those rows
along the knots, two unknowns at a time, by Givens rotations; `solve_in_turn` applies R, Q and their
transposes.

This form needs first differences only. The classical forms (Reinsch; I + mu Q R^-1 Q') take second
differences of values, where a rounding error eps acts like a term eps / h^2: in float32 their error
is 6e-4 at n = 100 on Chebyshev knots, and 0.2 at n = 300 (sin 5t, lambda = 1e-2). Here rotations
mix rows of any scale without loss, a knot of weight zero adds nothing, and mu may be anything from
the interpolating to the straight-line limit.

Source: Bierman 1977, "Factorization Methods for Discrete Sequential Estimation" (the filter);
Wecker and Ansley 1983, JASA 78 (smoothing splines as state-space models).
"""

import functools
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..arrays import where
from ._problem import Columns, Problem, root

Row = tuple[Any, ...]


class Rotated(NamedTuple):
    """QR factors of one spline's least-squares problem.

    `rotations` are (cosine, sine) of the 7 rotations of each gap's elimination, in their order.
    `rows` are the two rows of R for each gap, which give g_i and v_i from g_{i+1} and v_{i+1}, and
    `last` is the triangle that gives the last knot's.
    """

    rotations: Float[Array, "gaps 14"]
    rows: Float[Array, "gaps 8"]
    last: Float[Array, "3"]


def factorize(problem: Problem, beside: Any = None, start: Any = (), given: Any = ()) -> Any:
    """Return the factor, and the carry and results of `beside`, which runs in the same loop.

    `beside(carry, turns, given)` returns its next carry and its result for a gap.

    Gaps must be positive. With a single positive weight the fit is a constant, with none it is zero
    (callers report that case).
    """
    root_weights, root_slopes = root(problem.weights), root(problem.slope_weights)
    shears, bends = problem.roots()
    halves, zero = shears * problem.gaps / 2, jnp.zeros_like(problem.mu)

    def step(carry, gap):
        # `top` and `low` are the triangle that knots up to i leave for (g_i, v_i).
        (top_g, top_v, low_v), other = carry
        (shear, half, bend, root_weight, root_slope), more = gap
        # Unknowns in the order g_i, v_i, g_{i+1}, v_{i+1}.
        r0, value_row, top = _eliminate((-shear, -half, shear, -half), (top_g, top_v, zero, zero))
        r1, slope_row, top = _eliminate((-bend, zero, bend), top)
        r2, slope_row, low = _eliminate(slope_row, (low_v, zero, zero))
        r3, top, low = _eliminate(top, low)
        r4, top, rest = _eliminate(top, (root_weight, zero))
        r5, low, _ = _eliminate(low, rest)
        r6, low, _ = _eliminate(low, (root_slope,))
        # Two arrays: each array that a loop fills is a kernel to compile, and from a single one, a
        # pass that needs only the rows would read everything.
        rotations = jnp.stack([*r0, *r1, *r2, *r3, *r4, *r5, *r6])
        turns = rotations, jnp.stack([*value_row, *slope_row, zero])
        found = ()
        if beside is not None:
            other, found = beside(other, turns, more)
        return ((*top, *low), other), (turns, found)

    carry = (root_weights[0], zero, root_slopes[0]), start
    own = (shears, halves, bends, root_weights[1:], root_slopes[1:])
    (last, other), (turns, found) = jax.lax.scan(step, carry, (own, given))
    # Too few observations leave the slope (one) or also the value (none) open: it is set to zero.
    observed = jnp.sum(problem.weights > 0)
    last = jnp.stack([where(observed < 1, 1, last[0]), last[1], where(observed < 2, 1, last[2])])
    return Rotated(*turns, last), other, found


def solve_in_turn(
    problem: Problem, b: Columns, wanted: Collection[str], factor: Rotated | None = None
) -> tuple[Rotated, Columns]:
    """Return the factor and the wanted parts of x in K x = b, in two passes along the knots.

    The unknowns are z = R^-1 (Q'r + R'^-1 f). The multipliers come from the residuals, which are
    Q of the entries of Q'r beside R less those of R'^-1 f: by rotations, not as differences.
    """
    shears, bends = problem.roots()
    parts, observed, forced = [], b.shear is not None, b.value is not None
    if observed:
        bend = jnp.zeros_like(b.shear) if b.bend is None else bends[:, None] * b.bend
        parts += [shears[:, None] * b.shear, bend]
    if forced:
        parts += [b.value[:-1], b.slope[:-1]]
    # One array, since each array that a loop reads or fills is another kernel.
    given = jnp.stack(parts, axis=1)
    none = jnp.zeros_like(given[0, :2])

    def unpacked(turns):
        # One broadcast of each number to all columns: one for each product would be most of the
        # loop's operations.
        rotations, rows = (
            jnp.unstack(jnp.broadcast_to(each[:, None], (len(each), none.shape[1])))
            for each in turns
        )
        return list(zip(rotations[::2], rotations[1::2], strict=True)), rows[:4], rows[4:]

    def forward(carry, turns, given):
        (r0, r1, r2, r3, r4, r5, r6), value_row, slope_row = unpacked(turns)
        carried, made = [], []
        if observed:  # Q' of the columns of shear and bend rows
            top, low = carry[:2]
            pivot, top = _rotate(r0, given[0], top)
            turn, top = _rotate(r1, given[1], top)
            turn, low = _rotate(r2, turn, low)
            top, low = _rotate(r3, top, low)
            # The next knot's rows are zero: rotating them in only scales.
            top, rest = r4[0] * top, -r4[1] * top
            low, first = _rotate(r5, low, rest)
            carried += [top, r6[0] * low]
            made += [pivot, turn, first, -r6[1] * low]
        if forced:  # R'^-1 of the forces on values and slopes
            p = (given[-2] - carry[-2]) / value_row[0]
            q = (given[-1] - carry[-1] - value_row[1] * p) / slope_row[0]
            carried += [value_row[2] * p + slope_row[1] * q, value_row[3] * p + slope_row[2] * q]
            made += [p, q]
        return tuple(carried), jnp.stack(made)

    start = (none[0],) * given.shape[1]
    if factor is None:
        factor, carry, found = factorize(problem, forward, start, given)
    else:
        known = factor[:2], given
        carry, found = jax.lax.scan(lambda carry, gap: forward(carry, *gap), start, known)
    assert factor is not None

    # The last knot.
    first, cross, second = factor.last
    pivot, turn = carry[:2] if observed else none
    spread = none
    if forced:
        value = (b.value[-1] - carry[-2]) / first
        slope = (b.slope[-1] - carry[-1] - cross * value) / second
        pivot, turn, spread = pivot + value, turn + slope, (-value, -slope)
    last_slope = turn / second
    last_value = (pivot - cross * last_slope) / first
    of_values, of_shears = "value" in wanted, "shear" in wanted

    def backward(carry, gap):
        turns, found = gap
        rotations, value_row, slope_row = unpacked(turns)
        force = found[-2:] if forced else none
        carried, made = [], []
        if of_values:  # R^-1, from the last gap to the first
            g_next, v_next = carry[:2]
            pivot, turn = found[:2] + force if observed and forced else found[:2]
            v = (turn - slope_row[1] * g_next - slope_row[2] * v_next) / slope_row[0]
            g = pivot - value_row[1] * v - value_row[2] * g_next - value_row[3] * v_next
            carried += [g / value_row[0], v]
            made += carried
        if of_shears:  # Q, of the entries beside R and, with the other sign, of those of R
            top, low = carry[-2:]
            r0, r1, r2, r3, r4, r5, r6 = rotations
            first, second = found[2:4] if observed else none
            low = _unrotate(r6, low, second)[0]
            low, rest = _unrotate(r5, low, first)
            top = _unrotate(r4, top, rest)[0]
            top, low = _unrotate(r3, top, low)
            bend, low = _unrotate(r2, -force[1], low)
            bend, top = _unrotate(r1, bend, top)
            shear, top = _unrotate(r0, -force[0], top)
            carried += [top, low]
            made += [shear, bend]
        return tuple(carried), jnp.stack(made)

    carry = (last_value, last_slope) * of_values + tuple(spread) * of_shears
    _, found = jax.lax.scan(backward, carry, (factor[:2], found), reverse=True)
    x: dict[str, Array] = {}
    if of_values:
        x["value"] = jnp.concatenate([found[:, 0], last_value[None]])
        x["slope"] = jnp.concatenate([found[:, 1], last_slope[None]])
    if of_shears:
        x["shear"] = -shears[:, None] * found[:, -2]
        x["bend"] = -bends[:, None] * found[:, -1]
    return factor, Columns(**x)


def variance_in_turn(
    problem: Problem, gap: Int[Array, " k"], left: Float[Array, "2 k"], right: Float[Array, "2 k"]
) -> Float[Array, " k"]:
    """Return the variance of left . s_i + right . s_{i+1} for these gaps i.

    Observations have the variance 1 / weight. The triangular factor R is the root of the
    posterior's precision, so its solution of R s = z for unit noise z has the posterior's
    covariance. From the last knot backwards this is the recursion s_i = F_i s_{i+1} + noise of
    covariance V_i. All terms are sums of squares, so nothing cancels.
    """
    factor = factorize(problem)[0]
    zero = jnp.zeros_like(problem.gaps)
    a0, a1, a2, a3, b0, b1, b2, _ = factor.rows.T
    inverse = _triangle_inverse(a0, a1, b0, zero)
    forward = -_product(inverse, jnp.stack([jnp.stack([a2, a3], -1), jnp.stack([b1, b2], -1)], -2))
    noise = _product(inverse, jnp.swapaxes(inverse, -1, -2))
    a0, a1, b0 = factor.last[0], factor.last[1], factor.last[2]
    last = _triangle_inverse(a0, a1, b0, jnp.zeros_like(problem.mu))
    final = _product(last, last.T)

    def backward(covariance, gap):
        forward, noise = gap
        covariance = _product(_product(forward, covariance), forward.T) + noise
        return covariance, covariance

    _, others = jax.lax.scan(backward, final, (forward, noise), reverse=True)
    covariances = jnp.concatenate([others, final[None]])
    left, right = left.T[:, None], right.T[:, None]
    total = jnp.zeros_like(left[:, 0, 0])
    right = right + _product(left, forward[gap])
    for row, covariance in ((right, covariances[gap + 1]), (left, noise[gap])):
        total += _product(_product(row, covariance), jnp.swapaxes(row, -1, -2))[:, 0, 0]
    return total


def _rotate(cs, p, q):
    c, s = cs
    return c * p + s * q, c * q - s * p


def _unrotate(cs, p, q):
    c, s = cs
    return c * p - s * q, c * q + s * p


def _eliminate(p: Row, q: Row) -> tuple[Row, Row, Row]:
    """Rotate row q's first entry into row p; return the rotation, p, and q without that entry."""
    (a, *p_tail), (b, *q_tail) = p, q
    square = a * a + b * b
    empty = (square == 0).astype(square.dtype)
    # Products with an inverse root would be fewer kernels, but at n = 200 their rounding doubles
    # float32's error, to 1.1e-5.
    length = jnp.sqrt(square)
    rotation = (a + empty) / (length + empty), b / (length + empty)
    tails = [_rotate(rotation, a, b) for a, b in zip(p_tail, q_tail, strict=True)]
    return rotation, (length, *(tail[0] for tail in tails)), tuple(tail[1] for tail in tails)


def _product(a: Float[Array, "*n i j"], b: Float[Array, "*n j k"]) -> Float[Array, "*n i k"]:
    """Return the product of small matrices, as sums: a matrix unit may round their entries.

    The sums are written term by term: under three vmaps a sum along an axis would have seven axes,
    on which jaxlib 0.10 crashes for CPUs (a segmentation fault in its YNNPACK).
    """
    terms = [a[..., :, j, None] * b[..., j, None, :] for j in range(a.shape[-1])]
    return functools.reduce(jnp.add, terms)


def _triangle_inverse(a: Array, b: Array, d: Array, zero: Array) -> Float[Array, "*gaps 2 2"]:
    """Return the inverse of [[a, b], [0, d]]."""
    upper = jnp.stack([1 / a, -b / a / d], -1)
    return jnp.stack([upper, jnp.stack([zero, 1 / d], -1)], -2)
