"""Groups: queries that are coded together, and the state of their coded data points."""

import dataclasses
import heapq
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ...pools import Batch
from .._tracing import GroupTrace
from ._coder import Coder
from ._request import Answer, ApproximateAnswer, Query, Request

# Data points larger than this are not kept for late answers: one could not ask for them again.
_ROW_BYTES = 1 << 14
_NO_DATA = np.empty(0)
_NOBODY = Request(np.empty((0, 0)), _NO_DATA, 0.0, 0.0, False)  # of queries that are over

# Seconds after its due time at which a group is handled, so that what was due has happened.
_MARGIN = 1e-4


class GroupPrediction(NamedTuple):
    """A surrogate's answer to a query of a group, and whether it is sure enough to be given."""

    answer: Answer
    sure: bool


@dataclasses.dataclass
class Cell:
    """The queries at one place of a group, which one worker receives as one batch.

    `x` has their data, (size, ...), until nothing more is encoded from it.
    """

    queries: list[Query]
    x: np.ndarray | None

    @property
    def pending(self) -> bool:
        return any(not query.done for query in self.queries)


class Group:
    """Up to K cells behind one code, and what came back of their N coded data points.

    Cells may differ in size. Coded data points have as many rows as the largest cell; the rows of a
    smaller cell are repeated.
    """

    def __init__(self, coder: Coder, now: float, *, alone: bool = False):
        """Create an empty group; `alone` is a single batch that goes to one worker uncoded."""
        self.coder, self.began, self.alone = coder, now, alone
        self.cells: list[Cell] = []
        self.rows = 0  # of the largest cell
        self.layout = coder.layout(coder.num_data)  # of a full group, until it is complete
        self.batch: Batch  # at the pool, which its opener sets
        # By coded data point.
        self.mask = np.zeros(coder.num_workers, bool)
        self.moved = np.zeros(coder.num_workers, bool)  # to other queries than the code's
        self.sent_at = np.full(coder.num_workers, np.nan)
        self.answers: list[np.ndarray | None] = [None] * coder.num_workers
        self.counted = np.zeros(coder.num_workers, bool)  # as stragglers
        # By cell and row: predictions, looked up once for each query.
        self.predictions: dict[tuple[int, int], GroupPrediction] = {}
        self.tried: bool | None = None  # whether it is hedged for a trial; None if not drawn yet
        self.is_copy = False  # of late queries, until it is answered
        self.stripped = False  # of all but what is to be compared with late answers
        self.posted = False  # it is in the scheduler's inbox
        self.closed = False
        self.due = np.inf
        self.linger_until = np.inf
        self.trace: GroupTrace | None = None

    @property
    def full(self) -> bool:
        return len(self.cells) == self.coder.num_data

    @property
    def pending(self) -> bool:
        return any(cell.pending for cell in self.cells)

    @property
    def sent(self) -> np.ndarray:
        return ~np.isnan(self.sent_at)

    @property
    def outstanding(self) -> np.ndarray:
        return self.sent & ~self.mask

    @property
    def decodable(self) -> np.ndarray:
        """The answers that the code's decoder knows what to do with."""
        return self.mask & ~self.moved

    def add(self, cell: Cell) -> None:
        self.cells.append(cell)
        self.rows = max(self.rows, len(cell.queries))
        for query in cell.queries:
            query.group = query.group or self
            request = query.request
            if request.trace is not None:
                self.trace = self.trace or GroupTrace()
                request.trace.enter(self.trace, query.place, request.arrived)

    def add_answer(self, point: int, answer: np.ndarray, now: float, worker: int) -> None:
        self.answers[point], self.mask[point] = answer, True
        if self.trace is not None:
            self.trace.answered(point, now, worker)

    def open_queries(self, cells: Iterable[int] | None = None) -> Iterator[tuple[int, int, Query]]:
        """Yield (cell, row, query) for the queries of these cells (all) that somebody waits for."""
        for number in range(len(self.cells)) if cells is None else cells:
            for row, query in enumerate(self.cells[number].queries):
                if not query.done:
                    yield number, row, query

    def inputs(self) -> np.ndarray:
        return np.stack([_repeated(cell.x, self.rows) for cell in self.cells], axis=1)

    def drop_inputs(self) -> None:
        """Let the queries' data go, which may be large: nothing more will be encoded."""
        for cell in self.cells:
            cell.x = None

    def values(self) -> np.ndarray:
        """Return all answers, (N, rows, ...), with zeros where there is none."""
        some = next(answer for answer in self.answers if answer is not None)
        values = np.zeros((len(self.answers), self.rows, *some.shape[1:]), some.dtype)
        for point, answer in enumerate(self.answers):
            if answer is not None:
                values[point] = _repeated(answer, self.rows)
        return values

    def awaited(self) -> Iterator[tuple[bool, Query, ApproximateAnswer]]:
        """Yield the approximate answers given out whose query's own worker has not answered.

        Each comes with its query, and with whether that answer may still come.
        """
        for place, cell in enumerate(self.cells):
            own = self.layout.own[place]
            left = [point for point in own.tolist() if self.outstanding[point]]
            coming = any(not self.batch.abandoned(point) for point in left)
            for query in cell.queries if len(own) else ():
                for each in list(query.approximate.values()):  # from which it may be taken
                    if each.given or each.forced:
                        yield coming, query, each

    def strip(self) -> None:
        """Drop all but what late answers will be compared with: queries, their data, answers."""
        if self.stripped:
            return
        self.stripped = True
        for cell in self.cells:
            cell.x = None
            queries, cell.queries = cell.queries, []
            for query in queries:
                left = Query(_NOBODY, query.place, _NO_DATA)
                cell.queries.append(left)
                left.x, left.done, left.waiting = None, True, False
                left.approximate = dict(query.approximate)
                for each in left.approximate.values():
                    value = np.array(each.answer.value)
                    each.answer = dataclasses.replace(each.answer, value=value)
                    small = each.x is not None and each.x.nbytes <= _ROW_BYTES
                    each.x = np.array(each.x) if small else None
        self.answers = [None] * len(self.answers)
        self.predictions, self.trace = {}, None
        self.batch.drop_answers()

    @property
    def kept_bytes(self) -> int:
        """The memory of what late answers will be compared with."""
        records = [
            each
            for cell in self.cells
            for query in cell.queries
            for each in query.approximate.values()
        ]
        return sum(
            each.answer.value.nbytes + (0 if each.x is None else each.x.nbytes) for each in records
        )


def _repeated(x: np.ndarray | None, rows: int) -> np.ndarray:
    """Return x with its rows repeated in turn up to this number."""
    assert x is not None
    return x if len(x) == rows else x[np.arange(rows) % len(x)]


class LateGroups:
    """Groups that are over, but for late answers that are to be compared with what was given out.

    Memory is bounded: only the answers given out are kept, and data points where they are small.
    """

    def __init__(self, groups: int = 4096, size: int = 1 << 26):
        """Keep at most this number of groups, and this number of bytes."""
        self._groups: dict[Group, int] = {}
        self._most, self._left = groups, size

    def add(self, group: Group) -> list[Group]:
        """Keep a group, stripped; return the groups that have to be given up for it."""
        if group not in self._groups:
            group.strip()
            self._groups[group] = group.kept_bytes
            self._left -= self._groups[group]
        evicted = []
        while len(self._groups) > self._most or (self._left < 0 and self._groups):
            evicted.append(next(iter(self._groups)))
            self.discard(evicted[-1])
        return evicted

    def discard(self, group: Group) -> None:
        self._left += self._groups.pop(group, 0)

    def __len__(self) -> int:
        return len(self._groups)


class GroupTimers:
    """The times at which groups are to be handled; each group has one."""

    def __init__(self):
        self._heap: list[tuple[float, int, Group]] = []
        self._numbers = itertools.count()

    @property
    def next(self) -> float:
        return self._heap[0][0] if self._heap else math.inf

    def set(self, group: Group, due: float, now: float) -> None:
        """Handle the group at this time, instead of the time set before."""
        when = max(due, now) + _MARGIN
        if when < math.inf and when != group.due:
            group.due = when
            heapq.heappush(self._heap, (when, next(self._numbers), group))

    def pop_due(self, now: float) -> Iterator[Group]:
        """Yield the groups whose time has come."""
        while self._heap and self._heap[0][0] <= now:
            due, _, group = heapq.heappop(self._heap)
            if due == group.due and not group.closed:
                group.due = math.inf
                yield group
