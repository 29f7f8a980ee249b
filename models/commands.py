"""Options that the training commands share: folders, and numbers that replace a recipe's."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add_folders(parser: argparse.ArgumentParser, run: str) -> None:
    """Add the options for data, checkpoints and results; `run` is the run's name in the help."""
    parser.add_argument(
        "--data-dir", type=Path, help="folder with <data set>/train*.parquet; else the hub"
    )
    parser.add_argument(
        "--checkpoint-dir", type=Path, help=f"where the run's state is kept [checkpoints/{run}]"
    )
    parser.add_argument(
        "--output-dir", type=Path, help="where weights and card go [the checkpoint folder]"
    )


def given(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Return the options among `names` that were given, to replace a recipe's numbers."""
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def changed_options(recipe: Any, usual: Any, names: Sequence[str]) -> str:
    """Return the options that make `recipe` of the `usual` one, each with a space before it."""
    return "".join(
        f" --{name.replace('_', '-')} {getattr(recipe, name)}"
        for name in names
        if getattr(recipe, name) != getattr(usual, name)
    )
