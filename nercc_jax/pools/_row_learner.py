"""Predictions of rows that have not been computed, and how far they may be off.

A learner is fitted to computed rows on a thread of its own, so that nothing waits for it. Between
two fits it learns the rows that have come since, which takes a hundredth of the time. Its error
bars are calibrated on rows that were drawn at random and computed after they had been predicted,
and what may be given out is decided as on a server (`Risk`): by these audits, and by the
rows that came late. A new learner's errors are not those of the learner before it: so it is
compared with all audits and late rows that have come, those that it has learned left out one at a
time, and evidence on the earlier one is dropped. Error bars are a quantile of these errors over
their deviations: the audits', and late rows', too, for those that are late or like them.
"""

import collections
import functools
import logging
import math
import threading
import time
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from ..evaluation._criteria import row_errors
from ..risk import Accuracy, Comparison, Risk
from ..risk._accuracy import conformal_quantile, error_ratios
from ..risk._answer_check import AnswerCheck, fit_answer_check
from ..schemes._calibrate import FittedScheme
from ..surrogates import Learner
from ._clock import TimeShare, WallClock
from ._row_checks import OF_CALLS
from ._row_files import RowTable
from ._row_predictions import (
    CAPACITY,
    FEW,
    NEWS,
    LeftOut,
    Neighbours,
    fit_rows,
    leave_out,
    like_late,
    most_telling,
    part_of,
    predict,
    update,
    window_of,
)

_LOG = logging.getLogger(__name__)

LEARNER_THREAD = "nercc-learner"  # for which the end of a process waits

_FIRST = 96  # rows of the first fit
_SHARE = 0.5  # of the time that learning may take
# Where the least certain rows are computed, late rows' bars are a quantile of audits' and late
# rows' errors together, unless more than this multiple of the errors that may be beyond them are.
# Late rows alone make bars too long, since one that is left out leaves a larger gap than there is
# around those that wait (96 to 99 % of Lotka-Volterra's slow rows were covered). Where all rows are
# computed, nothing but time decides which have come. Then errors nearby say too little of gaps.
_HARDER = 2.0


class CheckedRows(NamedTuple):
    """Computed rows that a learner has looked at, with the check, for rows to come.

    Residuals are in units of deviations, uncorrelated.
    """

    rows: Int[np.ndarray, " rows"]
    looks_wrong: Bool[np.ndarray, " rows"]
    residuals: Float[np.ndarray, "rows outputs"]
    check: AnswerCheck


class RowEstimates(NamedTuple):
    """Predictions of some rows, as vectors, and how far they may be off, in units of the outputs.

    `plain` are the learner's own deviations (`predict`). Rows are `like_late` if such rows came
    late; the `telling` ones tell most about the others, in that order. `left_out` and `audited` are
    predictions of the late rows and the audits that had come when the learner was begun, and
    `checked` are computed rows that nobody had looked at.
    """

    rows: Int[np.ndarray, " rows"]
    mean: Float[np.ndarray, "rows outputs"]
    deviation: Float[np.ndarray, " rows"]
    plain: Float[np.ndarray, " rows"]
    like_late: Bool[np.ndarray, " rows"]
    telling: Int[np.ndarray, " few"]
    fitted: FittedScheme
    left_out: LeftOut | None = None
    audited: LeftOut | None = None
    checked: CheckedRows | None = None


class RowLearner:
    """The latest estimate of all rows, and the thread that makes the next one.

    Args:
        target: The accuracy at which a row is known well enough.
        x: The inputs of all rows.
        audits: Rows that are computed whatever is known of them, drawn at random.
        check_rate: The share of right answers that may look wrong, if answers are checked.
        selects: Whether only rows are computed that are not known well enough, and not all.
    """

    def __init__(
        self,
        target: Accuracy,
        x: Shaped[np.ndarray, "rows ..."],
        audits: Bool[np.ndarray, " rows"],
        check_rate: float | None = None,
        selects: bool = True,
    ):
        self._target, self._x, self._audits = target, x, audits
        self._selects = selects
        self._check_rate = check_rate
        self._check: AnswerCheck | None = None
        self._distrusted = False  # whether wrong values calibrate the check in the making
        self.checked: CheckedRows | None = None  # by the latest estimate
        self._due = _FIRST
        self.fitted: FittedScheme | None = None
        self.known = np.zeros(len(x), bool)  # rows that have an estimate
        self.mean: Float[np.ndarray, "rows outputs"] | None = None
        self.deviation, self._plain = np.full(len(x), np.inf), np.full(len(x), np.inf)
        self.seconds = 0.5  # that the last fit took; a guess before the first
        self._learned = np.zeros(len(x), bool)  # rows that the learner has been given
        self._like_late = np.zeros(len(x), bool)  # rows whose neighbours came late
        self._late = np.zeros(len(x), bool)  # rows that were late when these were last looked for
        self._telling = np.zeros(0, int)
        # Ratios of errors to deviations, of audits and of late rows.
        self._ratios: dict[bool, list[float]] = {False: [], True: []}
        self._risks = {late: Risk(target, needs_evidence=late) for late in (False, True)}
        self._held: dict[bool, list[bool]] = {False: [], True: []}
        # Rows, and their values, that have come since the learner in the making was begun.
        self._since: dict[bool, list[tuple[np.ndarray, np.ndarray]]] = {False: [], True: []}
        self._thread: threading.Thread | None = None
        self._made: collections.deque[RowEstimates] = collections.deque()
        self._time = TimeShare(WallClock(), _SHARE)

    # Learning.

    @functools.cached_property
    def _features(self) -> Float[np.ndarray, "rows inputs"]:
        """The learner's inputs, which a run that learns nothing does without."""
        return standardized_inputs(self._x)

    @property
    def busy(self) -> bool:
        """Return whether the thread is at work, or has just been: it leaves the cores to others."""
        if self._thread is not None and self._thread.is_alive():
            return True
        return time.monotonic() < self._time.next and self.fitted is not None

    @property
    def at_work(self) -> bool:
        """Return whether an estimate is being made, or is there to be taken."""
        return self.busy or bool(self._made)

    @property
    def outdated(self) -> bool:
        """Return whether rows were learned that have been taken back."""
        return not self._due

    def forget_check(self) -> None:
        """Look at nothing with the check, or that in the making: wrong values calibrated it."""
        self._check, self._distrusted = None, True

    def forget(self, rows: Int[np.ndarray, " few"]) -> None:
        """Learn all anew without these rows, if any was learned."""
        if self._learned[rows].any():
            self._due = 0
        self._learned[rows] = self.known[rows] = False

    def begin(
        self,
        computed: Int[np.ndarray, " some"],
        y: Float[np.ndarray, "rows outputs"],
        open_rows: Int[np.ndarray, " others"],
        late: Bool[np.ndarray, " rows"],
        hurry: bool = False,
        unchecked: Int[np.ndarray, " few"] | tuple[()] = (),
    ) -> None:
        """Learn computed rows, if there are enough new ones, and predict the open ones.

        All computed rows have finite values. In a `hurry`, a first fit does with as few as there
        may be. Nobody has looked at the values of `unchecked` ones, which are predicted, too.
        """
        if self.busy or len(computed) < _FIRST // 4:
            return
        features, fitted = self._features[open_rows], self.fitted
        new = computed[~self._learned[computed]]
        full = fitted is not None and fitted.pairs >= CAPACITY and self._due > 0
        if (len(computed) >= self._due and not full) or (hurry and fitted is None):
            # Where nothing is to be predicted, and a check is waited for, a small learner will do.
            most = FEW - 1 if hurry and not len(open_rows) else CAPACITY
            chosen, self._due = self._chosen(computed, most), 2 * len(computed)
            if len(computed) < FEW:  # a larger learner as soon as there may be one
                self._due = min(self._due, FEW)
            job = functools.partial(fit_rows, self._features[chosen], y[chosen], self._target)
            self._learned[computed] = True
        elif fitted is not None and len(new) >= NEWS:
            new = new[-CAPACITY:]
            job = functools.partial(update, fitted, self._features[new], y[new])
            self._learned[new] = True
        elif fitted is not None and len(unchecked):
            job = lambda: fitted  # noqa: E731
        else:
            return
        self._since, self._distrusted = {False: [], True: []}, False
        came_late = computed[late[computed]]
        audits = computed[self._audits[computed] & ~late[computed]]
        groups = came_late, audits, np.asarray(unchecked, int)
        known = np.unique(np.concatenate(groups))
        own, neighbours = y[known], self._neighbours(computed, y, late)

        def work() -> None:
            begin = time.monotonic()
            try:
                if (learned := job()) is not None:
                    window = window_of(learned, self._selects)
                    predicted = predict(learned, window, features)
                    like = like_late(features, predicted[0], *neighbours)
                    telling = open_rows[most_telling(learned, features, predicted[1])]
                    left_out = leave_out(learned, window, self._features[known], own)
                    places = [np.searchsorted(known, group) for group in groups]
                    came, audited = (left_out and part_of(left_out, each) for each in places[:2])
                    checked = self._look_at(groups[2], places[2], left_out)
                    evidence = came, audited, checked
                    made = RowEstimates(open_rows, *predicted, like, telling, learned, *evidence)
                    self._made.append(made)
            finally:
                self.seconds = self._time.spend(begin)

        # No daemon: a process must not end in the middle of LAPACK's work.
        self._thread = threading.Thread(target=work, name=LEARNER_THREAD)
        self._thread.start()

    def look(self) -> bool:
        """Take a new estimate, if there is one; return whether there was."""
        if not self._made:
            return False
        made = self._made.pop()
        self.fitted, self._telling = made.fitted, made.telling
        self.checked = None if self._distrusted else made.checked
        if self.checked is not None:
            self._check = self.checked.check
        if self.mean is None:
            self.mean = np.zeros((len(self.known), made.mean.shape[1]), np.float32)
        self.known[made.rows], self._like_late[made.rows] = True, made.like_late
        self.mean[made.rows], self.deviation[made.rows] = made.mean, made.deviation
        self._plain[made.rows], self._late[:] = made.plain, False
        self._compare_again(made.audited, late=False)
        self._compare_again(made.left_out, late=True)
        return True

    def notice_late(
        self,
        rows: Int[np.ndarray, " open"],
        computed: Int[np.ndarray, " some"],
        y: Float[np.ndarray, "rows outputs"],
        late: Bool[np.ndarray, " rows"],
    ) -> None:
        """Find the open rows that are like rows which have been late since an estimate was begun.

        A run must not end by bars of quick rows because the next estimate is still in the making.
        """
        rows = rows[self.known[rows] & ~self._like_late[rows]]
        if self.mean is None or not len(rows) or not (late & ~self._late).any():
            return
        self._late = late
        neighbours = self._neighbours(computed, y, late)
        self._like_late[rows] = like_late(self._features[rows], self.mean[rows], *neighbours)

    def _compare_again(self, left_out: LeftOut | None, late: bool) -> None:
        """Replace evidence on the learner before by comparisons of this one, if there are enough.

        `left_out` are its predictions of rows that had come when it was begun, late or not.
        """
        assert self.mean is not None
        parts = [] if left_out is None else [left_out]
        for rows, y in self._since[late]:
            new = self._tells(rows)
            rows, y = rows[new], y[new]
            parts.append(LeftOut(self.mean[rows], self.deviation[rows], y, self._plain[rows]))
        risk = self._risks[late]
        if sum(len(part.y) for part in parts) < max(risk.needed, 1):
            return
        mean, deviation, y, _ = map(np.concatenate, zip(*parts, strict=True))
        error = _errors(mean, y)
        self._ratios[late] = _ratios(error, deviation)
        risk.replace(self._compared(mean, deviation, y, error, late))

    def resume(self, fitted: FittedScheme, table: RowTable) -> None:
        """Go on with what an earlier run learned, and what it computed."""
        rows, window = np.flatnonzero(~table.done), window_of(fitted, self._selects)
        predicted = predict(fitted, window, self._features[rows])
        audits = table.learnable[self._audits[table.learnable]]
        audited = leave_out(fitted, window, self._features[audits], table.vectors[audits])
        unknown, nothing = np.zeros(len(rows), bool), rows[:0]
        self._made.append(RowEstimates(rows, *predicted, unknown, nothing, fitted, None, audited))
        self.look()

    def _chosen(self, computed: np.ndarray, most: int) -> np.ndarray:
        """Return the rows to fit to, so that every fourth, which calibrates, is one at random."""
        random = np.random.default_rng(len(computed)).permutation(computed)
        audited = random[self._audits[random]]
        others = random[~self._audits[random]]
        count = min(len(computed), most)
        held = count // 4
        last = np.concatenate([audited, others])[:held]
        rest = np.setdiff1d(random, last, assume_unique=True)
        rest = np.random.default_rng(0).permutation(rest)[: count - held]
        chosen = np.empty(count, int)
        places = np.arange(count) % 4 == 3
        chosen[places], chosen[~places] = last, rest
        return chosen

    def _neighbours(
        self,
        computed: Int[np.ndarray, " some"],
        y: Float[np.ndarray, "rows outputs"],
        late: Bool[np.ndarray, " rows"],
    ) -> tuple[Neighbours, Neighbours]:
        """Return inputs, and outputs, of rows of which it is known whether they are late."""
        rows = np.union1d(computed, np.flatnonzero(late))
        rows = np.random.default_rng(len(rows)).permutation(rows)[:CAPACITY]
        known = rows[np.isin(rows, computed)]
        return Neighbours(self._features[rows], late[rows]), Neighbours(y[known], late[known])

    def _look_at(
        self,
        rows: Int[np.ndarray, " few"],
        places: Int[np.ndarray, " few"],
        left_out: LeftOut | None,
    ) -> CheckedRows | None:
        """Look at the values of rows; None if answers are not checked, or cannot be.

        There are two checks, each of which looks at the rows from which it has learned nothing but
        its limit. They go by the learner's own deviations: a wrong value makes those of its
        neighbours large. The rows have these places among those that were predicted; the others
        calibrate, too.
        """
        if self._check_rate is None or left_out is None:
            return None
        finite = np.flatnonzero(np.isfinite(left_out.y).all(axis=1))
        order = np.random.default_rng(0).permutation(finite)[: 2 * CAPACITY]
        labels, looks_wrong = self._target.tolerance is None, np.zeros(len(rows), bool)
        residuals = np.zeros((len(rows), left_out.y.shape[1]), np.float32)
        halves, rate = np.array_split(order, 2), (1 - OF_CALLS) * self._check_rate
        for one, other in (halves, halves[::-1]):
            both = part_of(left_out, np.concatenate([one, other]))
            # A quarter of the answers that may look wrong are those with the largest residuals.
            check = fit_answer_check(
                both.mean, both.plain, both.y, rate, labels=labels, blatant=0.25
            )
            if check.limit == np.inf:
                return None  # too few rows
            chosen = ~np.isin(places, one)
            part = part_of(left_out, places[chosen])
            looks_wrong[chosen] = check.suspicious(part.mean, part.plain, part.y)
            residuals[chosen] = check.residuals(part.mean, part.plain, part.y)
        return CheckedRows(rows, looks_wrong, residuals, check)

    def look_wrong(
        self, rows: Int[np.ndarray, " some"], values: Float[np.ndarray, "some outputs"]
    ) -> tuple[
        Bool[np.ndarray, " some"], Bool[np.ndarray, " some"], Float[np.ndarray, "some outputs"]
    ]:
        """Return which values of rows look wrong, of which that can be told, and residuals."""
        found, known = np.zeros(len(rows), bool), np.zeros(len(rows), bool)
        residuals = np.zeros(values.shape, np.float32)
        if self._check is not None and self.mean is not None:
            known = self.known[rows]
            expected = self.mean[rows[known]], self._plain[rows[known]]
            found[known] = self._check.suspicious(*expected, values[known])
            residuals[known] = self._check.residuals(*expected, values[known])
        return found, known, residuals

    # What may be given out.

    def score(
        self, rows: Int[np.ndarray, " some"], late: bool = False
    ) -> Float[np.ndarray, " some"]:
        """Return the rows' error bars or error probabilities; infinite where nothing is known.

        Late rows, and those like them, may be harder than others. So their bars are those of other
        rows that came late, and infinite before there are enough.
        """
        score = np.full(len(rows), np.inf)
        known = self.known[rows]
        if self.fitted is None or self.mean is None or not known.any():
            return score
        expected = self.mean[rows[known]], self.deviation[rows[known]]
        straggle = late | self._like_late[rows[known]]
        score[known] = np.where(
            straggle, *(self._admitted(*expected, each) for each in (True, False))
        )
        return score

    def _estimated(
        self,
        mean: Float[np.ndarray, "known outputs"],
        deviation: Float[np.ndarray, " known"],
        late: bool,
    ) -> tuple[Float[np.ndarray, " known"], Float[np.ndarray, " known"]]:
        """Return the probabilities that labels are wrong, and error bars, by the calibration.

        With a tolerance the first are NaN, otherwise the second.
        """
        assert self.fitted is not None
        scheme, nothing = self.fitted.scheme, np.full(len(mean), np.nan)
        if self._target.tolerance is None:
            assert scheme.error_probability is not None
            return scheme.error_probability(mean, deviation, mean), nothing
        coverage, own = self._target.coverage, np.array(self._ratios[late])
        factor = conformal_quantile(np.append(own, self._ratios[False] if late else []), coverage)
        if not self._selects or np.sum(own > factor) > _HARDER * (1 - coverage) * len(own):
            factor = max(conformal_quantile(own, coverage), factor)
        return nothing, deviation * factor

    def _compared(
        self,
        mean: Float[np.ndarray, "known outputs"],
        deviation: Float[np.ndarray, " known"],
        y: Float[np.ndarray, "known outputs"],
        error: Float[np.ndarray, " known"],
        late: bool,
    ) -> list[Comparison]:
        """Compare predictions with the rows' own values, from which they differ by `error`."""
        probability, bar = self._estimated(mean, deviation, late)
        differs = np.argmax(mean, axis=1) != np.argmax(y, axis=1)
        facts = (each.tolist() for each in (probability, bar, differs, error_ratios(error, bar)))
        return [Comparison(*each) for each in zip(*facts, strict=True)]

    def _admitted(
        self,
        mean: Float[np.ndarray, "some outputs"],
        deviation: Float[np.ndarray, " some"],
        late: bool,
    ) -> Float[np.ndarray, " some"]:
        """Return scores by the evidence on audits or late rows; infinite where that forbids them.

        Until as many late rows were compared as are needed, it forbids all.
        """
        risk = self._risks[late]
        if risk.waits and not risk.enough:
            return np.full(len(deviation), np.inf)
        probability, bar = self._estimated(mean, deviation, late)
        if self._target.tolerance is not None:
            return bar
        admitted = risk.admits(probability, bar)
        return np.where(admitted | (probability > self.limit), probability, np.inf)

    @property
    def limit(self) -> float:
        if self._target.tolerance is not None:
            return self._target.tolerance or -math.inf  # 0 computes all
        assert self.fitted is not None
        assert self._target.max_disagreement is not None
        probability = self.fitted.scheme.error_probability
        assert probability is not None
        return probability.limit(self._target.max_disagreement)

    def order(self, rows: Int[np.ndarray, " some"]) -> Int[np.ndarray, " some"]:
        """Return these rows in the order in which to compute them.

        The least certain come first, those that tell most about the others before all. Among them
        are the audits, one in four, in their own order, which is random.
        """
        audits = rows[self._audits[rows]]
        audits = np.random.default_rng(0).permutation(audits)
        others = rows[~self._audits[rows]]
        others = others[np.argsort(-self.deviation[others], kind="stable")]
        telling = self._telling[np.isin(self._telling, others)]
        others = np.concatenate([telling, others[~np.isin(others, telling)]])
        places = np.concatenate([4.0 * np.arange(len(audits)), np.arange(len(others)) * 4 / 3 + 1])
        return np.concatenate([audits, others])[np.argsort(places, kind="stable")].astype(int)

    def compare(
        self,
        rows: Int[np.ndarray, " some"],
        y: Float[np.ndarray, "some outputs"],
        late: bool,
    ) -> None:
        """Compare rows that have come with what was predicted of them, where that counts."""
        counts = np.isfinite(y).all(axis=1)
        if not late:
            counts &= self._audits[rows]
        self._since[late].append((rows[counts], y[counts]))
        counts &= self.known[rows]
        if self.mean is None or self.fitted is None or not counts.any():
            return
        counts &= self._tells(rows)
        rows, y = rows[counts], y[counts]
        score, mean, deviation = self.score(rows, late), self.mean[rows], self.deviation[rows]
        error = _errors(mean, y)
        compared, sure = self._compared(mean, deviation, y, error, late), score <= self.limit
        if self._target.tolerance is None:
            right = np.array([not each.wrong for each in compared])
            self._held[late] += right[sure].tolist()
        else:
            self._held[late] += (error <= score)[np.isfinite(score)].tolist()
            self._ratios[late] += _ratios(error, deviation)
        risk = self._risks[late]
        for given, each in zip(sure.tolist(), compared, strict=True):
            if given:
                risk.give()
            if risk.add(each, given=given):
                self._ratios[late].clear()

    def _tells(self, rows: Int[np.ndarray, " some"]) -> Bool[np.ndarray, " some"]:
        """Return which rows' errors count: those of inputs that the learner has no answer to."""
        learner = None if self.fitted is None else self.fitted.scheme.surrogate
        if not isinstance(learner, Learner):
            return np.ones(len(rows), bool)
        return ~learner.knows(self._features[rows])

    def held(self, late: bool) -> tuple[int, int]:
        """Return how many bars held, and of how many rows: audited ones, or those that came late.

        Of labels, how many predictions were right of those that were sure enough.
        """
        return sum(self._held[late]), len(self._held[late])


def standardized_inputs(x: Shaped[np.ndarray, "rows ..."]) -> Float[np.ndarray, "rows inputs"]:
    """Return the learner's inputs, in units of their spread, at which float32 is precise enough."""
    x = x.reshape(len(x), math.prod(x.shape[1:]))
    features = np.empty(x.shape, np.float32)
    mean = x.mean(axis=0, dtype=np.float64)
    step = max((1 << 22) // max(x.shape[1], 1), 1)
    parts = [slice(place, place + step) for place in range(0, len(x), step)]
    spread = np.sqrt(sum(np.sum((x[part] - mean) ** 2, axis=0) for part in parts) / len(x))
    for part in parts:  # rows may take most of the memory, and float64 twice as much
        features[part] = (x[part] - mean) / np.where(spread > 0, spread, 1)
    return features


def _errors(
    mean: Float[np.ndarray, "rows outputs"], y: Float[np.ndarray, "rows outputs"]
) -> Float[np.ndarray, " rows"]:
    """Return `row_errors` in float32, the precision of the means."""
    return row_errors(mean, y.astype(np.float32))


def _ratios(
    error: Float[np.ndarray, " rows"], deviation: Float[np.ndarray, " rows"]
) -> list[float]:
    counts = (deviation > 0) & np.isfinite(deviation)
    return (error[counts] / deviation[counts]).tolist()
