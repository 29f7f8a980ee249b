"""Faults and delays on purpose: what makes a worker slow, wrong or dead, from a seed.

A fault acts inside the worker, in its thread or process, so that every pool meets it as it would
meet a real one: the worker is busy while it sleeps, and gone when it dies.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np

from ..stragglers import AbstractLatency, TraceLatency

FaultKind: TypeAlias = Literal["delay", "error", "nan", "hang", "death"]

# How many latencies a worker draws at once; after so many calls they come again.
_DRAWS = 4096


class InjectedError(RuntimeError):
    """The exception that an "error" fault raises."""


@dataclasses.dataclass(frozen=True)
class Episodes:
    """Times at which something is the case: exponential spells and pauses, from a seed.

    `lasting` and `every` are the mean seconds of a spell and from one spell's start to the next.
    Every process that has the same seed and origin (seconds since the epoch) sees the same spells.
    """

    every: float
    lasting: float
    seed: int = 0
    origin: float = dataclasses.field(default_factory=time.time)

    def __post_init__(self):
        if not 0 < self.lasting < self.every:
            raise ValueError(
                f"spells of {self.lasting} s every {self.every} s: they must last longer than 0 "
                "and end before the next begins"
            )

    def spells(self) -> Iterator[tuple[float, float]]:
        """Start and end of each spell, in seconds since the epoch, one after the other."""
        random = np.random.default_rng([self.seed, 0x5BE11])
        now = self.origin
        while True:
            start = now + random.exponential(self.every - self.lasting)
            now = start + random.exponential(self.lasting)
            yield start, now


@dataclasses.dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    - "delay": the call takes longer by a draw of `latency`, in seconds;
    - "error": it raises `InjectedError`;
    - "nan": it answers, with NaN in every place;
    - "hang": it never answers;
    - "death": the worker's thread or process ends at once, a process by SIGKILL.

    It strikes each call with `probability`, if the worker is one of `workers` (all unless given),
    if this is one of its `calls` (counted from 0 in each of the worker's lives; all unless given),
    and, with `episodes`, during their spells only: workers that share a fault with episodes are
    slow together, as a rack is.
    """

    kind: FaultKind
    probability: float = 1.0
    workers: Sequence[int] | None = None
    calls: Sequence[int] | None = None
    latency: AbstractLatency | None = None
    episodes: Episodes | None = None

    def __post_init__(self):
        if self.kind not in get_args(FaultKind):
            raise ValueError(f"a fault is one of {get_args(FaultKind)}, not {self.kind!r}")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be in [0, 1], not {self.probability}")
        if (self.kind == "delay") != (self.latency is not None):
            raise ValueError('a "delay" needs a latency law, and nothing else takes one')


@dataclasses.dataclass(frozen=True)
class Faults:
    """All that goes wrong at a pool's workers. The same seed gives each call the same faults."""

    faults: Sequence[Fault] = ()
    seed: int = 0

    @classmethod
    def on_trial(
        cls,
        *,
        service_delay: float = 0.0,
        straggler_rate: float = 0.0,
        straggler_delay: float = 1.0,
        death_rate: float = 0.0,
        seed: int = 0,
    ) -> "Faults":
        """What a command or server is tried with: calls that take longer, straggle, or kill.

        Every call takes `service_delay` seconds longer, the share `straggler_rate` of them another
        `straggler_delay` seconds, and in the share `death_rate` the worker dies.

        Raises: ValueError for a share outside [0, 1], or seconds that are negative or not finite.
        """
        always = 1.0 if service_delay else 0.0
        faults = [
            Fault("delay", share, latency=TraceLatency(jnp.array([seconds])))
            for share, seconds in ((always, service_delay), (straggler_rate, straggler_delay))
            if share
        ]
        if death_rate:
            faults.append(Fault("death", death_rate))
        return cls(faults, seed)

    def at(self, worker: int, life: int, time: Callable[[], float] = time.time) -> "WorkerFaults":
        """The faults of one worker in one of its lives (0 for the first), episodes by `time()`."""
        return WorkerFaults(self, worker, life, time)


class WorkerFaults:
    """What strikes the calls of one worker, one after the other."""

    def __init__(self, faults: Faults, worker: int, life: int, time: Callable[[], float]):
        mine = [
            (number, fault)
            for number, fault in enumerate(faults.faults)
            if fault.workers is None or worker in fault.workers
        ]
        self._faults = [fault for _, fault in mine]
        self._random = np.random.default_rng([faults.seed, worker, life])
        self._delays = [
            _draws(fault.latency, faults.seed, number, worker, life) for number, fault in mine
        ]
        self._spells = [
            _Spells(fault.episodes, time) if fault.episodes is not None else None
            for fault in self._faults
        ]
        self._call = 0

    def next(self) -> tuple[float, set[FaultKind]]:
        """Seconds by which the next call is delayed, and what else happens to it."""
        call, self._call = self._call, self._call + 1
        seconds, kinds = 0.0, set[FaultKind]()
        for fault, delays, spells in zip(self._faults, self._delays, self._spells, strict=True):
            # Drawn first, and always: what else is set must not shift the later draws.
            strikes = self._random.random() < fault.probability
            if fault.calls is not None and call not in fault.calls:
                continue
            if strikes and (spells is None or spells.now()):
                if delays is not None:
                    seconds += float(delays[call % _DRAWS])
                else:
                    kinds.add(fault.kind)
        return seconds, kinds


def _draws(latency: AbstractLatency | None, seed: int, *numbers: int) -> np.ndarray | None:
    if latency is None:
        return None
    key = jax.random.key(seed)
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return np.asarray(latency.sample(key, (_DRAWS,)))


class _Spells:
    """Whether a spell is on, asked at times that do not go back."""

    def __init__(self, episodes: Episodes, time: Callable[[], float]):
        self._time, self._coming = time, episodes.spells()
        self._start, self._end = next(self._coming)

    def now(self) -> bool:
        time_now = self._time()
        while self._end <= time_now:
            self._start, self._end = next(self._coming)
        return self._start <= time_now
