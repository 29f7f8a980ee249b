"""The requests that were accepted and not answered yet: each ends once, and is counted."""

import concurrent.futures
import contextlib
import threading
from collections.abc import Callable
from typing import Any

from ..pools import AbstractClock
from ._health import Health, Pulse
from ._lanes import Lanes
from ._request import (
    Answer,
    DeadlineExceeded,
    InferenceFailed,
    Query,
    QueueFull,
    Request,
    ServerClosing,
    words_of,
)


class Ledger:
    """What callers are owed. `accept`, `shut`, `wait` and `trouble` are for any thread."""

    def __init__(self, lanes: Lanes, observe: Callable[[Any, float], Any], clock: AbstractClock):
        self._lanes, self._observe, self._clock = lanes, observe, clock
        self._settled = threading.Condition()
        self.open: set[Request] = set()
        self.pulse = Pulse(clock)
        self.closing = False
        self.broken: str | None = None
        self._question: Request | None = None  # the batcher's own: not counted

    def accept(self, request: Request) -> None:
        """Raises: `QueueFull`, `ServerClosing`, and `InferenceFailed` where nobody would answer."""
        number = len(request.queries)
        with self._settled:
            if self.broken is not None:
                self._observe("request_failed", 0.0)
                raise InferenceFailed(self.broken)
            if self.closing:
                self._observe("request_draining", 0.0)
                raise ServerClosing("no more requests are taken: the server is shutting down")
            if not self._lanes.admit(number, high=request.high):
                self._observe("request_queue_full", 0.0)
                raise QueueFull(
                    f"{self._lanes.waiting} queries wait and {number} more came; the queue holds "
                    f"{self._lanes.most}: come again later, or with fewer at once"
                )
            self.open.add(request)

    def ask(self, question: Request) -> bool:
        """A question of the batcher's own; whether it goes into a lane. One at a time."""
        with self._settled:
            if self.closing or self._question in self.open or not self._lanes.admit(1):
                return False
            self._question = question
            self.open.add(question)
        return True

    def give(self, query: Query, answer: Answer, now: float) -> None:
        """One query's answer, unless nobody waits for it any more."""
        if query.done:
            return
        self._lanes.drop(query)
        self.pulse.answered(now)
        query.leave_home(tell=query.reexecuted)  # sent again, it is not that group's answer
        request = query.request
        asked = request is not self._question
        if asked:
            self._observe(f"query_{query.way_of(answer)}", 1)
        if request.answer(query, answer):
            reply = request.reply(self._clock.now())
            if asked:
                self._observe("request_ok", reply.seconds)
                self._observe("compute_seconds", reply.seconds - reply.queued)
            self._settle(request)
            _resolve(request.future.set_result, reply)

    def fail(self, request: Request, error: Exception) -> None:
        """A request ends without an answer, unless it has ended."""
        if request not in self.open:
            return
        self._drop(request)
        if request is self._question:
            self.pulse.sick = words_of(error)
        else:
            late = isinstance(error, DeadlineExceeded)
            what = "request_deadline" if late else "request_failed"
            self._observe(what, self._clock.now() - request.arrived)
            self.pulse.failed()
        _resolve(request.future.set_exception, error)

    def cancel(self, request: Request, now: float) -> None:
        """Who asked has gone."""
        if request in self.open:
            self._observe("request_cancelled", now - request.arrived)
            self._drop(request)

    def shut(self) -> None:
        """Takes no more."""
        with self._settled:
            self.closing = True

    def wait(self, seconds: float) -> None:
        """Until all have ended, but no longer."""
        end = self._clock.now() + seconds
        with self._settled:
            while self.open and (left := end - self._clock.now()) > 0:
                self._clock.wait(self._settled, left)

    def break_off(self, error: BaseException) -> None:
        """The batcher's thread ends: who waits is told, and whoever comes."""
        with self._settled:
            self.broken = f"the batcher has failed: {words_of(error)}"
            left, self.open = self.open, set()
            self._settled.notify_all()
        now = self._clock.now()
        counts = [("request_failed", now - request.arrived) for request in left]
        for request in left:
            _resolve(request.future.set_exception, InferenceFailed(self.broken))
        for what, number in (("internal_error", 1), *counts):
            with contextlib.suppress(Exception):  # it may be what failed
                self._observe(what, number)

    def trouble(self, answer_time: float) -> Health | None:
        """What is wrong, if anything; models take `answer_time` seconds, inf if not known."""
        if self.broken is not None:
            return Health(False, False, self.broken)
        if self.closing:
            return Health(True, False, "draining")
        return self.pulse.trouble(answer_time)

    def _drop(self, request: Request) -> None:
        for query in request.queries:
            if not query.done:
                self._lanes.drop(query)
                query.leave_home(tell=True)
        self._settle(request)

    def _settle(self, request: Request) -> None:
        request.release()
        with self._settled:
            self.open.discard(request)
            if not self.open:
                self._settled.notify_all()


def _resolve(settle: Callable[[Any], None], outcome: Any) -> None:
    with contextlib.suppress(concurrent.futures.InvalidStateError):  # it was cancelled
        settle(outcome)
