"""Tables whole, and their numbers in a file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """A table's rows in a file, with what was run; nothing without a path."""
    if path is None:
        return
    # JSON has no NaN: what is not known is null.
    plain = [{k: None if v != v else v for k, v in row.items()} for row in rows]
    path.write_text(json.dumps({**about, "rows": plain}, indent=1) + "\n")
    console.print(f"numbers: {path.resolve()}", soft_wrap=True, highlight=False)
