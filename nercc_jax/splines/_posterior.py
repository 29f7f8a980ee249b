"""The smoothing spline as a posterior mean: how sure it is, from the factor that gives it.

The spline is E[u | y] for y_i = u(t_i) + noise of variance sigma^2 / w_i and the prior under which
u''(t) is white noise of variance tau^2, with sigma^2 / tau^2 = mu, and with nothing known of u's
straight line. The same least-squares problem then tells the posterior's variance.

Source: Wahba 1978, JRSS B 40, "Improper priors, spline smoothing and the problem of guarding
against model errors in regression"; Wecker and Ansley 1983, JASA 78.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from ._root_information import covariances, solve
from ._smoothing import averages, checked, fit, hermite_basis


@jax.jit
def posterior_variance(
    t: Float[ArrayLike, " n"],
    at: Float[ArrayLike, " k"],
    lambda_: Float[ArrayLike, ""],
    *,
    weights: Float[ArrayLike, " n"] | None = None,
    available: Bool[ArrayLike, " n"] | None = None,
    end_weights: Float[ArrayLike, "2"] | None = None,
) -> Float[Array, " k"]:
    """The posterior variance of u at the points `at`, by tau^2 (in units of t^3).

    What `smoothing_spline` with the same arguments does not know: 0 (to rounding) at points that it
    interpolates, and growing with the third power of the distance to the next observations. It does
    not depend on what was observed. Infinite with fewer than two observed points, since then
    nothing tells the straight line. Differentiable in the arguments as `smoothing_matrix` is.

    Raises: ValueError where shapes do not agree.
    """
    t, weights = checked(t, weights, available)
    at = jnp.asarray(at, t.dtype)
    knots, factor, mu = fit(t, weights, lambda_, end_weights)
    covariance, forward, noise = (mu * each for each in covariances(factor))
    forward = forward / mu
    gap, inside, (left_value, left_slope, value, slope) = hermite_basis(knots.t, at)
    here = jnp.stack([left_value, left_slope], -1)
    there = jnp.stack([value, slope], -1) + jnp.einsum("ki,kij->kj", here, forward[gap])
    known = _quadratic(there, covariance[gap + 1]) + _quadratic(here, noise[gap])
    # Between two knots of known value and slope, integrated white noise still varies this much, and
    # beyond the outermost with the distance.
    h = knots.t[gap + 1] - knots.t[gap]
    between = h * inside * (1 - inside)
    beyond = jnp.maximum(jnp.maximum(knots.t[0] - at, at - knots.t[-1]), 0)
    return jnp.where(knots.number > 1, known + (between**3 + beyond**3) / 3, jnp.inf)


@jax.jit
def process_variance(
    t: Float[ArrayLike, " n"],
    y: Float[ArrayLike, "n *m"],
    lambda_: Float[ArrayLike, ""],
    *,
    weights: Float[ArrayLike, " n"] | None = None,
    available: Bool[ArrayLike, " n"] | None = None,
    end_weights: Float[ArrayLike, "2"] | None = None,
) -> Float[Array, ""]:
    """tau^2 as these observations tell it, over all coordinates of y: how rough the path is.

    The restricted maximum likelihood estimate, the minimum of the penalised least squares by mu,
    with one degree of freedom a coordinate for each distinct observed point beyond the two that a
    straight line takes. What coincident observations differ by among themselves is left out. With
    two distinct points or fewer nothing tells it: infinite. Arguments as for `smoothing_spline`;
    mind that answers far from another make tau^2, like any scale, uncertain when they are few.
    """
    t, weights = checked(t, weights, available)
    knots, factor, mu = fit(t, weights, lambda_, end_weights)
    means = averages(knots, t, weights, y)
    shifts, _ = solve(factor, means)
    # At the minimum the penalised squares are -(g - y)' W y, and W (g - y) sums to zero.
    forces = knots.weights[:, None] * shifts / mu
    energy = -jnp.sum(forces * (means - means[0]))
    freedom = jnp.maximum(knots.number - 2, 0) * means.shape[1]
    return jnp.where(freedom > 0, jnp.maximum(energy, 0) / jnp.maximum(freedom, 1), jnp.inf)


def _quadratic(vector: Float[Array, "k 2"], matrix: Float[Array, "k 2 2"]) -> Float[Array, " k"]:
    return jnp.einsum("ki,kij,kj->k", vector, matrix, vector)
