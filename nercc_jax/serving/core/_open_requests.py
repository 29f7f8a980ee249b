"""The requests that were accepted and have no reply yet: each ends exactly once."""

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
from ._group import Group
from ._health import Health, HealthMonitor
from ._queue import QueryQueue
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

_STALE = 256  # deadlines of finished requests that are kept before the heap is rebuilt


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

    def answer(self, queries: Sequence[Query], answer: Answer, now: float) -> list[Group]:
        """Give queries of any requests their answers, except those that nobody waits for."""
        groups: list[Group] = []
        rows: dict[Request, list[int]] = {}
        for row, query in enumerate(queries):
            if query.done:
                continue
            self._queue.discard(query)
            group = query.leave_group()
            # The answer to a query that was sent again, or held back, does not come from its first
            # group right now, which may be over.
            if (query.reexecuted or query.candidates) and group is not None:
                groups.append(group)
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

    def fail(self, request: Request, error: Exception) -> list[Group]:
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

    def cancel(self, request: Request, now: float) -> list[Group]:
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

    def _drop(self, request: Request) -> list[Group]:
        groups: list[Group] = []
        for query in request.queries:
            if not query.done:
                self._queue.discard(query)
                group = query.leave_group()
                if group is not None:
                    groups.append(group)
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
