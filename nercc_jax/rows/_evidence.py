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

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from ..evaluation._criteria import row_errors
from ..risk import Comparison, Risk
from ..risk._accuracy import conformal_quantile, error_ratios
from ..risk._answer_check import AnswerCheck
from ._interface import RowSettings
from ._learner import CAPACITY, FEW, FittedLearner, Learned, LearnerTask, Neighbours, like_late
from ._table import RowTable

FIRST = 96  # rows of the first fit
NEWS = 32  # rows that are learned together between two fits
# Where the least certain rows are computed, late rows' bars are a quantile of audits' and late
# rows' errors together, unless more than this multiple of the errors that may be beyond them are.
# Late rows alone make bars too long, since one that is left out leaves a larger gap than there is
# around those that wait (96 to 99 % of Lotka-Volterra's slow rows were covered). Where all rows are
# computed, nothing but time decides which have come. Then errors nearby say too little of gaps.
_HARDER = 2.0


class _Errors:
    """Evidence on one kind of rows, audits or late ones.

    `ratios` are errors over deviations, and `held` says which bars covered the error (of labels,
    which were right of those that were sure enough).
    """

    def __init__(self, risk: Risk):
        self.risk = risk
        self.ratios: list[float] = []
        self.held: list[bool] = []


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
        self._telling = np.zeros(0, int)
        self._check: AnswerCheck | None = None
        self._distrusted = False  # whether wrong values calibrate the check in the making
        # Computed rows at which a learner is fitted to all; 0: some that it knows were taken back.
        self.due = FIRST
        self.audits = _Errors(Risk(settings.accuracy, needs_evidence=False))
        self.late = _Errors(Risk(settings.accuracy, needs_evidence=True))

    @functools.cached_property
    def _features(self) -> Float[np.ndarray, "rows inputs"]:
        """The learner's inputs, which a run that learns nothing does without."""
        return standardized_inputs(self._x)

    # Learning.

    def distrust(self) -> None:
        """Look at nothing with the check, or that in the making: wrong values calibrated it."""
        self._check, self._distrusted = None, True

    def forget(self, rows: Int[np.ndarray, " few"]) -> None:
        """Learn all again without these rows, if any was learned."""
        if self._table["learned"][rows].any():
            self.due = 0
        self._table["learned"][rows] = self._table["estimated"][rows] = False

    def task(
        self, *, hurry: bool = False, resumed: FittedLearner | None = None
    ) -> LearnerTask | None:
        """Return what to learn from computed rows; None where there are too few new ones.

        In a `hurry`, a first fit does with as few as there may be. A `resumed` learner has learned
        them already.
        """
        table, fit, learned = self._table, self.fit or resumed, self._table["learned"]
        computed, others, late, y = table.learnable, table.open, table.late, table.vectors
        unchecked = computed[:0] if self._settings.check_answers is None else table.unchecked
        new = computed[~learned[computed]]
        pairs = new[:0]
        full = fit is not None and fit.pairs >= CAPACITY and self.due > 0
        if resumed is not None:
            pass  # it is there to predict
        elif len(computed) < FIRST // 4:
            return None
        elif (len(computed) >= self.due and not full) or (hurry and fit is None):
            # Where nothing is to be predicted, and a check is waited for, a small learner will do.
            most = FEW - 1 if hurry and not len(others) else CAPACITY
            pairs, fit, self.due = _chosen(computed, table["audit"], most), None, 2 * len(computed)
            if len(computed) < FEW:  # a larger learner as soon as there may be one
                self.due = min(self.due, FEW)
            learned[computed] = True
        elif fit is not None and len(new) >= NEWS:
            pairs = new[-CAPACITY:]
            learned[pairs] = True
        elif fit is None or not len(unchecked):
            return None
        self._distrusted = False
        judges = computed[table["audit"][computed] | late[computed]]
        known = np.union1d(judges, unchecked)
        rows = np.concatenate([others, known])
        return LearnerTask(
            fit=fit,
            x=self._features[pairs],
            y=y[pairs],
            rows=rows,
            features=self._features[rows],
            known_y=y[known],
            **_neighbours(self._features, table),
            unchecked=np.searchsorted(known, unchecked),
            settings=self._settings,
        )

    def take(self, learned: Learned) -> bool:
        """Take a new estimate, and compare it again with all that has come.

        Returns:
            Whether what it says of values counts.
        """
        rows, table = learned.rows, self._table
        computed, y = table.learnable, table.vectors
        self.fit, self._telling = learned.fit, learned.telling
        trusted = learned.looks is not None and not self._distrusted
        if learned.looks is not None and trusted:
            self._check = learned.looks.check
        if self.mean is None:
            self.mean = np.zeros((len(table.rows), learned.mean.shape[1]), np.float32)
        self.mean[rows], table["estimated"][rows] = learned.mean, True
        table["expected"][rows], table["plain"][rows] = learned.expected, learned.plain
        table["left_out"][rows], table["like_late"][rows] = learned.left_out, learned.like_late
        for errors in (self.audits, self.late):
            late = table["late"][computed]
            kind = computed[late if errors is self.late else table["audit"][computed] & ~late]
            kind = kind[table["estimated"][kind] & self.tells(kind)]
            if len(kind) >= max(errors.risk.needed, 1):  # else the evidence before is better
                error = row_errors(self.mean[kind], y[kind].astype(np.float32))
                errors.ratios = _ratios(error, table["expected"][kind])
                errors.risk.replace(self._compared(kind, y[kind], error, errors))
        return trusted

    def notice_late(self) -> None:
        """Find the open rows that are like rows which have been late since an estimate was begun.

        A run must not end by bars of quick rows because the next estimate is still in the making.
        """
        table, rows = self._table, self._table.open
        rows = rows[table["estimated"][rows] & ~table["like_late"][rows]]
        if self.mean is not None and len(rows) and table.late.any():
            near = _neighbours(self._features, table)
            table["like_late"][rows] = like_late(self._features[rows], self.mean[rows], **near)

    def look_wrong(
        self, rows: Int[np.ndarray, " some"], values: Float[np.ndarray, "some outputs"]
    ) -> tuple[
        Bool[np.ndarray, " some"], Bool[np.ndarray, " some"], Float[np.ndarray, "some outputs"]
    ]:
        """Return which values of rows look wrong, of which that can be told, and residuals."""
        found, known = np.zeros(len(rows), bool), np.zeros(len(rows), bool)
        residuals = np.zeros(values.shape, np.float32)
        if self._check is not None and self.mean is not None:
            known = self._table["estimated"][rows]
            expected = self.mean[rows[known]], self._table["plain"][rows[known]]
            found[known] = self._check.suspicious(*expected, values[known])
            residuals[known] = self._check.residuals(*expected, values[known])
        return found, known, residuals

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
                probability, score[kind] = self._estimated(rows[kind], errors)
                if self._settings.tolerance is None:
                    given = errors.risk.admits(probability, score[kind]) | (
                        probability > self.limit
                    )
                    score[kind] = np.where(given, probability, np.inf)
        return score

    @property
    def limit(self) -> float:
        """The largest score of a row that is known well enough."""
        if self._settings.max_disagreement is None:
            return self._settings.tolerance or -math.inf  # 0 computes all
        assert self.fit is not None
        assert self.fit.probability is not None
        return self.fit.probability.limit(self._settings.max_disagreement)

    def _estimated(
        self, rows: Int[np.ndarray, " known"], errors: _Errors
    ) -> tuple[Float[np.ndarray, " known"], Float[np.ndarray, " known"]]:
        """Return the probabilities that labels are wrong, and error bars, by the calibration.

        With a tolerance the first are NaN, otherwise the second.
        """
        assert self.fit is not None
        assert self.mean is not None
        mean, deviation = self.mean[rows], self._table["expected"][rows]
        nothing = np.full(len(mean), np.nan)
        if self._settings.tolerance is None:
            assert self.fit.probability is not None
            return self.fit.probability(mean, deviation, mean), nothing
        coverage, own = self._settings.coverage, np.array(errors.ratios)
        both = own if errors is self.audits else np.append(own, self.audits.ratios)
        factor = conformal_quantile(both, coverage)
        selects = self._settings.compute == "needed"
        if not selects or np.sum(own > factor) > _HARDER * (1 - coverage) * len(own):
            factor = max(conformal_quantile(own, coverage), factor)
        return nothing, deviation * factor

    def _compared(
        self,
        rows: Int[np.ndarray, " some"],
        y: Float[np.ndarray, "some outputs"],
        error: Float[np.ndarray, " some"],
        errors: _Errors,
    ) -> list[Comparison]:
        """Compare predictions with the rows' own values, from which they differ by `error`."""
        assert self.mean is not None
        mean = self.mean[rows]
        probability, bar = self._estimated(rows, errors)
        differs = np.argmax(mean, axis=1) != np.argmax(y, axis=1)
        facts = (each.tolist() for each in (probability, bar, differs, error_ratios(error, bar)))
        return [Comparison(*each) for each in zip(*facts, strict=True)]

    def compare(
        self, rows: Int[np.ndarray, " some"], y: Float[np.ndarray, "some outputs"], late: bool
    ) -> None:
        """Compare rows that have come with what was predicted of them, where that counts."""
        errors, table = self.late if late else self.audits, self._table
        counts = np.isfinite(y).all(axis=1) & (table["audit"][rows] | late)
        counts &= table["estimated"][rows]
        if self.mean is None or not counts.any():
            return
        counts &= self.tells(rows)
        rows, y = rows[counts], y[counts]
        error, score = row_errors(self.mean[rows], y.astype(np.float32)), self.score(rows, late)
        compared, sure = self._compared(rows, y, error, errors), score <= self.limit
        if self._settings.tolerance is None:
            right = np.array([not each.wrong for each in compared])
            errors.held += right[sure].tolist()
        else:
            errors.held += (error <= score)[np.isfinite(score)].tolist()
            errors.ratios += _ratios(error, table["expected"][rows])
        for given, each in zip(sure.tolist(), compared, strict=True):
            if given:
                errors.risk.give()
            if errors.risk.add(each, given=given):
                errors.ratios.clear()

    def tells(self, rows: Int[np.ndarray, " some"]) -> Bool[np.ndarray, " some"]:
        """Return which rows' errors count: predicted by a learner with no answer to the input."""
        assert self.fit is not None
        tells = self._table["left_out"][rows]
        tells[~tells] = ~self.fit.learner.knows(self._features[rows[~tells]])
        return tells

    def order(self, rows: Int[np.ndarray, " some"]) -> Int[np.ndarray, " some"]:
        """Return these rows in the order in which to compute them.

        The least certain come first, those that tell most about the others before all. Among them
        are the audits, one in four, in their own order, which is random.
        """
        audited = self._table["audit"][rows]
        audits, others = np.random.default_rng(0).permutation(rows[audited]), rows[~audited]
        others = others[np.argsort(-self._table["expected"][others], kind="stable")]
        telling = self._telling[np.isin(self._telling, others)]
        others = np.concatenate([telling, others[~np.isin(others, telling)]])
        places = np.concatenate([4.0 * np.arange(len(audits)), np.arange(len(others)) * 4 / 3 + 1])
        return np.concatenate([audits, others])[np.argsort(places, kind="stable")].astype(int)


def _neighbours(
    features: Float[np.ndarray, "rows inputs"], table: RowTable
) -> dict[str, Neighbours]:
    """Return inputs, and outputs, of rows of which it is known whether they are late."""
    computed, late = table.learnable, table.late
    rows = np.union1d(computed, np.flatnonzero(late))
    rows = np.random.default_rng(len(rows)).permutation(rows)[:CAPACITY]
    known = rows[np.isin(rows, computed)]
    by_output = Neighbours(table.vectors[known], late[known])
    return {"by_input": Neighbours(features[rows], late[rows]), "by_output": by_output}


def _chosen(
    computed: Int[np.ndarray, " some"], audit: Bool[np.ndarray, " rows"], most: int
) -> Int[np.ndarray, " few"]:
    """Return the rows to fit to, so that every fourth, which calibrates, is one at random."""
    random, count = np.random.default_rng(len(computed)).permutation(computed), len(computed)
    count, audits_first = min(count, most), np.argsort(~audit[random], kind="stable")
    last = random[audits_first[: count // 4]]
    rest = np.setdiff1d(random, last, assume_unique=True)
    rest = np.random.default_rng(0).permutation(rest)[: count - count // 4]
    chosen, places = np.empty(count, int), np.arange(count) % 4 == 3
    chosen[places], chosen[~places] = last, rest
    return chosen


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


def _ratios(
    error: Float[np.ndarray, " rows"], deviation: Float[np.ndarray, " rows"]
) -> list[float]:
    counts = (deviation > 0) & np.isfinite(deviation)
    return (error[counts] / deviation[counts]).tolist()
