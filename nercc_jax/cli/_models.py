"""`nercc models`: what is shipped, and what it scores."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ._errors import told_plainly
from ._options import check_folder
from ._tables import print_whole, write_json


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
    output: Annotated[
        Path | None, typer.Option(help="Where to write the table's numbers, as JSON.")
    ] = None,
) -> None:
    """List the shipped models with their scores, as their cards say or as measured now."""
    with told_plainly():
        check_folder("--output", output)
        _run(names, evaluate, data_dir, output)


def _run(
    names: list[str] | None, evaluate: bool, data_dir: Path | None, output: Path | None
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
    write_json(console, output, {"measured": evaluate}, rows)
