"""Dispatch: queries leave the queue for idle workers, alone or in groups.

Within a group, similar queries get neighbouring places (`QueryOrdering`).
"""

import functools
import itertools
import math
import timeit
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jaxtyping import Int

from ..codes import Uncoded
from ..inference import order_points
from ..inference.order import random_projection
from ..pools import AbstractPool
from ..pools.batch import Refuse
from ..pools.clock import TimeShare
from ..pools.times import AnswerTimes, power_of_two
from ..stragglers import picking
from ._estimates import Estimator
from ._policy import BatchingPolicy
from .adapt._adaptation import Adaptation
from .core._coder import Coder
from .core._group import Cell, Group
from .core._request import Query
from .core._requests import Budget, EventQueue, Lane, QueryQueue

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
    filled up. The longest path takes some `seconds`; infinitely many before `compile`.
    """

    def __init__(self, coder: Coder, shape: Sequence[int], rows: int):
        """Prepare for queries of a shape; the longest path has those of a group of `rows` rows."""
        self._coder = coder
        powers = {*range(0, rows.bit_length(), _STEP), rows.bit_length() - 1}
        self._sizes = [coder.num_data << power for power in sorted(powers)]
        self._path = jax.jit(
            lambda rows: order_points(rows, 1, features=rows, buffer_size=len(rows))
        )
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
        """Distribute queries over cells of these sizes, and return the queries of each cell.

        A row of a group is a stretch of the path, with its queries at the alphas in order. The
        first cell has this place in its group; after a group's last place the next group's first
        follows.
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
        features = [random_projection(each[None])[0] for each in x if each is not None]
        # What is not finite comes last in the path: the filling, and queries whose projection
        # overflows, in any order.
        filled = np.full((size, *features[0].shape), np.nan, np.float32)
        filled[: len(x)] = features
        order = np.asarray(self._path(filled))
        return order[order < len(x)]


# Ordering takes the scheduler's time. It is left out where it takes more seconds than this, and
# more than this share of the time that an answer takes; and for a while where it has taken more
# than this share of the whole time. Beside models that keep all cores busy it takes ten times as
# long as alone: with requests of 16 queries without end, throughput was a fifth less for it.
_ORDERING, _ORDERING_SHARE, _OF_THE_TIME = 0.002, 0.05, 0.1


class Dispatcher:
    """Forms groups and sends them to the pool. It sends nothing new that would only wait there.

    Attributes:
        filling: the group of a systematic code that has room for more queries.
        groups: all groups that are not closed.
        again: the budget of queries that are sent again because they are uncertain.
    """

    def __init__(
        self,
        pool: AbstractPool,
        queue: QueryQueue,
        events: EventQueue,
        refuse: Refuse,
        coder: Coder,
        policy: BatchingPolicy,
        estimator: Estimator,
        adaptation: Adaptation,
    ):
        """Create a dispatcher, and compile the ordering of queries, if they are ordered."""
        self._pool, self._coder, self._queue, self._events = pool, coder, queue, events
        self._policy, self._refuse = policy, refuse
        self._estimator, self._adaptation = estimator, adaptation
        self._ordering = None
        if policy.ordering and coder.needs_order:
            shape = estimator.queries.shape
            self._ordering = QueryOrdering(coder, shape, policy.max_batch_size)
            self._ordering.compile()
        self._budget = Budget(policy.max_redundancy)
        self.again = Budget(policy.max_reexecution)
        self._ordering_time = TimeShare(pool.clock, _OF_THE_TIME)
        self._observe, self._clock = adaptation.observe, pool.clock
        self._alone = _coder_of_one(coder.kinds[0])
        self._random = np.random.default_rng(0)
        self._times: AnswerTimes | None = None  # the pool's, by the rule that holds
        self.filling: Group | None = None
        self.groups: set[Group] = set()

    @property
    def answer_time(self) -> float:
        """Seconds that the answer to a full batch usually takes; infinite where unknown."""
        return math.inf if self._times is None else self._times.median(self._policy.max_batch_size)

    def dispatch(self, now: float, *, at_once: bool) -> tuple[list[Group], float]:
        """Send what waits while workers are idle, then the coded data points of full groups.

        If `at_once`, groups do not wait to fill up.

        Returns:
            The coded groups of which something was sent, and when to dispatch again although
            nothing happens.
        """
        sent: list[Group] = []
        due = math.inf
        while self._pool.idle and (lane := self._queue.next_lane(hold_coded=due < math.inf)):
            if lane is not self._queue.coded:
                queries = self._pop(lane, self._size(len(lane), self._workers_for(lane)), now)
                self._send_alone(queries, now)
            elif self._coder.systematic:
                sent += self._send_own(now)
            else:
                due = lane.since + self._policy.batch_wait_timeout_s
                if len(lane) >= self._coder.num_data or now >= due or at_once:
                    due = math.inf
                    sent += self._send_group(now)
        groups = list(dict.fromkeys(sent))
        for group in groups:
            if group is not self.filling:
                self.complete(group, now)
        return groups, due

    def copy(self, queries: Sequence[Query], workers: int, now: float) -> None:
        """Send queries once more, each to this number of workers that have not answered it.

        They wait at the pool for such workers, ahead of all that comes later.
        """
        left = list(queries)
        while left:
            avoid = left[0].candidates.keys()
            same = [query for query in left if query.candidates.keys() == avoid]
            idle = min(self._pool.idle, self._pool.spare)
            same = same[: self._size(len(same), idle)]
            left = [query for query in left if query not in same]
            group = self._send_alone(same, now, avoid, 1 if avoid else workers)
            group.is_copy = not avoid

    def complete(self, group: Group, now: float) -> None:
        """Close a group for further queries, and send its coded data points if they are of use."""
        if group is self.filling:
            self.filling = None
        coder, queries = self._coder, len(group.cells)
        group.layout = coder.layout(queries)
        self._observe("group_fill", queries / coder.num_data)
        # Redundancy for one query is not worth slowing down others.
        points = self._redundancy(group)
        if len(points) and group.pending:
            begin = self._clock.now()
            coded = coder.encode(group.inputs(), points, group.layout)
            self._observe("encode_seconds", self._clock.now() - begin)
            self._send(group, points, coded, now)
        group.drop_inputs()

    def close(self, group: Group) -> None:
        """Give up what is still under way of a group."""
        if group is self.filling:
            self.filling = None
        group.closed = True
        self.groups.discard(group)
        group.batch.forget()

    def _redundancy(self, group: Group) -> Int[np.ndarray, " points"]:
        """Return the coded data points to send beyond the queries themselves."""
        points = group.layout.extras
        # A code that mixes queries sends all of them.
        if self._coder.systematic:
            points = points[: int(min(self._pool.spare, self._coder.num_workers))]
        redundancy = self._adaptation.setting.redundancy
        if redundancy == "always" or not len(points):
            return points
        if redundancy == "none":
            return points[:0]
        waiting = [place for place, _ in group.open_queries()]
        self._estimator.predict(group, waiting)
        doubt = np.zeros(len(group.cells))
        for cell, row in waiting:
            answer, sure = group.estimates.get((cell, row), {}).get("predicted", (None, True))
            if answer is not None and not sure:
                worth = answer.error**2 if math.isnan(answer.disagreement) else answer.disagreement
                doubt[cell] = max(doubt[cell], worth, 1e-9)
        layout, places = group.layout, group.layout.place_of[points]
        if (places < 0).any():  # a point that mixes queries serves all of them
            return self._afforded(points[np.where(places < 0, doubt.any(), doubt[places] > 0)])
        # Copies, which go to the queries most in doubt, in turn.
        doubted = np.argsort(-doubt, kind="stable")[: np.count_nonzero(doubt)]
        each = -(-len(layout.extras) // len(doubt))  # copies of a query, at most
        places = np.tile(doubted, each)[: len(points)]
        points = points[: len(places)]
        group.layout = layout.with_copies(points, places)
        group.moved = group.layout.place_of != layout.place_of
        return self._afforded(points)

    def _afforded(self, points: Int[np.ndarray, " points"]) -> Int[np.ndarray, " few"]:
        points = points[: int(min(self._budget.left, len(points)))]
        self._budget.left -= len(points)
        return points

    def _send_own(self, now: float) -> list[Group]:
        """Send queries as they came, each to its own worker, and return their groups."""
        lane, sizes, sent = self._queue.coded, [], []
        left, idle, spare = len(lane), self._workers_for(lane), self._pool.spare
        while left and idle:
            sizes.append(self._size(left, min(idle, spare - len(sizes))))
            left, idle = left - sizes[-1], idle - 1
        place = 0 if self.filling is None else len(self.filling.cells)
        for queries in self._assign(self._pop(lane, sum(sizes), now), sizes, place):
            if self.filling is None:
                self.filling = self._new_group(self._coder, now)
            group = self.filling
            sent.append(group)
            own, cell = self._coder.first[len(group.cells)], _cell(queries)
            group.add(cell)
            assert cell.x is not None
            self._send(group, own, [cell.x] * len(own), now)
            if group.full:
                self.filling = None
        return sent

    def _send_group(self, now: float) -> list[Group]:
        num_data, lane = self._coder.num_data, self._queue.coded
        number = len(lane)
        rows = power_of_two(min(max(number // num_data, 1), self._policy.max_batch_size))
        columns = min(number, num_data)
        cells = self._assign(self._pop(lane, rows * columns, now), [rows] * columns, 0)
        if columns == 1:
            self._send_alone(cells[0], now)  # all coded data points would be the query
            return []
        group = self._new_group(self._coder, now)
        for queries in cells:
            group.add(_cell(queries))
        return [group]

    def _send_alone(
        self, queries: Sequence[Query], now: float, avoid: Iterable[int] = (), at_once: int = 1
    ) -> Group:
        """Send a batch to one worker, but not to some, hedged: the answers are exact."""
        group = self._new_group(self._alone, now, alone=True, at_once=at_once)
        cell = _cell(queries)
        group.add(cell)
        assert cell.x is not None
        self._send(group, np.arange(1), [cell.x], now, avoid)
        group.drop_inputs()
        return group

    def _new_group(
        self, coder: Coder, now: float, *, alone: bool = False, at_once: int = 1
    ) -> Group:
        group = Group(coder, now, alone=alone, trial=self._random.random() < picking.PICKING.tried)

        def changed(_: object) -> None:
            self._events.post_group(group)

        group.batch = self._pool.open(
            coder.num_workers,
            needed=coder.num_data if coder.systematic else self._estimator.enough,
            copies=self._policy.copies if alone else 1,
            at_once=at_once,
            on_change=changed,
            overdue=self._adaptation.setting.overdue,
            refuse=self._refuse,
        )
        self._times = group.batch.times
        self.groups.add(group)
        return group

    def _send(
        self,
        group: Group,
        points: np.ndarray,
        values: Iterable[np.ndarray],
        now: float,
        avoid: Iterable[int] = (),
    ) -> None:
        group.sent_at[points] = now
        values = list(values)
        for value in values:
            self._observe("batch_size", len(value))
        kinds = [group.coder.kinds[point] for point in points]
        self._pool.send(group.batch, points.tolist(), values, kinds=kinds, avoid=avoid)

    def _workers_for(self, lane: Lane) -> int:
        return self._queue.workers_for(lane, self._pool.idle)

    def _size(self, waiting: int, workers: int | float) -> int:
        """Return the size of a batch if workers that slow down no other share what waits."""
        share = math.ceil(waiting / max(min(workers, self._pool.spare), 1))
        return power_of_two(min(share, self._policy.max_batch_size))

    def _assign(self, queries: list[Query], sizes: list[int], place: int) -> list[list[Query]]:
        """Distribute queries over cells of these sizes, for a group's places from `place` on."""
        # Where answer times are unknown, be quick.
        known = self.answer_time if self.answer_time < math.inf else 0.0
        longest = max(_ORDERING, _ORDERING_SHARE * known)
        begin, ordering = self._clock.now(), self._ordering
        if ordering is None or ordering.seconds > longest or begin < self._ordering_time.next:
            rest = iter(queries)
            return [list(itertools.islice(rest, size)) for size in sizes]
        assigned = ordering.assign(queries, sizes, place)
        self._observe("order_seconds", self._ordering_time.spend(begin))
        return assigned

    def _pop(self, lane: Lane, number: int, now: float) -> list[Query]:
        queries = self._queue.pop(lane, number)
        self._budget.earn(number)
        self.again.earn(number)
        for request in {query.request for query in queries}:
            if math.isinf(request.sent):
                request.sent = now
                self._observe("queue_seconds", now - request.arrived)
        return queries


@functools.cache
def _coder_of_one(model: int) -> Coder:
    """Return the coder of a query that is sent alone: the same for all dispatchers."""
    return Coder(Uncoded(1), (model,))


def _cell(queries: Sequence[Query]) -> Cell:
    request, begin = queries[0].request, queries[0].place
    if request.x is not None and all(
        query.request is request and query.place == begin + number
        for number, query in enumerate(queries)
    ):
        return Cell(list(queries), request.x[begin : begin + len(queries)])
    x = [query.x for query in queries if query.x is not None]
    assert len(x) == len(queries), "queries that are over are taken out of the queue"
    return Cell(list(queries), np.stack(x))
