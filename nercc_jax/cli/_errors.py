"""Errors as a person should see them: one sentence, no traceback."""

import contextlib
from collections.abc import Iterator

import typer
from rich.console import Console


@contextlib.contextmanager
def told_plainly() -> Iterator[None]:
    """Turns the errors that our own code raises about input into a message and exit code 2."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
