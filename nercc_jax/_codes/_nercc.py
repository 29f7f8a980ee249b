"""NeRCC: encoding and decoding by smoothing splines (arXiv 2402.04377)."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float

from .._points import Points, regression_points
from .._splines import smoothing_matrix, smoothing_spline
from ._code import AbstractCode, as_mask


class NeRCC(AbstractCode):
    """Nested-Regression Coded Computing.

    Coded data points are samples at beta of the smoothing spline through the data points at alpha,
    with `lambda_enc`; predictions are samples at alpha of the smoothing spline through the answers
    at beta, with `lambda_dec`. A lambda weighs the integral of u''^2 over [-1, 1] against the mean
    squared error; 0 interpolates. `lambda_enc`, `lambda_dec`, `alpha` and `beta` are leaves.

    One answer gives a constant. Two or more are continued in a straight line beyond the outermost.
    """

    num_data: int = eqx.field(static=True)
    num_workers: int = eqx.field(static=True)
    alpha: Float[Array, " num_data"]
    beta: Float[Array, " num_workers"]
    lambda_enc: Float[Array, ""]
    lambda_dec: Float[Array, ""]

    def __init__(
        self,
        num_data: int,
        num_workers: int,
        *,
        lambda_enc: Float[ArrayLike, ""] = 0.0,
        lambda_dec: Float[ArrayLike, ""] | None = None,
        points: Points = "chebyshev",
    ):
        """Points by layout name or as (alpha, beta): see `regression_points`.

        Without tuning, `lambda_enc` = 0 (workers see the data points' own curve) and `lambda_dec` =
        (9 K)^-4: a lambda smooths over a length of about its fourth root, and a ninth of 1/K was
        near the best for LeNet5 on MNIST at (N, K) from (20, 8) to (100, 20).

        Raises: ValueError as `regression_points` does, and for a lambda that is negative, NaN or
        no scalar.
        """
        self.num_data, self.num_workers = num_data, num_workers
        self.alpha, self.beta = regression_points(num_data, num_workers, points)
        self.lambda_enc = _penalty("lambda_enc", lambda_enc, self.alpha.dtype)
        lambda_dec = (9.0 * num_data) ** -4 if lambda_dec is None else lambda_dec
        self.lambda_dec = _penalty("lambda_dec", lambda_dec, self.alpha.dtype)

    def encoder_matrix(self) -> Float[Array, "num_workers num_data"]:
        return smoothing_matrix(self.alpha, self.beta, self.lambda_enc)

    def decoder_matrix(
        self, available: Bool[ArrayLike, " num_workers"]
    ) -> Float[Array, "num_data num_workers"]:
        available = as_mask(available, (self.num_workers,))
        return smoothing_matrix(self.beta, self.alpha, self.lambda_dec, available=available)

    def recovered(self, available: Bool[ArrayLike, " num_workers"]) -> Bool[Array, " num_data"]:
        available = as_mask(available, (self.num_workers,))
        return jnp.broadcast_to(jnp.any(available), (self.num_data,))

    def regress(
        self, y: Float[Array, "num_workers m"], available: Bool[Array, " num_workers"]
    ) -> Float[Array, "num_data m"]:
        # The fit works on differences of neighbours' answers, which the matrix cannot.
        y = y.astype(jnp.promote_types(y.dtype, self.beta.dtype))
        spline = smoothing_spline(self.beta, y, self.lambda_dec, available=available)
        return spline.evaluate(self.alpha)


def _penalty(name: str, value: ArrayLike, dtype) -> Float[Array, ""]:
    value = jnp.asarray(value, dtype)
    if value.shape != ():
        raise ValueError(f"{name} must be a scalar, not an array of shape {value.shape}")
    if not isinstance(value, Tracer) and not np.asarray(value) >= 0:
        raise ValueError(f"{name} must be 0 or positive, not {value}")
    return value
