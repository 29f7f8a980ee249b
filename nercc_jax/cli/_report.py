"""Evaluations as a table, and as a picture's file."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from rich import box
from rich.table import Table

from ..codes import AbstractCode
from ..evaluation import (
    SHARES,
    Estimate,
    Evaluation,
    batch_figure,
    batched,
    laws_and_codes,
    straggler_figure,
)
from ..inference import Model


def straggler_table(rows: Sequence[Evaluation], metric: str, title: str, *, best: str) -> Table:
    """One metric of each code (columns) under each law (rows), the best of a row in bold with *.

    Shares are in %, with the ends of their intervals. `best` is "min" or "max". A code that lost
    predictions cannot win on an error that leaves them out; the last columns tell the share, in %,
    that each code lost that lost any.
    """
    laws, codes = laws_and_codes(rows)
    by_pair = {(row.stragglers, row.code): row for row in rows}
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    table.add_column("S", justify="right")
    for code in codes:
        table.add_column(code, justify="right", no_wrap=True)
    losers = [code for code in codes if any(by_pair[law, code].lost.mean > 0 for law in laws)]
    for code in losers:
        table.add_column(f"lost by\n{code}", justify="right", no_wrap=True)
    for law in laws:
        cells = [by_pair[law, code] for code in codes]
        winner = _winner(cells, metric, best)
        lost = (f"{100 * by_pair[law, code].lost.mean:.1f}" for code in losers)
        table.add_row(law, *(_cell(row, metric, row in winner) for row in cells), *lost)
    return table


def straggler_plot(
    rows: Sequence[Evaluation],
    panels: Mapping[str, tuple[str, bool]],
    title: str,
    path: Path,
    above: Sequence[Callable[[Any], Any]] = (),
) -> None:
    """A picture's file with a panel for each metric {name: (label, logarithmic)}.

    Each of `above` draws into a part of the figure over them, side by side.
    """
    lines = 1 + bool(above)
    width = 6.2 * max(len(panels), len(above))
    figure = plt.figure(figsize=(width, 4.4 * lines), layout="constrained")
    *first, last = figure.subfigures(lines, 1, squeeze=False)[:, 0]
    for part, draw in zip(
        [each for line in first for each in line.subfigures(1, len(above), squeeze=False)[0]],
        above,
        strict=True,
    ):
        draw(part)
    straggler_figure(rows, panels, title, last)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_batch(
    model: Model, code: AbstractCode, x: np.ndarray, available: np.ndarray
) -> Callable[[Any], Any]:
    """Draws one batch's way: K images, N coded ones, K labels.

    `x` are (K, height, width, 1 or 3), as the model takes them; what is shown is in their range.
    """
    coded = np.asarray(code.encode(x))
    run = batched(model, len(coded))
    own, answers = np.asarray(run(x)), np.asarray(run(coded))
    decoded = np.asarray(code.decode(answers, available))
    images, mixtures = (each[..., 0] if each.shape[-1] == 1 else each for each in (x, coded))
    return lambda part: batch_figure(
        images, mixtures, available, decoded.argmax(-1).tolist(), own.argmax(-1).tolist(), part
    )


def _winner(cells: Sequence[Evaluation], metric: str, best: str) -> list[Evaluation]:
    errors = best == "min"
    candidates = [row for row in cells if not (errors and row.lost.mean > 0)]
    if not candidates:
        return []
    means = [getattr(row, metric).mean for row in candidates]
    top = min(means) if errors else max(means)
    return [row for row, mean in zip(candidates, means, strict=True) if mean == top]


def _cell(row: Evaluation, metric: str, wins: bool) -> str:
    estimate: Estimate = getattr(row, metric)
    if np.isnan(estimate.mean):
        return "-"
    if metric in SHARES:
        text = _share(estimate)
    else:
        text = f"{_number(estimate.mean)} ±{_number(estimate.half_width)}"
    return f"[bold green]{text}*[/bold green]" if wins else text


def _share(estimate: Estimate) -> str:
    """In %: the mean, and where it may lie."""
    low, high = (100 * end for end in estimate.interval(share=True))
    mean = f"{100 * estimate.mean:.1f}"
    if not high - low >= 0.1:
        return mean
    digits = 0 if high - low >= 3 else 1
    return f"{mean} {low:.{digits}f}–{high:.{digits}f}"


def _number(value: float) -> str:
    """Three digits, without an exponent where none is needed."""
    if value == 0 or np.isnan(value):
        return "0" if value == 0 else "?"
    if abs(value) >= 1e4:
        return f"{value:.0e}".replace("e+0", "e")
    digits = max(0, 2 - int(np.floor(np.log10(abs(value)))))
    return f"{value:.{min(digits, 4)}f}"
