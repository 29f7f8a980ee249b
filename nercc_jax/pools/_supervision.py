"""Steps that may fail, and turns that go on whatever one of them does."""

import logging
import threading
from collections.abc import Callable
from typing import Any

from ._clock import WALL, AbstractClock

_LOG = logging.getLogger(__name__)

# Seconds until what failed is tried again, doubled each time, and at most.
_PAUSE, _LONGEST = 0.1, 10.0
_LAST_TURN = 5.0  # seconds that closing waits for it


def pause_after(failures: int) -> float:
    """Seconds until what failed so many times, one after the other, is tried again."""
    return min(_PAUSE * 2.0 ** min(failures, 10), _LONGEST)


class Guard:
    """Takes steps that may fail: what escapes from one is logged and counted. For any thread."""

    def __init__(self):
        self.errors = 0
        self._lock = threading.Lock()

    def run(self, what: str, step: Callable[..., Any], *args: Any) -> Exception | None:
        """Takes a step. Returns what escaped from it, if anything."""
        try:
            step(*args)
        except Exception as error:
            self.count(what)
            return error
        return None

    def count(self, what: str) -> None:
        """Counts the exception that is being handled."""
        with self._lock:
            self.errors += 1
        _LOG.exception("%s failed", what)


class Watcher:
    """Calls `look` again and again, by a clock, until it is closed.

    `look()` says at which time it wants its next turn; `wake` makes that now. After a turn that
    fails (which the guard counts) the next one comes after a pause that grows. Should the turns end
    nevertheless, the last act is to call `end`.
    """

    def __init__(
        self,
        name: str,
        look: Callable[[], float],
        guard: Guard,
        end: Callable[[], Any],
        clock: AbstractClock = WALL,
    ):
        self._look, self._guard, self._end, self._clock = look, guard, end, clock
        self._name, self._failures = name, 0
        self.heartbeat = clock.now()  # of the last turn
        self._turns = clock.turns(name, self._turn)
        self.start, self.wake = self._turns.start, self._turns.wake

    def close(self) -> None:
        """Takes no more turns; waits a few seconds for one that is under way."""
        self._turns.close(_LAST_TURN)

    def _turn(self) -> float:
        self.heartbeat = self._clock.now()
        try:
            due, self._failures = self._look(), 0
            return due
        except Exception:
            self._failures += 1
            self._guard.count(f"a turn of {self._name}")
            return self.heartbeat + pause_after(self._failures)
        except BaseException:
            self._end()
            raise
