"""Smoothing splines: fits, their linear operators, and their posterior variances.

The spline is E[u | y] for y_i = u(t_i) + noise of variance sigma^2 / w_i and a prior under which
u''(t) is white noise of variance tau^2, with sigma^2 / tau^2 = mu, and u's straight line is
unknown. So the same least-squares problem has the posterior's variance, too.

Source: Wahba 1978, JRSS B 40, "Improper priors, spline smoothing and the problem of guarding
against model errors in regression"; Wecker and Ansley 1983, JASA 78.
"""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ..arrays import jitted, product, taken, where
from ._problem import Columns, Problem, steps
from ._rule import solve, variance
from .ends import Ends, check_ends, combined, not_a_knot
from .knots import Knots, by_observation, gap_of, gather_knots, hermite_basis
from .platforms import unsharded


class SmoothingSpline(eqx.Module):
    """A fitted cubic spline: its value and slope at each knot, and the lambda it was fitted with.

    Knots beyond the last one with an observation only continue the straight line.
    """

    knots: Float[Array, " n"]
    values: Float[Array, "n *m"]
    slopes: Float[Array, "n *m"]
    lambda_: Float[Array, ""]

    @jitted
    def evaluate(self, t: Float[ArrayLike, " k"]) -> Float[Array, "k *m"]:
        """Return the spline at the points t; straight lines beyond the outermost observed knots."""
        at = jnp.asarray(t, self.knots.dtype)
        gap = gap_of(self.knots, at)
        _, basis = hermite_basis(taken(self.knots, gap), taken(self.knots, gap + 1), at)
        b0, b1, b2, b3 = (b.reshape(-1, *(1,) * (self.values.ndim - 1)) for b in basis)
        left = b0 * self.values[gap] + b1 * self.slopes[gap]
        return left + b2 * self.values[gap + 1] + b3 * self.slopes[gap + 1]


@partial(jitted, static_argnames="ends")
def smoothing_spline(
    t: Float[ArrayLike, " n"],
    y: Float[ArrayLike, "n *m"],
    lambda_: Float[ArrayLike, ""] | None,
    *,
    weights: Float[ArrayLike, " n"] | None = None,
    available: Bool[ArrayLike, " n"] | None = None,
    end_weights: Float[ArrayLike, "2"] | None = None,
    ends: Ends = "natural",
) -> SmoothingSpline:
    """Fit the natural cubic smoothing spline.

        argmin_u  1/W sum_i w_i |u(t_i) - y_i|^2 + lambda integral |u''(t)|^2 dt,   W = sum_i w_i,

    plus, with `end_weights` (a, b), lambda (a |u'(first)|^2 + b |u'(last)|^2), over the available
    observations, in O(n) operations per coordinate.

    It is differentiable in t, y, lambda and all weights; one compilation serves every mask; batch
    with `jax.vmap`. With one observation the fit is a constant. With none it is zero, so callers
    must detect that case. On a CPU knots are eliminated one after the other; on accelerators in
    parallel, without a loop. Both results are the same up to rounding.

    Args:
        t: The points, in any order. Coincident ones act as one knot with the mean of their
            observations and the sum of their weights. Points that are not finite are left out.
        y: The observations, of any trailing shape. Unavailable ones are never read, NaN included.
        lambda_: From 0 (interpolation) to infinity (the straight line of least squares), in units
            of t^3; a negative one makes everything NaN. None chooses it by generalised
            cross-validation, for natural ends: the spline's `lambda_` is the choice, which is
            differentiable. Cross-validation is for independent noise, not for decoding, where a
            tuned lambda has less error.
        weights: Non-negative; 1 by default.
        available: Which observations count; all by default.
        end_weights: Non-negative, in units of 1/t: the penalty of the slopes at the smallest and
            the largest available point, with which the spline continues as a straight line. From 0
            (a natural spline) to infinity (a spline with flat ends).
        ends: "natural"; or "not-a-knot": one cubic over the first two gaps, and one over the last
            two. Near the ends of a smooth curve the error is then of the fourth order in the gaps,
            where a natural spline's is of the second. With fewer than four distinct observations
            the spline is natural.

    Raises:
        ValueError: Shapes do not agree, `ends` are unknown, or a lambda is to be chosen for ends
            that are not natural.

    Source: arXiv 2402.04377, eqs. of the encoding and decoding regression; Green and Silverman
    1994, section 2.3.
    """
    if lambda_ is None and ends != "natural":
        raise ValueError(
            f"lambda_=None chooses one for natural ends: give a lambda_ for {ends} ones"
        )
    with jax.named_scope("nercc.fit"):
        found = fit(
            t,
            1.0 if lambda_ is None else lambda_,
            weights=weights,
            available=available,
            end_weights=end_weights,
            ends=ends,
        )
        observations = found.observations(y)
        if lambda_ is None:
            found = cross_validated(found, observations)
        means = found.knots.average(observations)
        shifts, slopes = found.shifts(-steps(means))
        values = means + shifts
    shape = (len(found.knots.t), *jnp.shape(y)[1:])
    values, slopes = values.reshape(shape), slopes.reshape(shape)
    return SmoothingSpline(found.knots.t, values, slopes, found.lambda_)


@partial(jitted, static_argnames="ends")
def smoothing_matrix(
    t: Float[ArrayLike, " n"],
    at: Float[ArrayLike, " k"],
    lambda_: Float[ArrayLike, ""],
    *,
    weights: Float[ArrayLike, " n"] | None = None,
    available: Bool[ArrayLike, " n"] | None = None,
    end_weights: Float[ArrayLike, "2"] | None = None,
    ends: Ends = "natural",
) -> Float[Array, "k n"]:
    """Return the matrix that maps observations at t to the fitted spline at the points `at`.

    It is `smoothing_spline(t, y, ...).evaluate(at)` written as `matrix @ y`, for many coordinates
    with the same points. Columns of unavailable observations are zero. Rows sum to one, unless
    nothing is available: then the matrix is zero. See `smoothing_spline` for arguments and errors.
    """
    options = {"weights": weights, "available": available, "end_weights": end_weights, "ends": ends}
    return smoothing_map(t, at, lambda_, **options).matrix


class LinearMap(eqx.Module):
    """The map from observations to the fitted spline's values at k points, in two forms.

    `matrix` is its matrix. Where entries are large and of opposite sign, the product with
    observations loses digits. `apply` keeps them: it adds `differences` times the differences of
    neighbouring observations to the observation of the knot on the left of each point.
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


@partial(jitted, static_argnames="ends")
def smoothing_map(
    t: Float[ArrayLike, " n"], at: Float[ArrayLike, " k"], lambda_: ArrayLike, **options: Any
) -> LinearMap:
    """Return `smoothing_matrix` with a way to apply it that loses no digits, from the same fit.

    With natural ends, take a prediction's coefficients of values and slopes as forces. The
    multipliers of their fit, with the other sign, are the prediction's responses to the differences
    of neighbouring observations. With other ends each difference is fitted by itself.
    """
    with jax.named_scope("nercc.fit"):
        found = fit(t, lambda_, **options)
        knots, slot = found.knots, jnp.arange(len(found.knots.t))[:, None]
        places = jnp.asarray(at, knots.t.dtype)
        gap = gap_of(knots.t, places)
        # As products with arrays that are needed anyway: the derivative of `taken` is a scatter.
        left, right = ((slot == each[None]).astype(places.dtype) for each in (gap, gap + 1))
        before, after = (jnp.sum(each * knots.t[:, None], axis=0) for each in (left, right))
        basis = [each[None] for each in hermite_basis(before, after, places)[1]]
        values, slopes = left * basis[0] + right * basis[2], left * basis[1] + right * basis[3]
        if found.ends == "natural":
            columns = Columns(value=values, slope=slopes)
            differences = -solve(found.problem, columns, ("shear",)).shear.T
        else:
            shifts, bent = found.shifts(-jnp.eye(len(knots.t) - 1, dtype=places.dtype))
            differences = product(values.T, shifts) + product(slopes.T, bent)
        # By differences the response to a constant is exact, without the solution's rounding.
        matrix = knots.spread(by_observation(values.T, differences, knots.shown))
        differences += left[:-1].T * basis[2].T
        return LinearMap(matrix, differences, gap, knots)


@jitted
def posterior_variance(
    t: Float[ArrayLike, " n"],
    at: Float[ArrayLike, " k"],
    lambda_: Float[ArrayLike, ""],
    *,
    weights: Float[ArrayLike, " n"] | None = None,
    available: Bool[ArrayLike, " n"] | None = None,
    end_weights: Float[ArrayLike, "2"] | None = None,
) -> Float[Array, " k"]:
    """Return the posterior variance of u at the points `at`, over tau^2 (in units of t^3).

    It is the uncertainty of `smoothing_spline` with the same arguments: 0 (up to rounding) at
    points that it interpolates, growing with the third power of the distance to the next
    observations. It does not depend on the observations' values. It is infinite with fewer than two
    observed points, which do not determine a straight line. Differentiable in the arguments as
    `smoothing_matrix` is.

    Raises:
        ValueError: Shapes do not agree.
    """
    found = fit(t, lambda_, weights=weights, available=available, end_weights=end_weights)
    knots, number = found.knots.t, found.knots.number
    places = jnp.asarray(at, knots.dtype)
    gap = gap_of(knots, places)
    before, after = taken(knots, gap), taken(knots, gap + 1)
    inside, basis = hermite_basis(before, after, places)
    known = variance(found.problem, gap, jnp.stack(basis[:2]), jnp.stack(basis[2:]))
    # Given value and slope at two knots, integrated white noise has this variance between them, and
    # beyond the outermost knot one that grows with the distance.
    between = (after - before) * inside * (1 - inside)
    beyond = jnp.maximum(jnp.maximum(knots[0] - places, places - knots[-1]), 0)
    return where(number > 1, known + (between**3 + beyond**3) / 3, jnp.inf)


@jitted
def process_variance(
    t: Float[ArrayLike, " n"],
    y: Float[ArrayLike, "n *m"],
    lambda_: Float[ArrayLike, ""],
    *,
    weights: Float[ArrayLike, " n"] | None = None,
    available: Bool[ArrayLike, " n"] | None = None,
    end_weights: Float[ArrayLike, "2"] | None = None,
) -> Float[Array, ""]:
    """Return the estimate of tau^2 from these observations, over all coordinates of y.

    tau^2 is the roughness of the curve. This is the restricted maximum likelihood estimate: the
    minimum of the penalised least squares over mu, with one degree of freedom in each coordinate
    for each distinct observed point beyond the two that determine a straight line. Differences
    among coincident observations are left out. It is infinite with two distinct points or fewer,
    and uncertain with few. Arguments as for `smoothing_spline`.
    """
    found = fit(t, lambda_, weights=weights, available=available, end_weights=end_weights)
    knots, means = found.knots, found.knots.average(found.observations(y))
    shifts = solve(found.problem, Columns(shear=-steps(means))).value
    # At the minimum the penalised squares are -(g - y)' W y, and W (g - y) sums to zero.
    forces = knots.weights[:, None] * shifts / found.problem.mu
    energy = -jnp.sum(forces * (means - means[0]))
    freedom = jnp.maximum(knots.number - 2, 0) * means.shape[1]
    return where(freedom > 0, jnp.maximum(energy, 0) / jnp.maximum(freedom, 1), jnp.inf)


class Fit(eqx.Module):
    """The spline regression at its points, without observations; `fit` makes one.

    `ends` are those of the fitted spline; variances are those of natural ends.
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
        # Outside these bounds the fit equals, up to rounding, the interpolating spline or the
        # straight line.
        eps = jnp.finfo(knots.t.dtype).eps
        shortest = jnp.min(where(observed, apart, 1))
        span = jnp.sum(where(observed, apart, 0))
        low, high = jax.lax.stop_gradient((eps**2 * shortest**3, (1 + span**3) / eps))
        total = jnp.sum(knots.weights)
        # `clip` would take a dozen more operations, and halves the derivative on a bound.
        bounded = where(lambda_ < low, low, where(lambda_ > high, high, lambda_))
        bounded = where(lambda_ >= 0, bounded, jnp.nan)
        mu = bounded * where(total > 0, total, 1)
        before, after = end_weights
        slope_weights = mu * (where(slot == first, before, 0) + where(slot == last, after, 0))
        # With this penalty a slope is zero, up to rounding, and its square is still finite.
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

    def shifts(self, columns: Float[Array, "gaps m"]) -> tuple[Float[Array, "knots m"], ...]:
        """Return values minus observations, and slopes, given the differences of observations.

        `columns` hold each observation minus the next. Such differences are exact, so a slope that
        determines the spline in a wide gap does not consist of rounded values.
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


def cross_validated(found: Fit, y: Float[Array, "n m"]) -> Fit:
    """Return the fit with the lambda of the least generalised cross-validation score.

    The score is, over all coordinates of y and the n available observations,

        sum_i w_i |y_i - u(t_i)|^2 / (1 - trace A / n)^2,

    where A maps observations to fitted values. The search has five rounds of 33 values of log
    lambda, each between the neighbours of the best value so far. The first round considers only
    local minima and the straight line: if two observations lie close together and agree by chance,
    the score is also small at interpolation, which takes all noise for a signal. The derivative is
    that of a root of the slope, to any order, and zero where the best value is the first or the
    last. It needs O(n^2) memory.

    Source: Craven and Wahba 1979, Numerische Mathematik 31; with weights: Green and Silverman 1994,
    section 3.5.3.
    """
    knots, slot = found.knots, jnp.arange(len(found.knots.t))
    means, count = knots.average(y), jnp.sum(knots.share > 0).astype(y.dtype)
    # Coincident observations differ from their knot's, whatever the lambda.
    by_point = knots.share * taken(knots.weights, knots.knot)
    apart = jnp.sum(by_point[:, None] * (y - taken(means, knots.knot)) ** 2)
    # Each knot's value is that at its gap's right end; the first knot's, that at its left end.
    gap, later = jnp.maximum(slot - 1, 0), (slot > 0).astype(y.dtype)
    left, right = (jnp.stack([each, jnp.zeros_like(each)]) for each in (1 - later, later))

    with_lambda = lambda z: Fit(knots, jnp.exp(z), found.end_weights, found.ends)  # noqa: E731

    def score(log_lambda: Float[Array, ""]) -> Float[Array, ""]:
        problem = with_lambda(log_lambda).problem
        shifts = solve(problem, Columns(shear=-steps(means))).value
        squares = apart + jnp.sum(knots.weights[:, None] * shifts**2)
        trace = jnp.sum(knots.weights * variance(problem, gap, left, right)) / problem.mu
        free = 1 - trace / jnp.maximum(count, 1)
        sure = free > 1e3 * jnp.finfo(y.dtype).eps  # below this it is only rounding
        return where(sure, squares / where(sure, free, 1) ** 2, jnp.inf)

    observed = knots.weights > 0
    span = jnp.max(where(observed, knots.t, -jnp.inf)) - jnp.min(where(observed, knots.t, jnp.inf))
    shortest = jnp.min(where(observed[1:] & observed[:-1], steps(knots.t), span))
    enough = knots.number > 2
    low, high = jax.lax.stop_gradient(
        (
            where(enough, 3 * jnp.log(where(enough, shortest, 1) / 10) - jnp.log(count), -1),
            where(enough, 3 * jnp.log(where(enough, span, 1) * 10), 1),
        )
    )

    def search(_: object, start: Float[Array, ""]) -> Float[Array, ""]:
        def closer(turn: Array, kept: tuple[Array, Array]) -> tuple[Array, Array]:
            middle, width = kept
            near = jnp.clip(middle + width * jnp.linspace(-1, 1, 33, dtype=y.dtype), low, high)
            scores = jax.vmap(score)(near)
            known = where(jnp.isfinite(scores), scores, -jnp.inf)
            before, after = jax.lax.cummax(known), jax.lax.cummax(known, reverse=True)
            rises = (before > 1.001 * scores) & (after > 1.001 * scores).at[-1].set(True)
            skipped = (turn == 0) & jnp.any(rises) & ~rises
            return near[jnp.argmin(where(skipped, jnp.inf, scores))], width / 16

        return jax.lax.fori_loop(0, 5, closer, (start, (high - low) / 2))[0]

    def slope(log_lambda: Float[Array, ""]) -> Float[Array, ""]:
        inside = (log_lambda > low) & (log_lambda < high)
        return where(inside, jax.grad(score)(log_lambda), log_lambda)

    def tangent(linear, change):
        curvature = linear(jnp.ones_like(change))
        return where(curvature > 0, change / where(curvature > 0, curvature, 1), 0)

    best = jax.lax.custom_root(slope, (low + high) / 2, search, tangent)
    return with_lambda(best)
