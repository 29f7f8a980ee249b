"""Error bars that cover what they say: measured by how errors compare with deviations.

The ratio of a data point's error (the root mean square over its outputs) and its deviation has some
distribution, whatever the model. A quantile of it on held-out data points, times the deviation, is
a bar that covers as many errors of others like them (split conformal prediction: Lei et al. 2018,
"Distribution-free predictive inference for regression").
"""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ..codes import check_count
from ..inference import AbstractCalibrated, Conditions
from ..surrogates import Kernel, Learner, LearnerTuning
from ..surrogates._fit_learner import find_kernel
from ..surrogates._kernels import wide_kernel

_LEVELS = 1024  # of coverage, at most, that are kept


class ErrorBars(AbstractCalibrated):
    """By how much to multiply a deviation so that so many errors are within; see `calibrate_bars`.

    `factors` are quantiles of error by deviation at the `coverages`, both increasing.
    """

    coverages: Float[Array, " levels"]
    factors: Float[Array, " levels"]
    conditions: Conditions = eqx.field(static=True, default=Conditions())

    def calibrated_under(self) -> Conditions:
        return self.conditions

    def __call__(
        self, deviation: Float[Array, "*points"], coverage: float = 0.9
    ) -> Float[Array, "*points"]:
        """The bars: 0 where a prediction is an answer itself, infinite where nothing is known.

        Raises: ValueError for a coverage outside (0, 1).
        """
        factor = self.factor(coverage)
        return jnp.where(deviation == 0, 0, deviation * factor)

    def factor(self, coverage: float) -> Float[Array, ""]:
        """Infinite for a coverage that too few data points were seen for."""
        if not 0 < coverage < 1:
            raise ValueError(f"coverage must be a share between 0 and 1, not {coverage}")
        place = jnp.searchsorted(self.coverages, coverage)
        factors = jnp.append(self.factors, jnp.inf)
        return factors[place]


def bars_of(
    learner: Learner,
    tuning: LearnerTuning | None = LearnerTuning(),  # noqa: B008, it is frozen
    *,
    folds: int = 10,
) -> ErrorBars:
    """The error bars of a learner, by what it makes of each pair of its window without that pair.

    A kernel fits the pairs that it was tuned on better than others, and its deviations are those of
    its own noise and scale. So the window is cut into `folds`, at random; the pairs of each are
    predicted, as new data points are, by a learner that knows the others alone, its kernel tuned on
    them as `tuning` says, and every error is divided by the deviation that this same learner has
    there. Give what `fit_learner` was given, or None for a kernel that was not tuned on these
    pairs. Only the learner's own shape of kernel is tuned, so many times.

    They hold for data points like those, and for the learner alone (an infinite kappa): a mixture
    with a code wants `calibrate_bars`. So does, to be exact, what is decoded with its group's
    answers, the doubtful ones copied: of that, bars of 90 % covered 86 to 96 % (docs/functions.md),
    and narrower ones may be further off. Raises: ValueError for a learner that knows nothing, fewer
    than two folds, and too few pairs to tune a kernel on.
    """
    pairs = np.flatnonzero(np.asarray(learner.filled))
    if len(pairs) == 0:
        raise ValueError("this learner knows nothing: there are no errors to go by")
    folds = min(check_count("folds", folds, 2), len(pairs))
    own = learner.kernel
    start = wide_kernel(own.shape, own.centre, own.unit)
    ratios = np.full(learner.capacity, np.nan)
    for held in np.array_split(np.random.default_rng(0).permutation(pairs), folds):
        numbers = own, learner.scale
        if tuning is not None:
            alike = dataclasses.replace(tuning, shapes=(own.shape,))
            numbers = find_kernel(learner, start, np.setdiff1d(pairs, held), alike)
        others = np.asarray(learner.filled).copy()
        others[held] = False
        ratios[held] = np.asarray(_ratios(learner, *numbers, jnp.asarray(others)))[held]
    return bars_from(ratios)


def bars_from(
    ratios: Float[np.ndarray, "..."],
    conditions: Conditions = Conditions(),  # noqa: B008, it is frozen
) -> ErrorBars:
    """The bars by errors over deviations; NaN ones do not count.

    Raises: ValueError where there are none.
    """
    ratios = np.sort(ratios[~np.isnan(ratios)])
    if ratios.size == 0:
        raise ValueError(
            "all predictions are exact or none is known: there is nothing to calibrate"
        )
    # The k-th of n covers k / (n + 1) of others.
    places = np.unique(
        np.linspace(0, ratios.size - 1, min(_LEVELS, ratios.size)).round().astype(int)
    )
    coverages = (places + 1) / (ratios.size + 1)
    return ErrorBars(jnp.asarray(coverages, float), jnp.asarray(ratios[places], float), conditions)


def error_bars(
    deviation: Float[Array, "*points"], bars: ErrorBars | None, coverage: float
) -> Float[Array, "*points"]:
    """Bars that cover so many errors: calibrated ones, or a normal distribution's.

    Raises: ValueError for a coverage outside (0, 1).
    """
    if bars is not None:
        return bars(deviation, coverage)
    if not 0 < coverage < 1:
        raise ValueError(f"coverage must be a share between 0 and 1, not {coverage}")
    from scipy.special import ndtri  # late: a fifth of a worker's import time

    return deviation * float(ndtri((1 + coverage) / 2))


@eqx.filter_jit
def _ratios(
    learner: Learner, kernel: Kernel, scale: Float[Array, ""], others: Bool[Array, " capacity"]
) -> Float[Array, " capacity"]:
    """The window's errors by deviations, as a learner has them that knows only the others; NaN
    where it knows nothing."""
    known = eqx.tree_at(lambda learner: learner.filled, learner, others).with_kernel(kernel, scale)
    mean, covariance = known.window_posterior(learner.inputs[:, None])
    error = jnp.sqrt(jnp.mean((mean[:, 0] - learner.residuals) ** 2, axis=1))
    deviation = known.deviation_of(jnp.maximum(covariance[:, 0, 0], 0) + kernel.noise)
    return jnp.where(jnp.isfinite(deviation), error / deviation, jnp.nan)
