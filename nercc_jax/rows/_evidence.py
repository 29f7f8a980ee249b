"""The latest predictions of all rows, and the errors by which their error bars are calibrated.

Error bars are calibrated on audits: rows that are drawn at random, and computed however late they
are. Each audit is compared with predictions made without its own value: the latest one before it
was computed, and those of each later learner, which leave it out. Error bars are a quantile of the
ratios of these errors to the deviations; predicted labels are admitted by `Risk`. Late rows may be
harder than others, so their error bars are calibrated on other rows that were late, too.

A learner is fitted to computed rows on a thread of its own (`learn`), so that nothing waits for it.
Between two fits it is updated with newly computed rows, which takes a hundredth of the time. All of
this is NumPy: nothing is compiled, and `learn` reads only its arguments.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from ..arrays import check_count, root_mean_square
from ..evaluation.criteria import agree_on_labels, row_errors
from ..risk import Comparison, ErrorProbability, Risk
from ..risk.accuracy import conformal_quantile, error_ratios
from ..risk.answer_check import AnswerCheck, fit_answer_check
from ..risk.error_probability import fit_error_probability
from ..risk.features import label_features
from ..surrogates import Learner, LearnerTuning, fit_learner
from ..surrogates.kernel import Shape, first_kernel
from ._interface import RowSettings
from ._table import COMPUTED, FAILED, PREDICTED, RowTable

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Learning:
    """When a run's learner is fitted, and to how many rows.

    Attributes:
        first: Computed rows from which the first learner is fitted.
        news: Computed rows from which a learner is updated between two fits.
        late: Late rows from which late rows have error bars.
        capacity: Rows that the learner holds at most.
        few: Rows below which a smaller learner is fitted, in a third of the time.
        judged: Rows on which a larger learner's kernel is tuned. Of the 250 largest rows of
            Lotka-Volterra, 246 and 250 had to be computed with 128, a third of the time, but 176
            and 170 with 256 (two draws).
        chunk: Rows that are predicted together.
        neighbours: Computed rows that a row is compared with.
        shape: The kernel that tuning starts from.
    """

    first: int = 96
    news: int = 32
    late: int = 20
    capacity: int = 1024
    few: int = 512
    judged: int = 256
    chunk: int = 1024
    neighbours: int = 8
    shape: Shape = "squared_exponential"


LEARNING = Learning()


class FittedLearner(NamedTuple):
    """A learner fitted to a number of `pairs` (computed rows).

    `probability`, if outputs are scores of labels, estimates how likely a predicted label is wrong.
    """

    learner: Learner
    probability: ErrorProbability | None
    pairs: int


class Learned(NamedTuple):
    """The result of a learner's task: predictions of rows, and their expected errors.

    Attributes:
        fit: The learner.
        rows: The predicted rows.
        mean: Predictions, as vectors, each made without the row's own value.
        expected: Expected errors: `plain`, corrected by the errors of nearby pairs.
        plain: The learner's own standard deviations.
        check: The check of computed values, if answers are checked and one could be fitted.
    """

    fit: FittedLearner
    rows: Int[np.ndarray, " rows"]
    mean: Float[np.ndarray, "rows outputs"]
    expected: Float[np.ndarray, " rows"]
    plain: Float[np.ndarray, " rows"]
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

    Every fourth distinct input is held out, with all its answers: at most 256 inputs. Afterwards
    the learner learns these pairs, too.

    Raises:
        ValueError: There are fewer than 16 pairs, or the function is constant.
    """
    check_count("pairs", len(x), 16)
    first = np.argmax(first_kernel(LEARNING.shape, x).same(x, x), axis=1)
    held = np.isin(first, np.unique(first)[3::4][:256])
    kernel = LEARNING.shape
    learner = fit_learner(x[~held], y[~held], capacity=capacity, kernel=kernel, tuning=tuning)
    mean, deviation = learner.predict(x[held])
    if not np.isfinite(deviation).any():
        raise ValueError("the function is constant, so nothing says how far others may be off")
    probability = None
    if labels:
        features = label_features(mean, deviation, mean, None)  # of a surrogate without a code
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
    settings: RowSettings,
) -> Learned | None:
    """Learn computed rows, and predict others; return None if no learner could be fitted.

    A learner's own deviation depends on the inputs of the pairs, not on their values, so errors may
    be several deviations where the function varies most. So the deviation is multiplied by the root
    mean square ratio of error to deviation of the nearest pairs. This is not done if `compute` is
    "all", or for labels: their error probabilities are calibrated for the learner's own deviations.

    Args:
        fit: The learner to update with the pairs; None to fit a new one.
        x: The pairs' inputs.
        y: The pairs' values.
        rows: The rows to predict: those without a value, and then known ones, each of which is
            predicted without its own value.
        features: The inputs of `rows`.
        known_y: The values of the known rows.
        settings: The run's settings.
    """
    if fit is None:
        capacity, tuning = LEARNING.capacity, LearnerTuning(rows=LEARNING.judged)
        if len(x) < LEARNING.few:
            tuning = LearnerTuning(shapes=(LEARNING.shape,), steps=40, rows=64)
            capacity = LEARNING.few
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
    for place in range(0, len(features), LEARNING.chunk):
        part = slice(place, place + LEARNING.chunk)
        mean[part], plain[part] = learner.predict(features[part])

    # Each pair is predicted from the others; known rows that are pairs get this prediction.
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
        for place in range(0, len(features), LEARNING.chunk):
            part = slice(place, place + LEARNING.chunk)
            distance = squares - 2 * (features[part] / unit) @ places.T
            own = np.flatnonzero(paired[part])
            distance[own, pair[part][own]] = np.inf
            number = LEARNING.neighbours
            nearest = np.argpartition(distance, number - 1, axis=1)[:, :number]
            expected[part] *= root_mean_square(ratios[nearest], axis=1)

    # The check uses the learner's own deviations: a wrong value would enlarge the corrected ones of
    # its neighbours. A quarter of the right answers that may look wrong are those with the largest
    # residuals, since the check may have learned from a few wrong answers that they are right.
    check, finite = None, np.flatnonzero(np.isfinite(known_y).all(axis=1))
    if settings.check_answers is not None and len(finite) > 1:
        some = np.random.default_rng(0).permutation(finite)[: 2 * LEARNING.capacity]
        facts = mean[known][some], plain[known][some], known_y[some].astype(np.float32)
        labels = settings.tolerance is None
        check = fit_answer_check(*facts, settings.check_answers, labels=labels, blatant=0.25)
        check = None if check.limit == np.inf else check
    return Learned(fit, rows, mean, expected, plain, check)


class Evidence:
    """Predictions of all rows, in columns of their table, and which are accurate enough.

    Args:
        settings: The run's settings, such as the accuracy that predictions need.
        x: The inputs of all rows.
        table: The table of the rows.

    Attributes:
        fit: The learner.
        mean: The latest predictions of all rows, as vectors.
        due: The computed rows at which a new learner is fitted; 0 if learned rows were taken back.
        held: Counts of audits and late rows that had an error bar when they were answered, and of
            bars that covered the error. For labels: those certain enough, and those of them right.
    """

    def __init__(self, settings: RowSettings, x: Shaped[np.ndarray, "rows ..."], table: RowTable):
        self._settings, self._x, self._table = settings, x, table
        self.fit: FittedLearner | None = None
        self.mean: Float[np.ndarray, "rows outputs"] | None = None
        self._check: AnswerCheck | None = None
        self._distrusted = False  # whether wrong values may calibrate the check in progress
        self.due = LEARNING.first
        names = ["audited", "audited_held", "came_late", "came_late_held"]
        self.held: dict[str, int] = dict.fromkeys(names, 0)

    @functools.cached_property
    def _features(self) -> Float[np.ndarray, "rows inputs"]:
        """The learner's inputs, standardised, so that float32 is precise enough."""
        x = self._x.reshape(len(self._x), math.prod(self._x.shape[1:]))
        mean, spread = x.mean(axis=0, dtype=float), x.std(axis=0, dtype=float)
        return ((x - mean) / np.where(spread > 0, spread, 1)).astype(np.float32)

    # Learning.

    def distrust(self) -> None:
        """Discard the check, and that of the task in progress: wrong values calibrated them."""
        self._check, self._distrusted = None, True

    def forget(self, rows: Int[np.ndarray, " few"]) -> None:
        """Forget these rows; have a new learner fitted without them if any of them was learned."""
        if self._table["learned"][rows].any():
            self.due = 0
        for name in ("learned", "estimated", "judged"):
            self._table[name][rows] = False

    def task(self, *, hurry: bool = False) -> Callable[[], Learned | None] | None:
        """Return the learner's next task, `learn`; None if there are too few new computed rows.

        A first fit needs 24 computed rows in a `hurry`. A later task then needs no new ones.
        """
        table, fit, learned = self._table, self.fit, self._table["learned"]
        computed, others, y = table.learnable, table.open, table.vectors
        judges = table["audit"][computed] | table.late[computed]
        if self._settings.check_answers is not None:
            judges |= ~table["checked"][computed]
        new, pairs = computed[~learned[computed]], computed[:0]
        if len(computed) < LEARNING.first // 4:
            return None
        full = fit is not None and fit.pairs >= LEARNING.capacity and self.due > 0
        if (len(computed) >= self.due and not full) or (hurry and fit is None):
            # If no row is left to predict, and only a check is needed, a small learner suffices.
            most = LEARNING.few - 1 if hurry and not len(others) else LEARNING.capacity
            count = min(len(computed), most)
            # Every fourth pair, which calibrates, is a random row: an audit while there are any.
            random = np.random.default_rng(len(computed)).permutation(computed)
            last = random[np.argsort(~table["audit"][random], kind="stable")][: count // 4]
            rest = random[~np.isin(random, last)][: count - count // 4]
            places, pairs = np.arange(count) % 4 == 3, np.empty(count, int)
            pairs[places], pairs[~places] = last, rest
            fit, self.due = None, 2 * len(computed)
            if len(computed) < LEARNING.few:  # a larger learner follows when there are enough rows
                self.due = min(self.due, LEARNING.few)
            learned[computed] = True
        elif fit is not None and len(new) >= LEARNING.news:
            pairs = new[-LEARNING.capacity :]
            learned[pairs] = True
        elif fit is None or not hurry:
            return None
        self._distrusted = False
        known = computed[judges]
        rows = np.concatenate([others, known])
        x = self._features
        return functools.partial(
            learn, fit, x[pairs], y[pairs], rows, x[rows], y[known], settings=self._settings
        )

    def take(self, learned: Learned) -> bool:
        """Store a task's predictions, and compare audits and late rows with them.

        Returns:
            Whether there is a new check, with which earlier values may be checked.
        """
        rows, table, self.fit = learned.rows, self._table, learned.fit
        checks = learned.check is not None and not self._distrusted
        self._check = learned.check if checks else self._check
        if self.mean is None:
            self.mean = np.zeros((len(table.rows), learned.mean.shape[1]), np.float32)
        self.mean[rows], table["estimated"][rows] = learned.mean, True
        table["expected"][rows], table["plain"][rows] = learned.expected, learned.plain
        judges = np.intersect1d(rows, table.learnable)
        judges = judges[table["audit"][judges] | table["late"][judges]]
        self._judge(judges, table.vectors[judges].astype(np.float32))
        return checks

    def _judge(
        self, rows: Int[np.ndarray, " some"], y: Float[np.ndarray, "some outputs"]
    ) -> Float[np.ndarray, " some"]:
        """Compare rows' own values with predictions made without them; return the errors."""
        assert self.mean is not None
        table, mean, deviation = self._table, self.mean[rows], self._table["expected"][rows]
        errors = row_errors(mean, y)
        table["excess"][rows] = error_ratios(errors, deviation)
        table["wrong"][rows] = np.argmax(mean, axis=1) != np.argmax(y, axis=1)
        table["judged"][rows] = (deviation > 0) & np.isfinite(deviation)
        return errors

    def compare(
        self,
        rows: Int[np.ndarray, " some"],
        y: Float[np.ndarray, "some outputs"],
        late: bool,
        over: bool = False,
    ) -> None:
        """Compare newly answered rows with their predictions, if they are audits or late.

        Once the run is `over`, each row that was not waited for tests its error bar once, and
        changes nothing else.
        """
        table, labels = self._table, self._settings.tolerance is None
        counts = np.isfinite(y).all(axis=1) & table["estimated"][rows]
        if over:
            state = table["state"][rows]
            known = state == PREDICTED if labels else np.isfinite(table["score"][rows])
            counts &= known & (state < COMPUTED) & ~table["late"][rows]
            table["late"][rows[counts]] = True
        else:
            counts &= table["audit"][rows] | late
        if self.mean is None or not counts.any():
            return
        rows = rows[counts]
        score = table["score"][rows] if over else self.score(rows, late)
        errors = self._judge(rows, y[counts].astype(np.float32))
        barred = (score <= self.limit) | over if labels else np.isfinite(score)
        held = ~table["wrong"][rows] if labels else errors <= score
        name = "came_late" if late else "audited"
        self.held[name] += int(np.count_nonzero(barred))
        self.held[f"{name}_held"] += int(np.count_nonzero(held & barred))

    def look_wrong(
        self, rows: Int[np.ndarray, " some"], values: Float[np.ndarray, "some outputs"]
    ) -> tuple[Bool[np.ndarray, " some"], Bool[np.ndarray, " some"]]:
        """Return masks of the rows whose values look wrong, and of those that could be checked."""
        found, known = np.zeros(len(rows), bool), np.zeros(len(rows), bool)
        if self._check is not None and self.mean is not None:
            known = self._table["estimated"][rows]
            expected = self.mean[rows[known]], self._table["plain"][rows[known]]
            found[known] = self._check.suspicious(*expected, values[known])
        return found, known

    def look_back(self) -> Int[np.ndarray, " some"]:
        """Check all computed rows that are unchecked; return those whose values look wrong."""
        table = self._table
        unchecked = (table["state"] == COMPUTED) & ~table["checked"] & table["estimated"]
        rows = np.flatnonzero(unchecked)
        wrong, _ = self.look_wrong(rows, table.vectors[rows])
        table["checked"][rows[~wrong]] = True
        return rows[wrong]

    # Decisions.

    def score(
        self, rows: Int[np.ndarray, " some"], late: Bool[np.ndarray, " some"] | bool = False
    ) -> Float[np.ndarray, " some"]:
        """Return the rows' error bars or error probabilities; infinite where there is none yet.

        The error bar of a late row is the larger of two: calibrated on audits, and on other rows
        that were late. It is infinite until there are enough of these.
        """
        table, score = self._table, np.full(len(rows), np.inf)
        known, late = table["estimated"][rows], np.broadcast_to(late, len(rows))
        judges = table["judged"] & (table["state"] == COMPUTED)
        audits, came_late = (np.flatnonzero(judges & table[each]) for each in ("audit", "late"))
        if self._settings.max_disagreement is None:
            usual, harder = (
                float(conformal_quantile(table["excess"][each], self._settings.coverage))
                for each in (audits, came_late)
            )
            harder = max(usual, harder) if len(came_late) >= LEARNING.late else np.inf
            factor = np.where(late, harder, usual)
            known = known & np.isfinite(factor)
            score[known] = factor[known] * table["expected"][rows[known]]
            return score
        for kind, by, slow in ((known & ~late, audits, False), (known & late, came_late, True)):
            if not kind.any():
                continue
            risk = Risk(self._settings.accuracy, needs_evidence=slow)
            facts = self._probability(by).tolist(), table["wrong"][by].tolist()
            risk.replace(
                Comparison(each, 0.0, wrong, 0.0) for each, wrong in zip(*facts, strict=True)
            )
            if risk.enough or not risk.waits:
                probability = self._probability(rows[kind])
                admitted = risk.admits(probability, np.nan) | (probability > self.limit)
                score[kind] = np.where(admitted, probability, np.inf)
        return score

    @property
    def limit(self) -> float:
        """The largest score at which a prediction is accurate enough."""
        if self._settings.max_disagreement is None:
            return self._settings.tolerance or -math.inf  # 0 computes all
        assert self.fit is not None
        assert self.fit.probability is not None
        return self.fit.probability.limit(self._settings.max_disagreement)

    def _probability(self, rows: Int[np.ndarray, " known"]) -> Float[np.ndarray, " known"]:
        """Return the calibrated probabilities that predicted labels are wrong."""
        assert self.fit is not None
        assert self.fit.probability is not None
        assert self.mean is not None
        return self.fit.probability(self.mean[rows], self._table["expected"][rows], self.mean[rows])

    def predict(
        self, rows: Int[np.ndarray, " open"]
    ) -> tuple[Bool[np.ndarray, " open"], Float[np.ndarray, " open"]]:
        """Store predictions of open rows as a run ends; rows that are too uncertain become FAILED.

        Returns:
            The mask of rows that are predicted accurately enough, and error bars or error
            probabilities. A row with too large an error bar has a prediction, too.
        """
        table, failed = self._table, self._table["state"][rows] == FAILED
        score = self.score(rows, table.late[rows] | (table["tries"][rows] > 0))
        good = np.zeros(len(rows), bool)
        if self.fit is not None:
            good = (score <= self.limit) & ~(failed & table["raised"][rows])
        table["state"][rows[~good]] = FAILED
        given = good | (np.isfinite(score) & ~failed)
        if given.any():
            few, values = rows[given], table.values
            assert self.mean is not None
            assert values is not None
            predicted = self.mean[few].reshape(-1, *values.shape[1:]).astype(values.dtype)
            state = np.where(good[given], PREDICTED, FAILED)
            table.put(few, predicted, score[given], state, table["expected"][few])
        return good, score
