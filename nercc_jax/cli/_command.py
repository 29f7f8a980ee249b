"""Parsing of commands with argparse, from records of options, and their help texts."""

import argparse
import contextlib
import dataclasses
import inspect
import math
import shutil
import sys
import textwrap
import tomllib
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn


@dataclasses.dataclass(frozen=True)
class Option:
    """An option, or a positional argument, which has no flags.

    Attributes:
        name: The field that it sets.
        kind: The field's type.
        default: The default value.
        help: The help text.
        panel: The title of its section in `--help`.
        flags: The names on the command line.
        least: The smallest value, if it is limited.
        most: The largest value, if it is limited.
        above: Whether the value must be larger than `least`, and finite.
    """

    name: str
    kind: Any
    default: Any
    help: str
    panel: str
    flags: Sequence[str]
    least: float | int | None = None
    most: float | int | None = None
    above: bool = False

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The field's type and its type arguments."""
        return self.kind, *typing.get_args(self.kind)

    @property
    def choices(self) -> tuple[str, ...]:
        return next((typing.get_args(k) for k in self.kinds if typing.get_origin(k) is Literal), ())

    def read(self, text: str) -> Any:
        """Return a text's value; raise ArgumentTypeError if it is not valid."""
        kind: Any = next((each for each in self.kinds if each in (int, float, Path)), str)
        needed = {int: "a whole number", float: "a number"}.get(kind, "a table, {name = 1},")
        if any(typing.get_origin(each) is dict for each in self.kinds):
            braced = text if text.lstrip().startswith("{") else f"{{{text}}}"
            kind = lambda _: dict(tomllib.loads(f"table = {braced}")["table"])  # noqa: E731
        wrong = None
        try:
            value: Any = kind(text)
        except (TypeError, ValueError):
            raise argparse.ArgumentTypeError(f"{needed} is needed, not {text!r}") from None
        if self.choices and value not in self.choices:
            wrong = f"{text!r} is not one of {', '.join(self.choices)}"
        elif self.above and not self.least < value < math.inf:
            wrong = f"it must be above {self.least}, not {text}"
        elif self.least is not None and not value >= self.least:  # NaN, too
            wrong = f"it must be at least {self.least}, not {text}"
        elif self.most is not None and not value <= self.most:
            wrong = f"it must be at most {self.most}, not {text}"
        if wrong is not None:
            raise argparse.ArgumentTypeError(wrong)
        return value

    def line(self) -> tuple[str, str]:
        """Return the option's names, and its help with choices and default."""
        shown = [f"{each} (default)" if each == self.default else each for each in self.choices]
        further = "|".join(shown)
        if self.default is True:
            further = f"default: {self.flags[0]}"
        elif not shown and (self.default or (self.default == 0 and self.default is not False)):
            further = f"default: {self.default}"
        further = f" [{further}]" if further else ""
        return ", ".join(self.flags) or self.name, self.help + further


def parse(name: str, help: str, options: Iterable[Option], words: Sequence[str]) -> dict[str, Any]:
    """Return the given values by option; if `words` contain --help, print the help and exit."""
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    parser.error = lambda message: fail(message.removeprefix("argument "), 2)
    panels: dict[str, list[tuple[str, str]]] = {}
    for each in options:
        panels.setdefault(each.panel, []).append(each.line())
        several = any(typing.get_origin(kind) is list for kind in each.kinds)
        if each.kind is bool:
            for flag, value in zip(each.flags, (True, False), strict=False):
                parser.add_argument(flag, dest=each.name, action="store_const", const=value)
        elif not each.flags:
            given: Any = {"nargs": "*" if several else "?", "default": each.default}
            parser.add_argument(each.name, type=each.read, **given)
        else:
            action = "append" if several else "store"
            parser.add_argument(*each.flags, dest=each.name, type=each.read, action=action)
    if "--help" in words:
        panels.setdefault("Options", []).append(("--help", "Show this message and exit."))
        print(help_text(f"nercc {name}", help, panels), end="")
        sys.exit(0)
    return vars(parser.parse_args(words))


def help_text(prog: str, help: str, panels: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """Return the help of a command: a line for each entry of each panel, with the names first."""
    width = max(shutil.get_terminal_size().columns, 60)
    lines = [f"Usage: {prog} [OPTIONS]", ""]
    for paragraph in inspect.cleandoc(help).split("\n\n"):
        lines.append(textwrap.fill(paragraph, width))
    lines.append("")
    for title, entries in panels.items():
        lines.append(f"{title}:")
        for names, text in entries:
            text = f"  {names:<22}  {text}"
            lines.append(textwrap.fill(text, width, subsequent_indent=" " * 26))
    return "\n".join(lines) + "\n"


def fail(message: str, code: int) -> NoReturn:
    """Print an error message, and end the command with an exit code."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def error_text(error: Exception) -> str:
    """Return an error's message; of an `OSError`, the file's name and the reason."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


@contextlib.contextmanager
def of_option(option: str) -> Iterator[None]:
    """Prefix the message of a ValueError or OSError with the option that caused it."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{option}: {error_text(error)}") from error
