"""The screen: holds back the model's own answers that look wrong; other workers compute them again.

`AnswerChecks` decides which answers these are, and which workers are fenced; this file keeps the
queries that wait. A query whose answer is held back is sent at once to another worker; if the two
answers differ, to a third. At most three workers compute it. Shortly before its deadline the answer
is returned anyway, marked in the reply as suspicious.

Other answers from the same call to the same request also wait, which delays no reply. If an answer
of the call is outvoted, they are computed again, too.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..risk.votes import AnswerChecks, HeldAnswer, Verdict
from .adapt._predictor import Predictor
from .core._request import Query
from .core._requests import Timers
from .core._setup import Setup

# The share of its deadline that is left when an answer is no longer held back.
_LEFT = 0.1
_MAX_FENCED = 0.25  # the largest share of workers that may be fenced for wrong answers
_EVERY = 1.0  # seconds between checks whether a fenced worker was replaced
# The largest share of queries that may be held back: without it the load doubles when the queries
# change. The unused budget of the latest `_SAVED` queries is kept.
_MOST, _SAVED = 0.2, 1000


class AnswerScreen:
    """The answers that are held back because they look wrong; none without `check_answers`.

    Used by the deciding thread only. After each call, `take` returns the queries to compute again,
    and those that are settled.
    """

    def __init__(self, setup: Setup, predictor: Predictor | None):
        """Create a screen that holds nothing."""
        self._setup, self._predictor, pool = setup, predictor, setup.pool
        self._checks: AnswerChecks | None = None
        if setup.policy.check_answers is not None:
            self._checks = AnswerChecks(
                pool.num_workers, _MAX_FENCED, pool.worker_dtype, setup.observe
            )
        self._fenced: frozenset[int] = frozenset()
        self._budget = _MOST * _SAVED
        self._due: Timers[Query] = Timers()
        # Answers that do not look wrong: their call, and the queries of that call that do.
        self._others: dict[Query, tuple[int, Sequence[Query]]] = {}
        self._calls = itertools.count()
        self._look_at = -math.inf if self._checks is not None else math.inf
        self._outcomes: list[tuple[Query, Verdict | None]] = []

    @property
    def next_due(self) -> float:
        return min(self._due.next, self._look_at)

    def take(self) -> list[tuple[Query, Verdict | None]]:
        """Return the queries decided since the last call, with None for those to compute again.

        The answer of any other query's verdict must be returned to the client. It is suspicious
        unless two workers agree on it.
        """
        outcomes, self._outcomes = self._outcomes, []
        if self._checks is not None and self._checks.fenced is not self._fenced:
            self._fenced = self._checks.fenced
            self._setup.pool.fence(self._fenced)
        return outcomes

    def receive(
        self, worker: int, queries: Sequence[Query], values: np.ndarray
    ) -> list[int] | range:
        """Take a worker's answers to queries; return the rows that are not held back."""
        if self._checks is None or self._predictor is None:
            return range(len(queries))
        checks, call = self._checks, next(self._calls)
        rows = [row for row, query in enumerate(queries) if not query.done]
        new = [row for row in rows if not queries[row].candidates]
        suspicious = np.zeros(len(queries), bool)
        if new:
            self._budget = min(self._budget + _MOST * len(new), _MOST * _SAVED)
            x = np.stack([x for row in new if (x := queries[row].x) is not None])
            suspicious[new] = self._predictor.suspicious(x, values[new])
        candidates = [queries[row].candidates for row in rows]
        given = checks.receive(call, worker, candidates, values[rows], suspicious[rows])
        trusted, verdicts = [rows[place] for place in given[0]], given[1]
        for place, verdict in verdicts.items():
            self._settle(queries[rows[place]], verdict)
        waiting = sorted({*rows} - {*trusted} - {rows[place] for place in verdicts})
        for row in waiting:
            query = queries[row]
            if row in new:
                self._doubt(query)
            else:  # a copy that is in flight will bring another answer anyway
                copied = any(not group.mask.all() for group in query.groups[1:])
                self._hold(query, again=not copied)
        held, out = [queries[row] for row in waiting if row in new], []
        for row, query in enumerate(queries):
            if row in trusted and any(each.request is query.request for each in held):
                query.candidates[worker] = HeldAnswer(np.array(values[row]), call)
                self._others[query] = call, held
            elif row in trusted or query.done:
                out.append(row)
        return out

    def settle_due(self, now: float) -> None:
        """Settle the queries whose deadlines are near; trust workers again that were replaced."""
        if self._checks is not None and now >= self._look_at:
            self._checks.look([each.deaths for each in self._setup.pool.report().workers])
            self._look_at = now + _EVERY
        for query in self._due.pop_due(now):
            self.give_up(query)

    def give_up(self, query: Query) -> None:
        """Settle a query that no further worker will answer in time."""
        if self._checks is not None and not query.done and query.candidates:
            verdict = self._checks.settle(query.candidates, last=True)
            assert verdict is not None
            self._settle(query, verdict)

    def release(self) -> None:
        """Settle the queries that waited for doubted answers of their call that are now settled."""
        for query, (_, doubted) in list(self._others.items()):
            if query.done or len(query.candidates) > 1:  # another worker has answered
                del self._others[query]
            elif not any(each.request is query.request and not each.done for each in doubted):
                del self._others[query]
                ((worker, candidate),) = query.candidates.items()
                verdict = Verdict(candidate.value, (worker, -1))  # agreed: it does not look wrong
                self._outcomes.append((query, verdict))

    def _settle(self, query: Query, verdict: Verdict) -> None:
        """Settle a query by a verdict; doubt the answers that waited for an outvoted call."""
        assert self._checks is not None
        self._setup.observe("check_agreed" if verdict.agreed else "check_open", 1)
        self._outcomes.append((query, verdict))
        self._due.drop(query)
        outvoted, self._checks.outvoted = self._checks.outvoted, set()
        for other, (call, _) in list(self._others.items()):
            if call in outvoted:
                del self._others[other]
                if not other.done and len(other.candidates) == 1:
                    self._doubt(other)

    def _doubt(self, query: Query) -> None:
        """Hold back a query's only answer; settle the query with it if the budget is spent."""
        if self._budget < 1:
            ((worker, candidate),) = query.candidates.items()
            self._settle(query, Verdict(candidate.value, (worker, worker)))
            return
        self._budget -= 1
        self._setup.observe("check_again", 1)
        self._hold(query, again=True)

    def _hold(self, query: Query, *, again: bool) -> None:
        request = query.request
        self._due.set(query, request.arrived + (1 - _LEFT) * request.deadline)
        if again:
            self._outcomes.append((query, None))

    def status(self) -> dict[str, Any] | None:
        """Return the results of the checks for the status; None without checks."""
        if self._checks is None or self._predictor is None:
            return None
        return {"ready": self._predictor.checks_answers} | self._checks.status()
