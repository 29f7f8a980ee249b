"""One fit of a smoothing spline, and all that can be asked of it."""

from collections.abc import Callable
from typing import Literal, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend.backend import backends
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ._dissection import Dissection, dissect
from ._ends import Ends, check_ends, not_a_knot
from ._knots import COMPARED_WITH_ALL, Knots, gather_knots
from ._root_information import RootInformation, factorize

Answer = TypeVar("Answer")

# How many rows may join two knots that are eliminated in parallel before a QR makes four of them.
# More are fewer kernels, which is what an H100 pays for: it decodes 64 groups of (20, 8) with 110
# launches, with 4 rows with some 120. A TPU pays for the work, too. By XLA's estimate a v5e takes,
# with 4, 8, 12 and 16 rows, 2.11, 1.98, 1.89 and 1.83 million cycles for one group of (100, 20),
# and 1.84, 1.89, 2.33 and 3.21 for 64 groups of (20, 8).
ROWS, ROWS_TPU = 16, 12

# Which way `by_platform` goes: None as the process has devices. Tests hold it to one way; what
# compiles for devices that are not there asks for "platform".
way: Literal["one by one", "in parallel", "platform"] | None = None


class Fit(eqx.Module):
    """The spline regression at its points, before it has seen observations; `fit` makes one.

    `factor` is that of the least-squares problem on the `knots`, `mu` its penalty: lambda times the
    sum of the weights. `ends` is how what it predicts ends; variances are those of natural ends.
    """

    t: Float[Array, " n"]
    weights: Float[Array, " n"]
    knots: Knots
    factor: RootInformation | Dissection
    mu: Float[Array, ""]
    ends: Ends = eqx.field(static=True, default="natural")

    def values(
        self, y: Float[ArrayLike, "n *m"]
    ) -> tuple[Float[Array, "knots *m"], Float[Array, "knots *m"]]:
        """The fitted spline's values and slopes at the knots."""
        shape = (-1, *jnp.shape(y)[1:])
        values, slopes = self._through(self._means(y))
        return values.reshape(shape), slopes.reshape(shape)

    def matrix(self, at: Float[ArrayLike, " k"]) -> Float[Array, "k n"]:
        """The matrix from observations to the fitted spline at the points `at`."""
        at = jnp.asarray(at, self.t.dtype)
        number = self.t.shape[0]

        def predict(means):
            return hermite(self.knots.t, *self._through(means), at)

        if isinstance(self.factor, Dissection) and number**2 <= COMPARED_WITH_ALL:
            return predict(self.knots.averages())
        if at.shape[0] >= number:
            return predict(self.knots.average(jnp.eye(number, dtype=self.t.dtype)))
        # Fewer rows than columns: run the same rotations backwards, a row at a time.
        y = jax.ShapeDtypeStruct((number, len(at)), self.t.dtype)
        pull = jax.linear_transpose(lambda y: predict(self.knots.average(y)), y)
        return jnp.swapaxes(pull(jnp.eye(at.shape[0], dtype=self.t.dtype))[0], 0, 1)

    def variance(self, at: Float[ArrayLike, " k"]) -> Float[Array, " k"]:
        """The posterior variance at the points `at`, by tau^2: see `posterior_variance`."""
        at = jnp.asarray(at, self.t.dtype)
        knots = self.knots
        gap, inside, basis = hermite_basis(knots.t, at)
        left_value, left_slope, value, slope = jnp.sqrt(self.mu) * jnp.stack(basis)
        left, right = jnp.stack([left_value, left_slope]), jnp.stack([value, slope])
        known = self.factor.variance(gap, left, right)
        # Between two knots of known value and slope, integrated white noise still varies this much,
        # and beyond the outermost with the distance.
        h = knots.t[gap + 1] - knots.t[gap]
        between = h * inside * (1 - inside)
        beyond = jnp.maximum(jnp.maximum(knots.t[0] - at, at - knots.t[-1]), 0)
        return jnp.where(knots.number > 1, known + (between**3 + beyond**3) / 3, jnp.inf)

    def process(self, y: Float[ArrayLike, "n *m"]) -> Float[Array, ""]:
        """tau^2 as these observations tell it: see `process_variance`."""
        means = self._means(y)
        shifts, _ = self.factor.solve(means)
        # At the minimum the penalised squares are -(g - y)' W y, and W (g - y) sums to zero.
        forces = self.knots.weights[:, None] * shifts / self.mu
        energy = -jnp.sum(forces * (means - means[0]))
        freedom = jnp.maximum(self.knots.number - 2, 0) * means.shape[1]
        return jnp.where(freedom > 0, jnp.maximum(energy, 0) / jnp.maximum(freedom, 1), jnp.inf)

    def _through(self, means: Float[Array, "knots m"]) -> tuple[Array, Array]:
        """Values and slopes at the knots, from the observations there; linear in these."""
        shifts, slopes = self.factor.solve(means)
        if self.ends == "natural":
            return means + shifts, slopes
        return not_a_knot(self.knots, self.factor.solve, means + shifts, slopes)

    def _means(self, y: Float[ArrayLike, "n *m"]) -> Float[Array, "knots m"]:
        """The observations at each knot, without what is not available.

        Raises: ValueError where they are not one for each point.
        """
        y, number = jnp.asarray(y), self.t.shape[0]
        if y.ndim < 1 or y.shape[0] != number:
            raise ValueError(f"y has shape {y.shape}; its first axis must be the {number} points")
        flat = jnp.where(self.weights[:, None] > 0, y.reshape(number, -1), 0)
        return self.knots.average(flat.astype(self.t.dtype))


def fit(
    t: Float[ArrayLike, " n"],
    lambda_: Float[ArrayLike, ""],
    *,
    weights: Float[ArrayLike, " n"] | None = None,
    available: Bool[ArrayLike, " n"] | None = None,
    end_weights: Float[ArrayLike, "2"] | None = None,
    ends: Ends = "natural",
    rows: int | None = None,
) -> Fit:
    """The regression for these points; arguments and errors as for `smoothing_spline`.

    Knots are eliminated one after the other, or, with `rows`, in parallel: the same to rounding.
    """
    check_ends(ends)
    t, weights = _checked(t, weights, available)
    knots = gather_knots(t, weights, in_place=rows is not None)
    counts, slot = knots.weights > 0, jnp.arange(len(knots.t))
    first, last = knots.shown[0], knots.shown[-1]
    gaps = knots.t[1:] - knots.t[knots.shown[:-1]]
    observed = counts[1:] & (slot[1:] > first)
    # Outside these bounds the fit is, to rounding, the interpolating spline and the straight line.
    eps = jnp.finfo(t.dtype).eps
    shortest = jnp.min(jnp.where(observed, gaps, 1))
    span = jnp.sum(jnp.where(observed, gaps, 0))
    low, high = jax.lax.stop_gradient((eps**2 * shortest**3, (1 + span**3) / eps))
    total = jnp.sum(knots.weights)
    mu = jnp.clip(jnp.asarray(lambda_, t.dtype), low, high) * jnp.where(total > 0, total, 1)
    heavy = jnp.zeros(2, t.dtype) if end_weights is None else jnp.asarray(end_weights, t.dtype)
    if heavy.shape != (2,):
        raise ValueError(f"end_weights must be two, first and last, not of shape {heavy.shape}")
    slope_weights = mu * (
        jnp.where(slot == first, heavy[0], 0) + jnp.where(slot == last, heavy[1], 0)
    )
    problem = jnp.diff(knots.t), knots.weights, slope_weights, mu
    factor = factorize(*problem) if rows is None else dissect(*problem, rows)
    return Fit(t, weights, knots, factor, mu, ends)


def by_platform(question: Callable[[Fit], Answer], *arguments, **options) -> Answer:
    """What a `fit` of these arguments answers, its knots eliminated as suits the platform.

    A CPU compiles and runs one knot after the other faster; an accelerator launches kernels for
    each. Where there are CPUs only, the other ways are not even traced: that takes three times as
    long as the rest of decoding, and ten times for a gradient.
    """

    def ask(rows: int | None) -> Answer:
        return question(fit(*arguments, **options, rows=rows))

    if way == "in parallel":
        return ask(ROWS)
    if way == "one by one" or (way is None and set(backends()) == {"cpu"}):
        return ask(None)
    return jax.lax.platform_dependent(
        cpu=lambda: ask(None), tpu=lambda: ask(ROWS_TPU), default=lambda: ask(ROWS)
    )


def _checked(t, weights, available) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """The points, and their weights with zeros for what is not available."""
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
    return t, jnp.where(available, weights, 0)


def hermite_basis(
    t: Float[Array, " n"], at: Float[Array, " k"]
) -> tuple[Int[Array, " k"], Float[Array, " k"], tuple[Float[Array, " k"], ...]]:
    """The gap that each point lies in, how far into it (0 to 1), and what the value there is made
    of: of the left knot's value and slope, and the right one's. Straight lines beyond the ends."""
    few = t.shape[0] * at.shape[0] <= COMPARED_WITH_ALL
    gap = (
        jnp.searchsorted(t, at, side="right", method="compare_all" if few else "scan_unrolled") - 1
    )
    gap = jnp.clip(gap, 0, t.shape[0] - 2)
    left, h = t[gap], t[gap + 1] - t[gap]
    inside = jnp.clip((at - left) / h, 0, 1)
    before, after = jnp.minimum(at - left, 0), jnp.maximum(at - left - h, 0)
    s, r = inside, 1 - inside
    basis = (
        r * r * (1 + 2 * s),
        s * r * r * h + before,
        s * s * (1 + 2 * r),
        after - s * s * r * h,
    )
    return gap, inside, basis


def hermite(
    t: Float[Array, " n"],
    values: Float[Array, "n *m"],
    slopes: Float[Array, "n *m"],
    at: Float[Array, " k"],
) -> Float[Array, "k *m"]:
    """The piecewise cubic with these values and slopes at the knots t; linear in both."""
    gap, _, basis = hermite_basis(t, at)
    column = (-1,) + (1,) * (values.ndim - 1)
    b0, b1, b2, b3 = (b.reshape(column) for b in basis)
    return b0 * values[gap] + b1 * slopes[gap] + b2 * values[gap + 1] + b3 * slopes[gap + 1]
