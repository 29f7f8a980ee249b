"""The queue of queries that wait to be sent, and the scheduler's inbox of events."""

import collections
import threading
from collections.abc import Callable, Iterable
from typing import Any

from ...pools.clock import AbstractClock
from ._request import Query, Request


class EventQueue:
    """The scheduler's thread and its inbox: requests, changed groups, free workers.

    Any thread may `post`; only the scheduler's own thread takes events out.
    """

    def __init__(self, clock: AbstractClock, name: str, turn: Callable[[], float]):
        """Create the thread, which calls `turn()` after each event and when that asked for it."""
        self._events: collections.deque[Any] = collections.deque()
        self._turns = clock.turns(name, turn)
        self.start, self.wake, self.close = self._turns.start, self._turns.wake, self._turns.close

    def post(self, event: Any) -> None:
        self._events.append(event)
        self._turns.wake()

    def post_group(self, group: Any) -> None:
        """Add a group to which something happened, unless it waits here already."""
        if not group.posted:
            group.posted = True
            self.post(group)

    def __bool__(self) -> bool:
        """Return whether there is any event."""
        return bool(self._events)

    def take(self) -> list[Any]:
        """Return the events so far; what comes meanwhile is left for the next turn."""
        return [self._events.popleft() for _ in range(len(self._events))]


class Lane:
    """Queries in the order of their turns: the arrival of their request, less its lead.

    A query of high priority overtakes ordinary ones that arrived at most the lead before it. An
    ordinary query waits only for those that arrive within the lead after it, so it cannot starve.
    """

    def __init__(self):
        self._high: collections.deque[Query] = collections.deque()
        self._ordinary: collections.deque[Query] = collections.deque()

    def __len__(self) -> int:
        return len(self._high) + len(self._ordinary)

    def __bool__(self) -> bool:
        return bool(self._high or self._ordinary)

    def _next(self) -> collections.deque[Query]:
        """Return the deque with the first query; each deque is in order by itself."""
        high, ordinary = self._high, self._ordinary
        if high and ordinary:
            return min(ordinary, high, key=lambda queries: queries[0].request.turn)
        return high or ordinary

    @property
    def first(self) -> Query:
        return self._next()[0]

    @property
    def since(self) -> float:
        return min(
            queries[0].request.arrived for queries in (self._high, self._ordinary) if queries
        )

    def add(self, request: Request) -> None:
        (self._high if request.high else self._ordinary).extend(request.queries)

    def add_first(self, queries: Iterable[Query]) -> None:
        """Put queries ahead of all others, whatever their turns."""
        self._ordinary.extendleft(reversed([*queries]))

    def pop(self, number: int) -> list[Query]:
        if not self._high:
            return [self._ordinary.popleft() for _ in range(number)]
        return [self._next().popleft() for _ in range(number)]

    def sweep(self) -> None:
        for queries in (self._high, self._ordinary):
            alive = [query for query in queries if not query.done]
            queries.clear()
            queries.extend(alive)


class QueryQueue:
    """The bounded queue: one lane each for queries to be coded, exact ones, and resent ones.

    Resent queries go ahead of all others; otherwise the lane whose first query has the earlier turn
    is next. Exact queries travel alone and others in groups, hence the lanes. `waiting` and
    `reserve` may be used by any thread, all else only by the scheduler's.
    """

    def __init__(self, capacity: int):
        """Create an empty queue, in which so many queries may wait.

        Those of high priority find room for a quarter more. Resent ones count, and are never
        refused.
        """
        self.resent, self.exact, self.coded = Lane(), Lane(), Lane()
        self.capacity, self.waiting = capacity, 0
        self._lock = threading.Lock()
        self._dead = 0  # queries that stand in a lane, but nobody waits for
        self._popped: list[Query] = []

    def reserve(self, number: int, *, high: bool = False) -> bool:
        """Reserve room for a number of queries, and return whether there is any."""
        capacity = self.capacity + high * -(-self.capacity // 4)
        with self._lock:
            reserved = self.waiting + number <= capacity
            self.waiting += number * reserved
        return reserved

    def add(self, request: Request) -> None:
        (self.exact if request.exact_only else self.coded).add(request)

    def resend(self, queries: list[Query]) -> None:
        """Add queries a second time, ahead of all others."""
        for query in queries:
            query.waiting = True
        self._count(len(queries))
        self.resent.add_first(queries)

    def next_lane(self, *, hold_coded: bool = False) -> Lane | None:
        """Return the lane to serve next, or None; without queries to be coded if these are held."""
        for lane in (self.resent, self.exact, self.coded) if self._dead else ():
            lane.sweep()
        self._dead = 0
        if not self.waiting:
            return None
        if self.resent:
            return self.resent
        exact, coded = bool(self.exact), bool(self.coded) and not hold_coded
        if exact and coded:
            return min(self.exact, self.coded, key=lambda lane: lane.first.request.turn)
        return self.exact if exact else self.coded if coded else None

    def workers_for(self, lane: Lane, workers: int) -> int:
        """Return how many of these workers a lane may use, in proportion to its length."""
        own, total = len(lane), len(self.resent) + len(self.exact) + len(self.coded)
        return max(workers * own // total, 1) if own < total else workers

    def pop(self, lane: Lane, number: int) -> list[Query]:
        queries = lane.pop(number)
        self._popped += queries
        for query in queries:
            query.waiting = False
        self._count(-number)
        return queries

    def take_popped(self) -> list[Query]:
        popped, self._popped = self._popped, []
        return popped

    def discard(self, query: Query) -> None:
        """Mark a query as over, wherever it stands."""
        query.done = True
        if query.waiting:
            query.waiting = False
            self._count(-1)
            self._dead += 1

    def _count(self, change: int) -> None:
        with self._lock:
            self.waiting += change
