"""One fit of a smoothing spline, and all that can be asked of it."""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, ArrayLike, Float, Int

from ._dissection import Dissection, dissect
from ._ends import Ends, NotAKnot, check_ends, combined, not_a_knot
from ._knots import (
    COMPARED_WITH_ALL,
    FEW_COMPARED,
    Knots,
    by_observation,
    gather_knots,
    moving,
)
from ._responses import Problem, Responses, Solutions, known_responses, responses, solve
from ._root_information import RootInformation, factorize
from .arrays import namespace, product, taken, where, within

# By platform, how many rows may join two knots that are eliminated in parallel before a QR makes
# four of them; None eliminates one knot after the other. More rows are fewer kernels, which is what
# an H100 pays for: it decodes 64 groups of (20, 8) with 110 launches, with 4 rows with some 120. A
# TPU pays for the work, too. By XLA's estimate a v5e takes, with 4, 8, 12 and 16 rows, 2.11, 1.98,
# 1.89 and 1.83 million cycles for one group of (100, 20), and 1.84, 1.89, 2.33 and 3.21 for 64
# groups of (20, 8).
ROWS: dict[str, int | None] = {"cpu": None, "tpu": 12, "other": 16}


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
        """Return the values for finite observations y; with the derivative of matrix @ y."""
        here, data = jax.lax.stop_gradient((self, y))
        means = here.knots.average(data)
        steps = means[1:] - means[:-1]
        value = taken(means, here.gap) + product(here.differences.astype(y.dtype), steps)
        return _product_of(self.matrix.astype(y.dtype), y, value)


@jax.custom_jvp
def _product_of(matrix: Array, y: Array, value: Array) -> Array:
    """Return the product of both, whose value is known."""
    del matrix, y
    return value


@functools.partial(_product_of.defjvp, symbolic_zeros=True)
def _(primals, tangents):
    # A product for each factor that moves, one at least: XLA sums the product with a tangent of
    # zeros as garbage where all else is constant (jaxlib 0.10.2, YNNPACK's fusion).
    (matrix, y, _), (of_matrix, of_y, _) = primals, tangents
    pairs = (of_matrix, y), (matrix, of_y)
    moved = [product(*pair) for pair in pairs if not any(isinstance(p, SymbolicZero) for p in pair)]
    # The function itself again, not its value: that has no derivative of second order.
    return _product_of(*primals), functools.reduce(jnp.add, moved)


class Fit(eqx.Module):
    """The spline regression at its points, before it has seen observations; `fit` makes one.

    `mu` is the penalty: lambda times the sum of the weights. `ends` is how the fitted spline ends;
    variances are those of natural ends. `rows` says how knots are eliminated: see `ROWS`.
    """

    knots: Knots
    mu: Float[Array, ""]
    slope_weights: Float[Array, " n"]
    ends: Ends = eqx.field(static=True)
    rows: int | None = eqx.field(static=True)

    def factor(self) -> RootInformation | Dissection:
        """Return the factor of the least-squares problem on the knots."""
        if self.rows is None:
            return factorize(*self._problem())
        return dissect(*self._problem(), self.rows)

    def values(self, y: Float[Array, "n m"]) -> tuple[Float[Array, "knots m"], ...]:
        """Return the fitted spline's values and slopes at the knots; linear in y."""
        factor, means = self.factor(), self.knots.average(y)
        shifts, slopes = factor.solve(means)
        if self.ends == "natural":
            return means + shifts, slopes
        assert isinstance(factor, RootInformation)
        ends = self._ends()
        bent, turned = factor.forced(self.mu * ends.values, self.mu * ends.slopes)
        at_kinks = ends.kinks.T
        share = self._share(ends, product(at_kinks, bent), -product(at_kinks, shifts))
        return means + shifts + combined(bent, share), slopes + combined(turned, share)

    def map_to(self, at: Float[Array, " k"]) -> LinearMap:
        """Return the map from observations to the fitted spline at the points `at`."""
        if self.rows is not None:
            return self._by_differences(at)
        problem, asked = self._by_adjoint(at)
        return self._map_of(responses(problem), *asked)

    def solved_map(self, at: Float[Array, " k"]) -> tuple[LinearMap, Solutions]:
        """Return `map_to`, and what its derivative is made of; knots are eliminated in turn."""
        problem, asked = self._by_adjoint(at)
        made, solutions = solve(problem)
        return self._map_of(made, *asked), solutions

    def known_map(
        self, at: Float[Array, " k"], gap: Int[Array, " k"], solutions: Solutions
    ) -> LinearMap:
        """Return `map_to`, whose gaps and solutions `solved_map` gave."""
        problem, asked = self._by_adjoint(at, gap)
        return self._map_of(known_responses(problem, solutions), *asked)

    def variance(
        self, factor: RootInformation | Dissection, at: Float[Array, " k"]
    ) -> Float[Array, " k"]:
        """Return the posterior variance at the points `at`, by tau^2: see `posterior_variance`."""
        knots = self.knots
        gap, inside, basis = hermite_basis(knots.t, at)
        left_value, left_slope, value, slope = jnp.sqrt(self.mu) * jnp.stack(basis)
        left, right = jnp.stack([left_value, left_slope]), jnp.stack([value, slope])
        known = factor.variance(gap, left, right)
        # Between two knots of known value and slope, integrated white noise still varies this much,
        # and beyond the outermost with the distance.
        h = knots.t[gap + 1] - knots.t[gap]
        between = h * inside * (1 - inside)
        beyond = jnp.maximum(jnp.maximum(knots.t[0] - at, at - knots.t[-1]), 0)
        return where(knots.number > 1, known + (between**3 + beyond**3) / 3, jnp.inf)

    def process(
        self, factor: RootInformation | Dissection, y: Float[Array, "n m"]
    ) -> Float[Array, ""]:
        """Return tau^2, estimated from these observations: see `process_variance`."""
        means = self.knots.average(y)
        shifts, _ = factor.solve(means)
        # At the minimum the penalised squares are -(g - y)' W y, and W (g - y) sums to zero.
        forces = self.knots.weights[:, None] * shifts / self.mu
        energy = -jnp.sum(forces * (means - means[0]))
        freedom = jnp.maximum(self.knots.number - 2, 0) * means.shape[1]
        return where(freedom > 0, jnp.maximum(energy, 0) / jnp.maximum(freedom, 1), jnp.inf)

    def _problem(self) -> tuple[Any, Any, Any, Any]:
        t = self.knots.t
        return t[1:] - t[:-1], self.knots.weights, self.slope_weights, self.mu

    def _ends(self) -> NotAKnot:
        return not_a_knot(self.knots, self.slope_weights / self.mu)

    def _share(
        self, ends: NotAKnot, bent: Float[Array, "2 2"], missed: Float[Array, "2 m"]
    ) -> Float[Array, "2 m"]:
        """Return c of `_ends`, from E and by how much the natural fits miss the kinks' data."""
        force = (product(ends.kinks.T, self.knots.weights) / self.mu)[:, None]
        return ends.share(force * bent, force * missed)

    def _by_adjoint(
        self, at: Float[Array, " k"], gap: Int[Array, " k"] | None = None
    ) -> tuple[Problem, tuple[Array, Array, NotAKnot | None]]:
        """Return the adjoint problem, and what else makes a map of its responses.

        That is the gap of each point, its coefficient of the gap's right end, and ends that are not
        natural: their kinks are two more points of the problem.
        """
        knots = self.knots
        place = _gap_of(knots.t, at) if gap is None else gap
        slot = jnp.arange(len(knots.t))[:, None]
        ends = jnp.stack([slot == place, slot == place + 1]).astype(at.dtype)
        # As products with what is needed anyway: the derivative of `taken` would be a scatter.
        before, after = jnp.sum(ends * knots.t[:, None], axis=1)
        _, basis = _basis_between(before, after, at)
        of_left, of_right = jnp.stack(basis[:2])[:, None], jnp.stack(basis[2:])[:, None]
        values, slopes = ends[0] * of_left + ends[1] * of_right
        nothing = values[:, :0]
        forces = nothing, nothing
        bent = None if self.ends == "natural" else self._ends()
        if bent is not None:
            values = jnp.concatenate([values, bent.kinks], axis=1)
            slopes = jnp.concatenate([slopes, jnp.zeros_like(bent.kinks)], axis=1)
            forces = self.mu * bent.values, self.mu * bent.slopes
        problem = Problem(*self._problem(), values, slopes, *forces, knots.shown)
        return problem, (place, basis[2], bent)

    def _map_of(
        self, made: Responses, gap: Array, value: Array, ends: NotAKnot | None
    ) -> LinearMap:
        left = jnp.arange(len(self.knots.t) - 1) == gap[:, None]
        matrix, differences = made.matrix, made.differences
        if ends is not None:
            matrix, differences = self._bent(made, ends, len(gap))
        differences = differences + left * value[:, None]
        return LinearMap(self.knots.spread(matrix), differences, gap, self.knots)

    def _bent(self, made: Responses, ends: NotAKnot, count: int) -> tuple[Array, Array]:
        """Return the matrix and differences of so many points, from those of kinks and forces."""
        # What the kinks' observations are missed by, with the digits that differences have.
        missed = -made.differences[count:]
        by_knot = by_observation(jnp.zeros_like(made.matrix[count:]), missed, self.knots.shown)
        by_knot = moving(by_knot, -made.matrix[count:])
        both = jnp.concatenate([by_knot, missed], axis=1)
        bent = combined(made.forced[:count], self._share(ends, made.forced[count:], both))
        by_knot, by_gap = bent[:, : len(self.knots.t)], bent[:, len(self.knots.t) :]
        return made.matrix[:count] + by_knot, made.differences[:count] + by_gap

    def _by_differences(self, at: Float[Array, " k"]) -> LinearMap:
        """Return the map, by one solution for each difference of neighbouring observations."""
        knots = self.knots
        slot = jnp.arange(len(knots.t))
        steps = (slot[:, None] > slot[:-1]).astype(knots.t.dtype)
        gap = hermite_basis(knots.t, at)[0]
        shifts, slopes = self.factor().solve(steps)
        differences = hermite(knots.t, steps + shifts, slopes, at) - steps[gap]
        direct = (gap[:, None] == slot).astype(differences.dtype)
        matrix = by_observation(direct, differences, knots.shown)
        return LinearMap(knots.spread(matrix), differences, gap, knots)


def rows_of(platform: str, ends: Ends = "natural") -> int | None:
    """Return `rows` of `fit` for a platform.

    Not-a-knot splines are made of forces, for which knots are eliminated one after the other.
    """
    return ROWS[platform] if ends == "natural" else None


def fit(
    t: Float[Array, " n"],
    lambda_: Float[Array, ""],
    weights: Float[Array, " n"],
    end_weights: Float[Array, "2"],
    *,
    ends: Ends = "natural",
    rows: int | None = None,
    known: Knots | None = None,
    weights_move: bool = True,
) -> Fit:
    """Return the regression for these points, without those whose weight is zero.

    Args: as for `smoothing_spline`; with `rows`, knots are eliminated in parallel, else one after
    the other: the same to rounding. `known` and `weights_move` are those of `gather_knots`.
    """
    if rows is not None and ends != "natural":
        raise ValueError(f"knots of {ends} splines are eliminated one after the other")
    few = FEW_COMPARED if rows is None else COMPARED_WITH_ALL
    dense = max(len(t), 2) * len(t) <= few
    knots = gather_knots(t, weights, dense=dense, known=known, weights_move=weights_move)
    counts, slot = knots.weights > 0, jnp.arange(len(knots.t))
    first, last = knots.shown[0], knots.shown[-1]
    gaps = knots.t[1:] - taken(knots.t, knots.shown[:-1])
    observed = counts[1:] & (slot[1:] > first)
    # Outside these bounds the fit is, to rounding, the interpolating spline and the straight line.
    eps = jnp.finfo(knots.t.dtype).eps
    shortest = jnp.min(where(observed, gaps, 1))
    span = jnp.sum(where(observed, gaps, 0))
    low, high = jax.lax.stop_gradient((eps**2 * shortest**3, (1 + span**3) / eps))
    total = jnp.sum(knots.weights)
    mu = within(lambda_, low, high) * where(total > 0, total, 1)
    slope_weights = mu * (
        where(slot == first, end_weights[0], 0) + where(slot == last, end_weights[1], 0)
    )
    # At this price a slope is zero, to rounding, and its square is still a number.
    most = jnp.finfo(knots.t.dtype).max ** 0.75
    slope_weights = where(slope_weights > most, most, slope_weights)
    return Fit(knots, mu, slope_weights, check_ends(ends), rows)


def regression_of(
    t: ArrayLike, lambda_: ArrayLike, weights: Any, available: Any, end_weights: Any
) -> tuple[Array, Array, Array, Array]:
    """Return the arguments of `fit` as arrays of one dtype, with zeros for what is not available.

    Raises:
        ValueError: Shapes or dtypes do not agree.
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
    return t, jnp.asarray(lambda_, t.dtype), where(available, weights, 0), heavy


def observations_of(
    y: ArrayLike, t: Float[Array, " n"], weights: Float[Array, " n"]
) -> Float[Array, "n m"]:
    """Return observations as vectors in t's dtype, zeros where the weight is zero.

    Raises:
        ValueError: They are not one for each point.
    """
    y, number = jnp.asarray(y), t.shape[0]
    if y.ndim < 1 or y.shape[0] != number:
        raise ValueError(f"y has shape {y.shape}; its first axis must be the {number} points")
    return where(weights[:, None] > 0, y.reshape(number, -1), 0).astype(t.dtype)


def hermite_basis(
    t: Float[Any, " n"], at: Float[Any, " k"]
) -> tuple[Any, Any, tuple[Any, Any, Any, Any]]:
    """Return each point's gap, its share of the gap (0 to 1), and its coefficients.

    The coefficients are those of the left knot's value and slope, and the right one's. Beyond the
    ends there are straight lines.
    """
    gap = _gap_of(t, at)
    return gap, *_basis_between(taken(t, gap), taken(t, gap + 1), at)


def _basis_between(left: Any, right: Any, at: Any) -> tuple[Any, tuple[Any, Any, Any, Any]]:
    """Return the share and the coefficients of `hermite_basis`, by the knots on both sides."""
    h, after = right - left, at - left
    inside = s = within(after / h, 0, 1)
    before, after = where(after < 0, after, 0), where(after > h, after - h, 0)
    r = 1 - s
    basis = (
        r * r * (1 + 2 * s),
        s * r * r * h + before,
        s * s * (1 + 2 * r),
        after - s * s * r * h,
    )
    return inside, basis


def _gap_of(t: Float[Any, " n"], at: Float[Any, " k"]) -> Int[Any, " k"]:
    xp = namespace(t, at)
    if t.shape[0] * at.shape[0] <= COMPARED_WITH_ALL:
        upto = xp.sum(t[None] <= at[:, None], axis=1)
    else:
        upto = xp.searchsorted(t, at, side="right")
    return xp.minimum(xp.maximum(upto - 1, 0), t.shape[0] - 2)


def hermite(
    t: Float[Array, " n"],
    values: Float[Array, "n *m"],
    slopes: Float[Array, "n *m"],
    at: Float[Array, " k"],
) -> Float[Array, "k *m"]:
    """Return the piecewise cubic with these values and slopes at the knots t; linear in both."""
    gap, _, basis = hermite_basis(t, at)
    column = (-1,) + (1,) * (values.ndim - 1)
    b0, b1, b2, b3 = (b.reshape(column) for b in basis)
    return b0 * values[gap] + b1 * slopes[gap] + b2 * values[gap + 1] + b3 * slopes[gap + 1]
