"""What commands show while they are busy."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    track,
)


def steps_bar(console: Console) -> Progress:
    """What is done, a bar, steps of how many, and the time that remains."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )


@contextlib.contextmanager
def evaluating(console: Console) -> Iterator[Callable[[Iterable], Iterable]]:
    """The `progress` of `evaluate`: the models' calls, which compile, and a bar over the sets."""
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
