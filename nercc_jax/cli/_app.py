"""All commands under one name."""

import importlib.metadata
import sys
from typing import Annotated

import typer

from ._demo import demo
from ._distill import distill_command
from ._errors import PlainCommand
from ._models import models, new_model_command
from ._options import option
from ._plan import plan_command
from ._process import compile_plainly, keep_lapack_to_one_thread, keep_programs
from ._run import run_command
from ._serve import serve_command
from ._tune import tune_command

app = typer.Typer(
    help="Coded computing: approximate predictions from whichever workers answered.",
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
        option("Print the version.", None, "--version", callback=_print_version, is_eager=True),
    ] = False,
    compilation_cache: Annotated[
        bool,
        option(
            "Keep compiled programs on disk, in JAX_COMPILATION_CACHE_DIR or in nercc_jax of "
            "the user's cache folder. For `serve` it is a setting."
        ),
    ] = True,
) -> None:
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    if compilation_cache and command != "serve":
        keep_programs()
    if command in ("demo", "distill", "plan", "run", "tune"):
        compile_plainly()
    keep_lapack_to_one_thread()


for name, command in (
    ("demo", demo),
    ("distill", distill_command),
    ("models", models),
    ("new-model", new_model_command),
    ("plan", plan_command),
    ("run", run_command),
    ("tune", tune_command),
):
    app.command(name, cls=PlainCommand)(command)
app.command("serve", add_help_option=False, context_settings={"ignore_unknown_options": True})(
    serve_command
)
