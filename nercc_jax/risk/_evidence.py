"""Evidence on the rows that straggle: which approximate answers may be given out for them.

Rows may be slow because of what they are, so evidence on all rows says little about those that
straggle. Each straggling row for which there was an approximate answer is compared with the
model's own answer once that comes, whether the approximate one was given out or not. The limit is
the largest score up to which no more answers were wrong than a finite-sample bound allows, error
bars are widened until no more of those that are given out are too short than the same bound allows,
and a `RiskMonitor` tests all that was given out.

Decoded and predicted answers of a server, and rows that `run_rows` predicts, go by the same
evidence, whatever their scores are made of.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Float

from ._accuracy import Accuracy, conformal_quantile, least_factor, risk_cap, within_bound
from ._monitor import RiskMonitor

_ROWS = 1024  # the latest rows that count
# The bound has to hold for the latest rows by themselves, too, unless all of them are right; and
# for every eight rows a calibration counts as one right answer less. Digits, decoded by a tuned
# code and then inverted, 5 % allowed, 100 replayed runs of 140 and 530 stragglers: 4.5 % of what is
# given out after the change is wrong, 5.6 % if one of the latest may always be; before it 2 % less
# is given out, after it 17 %.
_RECENT, _FADING = 100, 8
# Answers that may be given out before any was compared; later, as many more as were compared.
_UNSEEN = 32
_BARS = 20  # rows, at least, by which the error bars of others are known

Number: TypeAlias = float | np.ndarray


class _Limits(NamedTuple):
    """The decision that follows from the evidence.

    Attributes:
        probability: The largest probability of what is given out of those within a calibration's
            limit; negative where nothing is.
        beyond: The same of all others.
        factor: By which error bounds of what is given out are widened.
        shift: By which probabilities are too small, in the mean.
        admitted: The share of straggling rows that would be given out.
    """

    probability: float
    beyond: float
    factor: float = 1.0
    shift: float = 0.0
    admitted: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
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


class Risk:
    """The decision whether approximate answers to straggling rows may be given out.

    Of the answers that are given out, at most a share `max_disagreement` may have a wrong label,
    and at most a share of `1 - coverage` an error beyond its bar. One thread feeds it; others may
    read `status`.

    Attributes:
        needed: The least number of straggling rows with which the evidence may suffice.
        epoch: How often the evidence began again.
        drifts: How often more of the answers were wrong than promised.
        unknown: The number of answers given out whose rows never got an answer of the model's own.

    Example:
        >>> from nercc_jax.risk import Accuracy, Comparison, Risk
        >>> risk = Risk(Accuracy(max_disagreement=0.1), needs_evidence=True)
        >>> for _ in range(14):
        ...     _ = risk.add(Comparison(0.02, 0.0, wrong=False, excess=0.0), given=False)
        >>> bool(risk.admits(0.02, 0.0)), bool(risk.admits(0.6, 0.0))
        (True, False)
    """

    def __init__(self, accuracy: Accuracy, *, needs_evidence: bool):
        """Start without evidence.

        Args:
            accuracy: The promise.
            needs_evidence: Whether nothing is given out before evidence on straggling rows
                suffices. After a drift, it always has to. If not, what a calibration admits counts
                as right until stragglers show otherwise.
        """
        self._accuracy = accuracy
        self._share, self._tolerance = accuracy.max_disagreement, accuracy.tolerance
        self._needs_evidence = needs_evidence and self._share != 0
        self._monitor = RiskMonitor(accuracy.promised)
        self.needed = 0 if self._tolerance is None else _BARS
        if self._share and self._share < 1:
            suffices = within_bound(0, np.arange(2 * _ROWS), self._share)  # if all are right
            self.needed = max(int(np.searchsorted(suffices, True)), self.needed)
        self._rows: collections.deque[Comparison] = collections.deque(maxlen=_ROWS)
        self.epoch = self.drifts = self.unknown = 0
        self._pending = 0
        self._known: _Limits | None = None  # until there is new evidence

    def admits(
        self, probability: Number, bound: Number, *, calibrated: bool = True
    ) -> Bool[np.ndarray, "*rows"]:
        """Return whether an answer may be given out now, by the evidence on straggling rows.

        Args:
            probability: The calibrated probability that its label is wrong, or an array of these.
            bound: Its error bound.
            calibrated: Whether it is within the limit of a calibration. If not, other stragglers
                may still have shown that such answers are right.
        """
        limits = self._limits
        limit = limits.probability if calibrated else limits.beyond
        unpromised = self._share is None and self._tolerance is None
        if self._pending >= _UNSEEN + self._monitor.number and not unpromised:
            limit = -1.0
        within = np.full(np.shape(bound), limit >= 0)
        if self._tolerance is not None:
            within = within & (bound * limits.factor <= self._tolerance)
        if self._share is not None:
            within = within & (probability <= min(limit, risk_cap(self._share)))
        return np.asarray(within)

    def expected(self, probability: Number, bound: Number) -> tuple[Number, Number]:
        """Return the probability that a straggling row's label is wrong, and its error bound.

        They are the calibrated ones, and more where those of other stragglers were too small.
        """
        return np.minimum(probability + self._limits.shift, 1.0), bound * self._limits.factor

    def give(self) -> None:
        """Count an answer that is given out, and that the model's own answer will be compared to.

        Each must be followed by an `add` with `given`.
        """
        self._pending += 1

    def add(
        self,
        row: Comparison,
        *,
        given: bool,
        epoch: int | None = None,
        unknown: bool = False,
        widened: float = 1.0,
    ) -> bool:
        """Take a straggling row whose model's answer came, or will never come.

        Args:
            row: The comparison.
            given: Whether the approximate answer was given out (`give`).
            epoch: The `epoch` when it was made; from before the present one it is no evidence.
            unknown: The model's own answer will never come.
            widened: The factor of its bound with which it was given out (`expected`).

        Returns:
            Whether this shows that more answers were wrong than promised. Evidence then begins
            again.
        """
        if given:
            self._pending -= 1
            self.unknown += unknown
        if epoch is not None and epoch != self.epoch:
            return False
        if not math.isnan(row.bound if self._share is None else row.probability):
            self._rows.append(row)
            self._known = None
        missed = self._accuracy.missed(row.wrong, row.excess / widened)
        if given and self._monitor.add([bool(missed)]):
            self.drifts += 1
            self.restart()
            return True
        return False

    def replace(self, rows: Iterable[Comparison]) -> None:
        """Replace the evidence by comparisons of a newer surrogate with the same rows' answers.

        What was given out stays tested as it was given.
        """
        self._rows.clear()
        self._rows.extend(rows)
        self._known = None

    def restart(self) -> None:
        """Discard the evidence after a drift: nothing is given out until there is enough again."""
        self.epoch += 1
        self._rows.clear()
        self._monitor.clear()
        self._needs_evidence = self._share != 0
        self._known = None

    @property
    def waits(self) -> bool:
        """True if nothing is given out before more straggling rows were compared."""
        return self._needs_evidence and self._limits.probability < 0

    @property
    def enough(self) -> bool:
        """True if as many straggling rows were compared as are needed at least."""
        return len(self._rows) >= self.needed

    @property
    def share(self) -> float:
        """The share of straggling rows whose answers may be given out."""
        return self._limits.admitted

    @property
    def excesses(self) -> Float[np.ndarray, " rows"]:
        """The errors of the straggling rows that have a bound, over their bounds."""
        return np.array([row.excess for row in self._rows if not math.isnan(row.bound)])

    def status(self) -> dict[str, Any]:
        """Return the evidence for a server's status."""
        rows = list(self._rows)
        shares = bool(rows) and self._share is not None
        return {
            "compared": len(rows),
            "needed": self.needed if self._needs_evidence else 0,
            "disagreement": sum(row.wrong for row in rows) / len(rows) if shares else None,
            "admitted": self.share,
            "given": self._monitor.number,
            "given_wrong": self._monitor.wrong,
            "pending": self._pending,
            "unknown": self.unknown,
            "drifts": self.drifts,
        }

    @property
    def _limits(self) -> _Limits:
        if self._known is None:
            self._known = self._decide(list(self._rows))
        return self._known

    def _decide(self, rows: list[Comparison]) -> _Limits:
        """Choose the largest probability, and the factor of error bounds, of what is given out."""
        share, tolerance = self._share, self._tolerance
        if share == 0 or len(rows) < (1 if tolerance is None else _BARS):
            admits = not self._needs_evidence and share != 0
            return _Limits(math.inf if admits else -1.0, -1.0, admitted=float(admits))
        probability, bound, wrong, excess = (
            np.array([getattr(row, name) for row in rows])
            for name in ("probability", "bound", "wrong", "excess")
        )
        limit = beyond = math.inf
        given = np.full(len(rows), True)
        if share is not None:
            # The largest scores up to which no more were wrong than allowed: of all rows, and of
            # the latest, since what came before a change of the queries or the model must not count
            # for long. Rows with the same score are given out together; NaN is never given.
            order = np.argsort(probability, kind="stable")
            scores, recent = probability[order], order >= len(rows) - _RECENT
            errors, late = np.cumsum(wrong[order]), np.cumsum(wrong[order] & recent)
            good = (late == 0) | within_bound(late, np.cumsum(recent), share)
            good &= np.append(scores[1:] != scores[:-1], True) & ~np.isnan(scores)
            number = np.arange(1, len(rows) + 1)

            def largest(known: int) -> float:
                found = np.flatnonzero(good & within_bound(errors, known + number, share))
                if found.size == 0:
                    return -1.0
                return math.inf if found[-1] == len(rows) - 1 else float(scores[found[-1]])

            # What was calibrated counts as so many right answers as suffice by themselves, and
            # less and less beside stragglers.
            known = 0 if self._needs_evidence else max(self.needed - len(rows) // _FADING, 0)
            limit, beyond = largest(known), largest(0)
            given = probability <= limit
        factor, shift = 1.0, 0.0
        if tolerance is not None:
            factor = least_factor(bound[:, None], excess[:, None], self._accuracy, len(rows))
            if math.isinf(factor):
                factor = max(conformal_quantile(excess, self._accuracy.coverage), 1.0)
                # Too few rows within the tolerance show nothing about these. So they are admitted
                # by what all rows show, unless evidence is needed.
                if self._needs_evidence or np.sum(bound * factor <= tolerance) >= _BARS:
                    limit = beyond = -1.0
            given &= bound * factor <= tolerance
        if share is not None and given.any():
            shift = max(float(np.mean(wrong[given] - probability[given])), 0.0)
        admitted = float(np.mean(given)) if limit >= 0 else 0.0
        return _Limits(limit, beyond, factor, shift, admitted)
