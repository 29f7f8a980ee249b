"""Dispatch: queries leave the queue for idle workers, alone or in groups.

Within a group, similar queries get neighbouring places (`QueryOrdering`).
"""

import functools
import itertools
import math
import timeit
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from ..codes import Uncoded
from ..inference import order_points
from ..inference.order import random_projection
from ..pools import AbstractPool
from ..pools.batch import Refuse
from ..pools.clock import TimeShare
from ..pools.times import power_of_two
from ._fallback import Budget, GroupPredictor
from ._policy import BatchingPolicy
from .adapt._adaptation import Adaptation
from .core._adaptation import DispatchSetting
from .core._coder import Coder
from .core._group import Cell, Group
from .core._queue import EventQueue, Lane, QueryQueue
from .core._request import Query

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


class Turn(NamedTuple):
    """The circumstances of one turn of the scheduler.

    An answer usually takes `answer_time` seconds, infinitely many if unknown. `at_once`, groups do
    not wait to fill up.
    """

    now: float
    setting: DispatchSetting
    answer_time: float
    at_once: bool


class Dispatcher:
    """Forms groups and sends them to the pool. It sends nothing that would only wait there.

    Attributes:
        filling: the group of a systematic code that has room for more queries.
        groups: all groups that are not closed.
    """

    def __init__(
        self,
        pool: AbstractPool,
        coder: Coder,
        queue: QueryQueue,
        events: EventQueue,
        policy: BatchingPolicy,
        enough: int,
        refuse: Refuse,
        predictor: GroupPredictor,
        adaptation: Adaptation,
        ordering: QueryOrdering | None,
    ):
        """Create a dispatcher; without an ordering, queries are taken as they come.

        With `enough` answers a group of a code that is not systematic can be decoded.
        """
        self._pool, self._coder, self._queue, self._events = pool, coder, queue, events
        self._policy, self._enough, self._refuse = policy, enough, refuse
        self._ordering = ordering
        self._predictor, self._adaptation = predictor, adaptation
        self._budget = Budget(self._policy.max_redundancy)
        self._ordering_time = TimeShare(pool.clock, _OF_THE_TIME)
        self._observe, self._clock = adaptation.observe, pool.clock
        self._alone = _coder_of_one(coder.kinds[0])
        self.filling: Group | None = None
        self.groups: set[Group] = set()

    def dispatch(self, turn: Turn) -> tuple[list[Group], float]:
        """Send what waits while workers are idle, then the coded data points of full groups.

        Returns:
            The coded groups of which something was sent, and when to dispatch again although
            nothing happens.
        """
        sent: list[Group] = []
        due = math.inf
        while self._pool.idle and (lane := self._queue.next_lane(hold_coded=due < math.inf)):
            if lane is self._queue.resent:
                self._resend(lane, turn)
            elif lane is not self._queue.coded:
                self._send_alone(_cell(self._next_batch(lane, turn.now)), turn)
            elif self._coder.systematic:
                sent += self._send_own(turn)
            else:
                due = lane.since + self._policy.batch_wait_timeout_s
                if len(lane) >= self._coder.num_data or turn.now >= due or turn.at_once:
                    due = math.inf
                    sent += self._send_group(turn)
        groups = list(dict.fromkeys(sent))
        for group in groups:
            if group is not self.filling:
                self.complete(group, turn)
        return groups, due

    def complete(self, group: Group, turn: Turn) -> None:
        """Close a group for further queries, and send its coded data points if they are of use."""
        if group is self.filling:
            self.filling = None
        coder, queries = self._coder, len(group.cells)
        group.layout = coder.layout(queries)
        self._observe("group_fill", queries / coder.num_data)
        # Redundancy for one query is not worth slowing down others.
        points = self._redundancy(group, turn)
        if len(points) and group.pending:
            begin = self._clock.now()
            coded = coder.encode(group.inputs(), points, group.layout)
            end = self._clock.now()
            self._observe("encode_seconds", end - begin)
            if group.trace is not None:
                group.trace.add("encode", begin, end, queries=queries, points=len(points))
            self._send(group, points, coded, turn.now)
        group.drop_inputs()

    def close(self, group: Group) -> None:
        """Give up what is still under way of a group."""
        if group is self.filling:
            self.filling = None
        group.closed = True
        self.groups.discard(group)
        group.batch.forget()

    def _redundancy(self, group: Group, turn: Turn) -> Int[np.ndarray, " points"]:
        """Return the coded data points to send beyond the queries themselves."""
        points = group.layout.extras
        # A code that mixes queries sends all of them.
        if self._coder.systematic:
            points = points[: int(min(self._pool.spare, self._coder.num_workers))]
        redundancy = turn.setting.redundancy
        if redundancy == "always" or not len(points):
            return points
        if redundancy == "none":
            return points[:0]
        found = self._predictor.predictions(group, range(len(group.cells)))
        doubt = np.zeros(len(group.cells))
        for (cell, _), prediction in found.items():
            if not prediction.sure:
                answer = prediction.answer
                worth = answer.error**2 if math.isnan(answer.disagreement) else answer.disagreement
                doubt[cell] = max(doubt[cell], worth, 1e-9)
        layout, places = group.layout, group.layout.place_of[points]
        if np.all(places >= 0):  # copies, which go to the queries most in doubt, in turn
            doubted = np.argsort(-doubt, kind="stable")[: np.count_nonzero(doubt)]
            each = -(-len(layout.extras) // len(doubt))  # copies of a query, at most
            places = np.tile(doubted, each)[: len(points)]
            wanted = points[: len(places)]
            group.layout = layout.with_copies(wanted, places)
            group.moved = group.layout.place_of != layout.place_of
        else:  # a point that mixes queries serves all of them
            wanted = points[np.where(places < 0, doubt.any(), doubt[places] > 0)]
        number = 0
        while number < len(wanted) and self._budget.affords():
            self._budget.spend()
            number += 1
        return wanted[:number]

    def _send_own(self, turn: Turn) -> list[Group]:
        """Send queries as they came, each to its own worker, and return their groups."""
        sent = []
        for cell in self._next_cells(self._queue.coded, turn):
            if self.filling is None:
                self.filling = self._new_group(self._coder, turn)
            group = self.filling
            sent.append(group)
            own = self._coder.first[len(group.cells)]
            group.add(cell)
            assert cell.x is not None
            self._send(group, own, [cell.x] * len(own), turn.now)
            if group.full:
                self.filling = None
        return sent

    def _send_group(self, turn: Turn) -> list[Group]:
        num_data, lane = self._coder.num_data, self._queue.coded
        number = len(lane)
        rows = power_of_two(min(max(number // num_data, 1), self._policy.max_batch_size))
        columns = min(number, num_data)
        queries = self._pop(lane, rows * columns, turn.now)
        cells = self._assign(queries, [rows] * columns, 0, turn)
        if columns == 1:
            self._send_alone(cells[0], turn)  # all coded data points would be the query
            return []
        group = self._new_group(self._coder, turn)
        for cell in cells:
            group.add(cell)
        return [group]

    def _resend(self, lane: Lane, turn: Turn) -> None:
        """Send queries again, to workers whose answers are not among those to be compared.

        A straggler's query goes to as many workers at once as hedging asks for.
        """
        queries = self._next_batch(lane, turn.now)
        avoid = queries[0].candidates.keys()
        same = [query for query in queries if query.candidates.keys() == avoid]
        same = same[: power_of_two(len(same))]
        self._queue.resend([query for query in queries if query not in same])
        at_once = 1 if avoid else turn.setting.overdue.copies
        group = self._send_alone(_cell(same), turn, avoid, at_once)
        group.is_copy = not avoid

    def _send_alone(
        self, cell: Cell, turn: Turn, avoid: Iterable[int] = (), at_once: int = 1
    ) -> Group:
        """Send a batch to one worker, but not to some, hedged: the answers are exact."""
        group = self._new_group(self._alone, turn, alone=True, at_once=at_once)
        group.add(cell)
        assert cell.x is not None
        self._send(group, np.arange(1), [cell.x], turn.now, avoid)
        group.drop_inputs()
        return group

    def _new_group(
        self, coder: Coder, turn: Turn, *, alone: bool = False, at_once: int = 1
    ) -> Group:
        group = Group(coder, turn.now, alone=alone)

        def changed(_: object) -> None:
            self._events.post_group(group)

        group.batch = self._pool.open(
            coder.num_workers,
            needed=coder.num_data if coder.systematic else self._enough,
            copies=self._policy.copies if alone else 1,
            at_once=at_once,
            on_change=changed,
            overdue=turn.setting.overdue,
            refuse=self._refuse,
        )
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
        if group.trace is not None:
            group.trace.sent(points.tolist(), now)
        values = list(values)
        for value in values:
            self._observe("batch_size", len(value))
        kinds = [group.coder.kinds[point] for point in points]
        self._pool.send(group.batch, points.tolist(), values, kinds=kinds, avoid=avoid)

    def _next_batch(self, lane: Lane, now: float) -> list[Query]:
        """Take the next queries for one worker, if a lane's workers share its queries out."""
        idle = self._queue.workers_for(lane, self._pool.idle)
        size = self._size(len(lane), min(idle, self._pool.spare))
        return self._pop(lane, size, now)

    def _next_cells(self, lane: Lane, turn: Turn) -> list[Cell]:
        sizes: list[int] = []
        left, idle = len(lane), self._queue.workers_for(lane, self._pool.idle)
        spare = self._pool.spare
        while left and idle:
            sizes.append(self._size(left, min(idle, spare - len(sizes))))
            left, idle = left - sizes[-1], idle - 1
        queries = self._pop(lane, sum(sizes), turn.now)
        place = 0 if self.filling is None else len(self.filling.cells)
        return self._assign(queries, sizes, place, turn)

    def _size(self, waiting: int, workers: int | float) -> int:
        """Return the size of a batch if workers that slow down no other share what waits."""
        share = math.ceil(waiting / max(workers, 1))
        return power_of_two(min(share, self._policy.max_batch_size))

    def _assign(self, queries: list[Query], sizes: list[int], place: int, turn: Turn) -> list[Cell]:
        """Distribute queries over cells of these sizes, for a group's places from `place` on."""
        # Where answer times are unknown, be quick.
        known = turn.answer_time if turn.answer_time < math.inf else 0.0
        longest = max(_ORDERING, _ORDERING_SHARE * known)
        begin, ordering = self._clock.now(), self._ordering
        if ordering is None or ordering.seconds > longest or begin < self._ordering_time.next:
            rest = iter(queries)
            assigned = [list(itertools.islice(rest, size)) for size in sizes]
        else:
            assigned = ordering.assign(queries, sizes, place)
            self._observe("order_seconds", self._ordering_time.spend(begin))
        return [_cell(each) for each in assigned]

    def _pop(self, lane: Lane, number: int, now: float) -> list[Query]:
        queries = self._queue.pop(lane, number)
        self._budget.earn(sum(not query.reexecuted for query in queries))
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
