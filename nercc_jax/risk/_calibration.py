"""Three pure functions that turn observed errors into calibrated probabilities.

`regression` ranks labels by their features, `correction` makes the probabilities right bin by bin,
and `risks` bounds the risk of giving out all labels up to each probability. The sources are in
`_error_probability.py`.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

# A feature that hardly varies tells nothing. Of the weights: steps, how long one may be (in any of
# them), and how short the last one; how often a step that leads up is halved.
_FLAT, _STEPS, _LONGEST, _SHORTEST, _HALVINGS = 1e-6, 100, 3.0, 1e-7, 20


def logistic_regression(
    features: Float[np.ndarray, "samples features"],
    wrong: Bool[np.ndarray, " samples"],
    falling: Sequence[int] = (),
    count: float = 1.0,
) -> Float[np.ndarray, " features"]:
    """Return the most likely weights of a logistic regression with a ridge.

    `expit(features @ weights)` is the probability of being wrong. Features are standardised and
    have a unit ridge, but for the first, which is constant. Half a wrong and half a right sample
    are added at the mean, so that there is a result where none was wrong, or all were.

    The method is a projected Newton's (Bertsekas 1982, "Projected Newton methods for optimization
    problems with simple constraints"). 20,000 samples of 5 features take 10 ms of one core; SciPy's
    L-BFGS-B finds the same in 80 ms of two, since its BLAS wakes threads at every step.

    Args:
        features: One row for each sample; the first feature is the constant.
        wrong: Whether each sample was wrong.
        falling: Features whose weights must be negative or zero.
        count: The weight of a sample, below 1 where samples depend on each other.

    Returns:
        The weights; all 0 without samples.
    """
    width = features.shape[1]
    if len(features) == 0:
        return np.zeros(width)
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > _FLAT, scale, 1)
    mean[0], scale[0] = 0, 1
    z = np.concatenate([(features - mean) / scale, np.eye(1, width)])
    counts = np.append(np.full(len(wrong), count), 1.0)
    weights = _minimum(z, np.append(wrong, 0.5), counts, np.isin(np.arange(width), falling)) / scale
    weights[0] -= weights[1:] @ mean[1:]
    return weights


def _minimum(
    z: Float[np.ndarray, "samples features"],
    target: Float[np.ndarray, " samples"],
    counts: Float[np.ndarray, " samples"],
    falling: Bool[np.ndarray, " features"],
) -> Float[np.ndarray, " features"]:
    from scipy.special import expit  # late: a fifth of a worker's import time

    ridge = np.append(0.0, np.ones(z.shape[1] - 1))

    def loss(weights: np.ndarray) -> float:
        logit = z @ weights
        likely = np.sum(counts * (np.logaddexp(0, logit) - target * logit))
        return float(likely + ridge @ weights**2 / 2)

    weights = np.zeros(z.shape[1])
    least = loss(weights)
    for _ in range(_STEPS):
        probability = expit(z @ weights)
        slope = z.T @ (counts * (probability - target)) + ridge * weights
        spread = counts * probability * (1 - probability)
        curvature = z.T @ (z * spread[:, None]) + np.diag(ridge)
        # What stands at zero and would rise stays there.
        free = ~(falling & (weights == 0) & (slope < 0))
        step = np.zeros_like(weights)
        step[free] = np.linalg.solve(curvature[np.ix_(free, free)], -slope[free])
        step *= _LONGEST / max(np.max(np.abs(step)), _LONGEST)
        for _ in range(_HALVINGS):
            moved = weights + step
            moved = np.where(falling, np.minimum(moved, 0), moved)
            found = loss(moved)
            if found <= least:
                break
            step /= 2
        else:
            break  # rounding is all that is left
        length, weights, least = np.max(np.abs(moved - weights)), moved, found
        if length < _SHORTEST:
            break
    return weights


# The constants were measured on a synthetic classifier, NeRCC (4, 7) with Chebyshev and repeated
# points, 35 straggler sets, calibrated on 100 or 400 groups (six draws) and judged on 800 others.
# The figures are means over these of "miscalibration", the worst of five bins' |log(observed /
# promised)|; of "use", the disagreement over what was allowed (0.5 and 2 %); or of what is named.

_FOLDS = 5  # of the cross-fitting. Miscalibration with 2, 5, 10: 0.057, 0.051, 0.054.
# Least scale of the regression's log-odds, so that some order is left. Use with 0.0001, 0.1, 0.3:
# 0.27, 0.43, 0.44.
_LEAST_SCALE = 0.1
_FAR = 1000.0  # log-odds within which a root is looked for
# Most bins of the correction, and the least number of errors expected in each. Miscalibration with
# 8, 32, 128 bins: 0.052, 0.051, 0.051; with 3, 10, 30 errors: 0.053, 0.051, 0.048.
_BINS, _EXPECTED = 32, 10
_SUREST = 1 - 1e-6  # the largest probability of an error
# Share of the log-odds' slope that is left within a bin: without any, probabilities tie, and a
# limit takes all of a bin or none. Use with 0, 0.05, 0.2: 0.27, 0.43, 0.44.
_SLOPE = 0.05
_DIGITS = 3  # to which log-odds are rounded. Miscalibration with 1, 3, 6: 0.046, 0.051, 0.051.
_LEVELS = 512  # places of a limit. Use with 64, 512, 4,096: 0.36, 0.43, 0.45.
_ROUNDING = 1e-5  # by which float32 and another program may change a probability
_LEAST = 1e-30  # least divisor
# Standard errors that are added to a counted risk. With 0, 1, 2, 3 the allowance was exceeded in
# 12, 4, 0, 0 % of the cases, and for an allowance of 0.5 % 58, 59, 59, 60 % went to the model.
_ERRORS = 2.0


def regression(
    features: Float[np.ndarray, "samples features"],
    wrong: Bool[np.ndarray, " samples"],
    group: Int[np.ndarray, " samples"],
    count: float,
    falling: Sequence[int],
) -> tuple[Float[np.ndarray, " features"], Float[np.ndarray, " samples"]]:
    """Return the regression's weights, and each sample's log-odds from the other groups.

    A regression on few samples is too sure of itself on others. The excess is measured where the
    regression is made without a part of the groups, and the log-odds are scaled by it (van
    Houwelingen and Le Cessie 1990, "Predictive value of statistical models").
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
    """Return knots and shifts that make log-odds right in each bin.

    The same number of wrong samples is expected in each bin; each sample counts as `count`. Bins
    with fewer errors than a bin below share their mean (isotonic regression), but for a slight
    slope that keeps the order. There are always `_BINS` knots; the last one is repeated.
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
    probability: Float[np.ndarray, "sets groups num_data"],
    sure: Bool[np.ndarray, "sets groups num_data"],
    wrong: Bool[np.ndarray, "sets groups num_data"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return levels of probability, a bound of the risk up to each, and the share above each."""
    order = np.sort(probability, axis=None)
    known = int(np.sum(sure))
    # Beyond the sure ones, every so many a level, above all that are the same but for rounding.
    places = np.linspace(known, probability.size - 1, _LEVELS).round().astype(int)
    above = np.minimum(order[places[places < probability.size]] * (1 + _ROUNDING), _SUREST)
    levels = np.concatenate([[0.0], above])
    counts = np.searchsorted(order, levels, side="right")
    return (
        levels,
        _bounds(probability, wrong, levels, counts > known),
        1 - counts / probability.size,
    )


def _bounds(
    probability: Float[np.ndarray, "sets groups num_data"],
    wrong: Bool[np.ndarray, "sets groups num_data"],
    levels: Float[np.ndarray, " levels"],
    guesses: Bool[np.ndarray, " levels"],
) -> Float[np.ndarray, " levels"]:
    """Return an upper bound of the share that is wrong and not above each level.

    Groups are independent of each other, and so are straggler sets; what is counted of one group
    under all sets, and of one set in all groups, is not. At the levels `guesses`, which hold more
    than exact answers, one more wrong label is counted than there was.
    """
    sets, groups, _ = wrong.shape
    of_set, of_group, _ = np.nonzero(wrong)
    level = np.searchsorted(levels, probability[wrong])
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
