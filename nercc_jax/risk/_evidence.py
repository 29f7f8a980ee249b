"""Evidence on straggling rows: which approximate answers may be given out for them.

Rows may be slow because of their content, so evidence on all rows says little about straggling
ones. The approximate answer of each straggling row is compared with the model's own answer once
that arrives, whether the approximate one was given out or not. The limit of scores is the largest
one up to which no more answers were wrong than a finite-sample bound allows. Error bars are widened
until no more of those given out are too short than the same bound allows. A `RiskMonitor` tests all
answers that were given out.

Decoded and predicted answers of a server, and rows that `run_rows` predicts, use the same evidence.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Float

from ._monitor import RiskMonitor
from .accuracy import Accuracy, conformal_quantile, least_factor, risk_cap, within_bound

_ROWS = 1024  # the latest rows that count
# The bound must also hold for the latest `_RECENT` rows alone, unless all of them are right; and
# for every `_FADING` rows a calibration counts as one right answer less. Measured on digits decoded
# by a tuned code, inverted from some time on, 5 % allowed, 100 replayed runs of 140 and 530
# stragglers: 4.5 % of the answers given out after the change are wrong, 5.6 % if one of the latest
# may always be wrong; before the change 2 % fewer answers are given out, after it 17 %.
_RECENT, _FADING = 100, 8
# The most answers given out that are not compared yet, beyond the number of compared ones.
_UNSEEN = 32
_BARS = 20  # the fewest rows from which error bars are calibrated

Number: TypeAlias = float | np.ndarray


class _Limits(NamedTuple):
    """The limits that follow from the evidence.

    Attributes:
        probability: The largest error probability at which an answer within its calibration's limit
            is given out; negative if none is.
        beyond: The same for answers beyond their calibration's limit.
        factor: The factor by which error bounds are widened.
        shift: The mean amount by which error probabilities are too small.
        admitted: The share of straggling rows whose answers would be given out.
    """

    probability: float
    beyond: float
    factor: float = 1.0
    shift: float = 0.0
    admitted: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Comparison:
    """A comparison of a straggling row's approximate answer with the model's own.

    Attributes:
        probability: The calibrated probability that the label is wrong; NaN if there is none.
        bound: The error bound of the approximate answer; 0 if there is none.
        wrong: Whether the label is wrong; True if that is unknown.
        excess: The ratio of the error to its bound; infinite if it is unknown.
    """

    probability: float
    bound: float
    wrong: bool
    excess: float


class Risk:
    """The decision whether approximate answers to straggling rows may be given out.

    Of the answers that are given out, at most a share `max_disagreement` may have a wrong label,
    and at most a share `1 - coverage` an error beyond its bar. Only one thread may change it;
    others may call `status`.

    Attributes:
        needed: The fewest straggling rows with which the evidence can suffice.
        epoch: The number of restarts of the evidence.
        drifts: The number of times that more answers were wrong than promised.
        unknown: The number of answers given out whose rows never got the model's own answer.

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
            accuracy: The promised accuracy.
            needs_evidence: Whether no answer is given out before the evidence on straggling rows
                suffices, as always after a drift. Otherwise, answers that a calibration admits are
                given out until stragglers show that they are wrong.
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
            calibrated: Whether it is within the limit of its calibration. An answer beyond it may
                still be admitted by the evidence from other stragglers.
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

        They are the calibrated values, enlarged if those of other stragglers were too small.
        """
        return np.minimum(probability + self._limits.shift, 1.0), bound * self._limits.factor

    def give(self) -> None:
        """Count an answer that is given out; an `add` with `given` must follow for each."""
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
        """Add a straggling row after the model's own answer arrived, or if it never will.

        Args:
            row: The comparison.
            given: Whether the approximate answer was given out (`give`).
            epoch: The `epoch` when it was computed; an answer of an earlier epoch is no evidence.
            unknown: Whether the model's own answer will never arrive.
            widened: The factor by which its bound was widened when given out (`expected`).

        Returns:
            Whether this shows that more answers were wrong than promised: a drift, after which the
            evidence is restarted.
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

        The test of answers that were given out is not changed.
        """
        self._rows.clear()
        self._rows.extend(rows)
        self._known = None

    def restart(self) -> None:
        """Discard the evidence after a drift; give no answer out until there is enough again."""
        self.epoch += 1
        self._rows.clear()
        self._monitor.clear()
        self._needs_evidence = self._share != 0
        self._known = None

    @property
    def waits(self) -> bool:
        """True if no answer is given out before more straggling rows are compared."""
        return self._needs_evidence and self._limits.probability < 0

    @property
    def enough(self) -> bool:
        """True if at least `needed` straggling rows were compared."""
        return len(self._rows) >= self.needed

    @property
    def share(self) -> float:
        """The share of straggling rows whose answers may be given out."""
        return self._limits.admitted

    @property
    def excesses(self) -> Float[np.ndarray, " rows"]:
        """The ratios of errors to bounds, of the straggling rows that have a bound."""
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
        """Return the limits that follow from these rows."""
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
            # The largest score up to which no more rows were wrong than allowed, both of all rows
            # and of the latest, since rows from before a change of the queries or the model must
            # not count for long. Rows with equal scores are given out together, NaN never.
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

            # A calibration counts as the number of right answers that would suffice alone, less one
            # for every `_FADING` straggling rows.
            known = 0 if self._needs_evidence else max(self.needed - len(rows) // _FADING, 0)
            limit, beyond = largest(known), largest(0)
            given = probability <= limit
        factor, shift = 1.0, 0.0
        if tolerance is not None:
            factor = least_factor(bound[:, None], excess[:, None], self._accuracy, len(rows))
            if math.isinf(factor):
                factor = max(conformal_quantile(excess, self._accuracy.coverage), 1.0)
                # Too few rows within the tolerance are no evidence about such rows. So all rows
                # decide on them, unless evidence is needed.
                if self._needs_evidence or np.sum(bound * factor <= tolerance) >= _BARS:
                    limit = beyond = -1.0
            given &= bound * factor <= tolerance
        if share is not None and given.any():
            shift = max(float(np.mean(wrong[given] - probability[given])), 0.0)
        admitted = float(np.mean(given)) if limit >= 0 else 0.0
        return _Limits(limit, beyond, factor, shift, admitted)
