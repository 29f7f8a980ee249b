"""Dispatch: sends queries from the queue to idle workers, alone or in groups."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

from ..codes import Uncoded
from ..pools.times import AnswerTimes, power_of_two
from ..stragglers import picking
from ._approximate import Approximations
from .core._coder import Coder
from .core._group import Group
from .core._request import Query, repeat_rows
from .core._requests import OpenRequests
from .core._setup import Setup

_ODD = 100.0  # the factor of scales beyond which queries are not coded together


class Dispatcher:
    """The dispatcher, which forms groups and sends them to the pool as long as workers are idle.

    Attributes:
        filling: The group that has room for more queries; None without one.
        groups: All groups that are not closed.
    """

    def __init__(
        self,
        setup: Setup,
        requests: OpenRequests,
        approximations: Approximations,
        post: Callable[[Group], Any],
    ):
        """Create a dispatcher; `post` is called when an answer to a group may have arrived."""
        self._setup, self._requests, self._post = setup, requests, post
        self._approximations = approximations
        self._random = np.random.default_rng(0)
        self._alone = Coder(Uncoded(1), (setup.coder.kinds[0],))  # for queries sent again
        self._times: AnswerTimes | None = None  # the pool's, with the present overdue rule
        self.filling: Group | None = None
        self.groups: set[Group] = set()

    @property
    def answer_time(self) -> float:
        """The median seconds of an answer to a full batch; infinite if unknown."""
        size = self._setup.policy.max_batch_size
        return math.inf if self._times is None else self._times.median(size)

    def dispatch(self, now: float) -> list[Group]:
        """Send waiting queries while workers are idle, then the coded data points of full groups.

        Each batch of queries goes uncoded to a worker of its own. Returns the groups to which a
        batch was added.
        """
        setup, requests, coder = self._setup, self._requests, self._setup.coder
        sent: dict[Group, None] = {}
        while setup.pool.idle and requests.queue:
            sizes, left, idle, spare = [], len(requests.queue), setup.pool.idle, setup.pool.spare
            while left and idle:
                sizes.append(self._size(left, min(idle, spare - len(sizes))))
                left, idle = left - sizes[-1], idle - 1
            queries = requests.take(sum(sizes))
            for request in {query.request for query in queries}:
                if math.isinf(request.sent):
                    request.sent = now
                    setup.observe("queue_seconds", now - request.arrived)
            rest = iter(queries)
            for size in sizes:
                if self.filling is None:
                    self.filling = self._new_group(coder, now)
                group = self.filling
                sent[group] = None
                own, x = coder.first[len(group.cells)], group.add([*itertools.islice(rest, size)])
                self._send(group, own, [x] * len(own), now)
                if len(group.cells) == coder.num_data:
                    self.filling = None
        for group in sent:
            if group is not self.filling:
                self.complete(group, now)
        return [*sent]

    def copy(self, queries: Sequence[Query], workers: int, now: float) -> None:
        """Send queries again, each to `workers` workers that have not answered it.

        A query of which an answer is held back goes to one worker only. The queries wait at the
        pool for such workers, ahead of later ones.
        """
        left = list(queries)
        while left:
            avoid = left[0].candidates.keys()
            same = [query for query in left if query.candidates.keys() == avoid]
            idle = min(self._setup.pool.idle, self._setup.pool.spare)
            same = same[: self._size(len(same), idle)]
            left = [query for query in left if query not in same]
            copies = ("alone", 1) if avoid else ("copy", workers)
            group = self._new_group(self._alone, now, *copies)
            self._send(group, np.arange(1), [group.add(same)], now, avoid)
            group.cells[0].x = None

    def complete(self, group: Group, now: float) -> None:
        """Close a group to further queries, and send its coded data points if they are useful."""
        if group is self.filling:
            self.filling = None
        coder, observe, clock = self._setup.coder, self._setup.observe, self._setup.clock
        group.layout = coder.layout(len(group.cells))
        observe("group_fill", len(group.cells) / coder.num_data)
        rows, cells = group.rows, [cell.x for cell in group.cells if cell.x is not None]
        if len(cells) > 1:  # in a sum with much larger queries, rounding loses the others
            flat = (x.reshape(len(x), -1) for x in cells)
            scales = [np.maximum(each.max(axis=1), -each.min(axis=1)) for each in flat]
            scale = np.stack([repeat_rows(each, rows) for each in scales], axis=1)
            group.spoiled = bool((scale.max(axis=1) > _ODD * scale.min(axis=1)).any())
        # Redundancy is not worth slowing down other queries, so `_extras` uses spare workers only.
        if not group.spoiled and len(points := self._extras(group)):
            begin = clock.now()
            x = np.stack([repeat_rows(x, rows) for x in cells], axis=1)
            coded = coder.encode(x, points)
            observe("encode_seconds", clock.now() - begin)
            self._send(group, points, coded, now)
        for cell in group.cells:  # free the data, which may be large: nothing more is encoded
            cell.x = None

    def close(self, group: Group) -> None:
        """Forget a group, with its in-flight tasks."""
        if group is self.filling:
            self.filling = None
        self.groups.discard(group)
        group.batch.forget()

    def _extras(self, group: Group) -> Int[np.ndarray, " points"]:
        """Return the redundant coded data points to send, as many as there are spare workers."""
        pool, points = self._setup.pool, group.layout.extras
        waiting = [each for each, query in group.open_queries() if not query.request.exact_only]
        if not waiting or not len(points):
            return points[:0]
        most = int(min(pool.spare, len(points)))
        redundancy = self._approximations.setting.redundancy
        if redundancy != "uncertain" or not most:
            return points[: most * (redundancy == "always")]
        self._approximations.predict(group, waiting)
        known = ((place, group.query(place).approximate.get("predicted")) for place in waiting)
        doubted = {cell for (cell, _), each in known if each is not None and not each.within}
        if doubted:
            doubted.add(-1)  # a point that mixes queries serves all of them
        return points[np.isin(group.layout.place_of[points], [*doubted])][:most]

    def _new_group(
        self,
        coder: Coder,
        now: float,
        kind: Literal["coded", "alone", "copy"] = "coded",
        at_once: int = 1,
    ) -> Group:
        setup = self._setup
        group = Group(coder, kind, now, trial=self._random.random() < picking.PICKING.tried)
        group.batch = setup.pool.open(
            coder.num_workers,
            needed=coder.num_data,
            copies=setup.policy.copies if group.alone else 1,
            at_once=at_once,
            on_change=lambda _: self._post(group),
            overdue=self._approximations.setting.overdue,
            refuse=setup.refuse,
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
            self._setup.observe("batch_size", len(value))
        kinds = [group.coder.kinds[point] for point in points]
        self._setup.pool.send(group.batch, points.tolist(), values, kinds=kinds, avoid=avoid)

    def _size(self, waiting: int, workers: int | float) -> int:
        """Return the size of a batch, a power of two, so that spare workers share the queries."""
        share = math.ceil(waiting / max(min(workers, self._setup.pool.spare), 1))
        return power_of_two(min(share, self._setup.policy.max_batch_size))
