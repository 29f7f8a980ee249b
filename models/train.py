"""Train a recipe and write its weights: `python -m nercc_models.train lenet5-digits`."""

import argparse
import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flax import nnx

from .cards import made_on, store, write_card
from .checkpoints import Checkpoints
from .commands import add_folders, changed_options, given
from .data import Data, load_data
from .progress import progress_bar
from .recipes import RECIPES, Recipe, find_recipe
from .registry import evaluate_model
from .training import Trained, train

# The numbers of a recipe that options may replace.
_CHANGEABLE = ("epochs", "seed", "learning_rate", "warmup_epochs")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, or go on from the latest checkpoint, and write weights and card."""
    options = _parse(arguments)
    recipe = find_recipe(options.recipe)
    recipe = dataclasses.replace(recipe, **given(options, _CHANGEABLE))
    train_data = load_data(recipe.data, "train", data_dir=options.data_dir)
    test_data = load_data(recipe.data, "test", data_dir=options.data_dir)
    checkpoint_dir = options.checkpoint_dir or Path("checkpoints") / recipe.name
    with progress_bar(recipe.name, partial(_line, recipe.epochs)) as (on_step, on_epoch):
        trained = train(
            recipe,
            train_data,
            test_data,
            checkpoint_dir=checkpoint_dir,
            start_from=options.start_from,
            on_step=on_step,
            on_epoch=on_epoch,
        )
    folder = options.output_dir or checkpoint_dir
    write_model(recipe, trained, train_data, folder, Checkpoints(options.start_from).log())
    result = evaluate_model(recipe.name, options.data_dir, weights_dir=folder)
    print(
        f"{recipe.name}: {result.correct} of {result.total} test images are right "
        f"({result.accuracy:.2%}), with the weights as stored in {folder}."
    )


def write_model(
    recipe: Recipe, trained: Trained, data: Data, folder: str | Path, earlier: dict[str, Any]
) -> None:
    """Write `<name>.safetensors` (half precision, deploy form) and the card `<name>.json`.

    `earlier` is the log of the run whose weights this one started from, or empty.
    """
    state = nnx.split(recipe.deploy(trained.model))[1]
    card = {
        "name": recipe.name,
        "made_by": _command(recipe),
        "data": recipe.data,
        "train_images": len(data),
        "classes": list(data.classes),
        "score": {**dataclasses.asdict(trained.score), "accuracy": trained.score.accuracy},
        **store(folder, recipe.name, state),
        "training_seconds": round(trained.seconds + _seconds(earlier), 1),
        "machine": made_on(),
        "recipe": recipe.numbers(),
        "history": trained.history,
    }
    if earlier:
        card["started_from"] = {name: earlier[name] for name in ("recipe", "history")}
    write_card(folder, card)


def _command(recipe: Recipe) -> str:
    """Return the command that makes this model again, whatever the recipes' defaults are."""
    usual = RECIPES[recipe.name]
    changed = changed_options(recipe, usual, _CHANGEABLE)
    return f"python -m nercc_models.train {recipe.name}{changed}"


def _seconds(log: dict[str, Any]) -> float:
    return sum(entry["seconds"] for entry in log.get("history", []))


def _line(epochs: int, entry: dict[str, Any]) -> str:
    return (
        f"epoch {entry['epoch']}/{epochs}  loss {entry['loss']:.4f}  "
        f"train {entry['train_accuracy']:.4f}  "
        f"test {entry['test_correct']}/{entry['test_total']}  {entry['seconds']} s"
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nercc_models.train",
        description="Train a model from its recipe. An interrupted run goes on where it was.",
    )
    parser.add_argument("recipe", choices=sorted(RECIPES), help="which model")
    add_folders(parser, "RECIPE")
    parser.add_argument("--epochs", type=int, help="another number of epochs than the recipe's")
    parser.add_argument("--seed", type=int, help="another seed than the recipe's")
    parser.add_argument("--learning-rate", type=float, help="another peak than the recipe's")
    parser.add_argument("--warmup-epochs", type=float, help="another warm-up than the recipe's")
    parser.add_argument(
        "--start-from", type=Path, help="checkpoint folder of a run whose weights to start from"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
