"""The linear decoder with the least squared error on recorded answers, for any encoder."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float

from ..arrays import namespace, product, working_dtype
from ..splines.platforms import alike_in_shard_map
from .code import AbstractNumpyCode, as_mask
from .trees import any_tracer, check_floats

# The noise that answers are assumed to have: mean squared, relative to their mean square. It bounds
# the condition of the regression in float32 by a thousand, whatever was recorded.
_NOISE = 1e-6


class LearnedDecoder(AbstractNumpyCode):
    """An encoder with the linear decoder that is best for recorded answers.

    A spline assumes only that the curve through the answers is smooth. Here the second moments of
    the workers' answers and of the model's outputs at the data points were measured, over data
    points and outputs. A prediction is the best linear unbiased one from whichever workers
    answered: a regression whose kernel is learned. On the recorded data no matrix that reproduces
    constants has a smaller mean squared error, whichever workers straggle. One answer gives a
    constant.

    `nercc_jax.tuning.learn_decoder` makes it; files hold it (`save_code`).

    Attributes:
        encoder: E, (N, K); a leaf.
        root: R with R'R the moments, N answers before K outputs, upper triangular; a leaf.

    Source: Rasmussen and Williams 2006, "Gaussian Processes for Machine Learning", sections 2.2 and
    2.7, with the moments as the kernel; as the decoder of a code it is this project's own.
    """

    encoder: Float[Array, "num_workers num_data"]
    root: Float[Array, "places places"]

    def __init__(
        self,
        encoder: Float[ArrayLike, "num_workers num_data"],
        root: Float[ArrayLike, "places places"],
    ):
        """Make a code of an encoder and a root of second moments.

        Raises:
            ValueError: `encoder` is not a matrix, `root` is not of shape (N + K, N + K), or one of
                them does not hold finite floats.
        """
        encoder, root = jnp.asarray(encoder), jnp.asarray(root)
        if encoder.ndim != 2 or 0 in encoder.shape:
            raise ValueError(f"encoder must be (num_workers, num_data), not {encoder.shape}")
        places = sum(encoder.shape)
        if root.shape != (places, places):
            raise ValueError(f"root must be of shape {(places, places)}, not {root.shape}")
        for name, value in (("encoder", encoder), ("root", root)):
            check_floats(name, value)
            if not any_tracer(value) and not np.isfinite(value).all():
                raise ValueError(f"{name} must be finite")
        self.encoder, self.root = encoder, root

    @property
    def num_data(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return K."""
        return self.encoder.shape[1]

    @property
    def num_workers(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return N."""
        return self.encoder.shape[0]

    def _encoder(self) -> Float[Any, "num_workers num_data"]:
        return self.encoder

    def _decoder(self, available: Bool[Any, " num_workers"]) -> Float[Any, "num_data num_workers"]:
        return Regression(self.root, available).matrix

    def recovered(self, available: Bool[ArrayLike, " num_workers"]) -> Bool[Array, " num_data"]:
        available = as_mask(available, (self.num_workers,))
        return jnp.broadcast_to(jnp.any(available), (self.num_data,))

    def posterior_variance(
        self, available: Bool[ArrayLike, " num_workers"]
    ) -> Float[Array, " num_data"]:
        """Return the expected squared error of each prediction in units of `process_variance`.

        It holds for groups like the recorded ones; the unit is the square of the largest moment.
        """
        return Regression(self.root, as_mask(available, (self.num_workers,))).variance

    def process_variance(
        self, y: Float[Array, "num_workers m"], available: Bool[Array, " num_workers"]
    ) -> Float[Array, ""]:
        """Return how much these answers vary along the curve, in squared outputs.

        For a group like the recorded ones it is about the square of their largest moment, and more
        for one whose curve is rougher; infinite with one answer.
        """
        whitening = Regression(self.root, available).whitening
        known = jnp.where(available[:, None], y, 0)
        known = known.astype(working_dtype(y.dtype, whitening.dtype))
        varies = jnp.sum(jnp.mean(product(whitening, known) ** 2, axis=1))
        return jnp.where(jnp.sum(available) > 1, varies, jnp.inf)

    def variances_on_host(
        self, available: Bool[np.ndarray, " num_workers"]
    ) -> tuple[Float[np.ndarray, " num_data"], Float[np.ndarray, "num_workers num_workers"]]:
        """Return the variances as `NeRCC.variances_on_host` does."""
        regression = Regression(self.root, available)
        return regression.variance, regression.whitening


class Regression:
    """The regression of the data points' outputs on some workers' answers, one after the other.

    Answers are assumed to have a small noise. Each one, made independent of the earlier ones,
    corrects the predictions of all others (Potter's square-root form of the Kalman filter). The
    moments are never formed, since float32 would lose their small eigenvalues. LAPACK is not
    called: two batched calls at a time in one program deadlock on a machine of two cores.

    Attributes:
        matrix: The decoder's matrix, (K, N).
        variance: The expected squared errors of predictions, over the square of the largest moment.
        whitening: S: for one output |S y|^2 is how much the answers y vary. A constant that all
            answers share does not count.

    Source: Bierman 1977, "Factorization Methods for Discrete Sequential Estimation", section II.3.
    """

    def __init__(self, root: Any, available: Any):
        """Learn from the available answers; on the host in float64."""
        xp = namespace(root, available)
        root = root.astype(np.float64) if xp is np else root
        number = available.shape[0]
        # In units of the largest moment, whose square may overflow float32.
        largest = xp.max(xp.abs(root))
        root = root / xp.where(largest > 0, largest, 1)
        noise = xp.sqrt(_NOISE * xp.mean(xp.sum(root[:, :number] ** 2, axis=0)))
        # If all recorded answers were 0, no answer is informative.
        noise = xp.where(noise > 0, noise, 1)
        known = available.astype(root.dtype)
        state = (root[:number], xp.zeros((root.shape[1], number), root.dtype))

        def learn(state: Any, worker: Any) -> tuple[Any, Any]:
            left, predictions = state
            own, which = left[:, worker], xp.arange(number) == worker
            square = xp.sum(own**2) + noise**2
            size = xp.sqrt(square)
            white = known[worker] * (which.astype(root.dtype) - predictions[worker]) / size
            shared = product(own, left)
            left = left - known[worker] / (square + noise * size) * own[:, None] * shared[None]
            return (left, predictions + (shared / size)[:, None] * white[None]), white

        if xp is np:
            whites = np.zeros((number, number))
            for worker in np.flatnonzero(available):
                state, whites[worker] = learn(state, worker)
        else:
            state, known = alike_in_shard_map((state, known))
            state, whites = jax.lax.scan(learn, state, jnp.arange(number))
        left, predictions = state
        free = predictions[number:]
        left = xp.concatenate([left, root[number:]])[:, number:]

        # The constant that all answers share is estimated from them, made independent.
        common = xp.sum(whites, axis=1)
        weight = xp.sum(common**2)
        shown = xp.where(weight > 0, weight, 1)
        common = product(common, whites) / shown
        missing = 1 - xp.sum(free, axis=1)
        total = xp.sum(left**2, axis=0) + missing**2 / shown
        count = xp.sum(available) - 1
        centred = whites - xp.sum(whites, axis=1)[:, None] * common[None]
        self.matrix = free + missing[:, None] * common[None]
        self.variance = xp.where(weight > 0, total, xp.inf)
        several = xp.sqrt(xp.where(count > 0, count, 1))
        self.whitening = xp.where(count > 0, centred / several, 0)
