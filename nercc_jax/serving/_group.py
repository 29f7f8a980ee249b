"""Queries coded together, and what is known of them."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ..pools import Batch
from ._coder import Coder
from ._record import GroupRecord
from ._request import Answer, Query


class Foreseen(NamedTuple):
    """A predictor's answer to a query before it is answered, and whether it may be given out."""

    answer: Answer
    sure: bool


class Guess(NamedTuple):
    """An answer that was not the model's own, and the query that it was given to."""

    answer: Answer
    x: np.ndarray


@dataclasses.dataclass
class Cell:
    """What one worker gets at once in one place of a group: some queries as one batch."""

    queries: list[Query]
    x: np.ndarray | None  # (size, ...), until nothing more is coded of it

    @property
    def pending(self) -> bool:
        """Whether somebody waits for one of its queries."""
        return any(not query.done for query in self.queries)


class Group:
    """Up to K cells behind one code.

    Cells may differ in size: the coded ones have the largest, and a smaller cell's rows come again.
    """

    def __init__(self, coder: Coder, now: float):
        self.coder = coder
        self.began = now
        self.cells: list[Cell] = []
        self.rows = 0  # of the largest cell
        self.layout = coder.layout(coder.num_data)  # of a full group, until it is complete
        self.batch: Batch | None = None
        # By coded data point.
        self.mask = np.zeros(coder.num_workers, bool)
        self.sent_at = np.full(coder.num_workers, np.nan)
        self.answers: list[np.ndarray | None] = [None] * coder.num_workers
        self.counted = np.zeros(coder.num_workers, bool)  # as stragglers
        # By cell and row: what was said of a query before it was answered, ...
        self.foreseen: dict[tuple[int, int], Foreseen] = {}
        # ... and what was given out: to be compared, should the model's own answer come.
        self.guessed: dict[tuple[int, int], Guess] = {}
        self.heard = False  # something came that the batcher has not looked at
        self.closed = False
        self.look_at = np.inf
        self.linger_until = np.inf
        self.record: GroupRecord | None = None  # if somebody wants to know

    @property
    def full(self) -> bool:
        return len(self.cells) == self.coder.num_data

    @property
    def pending(self) -> bool:
        return any(cell.pending for cell in self.cells)

    @property
    def sent(self) -> np.ndarray:
        """The coded data points that were sent."""
        return ~np.isnan(self.sent_at)

    @property
    def out(self) -> np.ndarray:
        """Those of them that are not answered."""
        return self.sent & ~self.mask

    def take(self, cell: Cell, tell: Callable[[], None]) -> None:
        """The next cell comes; `tell` is called when one of its queries is over elsewhere."""
        self.cells.append(cell)
        self.rows = max(self.rows, len(cell.queries))
        for query in cell.queries:
            query.tell_home = query.tell_home or tell
            request = query.request
            if request.record is not None:
                self.record = self.record or GroupRecord()
                request.record.enter(self.record, query.place, request.arrived)

    def hear(self, point: int, answer: np.ndarray, now: float, worker: int) -> None:
        """A coded data point is answered."""
        self.answers[point], self.mask[point] = answer, True
        if self.record is not None:
            self.record.heard(point, now, worker)

    def open_queries(self, cells: Iterable[int] | None = None) -> Iterator[tuple[int, int, Query]]:
        """The queries of these cells (all) that somebody waits for: cell, row, query."""
        for number in range(len(self.cells)) if cells is None else cells:
            for row, query in enumerate(self.cells[number].queries):
                if not query.done:
                    yield number, row, query

    def inputs(self) -> np.ndarray:
        """(rows, cells, ...)."""
        return np.stack([_tall(cell.x, self.rows) for cell in self.cells], axis=1)

    def inputs_sent(self) -> None:
        """Nothing more is coded: the queries' data can go, which may be large."""
        for cell in self.cells:
            cell.x = None

    def values(self) -> np.ndarray:
        """All answers, (N, rows, ...), zero where there is none."""
        some = next(answer for answer in self.answers if answer is not None)
        values = np.zeros((len(self.answers), self.rows, *some.shape[1:]), some.dtype)
        for point, answer in enumerate(self.answers):
            if answer is not None:
                values[point] = _tall(answer, self.rows)
        return values

    def lesson(self) -> tuple[np.ndarray, np.ndarray] | None:
        """All workers' answers and the model's own to each cell's first query, if all are known."""
        if not self.mask.all() or not all(len(points) for points in self.layout.own):
            return None
        firsts = np.stack([answer[0] for answer in self.answers if answer is not None])
        return firsts, firsts[[points[0] for points in self.layout.own]]


def _tall(x: np.ndarray | None, rows: int) -> np.ndarray:
    """x with its rows again and again until there are so many."""
    assert x is not None
    return x if len(x) == rows else x[np.arange(rows) % len(x)]
