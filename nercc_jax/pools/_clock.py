"""The time that pools and batchers live by, and the turns that they take as it goes on."""

import abc
import queue
import threading
import time
from collections.abc import Callable

# Seconds between two turns at most, and at least where the next one is due at once.
BEAT, _SHORTEST = 1.0, 1e-4
# Seconds of one sleep at most, however long a wait may last: threading raises OverflowError where
# it is asked for centuries.
LONGEST_SLEEP = 60.0


class AbstractTurns(abc.ABC):
    """Takes a turn when it is woken, and when the last one said that the next is due."""

    @abc.abstractmethod
    def start(self) -> None:
        """The first turn is due."""

    @abc.abstractmethod
    def wake(self) -> None:
        """A turn is due now. From any thread."""

    @abc.abstractmethod
    def close(self, seconds: float | None = None) -> None:
        """No more turns; one that is under way is waited for, for so long at most if given."""


class AbstractClock(abc.ABC):
    """What a pool or a batcher knows of time."""

    @abc.abstractmethod
    def now(self) -> float:
        """Monotonic seconds."""

    @abc.abstractmethod
    def turns(self, name: str, turn: Callable[[], float]) -> AbstractTurns:
        """`turn()` is taken again and again, by a thread of this name where there are threads.

        It says when it is due next; it comes every second nevertheless. An exception ends it.
        """

    @abc.abstractmethod
    def wait(self, condition: threading.Condition, seconds: float) -> None:
        """Until the condition, which is held, is notified, or for some seconds; it may be sooner.

        Raises: as `threading.Condition.wait`.
        """


class WallClock(AbstractClock):
    """The computer's own, with a thread for each that takes turns."""

    def now(self) -> float:
        return time.monotonic()

    def turns(self, name: str, turn: Callable[[], float]) -> AbstractTurns:
        return _Thread(name, turn)

    def wait(self, condition: threading.Condition, seconds: float) -> None:
        condition.wait(min(seconds, LONGEST_SLEEP))


class _Thread(AbstractTurns):
    """Sleeps at a queue, which costs less to wake it than a `threading.Event` would."""

    def __init__(self, name: str, turn: Callable[[], float]):
        self._turn = turn
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._woken = self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        if not self._woken:
            self._woken = True
            self._wakes.put(None)

    def close(self, seconds: float | None = None) -> None:
        self._closed = True
        self._wakes.put(None)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(seconds)

    def _run(self) -> None:
        while not self._closed:
            due = self._turn()
            try:
                self._wakes.get(timeout=min(max(due - time.monotonic(), _SHORTEST), BEAT))
            except queue.Empty:
                continue
            # Whoever finds it set has come before the turn that follows.
            self._woken = False


WALL = WallClock()
