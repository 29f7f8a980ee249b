"""Budgets of compiled programs, and a check that they are kept."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

BUDGET_FILE = Path(__file__).with_name("compiled_budget.json")

# What is counted for each program, and may have a limit.
COUNTS = (
    "launches",
    "worst",
    "loops",
    "open_loops",
    "temp_bytes",
    "cycles",
    "collectives",
    "rounded",
)
_WORDS = {
    "open_loops": "loops that depend on data",
    "temp_bytes": "temporary bytes",
    "rounded": "products below full precision",
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """One compiled program, or why there is none (`error`).

    `loops` are those whose turns the program fixes (`turns`), as over knots; `open_loops` those
    whose turns depend on data; `sources` and `open_sources` count what they come from. `launches`
    are made when all answers are sound, `worst` when not. `rounded` are products whose factors a
    device may round.
    """

    compile_s: float
    launches: int = 0
    worst: int = 0
    loops: int = 0
    open_loops: int = 0
    turns: tuple[int, ...] = ()
    sources: Mapping[str, int] = dataclasses.field(default_factory=dict)
    open_sources: Mapping[str, int] = dataclasses.field(default_factory=dict)
    temp_bytes: int = 0
    cycles: int = 0
    collectives: int = 0
    rounded: int = 0
    float64: bool = False
    callbacks: tuple[str, ...] = ()
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Budget:
    """A program's limits by count, and `times`: at most so many launches as others by name."""

    limits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    times: Mapping[str, float] = dataclasses.field(default_factory=dict)


Budgets = Mapping[str, Budget]


def load_budgets(platform: str, path: Path = BUDGET_FILE) -> Budgets:
    """Return the platform's budgets by program; raise ValueError for an unknown count."""
    return {
        name: read_budget(name, written)
        for name, written in json.loads(path.read_text())[platform].items()
    }


def read_budget(name: str, written: Mapping[str, Any]) -> Budget:
    """Return a budget as it is written in the file: counts, and `times`."""
    limits = {count: limit for count, limit in written.items() if count != "times"}
    if unknown := limits.keys() - set(COUNTS):
        raise ValueError(
            f"the budget of {name} limits {', '.join(sorted(unknown))}; there are "
            f"{', '.join(COUNTS)}, and times"
        )
    return Budget(limits, written.get("times", {}))


def failures(name: str, budget: Budget, measured: Mapping[str, Measured]) -> Iterator[str]:
    """Return in words all in which the program is not as it should be.

    What no program may have needs no budget: float64, callbacks, and products that a device rounds
    but for as many as the budget allows (a model's own).
    """
    found = measured[name]
    if found.error is not None:
        yield f"does not compile: {found.error}"
        return
    if found.float64:
        yield "float64"
    if found.callbacks:
        yield f"callbacks: {', '.join(found.callbacks)}"
    for count, limit in {"rounded": 0, **budget.limits}.items():
        if (value := getattr(found, count)) > limit:
            yield f"{_WORDS.get(count, count)} {value:,} > {limit:,}{_sources(count, found)}"
    for other, times in budget.times.items():
        yield from _beyond(found, other, times, measured.get(other))


def _sources(count: str, found: Measured) -> str:
    sources = {"loops": found.sources, "open_loops": found.open_sources}.get(count)
    if not sources:
        return ""
    return f" ({', '.join(f'{number} {source}' for source, number in sources.items())})"


def _beyond(found: Measured, other: str, times: float, base: Measured | None) -> Iterator[str]:
    if base is None or base.error is not None:
        yield f"launches cannot be compared: {other} was not compiled"
    elif found.launches > times * base.launches:
        yield f"launches {found.launches:,} > {times} x {base.launches:,} of {other}"
