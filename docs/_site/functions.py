"""Tables and pictures of docs/functions.md: learners, copies and codes on smooth functions."""

from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from .looks import system_look
from .results import WIDTH, load, mean_and_half_width, percent, plus_minus, ratio, strong

RESULTS = load("functions")
CELLS = sorted(next(iter(RESULTS.values()))["cells"], key=lambda cell: ("rack" in cell, cell))
_WITH = ", with a cheap model"
_PUBLISHED, _NEAREST = "NeRCC, published", "copies, else the nearest"
ALONE, _RANDOM = "learner, no redundancy", "learner, copies of random points"
_UNCERTAIN = "learner, copies of the most uncertain"
FIRST = [
    _PUBLISHED, "NeRCC, tuned", _NEAREST, "copies, else the cheap model", ALONE, _RANDOM,
    _UNCERTAIN, _UNCERTAIN + _WITH, "picked",
]  # fmt: skip
SYSTEMS = dict.fromkeys(
    s for entry in RESULTS.values() for cell in entry["cells"].values() for s in cell["systems"]
)


def draws(function: str, cell: str, system: str, number: str = "rmse") -> Sequence[float]:
    """Return a number of every draw; none where it was not measured."""
    measured = RESULTS[function]["cells"].get(cell, {"systems": {}, "picked": ""})
    picked = measured["picked"]
    alone = ALONE + _WITH * picked.endswith(_WITH)
    name = {"picked": picked, "picked, alone": alone}.get(system, system)
    return measured["systems"].get(name, {}).get(number, [])


def errors(cell: str, systems: Sequence[str], intervals: bool = True) -> Iterator[dict[str, str]]:
    """Yield the errors of systems by function, with intervals or not; the least stands out."""
    found = {(s, f): mean_and_half_width(draws(f, cell, s)) for s in systems for f in RESULTS}
    least = {f: np.nanmin([found[s, f][0] for s in systems]) for f in RESULTS}
    for s in systems:
        row = {"": s}
        for f in RESULTS:
            mean, half = found[s, f]
            text = plus_minus(mean, half if intervals else 0.0)
            row[f] = strong(text) if mean == least[f] else text
        yield row


def picture() -> Any:
    """Return the errors of some systems, by cell and function."""
    figure, axes = plt.subplots(
        2, 2, figsize=(WIDTH, 6.4), sharex=True, sharey=True, layout="constrained"
    )
    rivals = (_PUBLISHED, _NEAREST, "copies, else a GP over the group", ALONE, _RANDOM)
    shown = {name: name for name in rivals} | {"picked": "scheme"}
    for axis, cell in zip(axes.flat, CELLS, strict=False):
        for system, alike in shown.items():
            found = [mean_and_half_width(draws(f, cell, system)) for f in RESULTS]
            means, halves = zip(*found, strict=True)
            look = system_look(alike) | {"linestyle": "none"}
            axis.errorbar(range(len(means)), means, halves, label=system, **look)
        axis.set(title=f"(N, K, S) = {cell}", yscale="log")
        axis.grid(axis="y", alpha=0.3)
    for axis in axes[1]:
        axis.set_xticks(range(len(RESULTS)), list(RESULTS), rotation=40, ha="right")
    for axis in axes[:, 0]:
        axis.set_ylabel("RMSE / spread of outputs")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), ncols=2, loc="outside lower center")
    return figure


def setting() -> str:
    """Return the numbers of draws, past answers, groups and straggler sets."""
    size = next(iter(RESULTS.values()))["size"]
    return (
        f"{size['judged']} draws of {size['history']} past answers, {size['groups']} groups, "
        f"{size['sets']} straggler sets for each group."
    )


def ratios() -> Iterator[dict[str, str]]:
    """Yield the errors of what was picked over those of rivals."""

    def versus(function: str, cell: str, rival: str) -> str:
        middle, low, high = ratio(draws(function, cell, "picked"), draws(function, cell, rival))
        return f"{middle:.2f} [{low:.2f},\u00a0{high:.2f}]" if np.isfinite(middle) else ""

    for cell, rival, name in (
        (CELLS[0], _NEAREST, _NEAREST),
        (CELLS[0], _PUBLISHED, _PUBLISHED),
        (CELLS[2], "picked, alone", "the same learner, no redundancy"),
    ):
        own = {f: versus(f, cell, rival) for f in RESULTS}
        yield {"picked over": f"{name}, {cell}"} | own


def shares(number: str, systems: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yield a share of every cell and system, by function, in per cent."""
    for cell in CELLS:
        for system in systems:
            yield {"": f"{cell}, {system}"} | {
                f: percent(*mean_and_half_width(draws(f, cell, system, number))) for f in RESULTS
            }


def recall() -> Iterator[dict[str, str]]:
    """Yield the recall of embeddings by system, of functions that have it."""
    functions = [f for f in RESULTS if draws(f, CELLS[0], "picked", "recall")]
    for system in FIRST:
        if any(draws(f, CELLS[0], system, "recall") for f in functions):
            yield {"": system} | {
                f"{f} {cell}": percent(*mean_and_half_width(draws(f, cell, system, "recall")))
                for f in functions
                for cell in CELLS
            }


def sweeps() -> Iterator[dict[str, str]]:
    """Yield the errors of sweeps of one parameter; what was picked stands out."""
    swept = {f: entry["sweep"] for f, entry in RESULTS.items() if "sweep" in entry}
    for name in next(iter(swept.values()))["rmse"]:
        row = {"": name}
        for f, entry in swept.items():
            text = plus_minus(*mean_and_half_width(entry["rmse"].get(name, [])), ".4f")
            row[f] = strong(text) if name == entry["picked"] else text
        yield row


def picked() -> Iterator[dict[str, str]]:
    """Yield the picked system of each cell, by function."""
    for f, entry in RESULTS.items():
        yield {"": f} | {cell: entry["cells"].get(cell, {}).get("picked", "") for cell in CELLS}
