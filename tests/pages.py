"""What pages show: their blocks of code, and what `nercc` takes."""

import re

from conftest import require


def blocks(text: str, language: str) -> list[str]:
    """Of a page or docstring, those marked so, by a regular expression, to the end of the line."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def options_of(command: str) -> set[str]:
    """Of one of our commands, by its help's own list."""
    from nercc_jax import cli

    if command == "serve":
        require("starlette", "serve")
    return {flag for each in cli.options_of(command) for flag in each.flags} | {"--help"}
