"""Measuring: calls timed in turn, quantiles, bootstrap, compilations, and CPU time."""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

_Each = TypeVar("_Each")


@dataclasses.dataclass(frozen=True)
class Contender:
    """Something to time: `call(*prepare())`, where only the call is on the clock.

    `call` must come back with its result computed. `prepare` makes arguments that are ready.
    """

    call: Callable[..., Any]
    prepare: Callable[[], tuple[Any, ...]] = tuple


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of repeated calls, in the order in which they ran."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    def quantile(self, share: float) -> float:
        return float(np.quantile(self.seconds, share))

    def ratio(self, other: "Timing") -> float:
        """Return the median over repeats of self's time over other's in the same repeat."""
        return float(np.median(np.divide(self.seconds, other.seconds)))

    def summary(self) -> dict[str, float | int]:
        ends = {"p10_s": self.quantile(0.1), "p90_s": self.quantile(0.9)}
        return {"median_s": self.median, **ends, "repeats": len(self.seconds)}


def clock(contender: Contender) -> float:
    """Return the seconds of one call on fresh arguments."""
    arguments = contender.prepare()
    start = time.perf_counter()
    result = contender.call(*arguments)
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def interleaved(contenders: Mapping[str, Contender], repeats: int) -> dict[str, Timing]:
    """Time contenders in turn, A B C then C B A, so that a busy machine's drift hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats):
        for name in list(contenders)[:: 1 if repeat % 2 == 0 else -1]:
            seconds[name].append(clock(contenders[name]))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def warmed(contenders: Mapping[str, Contender]) -> dict[str, Contender]:
    """Return the contenders with an untimed call before each timed one.

    Other calls have emptied the caches and put threads to sleep, which costs a call of 0.1 ms as
    much again.
    """

    def prepare(contender: Contender) -> tuple[Any, ...]:
        contender.call(*contender.prepare())
        return contender.prepare()

    return {
        name: Contender(each.call, lambda each=each: prepare(each))
        for name, each in contenders.items()
    }


def affordable(contenders: Mapping[str, Contender], seconds: float, most: int) -> int:
    """Return how many repeats of all contenders fit into these seconds; from 5 to `most`."""
    once = sum(map(clock, contenders.values()))
    return max(5, min(most, int(seconds / once)))


def in_turn(each: Sequence[_Each], turn: int) -> list[_Each]:
    """Return the order of some servers in a turn: another one is first each time."""
    first = turn % len(each)
    return [*each[first:], *each[:first]]


class CompileCounter:
    """Counts XLA compilations and their seconds (tracing and lowering included), in this process.

    JAX's monitoring has no public way to take one listener back: make one and keep it.
    """

    def __init__(self) -> None:
        self.compilations = 0
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            self.seconds += duration_secs
        self.compilations += event == "/jax/core/compile/backend_compile_duration"


def cpu_seconds(process: int) -> float:
    """Return the seconds of CPU time that a process has taken."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def block_bootstrap(
    values: np.ndarray,
    numbers: Callable[[np.ndarray], np.ndarray],
    *,
    block: int = 100,
    rounds: int = 1000,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return some numbers of all values, and their 95 % intervals' ends.

    Values are in the order in which they came. Neighbours in a stream depend on each other, so
    whole blocks of them are drawn.
    """
    blocks = [values[start : start + block] for start in range(0, len(values), block)]
    random = np.random.default_rng(0)
    again = [
        numbers(np.concatenate([blocks[i] for i in random.integers(len(blocks), size=len(blocks))]))
        for _ in range(rounds)
    ]
    low, high = np.quantile(again, (0.025, 0.975), axis=0)
    return numbers(values), low, high
