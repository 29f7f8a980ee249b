"""What pages show: their blocks of code, and what `nercc` takes."""

import re

from conftest import require


def blocks(text: str, language: str) -> list[str]:
    """Of a page or docstring, those marked so, by a regular expression, to the end of the line."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def options_of(command: str) -> set[str]:
    """Of one of our commands, by its help's own list."""
    import typer

    from nercc_jax.cli._app import app

    if command == "serve":
        require("fastapi", "serve")
        from nercc_jax.cli._serve import command_with_options

        parameters = command_with_options().params
    else:
        parameters = typer.main.get_command(app).commands[command].params
    return {name for each in parameters for name in each.opts}
