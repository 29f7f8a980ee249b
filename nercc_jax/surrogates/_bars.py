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
from jaxtyping import Array, Float

from ..codes import check_count
from ..inference import AbstractCalibrated, Conditions
from ._fit_learner import LearnerTuning, find_kernel, leave_one_out
from ._kernels import Kernel, wide_kernel
from ._learner import Learner

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
    folds: int = 5,
) -> ErrorBars:
    """The error bars of a learner, by what it makes of each pair of its window without that pair.

    A kernel fits the pairs that it was tuned on better than others. So the window is cut into
    `folds`, at random, and the errors in each are those of a kernel that is tuned on the others
    alone, as `tuning` says: give what `fit_learner` was given, or None for a kernel that was not
    tuned on these pairs. They are compared with the deviations that the learner itself has there,
    as new ones will be. Only the learner's own shape of kernel is tuned, so many times.

    Where a function is known almost to rounding, kernels of the folds and the learner's differ too
    much, and the bars may be far off: there `calibrate_bars` serves.

    They hold for data points like those, and for the learner alone (an infinite kappa): a mixture
    with a code wants `calibrate_bars`. Raises: ValueError for a learner that knows nothing, fewer
    than two folds, and too few pairs to tune a kernel on.
    """
    pairs = np.flatnonzero(np.asarray(learner.filled))
    if len(pairs) == 0:
        raise ValueError("this learner knows nothing: there are no errors to go by")
    errors, deviations = _left_out(learner, learner.kernel)
    if tuning is None:
        return bars_from(np.asarray(errors / deviations)[pairs])
    folds = min(check_count("folds", folds, 2), len(pairs))
    own = learner.kernel
    tuning = dataclasses.replace(tuning, shapes=(own.shape,))
    start = wide_kernel(own.shape, own.centre, own.unit)
    honest = np.full(learner.capacity, np.nan)
    for held in np.array_split(np.random.default_rng(0).permutation(pairs), folds):
        kernel, _ = find_kernel(learner, start, np.setdiff1d(pairs, held), tuning)
        honest[held] = np.asarray(_left_out(learner, kernel)[0])[held]
    return bars_from(honest / np.asarray(deviations))


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


@eqx.filter_jit
def _left_out(
    learner: Learner, kernel: Kernel
) -> tuple[Float[Array, " capacity"], Float[Array, " capacity"]]:
    """Errors and deviations of the window's pairs, each left out, with this kernel."""
    out = leave_one_out(kernel, learner.inputs, learner.residuals, learner.filled)
    return jnp.sqrt(jnp.mean(out.errors**2, axis=1)), learner.deviation_of(out.variance)
