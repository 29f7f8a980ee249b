"""Groups of queries that are coded together, and the state of their coded data points."""

import dataclasses
from collections.abc import Iterator
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Bool

from ...pools import Batch
from ._coder import Coder
from ._request import Query

Place: TypeAlias = tuple[int, int]  # a query's cell in its group, and its row in the cell


@dataclasses.dataclass
class Cell:
    """The queries at one alpha of a group, which one worker receives as one batch.

    `x` has their data, (size, ...), until the group is encoded.
    """

    queries: list[Query]
    x: np.ndarray | None


class Group:
    """Up to K cells that are coded together, and the answers to their N coded data points.

    Cells may differ in size. Coded data points have as many rows as the largest cell; the rows of a
    smaller cell are repeated. A group without open queries is kept while answers must be compared.

    Attributes:
        coder: The group's code.
        kind: "coded"; "alone", a batch that is sent again to one worker; or "copy", a batch that is
            sent again to as many workers as the setting says.
        trial: Whether its late queries are sent again even if copies seem useless.
        began: When it was created.
        cells: The cells with its queries.
        layout: The coding of its queries; that of a full group until the group is complete.
        batch: The batch at the pool, set after the group is created.
        sent_at: By coded data point, when it was sent; NaN if it was not.
        mask: The mask of coded data points that are answered.
        counted: The mask of coded data points that were counted as late.
        answers: The answers; empty once the group is kept.
        spoiled: Whether its queries differ too much in scale to be decoded from each other.
    """

    batch: Batch

    def __init__(
        self, coder: Coder, kind: Literal["coded", "alone", "copy"], now: float, *, trial: bool
    ):
        """Create a group without queries."""
        self.coder, self.kind, self.began, self.trial = coder, kind, now, trial
        self.cells: list[Cell] = []
        self.layout = coder.layout(coder.num_data)
        self.mask, self.counted = np.zeros((2, coder.num_workers), bool)
        self.spoiled = False
        self.sent_at = np.full(coder.num_workers, np.nan)
        self.answers: list[np.ndarray | None] = [None] * coder.num_workers

    @property
    def alone(self) -> bool:
        return self.kind != "coded"

    @property
    def rows(self) -> int:
        """The number of queries of the largest cell, at least 1."""
        return max((len(cell.queries) for cell in self.cells), default=1)

    def add(self, queries: list[Query]) -> np.ndarray:
        """Add a cell; return its data, uncopied if the queries are neighbours in one request."""
        request, begin = queries[0].request, queries[0].place
        places = [query.place for query in queries if query.request is request]
        if request.x is not None and places == [*range(begin, begin + len(queries))]:
            x = request.x[begin : begin + len(queries)]
        else:  # queries in the queue still have their data
            x = np.stack([query.x for query in queries if query.x is not None])
        self.cells.append(Cell(queries, x))
        for query in queries:
            query.groups.append(self)
        return x

    def query(self, place: Place) -> Query:
        return self.cells[place[0]].queries[place[1]]

    def queries(self) -> Iterator[tuple[Place, Query]]:
        """Yield all queries, with their places."""
        for number, cell in enumerate(self.cells):
            for row, query in enumerate(cell.queries):
                yield (number, row), query

    def open_queries(self) -> Iterator[tuple[Place, Query]]:
        """Yield the queries without an answer whose requests are open, with their places."""
        return (each for each in self.queries() if not each[1].done)

    def compared(self) -> Iterator[tuple[Place, Query]]:
        """Yield the queries with approximate answers that must still be compared."""
        return (each for each in self.queries() if each[1].approximate)

    @property
    def failed(self) -> Bool[np.ndarray, " points"]:
        """The mask of coded data points that were sent and, as things stand, get no answer."""
        failed = ~np.isnan(self.sent_at) & ~self.mask
        for point in np.flatnonzero(failed).tolist():
            failed[point] = self.batch.lost(point) if self.alone else self.batch.abandoned(point)
        return failed

    def late(self, now: float) -> Bool[np.ndarray, " points"]:
        """Return the mask of coded data points that are overdue or failed."""
        overdue = now - self.sent_at >= self.batch.times.limit(self.rows)  # False for NaN: not sent
        return (overdue & ~self.mask) | self.failed
