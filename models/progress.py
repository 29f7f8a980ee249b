"""The progress bar of the training commands."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def progress_bar(
    name: str, line: Callable[[dict[str, Any]], str]
) -> Iterator[tuple[Callable[[int, int], None], Callable[[dict[str, Any]], None]]]:
    """Make a bar, and the `on_step` and `on_epoch` that move it; `line` puts an epoch in words."""
    try:
        from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
    except ImportError as error:
        raise ImportError(
            "The progress bar is rich's: pip install '.[demo]' in a clone."
        ) from error
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(name, total=None)

        def on_step(step: int, total: int) -> None:
            progress.update(task, completed=step, total=total)

        def on_epoch(entry: dict[str, Any]) -> None:
            progress.console.print(line(entry))

        yield on_step, on_epoch
