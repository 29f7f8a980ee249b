"""Tables whole, and their numbers in a file."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def print_whole(console: Console, table: Table) -> None:
    """A table with no name or number cut: wider than a narrow window, if need be."""
    width = console.measure(table, options=console.options.update(width=1000)).maximum
    wide = Console(file=console.file, width=max(width, console.width), soft_wrap=True)
    wide.print(table)


def write_json(
    console: Console,
    path: Path | None,
    about: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """A table's rows in a file, with what was run; nothing without a path."""
    if path is None:
        return
    content = dict(about)
    if rows is not None:
        content["rows"] = [_plain(row) for row in rows]
    path.write_text(json.dumps(_plain(content), indent=1) + "\n")
    console.print(f"numbers: {path.resolve()}", soft_wrap=True, highlight=False)


def summary_table(told: Iterable[tuple[str, str]]) -> Table:
    """Names and what is to be said of each, below each other."""
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in told:
        table.add_row(name, value)
    return table


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: what is not known is null."""
    return {name: None if value != value else value for name, value in row.items()}
