"""Errors as a person should see them: one sentence, no traceback."""

import contextlib
from collections.abc import Iterator
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand

from ._extras import missing_extra


@contextlib.contextmanager
def told_plainly() -> Iterator[None]:
    """Turns the errors that our own code raises about input into a message and exit code 2."""
    try:
        yield
    except ModuleNotFoundError as error:
        fail(missing_extra(error) or str(error), 2)
    except (ValueError, OSError, ImportError) as error:
        fail(_told(error), 2)


@contextlib.contextmanager
def of_option(option: str) -> Iterator[None]:
    """Has what an error says begin with the option that it is about."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{option}: {_told(error)}") from error


def _told(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


class PlainCommand(TyperCommand):
    """A command that says of a value which does not fit what came, and nothing of Pydantic's own.

    Typer tells "Value error, 'x' is not one of" and "Input should be a valid integer, unable to
    parse string as an integer".
    """

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().make_context(*arguments, **options)
        except typer.BadParameter as error:
            found = getattr(error.__cause__, "errors", list)()  # Pydantic's, one for each fault
            if found:
                error.message = _plainly(found[0])
            raise


def _plainly(fault: dict[str, Any]) -> str:
    message, told = str(fault["msg"]), "Value error, "
    if message.startswith(told):
        return message.removeprefix(told)
    wanted = message.removeprefix("Input ").partition(",")[0]
    return f"it {wanted}, not {fault['input']!r}"


def fail(message: str, code: int) -> NoReturn:
    """Tells what went wrong and ends the command with this exit code."""
    # Escaped: of "pip install 'nercc-jax[ray]'" Rich would take the brackets for markup, and of a
    # model "own:x:" the end for an emoji.
    told = f"[red]error:[/red] {escape(message)}"
    Console(stderr=True).print(told, highlight=False, soft_wrap=True, emoji=False)
    raise typer.Exit(code)
