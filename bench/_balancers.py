"""Rivals of a central queue: each query goes to one worker's own queue when it arrives.

Three rules say which worker. `LeastLoaded` with all workers to choose from is what a scheduler
comes to that sees everything; with two it is the power of two choices (Mitzenmacher, IEEE TPDS
2001). `Prequal` is of Wydrowski, Kleinberg, Rumble and Archer, "Load is not what you should
balance", NSDI 2024 (arXiv 2312.10172). The simulator's `Hedge` sends copies of late queries by the
same rule, as in Dean and Barroso, "The tail at scale", CACM 2013, twice at most; copies that still
wait when the first answer comes are cancelled (tied requests, ibid.). In favour of all, probes and
cancellation take no time.

Times are not computed here: a balancer sends its calls to the same `SimulatedPool` that the
server's own scheduler runs on, so that both meet the same service times, racks and slow queries.
"""

import abc
import collections
import concurrent.futures
import dataclasses
import functools
import math
import statistics
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from nercc_jax.pools import AbstractPool, Overdue
from nercc_jax.pools.times import AnswerTimes
from nercc_jax.serving import Reply
from nercc_jax.stragglers.simulate import Hedge
from nercc_jax.testing import SimulatedPool

NEVER = 1e9  # medians
NO_COPIES = Hedge(NEVER)
_SAMPLES = 16  # latencies that a worker remembers
_RECENT = 5.0  # seconds for which it does


@dataclasses.dataclass(eq=False)
class _Query:
    x: Any
    arrived: float
    future: concurrent.futures.Future[Reply] = dataclasses.field(
        default_factory=concurrent.futures.Future
    )
    # By worker, when it was placed there, and how many others it met.
    workers: dict[int, tuple[float, int]] = dataclasses.field(default_factory=dict)


class Worker:
    """A worker's queue, first in, first out, and the latencies that it remembers."""

    def __init__(self):
        self.queue: collections.deque[_Query] = collections.deque()
        self.running: _Query | None = None
        self._latencies: collections.deque[tuple[float, int, float]] = collections.deque(
            maxlen=_SAMPLES
        )

    @property
    def in_flight(self) -> int:
        """The queries that it computes or that wait for it."""
        return len(self.queue) + (self.running is not None)

    def remember(self, now: float, in_flight: int, latency: float) -> None:
        """Note the latency of a query that met so many others."""
        self._latencies.append((now, in_flight, latency))

    def latency(self, now: float) -> float:
        """Return the median of recent latencies at the nearest number in flight; 0 if none.

        It is scaled to the number in flight now: a worker here computes one query after the other.
        """
        recent = [each for each in self._latencies if now - each[0] <= _RECENT]
        if not recent:
            return 0.0
        nearest = min(abs(met - self.in_flight) for _, met, _ in recent)
        return statistics.median(
            seconds * (self.in_flight + 1) / (met + 1)
            for _, met, seconds in recent
            if abs(met - self.in_flight) == nearest
        )


class AbstractRule(abc.ABC):
    """A choice of the worker whose queue a query joins."""

    @abc.abstractmethod
    def pick(self, workers: Sequence[Worker], barred: Collection[int], now: float) -> int:
        """Return a worker that is not barred."""


class LeastLoaded(AbstractRule):
    """The least loaded of `choices` random workers; of equals, the first drawn."""

    def __init__(self, choices: int, seed: int = 0):
        self._choices, self._random = choices, np.random.default_rng(seed)

    def pick(self, workers: Sequence[Worker], barred: Collection[int], now: float) -> int:
        drawn = _drawn(self._random, len(workers), barred)[: self._choices]
        return min(drawn, key=lambda worker: workers[worker].in_flight)


@dataclasses.dataclass
class _Probe:
    worker: int
    in_flight: int
    latency: float
    at: float
    uses: int


class Prequal(AbstractRule):
    """Prequal: the lowest latency among probed workers that are not hot, else the least loaded.

    A worker is hot if its requests in flight are above a quantile of those that were probed lately.
    A pool holds the results of probes. One is used up to
    `2 / ((1 - size / workers) probes - removals)` times, as published, counts as one more request
    in flight each time, and goes after a second. For every three probes one more result goes, the
    oldest and the worst in turn.

    Args:
        probes: Random workers that are probed for each query.
        quantile: Q_RIF, above which a worker is hot.
        size: Of the pool; 16 as published, before many more workers than here.
        seed: Of the random choices.
    """

    def __init__(self, probes: int = 3, quantile: float = 0.84, size: int = 14, seed: int = 0):
        self._probes, self._quantile, self._size = probes, quantile, size
        self._random = np.random.default_rng(seed)
        self._pool: dict[int, _Probe] = {}
        self._seen: collections.deque[int] = collections.deque(maxlen=128)
        self._removals, self._oldest = 0.0, True

    def pick(self, workers: Sequence[Worker], barred: Collection[int], now: float) -> int:
        self._probe(workers, now)
        allowed = [each for each in self._pool.values() if each.worker not in barred]
        if len(allowed) < 2:
            return _drawn(self._random, len(workers), barred)[0]
        limit = sorted(self._seen)[int(self._quantile * (len(self._seen) - 1))]
        chosen = min(allowed, key=functools.partial(self._rank, limit=limit))
        chosen.latency *= (chosen.in_flight + 2) / (chosen.in_flight + 1)  # as `Worker.latency`
        chosen.in_flight, chosen.uses = chosen.in_flight + 1, chosen.uses - 1
        if chosen.uses <= 0:
            del self._pool[chosen.worker]
        self._removals += self._probes / 3
        while self._removals >= 1:
            self._removals -= 1
            self._remove(limit)
        return chosen.worker

    @staticmethod
    def _rank(probe: _Probe, limit: int) -> tuple[bool, float]:
        hot = probe.in_flight > limit
        return hot, probe.in_flight if hot else probe.latency

    def _probe(self, workers: Sequence[Worker], now: float) -> None:
        more = (1 - self._size / len(workers)) * self._probes - self._probes / 3
        uses = max(int(2 / more), 1) if more > 0 else 1
        for number in _drawn(self._random, len(workers), ())[: self._probes]:
            worker = workers[number]
            self._pool.pop(number, None)  # the latest result goes to the end
            in_flight, latency = worker.in_flight, worker.latency(now)
            self._pool[number] = _Probe(number, in_flight, latency, now, uses)
            self._seen.append(in_flight)
        for each in list(self._pool.values()):
            if now - each.at > 1.0 or len(self._pool) > self._size:
                del self._pool[each.worker]

    def _remove(self, limit: int) -> None:
        if len(self._pool) > 2:
            worst = max(self._pool.values(), key=functools.partial(self._rank, limit=limit))
            del self._pool[next(iter(self._pool)) if self._oldest else worst.worker]
        self._oldest = not self._oldest


class Balancer:
    """Serves single queries, as `CodedBatcher` does, by queues at the workers of a pool."""

    def __init__(self, pool: AbstractPool, rule: AbstractRule, hedge: Hedge = NO_COPIES):
        assert isinstance(pool, SimulatedPool)
        self._pool, self._rule, self._hedge = pool, rule, hedge
        self._clock: Any = pool.clock
        self.workers = [Worker() for _ in range(pool.num_workers)]
        self._times = AnswerTimes(Overdue(factor=hedge.limit, floor=0.0))

    def __enter__(self) -> "Balancer":
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: all that is open belongs to the pool."""

    def submit(self, x: np.ndarray) -> concurrent.futures.Future[Reply]:
        """Put a query into a worker's queue, and return a future of its answer."""
        query = _Query(x, self._clock.now())
        self._place(query, 1)
        return query.future

    def _place(self, query: _Query, copies: int) -> None:
        now = self._clock.now()
        for _ in range(min(copies, len(self.workers) - len(query.workers))):
            number = self._rule.pick(self.workers, query.workers, now)
            query.workers[number] = now, self.workers[number].in_flight
            self.workers[number].queue.append(query)
            self._advance(number)
        left = self._hedge.at_once * 2 - (len(query.workers) - 1)
        limit = self._times.limit(1)
        if left > 0 and limit < math.inf:
            self._clock.at(now + limit, lambda: self._late(query))

    def _late(self, query: _Query) -> None:
        if not query.future.done():
            self._place(query, self._hedge.at_once)

    def _advance(self, number: int) -> None:
        """Have a worker begin the next query of its queue, if it is idle."""
        worker = self.workers[number]
        if worker.running is None and worker.queue:
            query = worker.running = worker.queue.popleft()
            batch = self._pool.open(
                1,
                copies=1,
                overdue=Overdue(factor=NEVER),
                on_change=lambda batch: self._end(number, batch),
            )
            self._pool.send(batch, [0], [query.x], only=number)

    def _end(self, number: int, batch: Any) -> None:
        worker, now = self.workers[number], self._clock.now()
        query, value = worker.running, batch.answer(0)
        batch.forget()
        assert query is not None
        worker.running = None
        placed, met = query.workers[number]
        worker.remember(now, met, now - placed)
        if not query.future.done():
            self._times.add(1, now - query.arrived)
            for other in query.workers:
                if query in self.workers[other].queue:
                    self.workers[other].queue.remove(query)
            query.future.set_result(_reply(value, len(query.workers), now - query.arrived))
        self._advance(number)


def _reply(value: np.ndarray, asked: int, seconds: float) -> Reply:
    """Return the reply of a model's own answer."""
    no, zero = np.zeros(1, bool), np.zeros(1)
    number = np.array([asked])
    return Reply(value, ~no, no, no, no, number, number * 0 + 1, zero, zero, 0.0, seconds)


def _drawn(random: np.random.Generator, number: int, barred: Collection[int]) -> list[int]:
    """Return all workers that are not barred, in a random order."""
    return [each for each in random.permutation(number).tolist() if each not in barred]
