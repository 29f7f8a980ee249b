"""All commands under one name."""

import importlib.metadata
import sys
from typing import Annotated

import typer

from ._compiled import keep_programs_of_commands
from ._demo import demo
from ._distill import distill_command
from ._models import models
from ._new_model import new_model_command
from ._plan import plan_command
from ._run import run_command
from ._serve import serve_command
from ._tune import tune_command

app = typer.Typer(
    help="Coded computing for model serving: no straggler slows a batch down.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> bool:
    if asked:
        typer.echo(f"nercc {importlib.metadata.version('nercc-jax')}")
        raise typer.Exit
    return asked


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Say which."),
    ] = False,
    compilation_cache: Annotated[
        bool,
        typer.Option(
            help="Whether compiled programs are kept, in JAX_COMPILATION_CACHE_DIR or the user's "
            "cache folder, nercc_jax. Of `serve` it is a setting."
        ),
    ] = True,
) -> None:
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    if compilation_cache and command != "serve":
        keep_programs_of_commands()


app.command()(demo)
app.command("distill")(distill_command)
app.command()(models)
app.command("new-model")(new_model_command)
app.command("plan")(plan_command)
app.command("run")(run_command)
app.command("serve", add_help_option=False, context_settings={"ignore_unknown_options": True})(
    serve_command
)
app.command("tune")(tune_command)
