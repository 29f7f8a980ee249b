"""Learning from computed rows: a pure function that returns estimates of all other rows.

A learner is fitted to computed rows on a thread of its own, so that nothing waits for it. Between
two fits it learns the rows that have come since, which takes a hundredth of the time. Everything
here is NumPy's: nothing is compiled, and nothing but its arguments is read.
"""

import logging
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from ..codes import NeRCC
from ..evaluation._criteria import root_mean_square
from ..risk import ErrorProbability
from ..risk._answer_check import AnswerCheck, fit_answer_check
from ..schemes import fit_scheme
from ..schemes._calibrate import SHAPE
from ..surrogates import Learner, LearnerTuning
from ._interface import RowSettings

_LOG = logging.getLogger(__name__)

CAPACITY = 1024  # rows that the learner holds at most
FEW = 512  # rows up to which a smaller learner is fitted, in a third of the time
# Rows that a larger one's kernel is judged on. By 128, which takes a third of the time, 246 and 250
# of the 250 largest rows of Lotka-Volterra had to be computed, by these 176 and 170 (two draws).
_JUDGED = 256
_CHUNK = 1024  # rows that are predicted together
_NEIGHBOURS = 8  # computed rows that a row is compared with


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
        mean: Predictions, as vectors, each made without the row's own value.
        expected: How far they may be off, by errors nearby.
        plain: The same by the learner's own deviation.
        check: The check of computed values, if there is one and enough is known.
    """

    fit: FittedLearner
    rows: Int[np.ndarray, " rows"]
    mean: Float[np.ndarray, "rows outputs"]
    expected: Float[np.ndarray, " rows"]
    plain: Float[np.ndarray, " rows"]
    check: AnswerCheck | None


def learn(
    fit: FittedLearner | None,
    x: Float[np.ndarray, "pairs inputs"],
    y: Float[np.ndarray, "pairs outputs"],
    rows: Int[np.ndarray, " rows"],
    features: Float[np.ndarray, "rows inputs"],
    known_y: Float[np.ndarray, "known outputs"],
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
        settings: The run's.
    """
    if fit is None:
        capacity, tuning = CAPACITY, LearnerTuning(rows=_JUDGED)
        if len(x) < FEW:
            capacity, tuning = FEW, LearnerTuning(shapes=(SHAPE,), steps=40, rows=64)
        options: Any = {"capacity": capacity, "labels": settings.tolerance is None}
        try:
            # A scheme has a code, by which nothing goes here: rows are sent as they are.
            scheme: Any = fit_scheme(x, y, NeRCC(1, 2), tuning=tuning, **options)
        except ValueError as error:  # a function that is constant, for example
            _LOG.warning("nothing could be learned from %d rows: %s", len(x), error)
            return None
        fit = FittedLearner(scheme.surrogate, scheme.error_probability, len(x))
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

    expected = plain.copy()
    if settings.compute == "needed" and fit.probability is None:
        off = np.stack([root_mean_square(errors, axis=1), scatter])
        ratios = np.sqrt(2) * root_mean_square(off, axis=0) / deviations
        places = inputs / (unit := np.asarray(kernel.unit * kernel.widths[kernel.groups]))
        squares = np.sum(places**2, axis=1)
        for place in range(0, len(features), _CHUNK):
            part = slice(place, place + _CHUNK)
            distance = squares - 2 * (features[part] / unit) @ places.T
            own = np.flatnonzero(paired[part])
            distance[own, pair[part][own]] = np.inf
            nearest = np.argpartition(distance, _NEIGHBOURS - 1, axis=1)[:, :_NEIGHBOURS]
            expected[part] *= root_mean_square(ratios[nearest], axis=1)

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
    return Learned(fit, rows, mean, expected, plain, check)
