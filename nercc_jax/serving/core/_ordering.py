"""The order of queries within groups: similar queries get neighbouring places."""

import math
import timeit
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Int

from ...inference import projection_on_host, short_path
from ._coder import Coder
from ._request import Query

# Fewer queries have only one path through them.
_FEWEST = 3
# How often the longest path is timed.
_TIMED = 5
# Doublings between the numbers of queries that a program is compiled for.
_STEP = 3


class QueryOrdering:
    """Assigns queries to places of groups along a short path through them.

    Distances are those of random projections (`random_projection`): queries are compared as they
    come, without a model. Programs are compiled for a few numbers of queries; other numbers are
    filled up.

    Attributes:
        seconds: the time that the longest path takes; infinite before `compile`.
    """

    def __init__(self, coder: Coder, shape: Sequence[int], rows: int):
        """Prepare the ordering.

        Args:
            coder: the code.
            shape: the shape of a query.
            rows: the largest number of rows of a group; the longest path has as many queries as
                such a group.
        """
        self._coder = coder
        powers = {*range(0, rows.bit_length(), _STEP), rows.bit_length() - 1}
        self._sizes = [coder.num_data << power for power in sorted(powers)]
        self._project = projection_on_host(shape)
        self._path = jax.jit(short_path)
        self._zeros = np.zeros(tuple(shape), np.float32)
        self.seconds = math.inf

    def compile(self) -> None:
        """Compile all programs, so that no query waits for it, and time the largest."""
        for size in self._sizes:
            self._order([self._zeros] * size)
        x = [self._zeros] * self._sizes[-1]
        # The least of a few: one that other programs delayed would switch ordering off for good.
        self.seconds = min(timeit.repeat(lambda: self._order(x), repeat=_TIMED, number=1))

    def assign(
        self, queries: Sequence[Query], sizes: Sequence[int], place: int
    ) -> list[list[Query]]:
        """Distribute queries over cells.

        A row of a group is a stretch of the path, with its queries at the alphas in order.

        Args:
            queries: as many as the cells hold.
            sizes: the cells' sizes.
            place: the first cell's place in its group; after a group's last place the next group's
                first follows.

        Returns:
            The queries of each cell.
        """
        order = iter(self.path(queries))
        cells: list[list[Query]] = [[] for _ in sizes]
        begin = 0
        while begin < len(sizes):
            number = min(self._coder.num_data - place, len(sizes) - begin)
            along = begin + self._coder.path_order(place, number)
            for row in range(max(sizes[begin : begin + number])):
                for cell in along.tolist():
                    if row < sizes[cell]:
                        cells[cell].append(queries[next(order)])
            begin, place = begin + number, 0
        return cells

    def path(self, queries: Sequence[Query]) -> list[int]:
        """Return an order in which neighbours are similar, in stretches of bounded length."""
        most = self._sizes[-1]
        order: list[int] = []
        for begin in range(0, len(queries), most):
            x = [query.x for query in queries[begin : begin + most]]
            found = self._order(x) if len(x) >= _FEWEST else np.arange(len(x))
            order += (begin + found).tolist()
        return order

    def _order(self, x: Sequence[np.ndarray | None]) -> Int[np.ndarray, " n"]:
        size = next(size for size in self._sizes if size >= len(x))
        features = [self._project(each) for each in x if each is not None]
        # What is not finite comes last in the path: the filling, and queries whose projection
        # overflows, in any order.
        filled = np.full((size, *features[0].shape), np.nan, np.float32)
        filled[: len(x)] = features
        order = np.asarray(self._path(filled))
        return order[order < len(x)]
