"""Tools of all benchmarks: interleaved timing, a count of compilations, the machine, JSON."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

_COMPILE_EVENTS = "/jax/core/compile/"
_BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"


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
        return {
            "median_s": self.median,
            "p10_s": self.quantile(0.1),
            "p90_s": self.quantile(0.9),
            "repeats": len(self.seconds),
        }


def interleaved(contenders: Mapping[str, Contender], repeats: int) -> dict[str, Timing]:
    """Time contenders in turn, A B C then C B A, so that a busy machine's drift hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats):
        names = list(contenders)
        for name in names if repeat % 2 == 0 else names[::-1]:
            seconds[name].append(clock(contenders[name]))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def warmed(contender: Contender) -> Contender:
    """Return the contender with an untimed call before each timed one.

    What ran in between has emptied the caches and put threads to sleep, which costs a call of 0.1
    ms as much again.
    """

    def prepare():
        contender.call(*contender.prepare())
        return contender.prepare()

    return Contender(contender.call, prepare)


def affordable(contenders: Mapping[str, Contender], seconds: float, most: int) -> int:
    """Return how many repeats of all contenders fit into these seconds; from 5 to `most`."""
    once = sum(clock(contender) for contender in contenders.values())
    return max(5, min(most, int(seconds / once)))


def clock(contender: Contender) -> float:
    """Return the seconds of one call on fresh arguments."""
    arguments = contender.prepare()
    start = time.perf_counter()
    result = contender.call(*arguments)
    elapsed = time.perf_counter() - start
    del result
    return elapsed


class CompileCounter:
    """Counts XLA compilations and their seconds (tracing and lowering included), in this process.

    JAX's monitoring has no public way to take one listener back: make one and keep it.
    """

    def __init__(self) -> None:
        self.compilations = 0
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.startswith(_COMPILE_EVENTS):
            self.seconds += duration_secs
        self.compilations += event == _BACKEND_COMPILE


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """Return the machine and the versions. The load average is of this moment."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": f"{device.platform}: {device.device_kind}",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "load_average": list(os.getloadavg()),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def block_bootstrap(
    parts: Sequence[np.ndarray],
    numbers: Callable[[np.ndarray], np.ndarray],
    *,
    block: int = 100,
    rounds: int = 1000,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return some numbers of all values, and their 95 % intervals' ends.

    Values in the order in which they came, in parts: neighbours in a stream are not independent, so
    whole blocks of them are drawn.
    """
    blocks = [part[start : start + block] for part in parts for start in range(0, len(part), block)]
    random = np.random.default_rng(0)
    again = [
        numbers(np.concatenate([blocks[i] for i in random.integers(len(blocks), size=len(blocks))]))
        for _ in range(rounds)
    ]
    low, high = np.quantile(again, (0.025, 0.975), axis=0)
    return numbers(np.concatenate(blocks)), low, high


def read_json(path: Path) -> Any:
    """Return the results in a file; an empty dict where there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def add_json(path: Path, news: Mapping[str, Any]) -> None:
    """Add to the parts that the file has by now, as others may run at the same time."""
    results = read_json(path)
    parts = results.get("parts", {}) | news.get("parts", {})
    write_json(path, results | news | {"parts": parts})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".partial")
    whole.write_text(json.dumps(content, indent=2) + "\n")
    whole.replace(path)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
