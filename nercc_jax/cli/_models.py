"""`nercc models`: the shipped models and their scores. `nercc new-model`: a template for yours."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ._errors import report_errors
from ._options import check_folders
from ._output import print_whole, write_json

_TEMPLATE = Path(__file__).parent / "templates" / "new_model.txt"


def models(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names of models (default: all).")
    ] = None,
    evaluate: Annotated[
        bool,
        typer.Option(
            "--evaluate", help="Measure the accuracy now, on the test set; needs the data."
        ),
    ] = False,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with the data sets; not needed for the digits.")
    ] = None,
    numbers: Annotated[
        Path | None, typer.Option(help="JSON file for the table's numbers (default: none).")
    ] = None,
) -> None:
    """List the shipped models with their scores, as their cards say or as measured now."""
    with report_errors():
        check_folders(numbers=numbers)
        _run(names, evaluate, data_dir, numbers)


def _run(
    names: list[str] | None, evaluate: bool, data_dir: Path | None, numbers: Path | None
) -> None:
    from nercc_models.names import list_models, model_card

    console = Console()
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("model", "data", "input", "parameters", "kB"):
        table.add_column(column, no_wrap=True)
    table.add_column("accuracy, measured now" if evaluate else "accuracy, by its card")
    rows: list[dict[str, Any]] = []
    names = names or list(list_models())
    for name in track(names, "evaluating", console=console) if evaluate else names:
        card = model_card(name)
        score = card["score"]
        correct, total = score["correct"], score["total"]
        if evaluate:
            from nercc_models import evaluate_model

            now = evaluate_model(name, data_dir)
            correct, total = now.correct, now.total
        rows.append({"model": name, **card, "score": {"correct": correct, "total": total}})
        table.add_row(
            name,
            card["data"],
            "x".join(map(str, card["recipe"]["input_shape"])),
            f"{card['num_parameters']:,}",
            f"{card['bytes'] / 1000:.0f}",
            f"{100 * correct / total:.2f} % ({correct} of {total})",
        )
    print_whole(console, table)
    write_json(console, numbers, {"measured": evaluate}, rows)


def new_model_command(
    file: Annotated[Path, typer.Argument(help="The .py file to write.")] = Path("my_model.py"),
) -> None:
    """Write a file with a model that runs in every command, as a start for your own.

    Its comments say what a model must provide, and how each command uses it.
    """
    with report_errors():
        check_folders(file=file)
        if file.suffix != ".py" or not re.fullmatch(r"[A-Za-z_]\w*", file.stem):
            raise ValueError(f"{file}: the name of a module is needed, as my_model.py")
        if file.exists():
            raise ValueError(f"{file} is there already, and is left as it is")
        text = _TEMPLATE.read_text().format(module=file.stem, file=file.name)
        file.write_text(text)
        typer.echo(f"wrote {file}; try it from its folder: nercc demo --model {file.stem}:model")
