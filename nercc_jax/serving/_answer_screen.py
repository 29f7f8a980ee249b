"""The screen: the model's own answers that look wrong are held back and computed again elsewhere.

Which answers these are, and which workers are fenced, is decided by `AnswerChecks`; this
file has the queries that wait for it. A query that is held back goes out again at once, to another
worker; where the two differ, to a third. At most three workers compute it. Shortly before its
deadline an answer goes out as it is, and the reply says so.

Other answers that came in the same call to the same request wait as well, which delays no reply. If
one of the call is outvoted, they are computed again, too.
"""

import collections
import dataclasses
import heapq
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from ..pools import AbstractPool, Batch
from ..risk.votes import AnswerChecks, Verdict
from ._policy import Observe
from .core._adaptation import Expect, Expectation
from .core._request import Query
from .core._requests import EventQueue

# The share of a deadline that is left when an answer that is held back goes out as it is.
_LEFT = 0.1
_EVERY = 1.0  # seconds between audits of a fenced worker
# Queries held back, as a share of all (more would double the load where the queries have changed),
# and the queries whose share may be saved for later.
_MOST, _SAVED = 0.2, 1000
_AHEAD = 64  # expectations, at most, that wait for the scheduler to be idle


class Audit(NamedTuple):
    """An event: a fenced worker may have answered an audit."""

    worker: int
    batch: Batch


class Settled(NamedTuple):
    """A query that was held back, the answer that is to be given out, and whether to doubt it."""

    query: Query
    verdict: Verdict
    suspicious: bool


@dataclasses.dataclass
class _Call:
    """A worker's answers in doubt, and others of the same call and requests that wait for them."""

    worker: int
    doubted: list[Query]
    others: list[Query]

    def awaited(self, query: Query) -> bool:
        """Return whether a query's request waits for one whose answer is in doubt."""
        return any(each.request is query.request and not each.done for each in self.doubted)


class AnswerScreen:
    """Holds back the answers that look wrong, on the scheduler's thread.

    Those that `compute_ahead` may compute stand in `ahead`.
    """

    def __init__(
        self,
        checks: AnswerChecks,
        expect: Expect,
        pool: AbstractPool,
        events: EventQueue,
        observe: Observe,
    ):
        """Create a screen that holds nothing; `events` receives an `Audit` when it is answered."""
        self._checks, self._expect, self._pool = checks, expect, pool
        self._events, self._observe = events, observe
        self._fenced: frozenset[int] = frozenset()
        self._left = _MOST * _SAVED  # of the queries that may be held back
        self._calls: list[_Call] = []
        self._due: list[tuple[float, int, Query]] = []
        self._numbers = itertools.count()
        self._look_at = -math.inf
        self._audits: dict[int, Batch] = {}
        self.ahead: collections.deque[Any] = collections.deque(maxlen=_AHEAD)

    @property
    def next_due(self) -> float:
        return min(self._due[0][0] if self._due else math.inf, self._look_at)

    def expect(self, queries: Sequence[Query]) -> None:
        """Start to predict the answers to queries that were sent, all at once."""
        new = [each for each in queries if each.expected is None and not each.candidates]
        if new := [(query, query.x) for query in new if query.x is not None]:
            found = self._expect([x for _, x in new])
            for (query, _), expected in zip(new, found, strict=bool(found)):
                query.expected = expected
                if expected.row == 0 and not expected.answers.begun:
                    self.ahead.append(expected.answers)

    def compute_ahead(self) -> None:
        """Compute one expectation, for a thread that has nothing else to do while models run.

        What it does not come to is computed once the answers are there.
        """
        self.ahead.popleft().compute()

    def receive(
        self, worker: int, queries: Sequence[Query], values: np.ndarray
    ) -> tuple[list[int], list[Query], list[Settled]]:
        """Take a worker's answers to queries.

        Returns:
            The rows that go out as they are; the queries that another worker is to compute; and
            those that were held back and are settled now.
        """
        rows = fresh = list(range(len(queries)))
        verdicts: list[tuple[Query, Verdict | None]] = []
        if any(query.candidates or query.done for query in queries):
            held = [row for row in rows if queries[row].candidates and not queries[row].done]
            rows = [row for row in rows if row not in held]
            fresh = [row for row in rows if not queries[row].done]
            for row in held:
                verdict = self._receive_again(worker, queries[row], values[row])
                # One that a further worker has will have another answer anyway.
                if verdict is not None or not queries[row].copied:
                    verdicts.append((queries[row], verdict))
                if verdict is not None and verdict.agreed:
                    verdicts += self._doubt_calls(queries[row], verdict)
            values, queries = values[fresh], [queries[row] for row in fresh]
        self._left = min(self._left + _MOST * len(queries), _MOST * _SAVED)
        suspicious = np.zeros(len(queries), bool)
        if queries:
            self.expect(queries)
            expected = [query.expected for query in queries]
            found = _suspicious(expected, values.reshape(len(values), -1))
            suspicious = self._checks.screen(worker, found)
        if suspicious.any():
            for place in np.flatnonzero(suspicious).tolist():
                query = queries[place]
                verdicts.append((query, self._doubt(worker, query, values[place])))
            waits = self._wait(worker, queries, values, suspicious)
            held_back = set(itertools.compress(fresh, suspicious | waits))
            rows = [row for row in rows if row not in held_back]
        self._follow_fences()
        if not verdicts:
            return rows, [], []
        again = [query for query, verdict in verdicts if verdict is None]
        settled = [
            Settled(query, verdict, not verdict.agreed)
            for query, verdict in verdicts
            if verdict is not None
        ]
        return rows, again, settled

    def pop_due(self, now: float) -> list[Settled]:
        """Return the queries whose deadlines do not allow to wait any longer."""
        found = []
        while self._due and self._due[0][0] <= now:
            query = heapq.heappop(self._due)[2]
            if not query.done and query.candidates:
                found.append(self.give_up(query))
        self._follow_fences()
        return found

    def give_up(self, query: Query) -> Settled:
        """Settle a query that no further worker will answer."""
        verdict = self._checks.compare(query.x, query.candidates, last=True)
        assert verdict is not None
        self._observe("check_agreed" if verdict.agreed else "check_open", 1)
        return Settled(query, verdict, not verdict.agreed)

    def release(self) -> list[Settled]:
        """Return the queries that waited for others, which have their answers now."""
        found = []
        for call in self._calls:
            free = [query for query in call.others if not call.awaited(query)]
            call.others = [query for query in call.others if call.awaited(query)]
            for query in filter(_waits, free):
                verdict = Verdict(query.candidates[call.worker], (call.worker, call.worker))
                found.append(Settled(query, verdict, suspicious=False))
        self._calls = [call for call in self._calls if call.others]
        return found

    def look(self, now: float) -> None:
        """Send audits to fenced workers, once a second while there are any."""
        if now < self._look_at:
            return
        deaths = [worker.deaths for worker in self._pool.report().workers]
        for worker, x in self._checks.audits(deaths):
            if worker not in self._audits:

                def answered(batch: Batch, worker: int = worker) -> None:
                    self._events.post(Audit(worker, batch))

                batch = self._pool.open(1, needed=1, copies=1, on_change=answered)
                self._audits[worker] = batch
                self._pool.send(batch, [0], [x[None]], only=worker)
        self._follow_fences()
        self._look_at = now + _EVERY

    def receive_audit(self, audit: Audit) -> None:
        """Take a fenced worker's answer to an audit, if it is there."""
        if self._audits.get(audit.worker) is not audit.batch:
            return
        value = audit.batch.answer(0)
        if value is None and not audit.batch.lost(0):
            return
        del self._audits[audit.worker]
        audit.batch.forget()
        self._checks.audited(audit.worker, None if value is None else value[0])
        self._follow_fences()

    def _receive_again(self, worker: int, query: Query, value: np.ndarray) -> Verdict | None:
        """Compare another answer to a query that is held back."""
        query.candidates.setdefault(worker, np.array(value))
        verdict = self._checks.compare(query.x, query.candidates)
        if verdict is None:
            self._keep_due(query)
        else:
            self._observe("check_agreed" if verdict.agreed else "check_open", 1)
        return verdict

    def _doubt(self, worker: int, query: Query, value: np.ndarray) -> Verdict | None:
        """Hold an answer back; return it as it is where the budget does not allow that."""
        if self._left >= 1:
            self._left -= 1
            self._observe("check_again", 1)
            query.candidates = {worker: np.array(value)}
            self._keep_due(query)
            return None
        self._observe("check_open", 1)
        return Verdict(value, (worker, worker))

    def _wait(
        self,
        worker: int,
        queries: Sequence[Query],
        values: np.ndarray,
        suspicious: Bool[np.ndarray, " queries"],
    ) -> Bool[np.ndarray, " queries"]:
        """Have answers wait whose requests wait for answers of the same call; return which do."""
        doubted = [query for query in itertools.compress(queries, suspicious) if query.candidates]
        call = _Call(worker, doubted, [])
        waits = np.array([call.awaited(each) for each in queries])
        waits &= ~suspicious
        for place in np.flatnonzero(waits).tolist():
            queries[place].candidates = {worker: np.array(values[place])}
            call.others.append(queries[place])
        if call.others:
            self._calls.append(call)
        return waits

    def _doubt_calls(self, query: Query, verdict: Verdict) -> list[tuple[Query, Verdict | None]]:
        """Doubt what waits for an answer that was outvoted."""
        found = []
        for call in self._calls:
            if query in call.doubted and call.worker not in verdict.givers:
                others, call.others = call.others, []
                for each in filter(_waits, others):
                    value = each.candidates[call.worker]
                    found.append((each, self._doubt(call.worker, each, value)))
        return found

    def _keep_due(self, query: Query) -> None:
        """Include a query in `pop_due`."""
        request = query.request
        due = request.arrived + (1 - _LEFT) * request.deadline
        heapq.heappush(self._due, (due, next(self._numbers), query))

    def _follow_fences(self) -> None:
        """Have the pool send nothing to workers that are fenced now."""
        if self._checks.fenced is self._fenced:
            return
        self._fenced = self._checks.fenced
        self._pool.fence(self._fenced)


def _waits(query: Query) -> bool:
    """Return whether a query of a call still waits for others: nobody else has answered it."""
    return not query.done and len(query.candidates) == 1


def _suspicious(
    expected: Sequence[Expectation | None], own: Float[np.ndarray, "queries m"]
) -> Bool[np.ndarray, " queries"]:
    """Return which answers look wrong; those of which nothing was expected do not."""
    first = expected[0]
    if first is not None and all(each and each.answers is first.answers for each in expected):
        return first.answers.suspicious([each.row for each in expected if each], own)
    found = np.zeros(len(own), bool)
    for place, each in enumerate(expected):  # they were sent at different times
        if each is not None:
            found[place] = each.answers.suspicious([each.row], own[place : place + 1])[0]
    return found
