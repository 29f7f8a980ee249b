"""Queries that go out together, arranged so that those coded beside each other are alike."""

import math
import timeit
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Int

from ..inference import projection_on_host, short_path
from ._coder import Coder
from ._request import Query

# Fewer have only one path through them.
_FEWEST = 3
# How often the longest path is timed.
_TIMED = 5
# Doublings from one number of queries that there is a program for to the next.
_STEP = 3


class Arranger:
    """Puts queries into the places of groups along a short path through them.

    Distances are those of random projections (`random_projection`): queries are compared as they
    come, without a model. Programs are compiled for a few numbers of queries, whatever their shape;
    others are filled up.
    """

    def __init__(self, coder: Coder, shape: Sequence[int], rows: int):
        """For groups of up to `rows` rows; the longest path goes through as many as one holds."""
        self._coder = coder
        powers = {*range(0, rows.bit_length(), _STEP), rows.bit_length() - 1}
        self._sizes = [coder.num_data << power for power in sorted(powers)]
        self._project = projection_on_host(shape)
        self._path = jax.jit(short_path)
        self._zeros = np.zeros(tuple(shape), np.float32)
        self.seconds = math.inf  # that the longest path takes, once it is compiled

    def compile(self) -> None:
        """So that no query waits for it."""
        for size in self._sizes:
            self._through([self._zeros] * size)
        x = [self._zeros] * self._sizes[-1]
        # The quickest of a few: one that other programs held up would end ordering for good.
        self.seconds = min(timeit.repeat(lambda: self._through(x), repeat=_TIMED, number=1))

    def deal(self, queries: Sequence[Query], sizes: Sequence[int], place: int) -> list[list[Query]]:
        """Deals queries to cells of these sizes, which take a group's places from `place` on.

        After a group's last place the next group's first follows. A row of a group is a stretch of
        the path, its queries at the alphas in order.
        """
        order = iter(self.path(queries))
        cells: list[list[Query]] = [[] for _ in sizes]
        begin = 0
        while begin < len(sizes):
            number = min(self._coder.num_data - place, len(sizes) - begin)
            along = begin + self._coder.along(place, number)
            for row in range(max(sizes[begin : begin + number])):
                for cell in along.tolist():
                    if row < sizes[cell]:
                        cells[cell].append(queries[next(order)])
            begin, place = begin + number, 0
        return cells

    def path(self, queries: Sequence[Query]) -> list[int]:
        """An order of queries in which neighbours are alike, in stretches that are not too long."""
        most = self._sizes[-1]
        order: list[int] = []
        for begin in range(0, len(queries), most):
            x = [query.x for query in queries[begin : begin + most]]
            found = self._through(x) if len(x) >= _FEWEST else np.arange(len(x))
            order += (begin + found).tolist()
        return order

    def _through(self, x: Sequence[np.ndarray | None]) -> Int[np.ndarray, " n"]:
        size = next(size for size in self._sizes if size >= len(x))
        features = [self._project(each) for each in x if each is not None]
        # What is not finite comes last in the path: what fills up, and among it, in any order,
        # queries whose projection overflows.
        filled = np.full((size, *features[0].shape), np.nan, np.float32)
        filled[: len(x)] = features
        order = np.asarray(self._path(filled))
        return order[order < len(x)]
