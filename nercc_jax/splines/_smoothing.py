"""Smoothing splines as linear operators: one fit behind two faces."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ._knots import Knots, gather_knots
from ._root_information import RootInformation, factorize, solve


class SmoothingSpline(eqx.Module):
    """A fitted natural cubic spline: its value and slope at each knot.

    Knots beyond the last that carried an observation only continue the straight line.
    """

    knots: Float[Array, " n"]
    values: Float[Array, "n *m"]
    slopes: Float[Array, "n *m"]

    @jax.jit
    def evaluate(self, t: Float[ArrayLike, " k"]) -> Float[Array, "k *m"]:
        """The spline at the points t; straight lines beyond the outermost observed knots."""
        at = jnp.asarray(t, self.knots.dtype)
        return _hermite(self.knots, self.values, self.slopes, at)


@jax.jit
def smoothing_spline(
    t: Float[ArrayLike, " n"],
    y: Float[ArrayLike, "n *m"],
    lambda_: Float[ArrayLike, ""],
    *,
    weights: Float[ArrayLike, " n"] | None = None,
    available: Bool[ArrayLike, " n"] | None = None,
    end_weights: Float[ArrayLike, "2"] | None = None,
) -> SmoothingSpline:
    """Fits the natural cubic smoothing spline

        argmin_u  1/W sum_i w_i |u(t_i) - y_i|^2 + lambda integral |u''(t)|^2 dt,   W = sum_i w_i,

    plus, with `end_weights` (a, b), lambda (a |u'(first)|^2 + b |u'(last)|^2), over the available
    observations, in O(n) operations per coordinate. Differentiable in t, y, lambda and all weights;
    one compilation serves every mask; batch with `jax.vmap`.

    Arguments: `t`, the points, in any order; coincident ones act as one knot with the mean of
    their observations and the sum of their weights. `y`, the observations, any trailing shape;
    unavailable ones are never read, NaN included. `lambda_`, 0 (interpolation) to infinity (the
    straight line of least squares), in units of t^3. `weights`, non-negative, 1 unless given.
    `end_weights`, non-negative, in units of 1/t: the penalty of the slopes at the smallest and the
    largest available point, with which the spline goes on as a straight line beyond them; a natural
    spline (0) becomes one that ends flat (infinity).

    With one observation the fit is a constant. With none it is zero; callers must know that case.

    Raises: ValueError where shapes do not agree.

    Source: arXiv 2402.04377, eqs. of the encoding and decoding regression; Green and Silverman
    1994, section 2.3.
    """
    t, weights = checked(t, weights, available)
    knots, factor, _ = fit(t, weights, lambda_, end_weights)
    means = averages(knots, t, weights, y)
    shifts, slopes = solve(factor, means)
    shape = (-1, *jnp.shape(y)[1:])
    return SmoothingSpline(knots.t, (means + shifts).reshape(shape), slopes.reshape(shape))


@jax.jit
def smoothing_matrix(
    t: Float[ArrayLike, " n"],
    at: Float[ArrayLike, " k"],
    lambda_: Float[ArrayLike, ""],
    *,
    weights: Float[ArrayLike, " n"] | None = None,
    available: Bool[ArrayLike, " n"] | None = None,
    end_weights: Float[ArrayLike, "2"] | None = None,
) -> Float[Array, "k n"]:
    """The matrix that maps observations at t to the fitted spline at the points `at`.

    It is `smoothing_spline(t, y, ...).evaluate(at)` written as `matrix @ y`, for many coordinates
    with the same points. Columns of unavailable observations are zero. Rows sum to one, unless
    nothing is available: then the matrix is zero. Arguments and source as there.
    """
    t, weights = checked(t, weights, available)
    at = jnp.asarray(at, t.dtype)
    knots, factor, _ = fit(t, weights, lambda_, end_weights)

    def predict(y):
        means = knots.average(y)
        shifts, slopes = solve(factor, means)
        return _hermite(knots.t, means + shifts, slopes, at)

    if at.shape[0] >= t.shape[0]:
        return predict(jnp.eye(t.shape[0], dtype=t.dtype))
    # Fewer rows than columns: run the same rotations backwards, a row at a time.
    pull = jax.linear_transpose(predict, jax.ShapeDtypeStruct((t.shape[0], at.shape[0]), t.dtype))
    return jnp.swapaxes(pull(jnp.eye(at.shape[0], dtype=t.dtype))[0], 0, 1)


def checked(t, weights, available) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
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


def fit(t, weights, lambda_, end_weights) -> tuple[Knots, RootInformation, Float[Array, ""]]:
    """The knots, the factor of their least-squares problem, and its penalty factor mu."""
    knots = gather_knots(t, weights)
    gaps, observed = jnp.diff(knots.t), knots.weights[1:] > 0
    # Outside these bounds the fit is, to rounding, the interpolating spline and the straight line.
    eps = jnp.finfo(t.dtype).eps
    shortest = jnp.min(jnp.where(observed, gaps, 1))
    span = jnp.sum(jnp.where(observed, gaps, 0))
    low, high = jax.lax.stop_gradient((eps**2 * shortest**3, (1 + span**3) / eps))
    total = jnp.sum(knots.weights)
    mu = jnp.clip(jnp.asarray(lambda_, t.dtype), low, high) * jnp.where(total > 0, total, 1)
    ends = jnp.zeros(2, t.dtype) if end_weights is None else jnp.asarray(end_weights, t.dtype)
    if ends.shape != (2,):
        raise ValueError(f"end_weights must be two, first and last, not of shape {ends.shape}")
    slope_weights = jnp.zeros_like(knots.t).at[0].add(mu * ends[0])
    slope_weights = slope_weights.at[jnp.maximum(knots.number - 1, 0)].add(mu * ends[1])
    return knots, factorize(gaps, knots.weights, slope_weights, mu), mu


def averages(knots: Knots, t, weights, y) -> Float[Array, "n m"]:
    """The observations at each knot, without what is not available.

    Raises: ValueError where they are not one for each point.
    """
    y = jnp.asarray(y)
    if y.ndim < 1 or y.shape[0] != t.shape[0]:
        raise ValueError(f"y has shape {y.shape}; its first axis must be the {t.shape[0]} points")
    flat = jnp.where(weights[:, None] > 0, y.reshape(y.shape[0], -1), 0)
    return knots.average(flat.astype(t.dtype))


def hermite_basis(
    t: Float[Array, " n"], at: Float[Array, " k"]
) -> tuple[Int[Array, " k"], Float[Array, " k"], tuple[Float[Array, " k"], ...]]:
    """The gap that each point lies in, how far into it (0 to 1), and what the value there is made
    of: of the left knot's value and slope, and the right one's. Straight lines beyond the ends."""
    gap = jnp.clip(jnp.searchsorted(t, at, side="right") - 1, 0, t.shape[0] - 2)
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


def _hermite(t, values, slopes, at):
    """The piecewise cubic with these values and slopes at the knots t; linear in both."""
    gap, _, basis = hermite_basis(t, at)
    column = (-1,) + (1,) * (values.ndim - 1)
    b0, b1, b2, b3 = (b.reshape(column) for b in basis)
    return b0 * values[gap] + b1 * slopes[gap] + b2 * values[gap + 1] + b3 * slopes[gap + 1]
