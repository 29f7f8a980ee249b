"""Waiting until a new pool has workers enough, or cannot have them."""

import logging
import threading
from collections.abc import Callable, Sequence

from ._clock import AbstractClock
from ._seat import Seat

_LOG = logging.getLogger(__name__)

_STARTS = 3  # failed starts of a worker that a new pool takes before it gives up
_TELL = 10.0  # seconds after which it is told what is missing, again and again


class StartUp:
    """The beginning of a pool. `told` is to be called, under the lock, when a seat has changed.

    `lacking()` says what workers that did not start may be waiting for, if that is known.
    """

    def __init__(
        self,
        lock: threading.RLock,
        seats: Sequence[Seat],
        least: int | None,
        lacking: Callable[[], str | None],
        clock: AbstractClock,
    ):
        """`least` workers will do to begin with: all if None. Raises: ValueError for another."""
        least = len(seats) if least is None else least
        if not 1 <= least <= len(seats):
            raise ValueError(
                f"min_workers is from 1 to {len(seats)}, the number of workers, not {least}"
            )
        self._changed, self._clock = threading.Condition(lock), clock
        self._seats, self._least, self._lacking = seats, least, lacking
        self.trouble: str | None = None  # of the last worker that could not start

    def told(self) -> None:
        self._changed.notify_all()

    def wait(self, broken: Callable[[], str | None], timeout: float) -> str | None:
        """Waits until `least` workers are ready. Returns why they are not, after `timeout` s or
        where they will not be."""
        begin = self._clock.now()
        tell = begin + _TELL
        while True:
            now = self._clock.now()
            with self._changed:
                ready = sum(seat.ready for seat in self._seats)
                if ready >= self._least:
                    return None
                if max(seat.failed_starts for seat in self._seats) >= _STARTS or broken():
                    return self._reason(ready, broken() or self.trouble)
                if now < min(tell, begin + timeout):
                    self._clock.wait(self._changed, min(tell, begin + timeout) - now)
                    continue
            missing = self._lacking()  # takes its time: without the lock
            if now >= begin + timeout:
                late = f"the others had not after {timeout} s"
                return self._reason(ready, self.trouble or missing or late)
            tell = now + _TELL
            if missing is not None:
                _LOG.warning("%d of %d workers are ready: %s", ready, len(self._seats), missing)

    def _reason(self, ready: int, what: str | None) -> str:
        return f"{ready} of {len(self._seats)} workers started; {what}"
