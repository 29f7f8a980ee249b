"""The rows of a run that are to be sent: in which order, and how many go in one call."""

import collections
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int

from ..pools.times import power_of_two
from ._interface import RowSettings

_CALL = 0.25  # seconds of a call, where rows are so quick that several go together
_SHORT = 0.02  # seconds of a call below which smaller ones balance workers no better
# Seconds of a call from which on rows go together only if that makes each of them quicker by a
# tenth: they wait for the slowest of them, and it cannot be told which of them that is.
_ENOUGH, _QUICKER = 0.05, 1.1
_CALLS = 2  # calls that are left for each worker, so that all end at about the same time
_TIMED = 4  # calls of a size, whose median decides about the next size
_BYTES = 1 << 24  # of a call's inputs and outputs, from which on larger ones are no quicker


class RowQueue:
    """Rows in the order in which they are sent, and the size of calls.

    Rows that are sent again come first: those of a call that raised in halves, so that the ones
    that raise are found in a few calls. Then come those that are `waiting`. Rows are sent that
    `may_go` then; others have been sent or answered meanwhile.
    """

    def __init__(self, rows: Int[np.ndarray, " rows"], num_workers: int, settings: RowSettings):
        self.waiting = rows
        self._again: collections.deque[Int[np.ndarray, " few"]] = collections.deque()  # by call
        self._num_workers, self._settings = num_workers, settings
        self._random = np.random.default_rng(settings.seed)
        self._size, self._least = settings.rows_per_call or 1, 1  # rows of a call
        self._grows = True
        self._timed = 0  # calls of that size
        self._smaller = (0, 0.0)  # the size before, and its seconds
        self._sent = 0  # rows that waited, and were sent

    @property
    def spent(self) -> bool:
        """Return whether as many rows were sent as may be."""
        most = self._settings.max_calls
        return most is not None and self._sent >= most

    @property
    def empty(self) -> bool:
        """Return whether nothing may be sent."""
        return not self._again and (self.spent or not len(self.waiting))

    def halve(self, rows: Int[np.ndarray, " few"]) -> None:
        """Send the rows of a call that raised again, in two calls."""
        self._again.extendleft(part for part in np.array_split(rows, 2) if len(part))

    def send_again(self, rows: Int[np.ndarray, " some"], most: int | None = None) -> None:
        """Send rows again that had no answer in time, or one that looks wrong, `most` in a call.

        They are in another order: two workers that confuse the rows of a call in the same way would
        otherwise give the same wrong answers.
        """
        rows, size = self._random.permutation(rows), self._call_size
        size = size if most is None else min(size, most)
        self._again.extend(rows[place : place + size] for place in range(0, len(rows), size))

    def take(
        self, may_go: Callable[[Int[np.ndarray, " few"]], Bool[np.ndarray, " few"]]
    ) -> Int[np.ndarray, " few"]:
        """Take the rows of the next call, of those that `may_go`; none if none is left."""
        while not self.empty:
            if self._again:
                rows = self._again.popleft()
            else:
                size, most = self._call_size, self._settings.max_calls
                size = size if most is None else min(size, most - self._sent)
                rows, self.waiting = self.waiting[:size], self.waiting[size:]
                self._sent += len(rows)
            rows = rows[may_go(rows)]
            if len(rows):
                return rows
        return np.zeros(0, int)

    @property
    def _call_size(self) -> int:
        """The rows of the next call."""
        if self._settings.rows_per_call is not None:
            return self._settings.rows_per_call
        return min(self._size, max(self._share, self._least))

    @property
    def _share(self) -> int:
        """The rows of a call that leave each worker several calls: a power of two."""
        return power_of_two(len(self.waiting) / (_CALLS * self._num_workers))

    @property
    def timed(self) -> bool:
        """Return whether enough calls of the size that they have now were timed."""
        return self._settings.rows_per_call is not None or self._timed >= _TIMED

    def observe(self, size: int, usual: float, row_bytes: int) -> None:
        """Fit the size of calls to the time that they take, transport and all.

        A call of so many rows was answered, with inputs and outputs of `row_bytes` a row; calls of
        that size take `usual` seconds.
        """
        if self._settings.rows_per_call is not None or not np.isfinite(usual):
            return
        self._least = power_of_two(size * _SHORT / usual)
        self._timed += size == self._size
        if size != self._size or not self.timed:
            return
        # All time counts as the rows' at first; then what more rows have taken more, at least some.
        before, seconds = self._smaller
        if seconds >= _ENOUGH and usual / size > seconds / before / _QUICKER:
            self._size, self._timed, self._smaller = before, 0, (0, 0.0)
            self._grows = False
            return
        row_seconds = max(usual - seconds, usual / 8) / (size - before)
        longest = size + (_CALL - usual) / row_seconds
        most = power_of_two(min(longest, _BYTES / row_bytes, float(self._share)))
        if most > size and self._grows:
            self._smaller, self._size, self._timed = (size, usual), most, 0
        elif usual > 2 * _CALL and size > 1:
            self._smaller, self._size, self._timed = (0, 0.0), size // 2, 0
