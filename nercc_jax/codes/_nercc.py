"""NeRCC: encoding and decoding by smoothing splines (arXiv 2402.04377)."""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float

from ..arrays import namespace, where, working_dtype
from ..splines import posterior_variance, process_variance, smoothing_matrix
from ..splines.ends import Ends
from ..splines.host import smoothing_matrix_on_host, variances_on_host
from ..splines.smoothing import smoothing_map
from .code import as_mask, check_mask
from .points import AbstractPointsCode, Points, coincident, mean_gap
from .trees import any_tracer, scalar_leaf


class AbstractSplineCode(AbstractPointsCode):
    """A code whose decoder is a smoothing spline through the answers at beta, read at alpha.

    Variances are those of a spline with natural ends.
    """

    lambda_dec: eqx.AbstractVar[Float[Array, ""]]
    ends: ClassVar[Ends] = "natural"

    @abc.abstractmethod
    def decoding_options(self, available: Bool[Any, " num_workers"]) -> dict[str, Any]:
        """Return the decoding regression's arguments except points, data and ends."""

    def _decoder(self, available: Bool[Any, " num_workers"]) -> Float[Any, "num_data num_workers"]:
        points: Any = self.beta, self.alpha
        if namespace(*points, available) is not np:
            return self.decoder_map(available).matrix
        # Binding a method in Equinox takes a tenth of the time that the matrix takes.
        options = type(self).decoding_options(self, available)
        return smoothing_matrix_on_host(*points, **options, ends=self.ends)

    def decoder_map(self, available: Bool[ArrayLike, " num_workers"]) -> Any:
        options = self.decoding_options(as_mask(available, (self.num_workers,)))
        return smoothing_map(self.beta, self.alpha, **options, ends=self.ends)

    def recovered(self, available: Bool[ArrayLike, " num_workers"]) -> Bool[Array, " num_data"]:
        available = as_mask(available, (self.num_workers,))
        return jnp.broadcast_to(jnp.any(available), (self.num_data,))

    def posterior_variance(
        self, available: Bool[ArrayLike, " num_workers"]
    ) -> Float[Array, " num_data"]:
        options = self.decoding_options(as_mask(available, (self.num_workers,)))
        variance = posterior_variance(self.beta, self.alpha, **options)
        return jnp.where(self._kept(options), 0, variance)

    def process_variance(
        self, y: Float[Array, "num_workers m"], available: Bool[Array, " num_workers"]
    ) -> Float[Array, ""]:
        y = y.astype(working_dtype(y.dtype, self.beta.dtype))
        return process_variance(self.beta, y, **self.decoding_options(available))

    def variances_on_host(
        self, available: Bool[np.ndarray, " num_workers"]
    ) -> tuple[Float[np.ndarray, " num_data"], Float[np.ndarray, "num_workers num_workers"]]:
        """Return `posterior_variance`, and S: for one output `process_variance` is |S y|^2.

        Where `process_variance` is infinite, S is zero. The code's leaves must be NumPy arrays.
        """
        points: Any = self.beta, self.alpha
        options = self.decoding_options(available)
        variance, root = variances_on_host(*points, **options)
        return np.where(self._kept(options), 0, variance), root

    def _kept(self, options: dict[str, Any]) -> Bool[Any, " num_data"]:
        """Return for which data points the prediction is an answer of a worker at its point."""
        available = options["available"]
        xp = namespace(self.beta, available)
        # With weights such answers are exact, however much the others are smoothed.
        kept = (self.lambda_dec == 0) | ("weights" in options)
        return kept & coincident(self.alpha, xp.where(available, self.beta, xp.inf))


class NeRCC(AbstractSplineCode):
    """Nested-Regression Coded Computing.

    Coded data points are samples at beta of the smoothing spline through the data points at alpha,
    with `lambda_enc`; predictions are samples at alpha of the smoothing spline through the answers
    at beta, with `decoder_penalty`. A lambda weighs the integral of u''^2 over [-1, 1] against the
    mean squared error; 0 interpolates. One answer gives a constant.

    Two terms go beyond the published method, which is the special case where both are zero:
    `gap_exponent` and `end_penalty`. Beyond the outermost answers the spline is a straight line,
    whose slope few answers determine.

    Attributes:
        lambda_enc: The encoder's smoothing; a leaf.
        lambda_dec: The decoder's smoothing when all workers answer; a leaf.
        gap_exponent: The decoder's lambda grows with this power of the mean gap between the
            answers; a leaf.
        end_penalty: lambda_dec weighs, in addition to the integral, end_penalty (1 - t^2) u'(t)^2
            at the two outermost answers t: nothing at -1 and 1, and more the longer the straight
            line beyond t is; a leaf.
        exact: Whether an answer at a data point's own point (interleaved and repeated points) has
            the weight 1 / eps in the decoding regression, so that this prediction is the answer
            itself, however much lambda_dec smooths elsewhere. Otherwise that holds for
            lambda_dec = 0 only. It needs a `lambda_enc` of 0, since otherwise the worker has not
            run on the data point itself.
    """

    lambda_enc: Float[Array, ""]
    lambda_dec: Float[Array, ""]
    gap_exponent: Float[Array, ""]
    end_penalty: Float[Array, ""]
    exact: bool = eqx.field(static=True)

    def __init__(
        self,
        num_data: int,
        num_workers: int,
        *,
        lambda_enc: Float[ArrayLike, ""] = 0.0,
        lambda_dec: Float[ArrayLike, ""] | None = None,
        gap_exponent: Float[ArrayLike, ""] | None = None,
        end_penalty: Float[ArrayLike, ""] | None = None,
        points: Points = "chebyshev",
        exact: bool = False,
    ):
        """Make a code with points by layout name or as (alpha, beta): see `regression_points`.

        By default, `lambda_enc` = 0 (the encoder interpolates); `lambda_dec` is the fourth power of
        a tenth of the workers' mean gap or of a 28th of the data points', in radians, whichever is
        smaller (a lambda smooths over a length of about its fourth root); `gap_exponent` = 4 and
        `end_penalty` = 3000. These were near the best on average for LeNet5, RepVGG and ViT at
        (N, K) from (20, 8) to (100, 60), 0 to N - K stragglers, logits and softmax. If you give
        `lambda_dec`, the last two are 0 unless given.

        Raises:
            ValueError: As `regression_points`; a lambda or `end_penalty` is negative, a number is
                NaN or (other than a lambda) infinite or no scalar.
        """
        if not isinstance(exact, bool):
            raise ValueError(f"exact must be True or False, not {exact!r}")
        AbstractPointsCode.__init__(self, num_data, num_workers, points=points)
        self.exact = exact
        dtype = self.alpha.dtype
        exponent, penalty = (4.0, 3000.0) if lambda_dec is None else (0.0, 0.0)
        lambda_: Any = lambda_dec
        if lambda_dec is None:
            both: Any = self.alpha, self.beta
            if not any_tracer(both):  # then nothing is compiled
                both = np.asarray(self.alpha), np.asarray(self.beta)
            data, workers = (mean_gap(each, np.ones(each.shape, bool)) for each in both)
            lambda_ = namespace(*both).minimum(data / 28, workers / 10) ** 4
        exponent = exponent if gap_exponent is None else gap_exponent
        penalty = penalty if end_penalty is None else end_penalty
        largest = float(jnp.finfo(dtype).max)
        self.lambda_enc = scalar_leaf("lambda_enc", lambda_enc, dtype, least=0.0, most=np.inf)
        self.lambda_dec = scalar_leaf("lambda_dec", lambda_, dtype, least=0.0, most=np.inf)
        self.gap_exponent = scalar_leaf(
            "gap_exponent", exponent, dtype, least=-largest, most=largest
        )
        self.end_penalty = scalar_leaf("end_penalty", penalty, dtype, least=0.0, most=largest)

    def decoder_penalty(self, available: Bool[ArrayLike, " num_workers"]) -> Float[Any, ""]:
        """Return the lambda that these workers' answers are decoded with.

        It is lambda_dec * (mean gap of the available betas / mean gap of all betas) ^ gap_exponent,
        with gaps as in `nercc_jax.codes.points.mean_gap`.
        """
        mask: Any = check_mask(available, (self.num_workers,))
        both = namespace(mask).stack([mask, np.ones(self.num_workers, bool)])
        gap, least = mean_gap(self.beta, both)
        return self.lambda_dec * (gap / least) ** self.gap_exponent

    def _encoder(self) -> Float[Any, "num_workers num_data"]:
        points: Any = self.alpha, self.beta, self.lambda_enc
        on_host = namespace(*points) is np
        return smoothing_matrix_on_host(*points) if on_host else smoothing_matrix(*points)

    def decoding_options(self, available: Bool[Any, " num_workers"]) -> dict[str, Any]:
        xp = namespace(self.beta, available)
        both = xp.stack([self.beta, -self.beta])
        outermost = xp.min(where(available, both, 1), axis=1)
        options = {
            "lambda_": NeRCC.decoder_penalty(self, available),
            "available": available,
            "end_weights": self.end_penalty * (1 - outermost**2),
        }
        if self.exact:
            own = coincident(self.beta, self.alpha)
            weights = where(own, 1 / np.finfo(self.beta.dtype).eps, 1).astype(self.beta.dtype)
            # lambda is taken times the sum of weights: heavy answers must not add to the penalty.
            total = xp.sum(weights, where=available)
            count = xp.sum(available, dtype=total.dtype)
            options["lambda_"] *= count / where(total > 0, total, 1)
            options["weights"] = weights
        return options
