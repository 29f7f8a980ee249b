"""The clock that pools and servers live by, and tasks that it repeats, supervised and paced."""

import abc
import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

_LOG = logging.getLogger(__name__)

# Longest and shortest time between two turns, in seconds.
BEAT, _SHORTEST = 1.0, 1e-4
# Longest single sleep, in seconds, however long a wait may last: threading raises OverflowError
# where it is asked for centuries.
LONGEST_SLEEP = 60.0
# Pause before a step that failed is tried again, in seconds: doubled each time, up to the longest.
_PAUSE, _LONGEST = 0.1, 10.0
_LAST_TURN = 5.0  # seconds for which closing waits for a turn under way


class Turns(NamedTuple):
    """A task that is repeated: when it is woken, and when its last turn said it is due next.

    Attributes:
        start: Makes the first turn due.
        wake: Makes a turn due now. May be called from any thread.
        close: Takes no more turns, and waits for one under way: for some seconds at most, if given.
    """

    start: Callable[[], Any]
    wake: Callable[[], Any]
    close: Callable[..., Any]


class AbstractClock(abc.ABC):
    """A source of time for pools and servers: the computer's, or a simulated one."""

    @abc.abstractmethod
    def now(self) -> float:
        """Return monotonic seconds."""

    @abc.abstractmethod
    def turns(self, name: str, turn: Callable[[], float]) -> Turns:
        """Return a task that calls `turn` again and again.

        Args:
            name: The name of the thread, where there are threads.
            turn: Returns the time at which it is due next. It is called at least once a second all
                the same. An exception ends the task.
        """

    @abc.abstractmethod
    def start(self, name: str, work: Callable[[], Any]) -> Callable[[], bool]:
        """Start work in the background, once; return a function that says whether it still runs.

        Args:
            name: The name of the thread, where there are threads.
            work: It must not raise.
        """

    @abc.abstractmethod
    def wait(self, condition: threading.Condition, seconds: float) -> None:
        """Wait until a condition that is held is notified, for some seconds at most.

        May return earlier. Raises as `threading.Condition.wait` does.
        """


class WallClock(AbstractClock):
    """The computer's own clock, with one thread for each repeated task."""

    def now(self) -> float:
        return time.monotonic()

    def turns(self, name: str, turn: Callable[[], float]) -> Turns:
        # A queue is cheaper to wake than a `threading.Event`.
        wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        woken = closed = False

        def run() -> None:
            nonlocal woken
            while not closed:
                due = turn()
                with contextlib.suppress(queue.Empty):
                    wakes.get(timeout=min(max(due - time.monotonic(), _SHORTEST), BEAT))
                    # Whoever still sees it set came before the turn that follows.
                    woken = False

        def wake() -> None:
            nonlocal woken
            if not woken:
                woken = True
                wakes.put(None)

        def close(seconds: float | None = None) -> None:
            nonlocal closed
            closed = True
            wakes.put(None)
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(seconds)

        thread = threading.Thread(target=run, name=name, daemon=True)
        return Turns(thread.start, wake, close)

    def start(self, name: str, work: Callable[[], Any]) -> Callable[[], bool]:
        # No daemon: a process must not end in the middle of LAPACK's work.
        thread = threading.Thread(target=work, name=name)
        thread.start()
        return thread.is_alive

    def wait(self, condition: threading.Condition, seconds: float) -> None:
        condition.wait(min(seconds, LONGEST_SLEEP))


WALL = WallClock()


def pause_after(failures: int) -> float:
    """Return the seconds to wait before a step that failed `failures` times in a row is retried."""
    return min(_PAUSE * 2.0 ** min(failures, 10), _LONGEST)


class Watcher:
    """A supervised task: calls `look` again and again, whatever one of its turns raises.

    `look()` returns the time at which its next turn is due; `wake` makes that now. After a turn
    that raises, the next one comes after a pause that grows. `end()` is called last, should the
    turns end nevertheless.

    Attributes:
        heartbeat: The time of the last turn.
        errors: The number of turns that raised. The log has each.
    """

    def __init__(
        self,
        name: str,
        look: Callable[[], float],
        *,
        end: Callable[[], Any] = lambda: None,
        clock: AbstractClock = WALL,
    ):
        """Begin at once."""
        self._name, self._look, self._end, self._clock = name, look, end, clock
        self._failures = 0  # one after the other
        self.errors, self.heartbeat = 0, clock.now()
        self._turns = clock.turns(name, self._turn)
        self.wake = self._turns.wake
        self._turns.start()

    def close(self) -> None:
        """Take no more turns; wait a few seconds for one that is under way."""
        self._turns.close(_LAST_TURN)

    def _turn(self) -> float:
        self.heartbeat = self._clock.now()
        try:
            due, self._failures = self._look(), 0
            return due
        except Exception:
            self._failures, self.errors = self._failures + 1, self.errors + 1
            _LOG.exception("a turn of %s failed", self._name)
            return self.heartbeat + pause_after(self._failures)
        except BaseException:
            self._end()
            raise


class TimeShare:
    """A bound on the share of the time that a thread's work may take.

    Programs of JAX keep all cores of a CPU busy, and queries are answered meanwhile.

    Attributes:
        next: The time from which on there may be more work.
    """

    def __init__(self, clock: AbstractClock, share: float, *, longest: float = math.inf):
        """Start with nothing to make up for; one piece of work pauses for `longest` s at most."""
        self._clock, self._share, self._longest = clock, share, longest
        self.next = -math.inf

    def spend(self, begin: float, share: float | None = None) -> float:
        """Count work from `begin` until now, at another share if given; return its seconds."""
        now = self._clock.now()
        pause = min((now - begin) * (1 / (share or self._share) - 1), self._longest)
        self.next = max(self.next, now) + pause
        return now - begin
