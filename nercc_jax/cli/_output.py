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


def print_table(
    console: Console,
    title: str | None,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    left: int = 1,
    **further: Any,
) -> None:
    """Print a table of texts with no name or number cut: wider than a narrow window, if need be.

    Its first columns stand on the left, the others on the right. A row may have the style of its
    line in a cell beyond the columns.
    """
    layout: Any = {"box": box.SIMPLE_HEAD, "title_justify": "left", "padding": (0, 1, 0, 0)}
    table = Table(title=title, **layout, **further)
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row[: len(columns)], style=dict(enumerate(row)).get(len(columns)))
    width = console.measure(table, options=console.options.update(width=1000)).maximum
    Console(file=console.file, width=max(width, console.width), soft_wrap=True).print(table)


def write_json(
    console: Console,
    path: Path | None,
    about: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write a table's rows to a file, with what was run; do nothing without a path."""
    if path is None:
        return
    # JSON has no NaN: unknown numbers are null.
    content, *plain = (
        {name: None if value != value else value for name, value in each.items()}
        for each in (about, *rows)
    )
    content |= {"rows": plain} if rows else {}
    path.write_text(json.dumps(content, indent=1) + "\n")
    console.print(f"numbers: {path.resolve()}", soft_wrap=True, highlight=False)


def progress_bar(console: Console) -> Progress:
    """Return a progress bar with the number of steps, a description, and the remaining time."""
    columns = BarColumn(bar_width=12), MofNCompleteColumn(), TextColumn("{task.description}")
    return Progress(*columns, TimeRemainingColumn(), console=console)


class Finished(NamedTuple):
    """The results of a run's engine.

    Attributes:
        columns: The rows as a table; none where nothing is done.
        arrays: The same for an .npz.
        summary: Names and texts to print.
        numbers: The same for a file.
        report: Of the pool.
        stopped: Why the run ended early, if it did.
        done: How many rows are done.
        missing: Which rows are missing, if any are.
    """

    columns: dict[str, np.ndarray]
    arrays: dict[str, np.ndarray]
    summary: Iterable[tuple[str, str]]
    numbers: dict[str, Any]
    report: "PoolReport"
    stopped: str | None
    done: str
    missing: str | None
