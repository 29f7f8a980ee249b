"""Learning from computed rows: pure functions that return estimates of all other rows.

A learner is fitted to computed rows on a thread of its own, so that nothing waits for it. Between
two fits it learns the rows that have come since, which takes a hundredth of the time. Everything
here is NumPy's: nothing is compiled, and nothing but its arguments is read.
"""

import logging
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from ..codes.checks import check_count
from ..evaluation.criteria import agree_on_labels, root_mean_square
from ..risk import ErrorProbability
from ..risk._answer_check import AnswerCheck, fit_answer_check
from ..risk._error_probability import fit_error_probability
from ..risk._features import label_features
from ..surrogates import Learner, LearnerTuning, fit_learner
from ..surrogates.kernel import Shape, first_kernel
from ._interface import RowSettings

_LOG = logging.getLogger(__name__)

SHAPE: Shape = "squared_exponential"  # of the kernel that tuning starts from
CAPACITY = 1024  # rows that the learner holds at most
FEW = 512  # rows up to which a smaller learner is fitted, in a third of the time
# Rows that a larger one's kernel is judged on. By 128, which takes a third of the time, 246 and 250
# of the 250 largest rows of Lotka-Volterra had to be computed, by these 176 and 170 (two draws).
_JUDGED = 256
_CHUNK = 1024  # rows that are predicted together
_NEIGHBOURS = 8  # computed rows that a row is compared with

# Inputs of rows, and outputs of rows, each with which of them are late.
Lateness: TypeAlias = tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


class FittedLearner(NamedTuple):
    """A learner of computed rows, with the probability that its labels are wrong.

    `pairs` is the number of rows that it was fitted to.
    """

    learner: Learner
    probability: ErrorProbability | None
    pairs: int


class Learned(NamedTuple):
    """The outcome of a task: predictions of its rows, and how far they may be off.

    Attributes:
        fit: The learner.
        rows: The task's rows.
        mean: Predictions, as vectors.
        columns: What is known of them, by the names of `ROW`.
        check: The check of computed values, if there is one and enough is known.
    """

    fit: FittedLearner
    rows: Int[np.ndarray, " rows"]
    mean: Float[np.ndarray, "rows outputs"]
    columns: dict[str, Shaped[np.ndarray, " rows"]]
    check: AnswerCheck | None


def fit_pairs(
    x: Float[np.ndarray, "pairs inputs"],
    y: Float[np.ndarray, "pairs outputs"],
    capacity: int,
    tuning: LearnerTuning,
    *,
    labels: bool,
) -> FittedLearner:
    """Fit a learner to three quarters of the pairs, and calibrate its labels on the others.

    Every fourth input is held out, with all answers to it, 256 at most. Afterwards the learner
    learns these pairs, too.

    Raises:
        ValueError: There are fewer than 16 pairs, or the function is constant.
    """
    check_count("pairs", len(x), 16)
    first = np.argmax(first_kernel(SHAPE, x).same(x, x), axis=1)
    held = np.isin(first, np.unique(first)[3::4][:256])
    learner = fit_learner(x[~held], y[~held], capacity=capacity, kernel=SHAPE, tuning=tuning)
    mean, deviation = learner.predict(x[held])
    if not np.isfinite(deviation).any():
        raise ValueError("the function is constant, so nothing says how far others may be off")
    probability = None
    if labels:
        features = label_features(mean, deviation, mean, None)  # of a surrogate by itself
        wrong = ~np.asarray(agree_on_labels(mean, y[held].astype(np.float32)))
        sure = deviation == 0
        probability = fit_error_probability(features[:, None], wrong[:, None], sure=sure)
    return FittedLearner(learner.update(x[held], y[held]), probability, len(x))


def learn(
    fit: FittedLearner | None,
    x: Float[np.ndarray, "pairs inputs"],
    y: Float[np.ndarray, "pairs outputs"],
    rows: Int[np.ndarray, " rows"],
    features: Float[np.ndarray, "rows inputs"],
    known_y: Float[np.ndarray, "known outputs"],
    lateness: Lateness,
    settings: RowSettings,
) -> Learned | None:
    """Learn computed rows, and predict others; return None where nothing could be learned.

    A learner's own deviation depends on where pairs are, and not on their values, so that errors
    may be several of it where the function varies most. So it is multiplied by the root mean square
    ratio of error to deviation of the nearest pairs; but not where all rows are computed, or where
    outputs are labels, whose error probabilities are calibrated for the learner's own deviations.

    Args:
        fit: The learner that learns the pairs; None for a new one.
        x: Inputs of the pairs.
        y: Their values.
        rows: Rows that are predicted: those without a value, and then known ones, each of which is
            predicted without its own value.
        features: Their inputs.
        known_y: The values of the known ones.
        lateness: Rows of which it is known whether they are late.
        settings: The run's.
    """
    if fit is None:
        capacity, tuning = CAPACITY, LearnerTuning(rows=_JUDGED)
        if len(x) < FEW:
            capacity, tuning = FEW, LearnerTuning(shapes=(SHAPE,), steps=40, rows=64)
        try:
            fit = fit_pairs(x, y, capacity, tuning, labels=settings.tolerance is None)
        except ValueError as error:  # a function that is constant, for example
            _LOG.warning("nothing could be learned from %d rows: %s", len(x), error)
            return None
    elif len(x):
        fit = fit._replace(learner=fit.learner.update(x, y))
    learner, kernel = fit.learner, fit.learner.kernel
    mean = np.zeros((len(features), learner.form.size), np.float32)
    plain = np.zeros(len(features))
    for place in range(0, len(features), _CHUNK):
        part = slice(place, place + _CHUNK)
        mean[part], plain[part] = learner.predict(features[part])

    # Pairs, each predicted from the others; known rows that are pairs, by that.
    window, known = learner.window, slice(len(features) - len(known_y), None)
    inputs, residuals, scatter, errors, deviations = (
        each[learner.filled]
        for each in (window.inputs, window.residuals, window.scatter, *learner.left_out())
    )
    same = kernel.same(features[known], inputs)
    pair = np.full(len(features), -1)
    pair[known] = np.where(same.any(axis=1), same.argmax(axis=1), -1)
    paired = pair >= 0
    mean[paired] = (residuals + errors)[pair[paired]]
    plain[paired] = deviations[pair[paired]]
    left_out = np.zeros(len(features), bool)
    left_out[known] = True

    expected = plain
    if settings.compute == "needed" and fit.probability is None:
        off = np.stack([root_mean_square(errors, axis=1), scatter])
        ratios = np.sqrt(2) * root_mean_square(off, axis=0) / deviations
        unit = np.asarray(kernel.unit * kernel.widths[kernel.groups])
        expected = plain * root_mean_square(ratios[_nearest(features, inputs, unit, pair)], axis=1)

    # A check goes by the learner's own deviations: a wrong value makes those of its neighbours
    # large. A quarter of the right ones that may look wrong are those with the largest residuals,
    # since it may have learned that a few wrong ones are right.
    check, finite = None, np.flatnonzero(np.isfinite(known_y).all(axis=1))
    if settings.check_answers is not None and len(finite) > 1:
        some = np.random.default_rng(0).permutation(finite)[: 2 * CAPACITY]
        facts = mean[known][some], plain[known][some], known_y[some].astype(np.float32)
        labels = settings.tolerance is None
        check = fit_answer_check(*facts, settings.check_answers, labels=labels, blatant=0.25)
        check = None if check.limit == np.inf else check
    late = like_late(features, mean, lateness) & ~left_out
    columns = {"expected": expected, "plain": plain, "left_out": left_out, "like_late": late}
    return Learned(fit, rows, mean, columns, check)


def like_late(
    inputs: Float[np.ndarray, "rows inputs"],
    outputs: Float[np.ndarray, "rows outputs"],
    lateness: Lateness,
) -> Bool[np.ndarray, " rows"]:
    """Return which rows have a late one among their nearest neighbours, by input or by output."""
    found = np.zeros(len(inputs), bool)
    for places, (known, late) in zip((inputs, outputs), lateness, strict=True):
        if late.any() and len(late) >= _NEIGHBOURS:
            spread = known.std(axis=0)
            found |= late[_nearest(places, known, np.where(spread > 0, spread, 1))].any(axis=1)
    return found


def _nearest(
    places: Float[np.ndarray, "rows coordinates"],
    others: Float[np.ndarray, "others coordinates"],
    unit: Float[np.ndarray, " coordinates"],
    own: Int[np.ndarray, " rows"] | None = None,
) -> Int[np.ndarray, "rows neighbours"]:
    """Return the nearest of the others to each row, without its own, if one is given from 0 on."""
    others = others / unit
    squares = np.sum(others**2, axis=1)
    found = np.empty((len(places), _NEIGHBOURS), int)
    for place in range(0, len(places), _CHUNK):
        part = slice(place, place + _CHUNK)
        distance = squares - 2 * (places[part] / unit) @ others.T
        if own is not None:
            paired = np.flatnonzero(own[part] >= 0)
            distance[paired, own[part][paired]] = np.inf
        found[part] = np.argpartition(distance, _NEIGHBOURS - 1, axis=1)[:, :_NEIGHBOURS]
    return found
