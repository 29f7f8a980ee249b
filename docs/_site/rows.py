"""Tables of docs/functions.md about `run_rows`: time saved, rows needed, and spot nodes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .results import load

Cell = Mapping[str, Any]


def saved(law: str) -> Iterator[dict[str, str]]:
    """Yield the times of `run_rows` and of an executor, by function, of one law of slow rows."""
    some = [cell for cell in load("rows")["cells"] if cell["law"] == law]
    for function, cells in _grouped(some, "function"):
        slow = [cell for cell in cells if cell["slow_predicted"]]
        held = sum(cell["slow_predicted"] * cell["slow_coverage"] for cell in slow)
        number = sum(cell["slow_predicted"] for cell in slow)
        yield {
            "function": function,
            "executor": _range([cell["executor_s"] for cell in cells], _seconds),
            "tolerance 0": _range([cell["tolerance_0_s"] for cell in cells], _seconds),
            "tolerance 10 %": _range([cell["seconds"] for cell in cells], _seconds),
            "computed": _percent([cell["computed"] for cell in cells]),
            "bars held": _percent([cell["coverage"] for cell in cells]),
            "of slow rows": f"{100 * held / number:.0f} % of {number}" if number else "",
        }


def curves() -> Iterator[dict[str, str]]:
    """Yield the rows that a tolerance needs, in both orders, and how good a plain GP is."""
    found = load("row_curves")
    for function, share, cells in _grouped(found["cells"], "function", "share"):
        chosen, gps = [cell["chosen"] for cell in cells], [cell["gp"] for cell in cells]
        gps = [gp for gp in gps if gp is not None]
        yield {
            "function": function,
            "tolerance": f"{100 * share:.0f} %",
            "computed": _percent([each["computed"] / found["rows"] for each in chosen]),
            "in random order": _percent(
                [cell["random"]["computed"] / found["rows"] for cell in cells]
            ),
            "bars held": _percent(_shares(chosen, "held", "predicted")),
            "GP: sure of": _percent(_shares(gps, "sure", "others")),
            "GP: bars held": _percent(_shares(gps, "held", "others")),
            "GP: within tolerance": _percent(_shares(gps, "within", "others")),
            "of ours": _percent(_shares(chosen, "within", "predicted")),
        }


def spot() -> Iterator[dict[str, str]]:
    """Yield the rows within the tolerance at the deadline, of all ways, under a spot trace."""
    for workers, function, cells in _grouped(load("spot")["cells"], "workers", "function"):
        yield {
            "workers": str(workers),
            "function": function,
            "run_rows": _range([cell["within"] for cell in cells], _count),
            "executor": _range([cell["executor"] for cell in cells], _count),
            "tasks of 15": _range([cell["blocks"] for cell in cells], _count),
            "over the executor": _range(
                [cell["within"] / cell["executor"] for cell in cells], lambda value: f"{value:.1f}"
            ),
            "computed": _range([cell["computed"] for cell in cells], _count),
            "bars held": _percent(_shares(cells, "predicted_held", "predicted")),
        }


def _grouped(cells: Sequence[Cell], *names: str) -> Iterator[tuple[Any, ...]]:
    """Yield the cells that agree in these numbers, after the numbers."""
    groups: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell[name] for name in names), []).append(cell)
    for key in sorted(groups):
        yield *key, groups[key]


def _shares(cells: Sequence[Cell], part: str, whole: str) -> list[float]:
    return [cell[part] / cell[whole] for cell in cells if cell[whole]]


def _percent(shares: Sequence[float]) -> str:
    return _range(shares, lambda share: f"{100 * share:.0f}") + " %" if len(shares) else ""


def _seconds(number: float) -> str:
    return f"{number:.1f} s"


def _count(number: float) -> str:
    return f"{number:,.0f}"


def _range(values: Sequence[float], text: Callable[[float], str]) -> str:
    """Return the mean and, of several values, the least and the largest."""
    if len(values) == 0:
        return ""
    mean, ends = text(float(np.mean(values))), [text(min(values)), text(max(values))]
    return mean if len(values) == 1 else f"{mean} ({ends[0]}–{ends[1]})"
