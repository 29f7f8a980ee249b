"""Smoothing splines as linear operators: a fit's two faces."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from ._ends import Ends
from ._fit import by_platform, hermite


class SmoothingSpline(eqx.Module):
    """A fitted cubic spline: its value and slope at each knot.

    Knots beyond the last that carried an observation only continue the straight line.
    """

    knots: Float[Array, " n"]
    values: Float[Array, "n *m"]
    slopes: Float[Array, "n *m"]

    @jax.jit
    def evaluate(self, t: Float[ArrayLike, " k"]) -> Float[Array, "k *m"]:
        """The spline at the points t; straight lines beyond the outermost observed knots."""
        at = jnp.asarray(t, self.knots.dtype)
        return hermite(self.knots, self.values, self.slopes, at)


@partial(jax.jit, static_argnames="ends")
def smoothing_spline(
    t: Float[ArrayLike, " n"],
    y: Float[ArrayLike, "n *m"],
    lambda_: Float[ArrayLike, ""],
    *,
    weights: Float[ArrayLike, " n"] | None = None,
    available: Bool[ArrayLike, " n"] | None = None,
    end_weights: Float[ArrayLike, "2"] | None = None,
    ends: Ends = "natural",
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
    spline (0) becomes one that ends flat (infinity). `ends`: "natural", or "not-a-knot", whose
    first two gaps have one cubic, and its last two: near the ends of a smooth curve an error of the
    fourth power of the gaps, where a natural spline's is of the second. Of fewer than four distinct
    observations it is natural.

    With one observation the fit is a constant. With none it is zero; callers must know that case.

    On a CPU knots are eliminated one after the other, elsewhere in parallel, without a loop: the
    same to rounding. A program that a process without an accelerator compiles for one has the loop.

    Raises: ValueError where shapes do not agree, and for unknown `ends`.

    Source: arXiv 2402.04377, eqs. of the encoding and decoding regression; Green and Silverman
    1994, section 2.3.
    """
    return by_platform(
        lambda found: SmoothingSpline(found.knots.t, *found.values(y)),
        t,
        lambda_,
        weights=weights,
        available=available,
        end_weights=end_weights,
        ends=ends,
    )


@partial(jax.jit, static_argnames="ends")
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
    """The matrix that maps observations at t to the fitted spline at the points `at`.

    It is `smoothing_spline(t, y, ...).evaluate(at)` written as `matrix @ y`, for many coordinates
    with the same points. Columns of unavailable observations are zero. Rows sum to one, unless
    nothing is available: then the matrix is zero. Arguments and source as there.
    """
    return by_platform(
        lambda found: found.matrix(at),
        t,
        lambda_,
        weights=weights,
        available=available,
        end_weights=end_weights,
        ends=ends,
    )
