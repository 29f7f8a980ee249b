"""Steps that may fail, and a thread that goes on whatever one of its steps does."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

_LOG = logging.getLogger(__name__)

BEAT = 1.0  # seconds between two looks at most: no heartbeat is much older while all is well
_SHORTEST = 1e-4
# Seconds until what failed is tried again, doubled each time, and at most.
_PAUSE, _LONGEST = 0.1, 10.0


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
    """Calls `look` again and again, from a thread of its own, until it is closed.

    `look()` says at which monotonic time it wants its next turn; `wake` makes that now. After a
    turn that fails (which the guard counts) the next one comes after a pause that grows. Should the
    thread end nevertheless, its last act is to call `end`.
    """

    def __init__(self, name: str, look: Callable[[], float], guard: Guard, end: Callable[[], Any]):
        self._look, self._guard, self._end = look, guard, end
        self._closed = False
        self._woken = threading.Event()
        self.heartbeat = time.monotonic()  # of the last turn
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        self._woken.set()

    def close(self) -> None:
        """Ends the thread; waits a few seconds for a turn that is under way."""
        self._closed = True
        self._woken.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=5)

    def _run(self) -> None:
        failures = 0
        try:
            while not self._closed:
                self.heartbeat = time.monotonic()
                try:
                    due, failures = self._look(), 0
                except Exception:
                    failures += 1
                    due = self.heartbeat + pause_after(failures)
                    self._guard.count(f"a turn of {self._thread.name}")
                self._woken.wait(min(max(due - time.monotonic(), _SHORTEST), BEAT))
                self._woken.clear()
        finally:
            if not self._closed:
                self._end()
