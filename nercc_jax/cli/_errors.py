"""Errors of the command line: one sentence, no traceback."""

import contextlib
from collections.abc import Iterator
from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from ._process import missing_extra

_ON_HOST = "CpuCallback error"  # of JAX, around what a model on the host raised


@contextlib.contextmanager
def report_errors() -> Iterator[None]:
    """Turn the errors that our own code raises about input into a message and exit code 2."""
    try:
        yield
    except ModuleNotFoundError as error:
        fail(missing_extra(error) or str(error), 2)
    except (ValueError, OSError, ImportError) as error:
        fail(_message(error), 2)
    except RuntimeError as error:
        if _ON_HOST not in str(error):
            raise
        from ..pools.batch import reason_of

        fail(f"the model failed: {reason_of(error)}", 1)


@contextlib.contextmanager
def of_option(option: str) -> Iterator[None]:
    """Have an error's message begin with the option that it is about."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{option}: {_message(error)}") from error


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def fail(message: str, code: int) -> NoReturn:
    """Print what went wrong, and end the command with an exit code."""
    # Escaped: Rich would take the brackets of "pip install '.[ray]' in a clone" for markup, and the
    # end of a model "own:x:" for an emoji.
    text = f"[red]error:[/red] {escape(message)}"
    Console(stderr=True).print(text, highlight=False, soft_wrap=True, emoji=False)
    raise typer.Exit(code)
