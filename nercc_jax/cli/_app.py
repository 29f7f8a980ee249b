"""All commands under one name."""

import importlib.metadata
import sys
from typing import Annotated

import typer

from ._command import PlainCommand, command_of
from ._options import COMMANDS
from ._process import compile_plainly, keep_lapack_to_one_thread, keep_programs
from ._serve import serve_command

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
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
    compilation_cache: Annotated[
        bool,
        typer.Option(
            help="Keep compiled programs on disk, in JAX_COMPILATION_CACHE_DIR or in nercc_jax of "
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


for name, command in COMMANDS.items():
    app.command(name, cls=PlainCommand)(command_of(command))
app.command("serve", add_help_option=False, context_settings={"ignore_unknown_options": True})(
    serve_command
)
