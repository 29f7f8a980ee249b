"""The latest estimate of all rows, and the evidence on how far estimates are off.

Error bars are calibrated on audits: rows that were drawn at random and computed after they had been
predicted. What may be given out is decided as on a server (`Risk`): by the audits, and by
the rows that came late. A new learner's errors are not those of the learner before it: so it is
compared with all audits and late rows that have come, those that it has learned left out one at a
time, and evidence on the earlier one is dropped. Error bars are a quantile of these errors over
their deviations: the audits', and late rows', too, for those that are late or like them.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from ..evaluation.criteria import row_errors
from ..risk import Comparison, Risk
from ..risk._accuracy import conformal_quantile, error_ratios
from ..risk._answer_check import AnswerCheck
from ._interface import RowSettings
from ._learner import CAPACITY, FEW, FittedLearner, Lateness, Learned, learn, like_late
from ._table import COMPUTED, PREDICTED, RowTable

FIRST = 96  # rows of the first fit
NEWS = 32  # rows that are learned together between two fits
# Where the least certain rows are computed, late rows' bars are a quantile of audits' and late
# rows' errors together, unless more than this multiple of the errors that may be beyond them are.
# Late rows alone make bars too long, since one that is left out leaves a larger gap than there is
# around those that wait (96 to 99 % of Lotka-Volterra's slow rows were covered). Where all rows are
# computed, nothing but time decides which have come. Then errors nearby say too little of gaps.
_HARDER = 2.0


class _Errors(NamedTuple):
    """Evidence on one kind of rows, audits or late ones.

    Errors in `risk` are compared with deviations, and `held` says which bars covered the error (of
    labels, which were right of those that were sure enough).
    """

    risk: Risk
    held: list[bool]


class Evidence:
    """Estimates of all rows, in columns of their table, and what may be given out.

    Args:
        settings: The accuracy at which a row is known well enough, among others.
        x: The inputs of all rows.
        table: All that is known of each row.
    """

    def __init__(self, settings: RowSettings, x: Shaped[np.ndarray, "rows ..."], table: RowTable):
        self._settings, self._x, self._table = settings, x, table
        self.fit: FittedLearner | None = None
        self.mean: Float[np.ndarray, "rows outputs"] | None = None
        self._check: AnswerCheck | None = None
        self._distrusted = False  # whether wrong values calibrate the check in the making
        # Computed rows at which a learner is fitted to all; 0: some that it knows were taken back.
        self.due = FIRST
        self.audits = _Errors(Risk(settings.accuracy, needs_evidence=False), [])
        self.late = _Errors(Risk(settings.accuracy, needs_evidence=True), [])

    @functools.cached_property
    def _features(self) -> Float[np.ndarray, "rows inputs"]:
        """The learner's inputs: in units of their spread, at which float32 is precise enough."""
        x = self._x.reshape(len(self._x), math.prod(self._x.shape[1:]))
        mean, spread = x.mean(axis=0, dtype=float), x.std(axis=0, dtype=float)
        return ((x - mean) / np.where(spread > 0, spread, 1)).astype(np.float32)

    # Learning.

    def distrust(self) -> None:
        """Look at nothing with the check, or that in the making: wrong values calibrated it."""
        self._check, self._distrusted = None, True

    def forget(self, rows: Int[np.ndarray, " few"]) -> None:
        """Learn all again without these rows, if any was learned."""
        if self._table["learned"][rows].any():
            self.due = 0
        self._table["learned"][rows] = self._table["estimated"][rows] = False

    def task(self, *, hurry: bool = False) -> Callable[[], Learned | None] | None:
        """Return the work to learn from computed rows; None where there are too few new ones.

        In a `hurry`, a first fit does with as few as there may be.
        """
        table, fit, learned = self._table, self.fit, self._table["learned"]
        computed, others, late, y = table.learnable, table.open, table.late, table.vectors
        unchecked = computed[:0] if self._settings.check_answers is None else table.unchecked
        new = computed[~learned[computed]]
        pairs = new[:0]
        full = fit is not None and fit.pairs >= CAPACITY and self.due > 0
        if len(computed) < FIRST // 4:
            return None
        if (len(computed) >= self.due and not full) or (hurry and fit is None):
            # Where nothing is to be predicted, and a check is waited for, a small learner will do.
            count = min(len(computed), FEW - 1 if hurry and not len(others) else CAPACITY)
            # Every fourth, which calibrates, is one at random: an audit, as far as there are any.
            random = np.random.default_rng(len(computed)).permutation(computed)
            last = random[np.argsort(~table["audit"][random], kind="stable")][: count // 4]
            rest = random[~np.isin(random, last)][: count - count // 4]
            places, pairs = np.arange(count) % 4 == 3, np.empty(count, int)
            pairs[places], pairs[~places] = last, rest
            fit, self.due = None, 2 * len(computed)
            if len(computed) < FEW:  # a larger learner as soon as there may be one
                self.due = min(self.due, FEW)
            learned[computed] = True
        elif fit is not None and len(new) >= NEWS:
            pairs = new[-CAPACITY:]
            learned[pairs] = True
        elif fit is None or not len(unchecked):
            return None
        self._distrusted = False
        known = np.union1d(computed[table["audit"][computed] | late[computed]], unchecked)
        rows = np.concatenate([others, known])
        return functools.partial(
            learn, fit, self._features[pairs], y[pairs], rows=rows, features=self._features[rows],
            known_y=y[known], lateness=self._lateness(), settings=self._settings,
        )  # fmt: skip

    def take(self, learned: Learned) -> bool:
        """Take a new estimate, and compare it again with all that has come.

        Returns:
            Whether there is a new check, by which values that came before may be looked at.
        """
        rows, table, self.fit = learned.rows, self._table, learned.fit
        checks = learned.check is not None and not self._distrusted
        self._check = learned.check if checks else self._check
        if self.mean is None:
            self.mean = np.zeros((len(table.rows), learned.mean.shape[1]), np.float32)
        self.mean[rows], table["estimated"][rows] = learned.mean, True
        for name, column in learned.columns.items():
            table[name][rows] = column
        computed = table.learnable
        late = table["late"][computed]
        audits = table["audit"][computed] & ~late
        for errors, kind in ((self.audits, computed[audits]), (self.late, computed[late])):
            kind = kind[table["estimated"][kind] & self.tells(kind)]
            if len(kind) >= max(errors.risk.needed, 1):  # else the evidence before is better
                errors.risk.replace(self._compared(kind, table.vectors[kind].astype(np.float32)))
        return checks

    def notice_late(self) -> None:
        """Find the open rows that are like rows which have been late since an estimate was begun.

        A run must not end by bars of quick rows because the next estimate is still in the making.
        """
        table, rows = self._table, self._table.open
        rows = rows[table["estimated"][rows] & ~table["like_late"][rows]]
        if self.mean is not None and len(rows) and table.late.any():
            found = like_late(self._features[rows], self.mean[rows], self._lateness())
            table["like_late"][rows] = found

    def _lateness(self) -> Lateness:
        """Return inputs, and outputs, of rows of which it is known whether they are late."""
        table, late = self._table, self._table.late
        computed = table.learnable
        rows = np.union1d(computed, np.flatnonzero(late))
        rows = np.random.default_rng(len(rows)).permutation(rows)[:CAPACITY]
        known = rows[np.isin(rows, computed)]
        return (self._features[rows], late[rows]), (table.vectors[known], late[known])

    def look_wrong(
        self, rows: Int[np.ndarray, " some"], values: Float[np.ndarray, "some outputs"]
    ) -> tuple[Bool[np.ndarray, " some"], Bool[np.ndarray, " some"]]:
        """Return which values of rows look wrong, and of which that can be told."""
        found, known = np.zeros(len(rows), bool), np.zeros(len(rows), bool)
        if self._check is not None and self.mean is not None:
            known = self._table["estimated"][rows]
            expected = self.mean[rows[known]], self._table["plain"][rows[known]]
            found[known] = self._check.suspicious(*expected, values[known])
        return found, known

    # Decisions.

    def score(
        self, rows: Int[np.ndarray, " some"], late: Bool[np.ndarray, " some"] | bool = False
    ) -> Float[np.ndarray, " some"]:
        """Return the rows' error bars or error probabilities; infinite where nothing is known.

        Late rows, and those like them, may be harder than others. So their bars are those of other
        rows that came late, and infinite before there are enough.
        """
        score, straggles = np.full(len(rows), np.inf), self._table["like_late"][rows] | late
        known = self._table["estimated"][rows]
        for errors, kind in ((self.audits, known & ~straggles), (self.late, known & straggles)):
            if kind.any() and not (errors.risk.waits and not errors.risk.enough):
                if self._settings.tolerance is not None:
                    score[kind] = self._factor(errors) * self._table["expected"][rows[kind]]
                    continue
                probability = self._probability(rows[kind])
                admitted = errors.risk.admits(probability, np.nan) | (probability > self.limit)
                score[kind] = np.where(admitted, probability, np.inf)
        return score

    @property
    def limit(self) -> float:
        """The largest score of a row that is known well enough."""
        if self._settings.max_disagreement is None:
            return self._settings.tolerance or -math.inf  # 0 computes all
        assert self.fit is not None
        assert self.fit.probability is not None
        return self.fit.probability.limit(self._settings.max_disagreement)

    def _factor(self, errors: _Errors) -> float:
        """Return the factor by which deviations of one kind of rows become error bars."""
        coverage, own = self._settings.coverage, errors.risk.excesses
        both = own if errors is self.audits else np.append(own, self.audits.risk.excesses)
        factor = conformal_quantile(both, coverage)
        selects = self._settings.compute == "needed"
        if not selects or np.sum(own > factor) > _HARDER * (1 - coverage) * len(own):
            factor = max(conformal_quantile(own, coverage), factor)
        return factor

    def _probability(self, rows: Int[np.ndarray, " known"]) -> Float[np.ndarray, " known"]:
        """Return the probabilities that labels are wrong, by the calibration."""
        assert self.fit is not None
        assert self.fit.probability is not None
        assert self.mean is not None
        return self.fit.probability(self.mean[rows], self._table["expected"][rows], self.mean[rows])

    def _compared(
        self, rows: Int[np.ndarray, " some"], y: Float[np.ndarray, "some outputs"]
    ) -> list[Comparison]:
        """Compare predictions with the rows' own values: errors are in units of deviations."""
        assert self.mean is not None
        mean, deviation = self.mean[rows], self._table["expected"][rows]
        probability = np.full(len(rows), np.nan)
        if self._settings.tolerance is None:
            probability = self._probability(rows)
        known = np.where((deviation > 0) & np.isfinite(deviation), deviation, np.nan)
        differs = np.argmax(mean, axis=1) != np.argmax(y, axis=1)
        ratios = error_ratios(row_errors(mean, y), known)
        facts = (each.tolist() for each in (probability, known, differs, ratios))
        return [Comparison(*each) for each in zip(*facts, strict=True)]

    def compare(
        self,
        rows: Int[np.ndarray, " some"],
        y: Float[np.ndarray, "some outputs"],
        late: bool,
        over: bool = False,
    ) -> None:
        """Compare rows that have come with what was predicted of them, where that counts.

        Once the run is `over`, they judge the bars of rows that were not waited for, each once, and
        change nothing else.
        """
        table, errors = self._table, self.late if late else self.audits
        labels = self._settings.tolerance is None
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
        rows, y = rows[counts], y[counts].astype(np.float32)
        if not over:
            judges = self.tells(rows)
            rows, y = rows[judges], y[judges]
        score = table["score"][rows] if over else self.score(rows, late)
        sure = score <= self.limit
        wrong = np.argmax(self.mean[rows], axis=1) != np.argmax(y, axis=1)
        held = row_errors(self.mean[rows], y) <= score
        judged = sure | over if labels else np.isfinite(score)
        errors.held.extend((~wrong if labels else held)[judged].tolist())
        factor = 1.0 if labels else self._factor(errors)
        given = [] if over else zip(sure.tolist(), self._compared(rows, y), strict=True)
        for admitted, each in given:
            if admitted:
                errors.risk.give()
            errors.risk.add(each, given=admitted, widened=factor)

    def tells(self, rows: Int[np.ndarray, " some"]) -> Bool[np.ndarray, " some"]:
        """Return which rows' errors count: predicted by a learner with no answer to the input."""
        assert self.fit is not None
        tells = self._table["left_out"][rows]
        tells[~tells] = ~self.fit.learner.knows(self._features[rows[~tells]])
        return tells

    def order(
        self, rows: Int[np.ndarray, " some"], adds: Float[np.ndarray, " some"] | None = None
    ) -> Int[np.ndarray, " some"]:
        """Return these rows in the order in which to compute them: the least certain come first.

        Those come before that add most to a statistic's interval, if the run is for one. Among them
        are the audits, one in four, in their own order, which is random.
        """
        audited = self._table["audit"][rows]
        audits, others = np.random.default_rng(0).permutation(rows[audited]), rows[~audited]
        added = np.zeros(len(others)) if adds is None else adds[~audited]
        others = others[np.lexsort((-self._table["expected"][others], -added))]
        places = np.concatenate([4.0 * np.arange(len(audits)), np.arange(len(others)) * 4 / 3 + 1])
        return np.concatenate([audits, others])[np.argsort(places, kind="stable")].astype(int)
