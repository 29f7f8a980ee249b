"""Output that commands share: progress, tables, and their numbers in a file."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from ..pools import PoolReport


def make_table(
    title: str | None, columns: Iterable[str], rows: Iterable[Sequence[str]], left: int = 1,
    **further: Any,
) -> Table:  # fmt: skip
    """Return a table of texts, whose first columns stand on the left and the others on the right.

    A row may have the style of its line in a cell beyond the columns.
    """
    table = Table(
        title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0), **further
    )
    names = list(columns)
    for number, name in enumerate(names):
        table.add_column(name, justify="left" if number < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row[: len(names)], style=dict(enumerate(row)).get(len(names)))
    return table


def print_whole(console: Console, table: Table) -> None:
    """Print a table with no name or number cut: wider than a narrow window, if need be."""
    width = console.measure(table, options=console.options.update(width=1000)).maximum
    wide = Console(file=console.file, width=max(width, console.width), soft_wrap=True)
    wide.print(table)


def write_json(
    console: Console,
    path: Path | None,
    about: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Write a table's rows to a file, with what was run; do nothing without a path."""
    if path is None:
        return
    content = dict(about)
    if rows is not None:
        content["rows"] = [_plain(row) for row in rows]
    path.write_text(json.dumps(_plain(content), indent=1) + "\n")
    console.print(f"numbers: {path.resolve()}", soft_wrap=True, highlight=False)


def summary_table(lines: Iterable[tuple[str, str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in lines:
        table.add_row(name, value)
    return table


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row for JSON, which has no NaN: unknown numbers are null."""
    return {name: None if value != value else value for name, value in row.items()}


def steps_bar(console: Console) -> Progress:
    """Return a progress bar with a description, steps of how many, and the remaining time."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def run_bar(console: Console) -> Progress:
    """Return a progress bar of a run, whose description follows the bar."""
    columns = BarColumn(bar_width=12), MofNCompleteColumn(), TextColumn("{task.description}")
    return Progress(*columns, TimeRemainingColumn(), console=console)


class Finished(NamedTuple):
    """The results of an engine.

    Attributes:
        columns: The rows as a table; none where nothing is done.
        arrays: The same for an .npz.
        summary: Names and texts to print.
        numbers: The same for a file.
        stopped: Why the run ended early, if it did.
        done: How many rows are done.
        missing: Which rows are missing, if any are.
    """

    columns: dict[str, np.ndarray]
    arrays: dict[str, np.ndarray]
    summary: Iterable[tuple[str, str]]
    numbers: dict[str, Any]
    stopped: str | None
    done: str
    missing: str | None


def faults_seen(report: "PoolReport") -> Iterable[tuple[str, str]]:
    """Yield the lines of a summary about late answers, errors and deaths, worker by worker."""
    yield "late answers", f"{report.late:,}"
    yield "errors", f"{report.errors:,}"
    by_worker = ", ".join(
        f"worker {worker}: {deaths}"
        for worker, deaths in enumerate(report.deaths_by_worker)
        if deaths
    )
    hung = f", {report.hung} of them hung" if report.hung else ""
    yield "deaths", f"{report.deaths:,}{hung} ({by_worker})" if report.deaths else "0"
