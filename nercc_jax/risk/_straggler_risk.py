"""Evidence on the rows that straggle: which approximate answers may be given out for them.

Rows may be slow because of what they are, so evidence on all rows says little about those that
straggle. Each straggling row for which there was an approximate answer is compared with the
model's own answer once that comes, whether the approximate one was given out or not. The limit is
the largest score up to which no more answers were wrong than a finite-sample bound allows (Clopper
and Pearson 1934), error bars are widened until no more of those that are given out are too short
than the same bound allows, and a `RiskMonitor` tests all that was given out.

Decoded and predicted answers of a server, and rows that `run_rows` predicts, go by the same
evidence; so does the limit of `DecodingErrorProbability`.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int

from ._monitor import RiskMonitor


@dataclasses.dataclass(frozen=True)
class AccuracyTarget:
    """A bound on what may be given out instead of the model's own answers.

    Without a tolerance and a disagreement, everything may.

    Attributes:
        tolerance: The largest error bar, in units of the outputs.
        max_disagreement: The largest share of the answers given out approximately whose label may
            differ from the model's own.
        coverage: The share of errors that error bars cover.
    """

    tolerance: float | None = None
    max_disagreement: float | None = None
    coverage: float = 0.9

    @property
    def promised(self) -> float:
        """The share of the answers given out that may have a wrong label or too short a bar."""
        outside = 0.0 if self.tolerance is None else 1 - self.coverage
        return min((self.max_disagreement or 0.0) + outside, 1.0)

    def missed(self, wrong: Any, excess: Any) -> Bool[np.ndarray, "*answers"]:
        """Return which answers miss the target, by their label or their error.

        Args:
            wrong: Whether the label is wrong.
            excess: The error over its bar (`error_ratios`).
        """
        failed = np.zeros(np.shape(wrong), bool)
        if self.max_disagreement is not None:
            failed |= wrong
        if self.tolerance is not None:
            failed |= np.asarray(excess) > 1
        return failed


def error_ratios(error: Any, bound: Any) -> Float[np.ndarray, "*answers"]:
    """Return errors over their bounds.

    Where there is no error that is 0, whatever the bound; where the bound is unknown, infinite.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(error > 0, error / bound, 0.0)
    return np.where(np.isnan(ratios), np.inf, ratios)


_ROWS = 1024  # the latest rows that count
# The bound has to hold for the latest rows by themselves, too, unless all of them are right; and
# for every eight rows a calibration counts as one right answer less. Digits, decoded by a tuned
# code and then inverted, 5 % allowed, 100 replayed runs of 140 and 530 stragglers: 4.5 % of what is
# given out after the change is wrong, 5.6 % if one of the latest may always be; before it 2 % less
# is given out, after it 17 %.
_RECENT, _FADING = 100, 8
# Probability with which the bound of a limit fails; the monitor finds it if that matters. Decoded
# digits, random stragglers, 5 % allowed: with 0.1, 0.25, 0.4 it gives out 84, 86, 89 % of what is
# given out without a bound, and 2.2, 3.2, 3.6 % of that is wrong.
_MISS = 0.25
# No single answer may be wrong with more than this multiple of the promise, nor more than this.
_CAP, _MOST = 5.0, 0.5
# Answers that may be given out before any was compared; later, as many more as were compared.
_UNSEEN = 32
_BARS = 20  # rows, at least, by which the error bars of others are known
_SHOWN = 1000  # the latest answers given out whose disagreement is shown
_FACTORS = np.geomspace(1, 32, 81)  # by which error bars may be widened

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
    factor: float
    shift: float
    admitted: float


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
    and at most a share of `1 - coverage` an error beyond its bar. One thread feeds it; others may
    read `status`.

    Attributes:
        needed: The least number of straggling rows with which the evidence may suffice.
        epoch: How often the evidence began again.
        drifts: How often more of the answers were wrong than promised.
        unknown: The number of answers given out whose rows never got an answer of the model's own.
        shown: Whether the latest answers given out were wrong, the forced ones included.
        usual: The share of all rows' approximate labels that are wrong, where a calibration knows.
    """

    def __init__(self, target: AccuracyTarget, *, needs_evidence: bool):
        """Start without evidence.

        Args:
            target: What may be given out.
            needs_evidence: Whether nothing is given out before evidence on straggling rows
                suffices. After a drift, it always has to. If not, what a calibration admits counts
                as right until stragglers show otherwise.
        """
        self._target = target
        self._share, self._tolerance = target.max_disagreement, target.tolerance
        self._coverage, self._needs_evidence = target.coverage, needs_evidence and self._share != 0
        self._monitor = RiskMonitor(target.promised)
        self.needed = 0 if self._tolerance is None else _BARS
        if self._share:
            self._allowed = allowed_errors(self._share, 2 * _ROWS)
            self.needed = max(int(np.searchsorted(self._allowed, 0)), self.needed)
        self._rows: collections.deque[StragglerRow] = collections.deque(maxlen=_ROWS)
        self.shown: collections.deque[bool] = collections.deque(maxlen=_SHOWN)
        self.epoch = self.drifts = self.unknown = 0
        self.usual: float | None = None
        self._pending = 0
        self._known: _Limits | None = None  # until there is new evidence

    @property
    def cap(self) -> float:
        """The largest probability of a wrong label of any single answer."""
        return 1.0 if self._share is None else risk_cap(self._share)

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
            within &= bound * limits.factor <= self._tolerance
        if self._share is not None:
            within &= probability <= min(limit, self.cap)
        return within

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
        row: StragglerRow,
        *,
        given: bool,
        forced: bool = False,
        epoch: int | None = None,
        unknown: bool = False,
        widened: float = 1.0,
    ) -> bool:
        """Take a straggling row whose model's answer came, or will never come.

        Args:
            row: The comparison.
            given: Whether the approximate answer was given out (`give`).
            forced: Whether it was given out although it was less certain than was promised.
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
        excess = row.excess / widened
        if given or forced:
            beyond = self._tolerance is not None and excess > 1
            self.shown.append(bool(row.wrong or beyond))
        if epoch is not None and epoch != self.epoch:
            return False
        if self._share is None or not math.isnan(row.probability):
            self._rows.append(row)
            self._known = None
        if given and self._monitor.add([bool(self._target.missed(row.wrong, excess))]):
            self.drifts += 1
            self.restart()
            return True
        return False

    def replace(self, rows: Iterable[StragglerRow]) -> None:
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

    def disagreement(self) -> tuple[int, int]:
        """Return the number of wrong labels of all approximate answers, and of those answers."""
        rows = list(self._rows)
        return sum(row.wrong for row in rows), len(rows)

    def hardness(self) -> tuple[float, float]:
        """Return how many approximate answers to straggling rows missed, and how many should have.

        A label misses where it is wrong, an error where it is beyond its bound. What should have
        missed is the share of all rows: more than that means that straggling rows are harder than
        others. Where that share is not known, it is what their probabilities let expect.
        """
        rows = list(self._rows)
        if self._share is None:
            missed = sum(row.excess > 1 for row in rows)
            return float(missed), float((1 - self._coverage) * len(rows))
        wrong, expected = sum(row.wrong for row in rows), sum(row.probability for row in rows)
        return float(wrong), float(expected if self.usual is None else self.usual * len(rows))

    @property
    def hint(self) -> str | None:
        """A sentence that straggling rows are harder than others, if they are beyond chance."""
        (missed, expected), number = self.hardness(), len(self._rows)
        if missed <= expected + 3 * math.sqrt(max(expected, 1.0)):
            return None
        what = "error bars are too short" if self._share is None else "labels would be wrong"
        shares = f"{100 * missed / number:.0f} % of their {what}, {100 * expected / number:.0f} %"
        return f"queries that straggle are harder than others: {shares} were expected"

    def status(self) -> dict[str, Any]:
        """Return the evidence for a server's status."""
        wrong, number = self.disagreement()
        missed, expected = self.hardness()
        monitor = self._monitor
        return {
            "compared": number,
            "needed": self.needed if self._needs_evidence else 0,
            "disagreement": wrong / number if number and self._share is not None else None,
            "harder": missed / expected if expected > 0 else None,
            "admitted": self.share,
            "given": monitor.number,
            "given_wrong": int(monitor.wrong),
            "pending": self._pending,
            "unknown": self.unknown,
            "drifts": self.drifts,
        }

    @property
    def _limits(self) -> _Limits:
        if self._known is None:
            self._known = self._decide(list(self._rows))
        return self._known

    def _decide(self, rows: list[StragglerRow]) -> _Limits:
        """Choose the largest probability, and the factor of error bounds, of what is given out."""
        if self._share == 0 or len(rows) < (0 if self._tolerance is None else _BARS) or not rows:
            admits = not self._needs_evidence and self._share != 0
            return _Limits(math.inf if admits else -1.0, -1.0, 1.0, 0.0, float(admits))
        probability, bound, wrong, excess = map(np.array, zip(*rows, strict=True))
        limit = beyond = math.inf
        if self._share is not None:
            # The largest scores up to which no more were wrong than allowed: of all rows, and of
            # the latest, since what came before a change of the queries or the model must not count
            # for long. Rows with the same score are given out together; NaN is never given.
            order = np.argsort(probability, kind="stable")
            scores, recent = probability[order], order >= len(rows) - _RECENT
            errors, late = np.cumsum(wrong[order]), np.cumsum(wrong[order] & recent)
            good = late <= np.maximum(self._allowed[np.cumsum(recent)], 0)
            good &= np.append(scores[1:] != scores[:-1], True) & ~np.isnan(scores)

            def largest(known: int) -> float:
                allowed = self._allowed[1 + known : 1 + known + len(rows)]
                found = np.flatnonzero(good & (errors <= allowed))
                if found.size == 0:
                    return -1.0
                return math.inf if found[-1] == len(rows) - 1 else float(scores[found[-1]])

            beyond = largest(0)
            # What was calibrated counts as so many right answers as suffice by themselves, and
            # less and less beside stragglers.
            known = 0 if self._needs_evidence else max(self.needed - len(rows) // _FADING, 0)
            limit = largest(known)
        given = np.full(len(rows), True) if self._share is None else probability <= limit
        factor, shift = 1.0, 0.0
        if self._tolerance is not None:
            looks = bound[:, None], excess[:, None]
            factor = least_factor(*looks, self._tolerance, self._coverage, len(rows))
            if math.isinf(factor):
                factor = max(conformal_quantile(excess, self._coverage), 1.0)
                # Too few rows within the tolerance show nothing about these. So they are admitted
                # by what all rows show, unless evidence is needed.
                within = int(np.sum(bound * factor <= self._tolerance))
                if self._needs_evidence or within >= _BARS:
                    limit = beyond = -1.0
            given &= bound * factor <= self._tolerance
        if self._share is not None and given.any():
            shift = max(float(np.mean(wrong[given] - probability[given])), 0.0)
        admitted = float(np.mean(given)) if limit >= 0 else 0.0
        return _Limits(limit, beyond, factor, shift, admitted)


def risk_cap(share: float) -> float:
    """Return the largest error probability of a single answer, if this share may be wrong."""
    return max(min(_CAP * share, _MOST), share)


@functools.lru_cache(maxsize=64)
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


def bar_factor(
    deviation: Float[np.ndarray, "rows looks"],
    error: Float[np.ndarray, "rows looks"],
    target: AccuracyTarget,
    number: int,
) -> float:
    """Return the factor by which deviations become error bars of the target's coverage.

    They have to be right for what is given out, not for all; a factor of infinity gives out none.

    Args:
        deviation: Deviations, at each look at which a row may be given out; infinite for unknown.
        error: Errors.
        target: The coverage, and the tolerance if there is one.
        number: The number of different rows, where the same ones come several times.
    """
    ratios = error_ratios(error, deviation)
    factor = conformal_quantile(ratios[np.isfinite(deviation)], target.coverage)
    if target.tolerance is None or math.isinf(factor):
        return factor
    bound = factor * deviation
    excess = error_ratios(error, bound)
    return factor * least_factor(bound, excess, target.tolerance, target.coverage, number)


def least_factor(
    bounds: Float[np.ndarray, "rows looks"],
    excess: Float[np.ndarray, "rows looks"],
    tolerance: float,
    coverage: float,
    number: int,
) -> float:
    """Return the least factor of error bounds with which they are right for what is given out.

    They are right where no more errors are beyond them than a finite-sample bound allows
    (`allowed_errors`).

    Args:
        bounds: Error bounds; a row is given out at the first look at which its bound is within the
            tolerance.
        excess: Errors over their bounds.
        tolerance: The largest bound of what is given out.
        coverage: The share of errors that bounds should cover.
        number: As for `bar_factor`.

    Returns:
        The factor; infinite where none would do.
    """
    rows, times = np.arange(len(bounds)), number / len(bounds)
    allowed = allowed_errors(1 - coverage, max(number, 2 * _ROWS))
    for factor in _FACTORS.tolist():
        within = bounds * factor <= tolerance
        given = excess[rows, within.argmax(axis=1)][within.any(axis=1)]
        if times * np.sum(given > factor) <= allowed[int(times * len(given))]:
            return factor
    return math.inf


def conformal_quantile(ratios: Float[np.ndarray, " rows"], coverage: float) -> float:
    """Return the ratio that covers a share of others; infinite where there are too few.

    The k-th of n ratios covers `k / (n + 1)` of others like them (Lei et al. 2018,
    "Distribution-free predictive inference for regression").
    """
    place = math.ceil((len(ratios) + 1) * coverage) - 1
    return float(np.partition(ratios, place)[place]) if place < len(ratios) else math.inf
