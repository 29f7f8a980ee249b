"""A stream of single queries before a pool of workers: one client for every code.

A coded data point whose encoder row is one-hot is a query as it came. It goes out the moment the
query arrives, and its answer is exact; the others go out when their group is full. A code without
such rows (BACC, NeRCC at Chebyshev points) must fill a group before it sends anything, replication
has no others. So one client serves uncoded, replicated, hedged, ParM's and coded systems alike.
"""

import collections
import dataclasses
import heapq
import itertools
import queue
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from nercc_jax import AbstractCode
from nercc_jax.pools import AbstractPool, Batch, Overdue

_WINDOW = 256  # answer times that the running median looks at
_LEAST = 20  # of them, before anything is given up


@dataclasses.dataclass(frozen=True)
class Rule:
    """When to decode the queries of a group whose own workers straggle.

    A coded data point is given up once it has been out for `patience` times the running median of
    answer times. Queries are decoded whose own coded data points are given up, or that have none,
    as soon as `enough` answers of the group are in, or everything else is given up and `least` are
    in. A group that is not full `fill` times the median after its first query is filled up with
    earlier queries, whose answers are known (None: it waits for more queries).
    """

    patience: float = 1.4
    enough: int = 1
    least: int = 1
    fill: float | None = None


@dataclasses.dataclass(frozen=True)
class System:
    """A way to serve a stream.

    `copies` and `overdue` are the pool's (hedging); `needed` answers are what a group cannot do
    without (all K data points' unless given); `models` are the pool's models by the code's
    `worker_models`; `whole` gives a group's predictions out together, when the last is known.
    """

    name: str
    code: AbstractCode
    rule: Rule = Rule()
    copies: int = 1
    overdue: Overdue | None = None
    needed: int | None = None
    models: tuple[int, ...] = (0,)
    whole: bool = False


class Outcomes:
    """What became of each query: latency from its scheduled arrival, label, exact or decoded."""

    def __init__(self, number: int):
        self.latency = np.full(number, np.nan)
        self.label = np.full(number, -1)
        self.decoded = np.zeros(number, bool)
        self.lateness = np.full(number, np.nan)  # of the client itself, against the schedule


@dataclasses.dataclass
class Costs:
    """Seconds that the client's own steps took, one entry each."""

    encode: list[float] = dataclasses.field(default_factory=list)
    dispatch: list[float] = dataclasses.field(default_factory=list)
    decode: list[float] = dataclasses.field(default_factory=list)


class Coder:
    """A code made ready: its matrix in rows that are queries and others, its decoder compiled."""

    def __init__(self, code: AbstractCode, models: Sequence[int], shape: tuple[int, ...], out: int):
        matrix = np.asarray(code.encoder_matrix())
        unit = np.eye(code.num_data)[np.argmax(matrix, axis=1)]
        one_hot = np.abs(matrix - unit).max(axis=1) < 1e-5  # a spline's rows are so to rounding
        self.num_data, self.num_workers = code.num_data, code.num_workers
        self.own = [np.flatnonzero(one_hot & (unit[:, k] == 1)) for k in range(code.num_data)]
        self.query_of = np.where(one_hot, np.argmax(matrix, axis=1), -1)
        self.others = np.flatnonzero(~one_hot)
        self.kinds = [models[kind] for kind in code.worker_models]
        self._matrix = matrix[self.others].astype(np.float32)
        self._shape = shape

        @jax.jit
        def decode(values, mask):
            decoded = code.try_decode(values, mask)
            return decoded.predictions, decoded.recovered

        self._decode = decode
        self.decode(np.zeros((self.num_workers, out), np.float32), np.ones(self.num_workers, bool))

    def encode(self, x: np.ndarray) -> np.ndarray:
        """The coded data points that are no queries, each a batch of one."""
        coded = self._matrix @ x.reshape(self.num_data, -1)
        return coded.reshape(len(coded), 1, *self._shape)

    def decode(self, values: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        predictions, recovered = self._decode(values, mask)
        return np.asarray(predictions), np.asarray(recovered)


class _Group:
    """K queries coded together, and what is known of them."""

    def __init__(self, coder: Coder, shape: tuple[int, ...], out: int, now: float):
        self.queries: list[int] = []
        self.x = np.zeros((coder.num_data, *shape), np.float32)
        self.values = np.zeros((coder.num_workers, out), np.float32)
        self.mask = np.zeros(coder.num_workers, bool)
        self.sent_at = np.full(coder.num_workers, np.nan)
        self.pending = np.zeros(coder.num_data, bool)
        self.held: list[tuple[int, np.ndarray, bool]] = []  # predictions to be given out together
        self.began = now
        self.size = 0  # places filled
        self.look_at = np.inf
        self.batch: Batch | None = None

    @property
    def open(self) -> bool:
        return self.size < len(self.x) or bool(self.pending.any())


class CodedStream:
    """The client. Everything runs in the thread that calls `run`; the pool only fills its inbox."""

    def __init__(
        self,
        pool: AbstractPool,
        system: System,
        images: np.ndarray,
        out: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`images` are (M, ...): query i is image i modulo M."""
        self._pool, self._system, self._images, self._out = pool, system, images, out
        self._clock = clock
        self._coder = Coder(system.code, system.models, images.shape[1:], out)
        self._inbox: queue.SimpleQueue[_Group] = queue.SimpleQueue()
        self._numbers = itertools.count()
        self._begin()

    def _begin(self) -> None:
        self._group: _Group | None = None
        self._looks: list[tuple[float, int, _Group]] = []
        self._times: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._median, self._seen = np.inf, 0
        self._known: collections.deque[tuple[np.ndarray, np.ndarray]] = collections.deque(maxlen=64)
        self._open: set[_Group] = set()
        self.costs = Costs()

    def run(self, arrivals: np.ndarray, first_image: int, deadline: float) -> Outcomes:
        """Serves queries at these seconds from now; gives up `deadline` seconds after the last."""
        self._begin()
        self._start, self._arrivals, self._first = self._clock(), arrivals, first_image
        self._outcomes = Outcomes(len(arrivals))
        self._left = len(arrivals)
        end = self._start + arrivals[-1] + deadline
        coming = 0
        while self._left and (now := self._clock()) < end:
            due = self._start + arrivals[coming] if coming < len(arrivals) else np.inf
            if due <= now:
                self._outcomes.lateness[coming] = now - due
                self._arrive(coming, now)
                coming += 1
                if coming == len(arrivals) and self._group is not None:
                    self._fill_up(self._group, self._clock())  # nothing more will come
                continue
            self._look_at_groups(now)
            look = self._looks[0][0] if self._looks else np.inf
            try:
                group = self._inbox.get(timeout=max(min(due, look, end) - self._clock(), 0))
            except queue.Empty:
                continue
            self._hear(group, self._clock())
        for group in list(self._open):
            self._close(group)
        return self._outcomes

    # Queries come.

    def _arrive(self, query: int, now: float) -> None:
        group = self._group
        if group is None:
            group = self._group = _Group(self._coder, self._images.shape[1:], self._out, now)
            group.batch = self._open_batch(group)
            self._open.add(group)
        place = group.size
        image = self._images[(self._first + query) % len(self._images)]
        group.queries.append(query)
        group.x[place], group.pending[place] = image, True
        group.size += 1
        own = self._coder.own[place]
        if len(own):
            self._send(group, own, [image[None]] * len(own), now)
        if group.size == self._coder.num_data:
            self._complete(group)
        self._plan(group, now)

    def _open_batch(self, group: _Group) -> Batch:
        system = self._system
        return self._pool.open(
            self._coder.num_workers,
            needed=system.needed or min(self._coder.num_data, self._coder.num_workers),
            copies=system.copies,
            overdue=system.overdue,
            on_change=lambda batch: self._inbox.put(group),
        )

    def _complete(self, group: _Group) -> None:
        """The group is full: its coded data points go out."""
        self._group = None
        others = self._coder.others
        if len(others):
            begin = self._clock()
            coded = self._coder.encode(group.x)
            self.costs.encode.append(self._clock() - begin)
            self._send(group, others, list(coded), self._clock())

    def _send(
        self, group: _Group, points: np.ndarray, values: list[np.ndarray], now: float
    ) -> None:
        assert group.batch is not None
        kinds = [self._coder.kinds[point] for point in points]
        group.sent_at[points] = now
        begin = self._clock()
        self._pool.send(group.batch, points.tolist(), values, kinds=kinds)
        self.costs.dispatch.append(self._clock() - begin)

    def _fill_up(self, group: _Group, now: float) -> None:
        """Earlier queries take the places that no query came for; their answers are known."""
        places = range(group.size, self._coder.num_data)
        known = list(self._known)[-len(places) :]
        for number, place in enumerate(places):
            # Without a past, the last query stands again, and its place stays without an answer.
            image, answer = known[number] if number < len(known) else (group.x[place - 1], None)
            group.x[place] = image
            for point in self._coder.own[place]:
                if answer is not None:
                    group.values[point], group.mask[point] = answer, True
        group.size = self._coder.num_data
        self._complete(group)
        self._decide(group, now)

    # Answers come, or do not.

    def _hear(self, group: _Group, now: float) -> None:
        assert group.batch is not None
        if not group.open:
            return
        for point in np.flatnonzero(group.batch.available & ~group.mask).tolist():
            value = group.batch.answer(point)
            assert value is not None
            group.values[point], group.mask[point] = value[0], True
            self._observe(now - group.sent_at[point])
            place = self._coder.query_of[point]
            if place >= 0 and group.pending[place]:
                self._known.append((group.x[place], value[0]))
                self._give(group, place, value[0], now, decoded=False)
        self._decide(group, now)

    def _observe(self, seconds: float) -> None:
        self._times.append(seconds)
        self._seen += 1
        if len(self._times) >= _LEAST and (self._seen % 16 == 0 or np.isinf(self._median)):
            self._median = float(np.median(self._times))

    def _look_at_groups(self, now: float) -> None:
        while self._looks and self._looks[0][0] <= now:
            due, _, group = heapq.heappop(self._looks)
            if due != group.look_at or group not in self._open:
                continue  # planned anew since, or over
            group.look_at = np.inf
            fill = self._system.rule.fill
            late = fill is not None and now >= group.began + fill * self._median
            if late and group is self._group:
                self._fill_up(group, now)
            else:
                self._decide(group, now)

    def _decide(self, group: _Group, now: float) -> None:
        """Decodes what the rule says, and ends a group that has nothing pending."""
        if group.pending.any() and group.size == self._coder.num_data:
            rule = self._system.rule
            out = ~group.mask & ~np.isnan(group.sent_at)
            given_up = out & (now - group.sent_at >= rule.patience * self._median)
            hopeless = group.pending & np.array(
                [all(given_up[point] for point in own) for own in self._coder.own]
            )
            answers = group.mask.sum()
            last = not (out & ~given_up).any()
            if hopeless.any() and answers >= rule.least and (answers >= rule.enough or last):
                self._decode(group, hopeless)
        if not group.open:
            self._close(group)
        else:
            self._plan(group, now)

    def _decode(self, group: _Group, wanted: np.ndarray) -> None:
        begin = self._clock()
        predictions, recovered = self._coder.decode(group.values, group.mask)
        now = self._clock()
        self.costs.decode.append(now - begin)
        for place in np.flatnonzero(wanted & recovered).tolist():
            self._give(group, place, predictions[place], now, decoded=True)

    def _give(
        self, group: _Group, place: int, value: np.ndarray, now: float, *, decoded: bool
    ) -> None:
        group.pending[place] = False
        group.held.append((group.queries[place], value, decoded))
        if self._system.whole and group.open:
            return
        for query, answer, approximate in group.held:
            self._outcomes.latency[query] = now - self._start - self._arrivals[query]
            self._outcomes.label[query] = int(np.argmax(answer))
            self._outcomes.decoded[query] = approximate
        self._left -= len(group.held)
        group.held.clear()

    def _plan(self, group: _Group, now: float) -> None:
        """When to look at the group next, should nothing happen."""
        rule = self._system.rule
        out = ~group.mask & ~np.isnan(group.sent_at)
        ends = (group.sent_at + rule.patience * self._median)[out] + 1e-4
        due = np.min(ends[ends > now], initial=np.inf)
        if group is self._group and rule.fill is not None:
            due = min(due, max(group.began + rule.fill * self._median, now) + 1e-4)
        if np.isfinite(due) and due != group.look_at:
            group.look_at = due
            heapq.heappush(self._looks, (due, next(self._numbers), group))

    def _close(self, group: _Group) -> None:
        assert group.batch is not None
        self._open.discard(group)
        if group is self._group:
            self._group = None
        group.batch.forget()


def poisson(rate: float, seconds: float, seed: Sequence[int]) -> np.ndarray:
    """Arrival times of a Poisson stream."""
    random = np.random.default_rng(seed)
    return np.cumsum(random.exponential(1 / rate, max(int(rate * seconds), 1)))


def drain(pool: AbstractPool, seconds: float) -> None:
    """Waits, at most so long, until no worker has anything in hand."""
    end = time.monotonic() + seconds
    while pool.report().busy and time.monotonic() < end:
        time.sleep(0.01)
