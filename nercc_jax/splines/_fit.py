"""One fit of a smoothing spline, and all that can be asked of it."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from ._ends import Ends, check_ends, combined, not_a_knot
from ._knots import COMPARED_WITH_ALL, Knots, by_observation, gather_knots
from ._platforms import unsharded
from ._problem import Columns, Problem, steps
from ._rule import solve, variance
from .arrays import namespace, product, taken, where


class LinearMap(eqx.Module):
    """The map from observations to the fitted spline's values at k points, in two forms.

    `matrix` is the plain one. Where its entries are large and of opposite sign, its product with
    observations loses digits, which `apply` keeps: it adds to the observation of the knot on the
    left of each point what the differences of neighbouring observations make.
    """

    matrix: Float[Array, "k n"]
    differences: Float[Array, "k gaps"]
    gap: Int[Array, " k"]
    knots: Knots

    def apply(self, y: Float[Array, "n m"]) -> Float[Array, "k m"]:
        """Return the values for finite observations y."""
        means = self.knots.average(y)
        made = product(self.differences.astype(y.dtype), steps(means))
        return taken(means, self.gap) + made


class Fit(eqx.Module):
    """The spline regression at its points, before it has seen observations; `fit` makes one.

    `ends` is how the fitted spline ends; variances are those of natural ends.
    """

    knots: Knots
    lambda_: Float[Array, ""]
    end_weights: Float[Array, "2"]
    problem: Problem  # its penalty mu is lambda times the sum of the weights
    ends: Ends = eqx.field(static=True)

    def __init__(self, knots: Knots, lambda_: Array, end_weights: Array, ends: Ends):
        """Make the fit of these knots."""
        self.knots, self.lambda_, self.end_weights, self.ends = knots, lambda_, end_weights, ends
        slot = jnp.arange(len(knots.t))
        first, last = knots.shown[0], knots.shown[-1]
        observed = (knots.weights[1:] > 0) & (slot[1:] > first)
        apart = knots.t[1:] - taken(knots.t, knots.shown[:-1])
        # Outside these bounds the fit is, to rounding, the interpolating spline and the straight
        # line.
        eps = jnp.finfo(knots.t.dtype).eps
        shortest = jnp.min(where(observed, apart, 1))
        span = jnp.sum(where(observed, apart, 0))
        low, high = jax.lax.stop_gradient((eps**2 * shortest**3, (1 + span**3) / eps))
        total = jnp.sum(knots.weights)
        # `clip` has a derivative that shares what lies on a bound, in a dozen operations more.
        bounded = where(lambda_ < low, low, where(lambda_ > high, high, lambda_))
        mu = bounded * where(total > 0, total, 1)
        before, after = end_weights
        slope_weights = mu * (where(slot == first, before, 0) + where(slot == last, after, 0))
        # At this price a slope is zero, to rounding, and its square is still a number.
        most = jnp.finfo(knots.t.dtype).max ** 0.75
        slope_weights = where(slope_weights > most, most, slope_weights)
        self.problem = Problem(steps(knots.t), knots.weights, slope_weights, mu)

    def observations(self, y: ArrayLike) -> Float[Array, "n m"]:
        """Return observations as vectors in the points' dtype, zeros where they do not count.

        Raises:
            ValueError: They are not one for each point.
        """
        y, share = jnp.asarray(y), self.knots.share
        if y.ndim < 1 or len(y) != len(share):
            raise ValueError(
                f"y has shape {y.shape}; its first axis must be the {len(share)} points"
            )
        (y,) = unsharded(y.reshape(len(y), -1))
        return where(share[:, None] > 0, y, 0).astype(share.dtype)

    def values(self, y: Float[Array, "n m"]) -> tuple[Float[Array, "knots m"], ...]:
        """Return the fitted spline's values and slopes at the knots; linear in y."""
        means = self.knots.average(y)
        shifts, slopes = self.shifts(-steps(means))
        return means + shifts, slopes

    def shifts(self, columns: Float[Array, "gaps m"]) -> tuple[Float[Array, "knots m"], ...]:
        """Return values less observations, and slopes, by what each observation is below the last.

        These are the problem's unknowns, so that data enter as the differences of neighbours, which
        are exact: a slope that carries the spline over a wide gap is not made of rounded values.
        """
        if self.ends == "natural":
            made = solve(self.problem, Columns(shear=columns))
            return made.value, made.slope
        # The two forces at the ends are two columns more.
        mu, m = self.problem.mu, columns.shape[1]
        ends = not_a_knot(self.knots, self.problem.slope_weights / mu)
        none = jnp.zeros((len(self.knots.t), m), columns.dtype)
        value, slope = (jnp.concatenate([none, mu * e], axis=1) for e in (ends.values, ends.slopes))
        columns = jnp.concatenate([columns, jnp.zeros((len(columns), 2), columns.dtype)], axis=1)
        made = solve(self.problem, Columns(shear=columns, value=value, slope=slope))
        jumps = product(ends.kinks.T, self.knots.weights)[:, None] / mu
        jumps = jumps * product(ends.kinks.T, made.value)
        share = ends.share(jumps[:, m:], -jumps[:, :m])
        return tuple(
            each[:, :m] + combined(each[:, m:], share) for each in (made.value, made.slope)
        )

    def map_to(self, at: Float[Array, " k"]) -> LinearMap:
        """Return the map from observations to the fitted spline at the points `at`.

        With natural ends, forces that are a prediction's coefficients of values and slopes make the
        multipliers that are, with the other sign, its responses to the differences of neighbouring
        observations; otherwise each difference by itself is fitted.
        """
        knots, slot = self.knots, jnp.arange(len(self.knots.t))[:, None]
        gap = gap_of(knots.t, at)
        # As products with what is needed anyway: the derivative of `taken` would be a scatter.
        left, right = ((slot == each[None]).astype(at.dtype) for each in (gap, gap + 1))
        before, after = (jnp.sum(each * knots.t[:, None], axis=0) for each in (left, right))
        basis = [each[None] for each in hermite_basis(before, after, at)[1]]
        values, slopes = left * basis[0] + right * basis[2], left * basis[1] + right * basis[3]
        if self.ends == "natural":
            columns = Columns(value=values, slope=slopes)
            differences = -solve(self.problem, columns, ("shear",)).shear.T
        else:
            shifts, bent = self.shifts(-jnp.eye(len(knots.t) - 1, dtype=at.dtype))
            differences = product(values.T, shifts) + product(slopes.T, bent)
        # By differences the response to a constant is exact: it has none of the solution's
        # rounding.
        matrix = knots.spread(by_observation(values.T, differences, knots.shown))
        differences += left[:-1].T * basis[2].T
        return LinearMap(matrix, differences, gap, knots)

    def variance(self, at: Float[Array, " k"]) -> Float[Array, " k"]:
        """Return the posterior variance at the points `at`, by tau^2: see `posterior_variance`."""
        t = self.knots.t
        gap = gap_of(t, at)
        inside, basis = hermite_basis(taken(t, gap), taken(t, gap + 1), at)
        known = variance(self.problem, gap, jnp.stack(basis[:2]), jnp.stack(basis[2:]))
        # Between two knots of known value and slope, integrated white noise still varies this much,
        # and beyond the outermost with the distance.
        between = (taken(t, gap + 1) - taken(t, gap)) * inside * (1 - inside)
        beyond = jnp.maximum(jnp.maximum(t[0] - at, at - t[-1]), 0)
        return where(self.knots.number > 1, known + (between**3 + beyond**3) / 3, jnp.inf)

    def process(self, y: Float[Array, "n m"]) -> Float[Array, ""]:
        """Return tau^2, estimated from these observations: see `process_variance`."""
        means = self.knots.average(y)
        shifts = solve(self.problem, Columns(shear=-steps(means))).value
        # At the minimum the penalised squares are -(g - y)' W y, and W (g - y) sums to zero.
        forces = self.knots.weights[:, None] * shifts / self.problem.mu
        energy = -jnp.sum(forces * (means - means[0]))
        freedom = jnp.maximum(self.knots.number - 2, 0) * means.shape[1]
        return where(freedom > 0, jnp.maximum(energy, 0) / jnp.maximum(freedom, 1), jnp.inf)


def fit(
    t: ArrayLike,
    lambda_: ArrayLike,
    *,
    weights: Any = None,
    available: Any = None,
    end_weights: Any = None,
    ends: Ends = "natural",
) -> Fit:
    """Return the regression for these points, without those that are not available.

    Raises:
        ValueError: Shapes or dtypes do not agree, or `ends` are unknown.
    """
    t = jnp.asarray(t)
    if t.ndim != 1 or t.shape[0] == 0 or not jnp.issubdtype(t.dtype, jnp.floating):
        raise ValueError(f"points must be a float vector, not empty: got {t.dtype}{t.shape}")
    weights = jnp.ones_like(t) if weights is None else jnp.asarray(weights, t.dtype)
    available = jnp.ones(t.shape, bool) if available is None else jnp.asarray(available)
    for name, value in (("weights", weights), ("available", available)):
        if value.shape != t.shape:
            raise ValueError(
                f"{name} has shape {value.shape}; the {t.shape[0]} points need one each"
            )
    if available.dtype != bool:
        raise ValueError(f"available must be a boolean mask, not {available.dtype}")
    heavy = jnp.zeros(2, t.dtype) if end_weights is None else jnp.asarray(end_weights, t.dtype)
    if heavy.shape != (2,):
        raise ValueError(f"end_weights must be two, first and last, not of shape {heavy.shape}")
    arrays = t, jnp.asarray(lambda_, t.dtype), weights, available, heavy
    t, penalty, weights, available, heavy = unsharded(*arrays)
    return Fit(gather_knots(t, where(available, weights, 0)), penalty, heavy, check_ends(ends))


def gap_of(t: Float[Any, " n"], at: Float[Any, " k"]) -> Int[Any, " k"]:
    """Return the gap between knots that each point lies in, or beyond the ends is nearest to."""
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
