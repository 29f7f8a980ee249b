"""Queries go out: from their lanes to idle workers, alone or in groups."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from ..codes import Uncoded
from ..pools import AbstractPool, Refuse
from ._arrangement import Arranger
from ._budget import Budget
from ._coder import Coder
from ._foresight import Foresight
from ._group import Cell, Group
from ._lanes import Lane, Lanes
from ._policy import BatchingPolicy
from ._request import Query
from ._tails import Setting

# Ordering takes the batcher's time, so it is left out where it takes more seconds than this, and
# more than this share of the time that an answer takes.
_ORDERING, _ORDERING_SHARE = 0.002, 0.05


class Sender:
    """Forms groups and sends them. It sends nothing that would only wait at the pool.

    `filling` is the group that has room, `groups` all that are not over, `wake` when one that waits
    to be filled is due. `taken` are the queries that came out of their lanes since it was cleared.
    `setting`, which may be changed, is when a copy is sent, and what beyond the queries themselves.
    """

    def __init__(
        self,
        pool: AbstractPool,
        coder: Coder,
        lanes: Lanes,
        arranger: Arranger | None,
        *,
        policy: BatchingPolicy,
        hungry: Callable[[int], bool],
        foresight: Foresight,
        enough: int,
        refuse: Refuse,
        setting: Setting,
        answer_time: Callable[[], float],
        observe: Callable[[Any, float], Any],
        tell: Callable[[Group], None],
    ):
        """`hungry(queries)`: whether all answers to a group of so many are wanted, to learn from.

        `enough`: answers of a group that will do. `refuse`: those that are none.

        `answer_time()`: seconds that an answer takes, inf if not known. `tell(group)` is called,
        from any thread, when something happens to a group.
        """
        self._pool, self._coder, self._lanes, self._arranger = pool, coder, lanes, arranger
        self._policy, self._hungry, self._enough = policy, hungry, enough
        self._foresight, self._budget = foresight, Budget(policy.max_redundancy)
        self._answer_time, self._observe, self._tell = answer_time, observe, tell
        self.alone = Coder(Uncoded(1), (coder.kinds[0],))
        self._refuse, self._clock = refuse, pool.clock
        self.setting = setting
        self.filling: Group | None = None
        self.groups: set[Group] = set()
        self.taken: list[Query] = []
        self.wake = math.inf

    def dispatch(self, now: float, *, at_once: bool) -> list[Group]:
        """Sends what waits while workers are idle, then what is coded of full groups, if some are.

        `at_once`: groups do not wait to be filled. Gives the groups that it sent something of, but
        for those of one query alone.
        """
        sent: list[Group] = []
        self.wake = math.inf
        while self._pool.idle and (lane := self._lanes.next(held=self.wake < math.inf)):
            if lane is not self._lanes.coded:
                self._send_alone(self._cut(lane, now), now)
            elif self._coder.systematic:
                sent += self._send_own(now)
            else:
                sent += self._send_groups(now, at_once)
        groups = list(dict.fromkeys(sent))
        for group in groups:
            if group is not self.filling:
                self.complete(group, now)
        return groups

    def complete(self, group: Group, now: float) -> None:
        """No more cells come: what is coded goes out, unless it is of no use any more."""
        if group is self.filling:
            self.filling = None
        coder, queries = self._coder, len(group.cells)
        group.layout = coder.layout(queries)
        self._observe("group_fill", queries / coder.num_data)
        hungry = self._hungry(queries)
        # Redundancy for one query is not worth slowing down others.
        points = np.flatnonzero(~group.sent) if hungry else self._extras(group)
        if len(points) and (group.pending or hungry):
            begin = self._clock.now()
            coded = coder.encode(group.inputs(), points)
            end = self._clock.now()
            self._observe("encode_seconds", end - begin)
            if group.record is not None:
                group.record.add("encode", begin, end, queries=queries, points=len(points))
            self._send(group, points, coded, now)
        group.inputs_sent()

    def _extras(self, group: Group) -> Int[np.ndarray, " points"]:
        """What goes out beyond the queries themselves."""
        points = group.layout.extras[: self._room()]
        if self.setting.redundancy == "always" or not len(points):
            return points
        if self.setting.redundancy == "none":
            return points[:0]
        doubted = self._foresight.doubted(group)
        # Of copies, those of what is doubted; what mixes queries serves all of them.
        places = group.layout.place_of[points]
        wanted = points[np.isin(places, list(doubted)) | ((places < 0) & bool(doubted))]
        few = 0
        while few < len(wanted) and self._budget.affords():
            self._budget.spend()
            few += 1
        return wanted[:few]

    def _room(self) -> int:
        """Coded data points that may be sent: of a code that mixes queries, all."""
        most = self._coder.num_workers
        return int(min(self._pool.spare, most)) if self._coder.systematic else most

    def end(self, group: Group) -> None:
        """A group is over, whatever is still on its way."""
        if group is self.filling:
            self.filling = None
        group.closed = True
        self.groups.discard(group)
        if group.batch is not None:
            group.batch.forget()

    def _send_own(self, now: float) -> list[Group]:
        """Queries go out as they came, each to its own worker."""
        sent = []
        for cell in self._cells(self._lanes.coded, now):
            if self.filling is None:
                self.filling = self._new_group(self._coder, now)
            group = self.filling
            sent.append(group)
            own = self._coder.first[len(group.cells)]
            self._take(group, cell)
            assert cell.x is not None
            self._send(group, own, [cell.x] * len(own), now)
            if group.full:
                self.filling = None
        return sent

    def _send_groups(self, now: float, at_once: bool) -> list[Group]:
        """A group goes out when K queries wait, or fewer have waited for long enough."""
        num_data, lane = self._coder.num_data, self._lanes.coded
        number = len(lane)
        due = lane.since + self._policy.batch_wait_timeout_s
        if number < num_data and now < due and not at_once:
            self.wake = due
            return []
        rows = _power_of_two(min(max(number // num_data, 1), self._policy.max_batch_size))
        columns = min(number, num_data)
        queries = [self._pop(lane, now) for _ in range(rows * columns)]
        cells = self._deal(queries, [rows] * columns, 0)
        if columns == 1:
            self._send_alone(cells[0], now)  # all coded data points would be the query
            return []
        group = self._new_group(self._coder, now)
        for cell in cells:
            self._take(group, cell)
        return [group]

    def _send_alone(self, cell: Cell, now: float) -> None:
        """One batch at one worker, hedged: its answers are exact."""
        group = self._new_group(self.alone, now)
        self._take(group, cell)
        assert cell.x is not None
        self._send(group, np.arange(1), [cell.x], now)
        group.inputs_sent()

    def _new_group(self, coder: Coder, now: float) -> Group:
        group = Group(coder, now)
        group.batch = self._pool.open(
            coder.num_workers,
            needed=coder.num_data if coder.systematic else self._enough,
            copies=self._policy.copies if coder is self.alone else 1,
            on_change=lambda batch: self._tell(group),
            overdue=self.setting.overdue,
            refuse=self._refuse,
        )
        self.groups.add(group)
        return group

    def _take(self, group: Group, cell: Cell) -> None:
        group.take(cell, lambda: self._tell(group))

    def _send(
        self, group: Group, points: np.ndarray, values: Iterable[np.ndarray], now: float
    ) -> None:
        assert group.batch is not None
        group.sent_at[points] = now
        if group.record is not None:
            group.record.sent(points.tolist(), now)
        values = list(values)
        for value in values:
            self._observe("batch_size", len(value))
        kinds = [group.coder.kinds[point] for point in points]
        self._pool.send(group.batch, points.tolist(), values, kinds=kinds)

    def _cut(self, lane: Lane, now: float) -> Cell:
        """The next batch for one worker: those that a lane may have share it out."""
        size = self._size(len(lane), self._lanes.share(lane, self._pool.idle))
        return _cell([self._pop(lane, now) for _ in range(size)])

    def _cells(self, lane: Lane, now: float) -> list[Cell]:
        """The next batches for all workers that a lane may have: what goes into groups' places."""
        sizes: list[int] = []
        left, idle = len(lane), self._lanes.share(lane, self._pool.idle)
        while left and idle:
            sizes.append(self._size(left, idle))
            left, idle = left - sizes[-1], idle - 1
        queries = [self._pop(lane, now) for _ in range(sum(sizes))]
        return self._deal(queries, sizes, 0 if self.filling is None else len(self.filling.cells))

    def _size(self, waiting: int, idle: int) -> int:
        return _power_of_two(min(math.ceil(waiting / idle), self._policy.max_batch_size))

    def _deal(self, queries: list[Query], sizes: list[int], place: int) -> list[Cell]:
        """Cells of these sizes, which make up all queries, for a group's places from `place` on."""
        if self._arranger is None or self._arranger.seconds > self._most_ordering():
            rest = iter(queries)
            dealt = [list(itertools.islice(rest, size)) for size in sizes]
        else:
            begin = self._clock.now()
            dealt = self._arranger.deal(queries, sizes, place)
            self._observe("order_seconds", self._clock.now() - begin)
        return [_cell(each) for each in dealt]

    def _most_ordering(self) -> float:
        """Seconds; where it is not known how long answers take, they may be quick."""
        known = self._answer_time()
        return max(_ORDERING, _ORDERING_SHARE * known if known < math.inf else 0.0)

    def _pop(self, lane: Lane, now: float) -> Query:
        query = self._lanes.pop(lane)
        self.taken.append(query)
        if not query.reexecuted:
            self._budget.earn(1)
        if math.isinf(query.request.sent):
            query.request.sent = now
            self._observe("queue_seconds", now - query.request.arrived)
        return query


def _power_of_two(number: int) -> int:
    """The largest that is no larger than a positive number."""
    return 1 << (number.bit_length() - 1)


def _cell(queries: Sequence[Query]) -> Cell:
    x = [query.x for query in queries if query.x is not None]
    assert len(x) == len(queries), "queries that are over are taken out of the queue"
    return Cell(list(queries), x[0][None] if len(x) == 1 else np.stack(x))
