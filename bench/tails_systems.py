"""Systems that tails.py compares: schedulers with code, policy and surrogate, and balancers.

A balancer has no central queue: each query goes to one worker's own queue when it arrives. Three
rules say which worker. `LeastLoaded` with all workers to choose from is what a scheduler comes to
that sees everything; with two it is the power of two choices (Mitzenmacher, IEEE TPDS 2001).
`Prequal` is of Wydrowski, Kleinberg, Rumble and Archer, "Load is not what you should balance", NSDI
2024 (arXiv 2312.10172). The simulator's `Hedge` sends copies of late queries by the same rule, as
in Dean and Barroso, "The tail at scale", CACM 2013, twice at most; copies that still wait when the
first answer comes are cancelled (tied requests, ibid.). In favour of all, probes and cancellation
take no time. Times are not computed here: a balancer sends its calls to the same `SimulatedPool`
that the server's own scheduler runs on, so that both meet the same service times, racks and slow
queries.
"""

import abc
import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from report import RESULTS
from streams import Work

from nercc_jax import (
    AbstractCode,
    Berrut,
    ExactStragglers,
    NeRCC,
    Parity,
    Replication,
    Uncoded,
    load_code,
    save_code,
    tune,
)
from nercc_jax.pools import AbstractPool, Overdue
from nercc_jax.pools.times import AnswerTimes
from nercc_jax.serving import BatchingPolicy, Predictor, Reply
from nercc_jax.stragglers import Hedge
from nercc_jax.testing import SimulatedPool
from nercc_models import load_model, load_parity_model

THRESHOLD = 1.35
DEADLINE = 60.0
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

    def __init__(
        self,
        pool: AbstractPool,
        rule: AbstractRule,
        hedge: Hedge = NO_COPIES,
        quantile: float = 0.5,
    ):
        """Begin with empty queues; the hedge's limit is in multiples of this quantile of times."""
        assert isinstance(pool, SimulatedPool)
        self._pool, self._rule, self._hedge = pool, rule, hedge
        self._clock: Any = pool.clock
        self.workers = [Worker() for _ in range(pool.num_workers)]
        self._times = AnswerTimes(Overdue(quantile, hedge.limit, floor=0.0))

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
            others = {*range(len(self.workers))} - {number}
            self._pool.send(batch, [0], [query.x], avoid=others)

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


@dataclasses.dataclass(frozen=True)
class System:
    """A way to serve: `models` are the pool's for the code's `worker_models`."""

    name: str
    code: AbstractCode
    policy: BatchingPolicy
    predictor: Callable[[], Predictor] | None = None
    models: tuple[int, ...] = (0,)
    balancer: Callable[[AbstractPool], Balancer] | None = None  # instead of code and policy


# Rules that say which worker's queue a query joins.
RULES: dict[str, Callable[..., AbstractRule]] = {
    "least loaded": lambda: LeastLoaded(1000),
    "power of two": lambda: LeastLoaded(2),
    "Prequal": Prequal,
}
# What is tried: triggers in medians, probes a query, and quantiles above which a worker is hot.
TRIGGERS = (1.05, 1.1, 1.2, 1.35, 1.5, 2.0, 3.0, 5.0)
PROBES, Q_RIF = (1, 2, 3), (0.5, 0.75, 0.84, 0.9, 0.99)
# Calls a query that a policy which picks by the measured tail may spend.
MAX_CALLS = (1.1, 1.35)
# Queries of ParM's groups, for which parity models were trained; (N, K) of interleaved codes.
PARITIES = (2, 4)
INTERLEAVED = ((6, 4), (8, 4))
# Half a per cent of all labels where 5 % straggle, one where 15 % do.
WANTED = {"15 %": 0.065}


def but(policy: BatchingPolicy, **settings: Any) -> BatchingPolicy:
    """Return a policy with some settings replaced."""
    return BatchingPolicy(**dict(policy) | settings)


def systems(work: Work, law: str) -> tuple[System, ...]:
    """Return all systems that are compared on this work under a law, the simplest first."""
    wanted = None if work.wanted is None else WANTED.get(law, work.wanted)
    base = {"deadline_s": DEADLINE, "max_batch_size": 8}
    base["outputs"] = "logits" if work.tolerance is None else None  # of a function, by its limit
    hedged = BatchingPolicy(straggler_threshold=THRESHOLD, **base)
    three = but(hedged, copies=3)
    known = but(three, max_disagreement=wanted, tolerance=work.tolerance, redundancy="uncertain")
    known_once = but(known, redundancy="always")
    found = [
        System("no copies", Uncoded(1), but(hedged, copies=1)),
        # As published: after a quantile of all times, stragglers' own included.
        balanced("least loaded", {}, Hedge(1.0), "hedged, p95", 0.95),
        balanced("least loaded", {}, Hedge(1.0), "hedged, p90", 0.9),
        System(f"hedged, {THRESHOLD} x median", Uncoded(1), three),
        System("two copies", Replication(1, 2), three),
    ]
    if work.model == "lenet5-mnist":
        # A group is filled up within two service times.
        patient = but(hedged, batch_wait_timeout_s=2.0 * 0.055)
        for place, k in enumerate(PARITIES, start=1):
            found.append(System(f"ParM, k = {k}", Parity(k, k + 1), patient, models=(0, place)))
        found += [
            System(f"NeRCC ({n}, {k})", tuned_code(work, n, k), patient) for n, k in INTERLEAVED
        ]
        # Measured until 2026-12-01 with its published points, which mix all queries.
        found.append(System("BACC (12, 8)", Berrut(8, 12, points="interleaved"), patient))

    def knows() -> Predictor:
        return Predictor(work.student)

    if wanted is not None:
        # ParM's cheap backup: however likely it is wrong.
        any_label = but(known_once, max_disagreement=0.999)
        found.append(System("surrogate alone", Uncoded(1), any_label, knows))
    ours = [
        System("known, else hedged", Uncoded(1), known_once, knows),
        System("known, uncertain twice", Replication(1, 2), known, knows),
    ]
    for most in MAX_CALLS:
        picked = but(known_once, max_calls=most)
        ours.append(System(f"picked, {most:g} calls", Replication(1, 2), picked, knows))
    return (*found, *ours)


def rivals(picks: Mapping[str, Sequence[Any]]) -> tuple[System, ...]:
    """Return what answers exactly, with the parameters that were picked for a law (`tune_rivals`).

    The least loaded of all workers is also the power of as many choices as serve best.
    """
    hedging = BatchingPolicy(
        deadline_s=DEADLINE, max_batch_size=8, copies=3, straggler_threshold=THRESHOLD
    )
    found = [balanced("least loaded", picks, Hedge(1.2, 2), "two at once, 1.2 x median")]
    for most in MAX_CALLS:
        picked = but(hedging, max_calls=most)
        found.append(System(f"hedging picked, {most:g} calls", Uncoded(1), picked))
    for name in RULES:
        if name != "least loaded":  # about the same as "no copies"
            found.append(balanced(name, picks, NO_COPIES))
        for most in MAX_CALLS:
            hedged = hedged_name(name, most)
            found.append(balanced(name, picks, Hedge(*picks[hedged]), hedged))
    return tuple(found)


def hedged_name(rule: str, most: float) -> str:
    """Return the name of a rule that is hedged by a budget."""
    return f"{rule}, hedged, {most:g} calls"


def balanced(
    rule: str,
    picks: Mapping[str, Sequence[Any]],
    hedge: Hedge,
    name: str = "",
    quantile: float = 0.5,
) -> System:
    """Return a rule of `RULES` with these parameters, and copies after a multiple of a quantile."""

    def balancer(pool: AbstractPool) -> Balancer:
        return Balancer(pool, RULES[rule](*picks.get(rule, ())), hedge, quantile)

    return System(name or rule, Uncoded(1), BatchingPolicy(), balancer=balancer)


def tune_rivals(
    measure: Callable[[System], Mapping[str, float]], prequal: Sequence[Any] | None
) -> dict[str, Sequence[Any]]:
    """Pick the parameters of rivals, which have the least p99 and p99.9 in sum.

    Args:
        measure: Returns what a system makes of other traffic than it is judged by.
        prequal: Probes and Q_RIF, if they are picked already.
    """

    def tail(cell: Mapping[str, float]) -> float:
        return cell["p99_ms"] + cell["p999_ms"]

    def of_prequal(parameters: Sequence[Any]) -> float:
        return tail(measure(balanced("Prequal", {"Prequal": parameters}, NO_COPIES)))

    picks: dict[str, Sequence[Any]] = {
        "Prequal": prequal or min(itertools.product(PROBES, Q_RIF), key=of_prequal)
    }
    for rule in RULES:
        found: dict[tuple[float, int], Mapping[str, float]] = {}
        for at_once in (1, 2, 3):
            for threshold in reversed(TRIGGERS):
                hedge = Hedge(threshold, at_once)
                cell = found[threshold, at_once] = measure(balanced(rule, picks, hedge))
                if cell["calls"] > max(MAX_CALLS):
                    break  # an earlier trigger costs more
        for most in MAX_CALLS:
            allowed = [key for key, cell in found.items() if cell["calls"] <= most]
            picks[hedged_name(rule, most)] = min(
                allowed, key=lambda key: tail(found[key]), default=(NEVER, 1)
            )
    return picks


def parity_models(work: Work) -> list[Any]:
    """Return ParM's parity models."""
    return [load_parity_model(str(work.model), k, "logits") for k in PARITIES]


def tuned_code(work: Work, num_workers: int, num_data: int) -> NeRCC:
    """Return an interleaved code tuned for up to four stragglers, or its file.

    Queries go out as they came: tuning walks on log lambda_enc, which is 0 in the end.
    """
    path = RESULTS / "codes" / f"{work.model}-{num_workers}-{num_data}-interleaved.json"
    if path.exists():
        code = load_code(path)
        assert isinstance(code, NeRCC)
        return code
    start = NeRCC(num_data, num_workers, points="interleaved", lambda_dec=0.0)
    # Without stragglers it is exact already.
    most = min(4, num_workers - num_data)
    stragglers = {str(s): ExactStragglers(s) for s in range(1, most + 1)}
    model, x = load_model(str(work.model)), jnp.asarray(work.training())
    code = tune(model, start, x, stragglers, key=jax.random.key(0), points=True).code
    code = eqx.tree_at(lambda c: c.lambda_enc, code, jnp.zeros_like(code.lambda_enc))
    about = {"model": work.model, "outputs": "logits", "stragglers": list(stragglers)}
    save_code(path, code, about)
    return code
