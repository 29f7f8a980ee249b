"""Commands read by argparse from records of options; help has a line for each option."""

import argparse
import contextlib
import dataclasses
import inspect
import shutil
import sys
import textwrap
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

_WORDS = {int: "a whole number", float: "a number"}


@dataclasses.dataclass(frozen=True)
class Option:
    """An option, or an argument, which has no flags.

    Attributes:
        name: The field that it sets.
        kind: The field's type.
        default: The value unless it is given.
        help: Its help; an option without any is only listed.
        panel: The title that it stands under in `--help`.
        flags: Its names on the command line.
        least: The smallest value, if there is one.
        most: The largest one.
    """

    name: str
    kind: Any
    default: Any
    help: str
    panel: str
    flags: Sequence[str]
    least: float | int | None = None
    most: float | int | None = None

    @property
    def choices(self) -> tuple[str, ...]:
        kinds = (self.kind, *typing.get_args(self.kind))
        return sum((typing.get_args(k) for k in kinds if typing.get_origin(k) is Literal), ())

    def read(self, text: str) -> Any:
        """Return the value that a text stands for; raise ArgumentTypeError if it is none."""
        kinds = (self.kind, *typing.get_args(self.kind))
        kind = next((each for each in kinds if each in (int, float, Path)), str)
        try:
            value: Any = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{_WORDS[kind]} is needed, not {text!r}") from None
        if self.choices and value not in self.choices:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(self.choices)}")
        if self.least is not None and not value >= self.least:  # NaN, too
            raise argparse.ArgumentTypeError(f"it must be at least {self.least}, not {text}")
        if self.most is not None and not value <= self.most:
            raise argparse.ArgumentTypeError(f"it must be at most {self.most}, not {text}")
        return value

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Have a parser read it; it sets nothing unless it is given."""
        several = typing.get_origin(self.kind) is list or list[str] in typing.get_args(self.kind)
        if self.kind is bool:
            for flag, value in zip(self.flags, (True, False), strict=False):
                parser.add_argument(flag, dest=self.name, action="store_const", const=value)
        elif not self.flags:
            given: Any = {"nargs": "*" if several else "?", "default": self.default}
            parser.add_argument(self.name, type=self.read, **given)
        else:
            action = "append" if several else "store"
            parser.add_argument(*self.flags, dest=self.name, type=self.read, action=action)

    def line(self) -> tuple[str, str]:
        """Return its names and its help, which ends with its choices and its default."""
        choices = (f"{each} (default)" if each == self.default else each for each in self.choices)
        shown = ["|".join(choices)] if self.choices else []
        if self.default is True:
            shown.append(f"default: {self.flags[0]}")
        elif not shown and (self.default or (self.default == 0 and self.default is not False)):
            shown.append(f"default: {self.default}")
        further = f" [{shown[0]}]" if shown and self.help else ""
        return ", ".join(self.flags) or self.name, self.help + further


class CommandParser(argparse.ArgumentParser):
    """A parser of a command, whose errors are one sentence."""

    def __init__(self, name: str, help: str, options: Iterable[Option]):
        super().__init__(
            f"nercc {name}".strip(),
            add_help=False,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        self.description, self.options = help, tuple(options)
        for each in self.options:
            each.add_to(self)
        self.add_argument("--help", action="help")

    def error(self, message: str) -> NoReturn:
        fail(message.removeprefix("argument "), 2)

    def format_help(self) -> str:
        panels: dict[str, list[tuple[str, str]]] = {}
        for each in self.options:
            panels.setdefault(each.panel, []).append(each.line())
        panels.setdefault("Options", []).append(("--help", "Show this message and exit."))
        return help_text(self.prog, str(self.description), panels)


def help_text(prog: str, help: str, panels: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """Return the help of a command: a line for each entry of each panel, names first."""
    width = max(shutil.get_terminal_size().columns, 60)
    lines = [f"Usage: {prog} [OPTIONS]", ""]
    for paragraph in inspect.cleandoc(help).split("\n\n"):
        lines.append(textwrap.fill(paragraph, width))
    lines.append("")
    for title, entries in panels.items():
        lines.append(f"{title}:")
        for names, text in entries:
            if text:
                text = f"  {names:<22}  {text}"
                lines.append(textwrap.fill(text, width, subsequent_indent=" " * 26))
        if listed := ", ".join(names for names, text in entries if not text):
            lines += textwrap.wrap(f"  {listed}, as there", width, break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def fail(message: str, code: int) -> NoReturn:
    """Print what went wrong, and end the command with an exit code."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def error_text(error: Exception) -> str:
    """Return an error's words, a file's name first."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


@contextlib.contextmanager
def of_option(option: str) -> Iterator[None]:
    """Have an error's message begin with the option that it is about."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"{option}: {error_text(error)}") from error
