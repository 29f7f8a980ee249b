"""The probability that a predicted label differs from the model's own.

A decoded prediction has a standard deviation (the code's or the surrogate's) and a margin, by which
its largest output leads the second. Their ratio ranks predictions by the certainty of their labels.
The probability for a given ratio depends on the model, so it is measured on unlabelled data that
are coded under straggler sets: a logistic regression gives the probability (Platt 1999,
"Probabilistic outputs for support vector machines"), and isotonic regression on its bins corrects
deviations from that form (Zadrozny and Elkan 2002, "Transforming classifier scores into accurate
multiclass probability estimates"). The largest probability at which answers may be given out is
chosen on the same data, by an upper bound of the share of wrong labels (`upper_bound`).

The same calibration is used for predictions of schemes, a server's decoded queries, and a
surrogate's answers; only their features differ (`label_features`, `decoding_features`).
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..arrays import namespace
from ..codes.trees import Form, to_device
from .accuracy import risk_cap, upper_bound
from .features import label_features


class ErrorProbability(eqx.Module):
    """A calibrated probability that a label differs from the model's own.

    `calibrate_error_probability` creates one.

    Attributes:
        weights: The logistic regression's weights.
        knots: The log-odds of the correction's knots; it is linear between them.
        shifts: The correction that is added to the log-odds at each knot.
        levels: Probabilities in increasing order, from 0.
        bounds: For each level, an upper confidence bound of the share of wrong labels among the
            predictions up to it, not counting exact ones.
        shares: For each level, the share of data points above it, which the model must answer.
        form: The structure of the outputs; None if they are vectors.
        conditions: The precision and platform of the calibration's answers. `coded_inference` and
            `pool_inference` warn (`CalibrationWarning`) under other conditions.
    """

    weights: Float[Array | np.ndarray, " features"]
    knots: Float[Array | np.ndarray, " bins"]
    shifts: Float[Array | np.ndarray, " bins"]
    levels: Float[Array | np.ndarray, " levels"]
    bounds: Float[Array | np.ndarray, " levels"]
    shares: Float[Array | np.ndarray, " levels"]
    form: Form | None = eqx.field(static=True, default=None)
    conditions: str = eqx.field(static=True, default="")

    def __call__(
        self,
        predictions: Float[Any, "*points m"],
        deviation: Float[Any, "*points"],
        cheap: Float[Any, "*points m"] | None = None,
    ) -> Float[Any, "*points"]:
        """Return the probability that each label differs from the model's own.

        Args:
            predictions: Predicted outputs as vectors. If the outputs have several labels (`form`),
                the probability is that any of them differs.
            deviation: Standard deviations of the predictions.
            cheap: The surrogate's outputs, if the calibration had a surrogate.

        Returns:
            Probabilities: 0 where the deviation is 0 (a worker's answer to the data point itself),
            1 where a prediction is not finite.

        Raises:
            ValueError: `cheap` is missing, or was not part of the calibration.
        """
        xp = namespace(predictions, deviation)
        features = label_features(predictions, deviation, cheap, self.form)
        if features.shape[-1] != self.weights.shape[0]:
            wanted = "with" if cheap is None else "without"
            raise ValueError(f"the error probability was calibrated {wanted} a surrogate's outputs")
        probability = xp.where(deviation == 0, 0, self.of_features(features))
        return xp.where(xp.isfinite(predictions).all(axis=-1), probability, 1)

    def of_features(self, features: Float[Any, "*points features"]) -> Float[Any, "*points"]:
        """Return the probability for features of the kind used for calibration (`_features`)."""
        xp = namespace(features)
        weights, knots, shifts = (
            xp.asarray(each, features.dtype) for each in (self.weights, self.knots, self.shifts)
        )
        logit = features @ weights
        logit = logit + xp.interp(logit, knots, shifts)
        return xp.exp(-xp.logaddexp(0, -logit))

    def limit(self, max_disagreement: float) -> float:
        """Return the largest probability at which a prediction may be given out.

        Args:
            max_disagreement: The largest share of the labels given out that may differ from the
                model's, not counting exact ones (Geifman and El-Yaniv 2017, "Selective
                classification for deep neural networks").

        Returns:
            The limit; 0 if only the model's own answers may be given out. It is at most five times
            `max_disagreement`, and at most one half unless that is larger. The share of wrong
            labels then holds in the mean over data and stragglers like those of the calibration,
            for about 97 % of calibrations.

        Raises:
            ValueError: `max_disagreement` is outside [0, 1].
        """
        if not 0 <= max_disagreement <= 1:
            raise ValueError(f"max_disagreement must be in [0, 1], not {max_disagreement}")
        kept = np.flatnonzero(np.asarray(self.bounds) <= max_disagreement)
        return min(float(np.asarray(self.levels)[kept[-1]]), risk_cap(max_disagreement))

    def share(self, limit: float) -> float:
        """Return the share of the calibration's data points above a limit.

        Raises:
            ValueError: The limit is negative.
        """
        if not limit >= 0:
            raise ValueError(f"a limit of error probabilities must be 0 or positive, not {limit}")
        place = np.searchsorted(np.asarray(self.levels), limit, side="right") - 1
        return float(np.asarray(self.shares)[place])


def logistic_regression(
    features: Float[np.ndarray, "samples features"],
    wrong: Bool[np.ndarray, " samples"],
    falling: Sequence[int] = (),
    count: float = 1.0,
) -> Float[np.ndarray, " features"]:
    """Return the weights of a logistic regression with a ridge.

    `expit(features @ weights)` is the probability of being wrong. Features are standardised and
    have a unit ridge, except the first, which is constant. Half a wrong and half a right sample are
    added at the mean, so that there is a result if no sample was wrong, or all were.

    The method is projected Newton (Bertsekas 1982, "Projected Newton methods for optimization
    problems with simple constraints"). 20,000 samples of 5 features take 10 ms of one core; SciPy's
    L-BFGS-B finds the same in 80 ms of two cores, since its BLAS wakes threads at every step.

    Args:
        features: One row for each sample; the first feature is the constant.
        wrong: Whether each sample was wrong.
        falling: Features whose weights must be negative or zero.
        count: The weight of a sample, below 1 where samples depend on each other.

    Returns:
        The weights; all 0 without samples.
    """
    from scipy.special import expit  # late: a fifth of a worker's import time

    width = features.shape[1]
    if len(features) == 0:
        return np.zeros(width)
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 1e-6, scale, 1)  # a feature that hardly varies is not scaled up
    mean[0], scale[0] = 0, 1
    z = np.concatenate([(features - mean) / scale, np.eye(1, width)])
    counts, target = np.append(np.full(len(wrong), count), 1.0), np.append(wrong, 0.5)
    bounded = np.isin(np.arange(width), falling)
    ridge = np.append(0.0, np.ones(width - 1))

    def loss(weights: np.ndarray) -> float:
        logit = z @ weights
        likely = np.sum(counts * (np.logaddexp(0, logit) - target * logit))
        return float(likely + ridge @ weights**2 / 2)

    weights = np.zeros(width)
    least, longest = loss(weights), 3.0
    for _ in range(100):
        probability = expit(z @ weights)
        slope = z.T @ (counts * (probability - target)) + ridge * weights
        spread = counts * probability * (1 - probability)
        curvature = z.T @ (z * spread[:, None]) + np.diag(ridge)
        # Bounded weights that are zero and would become positive stay zero.
        free = ~(bounded & (weights == 0) & (slope < 0))
        step = np.zeros_like(weights)
        step[free] = np.linalg.solve(curvature[np.ix_(free, free)], -slope[free])
        step *= longest / max(np.max(np.abs(step)), longest)
        for _ in range(20):
            moved = weights + step
            moved = np.where(bounded, np.minimum(moved, 0), moved)
            found = loss(moved)
            if found <= least:
                break
            step /= 2
        else:
            break  # only rounding errors are left
        length, weights, least = np.max(np.abs(moved - weights)), moved, found
        if length < 1e-7:
            break
    weights /= scale
    weights[0] -= weights[1:] @ mean[1:]
    return weights


def fit_error_probability(
    features: Float[np.ndarray, "samples looks features"],
    wrong: Bool[np.ndarray, "samples looks"],
    *,
    usable: Bool[np.ndarray, "samples looks"] | None = None,
    sure: Bool[np.ndarray, " samples"] | None = None,
    owners: Sequence[Int[np.ndarray, " samples"]] = (),
    points: int | None = None,
    falling: Sequence[int] = (1, 2),
    failure: float | None = None,
    form: Form | None = None,
    conditions: str = "",
) -> ErrorProbability:
    """Fit an error probability to observed errors.

    A logistic regression ranks labels by their features, a correction calibrates its probabilities
    bin by bin, and the share of wrong labels up to each probability is bounded from above. A sample
    is given out at the first look at which its probability is small enough. It counts as wrong from
    the least probability that it has at any look with a wrong label. This bounds the share of wrong
    labels, and grows with the limit.

    Args:
        features: The features of each sample at each look; the first is constant.
        wrong: Whether the label of each sample at each look differs from the model's own.
        usable: Whether the features are informative; otherwise the probability is 1.
        sure: Whether a prediction is the model's own answer, whatever its features.
        owners: For each cause of common errors, the owner of each sample: its group, and its
            straggler set. Different owners are independent. The first array splits the samples for
            cross-fitting.
        points: The number of different data points, if samples repeat them under several sets.
        falling: The features that must not raise the probability.
        failure: As for `upper_bound`. With 0, 1, 2, 3 standard errors the allowance was exceeded in
            12, 4, 0, 0 % of the cases below, and with 0.5 % allowed 58, 59, 59, 60 % went to the
            model.
        form: The structure of the outputs, if they may not be vectors.
        conditions: The precision and platform of the answers.
    """
    usable = np.ones(wrong.shape, bool) if usable is None else usable
    sure = np.zeros(len(wrong), bool) if sure is None else sure
    points = len(wrong) if points is None else points
    used = usable & ~sure[:, None]
    thin = slice(None, None, max(int(used.sum()) // 50_000, 1))
    flat, missed = features[used][thin].astype(np.float64), wrong[used][thin]
    # A data point is similar under all sets and looks, so together these count once.
    count = min(points / max(len(flat), 1), 1.0)
    owner = owners[0] if owners else np.arange(len(wrong))
    owner = np.broadcast_to(owner[:, None], wrong.shape)[used][thin]

    # A regression on few samples is too confident on others. This is measured by cross-fitting, in
    # which each part of the owners is predicted without it, and the log-odds are scaled accordingly
    # (van Houwelingen and Le Cessie 1990, "Predictive value of statistical models").
    weights = logistic_regression(flat, missed, falling, count)
    logit, folds = flat @ weights, 5  # miscalibration with 2, 5, 10: 0.057, 0.051, 0.054
    for fold in range(folds):
        part = owner % folds == fold
        if not part.all():
            others = logistic_regression(flat[~part], missed[~part], falling, count)
            logit[part] = flat[part] @ others
    shift, scale = logistic_regression(np.stack([np.ones_like(logit), logit], axis=-1), missed)
    # An uninformative regression keeps some order. Use with 0.0001, 0.1, 0.3: .27, .43, .44.
    scale = max(scale, 0.1)
    weights = scale * weights + shift * np.eye(1, len(weights))[0]
    knots, shifts = _correction(scale * logit + shift, missed, count)

    logit = features @ weights
    logit = logit + np.interp(logit, knots, shifts)
    probability = np.where(usable, np.exp(-np.logaddexp(0, -logit)), 1.0)
    probability[sure] = 0
    wrong_from = np.min(np.where(wrong, probability, np.inf), axis=1)
    curve = _curve(probability.min(axis=1), wrong_from, int(sure.sum()), owners, points, failure)
    names = ("weights", "knots", "shifts", "levels", "bounds", "shares")
    parts = zip(names, (weights, knots, shifts, *curve), strict=True)
    arrays: Any = to_device({name: np.asarray(each, float) for name, each in parts})
    vectors = form is None or form.is_vector
    return ErrorProbability(**arrays, form=None if vectors else form, conditions=conditions)


# The constants were measured on a synthetic classifier, NeRCC (4, 7) with Chebyshev and repeated
# points, 35 straggler sets, calibrated on 100 or 400 groups (six draws) and tested on 800 others.
# The figures are means over these of "miscalibration", the worst of five bins' |log(observed /
# promised)|; of "use", the ratio of the disagreement to the allowed one (0.5 and 2 %); or as named.
SUREST = 1 - 1e-6  # the largest probability of an error


def _correction(
    logit: Float[np.ndarray, " samples"], wrong: Bool[np.ndarray, " samples"], count: float
) -> tuple[Float[np.ndarray, " bins"], Float[np.ndarray, " bins"]]:
    """Return knots and shifts that calibrate log-odds in each bin.

    The same number of wrong samples is expected in each bin; each sample counts as `count`. Bins
    with fewer errors than a bin below share their mean (isotonic regression), except for a slight
    slope that keeps the order. The number of knots is fixed; the last shift is repeated.
    """
    from scipy.optimize import isotonic_regression  # late: a quarter of the package's import time
    from scipy.special import expit
    from scipy.special import logit as logit_of

    # Miscalibration with 8, 32, 128 bins: 0.052, 0.051, 0.051; with 3, 10, 30 expected errors in
    # each: 0.053, 0.051, 0.048; with log-odds rounded to 1, 3, 6 digits: 0.046, 0.051, 0.051. Equal
    # log-odds share a bin, so that knots are never too close together.
    bins, errors, slope = 32, 10, 0.05  # use with slopes of 0, 0.05, 0.2: 0.27, 0.43, 0.44
    if len(logit) == 0:
        return np.zeros(bins), np.zeros(bins)
    logit = np.round(logit, 3)
    order = np.argsort(logit, kind="stable")
    logit, wrong, expected = logit[order], wrong[order], expit(logit[order])
    total = max(float(np.sum(expected)), 1e-30)
    number = int(np.clip(count * total / errors, 1, bins))
    place = np.minimum(np.cumsum(expected) / total * number, number - 1).astype(int)
    place = place[np.searchsorted(logit, logit)]
    sums = [np.bincount(place, each, minlength=number) for each in (None, expected, wrong)]
    counts, expected, seen = (each[sums[0] > 0] for each in sums)
    # One more error is expected, and seen, which matters in bins with hardly any errors.
    more = (count * seen + 1) / (count * expected + 1)
    share = np.minimum(more * expected / counts, SUREST)
    share = isotonic_regression(share, weights=counts).x
    knots = logit_of(np.clip(expected / counts, 1e-30, SUREST))
    shifts = (1 - slope) * (logit_of(share) - knots)
    fill = bins - len(knots)
    return np.append(knots, knots[-1] + 1 + np.arange(fill)), np.pad(shifts, (0, fill), "edge")


def _curve(
    answered: Float[np.ndarray, " samples"],
    wrong_from: Float[np.ndarray, " samples"],
    sure: int,
    owners: Sequence[Int[np.ndarray, " samples"]],
    points: int,
    failure: float | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return levels of probability, a bound of the share of wrong labels, and the share above each.

    Each data point counts once, under however many sets it was seen, and less if the share varies
    more between owners than it would for independent data points (Kish 1965, "Survey sampling": the
    design effect).
    """
    order, number = np.sort(answered), len(answered)
    # Beyond the exact ones, 512 levels at regular places, each slightly raised above values that
    # differ only by float32's rounding. Use with 64, 512, 4,096 levels: 0.36, 0.43, 0.45.
    places = np.linspace(sure, number - 1, 512).round().astype(int)
    above = np.minimum(order[places[places < number]] * (1 + 1e-5), SUREST)
    levels = np.concatenate([[0.0], above])
    counts = np.searchsorted(order, levels, side="right")
    given = np.where(counts > sure, counts - sure, 0) / number
    missed = np.flatnonzero(np.isfinite(wrong_from))
    level = np.searchsorted(levels, wrong_from[missed])
    total = np.cumsum(np.bincount(level, minlength=len(levels) + 1))[:-1] / number
    variance = np.zeros(len(levels))
    for owner in owners:
        of = int(owner.max()) + 1
        sums = np.zeros((len(levels) + 1, of))
        np.add.at(sums, (level, owner[missed]), of / number)
        variance += np.var(np.cumsum(sums[:-1], axis=0), axis=1) / of
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.nan_to_num(total / given)
        independent = np.nan_to_num(share * (1 - share) / (variance / given**2), posinf=np.inf)
    independent = np.where(variance > 0, np.minimum(independent, given * points), given * points)
    bounds = np.where(given > 0, upper_bound(share, independent, failure), 0)
    return levels, bounds, 1 - counts / number
