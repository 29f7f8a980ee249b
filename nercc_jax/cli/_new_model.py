"""`nercc new-model`: a file to begin a model of your own with."""

import re
from pathlib import Path
from typing import Annotated

import typer

from ._errors import told_plainly
from ._options import check_folder

_TEMPLATE = Path(__file__).parent / "templates" / "new_model.txt"


def new_model_command(
    file: Annotated[Path, typer.Argument(help="What to write, a .py file.")] = Path("my_model.py"),
) -> None:
    """Write a file with a model that runs in every command, to put your own into.

    It says what a model of your own owes, and how each command takes it.
    """
    with told_plainly():
        check_folder("FILE", file)
        if file.suffix != ".py" or not re.fullmatch(r"[A-Za-z_]\w*", file.stem):
            raise ValueError(f"{file}: the name of a module is needed, as my_model.py")
        if file.exists():
            raise ValueError(f"{file} is there already, and is left as it is")
        text = _TEMPLATE.read_text().format(module=file.stem, file=file.name)
        file.write_text(text)
        typer.echo(f"wrote {file}; try it from its folder: nercc demo --model {file.stem}:model")
