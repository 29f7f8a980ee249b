"""The probability that a predicted label differs from the model's own.

A decoded prediction has a standard deviation (the code's or the surrogate's) and a margin, by which
its largest output leads the second. Their ratio ranks predictions by how sure their label is. How
sure a ratio makes them depends on the model, so it is measured on unlabelled data that are coded
under straggler sets: a logistic regression gives the probability (Platt 1999, "Probabilistic
outputs for support vector machines"), and isotonic regression on its bins corrects what does not
have that form (Zadrozny and Elkan 2002, "Transforming classifier scores into accurate multiclass
probability estimates"). The largest probability that may be given out is chosen on the same data,
by an upper bound of the risk (Bates et al. 2021, arXiv 2101.02703).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray

from ..codes._trees import Form, to_device
from ..evaluation import Answers
from ..evaluation._criteria import agree_on_labels
from ..evaluation._objective import draw_sets
from ..inference.models import AbstractCalibrated, Conditions
from ..splines.arrays import namespace
from ..stragglers import AbstractStragglers
from ..surrogates import AbstractSurrogate
from ..surrogates.interface import AbstractGroupPrior
from ..surrogates.surrogate import decode_with_deviation
from ._straggler_risk import risk_cap

_LEAST = 1e-30  # least divisor, and least argument of a logarithm


class ErrorProbability(AbstractCalibrated):
    """A calibrated probability that a label differs from the model's own.

    `calibrate_error_probability` makes one.

    Attributes:
        weights: The logistic regression's weights.
        knots: Log-odds at which a correction is known; it is linear between them.
        shifts: The correction that is added to the log-odds at each knot.
        levels: Probabilities in increasing order, from 0 on.
        risks: For each level, an upper bound of the share of all data points that differ from the
            model's own label if those up to the level are given out, and all others are answered by
            the model. It counts one more wrong label than there were, and two standard errors.
        shares: For each level, the share of data points that the model must answer itself.
        form: The structure of the outputs, where they are not vectors.
        conditions: The conditions of the calibration's answers. `coded_inference` and
            `pool_inference` warn (`CalibrationWarning`) where others hold.
    """

    weights: Float[Array, " features"]
    knots: Float[Array, " bins"]
    shifts: Float[Array, " bins"]
    levels: Float[Array, " levels"]
    risks: Float[Array, " levels"]
    shares: Float[Array, " levels"]
    form: Form | None = eqx.field(static=True, default=None)
    conditions: Conditions = eqx.field(static=True, default=Conditions())

    def __call__(
        self,
        predictions: Float[Any, "*points m"],
        deviation: Float[Any, "*points"],
        cheap: Float[Any, "*points m"] | None = None,
    ) -> Float[Any, "*points"]:
        """Return the probability that each label differs from the model's own.

        Args:
            predictions: Predicted outputs as vectors. Where the outputs have several labels
                (`form`), the probability is that any of them differs.
            deviation: Standard deviations of the predictions.
            cheap: The surrogate's outputs, if the calibration had a surrogate.

        Returns:
            Probabilities: 0 where the deviation is 0 (a worker's answer to the data point itself),
            1 where a prediction is not finite.

        Raises:
            ValueError: `cheap` is missing, or was not part of the calibration.
        """
        xp = namespace(predictions, deviation)
        features = error_features(predictions, deviation, cheap, self.form)
        if features.shape[-1] != self.weights.shape[0]:
            wanted = "with" if cheap is None else "without"
            raise ValueError(f"the error probability was calibrated {wanted} a surrogate's outputs")
        probability = xp.where(deviation == 0, 0, self.of_features(features))
        return xp.where(xp.isfinite(predictions).all(axis=-1), probability, 1)

    def of_features(self, features: Float[Any, "*points features"]) -> Float[Any, "*points"]:
        """Return the probability for the regression's features (`error_features`)."""
        xp = namespace(features)
        weights, knots, shifts = (
            xp.asarray(each, features.dtype) for each in (self.weights, self.knots, self.shifts)
        )
        logit = features @ weights
        logit = logit + xp.interp(logit, knots, shifts)
        return xp.exp(-xp.logaddexp(0, -logit))

    def to_json(self) -> dict[str, list[float]]:
        """Return the numbers by name for JSON, which has no infinity; they are for vectors."""
        names = ("weights", "knots", "shifts", "levels", "risks", "shares")
        return {name: np.nan_to_num(getattr(self, name)).tolist() for name in names}

    @classmethod
    def from_json(
        cls, numbers: Mapping[str, list[float]], conditions: Conditions | None = None
    ) -> "ErrorProbability":
        """Return what `to_json` wrote; raise TypeError for other names."""
        arrays: Any = {name: jnp.asarray(each, float) for name, each in numbers.items()}
        return cls(**arrays, conditions=conditions or Conditions())

    def limit(self, max_disagreement: float) -> float:
        """Return the largest probability at which a prediction may be given out.

        Args:
            max_disagreement: The largest share of the labels given out that may differ from the
                model's, the exact ones not counted (Geifman and El-Yaniv 2017, "Selective
                classification for deep neural networks").

        Returns:
            The limit; 0 where only the model's own answers will do. No prediction may be wrong with
            more than five times the share that was asked for, nor with more than one half. The
            limit holds in the mean over data and stragglers like those of the calibration, for
            about 97 % of calibrations.

        Raises:
            ValueError: `max_disagreement` is outside [0, 1].
        """
        if not 0 <= max_disagreement <= 1:
            raise ValueError(f"max_disagreement must be in [0, 1], not {max_disagreement}")
        shares = np.asarray(self.shares)
        given = shares[:1] - shares  # the first level is that of exact answers
        kept = np.flatnonzero(np.asarray(self.risks) <= max_disagreement * given)
        if not kept.size:
            return 0.0
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


def error_probability_from_answers(
    own: Answers,
    stragglers: Mapping[str, AbstractStragglers],
    key: PRNGKeyArray,
    num_sets: int,
    surrogate: AbstractSurrogate | None = None,
    prior: AbstractGroupPrior | None = None,
) -> ErrorProbability:
    """Calibrate an error probability on recorded answers.

    Args:
        own: Recorded answers of the code.
        stragglers: Named laws that straggler sets are drawn from.
        key: Random key of the draws.
        num_sets: Straggler sets for each law.
        surrogate: The surrogate that predictions are decoded with, if any.
        prior: The surrogate's outputs on the same groups.
    """
    check_labels(own.form)
    masks, _ = draw_sets(stragglers, key, own.code.num_workers, num_sets)
    observed = observe_errors(own, surrogate, prior, masks)
    features, sure, wrong = map(np.asarray, observed)
    return fit_error_probability(features, sure, wrong, own.form, own.conditions)


def check_labels(form: Form) -> None:
    """Raise ValueError for outputs without labels: a single number is its own largest."""
    if not form.has_labels:
        raise ValueError(
            f"outputs of shapes {list(form.shapes)} have one number a row, which is no label: "
            "calibrate_error_bars and a tolerance are for values"
        )


def fit_error_probability_of_predictions(
    predictions: Float[ArrayLike, "points m"],
    deviation: Float[ArrayLike, " points"],
    own: Float[ArrayLike, "points m"],
    form: Form | None = None,
) -> ErrorProbability:
    """Calibrate an error probability of a surrogate's predictions by themselves.

    The result is called with the predictions as `cheap`, too.

    Args:
        predictions: The surrogate's outputs on data points whose answers are known.
        deviation: Their standard deviations.
        own: The model's answers.
        form: The structure of the outputs, where they are not vectors.
    """
    predictions, deviation, own = map(np.asarray, (predictions, deviation, own))
    features = error_features(predictions, deviation, predictions, form)
    wrong = ~agree_on_labels(predictions, own, form)
    return fit_error_probability_of_points(features, deviation == 0, wrong, form)


def fit_error_probability_of_points(
    features: Float[np.ndarray, "points features"],
    sure: Bool[np.ndarray, " points"],
    wrong: Bool[np.ndarray, " points"],
    form: Form | None = None,
) -> ErrorProbability:
    """Fit an error probability to single data points, each of which was seen once."""
    features, sure, wrong = (each[None, :, None] for each in (features, sure, wrong))
    return fit_error_probability(features, sure, wrong, form)


@eqx.filter_jit
def observe_errors(
    own: Answers,
    surrogate: AbstractSurrogate | None,
    prior: AbstractGroupPrior | None,
    masks: Bool[Array, "sets num_workers"],
) -> tuple[Array, Array, Array]:
    """Return features, exactness, and wrongness of each data point under each straggler set."""

    def of_set(mask):
        available = jnp.broadcast_to(mask, own.coded.shape[:2])
        decoded, deviation = decode_with_deviation(own.code, surrogate, own.coded, available, prior)
        cheap = None if prior is None else prior.condition(own.coded, available).own
        wrong = ~own.same_labels(decoded.predictions)
        features = error_features(decoded.predictions, deviation, cheap, own.form)
        return features, deviation == 0, wrong | ~decoded.recovered

    return jax.lax.map(of_set, masks)


def error_features(
    predictions: Float[Any, "*points m"],
    deviation: Float[Any, "*points"],
    cheap: Float[Any, "*points m"] | None,
    form: Form | None,
) -> Float[Any, "*points features"]:
    """Return what the logistic regression looks at, with the constant first.

    The features are the logarithm of margin over deviation (below and above 1 apart, neither of
    which may raise the probability), the logarithm of the margin, and of a surrogate whether it has
    the same label, and by how much.
    """
    xp = namespace(predictions, deviation)
    size = xp.log(margin(predictions, form) + _LEAST)
    ratio = xp.clip(size - xp.log(deviation + _LEAST), -10, 10)
    features = [xp.ones_like(ratio), xp.minimum(ratio, 0), xp.maximum(ratio, 0), size]
    if cheap is not None:
        lead = _least_of_labels(lead_of, form, predictions, cheap)
        features += [xp.sign(lead), xp.arcsinh(lead)]
    return xp.nan_to_num(xp.stack(features, axis=-1))


def margin(predictions: Float[Any, "*points m"], form: Form | None = None) -> Float[Any, "*points"]:
    """Return by how much the largest output leads the second.

    A single output's margin is its size. Predictions with several labels (`form`) have the margin
    of their least certain one. On the host or in programs, by the array.
    """

    def of_labels(outputs: Float[Any, "*labels m"]) -> Float[Any, "*labels"]:
        if outputs.shape[-1] == 1:
            return namespace(outputs).abs(outputs[..., 0])
        if namespace(outputs) is np:
            largest = np.partition(outputs, -2, axis=-1)[..., -2:]
            return largest[..., 1] - largest[..., 0]
        first, second = jnp.moveaxis(jax.lax.top_k(outputs, 2)[0], -1, 0)
        return first - second

    return _least_of_labels(of_labels, form, predictions)


def lead_of(
    predictions: Float[Any, "*#labels m"], cheap: Float[Any, "*#labels m"]
) -> Float[Any, "*#labels"]:
    """Return by how much the surrogate prefers the predicted label to all others."""
    xp = namespace(predictions, cheap)
    label = xp.argmax(predictions, axis=-1, keepdims=True)
    others = xp.where(xp.arange(cheap.shape[-1]) == label, -xp.inf, cheap)
    own = xp.take_along_axis(cheap, label, axis=-1)[..., 0]
    return own - xp.max(others, axis=-1)


def _least_of_labels(
    of_labels: Callable[..., Any], form: Form | None, *vectors: Float[Any, "*points m"]
) -> Float[Any, "*points"]:
    """Return the least value over all labels of a data point."""
    xp = namespace(*vectors)
    if form is None:
        return of_labels(*vectors)
    axes = vectors[0].ndim - 1
    least = []
    for parts in zip(*(jax.tree.leaves(form.split(each)) for each in vectors), strict=True):
        labelled = (part[..., None] if part.ndim == axes else part for part in parts)
        found = of_labels(*labelled)
        least.append(xp.min(found.reshape(*found.shape[:axes], -1), axis=-1))
    return xp.min(xp.stack(least), axis=0)


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
    from scipy.special import expit  # late: a fifth of a worker's import time

    width = features.shape[1]
    if len(features) == 0:
        return np.zeros(width)
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 1e-6, scale, 1)  # what hardly varies tells nothing
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
        # What stands at zero and would rise stays there.
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
            break  # rounding is all that is left
        length, weights, least = np.max(np.abs(moved - weights)), moved, found
        if length < 1e-7:
            break
    weights /= scale
    weights[0] -= weights[1:] @ mean[1:]
    return weights


# The constants were measured on a synthetic classifier, NeRCC (4, 7) with Chebyshev and repeated
# points, 35 straggler sets, calibrated on 100 or 400 groups (six draws) and judged on 800 others.
# The figures are means over these of "miscalibration", the worst of five bins' |log(observed /
# promised)|; of "use", the disagreement over what was allowed (0.5 and 2 %); or of what is named.

_FOLDS = 5  # of the cross-fitting. Miscalibration with 2, 5, 10: 0.057, 0.051, 0.054.
# Least scale of the regression's log-odds, so that some order is left. Use with 0.0001, 0.1, 0.3:
# 0.27, 0.43, 0.44.
_LEAST_SCALE = 0.1
# Most bins of the correction, and the least number of errors expected in each. Miscalibration with
# 8, 32, 128 bins: 0.052, 0.051, 0.051; with 3, 10, 30 errors: 0.053, 0.051, 0.048.
_BINS, _EXPECTED = 32, 10
_SUREST = 1 - 1e-6  # the largest probability of an error
# Share of the log-odds' slope that is left within a bin: without any, probabilities tie, and a
# limit takes all of a bin or none. Use with 0, 0.05, 0.2: 0.27, 0.43, 0.44.
_SLOPE = 0.05
_DIGITS = 3  # to which log-odds are rounded. Miscalibration with 1, 3, 6: 0.046, 0.051, 0.051.
_LEVELS = 512  # places of a limit. Use with 64, 512, 4,096: 0.36, 0.43, 0.45.
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
            lambda shift: np.mean(expit(scale * logit + shift)) - mean, bracket=(-1000.0, 1000.0)
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
    """Return levels of probability, a bound of the risk up to each, and the share above each.

    The bound is of the share that is wrong and not above a level. Groups are independent of each
    other, and so are straggler sets; what is counted of one group under all sets, and of one set in
    all groups, is not. At levels that hold more than exact answers, one more wrong label is counted
    than there was.
    """
    order = np.sort(probability, axis=None)
    known = int(np.sum(sure))
    # Beyond the sure ones, every so many a level, above all that are the same but for the rounding
    # of float32 in another program.
    places = np.linspace(known, probability.size - 1, _LEVELS).round().astype(int)
    above = np.minimum(order[places[places < probability.size]] * (1 + 1e-5), _SUREST)
    levels = np.concatenate([[0.0], above])
    counts = np.searchsorted(order, levels, side="right")
    sets, groups, _ = wrong.shape
    of_set, of_group, _ = np.nonzero(wrong)
    level = np.searchsorted(levels, probability[wrong])
    error = np.zeros(len(levels))
    for owner, number in ((of_set, sets), (of_group, groups)):
        sums = np.zeros((len(levels) + 1, number))
        np.add.at(sums, (level, owner), number / wrong.size)
        error += np.var(np.cumsum(sums[:-1], axis=0), axis=1) / number
    points, guesses = wrong.size / sets, counts > known
    total = np.cumsum(np.bincount(level, minlength=len(levels) + 1))[:-1] / sets
    counted = (total + guesses) / (points + guesses)
    bounds = np.minimum(np.maximum.accumulate(counted + _ERRORS * np.sqrt(error)), 1)
    return levels, bounds, 1 - counts / probability.size


def fit_error_probability(
    features: Float[np.ndarray, "sets groups num_data features"],
    sure: Bool[np.ndarray, "sets groups num_data"],
    wrong: Bool[np.ndarray, "sets groups num_data"],
    form: Form | None = None,
    conditions: Conditions = Conditions(),  # noqa: B008, it is frozen
) -> ErrorProbability:
    """Fit an error probability to observed errors, in three steps.

    `regression` ranks labels by their features, `correction` makes the probabilities right bin by
    bin, and `risks` bounds the risk of giving out all labels up to each probability.

    Args:
        features: The features of each data point under each straggler set (`error_features`).
        sure: Whether a prediction is the model's own answer, whatever its features.
        wrong: Whether its label differs from the model's own.
        form: The structure of the outputs, if they may be no vectors.
        conditions: The conditions of the answers.
    """
    from scipy.special import expit  # late: a fifth of a worker's import time

    # A data point is much the same under all sets, so it counts once, not once in each.
    count = np.sum(~sure.all(axis=0)) / max(np.sum(~sure), 1)
    group = np.nonzero(~sure)[1]
    # The two parts of margin over deviation must not raise the probability of an error.
    weights, fresh = regression(
        features[~sure].astype(np.float64), wrong[~sure], group, count, (1, 2)
    )
    knots, shifts = correction(fresh, wrong[~sure], count)
    logit = features @ weights
    probability = np.where(sure, 0, expit(logit + np.interp(logit, knots, shifts)))
    levels, found, shares = risks(probability, sure, wrong)
    numbers = {"weights": weights, "knots": knots, "shifts": shifts}
    numbers |= {"levels": levels, "risks": found, "shares": shares}
    arrays: Any = to_device({name: np.asarray(each, float) for name, each in numbers.items()})
    vectors = form is None or form.is_vector
    return ErrorProbability(**arrays, form=None if vectors else form, conditions=conditions)
