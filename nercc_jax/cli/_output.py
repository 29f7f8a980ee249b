"""Output of commands: texts, progress bars, and JSON files of numbers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)


def show(console: Console, *texts: object) -> None:
    """Print texts, one a line, without wrapping, cutting or colours."""
    text = "\n".join(map(str, texts))
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def write_json(
    console: Console,
    path: Path | None,
    about: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write facts about a run, and a table's rows, to a JSON file; do nothing without a path."""
    if path is None:
        return
    # JSON has no NaN: unknown numbers are null.
    content, *plain = (
        {name: None if value != value else value for name, value in each.items()}
        for each in (about, *rows)
    )
    content |= {"rows": plain} if rows else {}
    path.write_text(json.dumps(content, indent=1) + "\n")
    show(console, f"numbers: {path.resolve()}")


def progress_bar(console: Console) -> Progress:
    """Return a progress bar with the number of steps, a description, and the remaining time."""
    columns = BarColumn(bar_width=12), MofNCompleteColumn(), TextColumn("{task.description}")
    return Progress(*columns, TimeRemainingColumn(), console=console)
