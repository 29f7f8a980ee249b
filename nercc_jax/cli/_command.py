"""Commands as Typer reads them, from the table of options, with a line of help for each option."""

import ast
import dataclasses
import functools
import importlib
import inspect
import itertools
import shutil
import textwrap
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from ._errors import report_errors
from ._options import PANELS, Command, Options, check_folder


def parameter(
    name: str, kind: Any, default: Any, help: str, panel: str, *names: str, **limits: Any
) -> inspect.Parameter:
    """Return an option as Typer reads it; its help ends with its choices and its default."""
    flag = f"--{name.replace('_', '-')}"
    names = names or (f"{flag}/--no-{flag[2:]}" if kind is bool else flag,)
    kinds = [each for each in (kind, *typing.get_args(kind)) if typing.get_origin(each) is Literal]
    shown = ["|".join(typing.get_args(each)) for each in kinds]
    if default is True:
        shown.append(f"default: {names[0].partition('/')[0]}")
    elif default or (default == 0 and default is not False):
        shown.append(f"default: {default}")
    text = f"{help} [{'; '.join(shown)}]" if shown else help
    further: dict[str, Any] = {"help": text, "rich_help_panel": panel, "show_default": False}
    made: Any = typer.Option(*names, **further, **limits)
    if names == ("argument",):
        made = typer.Argument(**further)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, made]
    )


@functools.cache
def _help_of_options() -> dict[str, str]:
    """Return the help of each option, which is the string below its field."""
    made: Any = ast.parse(inspect.getsource(Options)).body[0]
    found = {}
    for pair in itertools.pairwise(made.body):
        match pair:
            case ast.AnnAssign(target=field), ast.Expr(value=ast.Constant(value=str(text))):
                found[ast.unparse(field)] = " ".join(text.split())
    return found


def command_of(command: Command) -> Callable[..., None]:
    """Return a command, as Typer reads it, that passes its options to its function."""
    taken, first = [*command.first.split(), *command.further.split()], command.first.split()
    folders = {name for name, each in command.defaults.items() if not each.suffix}  # made if needed
    hints, panel, parameters = typing.get_type_hints(Options, include_extras=True), "", {}
    for field in dataclasses.fields(Options):
        panel = PANELS.get(field.name, panel)
        kind, further = hints[field.name], ()
        if typing.get_origin(kind) is Annotated:
            kind, *further = typing.get_args(kind)
        limits = further[0] if further and isinstance(further[0], dict) else {}
        names = command.names.get(field.name, () if limits else further)
        default = command.defaults.get(field.name, field.default)
        shown, help = "Options" if field.name in first else panel, _help_of_options()[field.name]
        made = parameter(field.name, kind, default, help, shown, *names, **limits)
        parameters[field.name] = made

    def call(**given: Any) -> None:
        with report_errors():
            options = Options(**given)
            for name in ("output", "plot", "numbers", "file"):
                if name not in folders:
                    check_folder(f"--{name}", given.get(name))
            file, _, name = command.function.partition(":")
            getattr(importlib.import_module(f".{file}", __package__), name)(options)

    call.__doc__ = command.help
    order = [*first, *(name for name in parameters if name in set(taken) - set(first))]
    signature = inspect.Signature([parameters[name] for name in order])
    call.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    return call


class PlainCommand(TyperCommand):
    """A command whose help has a line for each option, and whose messages are its own words.

    Typer prints "Value error, 'x' is not one of" and "Input should be a valid integer, unable to
    parse string as an integer". Its help has three lines for most options.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        width = max(shutil.get_terminal_size().columns, 60)
        formatter.write(f"Usage: {ctx.command_path} {' '.join(self.collect_usage_pieces(ctx))}\n\n")
        for paragraph in inspect.cleandoc(self.help or "").split("\n\n"):
            formatter.write(textwrap.fill(paragraph, width) + "\n\n")
        panels: dict[str, list[Any]] = {}
        for each in self.get_params(ctx):
            panels.setdefault(getattr(each, "rich_help_panel", None) or "Options", []).append(each)
        for panel, options in panels.items():
            formatter.write(f"{panel}:\n")
            for each in options:
                names = each.opts[0] if each.param_type_name == "argument" else ", ".join(
                    [*each.opts, *each.secondary_opts]
                )  # fmt: skip
                text = f"  {names:<22}  {getattr(each, 'help', None) or ''}"
                lines = textwrap.fill(text, width, subsequent_indent=" " * 26)
                formatter.write(lines + "\n")

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().make_context(*arguments, **options)
        except typer.BadParameter as error:
            found = getattr(error.__cause__, "errors", list)()  # Pydantic's, one for each fault
            if found:
                message, prefix = str(found[0]["msg"]), "Value error, "
                wanted = message.removeprefix("Input ").partition(",")[0]
                error.message = f"it {wanted}, not {found[0]['input']!r}"
                if message.startswith(prefix):
                    error.message = message.removeprefix(prefix)
            raise
