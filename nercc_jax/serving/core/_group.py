"""Groups: queries that are coded together, and the state of their coded data points."""

import dataclasses
import heapq
import itertools
import math
from collections.abc import Iterable, Iterator

import numpy as np

from ...pools import Batch
from ._coder import Coder
from ._decide import AnswerEstimate, GroupView, Place, QueryView
from ._request import Answer, ApproximateAnswer, Query, Source

# Seconds after its due time at which a group is handled, so that what was due has happened.
_MARGIN = 1e-4


@dataclasses.dataclass
class Cell:
    """The queries at one place of a group, which one worker receives as one batch.

    `x` has their data, (size, ...), until nothing more is encoded from it.
    """

    queries: list[Query]
    x: np.ndarray | None


@dataclasses.dataclass(eq=False)
class LateAnswer:
    """An approximate answer that was given out, until the model's own comes to compare it with.

    That is in this row of the first of these coded data points to be answered.
    """

    points: list[int]
    row: int
    given: ApproximateAnswer

    @property
    def kept_bytes(self) -> int:
        x = self.given.x
        return self.given.answer.value.nbytes + (0 if x is None else x.nbytes)


class Group:
    """Up to K cells behind one code, and what came back of their N coded data points.

    Cells may differ in size. Coded data points have as many rows as the largest cell; the rows of a
    smaller cell are repeated. Once no query is open, only `late` is left.
    """

    def __init__(self, coder: Coder, now: float, *, alone: bool = False, trial: bool = False):
        """Create an empty group; `alone` is a single batch that goes to one worker uncoded.

        Its late queries are sent again in a `trial` even where that seems to be of no use.
        """
        self.coder, self.began, self.alone, self.trial = coder, now, alone, trial
        self.cells: list[Cell] = []
        self.rows = 0  # of the largest cell
        self.layout = coder.layout(coder.num_data)  # of a full group, until it is complete
        self.batch: Batch  # at the pool, which its opener sets
        # By coded data point.
        self.mask, self.moved, self.counted = np.zeros((3, coder.num_workers), bool)
        self.sent_at = np.full(coder.num_workers, np.nan)
        self.answers: list[np.ndarray | None] = [None] * coder.num_workers
        # Approximate answers by query and source, and whether each is within its limit.
        self.estimates: dict[Place, dict[Source, tuple[Answer, bool]]] = {}
        self.late: list[LateAnswer] = []
        self.is_copy = False  # of late queries, until it is answered
        self.posted = False  # it is in the scheduler's inbox
        self.closed = False
        self.due = math.inf

    @property
    def full(self) -> bool:
        return len(self.cells) == self.coder.num_data

    @property
    def pending(self) -> bool:
        return any(True for _ in self.open_queries())

    def add(self, cell: Cell) -> None:
        self.cells.append(cell)
        self.rows = max(self.rows, len(cell.queries))
        for query in cell.queries:
            query.groups.append(self)

    def add_answer(self, point: int, answer: np.ndarray) -> None:
        self.mask[point] = True
        if self.cells:
            self.answers[point] = answer

    def add_estimate(self, place: Place, answer: Answer, within: bool, epoch: int) -> None:
        """Take an approximate answer, which will be compared with the model's own, given or not."""
        query = self.query(place)
        query.approximate[answer.source] = ApproximateAnswer(answer, query.x, epoch)
        self.estimates.setdefault(place, {})[answer.source] = answer, within

    def query(self, place: Place) -> Query:
        return self.cells[place[0]].queries[place[1]]

    def open_queries(self) -> Iterator[tuple[Place, Query]]:
        """Yield the queries that somebody waits for, with their places."""
        for number, cell in enumerate(self.cells):
            for row, query in enumerate(cell.queries):
                if not query.done:
                    yield (number, row), query

    def view(self, looked: Iterable[Source]) -> GroupView:
        """Return a snapshot, in a turn in which these sources were asked."""
        queries = []
        for place, query in self.open_queries():
            found = tuple(
                AnswerEstimate(source, answer.disagreement, answer.error, within)
                for source, (answer, within) in self.estimates.get(place, {}).items()
            )
            queries.append(QueryView(place, query.reexecuted, found))
        failed = np.zeros_like(self.mask)
        for point in np.flatnonzero(~np.isnan(self.sent_at) & ~self.mask).tolist():
            failed[point] = self.batch.lost(point) if self.alone else self.batch.abandoned(point)
        return GroupView(
            self.coder,
            self.layout.own[: len(self.cells)],
            self.sent_at,
            self.mask,
            failed,
            self.moved,
            tuple(queries),
            self.batch.times.limit(self.rows),
            self.batch.times.median(self.rows),
            self.alone,
            self.trial,
            frozenset(looked),
        )

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

    def keep_late(self) -> None:
        """Drop all but what late answers will be compared with."""
        for place, cell in enumerate(self.cells):
            points = self.layout.own[place].tolist()
            for row, query in enumerate(cell.queries):
                for given in query.approximate.values() if points else ():
                    if given.given or given.forced:
                        given.x = None if given.x is None else np.array(given.x)
                        value = np.array(given.answer.value)
                        given.answer = dataclasses.replace(given.answer, value=value)
                        self.late.append(LateAnswer(points, row, given))
                query.approximate = {}
        self.cells, self.answers, self.estimates = [], [], {}
        self.batch.drop_answers(self.mask)  # another may have come, and is to be received
        self.batch.suffice()

    def comes(self, late: LateAnswer) -> bool:
        """Return whether the model's own answer may still come."""
        return any(
            not np.isnan(self.sent_at[point])
            and not self.mask[point]
            and not self.batch.abandoned(point)
            and not self.batch.lost(point)
            for point in late.points
        )


def _repeated(x: np.ndarray | None, rows: int) -> np.ndarray:
    """Return x with its rows repeated in turn up to this number."""
    assert x is not None
    return x if len(x) == rows else x[np.arange(rows) % len(x)]


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
