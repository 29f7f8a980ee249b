"""The requests that have no reply yet: the queue of what no worker has had, and their ends."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import heapq
import itertools
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ...pools.clock import AbstractClock
from .._policy import Observe
from ._health import Health, HealthMonitor
from ._request import (
    Answer,
    DeadlineExceeded,
    InferenceFailed,
    Query,
    QueueFull,
    Request,
    ServerClosing,
    message_of,
)

_LOG = logging.getLogger(__name__)

_NUMBERS = itertools.count()  # queries of the same turn go in the order in which they came
_STALE = 256  # deadlines of finished requests that are kept before the heap is rebuilt


class Budget:
    """A share of the queries that may be spent on further calls, earned as queries come.

    What `saved` queries earn is kept for later at most, so that no stretch costs much more.
    """

    def __init__(self, share: float | None, saved: int = 1000):
        """Create a budget; a share of None means no bound."""
        self._share, self._saved = share, saved
        self.left = math.inf if share is None else 0.0

    def earn(self, queries: int) -> None:
        if self._share is not None:
            most = max(self._share * self._saved, 1)
            self.left = min(self.left + self._share * queries, most)


class EventQueue:
    """The scheduler's thread and its inbox: requests, changed groups, free workers.

    Any thread may `post`; only the scheduler's own thread takes events out.
    """

    def __init__(self, clock: AbstractClock, name: str, turn: Callable[[], float]):
        """Create the thread, which calls `turn()` after each event and when that asked for it."""
        self._events: collections.deque[Any] = collections.deque()
        self._turns = clock.turns(name, turn)
        self.start, self.wake, self.close = self._turns.start, self._turns.wake, self._turns.close

    def post(self, event: Any) -> None:
        self._events.append(event)
        self._turns.wake()

    def post_group(self, group: Any) -> None:
        """Add a group to which something happened, unless it waits here already."""
        if not group.posted:
            group.posted = True
            self.post(group)

    def __bool__(self) -> bool:
        """Return whether there is any event."""
        return bool(self._events)

    def take(self) -> list[Any]:
        """Return the events so far; what comes meanwhile is left for the next turn."""
        return [self._events.popleft() for _ in range(len(self._events))]


class Lane:
    """Queries in the order of their turns: the arrival of their request, less its lead.

    A query of high priority overtakes ordinary ones that arrived at most the lead before it. An
    ordinary query waits only for those that arrive within the lead after it, so it cannot starve.
    """

    def __init__(self):
        self._heap: list[tuple[float, int, Query]] = []

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def turn(self) -> float:
        """The turn of the first query."""
        return self._heap[0][0]

    @property
    def since(self) -> float:
        """The arrival of the query that has waited for longest."""
        return min(query.request.arrived for *_, query in self._heap)

    def add(self, request: Request) -> None:
        for query in request.queries:
            heapq.heappush(self._heap, (request.turn, next(_NUMBERS), query))

    def pop(self, number: int) -> list[Query]:
        return [heapq.heappop(self._heap)[2] for _ in range(number)]

    def sweep(self) -> None:
        self._heap = [each for each in self._heap if not each[2].done]
        heapq.heapify(self._heap)


class QueryQueue:
    """The bounded queue of queries that no worker has had: a lane for those to be coded, and exact.

    The lane whose first query has the earlier turn is next. Exact queries travel alone and others
    in groups, hence the lanes. `waiting` and `reserve` may be used by any thread, all else only by
    the scheduler's.
    """

    def __init__(self, capacity: int):
        """Create an empty queue, in which so many queries may wait.

        Those of high priority find room for a quarter more.
        """
        self.exact, self.coded = Lane(), Lane()
        self.capacity, self.waiting = capacity, 0
        self._lock = threading.Lock()
        self._dead = 0  # queries that stand in a lane, but nobody waits for
        self._popped: list[Query] = []

    def reserve(self, number: int, *, high: bool = False) -> bool:
        """Reserve room for a number of queries, and return whether there is any."""
        capacity = self.capacity + high * -(-self.capacity // 4)
        with self._lock:
            reserved = self.waiting + number <= capacity
            self.waiting += number * reserved
        return reserved

    def add(self, request: Request) -> None:
        (self.exact if request.exact_only else self.coded).add(request)

    def next_lane(self, *, hold_coded: bool = False) -> Lane | None:
        """Return the lane to serve next, or None; without queries to be coded if these are held."""
        for lane in (self.exact, self.coded) if self._dead else ():
            lane.sweep()
        self._dead = 0
        if not self.waiting:
            return None
        exact, coded = bool(self.exact), bool(self.coded) and not hold_coded
        if exact and coded:
            return min(self.exact, self.coded, key=lambda lane: lane.turn)
        return self.exact if exact else self.coded if coded else None

    def workers_for(self, lane: Lane, workers: int) -> int:
        """Return how many of these workers a lane may use, in proportion to its length."""
        own, total = len(lane), len(self.exact) + len(self.coded)
        return max(workers * own // total, 1) if own < total else workers

    def pop(self, lane: Lane, number: int) -> list[Query]:
        queries = lane.pop(number)
        self._popped += queries
        for query in queries:
            query.waiting = False
        self._count(-number)
        return queries

    def take_popped(self) -> list[Query]:
        popped, self._popped = self._popped, []
        return popped

    def discard(self, query: Query) -> None:
        """Mark a query as over, wherever it stands."""
        query.done = True
        if query.waiting:
            query.waiting = False
            self._count(-1)
            self._dead += 1

    def _count(self, change: int) -> None:
        with self._lock:
            self.waiting += change


class OpenRequests:
    """Accepts requests, resolves their futures, and keeps their deadlines.

    `accept`, `close`, `wait`, `trouble` and `len` may be used by any thread, all else only by the
    scheduler's. Methods that end queries return the groups that should be looked at because of it.
    """

    def __init__(self, queue: QueryQueue, observe: Observe, clock: AbstractClock):
        self._queue, self._observe, self._clock = queue, observe, clock
        self._settled = threading.Condition()
        self._open: set[Request] = set()
        self._deadlines: list[tuple[float, int, Request]] = []
        self._numbers = itertools.count()
        self.monitor = HealthMonitor(clock)
        self.closing = False
        self._broken: str | None = None
        self._probe: Request | None = None  # the batcher's own request, which is not counted

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._open))

    def accept(self, request: Request) -> None:
        """Accept a request.

        Raises:
            QueueFull: where the queue has no room.
            ServerClosing: after `close`.
            InferenceFailed: where the scheduler has died.
        """
        number = len(request.queries)
        with self._settled:
            if self._broken is not None:
                self._observe("request_failed", 0.0)
                raise InferenceFailed(self._broken)
            if self.closing:
                self._observe("request_draining", 0.0)
                raise ServerClosing("no more requests are taken: the server is shutting down")
            if not self._queue.reserve(number, high=request.high):
                self._observe("request_queue_full", 0.0)
                raise QueueFull(
                    f"{self._queue.waiting} queries wait and {number} more came; the queue holds "
                    f"{self._queue.capacity}: come again later, or with fewer at once"
                )
            self._open.add(request)

    def accept_own(self, request: Request, *, audits: bool) -> bool:
        """Accept a request of the batcher's own, which is not counted, and return whether.

        There is one probe at a time. An audit is not accepted where queries wait.
        """
        with self._settled:
            barred = self._queue.waiting > 0 if audits else self._probe in self._open
            if self.closing or barred or not self._queue.reserve(len(request.queries)):
                return False
            self._probe, request.audits = self._probe if audits else request, audits
            self._open.add(request)
        return True

    def keep_deadline(self, request: Request) -> None:
        end = request.arrived + request.deadline
        heapq.heappush(self._deadlines, (end, next(self._numbers), request))

    @property
    def next_deadline(self) -> float:
        return self._deadlines[0][0] if self._deadlines else math.inf

    def pop_expired(self, now: float) -> Iterator[Request]:
        if len(self._deadlines) > 2 * len(self._open) + _STALE:
            self._deadlines = [each for each in self._deadlines if each[2] in self._open]
            heapq.heapify(self._deadlines)
        while self._deadlines and self._deadlines[0][0] <= now:
            yield heapq.heappop(self._deadlines)[2]

    def answer(self, queries: Sequence[Query], answer: Answer, now: float) -> list[Any]:
        """Give queries of any requests their answers, except those that nobody waits for."""
        groups: list[Any] = []
        rows: dict[Request, list[int]] = {}
        for row, query in enumerate(queries):
            if query.done:
                continue
            self._queue.discard(query)
            left = query.leave_groups()
            # The answer to a query that was sent again, or held back, does not come from all of its
            # groups right now, which may be over.
            if query.reexecuted or query.candidates:
                groups += left
            rows.setdefault(query.request, []).append(row)
        for request, own in rows.items():
            self.monitor.report_answer(now)
            given = [queries[row] for row in own]
            if self._counts(request):
                sources = collections.Counter(query.source_of(answer) for query in given)
                for source, number in sources.items():
                    self._observe(f"query_{source}", number)
            if request.answer(given, dataclasses.replace(answer, value=answer.value[own])):
                self._reply(request)
        return groups

    def _counts(self, request: Request) -> bool:
        """Return whether a request is somebody's, and not the server's own."""
        return request is not self._probe and not request.audits

    def _reply(self, request: Request) -> None:
        reply = request.reply(self._clock.now())
        if self._counts(request):
            self._observe("request_ok", reply.seconds)
            self._observe("compute_seconds", reply.seconds - reply.queued)
        self._settle(request)
        _resolve(request.future.set_result, reply)

    def fail(self, request: Request, error: Exception) -> list[Any]:
        """End a request with an error, unless it has ended."""
        if request not in self._open:
            return []
        groups = self._drop(request)
        if request is self._probe:
            _LOG.info("a query of the server's own got no answer", extra={"why": str(error)})
            self.monitor.probe_error = message_of(error)
        elif not request.audits:
            late = isinstance(error, DeadlineExceeded)
            what = "request_deadline" if late else "request_failed"
            self._observe(what, self._clock.now() - request.arrived)
            self.monitor.failed_in_a_row += 1
        _resolve(request.future.set_exception, error)
        return groups

    def cancel(self, request: Request, now: float) -> list[Any]:
        if request not in self._open:
            return []
        self._observe("request_cancelled", now - request.arrived)
        return self._drop(request)

    def close(self) -> None:
        with self._settled:
            self.closing = True

    def wait(self, seconds: float) -> None:
        """Wait until all requests have ended, but no longer than this."""
        end = self._clock.now() + seconds
        with self._settled:
            while self._owed and (left := end - self._clock.now()) > 0:
                self._clock.wait(self._settled, left)

    def fail_all(self, error: BaseException) -> None:
        """Fail all open requests and all that come, because the scheduler's thread ends."""
        with self._settled:
            self._broken = f"the batcher has failed: {error}"
            left, self._open = self._open, set()
            self._settled.notify_all()
        now = self._clock.now()
        counts = [("request_failed", now - request.arrived) for request in left]
        for request in left:
            _resolve(request.future.set_exception, InferenceFailed(self._broken))
        for what, number in (("internal_error", 1), *counts):
            with contextlib.suppress(Exception):  # it may be what failed
                self._observe(what, number)

    def trouble(self, answer_time: float) -> Health | None:
        """Return what is wrong, if anything; see `HealthMonitor.trouble`."""
        if self._broken is not None:
            return Health(False, False, self._broken)
        if self.closing:
            return Health(True, False, "draining")
        return self.monitor.trouble(answer_time)

    def _drop(self, request: Request) -> list[Any]:
        groups: list[Any] = []
        for query in request.queries:
            if not query.done:
                self._queue.discard(query)
                groups += query.leave_groups()
        self._settle(request)
        return groups

    @property
    def _owed(self) -> bool:
        """True if somebody waits for a request: the batcher's own comparisons do not count."""
        return any(not request.audits for request in self._open)

    def _settle(self, request: Request) -> None:
        request.release()
        with self._settled:
            self._open.discard(request)
            if not self._owed:
                self._settled.notify_all()


def _resolve(settle: Callable[[Any], None], outcome: Any) -> None:
    with contextlib.suppress(concurrent.futures.InvalidStateError):  # it was cancelled
        settle(outcome)
