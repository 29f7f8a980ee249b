"""The options of `nercc serve`: one for each setting, made from the settings themselves."""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from ..serving._settings import ModelSettings, ServerSettings


def with_settings(function: Callable[..., None]) -> Callable[..., None]:
    """The function, in place of whose `**flags` Typer sees an option for each setting.

    It is called with what the command line has, and nothing else.
    """

    @functools.wraps(function)
    def summary(ctx: Any, **arguments: Any) -> None:
        on_line = {n for n in arguments if ctx.get_parameter_source(n).name == "COMMANDLINE"}
        function(**{name: arguments[name] for name in on_line})

    signature = inspect.signature(function)
    *own, flags = signature.parameters.values()
    assert flags.kind is inspect.Parameter.VAR_KEYWORD
    settings = itertools.chain(_options(ModelSettings), _options(ServerSettings))
    made = [option for option in settings if option.name not in _ELSEWHERE]
    ctx = inspect.Parameter("ctx", _KEYWORD, annotation=typer.Context)
    summary.__signature__ = signature.replace(parameters=[*own, *made, ctx])  # pyright: ignore
    return summary


_KEYWORD = inspect.Parameter.KEYWORD_ONLY
# Models are named by `--model`; what is told of all of them are the flags themselves.
_ELSEWHERE = {"model", "models", "defaults"}


def _options(settings: type[BaseModel]) -> Iterator[inspect.Parameter]:
    """Keyword parameters for all settings, as Typer reads them."""
    panel = None
    for name, field in settings.model_fields.items():
        panel = settings.panels.get(name, panel)  # pyright: ignore[reportAttributeAccessIssue]
        option = typer.Option(help=field.description, rich_help_panel=panel)
        kind, default = field.annotation, field.default
        if _reads_text(field):
            kind, default = str, default or None
        yield inspect.Parameter(name, _KEYWORD, default=default, annotation=Annotated[kind, option])


def _reads_text(field: FieldInfo) -> bool:
    """Whether the setting makes of a text itself what Typer could not."""
    return any(isinstance(each, BeforeValidator) for each in field.metadata)
