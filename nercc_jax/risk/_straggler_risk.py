"""Evidence on the rows that straggle: which approximate answers may be given out for them.

Rows may be slow because of what they are, so evidence on all rows says little about those that
straggle. Each straggling row for which there was an approximate answer is compared with the
model's own answer once that comes, whether the approximate one was given out or not. The limit is
the largest score up to which no more answers were wrong than a finite-sample bound allows (Clopper
and Pearson 1934), and a `RiskMonitor` tests all that was given out.
"""

import collections
import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from ._monitor import RiskMonitor

_ROWS = 1024  # the latest rows that count
# Probability with which the bound of a limit fails. One limit is chosen among many, which makes
# that up to twice as likely; the monitor finds it.
_MISS = 0.1
COVERAGE = 0.9  # of error bounds
# No single answer may be wrong with more than this multiple of the promise, nor more than this.
_CAP, _MOST = 5.0, 0.5
# Answers that may be given out before any was compared; later, as many more as were compared.
_UNSEEN = 32
_FACTORS = np.geomspace(1, 32, 41)  # by which error bounds may be widened


class StragglerRow(NamedTuple):
    """A straggling row whose approximate answer is compared with the model's own.

    Attributes:
        probability: The calibrated probability that the label is wrong; NaN where there is none.
        bound: The error bound of the approximate answer; 0 where there is none.
        wrong: Whether the label is wrong. Unknown ones count as wrong.
        excess: The error over its bound; infinite where it is unknown.
    """

    probability: float
    bound: float
    wrong: bool
    excess: float


class StragglerRisk:
    """The decision whether approximate answers to straggling rows may be given out.

    Of the answers that are given out, at most a share `max_disagreement` may have a wrong label,
    and at most a tenth an error beyond its bound. One thread feeds it; others may read `status`.

    Attributes:
        needed: The least number of straggling rows with which the evidence may suffice.
        epoch: How often the evidence began again.
        drifts: How often more of the answers were wrong than promised.
        unknown: The number of answers given out whose rows never got an answer of the model's own.
    """

    def __init__(
        self, max_disagreement: float | None, tolerance: float | None, *, needs_evidence: bool
    ):
        """Start without evidence.

        Args:
            max_disagreement: The largest share of wrong labels among the answers given out; None
                where labels do not matter.
            tolerance: The largest error bound; None where errors do not matter.
            needs_evidence: Whether nothing is given out before evidence on straggling rows
                suffices. After a drift, it always has to.
        """
        self._share, self._tolerance = max_disagreement, tolerance
        self._needs_evidence = needs_evidence
        outside = 0.0 if tolerance is None else 1 - COVERAGE
        self._monitor = RiskMonitor(min((max_disagreement or 0.0) + outside, 1.0))
        self._allowed = allowed_errors(max_disagreement or 0.0, _ROWS)
        self._allowed_outside = allowed_errors(1 - COVERAGE, _ROWS)
        tables = [self._allowed] * (max_disagreement is not None)
        tables += [self._allowed_outside] * (tolerance is not None)
        self.needed = max((int(np.searchsorted(table, 0)) for table in tables), default=0)
        self._rows: collections.deque[StragglerRow] = collections.deque(maxlen=_ROWS)
        self.epoch = self.drifts = self.unknown = 0
        self._pending = 0
        self._limits()

    @property
    def cap(self) -> float:
        """The largest probability of a wrong label of any single answer."""
        return 1.0 if self._share is None else risk_cap(self._share)

    def admits(self, probability: float, bound: float) -> bool:
        """Return whether an answer may be given out now, by the evidence on straggling rows."""
        if self._limit < 0 or self._pending >= _UNSEEN + self._monitor.number:
            return False
        within = self._tolerance is None or bound * self._factor <= self._tolerance
        return within and (self._share is None or probability <= min(self._limit, self.cap))

    def expected(self, probability: float, bound: float) -> tuple[float, float]:
        """Return the probability that a straggling row's label is wrong, and its error bound.

        They are the calibrated ones, and more where those of other stragglers were too small.
        """
        return min(probability + self._shift, 1.0), bound * self._factor

    def give(self) -> None:
        """Count an answer that is given out, and that the model's own answer will be compared to.

        Each must be followed by an `add` with `given`.
        """
        self._pending += 1

    def add(
        self, row: StragglerRow, *, given: bool, epoch: int | None = None, unknown: bool = False
    ) -> bool:
        """Take a straggling row whose model's answer came, or will never come.

        Args:
            row: The comparison.
            given: Whether the approximate answer was given out (`give`).
            epoch: The `epoch` when it was made; from before the present one it is no evidence.
            unknown: The model's own answer will never come.

        Returns:
            Whether this shows that more answers were wrong than promised. Evidence then begins
            again.
        """
        if given:
            self._pending -= 1
            self.unknown += unknown
        if epoch is not None and epoch != self.epoch:
            return False
        if self._share is None or not math.isnan(row.probability):
            self._rows.append(row)
        failed = row.wrong and self._share is not None
        failed |= row.excess > 1 and self._tolerance is not None
        if given and self._monitor.add([failed]):
            self.drifts += 1
            self.restart()
            return True
        self._limits()
        return False

    def restart(self) -> None:
        """Discard the evidence after a drift: nothing is given out until there is enough again."""
        self.epoch += 1
        self._rows.clear()
        self._monitor.clear()
        self._needs_evidence = True
        self._limits()

    @property
    def suffices(self) -> bool:
        """True if the evidence allows any answer to be given out."""
        return self._limit >= 0

    @property
    def share(self) -> float:
        """The share of straggling rows whose answers may be given out."""
        return self._admitted

    def disagreement(self) -> tuple[int, int]:
        """Return the number of wrong labels of all approximate answers, and of those answers."""
        rows = list(self._rows)
        return sum(row.wrong for row in rows), len(rows)

    def status(self) -> dict[str, Any]:
        """Return the evidence for a server's status."""
        wrong, number = self.disagreement()
        monitor = self._monitor
        return {
            "compared": number,
            "needed": self.needed if self._needs_evidence else 0,
            "disagreement": wrong / number if number and self._share is not None else None,
            "admitted": self._admitted,
            "given": monitor.number,
            "given_wrong": int(monitor.wrong),
            "pending": self._pending,
            "unknown": self.unknown,
            "drifts": self.drifts,
        }

    def _limits(self) -> None:
        """Choose the largest probability, and the factor of error bounds, of what is given out."""
        self._limit, self._factor, self._admitted, self._shift = math.inf, 1.0, 1.0, 0.0
        number = len(self._rows)
        if number < self.needed or self._share == 0:
            if self._needs_evidence or self._share == 0:
                self._limit, self._admitted = -1.0, 0.0
            return
        probability, bound, wrong, excess = map(np.array, zip(*self._rows, strict=True))
        if self._share is not None:
            self._limit = _largest_score(probability, wrong, self._allowed)
        if self._tolerance is not None:
            self._factor = least_factor(bound, excess, self._tolerance, self._allowed_outside)
            if math.isinf(self._factor):
                self._limit = -1.0
        given = np.full(number, True) if self._share is None else probability <= self._limit
        if self._tolerance is not None:
            given &= bound * self._factor <= self._tolerance
        self._admitted = float(np.mean(given)) if self._limit >= 0 else 0.0
        if self._share is not None and given.any():
            self._shift = max(float(np.mean(wrong[given] - probability[given])), 0.0)


def risk_cap(share: float) -> float:
    """Return the largest error probability of a single answer, if this share may be wrong."""
    return max(min(_CAP * share, _MOST), share)


def allowed_errors(share: float, most: int) -> Int[np.ndarray, " numbers"]:
    """Return for each number of answers, from 0 to `most`, how many may have been wrong.

    With so many wrong ones or fewer, the upper confidence bound of the share of wrong answers is
    at most `share`; -1 where even none is too many (Clopper and Pearson 1934).
    """
    from scipy.special import bdtr  # late: a fifth of a worker's import time

    if share >= 1:
        return np.arange(most + 1)
    allowed, wrong = np.full(most + 1, -1), -1
    for number in range(1, most + 1):
        while wrong < number and bdtr(wrong + 1, number, share) <= _MISS:
            wrong += 1
        allowed[number] = wrong
    return allowed


def least_factor(
    bounds: Float[np.ndarray, " rows"],
    excess: Float[np.ndarray, " rows"],
    tolerance: float,
    allowed: Int[np.ndarray, " numbers"],
) -> float:
    """Return the least factor of error bounds with which they are right for what is given out.

    Args:
        bounds: Error bounds; rows are given out where they are within the tolerance.
        excess: Errors over their bounds.
        tolerance: The largest bound of what is given out.
        allowed: The errors that may be beyond their bounds, by the number of rows.

    Returns:
        The factor; infinite where none would do.
    """
    for factor in _FACTORS.tolist():
        given = bounds * factor <= tolerance
        if np.sum(excess[given] > factor) <= allowed[int(np.sum(given))]:
            return factor
    return math.inf


def _largest_score(
    scores: np.ndarray, wrong: np.ndarray, allowed: Int[np.ndarray, " numbers"]
) -> float:
    """Return the largest score up to which no more were wrong than allowed; -1 if there is none."""
    order = np.argsort(scores, kind="stable")
    scores, errors = scores[order], np.cumsum(wrong[order])
    # Rows with the same score are given out together; NaN stands last, and is never given.
    last = np.append(scores[1:] != scores[:-1], True) & ~np.isnan(scores)
    good = np.flatnonzero(last & (errors <= allowed[1 : len(scores) + 1]))
    if good.size == 0:
        return -1.0
    return math.inf if good[-1] == len(scores) - 1 else float(scores[good[-1]])
