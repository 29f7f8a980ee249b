"""Error bars with a stated coverage, from the ratios of errors to deviations.

The ratio of a data point's error (the root mean square over its outputs) to its deviation has some
distribution, whatever the model. A quantile of the ratios of held-out data points, times the
deviation, is an error bar that covers this share of the errors of similar data points (split
conformal prediction: Lei et al. 2018, "Distribution-free predictive inference for regression").
"""

import dataclasses
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float

from ..arrays import check_count, root_mean_square
from ..codes.trees import to_device
from ..surrogates import Kernel, Learner, LearnerTuning, tune_learner
from .accuracy import Accuracy, bar_factor, conformal_quantile

_LEVELS = 1000  # the number of coverages whose factors are stored


class ErrorBars(eqx.Module):
    """Factors that turn deviations into error bars with a stated coverage.

    `calibrate_error_bars` and `calibrate_learner_bars` create them. Called with deviations and a
    coverage, it returns error bars.

    Attributes:
        factors: The quantiles of error over deviation at the shares 1/1000, 2/1000, ..., 1;
            infinite where the calibration had too few points.
        conditions: The precision and platform of the calibration's answers.
    """

    factors: Float[Array, " levels"]
    conditions: str = eqx.field(static=True, default="")

    def __call__(
        self, deviation: Float[ArrayLike, "*points"], coverage: float = 0.9
    ) -> Float[Array, "*points"]:
        """Return error bars: 0 for exact answers, infinite where the deviation is infinite.

        Raises:
            ValueError: The coverage is outside (0, 1).
        """
        factor = self.factor(coverage)
        bars = jnp.where(deviation == 0, 0, deviation * factor)
        return jnp.where(jnp.isposinf(deviation), jnp.inf, bars)  # a factor may be 0

    def factor(self, coverage: float) -> Float[Array, ""]:
        """Return the factor for a coverage; infinite if the calibration had too few points."""
        if not 0 < coverage < 1:
            raise ValueError(f"coverage must be a share between 0 and 1, not {coverage}")
        return self.factors[math.ceil(len(self.factors) * coverage - 1e-9) - 1]


def calibrate_learner_bars(
    learner: Learner,
    tuning: LearnerTuning | None = LearnerTuning(),  # noqa: B008, it is frozen
    *,
    folds: int = 10,
) -> ErrorBars:
    """Return the error bars of a learner, cross-validated on its own window.

    A kernel fits the pairs that it was tuned on better than other pairs. So the window is split
    into random folds, and each fold is predicted by a learner that has only the other folds, with
    its kernel tuned on them. The bars hold for data points like those in the window, and for the
    learner alone (an infinite kappa); a mixture with a code needs `calibrate_error_bars`. For
    predictions decoded with their group's answers, bars of 90 % covered 86 to 96 %
    (docs/functions.md).

    Args:
        learner: A learner with pairs in its window.
        tuning: The tuning of the learner's kernel (`fit_learner`); None if its kernel was not tuned
            on these pairs. Only the learner's own shape of kernel is tuned.
        folds: The number of folds, 2 or more.

    Raises:
        ValueError: The learner's window is empty, there are fewer than two folds, or too few pairs
            to tune a kernel on.
    """
    pairs = np.flatnonzero(np.asarray(learner.filled))
    if len(pairs) == 0:
        raise ValueError("this learner's window is empty: there are no errors to calibrate on")
    folds = min(check_count("folds", folds, 2), len(pairs))
    own, window = learner.kernel, jax.device_get(learner.window)
    width = float(np.sqrt(max(len(own.centre), 1)))
    start = Kernel(own.shape, centre=own.centre, unit=own.unit, widths=[width])
    ratios, random = np.full(learner.capacity, np.nan), np.random.default_rng(0)
    for held in np.array_split(random.permutation(pairs), folds):
        counts = window.counts.copy()
        counts[held] = 0
        known = eqx.tree_at(lambda one: one.window.counts, learner, counts)
        if tuning is None:
            known = known.refactorized()
        else:
            alike = dataclasses.replace(tuning, shapes=(own.shape,))
            known = tune_learner(eqx.tree_at(lambda one: one.kernel, known, start), alike)
        mean, covariance = known.window_posterior(window.inputs[held][:, None])
        deviation = known.deviation_of(np.maximum(covariance[:, 0, 0], 0) + known.kernel.noise)
        # Bars are for single answers. The window keeps only the mean of several answers to one
        # input, so their distances from it are drawn from a normal distribution.
        noise = random.normal(size=(len(held), mean.shape[2])) * window.scatter[held][:, None]
        error = root_mean_square(mean[:, 0] - window.residuals[held] - noise, axis=1)
        ratios[held] = np.where(np.isfinite(deviation), error / deviation, np.nan)
    return error_bars_from_ratios(ratios)


def error_bars_from_ratios(
    ratios: Float[np.ndarray, "..."],
    conditions: str = "",
) -> ErrorBars:
    """Return the error bars for ratios of error to deviation; NaN ratios do not count.

    Raises:
        ValueError: No ratio is a number.
    """
    ratios = ratios[~np.isnan(ratios)]
    if ratios.size == 0:
        raise ValueError(
            "all predictions are exact or none is known: there is nothing to calibrate"
        )
    shares = np.arange(1, _LEVELS + 1) / _LEVELS  # a fixed number: programs are compiled once
    factors: Any = to_device(conformal_quantile(ratios, shares))
    return ErrorBars(factors=factors, conditions=conditions)


@dataclasses.dataclass(frozen=True)
class ErrorScale:
    """Error bars from features: the exponential of a linear function of the features.

    Attributes:
        weights: The weights of the features (`decoding_features`).
    """

    weights: Float[np.ndarray, " features"]

    def of_features(self, features: Float[np.ndarray, "*points features"]) -> Any:
        """Return the error bars."""
        with np.errstate(over="ignore"):
            return np.exp(features @ self.weights)


def fit_error_scale(
    features: Float[np.ndarray, "samples looks features"],
    error: Float[np.ndarray, "samples looks"],
    usable: Bool[np.ndarray, "samples looks"],
    accuracy: Accuracy,
    points: int,
) -> ErrorScale:
    """Fit error bars of the promised coverage to observed errors.

    A regression on the logarithm of the error gives their shape, and a factor gives the coverage of
    the samples that are given out (`bar_factor`). A sample is given out at the first look at which
    its bar is within the tolerance.

    Args:
        features: The features of each sample at each look; features that must not count are 0.
        error: The error of each sample at each look.
        usable: Whether the features are informative.
        accuracy: The tolerance and the coverage.
        points: The number of different data points among the samples.
    """
    assert accuracy.tolerance is not None
    fitted = np.flatnonzero(usable)[::2]  # the others calibrate the factor
    flat, wanted = (x.reshape(usable.size, -1)[fitted].astype(float) for x in (features, error))
    weights = np.linalg.lstsq(flat, np.log(wanted[:, 0] + 1e-12), rcond=None)[0]
    bars = np.where(usable, ErrorScale(weights).of_features(features.astype(np.float64)), np.inf)
    judged = bars.copy()
    judged.flat[fitted] = np.inf
    judged, missed = (x[np.isfinite(judged).any(axis=1)] for x in (judged, error))
    factor = bar_factor(judged, missed, accuracy, points * len(judged) // len(bars))
    weights[0] += np.log(factor)  # nothing is within the tolerance of infinity
    return ErrorScale(weights.astype(np.float32))
