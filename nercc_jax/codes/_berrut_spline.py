"""BSCC: encoding by Berrut's rational interpolant, decoding by a cubic spline."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float

from ..splines import posterior_variance, process_variance
from ..splines._ends import Ends, check_ends
from ..splines._fit import LinearMap
from ..splines._host import smoothing_matrix_on_host
from ..splines._smoothing import smoothing_map
from ..splines.arrays import working_dtype
from ._berrut import berrut_matrix
from ._checks import check_counts
from ._code import AbstractCode, MatrixOnHost, all_or_none, as_mask
from ._kept import decoder_at_hand, encoder_at_hand
from ._points import Points, coincident, regression_points
from ._trees import scalar_leaf


class BerrutSpline(AbstractCode):
    """Basis-spline assisted coded computing (BSCC).

    Coded data points are those of `Berrut`: samples at beta of Berrut's rational interpolant
    through the data points at alpha. Predictions are samples at alpha of a cubic spline through the
    answers at beta. As published it interpolates; a positive `lambda_dec` smooths as `NeRCC`'s
    does, and `tune` finds it. One answer gives a constant. Beyond the outermost answers the spline
    is a straight line, where a polynomial in the B-spline basis would go on as a cubic.

    Attributes:
        num_data: K.
        num_workers: N.
        alpha: Regression points of the data points; a leaf.
        beta: Regression points of the workers; a leaf.
        lambda_dec: The decoder's smoothing; a leaf.
        ends: "not-a-knot", as an interpolating B-spline without further conditions has them, or
            "natural". The variances are those of natural ends.

    Source: Borah, Harshan and Lalitha 2026, "Basis-Spline Assisted Coded Computing: Strategies and
    Error Bounds", arXiv 2601.10616.

    >>> import jax.numpy as jnp
    >>> from nercc_jax.codes import BerrutSpline
    >>> code = BerrutSpline(4, 12)
    >>> x = jnp.linspace(0, 1, 4)[:, None]
    >>> y = jnp.sin(code.encode(x))
    >>> error = code.decode(y, jnp.arange(12) != 5) - jnp.sin(x)
    >>> bool(jnp.abs(error).max() < 0.01)
    True
    """

    num_data: int = eqx.field(static=True)
    num_workers: int = eqx.field(static=True)
    alpha: Float[Array, " num_data"]
    beta: Float[Array, " num_workers"]
    lambda_dec: Float[Array, ""]
    ends: Ends = eqx.field(static=True)

    def __init__(
        self,
        num_data: int,
        num_workers: int,
        *,
        lambda_dec: Float[ArrayLike, ""] = 0.0,
        points: Points = "chebyshev",
        ends: Ends = "not-a-knot",
    ):
        """Make a code with points by layout name or as (alpha, beta): see `regression_points`.

        Raises:
            ValueError: As `regression_points`; `lambda_dec` is negative, NaN or no scalar, or
                `ends` is unknown.
        """
        counts = check_counts(num_data=num_data, num_workers=num_workers)
        self.num_data, self.num_workers = counts
        self.ends = check_ends(ends)
        self.alpha, self.beta = regression_points(self.num_data, self.num_workers, points)
        dtype = self.alpha.dtype
        self.lambda_dec = scalar_leaf("lambda_dec", lambda_dec, dtype, least=0.0, most=np.inf)

    def encoder_matrix(self) -> Float[Array, "num_workers num_data"]:
        if (at_hand := encoder_at_hand(self)) is not None:
            return at_hand
        return berrut_matrix(self.alpha, self.beta, jnp.ones(self.num_data, bool))

    def decoder_matrix(
        self, available: Bool[ArrayLike, " num_workers"]
    ) -> Float[Array, "num_data num_workers"]:
        if (at_hand := decoder_at_hand(self, available)) is not None:
            return at_hand
        return self.decoder_map(available).matrix

    def decoder_map(self, available: Bool[ArrayLike, " num_workers"]) -> LinearMap:
        available = as_mask(available, (self.num_workers,))
        return smoothing_map(
            self.beta, self.alpha, self.lambda_dec, available=available, ends=self.ends
        )

    def recovered(self, available: Bool[ArrayLike, " num_workers"]) -> Bool[Array, " num_data"]:
        return all_or_none(available, self)

    def encoder_on_host(self) -> Float[np.ndarray, "num_workers num_data"]:
        return berrut_matrix(self.alpha, self.beta, np.ones(self.num_data, bool))

    def decoder_on_host(self, available: Bool[np.ndarray, " num_workers"]) -> MatrixOnHost:
        beta, alpha, lambda_ = map(np.asarray, (self.beta, self.alpha, self.lambda_dec))
        matrix = smoothing_matrix_on_host(beta, alpha, lambda_, available=available, ends=self.ends)
        return matrix, np.full(self.num_data, available.any())

    def posterior_variance(
        self, available: Bool[ArrayLike, " num_workers"]
    ) -> Float[Array, " num_data"]:
        available = as_mask(available, (self.num_workers,))
        variance = posterior_variance(self.beta, self.alpha, self.lambda_dec, available=available)
        own = coincident(self.alpha, jnp.where(available, self.beta, jnp.inf))
        return jnp.where(own & (self.lambda_dec == 0), 0, variance)

    def process_variance(
        self, y: Float[Array, "num_workers m"], available: Bool[Array, " num_workers"]
    ) -> Float[Array, ""]:
        y = y.astype(working_dtype(y.dtype, self.beta.dtype))
        return process_variance(self.beta, y, self.lambda_dec, available=available)
