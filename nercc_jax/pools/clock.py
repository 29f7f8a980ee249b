"""The clock of pools and servers, and repeated background tasks."""

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
# Longest single sleep, in seconds. A longer wait repeats it: threading raises OverflowError for
# very long timeouts.
LONGEST_SLEEP = 60.0
# First and longest pause before a failed step is retried, in seconds; it doubles each time.
_PAUSE, _LONGEST = 0.1, 10.0
_LAST_TURN = 5.0  # seconds for which closing waits for a running turn


class Turns(NamedTuple):
    """The controls of a repeated task, whose turns come when they are due or when it is woken.

    Attributes:
        start: Makes the first turn due.
        wake: Makes a turn due now. May be called from any thread.
        close: Ends the task, and waits for a running turn: at most for the seconds given, if any.
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
            name: The name of the thread, if the clock uses threads.
            turn: Returns the time at which the next turn is due. It is called at least once a
                second in any case. An exception ends the task.
        """

    @abc.abstractmethod
    def start(self, name: str, work: Callable[[], Any]) -> Callable[[], bool]:
        """Run `work` once in the background; return a function that says whether it still runs.

        Args:
            name: The name of the thread, if the clock uses threads.
            work: Called without arguments; it must not raise.
        """

    @abc.abstractmethod
    def wait(self, condition: threading.Condition, seconds: float) -> None:
        """Wait until a condition, whose lock is held, is notified, or the seconds have passed.

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
                    # A caller of `wake` that still sees True comes before the next turn.
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
        # Not a daemon thread: the process must not exit in the middle of LAPACK's work.
        thread = threading.Thread(target=work, name=name)
        thread.start()
        return thread.is_alive

    def wait(self, condition: threading.Condition, seconds: float) -> None:
        condition.wait(min(seconds, LONGEST_SLEEP))


WALL = WallClock()


def pause_after(failures: int) -> float:
    """Return the seconds to wait before a step is retried that failed `failures` times in a row."""
    return min(_PAUSE * 2.0 ** min(failures, 10), _LONGEST)


class Watcher:
    """A supervised task: calls `look` repeatedly, even after it raised an exception.

    `look()` returns the time at which its next turn is due; `wake` makes it due now. After a turn
    that raised, the next one follows a pause that grows. `end()` is called only if a turn ends the
    task by raising something other than an `Exception`, such as `SystemExit`.

    Attributes:
        heartbeat: The time of the last turn.
        errors: The number of turns that raised. Each is logged.
    """

    def __init__(
        self,
        name: str,
        look: Callable[[], float],
        *,
        end: Callable[[], Any] = lambda: None,
        clock: AbstractClock = WALL,
    ):
        """Start the task at once."""
        self._name, self._look, self._end, self._clock = name, look, end, clock
        self._failures = 0  # one after the other
        self.errors, self.heartbeat = 0, clock.now()
        self._turns = clock.turns(name, self._turn)
        self.wake = self._turns.wake
        self._turns.start()

    def close(self) -> None:
        """End the task; wait at most five seconds for a running turn."""
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
    """A limit on the share of time that background work takes, by pauses after each piece.

    JAX programs keep all cores of a CPU busy, and queries must be answered in the meantime.

    Attributes:
        next: The time from which more work is allowed.
    """

    def __init__(self, clock: AbstractClock, share: float, *, longest: float = math.inf):
        """Start without a pause; the pause after one piece of work is `longest` seconds at most."""
        self._clock, self._share, self._longest = clock, share, longest
        self.next = -math.inf

    def spend(self, begin: float, share: float | None = None) -> float:
        """Record work from `begin` until now; return its seconds. A `share` replaces the limit."""
        now = self._clock.now()
        pause = min((now - begin) * (1 / (share or self._share) - 1), self._longest)
        self.next = max(self.next, now) + pause
        return now - begin
