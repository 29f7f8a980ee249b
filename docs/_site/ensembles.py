"""Tables of docs/ensembles.md: intervals of an ensemble's statistics, and the rivals'."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from .results import load, percent

STATISTICS = ("mean", "quantile", "probability")
WAYS = {
    "ours": "`run_rows`, for the statistic",
    "together": "one run for all of them",
    "random": "as many rows, drawn at random, all in time",
    "came": "rows that arrived, taken as a random sample",
    "dropped": "late rows dropped",
    "worst": "worst case for rows that did not arrive",
    "process": "Gaussian process, plugged in",
}


def cells() -> list[dict[str, Any]]:
    """Return the results of each function and law of lateness."""
    return load("ensembles")["cells"]


def coverage(ways: Iterable[str] = WAYS) -> Iterator[dict[str, str]]:
    """Yield how often each way's 90 % intervals held, by law and statistic, and their width."""
    for law in dict.fromkeys(cell["law"] for cell in cells()):
        for way in ways:
            row, widths = {"late rows": law, "way": WAYS[way]}, []
            for statistic in STATISTICS:
                found = [c["ways"][way][statistic] for c in cells() if c["law"] == law]
                held = np.mean([each["held"] for each in found])
                row[f"{statistic}: held, %"] = "" if way == "process" else f"{100 * held:.0f}"
                widths.append(np.median([each["width"][0] for each in found]))
                error = np.sqrt(np.mean([each["error"] ** 2 for each in found]))
                row[f"{statistic}: width"] = "" if way == "process" else f"{widths[-1]:.2f}"
                row[f"{statistic}: error"] = f"{error:.2f}"
            yield row


def by_function() -> Iterator[dict[str, str]]:
    """Yield the coverage and the width of our intervals, function by function."""
    for cell in cells():
        row = {"function": cell["function"], "late rows": cell["law"]}
        computed = sorted(each["median"] for each in cell["computed"].values())
        row["computed"] = f"{computed[0]:.0f} to {computed[-1]:.0f}"
        for statistic in STATISTICS:
            found = cell["ways"]["ours"][statistic]
            half = 1.96 * np.sqrt(found["held"] * (1 - found["held"]) / found["draws"])
            low, middle, high = (found["width"][place] for place in (1, 0, 2))
            row[f"{statistic}: held, %"] = percent(found["held"], half, 0)
            row[f"{statistic}: width"] = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        yield row


def unsure() -> str:
    """Return how often our intervals held where the statistic was not known exactly."""
    shares, held = [], []
    for statistic in STATISTICS:
        found = [cell["ways"]["ours"][statistic] for cell in cells()]
        number = sum(each["unsure"] for each in found)
        shares.append(100 * number / sum(each["draws"] for each in found))
        held.append(100 * sum(each["held_unsure"] for each in found) / number)
    each, those = (" / ".join(f"{share:.0f}" for share in some) for some in (shares, held))
    return (
        f"In {each} % of the draws (mean / quantile / probability) the statistic was not known "
        f"exactly; of those draws' intervals {those} % held."
    )


def draws() -> str:
    """Return how many draws there were."""
    numbers = sorted({cell["draws"] for cell in cells()})
    few = sorted({cell["ways"]["process"]["mean"]["draws"] for cell in cells()})
    shown = (" to ".join(map(str, sorted({each[0], each[-1]}))) for each in (numbers, few))
    return (
        f"There are {next(shown)} draws of each case ({next(shown)} for a plain Gaussian process "
        "and for one run for all statistics), with real functions and simulated time "
        "(`bench/run.py ensembles`). [Other ways, function by "
        "function](../bench/results/ensembles.md)."
    )
