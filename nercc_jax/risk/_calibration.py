"""From what was seen of decoded labels to doubts that are right: three pure functions.

`regression` ranks labels by what is seen of them, `correction` makes as many wrong as are said to
be, and `risks` says below which doubt answers may be given. See `_doubt.py` for the sources.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from ._logistic import logistic_regression

# What the constants do was measured on a synthetic classifier, NeRCC (4, 7) with Chebyshev and with
# repeated points, 35 straggler sets: calibrated on 100 or 400 groups (six draws), judged on 800
# others. Figures are the mean over these of the worst of five bins, |log(observed / promised)|; of
# the disagreement that was left of what was asked for (0.5 and 2 %); and of the share sent again.

# Parts of the groups, for what they tell of each other. With 2, 5, 10: 0.057, 0.051, 0.054.
_FOLDS = 5
# What is left of the regression's log-odds, so that some order is. Less loses half of what may be
# answered: with 0.0001, 0.1, 0.3 of what was asked for 0.27, 0.43, 0.44 was used.
_LEAST_SCALE = 0.1
_FAR = 1000.0  # in log-odds: where a root is looked for
# Bins of the correction, at most, and wrong labels that are expected in each, at least. It hardly
# matters: with 8, 32, 128 bins 0.052, 0.051, 0.051; with 3, 10, 30 expected 0.053, 0.051, 0.048.
_BINS, _EXPECTED = 32, 10
_SUREST = 1 - 1e-6  # that something is wrong
# Of the regression's log-odds, left where bins are alike: without any, doubts tie, and a limit
# takes all of a bin or none. With 0, 0.05, 0.2 of what was asked for 0.27, 0.43, 0.44 was used.
_SLOPE = 0.05
_DIGITS = 3  # of log-odds that are alike. With 1, 3, 6: 0.046, 0.051, 0.051
# Where a limit may lie. With 64, 512, 4,096 of what was asked for 0.36, 0.43, 0.45 was used.
_LEVELS = 512
_ROUNDING = 1e-5  # of doubts, which float32 and another program round otherwise
_LEAST = 1e-30  # of what is divided by
# Standard errors by which a risk may be more than what was counted. With 0, 1, 2, 3 more than was
# asked for disagreed in 12, 4, 0, 0 % of the cases, and 58, 59, 59, 60 % were sent again for 0.5 %.
_ERRORS = 2.0


def regression(
    features: Float[np.ndarray, "samples features"],
    wrong: Bool[np.ndarray, " samples"],
    group: Int[np.ndarray, " samples"],
    count: float,
    falling: Sequence[int],
) -> tuple[Float[np.ndarray, " features"], Float[np.ndarray, " samples"]]:
    """The regression's weights, and each sample's log-odds by what other groups tell.

    A regression on few is too sure of itself on others. How much so is seen where it is made
    without a part of the groups, and the log-odds are scaled by that (van Houwelingen and Le Cessie
    1990, "Predictive value of statistical models").
    """
    weights = logistic_regression(features, wrong, falling, count)
    logit = features @ weights
    for fold in range(_FOLDS):
        part = group % _FOLDS == fold
        if not part.all():
            others = logistic_regression(features[~part], wrong[~part], falling, count)
            logit[part] = features[part] @ others
    shift, scale = logistic_regression(np.stack([np.ones_like(logit), logit], axis=-1), wrong)
    if len(wrong) and scale < _LEAST_SCALE:
        # It tells hardly anything: some order is left, and the mean.
        scale = _LEAST_SCALE
        mean = (np.sum(wrong) + 0.5) / (len(wrong) + 1)
        from scipy.optimize import root_scalar  # late: a quarter of the package's import time
        from scipy.special import expit

        found = root_scalar(
            lambda shift: np.mean(expit(scale * logit + shift)) - mean, bracket=(-_FAR, _FAR)
        )
        shift = found.root
    return scale * weights + shift * np.eye(1, len(weights))[0], scale * logit + shift


def correction(
    logit: Float[np.ndarray, " samples"], wrong: Bool[np.ndarray, " samples"], count: float
) -> tuple[Float[np.ndarray, " bins"], Float[np.ndarray, " bins"]]:
    """What to add to log-odds, where: so that as many are wrong as are said to be, bin by bin.

    In each bin of the log-odds as many wrong ones are expected; each sample counts as `count`. Bins
    in which fewer are wrong than in one below are given the share of both, but for a slope that
    hardly matters: the order stays. There are always `_BINS` places, the last one several times.
    """
    from scipy.optimize import isotonic_regression  # late, as above
    from scipy.special import expit
    from scipy.special import logit as logit_of

    # Those that are alike are in one bin, so that knots are never too close together.
    logit = np.round(logit, _DIGITS)
    order = np.argsort(logit, kind="stable")
    logit, wrong = logit[order], wrong[order]
    expected = expit(logit)
    total = float(np.sum(expected))
    number = int(np.clip(count * total / _EXPECTED, 1, _BINS))
    place = np.minimum(np.cumsum(expected) / max(total, _LEAST) * number, number - 1).astype(int)
    place = place[np.searchsorted(logit, logit)]
    counts = np.bincount(place, minlength=number)
    sums = [np.bincount(place, each, minlength=number) for each in (expected, wrong)]
    counts, expected, seen = (each[counts > 0] for each in (counts, *sums))
    if counts.size == 0:
        return np.zeros(_BINS), np.zeros(_BINS)
    # One more is expected, and seen: it weighs where there are hardly any.
    more = (count * seen + 1) / (count * expected + 1)
    share = np.minimum(more * expected / counts, _SUREST)
    share = isotonic_regression(share, weights=counts).x
    knots = logit_of(np.clip(expected / counts, _LEAST, _SUREST))
    shifts = (1 - _SLOPE) * (logit_of(share) - knots)
    fill = _BINS - len(knots)
    return np.append(knots, knots[-1] + 1 + np.arange(fill)), np.pad(shifts, (0, fill), "edge")


def risks(
    doubt: Float[np.ndarray, "sets groups num_data"],
    sure: Bool[np.ndarray, "sets groups num_data"],
    wrong: Bool[np.ndarray, "sets groups num_data"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levels of doubt, an upper bound of the share that is wrong below each, and what is above."""
    order = np.sort(doubt, axis=None)
    known = int(np.sum(sure))
    # Beyond the sure ones, every so many a level, above all that are the same but for rounding.
    places = np.linspace(known, doubt.size - 1, _LEVELS).round().astype(int)
    above = np.minimum(order[places[places < doubt.size]] * (1 + _ROUNDING), _SUREST)
    levels = np.concatenate([[0.0], above])
    counts = np.searchsorted(order, levels, side="right")
    return levels, _bounds(doubt, wrong, levels, counts > known), 1 - counts / doubt.size


def _bounds(
    doubt: Float[np.ndarray, "sets groups num_data"],
    wrong: Bool[np.ndarray, "sets groups num_data"],
    levels: Float[np.ndarray, " levels"],
    guesses: Bool[np.ndarray, " levels"],
) -> Float[np.ndarray, " levels"]:
    """An upper bound of the share that is wrong and has no more doubt than each level.

    Groups are independent of each other, and straggler sets are; what is counted of one group under
    all sets, and of one set in all groups, is not. `guesses` are levels with more than what is sure
    below them: of those, one more is counted than was wrong.
    """
    sets, groups, _ = wrong.shape
    of_set, of_group, _ = np.nonzero(wrong)
    level = np.searchsorted(levels, doubt[wrong])
    error = np.zeros(len(levels))
    for owner, number in ((of_set, sets), (of_group, groups)):
        counts = np.zeros((len(levels) + 1, number))
        np.add.at(counts, (level, owner), number / wrong.size)
        means = np.cumsum(counts[:-1], axis=0)
        error += np.var(means, axis=1) / number
    points = wrong.size / sets
    total = np.cumsum(np.bincount(level, minlength=len(levels) + 1))[:-1] / sets
    counted = (total + guesses) / (points + guesses)
    return np.minimum(np.maximum.accumulate(counted + _ERRORS * np.sqrt(error)), 1)
