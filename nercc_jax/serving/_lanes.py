"""Queries that wait to be sent."""

import collections
import threading
from typing import TypeAlias

from ._request import Query, Request

Lane: TypeAlias = collections.deque[Query]


class Lanes:
    """Those sent again go ahead of all; of the rest, those go next whose first has waited longest.

    Queries to be answered exactly travel alone, others in groups, so they stand in lanes of their
    own. `waiting` and `admit` are for any thread, all else for the batcher's.
    """

    def __init__(self, most: int):
        """`most`: how many may wait. Those sent again are counted, but never refused."""
        self.again: Lane = collections.deque()
        self.exact: Lane = collections.deque()
        self.coded: Lane = collections.deque()
        self.most, self.waiting = most, 0
        self._lock = threading.Lock()
        self._dead = 0  # queries in a lane that nobody waits for

    def admit(self, number: int) -> bool:
        """Whether there is room for so many queries; if so, it is theirs from now on."""
        with self._lock:
            admitted = self.waiting + number <= self.most
            self.waiting += number * admitted
        return admitted

    def put(self, request: Request) -> None:
        """A request that was admitted."""
        (self.exact if request.exact_only else self.coded).extend(request.queries)

    def put_again(self, queries: list[Query]) -> None:
        for query in queries:
            query.waiting = True
        self._count(len(queries))
        self.again.extendleft(reversed(queries))

    def next(self, *, held: bool = False) -> Lane | None:
        """The lane that is to be served; `held`: not that of the coded ones."""
        self._sweep()
        if self.again:
            return self.again
        lanes = [lane for lane in (self.exact, self.coded) if lane]
        if held and self.coded:
            lanes.remove(self.coded)
        return min(lanes, key=lambda lane: lane[0].request.arrived, default=None)

    def share(self, lane: Lane, workers: int) -> int:
        """How many of these workers are a lane's, by how many wait in it; one at least."""
        everyone = sum(map(len, (self.again, self.exact, self.coded)))
        return max(workers * len(lane) // max(everyone, 1), 1)

    def pop(self, lane: Lane) -> Query:
        query = lane.popleft()
        self._leave(query)
        return query

    def drop(self, query: Query) -> None:
        """Nobody waits for a query any more, which may still stand in a lane."""
        query.done = True
        if query.waiting:
            self._leave(query)
            self._dead += 1

    def _leave(self, query: Query) -> None:
        query.waiting = False
        self._count(-1)

    def _count(self, change: int) -> None:
        with self._lock:
            self.waiting += change

    def _sweep(self) -> None:
        if self._dead:
            for lane in (self.again, self.exact, self.coded):
                alive = [query for query in lane if not query.done]
                lane.clear()
                lane.extend(alive)
            self._dead = 0
