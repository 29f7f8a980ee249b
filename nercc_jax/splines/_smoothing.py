"""Smoothing splines as linear operators, and as posterior means: all faces of a fit.

The spline is E[u | y] for y_i = u(t_i) + noise of variance sigma^2 / w_i and the prior under which
u''(t) is white noise of variance tau^2, with sigma^2 / tau^2 = mu, and with nothing known of u's
straight line. So the same least-squares problem has the posterior's variance, too.

Source: Wahba 1978, JRSS B 40, "Improper priors, spline smoothing and the problem of guarding
against model errors in regression"; Wecker and Ansley 1983, JASA 78.
"""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from ._choice import cross_validated
from ._ends import Ends
from ._fit import LinearMap, fit, gap_of, hermite_basis
from .arrays import jitted, taken


class SmoothingSpline(eqx.Module):
    """A fitted cubic spline: its value and slope at each knot, and the lambda it was fitted with.

    Knots beyond the last that carried an observation only continue the straight line.
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
    with `jax.vmap`. With one observation the fit is a constant. With none it is zero; callers must
    know that case. On a CPU, and with not-a-knot ends, knots are eliminated one after the other,
    elsewhere in parallel, without a loop: the same to rounding.

    Args:
        t: The points, in any order. Coincident ones act as one knot with the mean of their
            observations and the sum of their weights.
        y: The observations, of any trailing shape. Unavailable ones are never read, NaN included.
        lambda_: From 0 (interpolation) to infinity (the straight line of least squares), in units
            of t^3. None chooses it by generalised cross-validation, for natural ends: the spline's
            `lambda_` is the choice, which is differentiable. It is for noise that differs from one
            observation to the next, not for decoding, where a tuned lambda has less error.
        weights: Non-negative; 1 unless given.
        available: Which observations count; all unless given.
        end_weights: Non-negative, in units of 1/t: the penalty of the slopes at the smallest and
            the largest available point, with which the spline goes on as a straight line beyond
            them. A natural spline (0) becomes one that ends flat (infinity).
        ends: "natural", or "not-a-knot", whose first two gaps have one cubic, and its last two:
            near the ends of a smooth curve an error of the fourth power of the gaps, where a
            natural spline's is of the second. Of fewer than four distinct observations it is
            natural.

    Raises:
        ValueError: Where shapes do not agree, for unknown `ends`, and where a lambda is to be
            chosen for ends that are not natural.

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
        values, slopes = found.values(observations)
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
    nothing is available: then the matrix is zero. Arguments, errors and source as there.
    """
    options = {"weights": weights, "available": available, "end_weights": end_weights, "ends": ends}
    return smoothing_map(t, at, lambda_, **options).matrix


@partial(jitted, static_argnames="ends")
def smoothing_map(
    t: Float[ArrayLike, " n"], at: Float[ArrayLike, " k"], lambda_: ArrayLike, **options: Any
) -> LinearMap:
    """Return `smoothing_matrix` with a way to apply it that loses no digits, from the same fit."""
    with jax.named_scope("nercc.fit"):
        found = fit(t, lambda_, **options)
        return found.map_to(jnp.asarray(at, found.knots.t.dtype))


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
