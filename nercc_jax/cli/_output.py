"""Output that commands share: progress, tables, and their numbers in a file."""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    track,
)
from rich.table import Table


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


@contextlib.contextmanager
def evaluating(console: Console) -> Iterator[Callable[[Iterable], Iterable]]:
    """Show the progress of `evaluate`: the models' calls, which compile, then straggler sets."""
    begin = time.monotonic()
    status: Any = console.status("the model's calls: compiling, then data points ...")
    status.start()

    def bar(pairs: Iterable) -> Iterable:
        status.stop()
        seconds = time.monotonic() - begin
        console.print(f"compiled the model's calls and made them: {seconds:.1f} s", style="dim")
        return track(pairs, description="straggler sets", console=console)

    try:
        yield bar
    finally:
        status.stop()
