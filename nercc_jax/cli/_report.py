"""Evaluations as a table and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from rich import box
from rich.table import Table

from ..evaluation import Estimate, Evaluation

# One colour a code, the same in every picture; what loses predictions is dashed.
_STYLES = {
    "tuned": {"color": "#cc79a7", "marker": "D"},
    "NeRCC tuned": {"color": "#cc79a7", "marker": "D"},
    "NeRCC": {"color": "#0072b2", "marker": "o"},
    "NeRCC untuned": {"color": "#0072b2", "marker": "o"},
    "NeRCC published": {"color": "#56b4e9", "marker": "o", "markerfacecolor": "white"},
    "BACC": {"color": "#d55e00", "marker": "s"},
    "ApproxIFER": {"color": "#e69f00", "marker": "v"},
    "BACC tuned": {"color": "#a05000", "marker": "s", "markerfacecolor": "white"},
    "LCC": {"color": "#009e73", "marker": "^"},
    "replication": {"color": "#555555", "marker": "x", "linestyle": "--"},
    "ParM": {"color": "#000000", "marker": "+", "linestyle": "--"},
}


def straggler_table(
    rows: Sequence[Evaluation], metric: str, title: str, *, best: str, scale: int = 1
) -> Table:
    """One metric of each code (columns) under each law (rows), the best of a row in bold with *.

    Values are multiplied by `scale`, 1 or 100. `best` is "min" or "max". A code that lost
    predictions cannot win on an error that leaves them out; the last columns tell the share, in %,
    that each code lost that lost any.
    """
    laws, codes = _axes(rows)
    by_pair = {(row.stragglers, row.code): row for row in rows}
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    table.add_column("S", justify="right")
    for code in codes:
        table.add_column(code, justify="right")
    losers = [code for code in codes if any(by_pair[law, code].lost.mean > 0 for law in laws)]
    for code in losers:
        table.add_column(f"lost by\n{code}", justify="right")
    for law in laws:
        cells = [by_pair[law, code] for code in codes]
        winner = _winner(cells, metric, best)
        lost = (f"{100 * by_pair[law, code].lost.mean:.1f}" for code in losers)
        table.add_row(law, *(_cell(row, metric, scale, row in winner) for row in cells), *lost)
    return table


def straggler_plot(
    rows: Sequence[Evaluation], panels: Mapping[str, tuple[str, bool]], title: str, path: Path
) -> None:
    """A picture with a panel for each metric {name: (label, logarithmic)}, with intervals."""
    figure, axes = plt.subplots(1, len(panels), figsize=(5.6 * len(panels), 4.2), squeeze=False)
    for axis, (metric, (label, logarithmic)) in zip(axes[0], panels.items(), strict=True):
        straggler_curves(axis, rows, metric, label, logarithmic=logarithmic)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def straggler_curves(
    axis: Axes, rows: Sequence[Evaluation], metric: str, label: str, *, logarithmic: bool
) -> None:
    """One metric of each code against the number of stragglers, with intervals."""
    laws, codes = _axes(rows)
    places = np.array([float(law) for law in laws])
    for code in codes:
        estimates = [getattr(row, metric) for row in rows if row.code == code]
        mean = np.array([e.mean for e in estimates])
        half = np.array([e.half_width for e in estimates])
        if logarithmic:
            mean = np.where(mean > 0, mean, np.nan)
            half = np.minimum(half, 0.9 * mean)
        axis.errorbar(places, mean, half, label=code, capsize=2, lw=1.4, ms=4, **_style(code))
    axis.set(xlabel="stragglers", ylabel=label, yscale="log" if logarithmic else "linear")
    if logarithmic and len(tops := _maxima(rows, metric, codes)) > 1:
        # A code that explodes must not press the others together.
        axis.set_ylim(top=min(max(tops), 100 * float(np.median(tops))) * 2)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _axes(rows: Sequence[Evaluation]) -> tuple[list[str], list[str]]:
    return list(dict.fromkeys(r.stragglers for r in rows)), list(
        dict.fromkeys(r.code for r in rows)
    )


def _maxima(rows: Sequence[Evaluation], metric: str, codes: Sequence[str]) -> list[float]:
    """The largest mean of each code that has a positive one."""
    means = {code: [getattr(r, metric).mean for r in rows if r.code == code] for code in codes}
    return [top for values in means.values() if (top := np.nanmax(values)) > 0]


def _style(code: str) -> dict[str, Any]:
    return _STYLES.get(code, {"marker": "."})


def _winner(cells: Sequence[Evaluation], metric: str, best: str) -> list[Evaluation]:
    errors = best == "min"
    candidates = [row for row in cells if not (errors and row.lost.mean > 0)]
    if not candidates:
        return []
    means = [getattr(row, metric).mean for row in candidates]
    top = min(means) if errors else max(means)
    return [row for row, mean in zip(candidates, means, strict=True) if mean == top]


def _cell(row: Evaluation, metric: str, scale: int, wins: bool) -> str:
    estimate: Estimate = getattr(row, metric)
    if np.isnan(estimate.mean):
        return "-"
    write = _number if scale == 1 else "{:.1f}".format
    text = f"{write(scale * estimate.mean)} ±{write(scale * estimate.half_width)}"
    return f"[bold green]{text}*[/bold green]" if wins else text


def _number(value: float) -> str:
    """Three digits, without an exponent where none is needed."""
    if value == 0 or np.isnan(value):
        return "0" if value == 0 else "?"
    if abs(value) >= 1e4:
        return f"{value:.0e}".replace("e+0", "e")
    digits = max(0, 2 - int(np.floor(np.log10(abs(value)))))
    return f"{value:.{min(digits, 4)}f}"
