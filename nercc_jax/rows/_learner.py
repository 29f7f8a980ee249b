"""Learning from computed rows: pure functions from a task to estimates of all other rows.

A learner is fitted to computed rows on a thread of its own, so that nothing waits for it. Between
two fits it learns the rows that have come since, which takes a hundredth of the time. Everything
here is NumPy's: nothing is compiled, and nothing but its arguments is read.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from ..codes import NeRCC
from ..evaluation._criteria import root_mean_square
from ..pools.clock import AbstractClock, TimeShare
from ..risk import ErrorProbability
from ..risk._answer_check import AnswerCheck, fit_answer_check
from ..schemes import fit_scheme
from ..schemes._calibrate import SHAPE
from ..surrogates import Learner, LearnerTuning, learner_card, load_learner, save_learner
from ._interface import RowSettings
from .files import REMEDY

_LOG = logging.getLogger(__name__)

LEARNER_THREAD = "nercc-learner"  # for which the end of a process waits
CAPACITY = 1024  # rows that the learner holds at most
FEW = 512  # rows up to which a smaller learner is fitted, in a third of the time
# Rows that a larger one's kernel is judged on. By 128, which takes a third of the time, 246 and 250
# of the 250 largest rows of Lotka-Volterra had to be computed, by these 176 and 170 (two draws).
_JUDGED = 256
_CHUNK = 1024  # rows that are predicted together
_NEIGHBOURS = 8  # computed rows that a row is compared with
_UNSURE = 256  # of the least certain rows, from which those that tell most are picked
_TELLING = 64  # that are picked
OF_CALLS = 0.25  # of right answers that may look wrong: those that do so with others of their call


class FittedLearner(NamedTuple):
    """A learner of computed rows, with the probability that its labels are wrong.

    `pairs` is the number of rows that it was fitted to.
    """

    learner: Learner
    probability: ErrorProbability | None
    pairs: int

    def save(self, path: Path) -> None:
        """Write the learner's file, with all else in its card."""
        probability = self.probability and self.probability.to_json()
        save_learner(path, self.learner, {"pairs": self.pairs, "doubt": probability})

    @classmethod
    def load(cls, path: Path) -> "FittedLearner":
        """Return what `save` wrote; raise ValueError, naming the file, if it is damaged."""
        try:
            learner, about = load_learner(path), learner_card(path)
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"{error}; this one is part of a run: {REMEDY}") from error
        probability = about["doubt"] and ErrorProbability.from_json(about["doubt"])
        return cls(learner, probability, about["pairs"])


class Neighbours(NamedTuple):
    """Rows of which it is known whether they are late, by their inputs or their outputs."""

    places: Float[np.ndarray, "others coordinates"]
    late: Bool[np.ndarray, " others"]


class LearnerTask(NamedTuple):
    """A task of the learner.

    Attributes:
        fit: The learner that learns the pairs; None for a new one.
        x: Inputs of the pairs.
        y: Their values.
        rows: Rows that are predicted: those without a value, and then known ones, each of which is
            predicted without its own value.
        features: Their inputs.
        known_y: The values of the known ones.
        by_input: Rows that are late or not, by inputs.
        by_output: The same by outputs.
        unchecked: Places among the known ones of values that nobody has looked at.
        settings: The run's.
    """

    fit: FittedLearner | None
    x: Float[np.ndarray, "pairs inputs"]
    y: Float[np.ndarray, "pairs outputs"]
    rows: Int[np.ndarray, " rows"]
    features: Float[np.ndarray, "rows inputs"]
    known_y: Float[np.ndarray, "known outputs"]
    by_input: Neighbours
    by_output: Neighbours
    unchecked: Int[np.ndarray, " unchecked"]
    settings: RowSettings


class Looks(NamedTuple):
    """Computed rows that a learner has looked at, with the check, for rows to come.

    Residuals are in units of deviations, uncorrelated.
    """

    rows: Int[np.ndarray, " rows"]
    looks_wrong: Bool[np.ndarray, " rows"]
    residuals: Float[np.ndarray, "rows outputs"]
    check: AnswerCheck


class Learned(NamedTuple):
    """The outcome of a task: predictions of its rows, and how far they may be off.

    Attributes:
        fit: The learner.
        rows: The task's rows.
        left_out: Which of them are predicted without their own values.
        mean: Predictions, as vectors.
        expected: How far these may be off, in units of the outputs.
        plain: The learner's own deviations.
        like_late: Rows that have a late one among their nearest neighbours.
        telling: Rows that tell most about the others, in that order.
        looks: What the learner says of values that nobody had looked at.
    """

    fit: FittedLearner
    rows: Int[np.ndarray, " rows"]
    left_out: Bool[np.ndarray, " rows"]
    mean: Float[np.ndarray, "rows outputs"]
    expected: Float[np.ndarray, " rows"]
    plain: Float[np.ndarray, " rows"]
    like_late: Bool[np.ndarray, " rows"]
    telling: Int[np.ndarray, " few"]
    looks: Looks | None


def learn(task: LearnerTask) -> Learned | None:
    """Carry out a task; return None where nothing could be learned.

    A learner's own deviation depends on where pairs are, and not on their values, so that errors
    may be several of it where the function varies most. So it is multiplied by the root mean square
    ratio of error to deviation of the nearest pairs; but not where all rows are computed, or where
    outputs are labels, whose error probabilities are calibrated for the learner's own deviations.
    """
    fit, settings, features = task.fit, task.settings, task.features
    if fit is None:
        fit = fit_rows(task.x, task.y, labels=settings.tolerance is None)
    elif len(task.x):
        fit = fit._replace(learner=fit.learner.update(task.x, task.y))
    if fit is None:
        return None
    learner, kernel = fit.learner, fit.learner.kernel
    mean = np.zeros((len(features), learner.form.size), np.float32)
    plain = np.zeros(len(features))
    for place in range(0, len(features), _CHUNK):
        part = slice(place, place + _CHUNK)
        mean[part], plain[part] = learner.predict(features[part])

    # Pairs, each predicted from the others; known rows that are pairs, by that.
    window, known = learner.window, slice(len(features) - len(task.known_y), None)
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

    expected = plain
    if settings.compute == "needed" and fit.probability is None:
        off = np.stack([root_mean_square(errors, axis=1), scatter])
        ratios = np.sqrt(2) * root_mean_square(off, axis=0) / deviations
        unit = np.asarray(kernel.unit * kernel.widths[kernel.groups])
        expected = plain * root_mean_square(ratios[_nearest(features, inputs, unit, pair)], axis=1)

    left_out = np.zeros(len(features), bool)
    left_out[known] = True
    near, others = (task.by_input, task.by_output), ~left_out
    telling = most_telling(learner, features[others], expected[others])
    looks = None
    if settings.check_answers is not None:
        looks = _look_at(task, mean[known], plain[known])
    late = like_late(features, mean, *near) & others
    rows = task.rows
    return Learned(fit, rows, left_out, mean, expected, plain, late, rows[others][telling], looks)


class LearnerThread:
    """The thread that carries out one task after the other, for a share of the time.

    `seconds` are those that the last task took; a guess before the first.
    """

    def __init__(self, share: float, clock: AbstractClock):
        self.seconds = 0.5
        self._learned: list[Learned] = []
        self._clock, self._time = clock, TimeShare(clock, share)
        self._works: Callable[[], bool] = lambda: False

    def start(self, task: LearnerTask) -> None:
        """Begin a task, when none is under way."""

        def work() -> None:
            begin = self._clock.now()
            try:
                if (learned := learn(task)) is not None:
                    self._learned.append(learned)
            finally:
                self.seconds = self._time.spend(begin)

        self._works = self._clock.start(LEARNER_THREAD, work)

    @property
    def busy(self) -> bool:
        """Return whether it is at work, or has just been: it leaves the cores to others."""
        return self._works() or self._clock.now() < self._time.next

    def take(self) -> list[Learned]:
        """Take what has been learned since the last call."""
        learned, self._learned = self._learned, []
        return learned


def fit_rows(
    x: Float[np.ndarray, "pairs inputs"], y: Float[np.ndarray, "pairs outputs"], labels: bool
) -> FittedLearner | None:
    """FittedLearner a learner; return None where nothing could be learned."""
    capacity, tuning = CAPACITY, LearnerTuning(rows=_JUDGED)
    if len(x) < FEW:
        capacity, tuning = FEW, LearnerTuning(shapes=(SHAPE,), steps=40, rows=64)
    options: Any = {"capacity": capacity, "labels": labels, "tuning": tuning}
    try:
        # A scheme has a code, by which nothing goes here: rows are sent as they are.
        scheme: Any = fit_scheme(x, y, NeRCC(1, 2), **options).scheme
    except ValueError as error:  # a function that is constant, for example
        _LOG.warning("nothing could be learned from %d rows: %s", len(x), error)
        return None
    return FittedLearner(scheme.surrogate, scheme.error_probability, len(x))


def most_telling(
    learner: Learner,
    features: Float[np.ndarray, "rows inputs"],
    deviation: Float[np.ndarray, " rows"],
) -> Int[np.ndarray, " few"]:
    """Return the places of rows each of which is the least certain one given those before it.

    That is a Cholesky factorization with pivots of their posterior covariance, which makes the
    determinant of the first ones' covariance large (Harbrecht et al. 2012).
    """
    places = np.argsort(-deviation, kind="stable")[:_UNSURE]
    if len(places) < _UNSURE:
        return places
    covariance = learner.window_posterior(features[places][None])[1][0]
    chosen, left = [], np.diag(covariance).copy()
    least = 1e-4 * left.max()  # what is left then is float32's rounding
    factor = np.zeros((_UNSURE, _TELLING))
    for step in range(_TELLING):
        best = int(np.argmax(left))
        if not left[best] > least:
            break
        chosen.append(best)
        column = covariance[:, best] - factor[:, :step] @ factor[best, :step]
        factor[:, step] = column / np.sqrt(left[best])
        left = np.maximum(left - factor[:, step] ** 2, 0)
        left[chosen] = 0
    return places[chosen]


def like_late(
    inputs: Float[np.ndarray, "rows inputs"],
    outputs: Float[np.ndarray, "rows outputs"],
    by_input: Neighbours,
    by_output: Neighbours,
) -> Bool[np.ndarray, " rows"]:
    """Return which rows have a late one among their nearest neighbours, by input or by output."""
    found = np.zeros(len(inputs), bool)
    for places, known in ((inputs, by_input), (outputs, by_output)):
        if known.late.any() and len(known.late) >= _NEIGHBOURS:
            spread = known.places.std(axis=0)
            nearest = _nearest(places, known.places, np.where(spread > 0, spread, 1))
            found |= known.late[nearest].any(axis=1)
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


def _look_at(
    task: LearnerTask,
    mean: Float[np.ndarray, "known outputs"],
    plain: Float[np.ndarray, " known"],
) -> Looks | None:
    """Look at the values of a task's unchecked rows, by predictions of all known ones.

    There are two checks, each of which looks at the rows from which it has learned nothing but its
    limit. They go by the learner's own deviations: a wrong value makes those of its neighbours
    large. None if there are too few rows.
    """
    y, places = task.known_y.astype(np.float32), task.unchecked
    looks_wrong = np.zeros(len(places), bool)
    residuals = np.zeros((len(places), y.shape[1]), np.float32)
    finite = np.flatnonzero(np.isfinite(y).all(axis=1))
    halves = np.array_split(np.random.default_rng(0).permutation(finite)[: 2 * CAPACITY], 2)
    check = None
    for one, other in (halves, halves[::-1]) if len(finite) > 1 else ():
        both = np.concatenate([one, other])
        # A quarter of the answers that may look wrong are those with the largest residuals.
        check = fit_answer_check(
            *(mean[both], plain[both], y[both]),
            (1 - OF_CALLS) * (task.settings.check_answers or 0.0),
            labels=task.settings.tolerance is None,
            blatant=0.25,
        )
        if check.limit == np.inf:
            return None
        chosen = ~np.isin(places, one)
        part = places[chosen]
        looks_wrong[chosen] = check.suspicious(mean[part], plain[part], y[part])
        residuals[chosen] = check.residuals(mean[part], plain[part], y[part])
    known = task.rows[len(task.rows) - len(y) :]
    return None if check is None else Looks(known[places], looks_wrong, residuals, check)
