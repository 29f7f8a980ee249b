"""Queries that wait to be sent."""

import collections
import threading
from collections.abc import Iterable

from ._request import Query, Request


class Lane:
    """Queries by turn: when their requests came, those of high priority earlier by their lead.

    So one of high priority goes ahead of the ordinary ones that came at most the lead before it,
    and an ordinary one waits for no others than those that come within the lead after it: it cannot
    starve.
    """

    def __init__(self):
        self._high: collections.deque[Query] = collections.deque()
        self._ordinary: collections.deque[Query] = collections.deque()

    def __len__(self) -> int:
        return len(self._high) + len(self._ordinary)

    def _next(self) -> collections.deque[Query]:
        """The one that has the first query; each is in the order of its turns by itself."""
        high, ordinary = self._high, self._ordinary
        if high and ordinary:
            return min(ordinary, high, key=lambda queries: queries[0].request.turn)
        return high or ordinary

    @property
    def first(self) -> Query:
        return self._next()[0]

    @property
    def since(self) -> float:
        """When the request came that has waited longest."""
        return min(
            queries[0].request.arrived for queries in (self._high, self._ordinary) if queries
        )

    def __bool__(self) -> bool:
        return bool(self._high or self._ordinary)

    def put(self, request: Request) -> None:
        (self._high if request.high else self._ordinary).extend(request.queries)

    def put_first(self, queries: Iterable[Query]) -> None:
        """Ahead of all, whatever their turn."""
        self._ordinary.extendleft(reversed([*queries]))

    def pop(self) -> Query:
        return self._next().popleft()

    def sweep(self) -> None:
        """Leaves out those that are over."""
        for queries in (self._high, self._ordinary):
            alive = [query for query in queries if not query.done]
            queries.clear()
            queries.extend(alive)


class Lanes:
    """Those sent again go ahead of all; of the rest, those go next whose first one's turn it is.

    Queries to be answered exactly travel alone, others in groups, so they stand in lanes of their
    own. `waiting` and `admit` are for any thread, all else for the batcher's.
    """

    def __init__(self, most: int):
        """`most`: how many may wait; those of high priority find room for a quarter more.

        Those sent again are counted, but never refused.
        """
        self.again, self.exact, self.coded = Lane(), Lane(), Lane()
        self.most, self.waiting = most, 0
        self._lock = threading.Lock()
        self._dead = 0  # queries in a lane that nobody waits for

    def admit(self, number: int, *, high: bool = False) -> bool:
        """Whether there is room for so many queries; if so, it is theirs from now on."""
        most = self.most + high * -(-self.most // 4)
        with self._lock:
            admitted = self.waiting + number <= most
            self.waiting += number * admitted
        return admitted

    def put(self, request: Request) -> None:
        """A request that was admitted."""
        (self.exact if request.exact_only else self.coded).put(request)

    def put_again(self, queries: list[Query]) -> None:
        for query in queries:
            query.waiting = True
        self._count(len(queries))
        self.again.put_first(queries)

    def next(self, *, held: bool = False) -> Lane | None:
        """The lane that is to be served; `held`: not that of the coded ones."""
        self._sweep()
        if not self.waiting:
            return None
        if self.again:
            return self.again
        exact, coded = bool(self.exact), bool(self.coded) and not held
        if exact and coded:
            return min(self.exact, self.coded, key=lambda lane: lane.first.request.turn)
        return self.exact if exact else self.coded if coded else None

    def share(self, lane: Lane, workers: int) -> int:
        """How many of these workers are a lane's, by how many wait in it; one at least."""
        own, everyone = len(lane), len(self.again) + len(self.exact) + len(self.coded)
        return max(workers * own // everyone, 1) if own < everyone else workers

    def pop(self, lane: Lane) -> Query:
        query = lane.pop()
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
                lane.sweep()
            self._dead = 0
