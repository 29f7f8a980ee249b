"""The smoothing spline as a posterior mean: how sure it is, from the factor that gives it.

The spline is E[u | y] for y_i = u(t_i) + noise of variance sigma^2 / w_i and the prior under which
u''(t) is white noise of variance tau^2, with sigma^2 / tau^2 = mu, and with nothing known of u's
straight line. The same least-squares problem then tells the posterior's variance.

Source: Wahba 1978, JRSS B 40, "Improper priors, spline smoothing and the problem of guarding
against model errors in regression"; Wecker and Ansley 1983, JASA 78.
"""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from ._fit import fit
from .arrays import jitted


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

    It is what `smoothing_spline` with the same arguments leaves open: 0 (to rounding) at points
    that it interpolates, growing with the third power of the distance to the next observations. It
    does not depend on what was observed. It is infinite with fewer than two observed points, which
    do not determine the straight line. Differentiable in the arguments as `smoothing_matrix` is.

    Raises:
        ValueError: Shapes do not agree.
    """
    found = fit(t, lambda_, weights=weights, available=available, end_weights=end_weights)
    return found.variance(jnp.asarray(at, found.knots.t.dtype))


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

    tau^2 is the roughness of the path. This is the restricted maximum likelihood estimate, the
    minimum of the penalised least squares over mu, with one degree of freedom in each coordinate
    for each distinct observed point beyond the two that a straight line takes. Differences among
    coincident observations are left out. It is infinite with two distinct points or fewer.
    Arguments as for `smoothing_spline`; answers far from another make tau^2, like any scale,
    uncertain when they are few.
    """
    found = fit(t, lambda_, weights=weights, available=available, end_weights=end_weights)
    return found.process(found.observations(y))


@jitted
def posterior_variances(
    t: Float[ArrayLike, " n"],
    y: Float[ArrayLike, "n *m"],
    at: Float[ArrayLike, " k"],
    lambda_: Float[ArrayLike, ""],
    *,
    weights: Float[ArrayLike, " n"] | None = None,
    available: Bool[ArrayLike, " n"] | None = None,
    end_weights: Float[ArrayLike, "2"] | None = None,
) -> tuple[Float[Array, " k"], Float[Array, ""]]:
    """Return `posterior_variance` and `process_variance`, from one regression."""
    found = fit(t, lambda_, weights=weights, available=available, end_weights=end_weights)
    at = jnp.asarray(at, found.knots.t.dtype)
    return found.variance(at), found.process(found.observations(y))
