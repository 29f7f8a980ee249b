"""Errors as a person should see them: one sentence, no traceback."""

import contextlib
from collections.abc import Iterator
from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from ._extras import missing_extra


@contextlib.contextmanager
def told_plainly() -> Iterator[None]:
    """Turns the errors that our own code raises about input into a message and exit code 2."""
    try:
        yield
    except ModuleNotFoundError as error:
        fail(missing_extra(error) or str(error), 2)
    except (ValueError, OSError, ImportError) as error:
        fail(str(error), 2)


def fail(message: str, code: int) -> NoReturn:
    """Tells what went wrong and ends the command with this exit code."""
    # Escaped: of "pip install 'nercc-jax[ray]'" Rich would take the brackets for markup, and of a
    # model "own:x:" the end for an emoji.
    told = f"[red]error:[/red] {escape(message)}"
    Console(stderr=True).print(told, highlight=False, soft_wrap=True, emoji=False)
    raise typer.Exit(code)
