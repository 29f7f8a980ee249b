"""`nercc tune --layout search`: which layout of the workers' points suits a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from ..evaluation import system_look
from ..inference import Model
from ..stragglers import AbstractStragglers
from ..tuning import LayoutCandidate, LayoutSearch, search_layout


def found_layout(
    console: Console,
    network: Model,
    x: np.ndarray,
    num_data: int,
    num_workers: int,
    laws: Mapping[str, AbstractStragglers],
    plot: Path,
    **options: Any,
) -> LayoutSearch:
    """Searches, and shows the candidates as a table and as a picture."""
    with console.status("searching ...") as status:
        search = search_layout(
            network,
            x,
            num_data,
            num_workers,
            laws,
            on_stage=lambda stage: status.update(f"{stage} ..."),
            **options,
        )
    console.print(_table(search))
    _draw(search, f"{num_data} data points, {num_workers} workers", plot)
    return search


def _name(candidate: LayoutCandidate) -> str:
    return f"{candidate.layout}, tuned" if candidate.tuned else candidate.layout


def _table(search: LayoutSearch) -> Table:
    table = Table(
        title="Layouts, each with its best decoder, on held-out groups",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    table.add_column("layout")
    for column in ("disagreement", "lambda_dec", "exact where answered"):
        table.add_column(column, justify="right")
    for candidate in search.best_of_layouts:
        code = candidate.code
        kept = "yes" if code.exact or not code.lambda_dec > 0 else "no"
        table.add_row(
            _name(candidate),
            f"{100 * candidate.disagreement:.2f} %",
            f"{float(code.lambda_dec):.1e}",
            "" if candidate.layout == "chebyshev" else kept,
        )
    return table


def _draw(search: LayoutSearch, title: str, path: Path) -> None:
    """Bars: the disagreement of every layout's best."""
    shown = search.best_of_layouts[::-1]
    figure, axis = plt.subplots(figsize=(7, 1 + 0.35 * len(shown)))
    shares = [100 * candidate.disagreement for candidate in shown]
    names = ("NeRCC tuned" if candidate.tuned else "NeRCC" for candidate in shown)
    colours = [system_look(name)["color"] for name in names]
    axis.barh([_name(candidate) for candidate in shown], shares, color=colours)
    axis.set(xlabel="labels that differ from the model's own, in %, held-out groups", title=title)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
