"""Fault injection: makes workers slow, wrong or dead on purpose, reproducibly from a seed.

A fault acts inside the worker's thread or process, so every pool experiences it like a real fault:
the worker is busy while it sleeps, and gone when it dies.
"""

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import numpy as np
from jaxtyping import PyTree

from ..stragglers import AbstractLatency, TraceLatency
from ..stragglers.draws import draws_alike

FaultKind: TypeAlias = Literal["delay", "error", "nan", "hang", "death", "swap"]

# How many latencies a worker draws at once; after that many calls they repeat.
_DRAWS = 4096
# A worker's latest scores whose quantile decides which rows are hardest: most, and fewest, of them.
_SCORES, _FEWEST = 1024, 20


class InjectedError(RuntimeError):
    """The exception that an "error" fault raises."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """One kind of fault, and the calls that it affects.

    Args:
        kind: "delay": the call takes longer by a draw of `latency`; "error": it raises
            `InjectedError`; "nan": its answer is all NaN; "hang": it never answers; "death": the
            worker's thread or process ends at once, a process by SIGKILL; "swap": its answer looks
            right and is wrong, with the call's rows in another order, or, for a single row, the
            last row of the previous answer.
        probability: The probability with which it affects a call.
        workers: The workers that it affects (default: all).
        calls: The numbers of the calls that it affects, counted from 0 in each life of a worker
            (default: all).
        latency: The law of a "delay", in seconds, the same for all affected calls; or a function
            that maps a call's batch to its delay.
        when: Restricts the fault to times, in seconds since the epoch, for which this returns True.
            Workers that share such a fault are slow together, like those of a rack.
        score: Restricts the fault to calls with a row whose score is `least_score` or more. It maps
            a batch to one score a row, and is called in the worker.
        least_score: The least score that is affected.
        hardest: Replaces `least_score`: the share of rows that are affected, those with the largest
            scores among the worker's latest 1,024. None are before it has seen 20 rows.

    Raises:
        ValueError: If an argument does not fit.
    """

    kind: FaultKind
    probability: float = 1.0
    workers: Sequence[int] | None = None
    calls: Sequence[int] | None = None
    latency: AbstractLatency | Callable[[Any], float] | None = None
    when: Callable[[float], bool] | None = None
    score: Callable[[Any], Any] | None = None
    least_score: float = 0.0
    hardest: float | None = None

    def __post_init__(self):
        if self.kind not in get_args(FaultKind):
            raise ValueError(f"a fault is one of {get_args(FaultKind)}, not {self.kind!r}")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be in [0, 1], not {self.probability}")
        some = () if self.workers is None else self.workers
        if not all(isinstance(w, int | np.integer) and not isinstance(w, bool) for w in some):
            raise ValueError(f"workers are whole numbers, [1, 2], not {self.workers}")
        if (self.kind == "delay") != (self.latency is not None):
            raise ValueError('a "delay" needs a latency law, and nothing else takes one')
        if isinstance(self.latency, AbstractLatency) and not draws_alike(self.latency):
            raise ValueError(
                f"the delays of a Fault have one law, and draws of {type(self.latency).__name__} "
                "depend on their place, or are not of every shape. If it differs between workers, "
                'give each its own, Fault("delay", workers=[0], latency=...)'
            )


class StruckCall(NamedTuple):
    """A call's delay in seconds, and the kinds of its other faults."""

    seconds: float
    kinds: set[FaultKind]


@dataclasses.dataclass(frozen=True)
class Faults:
    """All faults of a pool's workers. With the same seed, each call has the same faults.

    Example:
        >>> faults = Faults([Fault("error", probability=0.5)], seed=3)
        >>> injected = faults.at(worker=0, life=0)
        >>> [sorted(injected.strike().kinds) for _ in range(4)]
        [['error'], ['error'], [], []]
    """

    faults: Sequence[Fault] = ()
    seed: int = 0

    @classmethod
    def from_rates(
        cls,
        *,
        service_delay: float = 0.0,
        straggler_rate: float = 0.0,
        straggler_delay: float = 1.0,
        straggler_score: Callable[[Any], Any] | None = None,
        death_rate: float = 0.0,
        wrong_workers: Sequence[int] = (),
        wrong_rate: float = 1.0,
        seed: int = 0,
    ) -> "Faults":
        """Return faults described by rates, such as a share of calls that straggle.

        Args:
            service_delay: Seconds by which every call takes longer.
            straggler_rate: The share of calls that straggle.
            straggler_delay: Seconds by which a straggling call takes longer.
            straggler_score: Maps a batch to one score a row. If given, calls with the largest
                scores straggle, instead of random ones.
            death_rate: The share of calls in which the worker dies.
            wrong_workers: The workers that answer wrongly: with rows in another order ("swap").
            wrong_rate: The share of these workers' calls that are answered wrongly.
            seed: The seed of the random numbers.

        Raises:
            ValueError: If a share is outside [0, 1], seconds are negative or not finite, or
                `wrong_workers` are not integers.
        """
        faults = []
        if service_delay:
            faults.append(Fault("delay", latency=TraceLatency([service_delay])))
        if straggler_rate:
            delay, score = TraceLatency([straggler_delay]), straggler_score
            by_score: Any = {} if score is None else {"score": score, "hardest": straggler_rate}
            probability = straggler_rate if score is None else 1.0
            faults.append(Fault("delay", probability, latency=delay, **by_score))
        if death_rate:
            faults.append(Fault("death", death_rate))
        if wrong_workers:
            faults.append(Fault("swap", wrong_rate, workers=tuple(wrong_workers)))
        return cls(faults, seed)

    def at(self, worker: int, life: int, time: Callable[[], float] = time.time) -> "WorkerFaults":
        """Return the faults of a worker in one life (0: the first), with the clock `time`."""
        return WorkerFaults(self, worker, life, time)


class WorkerFaults:
    """The faults of one worker's calls, in order."""

    def __init__(self, faults: Faults, worker: int, life: int, time: Callable[[], float]):
        self._random = np.random.default_rng([faults.seed, worker, life])
        # A generator of its own for the order of swapped rows, which shifts no other draws.
        self.swap_random = np.random.default_rng([faults.seed, worker, life, 0xBAD])
        self._call, self._time = 0, time
        numbers = enumerate(faults.faults)
        self._mine = {n: f for n, f in numbers if f.workers is None or worker in f.workers}
        # By fault: the delays, and the latest scores of rows.
        self._delays: dict[int, np.ndarray] = {}
        self._seen: dict[int, collections.deque[float]] = {}
        for number, fault in self._mine.items():
            if isinstance(fault.latency, AbstractLatency):
                key = jax.random.key(faults.seed)
                key = functools.reduce(jax.random.fold_in, (number, worker, life), key)
                self._delays[number] = np.asarray(fault.latency.sample(key, (_DRAWS,)))
            self._seen[number] = collections.deque(maxlen=_SCORES)

    def strike(self, batch: PyTree | None = None) -> StruckCall:
        """Return the faults of the next call; scores and some delays depend on its batch."""
        call, self._call = self._call, self._call + 1
        seconds, kinds = 0.0, set[FaultKind]()
        for number, fault in self._mine.items():
            # Drawn first, and always, so that other settings do not shift later draws.
            drawn = self._random.random() < fault.probability
            if fault.score is not None:
                if batch is None:
                    continue
                scores, least = np.ravel(np.asarray(fault.score(batch), float)), fault.least_score
                if fault.hardest is not None:
                    seen = self._seen[number]
                    seen.extend(scores.tolist())
                    if len(seen) < _FEWEST:
                        continue
                    least = np.nextafter(np.quantile(seen, 1 - fault.hardest), np.inf)
                drawn &= not np.max(scores) < least
            drawn &= fault.calls is None or call in fault.calls
            if not drawn or not (fault.when is None or fault.when(self._time())):
                continue
            if number in self._delays:
                seconds += float(self._delays[number][call % _DRAWS])
            elif callable(fault.latency):
                seconds += 0.0 if batch is None else float(fault.latency(batch))
            else:
                kinds.add(fault.kind)
        return StruckCall(seconds, kinds)
