"""`nercc models`: what is shipped, and what it scores."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ._errors import told_plainly


def models(
    names: Annotated[
        list[str] | None, typer.Argument(help="Which models; all unless given.")
    ] = None,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Run each model on its test set; needs the data.")
    ] = False,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with the data sets; not needed for the digits.")
    ] = None,
) -> None:
    """List the shipped models with their scores, as their cards say or as measured now."""
    with told_plainly():
        _run(names, evaluate, data_dir)


def _run(names: list[str] | None, evaluate: bool, data_dir: Path | None) -> None:
    from nercc_models.names import list_models, model_card

    console = Console()
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("model", "data", "input", "parameters", "kB"):
        table.add_column(column)
    table.add_column("accuracy, measured now" if evaluate else "accuracy, by its card")
    names = names or list(list_models())
    for name in track(names, "evaluating", console=console) if evaluate else names:
        card = model_card(name)
        score = card["score"]
        correct, total = score["correct"], score["total"]
        if evaluate:
            from nercc_models import evaluate_model

            now = evaluate_model(name, data_dir)
            correct, total = now.correct, now.total
        table.add_row(
            name,
            card["data"],
            "x".join(map(str, card["recipe"]["input_shape"])),
            f"{card['num_parameters']:,}",
            f"{card['bytes'] / 1000:.0f}",
            f"{100 * correct / total:.2f} % ({correct} of {total})",
        )
    console.print(table)
