"""The requests without a reply: the queue of their queries, their deadlines, and health."""

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
from typing import Any, Generic, TypeVar

from ...pools import AbstractPool
from ...pools.clock import AbstractClock
from .._policy import Observe
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

Item = TypeVar("Item")

# Seconds without a turn after which a thread counts as stuck.
STUCK = 5.0
# Seconds without an answer while requests are open after which a batcher is not ready; for slow
# models, this many answer times instead.
_SILENT, _ANSWER_TIMES = 3.0, 5
_STALE = 256  # stale timer entries beyond the number of items after which the heap is rebuilt
# Failed requests in a row after which the batcher sends a probe, and the seconds between probes.
_SUSPICIOUS, _PROBE_EVERY = 3, 1.0


class Timers(Generic[Item]):
    """Items with due times, one for each item, in the order of these times."""

    def __init__(self):
        self._heap: list[tuple[float, int, Item]] = []
        self._due: dict[Item, tuple[float, int]] = {}
        self._numbers = itertools.count()

    @property
    def next(self) -> float:
        """The earliest due time; infinite without items."""
        return self._heap[0][0] if self._heap else math.inf

    def set(self, item: Item, due: float) -> None:
        """Set an item's due time, in place of an earlier one; an infinite one removes the item."""
        self.drop(item)
        if due < math.inf:
            self._due[item] = entry = due, next(self._numbers)
            heapq.heappush(self._heap, (*entry, item))

    def drop(self, item: Item) -> None:
        self._due.pop(item, None)
        if len(self._heap) > 2 * len(self._due) + _STALE:
            self._heap = [each for each in self._heap if self._due.get(each[2]) == each[:2]]
            heapq.heapify(self._heap)
        while self._heap and self._due.get(self._heap[0][2]) != self._heap[0][:2]:
            heapq.heappop(self._heap)

    def pop_due(self, now: float) -> Iterator[Item]:
        """Yield the items whose time has come, in order."""
        while self._heap and self._heap[0][0] <= now:
            item = self._heap[0][2]
            self.drop(item)
            yield item


@dataclasses.dataclass(frozen=True)
class Health:
    """The health of a batcher or a model; if it is not live, only a restart would help."""

    live: bool
    ready: bool
    trouble: str | None = None


class HealthMonitor:
    """The health of a batcher by its turns and answers, which its thread reports.

    `health` may be called from any thread.

    Attributes:
        failed_in_a_row: the number of requests that failed since the last answer.
        probe_error: why the latest probe failed, if nothing was answered since.
        broken: why the batcher answers nothing any more; None while it works.
        closing: whether no more requests are accepted.
    """

    def __init__(self, clock: AbstractClock):
        self._clock = clock
        self._last_turn = clock.now()
        # Since when requests are open and none was answered; infinite without open requests.
        self._silent_since = math.inf
        self._probed_at = 0.0
        self.failed_in_a_row = 0
        self.probe_error: str | None = None
        self.broken: str | None = None
        self.closing = False

    def report_turn(self, open_requests: bool) -> float:
        """Record a turn of the batcher's thread, and return the time."""
        now = self._last_turn = self._clock.now()
        since = min(self._silent_since, now)
        self._silent_since = since if open_requests else math.inf
        return now

    def report_answer(self, now: float) -> None:
        self._silent_since, self.failed_in_a_row, self.probe_error = now, 0, None

    def probe_due(self, now: float) -> bool:
        """Return whether to send a probe now; if so, the next one is due a second later."""
        suspicious = self.failed_in_a_row >= _SUSPICIOUS or self.probe_error is not None
        due = suspicious and now >= self._probed_at + _PROBE_EVERY
        self._probed_at = now if due else self._probed_at
        return due

    def health(self, pool: AbstractPool, answer_time: float) -> Health:
        """Return whether a query would be answered now.

        Args:
            pool: The workers.
            answer_time: The median seconds of an answer; infinite if unknown.
        """
        now, live, trouble = self._clock.now(), True, None
        silence, pool_silence = now - self._silent_since, pool.clock.now() - pool.heartbeat
        if self.broken is not None:
            live, trouble = False, self.broken
        elif self.closing:
            trouble = "draining"
        elif now - self._last_turn > STUCK:
            live, trouble = False, f"the batcher is stuck for {now - self._last_turn:.0f} s"
        elif silence > max(_SILENT, _ANSWER_TIMES * answer_time if answer_time < math.inf else 0.0):
            trouble = f"no answer for {silence:.0f} s while queries wait"
        elif self.probe_error is not None:
            trouble = f"a query of its own got no answer: {self.probe_error}"
        elif pool.trouble is not None:
            live, trouble = False, pool.trouble
        elif pool_silence > STUCK:
            live, trouble = False, f"the pool is stuck for {pool_silence:.0f} s"
        elif pool.alarm is not None:
            trouble = pool.alarm
        else:  # last, since a stuck pool may hold the lock that `report` needs
            report = pool.report()
            if report.starting == report.num_workers:
                trouble = f"none of {report.num_workers} workers is ready"
        return Health(live, trouble is None, trouble)


class OpenRequests:
    """Requests without a reply: the queue of their queries, their deadlines, and their ends.

    `accept`, `drain`, `waiting` and `len` may be used by any thread, everything else only by the
    deciding thread.

    Attributes:
        queue: the queries that were not sent to a worker, first in, first out.
        waiting: their number, including those of accepted requests that are not enqueued yet.
        taken: the queries that left the queue in the present step of the deciding thread.
        deadlines: the times at which requests fail.
        monitor: the health, and whether requests are accepted.
    """

    def __init__(
        self, capacity: int, observe: Observe, clock: AbstractClock, look: Callable[[Any], Any]
    ):
        """Start empty; `look` is called with each group of a query that was answered or ended."""
        self.queue: collections.OrderedDict[Query, None] = collections.OrderedDict()
        self.waiting, self._capacity = 0, capacity
        self.taken: list[Query] = []
        self.deadlines: Timers[Request] = Timers()
        self.monitor = HealthMonitor(clock)
        self._observe, self._clock, self._look = observe, clock, look
        self._settled = threading.Condition()
        self._open: set[Request] = set()

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._open))

    def accept(self, request: Request) -> None:
        """Accept a request.

        Raises:
            QueueFull: if the queue has no room.
            ServerClosing: after `drain`.
            InferenceFailed: if the deciding thread has failed.
        """
        number = len(request.queries)
        with self._settled:
            if self.monitor.broken is not None:
                self._observe("request_failed", 0.0)
                raise InferenceFailed(self.monitor.broken)
            if self.monitor.closing:
                self._observe("request_draining", 0.0)
                raise ServerClosing("no more requests are taken: the server is shutting down")
            if self.waiting + number > self._capacity:
                self._observe("request_queue_full", 0.0)
                raise QueueFull(
                    f"{self.waiting} queries wait and {number} more came; the queue holds "
                    f"{self._capacity}: come again later, or with fewer at once"
                )
            self.waiting += number
            self._open.add(request)

    def accept_own(self, request: Request) -> bool:
        """Accept and enqueue a request of the server's own; return whether it was accepted.

        It is not counted. There is one probe at a time. An audit needs an empty queue.
        """
        with self._settled:
            audits, number = request.own == "audit", len(request.queries)
            barred = self.waiting > 0 if audits else any(r.own == "probe" for r in self._open)
            if barred or self.monitor.closing or self.waiting + number > self._capacity:
                return False
            self.waiting += number
            self._open.add(request)
        self.enqueue(request)
        return True

    def enqueue(self, request: Request) -> None:
        """Put an accepted request's queries into the queue, once, and set its deadline."""
        if not request.queued:
            request.queued = True
            self.queue.update(dict.fromkeys(request.queries))
            self.deadlines.set(request, request.arrived + request.deadline)

    def take(self, number: int) -> list[Query]:
        """Return this number of queries, and remove them from the queue."""
        queries = [self.queue.popitem(last=False)[0] for _ in range(number)]
        self.taken += queries
        for query in queries:
            query.waiting = False
        with self._settled:
            self.waiting -= number
        return queries

    def answer(self, queries: Sequence[Query], answer: Answer, now: float) -> None:
        """Store answers, one a row, to those queries that are open; reply to complete requests."""
        rows: dict[Request, list[int]] = {}
        for row, query in enumerate(queries):
            if not query.done:
                # A query that was sent again, or held back, is in several groups; those that did
                # not answer it may have no open queries now.
                self._leave(query, look=query.reexecuted or bool(query.candidates))
                rows.setdefault(query.request, []).append(row)
        for request, own in rows.items():
            self.monitor.report_answer(now)
            given = [queries[row] for row in own]
            request.answer(given, answer, own)
            counted = self._observe if request.own is None else lambda what, number: None
            again = sum(query.reexecuted for query in given) * (answer.source == "exact")
            for source, number in ((answer.source, len(given) - again), ("reexecuted", again)):
                if number:
                    counted(f"query_{source}", number)
            if request.left:
                continue
            seconds, queued = self._clock.now() - request.arrived, request.sent - request.arrived
            counted("request_ok", seconds)
            counted("compute_seconds", seconds - queued)
            self._end(request)
            reply = dataclasses.replace(request.reply, queued=queued, seconds=seconds)
            _resolve(request.future.set_result, reply)

    def fail(self, request: Request, error: Exception) -> None:
        """End a request with an error, unless it has ended."""
        if request not in self._open:
            return
        self._end(request)
        if request.own == "probe":
            _LOG.info("a query of the server's own got no answer", extra={"why": str(error)})
            self.monitor.probe_error = message_of(error)
        elif request.own is None:
            what = "deadline" if isinstance(error, DeadlineExceeded) else "failed"
            self._observe(f"request_{what}", self._clock.now() - request.arrived)
            self.monitor.failed_in_a_row += 1
        _resolve(request.future.set_exception, error)

    def cancel(self, request: Request, now: float) -> None:
        if request in self._open:
            self._observe("request_cancelled", now - request.arrived)
            self._end(request)

    def drain(self, seconds: float, wake: Callable[[], Any]) -> None:
        """Accept no more requests, `wake` the thread, and wait for open ones, at most `seconds`."""
        end = self._clock.now() + seconds
        with self._settled:
            self.monitor.closing = True
            wake()
            while self._owed and (left := end - self._clock.now()) > 0:
                self._clock.wait(self._settled, left)

    def fail_all(self, error: BaseException) -> None:
        """Fail all open and all later requests, because the deciding thread ends."""
        with self._settled:
            self.monitor.broken = why = f"the batcher has failed: {error}"
            left, self._open = self._open, set()
            self._settled.notify_all()
        now = self._clock.now()
        for request in left:
            _resolve(request.future.set_exception, InferenceFailed(why))
        counts = [("request_failed", now - request.arrived) for request in left]
        for what, number in (("internal_error", 1), *counts):
            with contextlib.suppress(Exception):  # `observe` itself may have failed
                self._observe(what, number)

    def _leave(self, query: Query, *, look: bool) -> None:
        """End a query: remove it from the queue, and drop its references to groups.

        These would be a reference cycle, and garbage collection stops all threads.
        """
        query.done = True
        if query.waiting:
            query.waiting = False
            self.queue.pop(query, None)
            with self._settled:
                self.waiting -= 1
        groups, query.groups = query.groups, []
        for group in groups if look else ():
            self._look(group)

    def _end(self, request: Request) -> None:
        for query in request.queries:
            if not query.done:
                self._leave(query, look=True)
            query.x = None  # free the data, which may be large
        request.queries, request.x = [], None
        self.deadlines.drop(request)
        with self._settled:
            self._open.discard(request)
            if not self._owed:
                self._settled.notify_all()

    @property
    def _owed(self) -> bool:
        """True if there are open requests other than the server's own audits."""
        return any(request.own != "audit" for request in self._open)


def _resolve(settle: Callable[[Any], None], outcome: Any) -> None:
    with contextlib.suppress(concurrent.futures.InvalidStateError):  # it was cancelled
        settle(outcome)
