"""`nercc models` lists shipped models and their scores; `nercc new-model` writes a template."""

import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from nercc_models.names import list_models, model_card

from ..evaluation.tables import text_table
from ._options import Options
from ._output import show, write_json


def models(options: Options) -> None:
    """List the shipped models with their accuracy, from their cards or measured now."""
    console, rows = Console(), []
    score = "accuracy, measured now" if options.evaluate else "accuracy, by its card"
    table: list[Sequence[str]] = [("model", "data", "input", "parameters", "kB", score)]
    names = options.names or list(list_models())
    for name in track(names, "evaluating", console=console) if options.evaluate else names:
        card = model_card(name)
        correct, total = card["score"]["correct"], card["score"]["total"]
        if options.evaluate:
            from nercc_models import evaluate_model

            now = evaluate_model(name, options.data_dir)
            correct, total = now.correct, now.total
        rows.append({"model": name, **card, "score": {"correct": correct, "total": total}})
        shape = "x".join(map(str, card["recipe"]["input_shape"]))
        size = f"{card['num_parameters']:,}", f"{card['bytes'] / 1000:.0f}"
        share = f"{100 * correct / total:.2f} % ({correct} of {total})"
        table.append((name, card["data"], shape, *size, share))
    show(console, text_table(table, left=6))
    write_json(console, options.numbers, {"measured": options.evaluate}, rows)


def new_model(options: Options) -> None:
    """Write a file with a model that runs in every command, as a template for your own.

    Its comments explain what a model must provide, and how each command uses it.
    """
    file = options.file
    if file.suffix != ".py" or not re.fullmatch(r"[A-Za-z_]\w*", file.stem):
        raise ValueError(f"{file}: the name of a module is needed, as my_model.py")
    if file.exists():
        raise ValueError(f"{file} is there already, and is left as it is")
    template = Path(__file__).parent / "templates" / "new_model.txt"
    file.write_text(template.read_text().format(module=file.stem, file=file.name))
    print(f"wrote {file}; try it from its folder: nercc demo --model {file.stem}:model")
