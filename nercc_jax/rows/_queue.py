"""The queue of rows to send: their order, and the number of rows in a call."""

import collections
import math

import numpy as np
from jaxtyping import Int

from ..pools.times import power_of_two
from ..risk import EnsembleEstimate
from ._evidence import Evidence
from ._interface import RowSettings
from ._table import AGAIN, WAITING, RowTable

_TIMED = 4  # calls of one size whose median time decides on the next size
# Calls grow to at most `_LONG` seconds. From `_ENOUGH` seconds on, a larger call must make each row
# `_QUICKER` times as fast, since rows wait for the slowest one of their call.
_ENOUGH, _LONG, _QUICKER = 0.05, 0.25, 1.1
_DRAWN = 8  # random rows that are kept in the queue for a statistic
_BYTES = 1 << 24  # bytes of a call's inputs and outputs beyond which calls do not grow


class RowQueue:
    """Rows in the order in which they are sent, and the size of calls.

    Rows that are sent again come first, then those in `waiting`. The size of calls doubles as long
    as that makes rows faster, and shrinks at the end, so that workers finish together.
    """

    def __init__(
        self,
        table: RowTable,
        order: Int[np.ndarray, " rows"],
        num_workers: int,
        settings: RowSettings,
    ):
        self.waiting, self._table = order[table["state"][order] == WAITING], table
        self._again: collections.deque[Int[np.ndarray, " few"]] = collections.deque()  # by call
        self._num_workers, self._settings = num_workers, settings
        self._random = np.random.default_rng(settings.seed)
        self._size = settings.rows_per_call or 1
        self._before = 0.0  # median seconds of a call of half that size; 0 if unknown
        self._grows, self._timed = True, 0 if settings.rows_per_call is None else _TIMED
        self._sent = 0  # rows sent for the first time, for `max_calls`

    @property
    def spent(self) -> bool:
        """True if `max_calls` rows have been sent."""
        return self._settings.max_calls is not None and self._sent >= self._settings.max_calls

    @property
    def empty(self) -> bool:
        """True if nothing may be sent."""
        return not self._again and (self.spent or not len(self.waiting))

    @property
    def timed(self) -> bool:
        """True if enough calls of the present size were timed."""
        return self._timed >= _TIMED

    def send_again(self, rows: Int[np.ndarray, " some"], most: int | None = None) -> None:
        """Queue rows again, at most `most` in a call, after a failure or an answer in doubt.

        Their order is changed: otherwise two workers that permute the rows of a call in the same
        way would give the same wrong answers.
        """
        rows, size = self._random.permutation(rows), min(most or self._call_size, self._call_size)
        self._again.extend(rows[place : place + size] for place in range(0, len(rows), size))

    def take(self) -> Int[np.ndarray, " few"]:
        """Return the rows of the next call, and remove them; an empty array if none is left.

        Rows that were sent or answered since they were queued are skipped.
        """
        while not self.empty:
            if self._again:
                rows = self._again.popleft()
            else:
                most = self._settings.max_calls
                size = min(self._call_size, math.inf if most is None else most - self._sent)
                rows, self.waiting = np.split(self.waiting, [int(size)])
                self._sent += len(rows)
            rows = rows[self._table["state"][rows] <= AGAIN]
            if len(rows):
                return rows
        return np.zeros(0, int)

    def refill(self, evidence: Evidence, estimate: EnsembleEstimate | None, seed: int) -> None:
        """Fill `waiting` with the rows whose predictions are too uncertain, least certain first.

        One row in four is an audit, in random order. With an `estimate` of the run's statistic, the
        rows that add most to its interval come first, even if they are predicted accurately enough,
        and further audits are drawn at random, so that eight are waiting.
        """
        table, rows = self._table, self._table.all_in(WAITING)
        audit, added = table["audit"], np.zeros(len(rows))
        table["known"][:] = False
        if evidence.fit is not None and (self.empty or self._settings.compute == "needed"):
            table["known"][rows] = evidence.score(rows) <= evidence.limit
        if estimate is not None and estimate.uncertainty is not None:
            added = estimate.uncertainty[rows]
            more = max(_DRAWN - np.count_nonzero(audit[rows]), 0)
            audit[np.random.default_rng(seed).permutation(rows)[:more]] = True
        wanted = ~table["known"][rows] | (added > 0) | audit[rows]
        rows, added = rows[wanted], added[wanted]
        drawn = np.random.default_rng(0).permutation(rows[audit[rows]])
        others, added = rows[~audit[rows]], added[~audit[rows]]
        others = others[np.lexsort((-table["expected"][others], -added))]
        places = np.concatenate([4.0 * np.arange(len(drawn)), np.arange(len(others)) * 4 / 3 + 1])
        waiting = np.concatenate([drawn, others])[np.argsort(places, kind="stable")]
        self.waiting = waiting.astype(int)

    @property
    def _call_size(self) -> int:
        """The number of rows of the next call: `rows_per_call`, or a power of two."""
        if self._settings.rows_per_call is not None:
            return self._size
        return min(self._size, power_of_two(len(self.waiting) / (2 * self._num_workers)))

    def observe(self, size: int, usual: float, row_bytes: int) -> None:
        """Adapt the size of calls to the time that they take, which includes transport.

        A call of `size` rows was answered, with `row_bytes` of inputs and outputs in each row. The
        median time of calls of that size is `usual` seconds.
        """
        if self._settings.rows_per_call is not None or size != self._size or math.isinf(usual):
            return
        self._timed += 1
        if not self.timed:
            return
        before = self._before
        no_quicker = before >= _ENOUGH and 2 * before < _QUICKER * usual
        # The time of a call of twice the size, extrapolated from this size and half of it.
        following = usual + 2 * max(usual - before, 0) if before else 2 * usual
        if no_quicker or (usual > 2 * _LONG and size > 1):
            self._size, self._before, self._grows, self._timed = size // 2, 0.0, False, 0
        elif self._grows and 2 * size * row_bytes <= _BYTES and following <= _LONG:
            self._size, self._before, self._timed = 2 * size, usual, 0
