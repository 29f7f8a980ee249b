"""Fault injection: makes workers slow, wrong or dead on purpose, from a seed.

A fault acts inside the worker, in its thread or process, so that every pool meets it as it would
meet a real one: the worker is busy while it sleeps, and gone when it dies.
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

# How many latencies a worker draws at once; after so many calls they come again.
_DRAWS = 4096
# The latest scores of a worker's rows that say which scores are large, and the least number.
_SCORES, _FEWEST = 1024, 20


class InjectedError(RuntimeError):
    """The exception that an "error" fault raises."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """One kind of fault, and which calls it strikes.

    Args:
        kind: "delay": the call takes longer by a draw of `latency`; "error": it raises
            `InjectedError`; "nan": it answers with NaN in every place; "hang": it never answers;
            "death": the worker's thread or process ends at once, a process by SIGKILL; "swap": its
            answer looks right and is wrong, with the call's rows in another order, or for a single
            row the previous call's last row.
        probability: With which it strikes a call.
        workers: Which workers it strikes (default: all).
        calls: Which of a worker's calls, counted from 0 in each of its lives (default: all).
        latency: The law of a "delay", in seconds, the same for all calls that it strikes; or a
            function that maps a call's batch to its delay.
        when: Only at times, in seconds since the epoch, of which this is true. Workers that share
            such a fault are slow together, as a rack is.
        score: Only calls with a row whose score is `least_score` or more. It maps a batch to one
            score a row, and is called in the worker.
        least_score: The least score that is struck.
        hardest: Instead, the share of rows with the largest scores that are struck, by those that
            the worker has seen: none of its first rows.

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
    """All faults of a pool's workers. The same seed gives each call the same faults.

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
        """Return faults by their rates: calls that take longer, straggle, or kill their worker.

        Args:
            service_delay: Seconds that every call takes longer.
            straggler_rate: Share of calls that straggle.
            straggler_delay: Seconds that a straggling call takes longer.
            straggler_score: Maps a batch to one score a row. Then calls do not straggle at random,
                but those with the largest scores.
            death_rate: Share of calls in which the worker dies.
            wrong_workers: The workers that answer wrongly: with rows in another order ("swap").
            wrong_rate: Share of these workers' calls that are answered wrongly.
            seed: Of the random numbers.

        Raises:
            ValueError: If a share is outside [0, 1], seconds are negative or not finite, or wrong
                workers are no whole numbers.
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
        """Return the faults of one worker in one life (0: the first), by the clock `time`."""
        return WorkerFaults(self, worker, life, time)


class WorkerFaults:
    """The faults of one worker's calls, one call after the other."""

    def __init__(self, faults: Faults, worker: int, life: int, time: Callable[[], float]):
        self._random = np.random.default_rng([faults.seed, worker, life])
        # For the order of swapped rows, so that these shift no other draws.
        self.swap_random = np.random.default_rng([faults.seed, worker, life, 0xBAD])
        self._call, self._time = 0, time
        numbers = enumerate(faults.faults)
        self._mine = {n: f for n, f in numbers if f.workers is None or worker in f.workers}
        # Of some faults: their delays, and the latest scores of rows.
        self._delays: dict[int, np.ndarray] = {}
        self._seen: dict[int, collections.deque[float]] = {}
        for number, fault in self._mine.items():
            if isinstance(fault.latency, AbstractLatency):
                key = jax.random.key(faults.seed)
                key = functools.reduce(jax.random.fold_in, (number, worker, life), key)
                self._delays[number] = np.asarray(fault.latency.sample(key, (_DRAWS,)))
            self._seen[number] = collections.deque(maxlen=_SCORES)

    def strike(self, batch: PyTree | None = None) -> StruckCall:
        """Return the faults of the next call; faults may strike rows of the batch by a score."""
        call, self._call = self._call, self._call + 1
        seconds, kinds = 0.0, set[FaultKind]()
        for number, fault in self._mine.items():
            # Drawn first, and always: what else is set must not shift the later draws.
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
