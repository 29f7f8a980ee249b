"""Tables and pictures of evaluations and of tuning."""

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
from ..evaluation import Estimate, Evaluation
from ..evaluation._answers import batched
from ..evaluation._evaluation import SHARES
from ..evaluation._pictures import (
    batch_figure,
    straggler_figure,
    system_look,
)
from ..inference.models import Model
from ..tuning._layouts import LayoutSearch
from ..tuning._tune import TuningStep


def straggler_table(rows: Sequence[Evaluation], metric: str, title: str, *, best: str) -> Table:
    """Return a table of one metric: codes in columns, laws in rows, the best of a row with *.

    The best is the "min" or the "max". Shares are in %, with the ends of their intervals. A code
    that lost predictions cannot win on an error that leaves them out; the last columns have the
    share, in %, that such codes lost.
    """
    laws = [*dict.fromkeys(row.stragglers for row in rows)]
    codes = [*dict.fromkeys(row.code for row in rows)]
    by_pair = {(row.stragglers, row.code): row for row in rows}
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    table.add_column("S", justify="right")
    for code in codes:
        table.add_column(code, justify="right", no_wrap=True)
    losers = [code for code in codes if any(by_pair[law, code].lost.mean > 0 for law in laws)]
    for code in losers:
        table.add_column(f"lost by\n{code}", justify="right", no_wrap=True)
    for law in laws:
        estimates: dict[str, Estimate] = {c: getattr(by_pair[law, c], metric) for c in codes}
        means = {
            code: each.mean
            for code, each in estimates.items()
            if best == "max" or not by_pair[law, code].lost.mean > 0
        }
        top = (max if best == "max" else min)(means.values(), default=np.nan)
        cells = []
        for code, estimate in estimates.items():
            if np.isnan(estimate.mean):
                text = "-"
            elif metric in SHARES:
                text = share_text(estimate)
            else:
                text = f"{_number(estimate.mean)} ±{_number(estimate.half_width)}"
            wins = means.get(code) == top
            cells.append(f"[bold green]{text}*[/bold green]" if wins else text)
        lost = (f"{100 * by_pair[law, code].lost.mean:.1f}" for code in losers)
        table.add_row(law, *cells, *lost)
    return table


def straggler_plot(
    rows: Sequence[Evaluation],
    panels: Mapping[str, tuple[str, bool]],
    title: str,
    path: Path,
    above: Sequence[Callable[[Any], Any]] = (),
) -> None:
    """Write a picture with a panel for each metric, over the laws.

    A metric has its label, and whether its axis is logarithmic. Functions `above` draw into parts
    of the figure above the panels, side by side.
    """
    lines = 1 + bool(above)
    width = 6.2 * max(len(panels), len(above))
    figure = plt.figure(figsize=(width, 4.4 * lines), layout="constrained")
    parts = figure.subfigures(lines, 1, squeeze=False)[:, 0]
    if above:
        for part, draw in zip(
            parts[0].subfigures(1, len(above), squeeze=False)[0], above, strict=True
        ):
            draw(part)
    straggler_figure(rows, panels, title, parts[-1])
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_batch(
    model: Model, code: AbstractCode, x: np.ndarray, available: np.ndarray
) -> Callable[[Any], Any]:
    """Return a function that draws one batch: K images, N coded ones, K labels.

    Images are (K, height, width, 1 or 3), as the model takes them; some workers are available.
    """
    coded = np.asarray(code.encode(x))
    run = batched(model, len(coded))
    own, answers = np.asarray(run(x)), np.asarray(run(coded))
    decoded = np.asarray(code.decode(answers, available))
    images, mixtures = (each[..., 0] if each.shape[-1] == 1 else each for each in (x, coded))
    return lambda part: batch_figure(
        images, mixtures, available, decoded.argmax(-1).tolist(), own.argmax(-1).tolist(), part
    )


def layouts_plot(search: LayoutSearch, title: str, path: Path) -> None:
    """Draw the disagreement of every layout's best code as bars."""
    shown = search.best_of_layouts[::-1]
    figure, axis = plt.subplots(figsize=(7, 1 + 0.35 * len(shown)))
    shares = [100 * candidate.disagreement for candidate in shown]
    colours = [system_look(f"NeRCC{' tuned' * each.tuned}")["color"] for each in shown]
    axis.barh([each.layout + ", tuned" * each.tuned for each in shown], shares, color=colours)
    axis.set(xlabel="labels that differ from the model's own, in %, held-out groups", title=title)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def tuning_plot(
    history: Sequence[TuningStep],
    lambdas: np.ndarray,
    landscape: np.ndarray,
    title: str,
    path: Path,
) -> None:
    """Write a picture of a tuning run.

    Objective and lambdas are drawn along the run's steps, and its path over the landscape, the
    objective over (lambda_enc, lambda_dec) on a grid of both lambdas.
    """
    figure, (first, second, third) = plt.subplots(1, 3, figsize=(15, 4.2))
    steps = [entry.step for entry in history if entry.objective is not None]
    values = [entry.objective for entry in history if entry.objective is not None]
    looks = [(entry.step, entry.held_out) for entry in history if entry.held_out is not None]
    first.plot(steps, values, color="#bbbbbb", lw=1, label="on each step's own groups")
    first.plot(*zip(*looks, strict=True), color="#0072b2", marker="o", ms=3, label="held out")
    first.axhline(1, color="#555555", lw=0.8, ls="--")
    first.set(xlabel="step", ylabel="objective / the untuned code's", title="objective")
    first.legend(fontsize=8)

    path_enc, path_dec, exponent = (
        np.array([entry.parameters[name] for entry in history])
        for name in ("lambda_enc", "lambda_dec", "gap_exponent")
    )
    places = [entry.step for entry in history]
    second.semilogy(places, path_enc, color="#009e73", label="lambda_enc")
    second.semilogy(places, path_dec, color="#d55e00", label="lambda_dec, all answering")
    second.set(xlabel="step", title="lambdas")
    twin = second.twinx()
    lines = twin.plot(places, exponent, color="#cc79a7", ls=":", label="gap exponent (right)")
    # Below: curves go through every corner.
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15), "ncols": 3, "frameon": False}
    second.legend(handles=[*second.lines, *lines], fontsize=8, **below)

    shown = np.clip(landscape, None, 10 * np.nanmin(landscape))
    colours = third.pcolormesh(
        lambdas, lambdas, np.log10(shown).T, cmap="viridis", shading="nearest"
    )
    bar = figure.colorbar(colours, ax=third)
    bar.set_label("log10 objective, cut at 10 times the least")
    walk = [np.clip(path, lambdas[0], lambdas[-1]) for path in (path_enc, path_dec)]
    third.plot(*walk, color="white", lw=1.2, marker=".", ms=2)
    third.plot(walk[0][-1], walk[1][-1], "r*", ms=11, label="end")
    third.set(xscale="log", yscale="log", xlabel="lambda_enc", ylabel="lambda_dec")
    third.set_title("held-out objective, other numbers as tuned", fontsize=10)
    third.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def share_text(estimate: Estimate) -> str:
    """Return a share in %, with the ends of its interval."""
    low, high = (100 * end for end in estimate.interval(share=True))
    mean = f"{100 * estimate.mean:.1f}"
    if not high - low >= 0.1:
        return mean
    digits = 0 if high - low >= 3 else 1
    return f"{mean} {low:.{digits}f}–{high:.{digits}f}"


def _number(value: float) -> str:
    """Return a number in three digits, without an exponent where none is needed."""
    if value == 0 or np.isnan(value):
        return "0" if value == 0 else "?"
    if abs(value) >= 1e4:
        return f"{value:.0e}".replace("e+0", "e")
    digits = max(0, 2 - int(np.floor(np.log10(abs(value)))))
    return f"{value:.{min(digits, 4)}f}"
