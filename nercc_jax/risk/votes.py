"""Checks of the model's own answers: which look wrong, which are wrong, and which workers to fence.

An answer is held back if the surrogate finds it suspicious, or its worker is on probation: at
first, and after each wrong answer, until some of its answers were right. An answer that two workers
give is right. If an answer is outvoted, the other answers of its call are in doubt. A worker that a
sequential test accuses of wrong answers (`WorkerMonitor`) is fenced until it is replaced.

A server's queries and the rows of a run use the same checks.
"""

import collections
import dataclasses
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Shaped

from ._monitor import WorkerMonitor
from .answer_check import fit_answer_check as fit_answer_check

_LOG = logging.getLogger(__name__)

_PROBATION = 16  # right answers that end a probation after a wrong answer
# The largest difference of two right answers, as a share of the largest output (float32, and
# shorter dtypes): batches of different sizes are computed in different orders.
_SAME, _SAME_SHORT = 1e-3, 5e-2
# The difference is also at most `_OF_SPREAD` of the spread of answers, but this limit is no less
# than `_ROUNDING` of the first.
_OF_SPREAD, _ROUNDING = 0.01, 0.01
_SEEN, _FEWEST = 64, 8  # the most and the fewest answers from which the spread is estimated


class HeldAnswer(NamedTuple):
    """An answer that is held back, and the number of its call."""

    value: np.ndarray
    call: int


# By worker, the answers to a query or a row in doubt, in the order of their arrival.
HeldAnswers: TypeAlias = dict[int, HeldAnswer]


class Verdict(NamedTuple):
    """The decided answer, and the two workers that gave it; one twice if no two agreed."""

    value: np.ndarray
    givers: tuple[int, int]

    @property
    def agreed(self) -> bool:
        return self.givers[0] != self.givers[1]


@dataclasses.dataclass
class _Record:
    """The state of a worker's checks."""

    probation: int  # right answers until it ends
    deaths: int = 0
    reason: str | None = None  # why it is accused, whether it is fenced or not


class AnswerChecks:
    """Checks of one pool's answers: suspicious answers, wrong ones, and fenced workers.

    Only one thread may use it; others may call `status`.

    Attributes:
        fenced: The workers that get no traffic; a new object whenever they change.
        outvoted: The calls with an outvoted answer; the user of this class doubts their other
            answers, and clears the set.
    """

    def __init__(
        self,
        num_workers: int,
        max_fenced: float,
        worker_dtype: str | None,
        observe: Callable[[str, int], Any],
        first: int = 4,
        most: int = 3,
    ):
        """Start without answers.

        `first` right answers end a new worker's probation. At most `most` workers compute a query
        until two agree. `max_fenced` is the largest share of workers that is fenced.
        """
        self._observe, self._first, self._most_workers = observe, first, most
        self._monitor = WorkerMonitor(num_workers)
        self._most = int(max_fenced * num_workers)
        self._same = _SAME if worker_dtype in (None, "float32") else _SAME_SHORT
        self._records = [_Record(first) for _ in range(num_workers)]
        self.fenced: frozenset[int] = frozenset()
        self.outvoted: set[int] = set()
        self._seen: collections.deque[np.ndarray] = collections.deque(maxlen=_SEEN)

    @property
    def accused(self) -> frozenset[int]:
        """The workers that the test has accused, whether they are fenced or not."""
        records = enumerate(self._records)
        return frozenset(worker for worker, record in records if record.reason is not None)

    def receive(
        self,
        call: int,
        worker: int,
        candidates: Sequence[HeldAnswers],
        values: Shaped[np.ndarray, "answers ..."],
        suspicious: Bool[np.ndarray, " answers"],
    ) -> tuple[list[int], dict[int, Verdict]]:
        """Receive a worker's answers of one call.

        Args:
            call: The number of the call.
            worker: The worker.
            candidates: For each answer, the earlier answers to the same query or row; empty if it
                is not in doubt. This worker's answer is added to those in doubt.
            values: The answers.
            suspicious: The mask of answers that look wrong; used for those without earlier answers.

        Returns:
            The places of answers that are not in doubt, and by place the verdicts on those that
            were in doubt and are decided.
        """
        verdicts = {}
        for place, earlier in enumerate(candidates):
            if earlier:
                earlier.setdefault(worker, HeldAnswer(np.array(values[place]), call))
                if (verdict := self.settle(earlier)) is not None:
                    verdicts[place] = verdict
        fresh = [place for place, each in enumerate(candidates) if not each]
        held = suspicious[fresh]
        if worker in self.accused:  # it may still have calls in flight
            held = np.ones(len(fresh), bool)
        else:
            held[: self._records[worker].probation] = True
            self._monitor.add(worker, right=len(held) - int(np.count_nonzero(held)))
        for place in np.array(fresh, int)[held].tolist():
            candidates[place][worker] = HeldAnswer(np.array(values[place]), call)
        return np.array(fresh, int)[~held].tolist(), verdicts

    def settle(self, candidates: HeldAnswers, *, last: bool = False) -> Verdict | None:
        """Compare workers' answers to one query or row.

        Returns:
            The verdict; None to wait for one more worker's answer. If this is the `last` chance,
            there is always a verdict.
        """
        latest = list(candidates.values())[-1].value
        if np.isfinite(latest).all():
            self._seen.append(np.asarray(latest, float).ravel())
        accused = self.accused  # two accused workers may agree on wrong answers: old weights, say
        for one, other in itertools.combinations(candidates, 2):
            value = candidates[one].value
            if accused >= {one, other} or not self.agree(value, candidates[other].value):
                continue
            for worker, candidate in candidates.items():
                if worker not in (one, other):
                    self.outvoted.add(candidate.call)
                    self._accuse(worker)
                    continue
                self._monitor.add(worker, right=1)
                self._records[worker].probation = max(self._records[worker].probation - 1, 0)
            return Verdict(value, (one, other))
        others = len(self._records) - len(self.fenced.union(candidates))
        if len(candidates) < self._most_workers and others and not last:
            return None
        best = min(candidates, key=lambda each: (each in self.fenced, self._monitor.wrong[each]))
        return Verdict(candidates[best].value, (best, best))

    def look(self, deaths: Sequence[int]) -> None:
        """Reset the checks of workers that were replaced, since their number of deaths changed."""
        for worker, (record, seen) in enumerate(zip(self._records, deaths, strict=True)):
            if seen == record.deaths:
                continue
            self._records[worker] = _Record(self._first, seen)
            self._monitor.restart(worker)
            if worker in self.fenced:
                self.fenced -= {worker}
                self._observe("worker_released", 1)
                _LOG.info("a worker is fenced no more: it was replaced", extra={"worker": worker})

    def status(self) -> dict[str, Any]:
        reasons = ((worker, record.reason) for worker, record in enumerate(self._records))
        named = {str(worker): (worker in self.fenced, why) for worker, why in reasons if why}
        return {
            "answers": sum(self._monitor.number),
            "wrong": sum(self._monitor.wrong),
            "fenced": {worker: why for worker, (fenced, why) in named.items() if fenced},
            "not_fenced": {worker: why for worker, (fenced, why) in named.items() if not fenced},
            "max_fenced": self._most,
        }

    def agree(self, one: np.ndarray, other: np.ndarray) -> bool:
        """Return whether two answers are equal up to rounding.

        If outputs hardly differ between queries, such as temperatures near 300 K, a smaller
        difference counts. An output that is infinite or NaN must be the same in both.
        """
        if np.array_equal(one, other, equal_nan=True):
            return True
        finite = np.isfinite(one) & np.isfinite(other)
        if not np.array_equal(one[~finite], other[~finite], equal_nan=True):
            return False
        one, other = one[finite], other[finite]
        limit = self._same * float(max(np.abs(one).max(), np.abs(other).max()))
        difference = np.abs(one - other).max()
        if difference <= limit and len(self._seen) >= _FEWEST and self._same == _SAME:
            seen = np.stack(self._seen)
            spread = np.median(np.abs(seen - np.median(seen, axis=0)).max(axis=1))
            limit = min(limit, max(_OF_SPREAD * float(spread), _ROUNDING * limit))
        return bool(difference <= limit)

    def _accuse(self, worker: int) -> None:
        """Record a wrong answer of a worker; fence the worker if the test accuses it."""
        self._observe("check_wrong", 1)
        record, monitor = self._records[worker], self._monitor
        record.probation = _PROBATION
        if not monitor.add(worker, wrong=1) or worker in self.fenced:
            return
        wrong, number, known = monitor.wrong[worker], monitor.number[worker], record.reason
        record.reason = f"{wrong} of {number} answers were not those of two other workers"
        facts = {"worker": worker, "why": record.reason}
        if len(self.fenced) < self._most:
            self.fenced |= {worker}
            self._observe("worker_fenced", 1)
            _LOG.warning("a worker is fenced: it answers wrongly", extra=facts)
        elif known is None:
            facts["max_fenced"] = self._most
            _LOG.warning("a worker answers wrongly, but no more may be fenced", extra=facts)
