"""Train a student of a shipped model: `python -m nercc_models.distill lenet5-mnist`."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from .augmentation import Augmentation
from .cards import made_on, store, write_card
from .commands import add_folders, changed_options, given
from .data import load_data
from .distillation import Distilled, changed_image, distill, score_student
from .names import WEIGHTS_DIR
from .parity import fingerprint
from .progress import progress_bar
from .registry import ReadyModel, load_model
from .scoring import in_batches
from .students import Plan, Student, as_student, multiplications, student_name
from .weights import load_weights


@dataclasses.dataclass(frozen=True)
class StudentRecipe:
    """Everything that decides the training of a shipped model's student; see `distill`.

    `changes` are made to the inputs before they are mixed: padding and flips only.
    """

    base: str
    plan: Plan
    num_queries: int
    epochs: int
    learning_rate: float = 3e-3
    batch_size: int = 128
    mixed: float = 0.5
    changes: Augmentation = dataclasses.field(default_factory=Augmentation)
    seed: int = 0


_GREY, _COLOUR, _OUTPUTS = (32, 32, 1), (32, 32, 3), (10,)
_LENET = Plan("convolution", _GREY, _OUTPUTS, (11, 24), pool=2)
_RECIPES = (
    StudentRecipe(
        "lenet5-digits", _LENET, num_queries=20_000, epochs=40, changes=Augmentation(padding=2)
    ),
    StudentRecipe(
        "lenet5-mnist", _LENET, num_queries=180_000, epochs=12, changes=Augmentation(padding=1)
    ),
    StudentRecipe(
        "repvgg-cifar10",
        Plan("repvgg", _COLOUR, _OUTPUTS, (16, 32, 72), (2, 3)),
        num_queries=100_000,
        epochs=5,
        changes=Augmentation(padding=2, flip=True),
        mixed=0.4,
    ),
    StudentRecipe(
        "vit-cifar10",
        Plan("repvgg", _COLOUR, _OUTPUTS, (24, 40, 64), (2, 3)),
        num_queries=80_000,
        epochs=6,
        changes=Augmentation(padding=2, flip=True),
        mixed=0.4,
    ),
)
STUDENT_RECIPES: dict[str, StudentRecipe] = {recipe.base: recipe for recipe in _RECIPES}


def distill_shipped(
    recipe: StudentRecipe,
    base: ReadyModel,
    images: np.ndarray,
    **options: Any,
) -> Distilled:
    """Train the student of a shipped model on its data set's images, as they are stored."""
    how = recipe.changes
    x = in_batches(jax.jit(base.preprocess), images)
    return distill(
        base,
        recipe.plan.build(nnx.Rngs(recipe.seed)),
        x,
        seed=recipe.seed,
        num_queries=recipe.num_queries,
        epochs=recipe.epochs,
        learning_rate=recipe.learning_rate,
        batch_size=recipe.batch_size,
        mixed=recipe.mixed,
        change=partial(changed_image, how) if how != Augmentation() else None,
        numbers=_numbers(recipe),
        **options,
    )


def _numbers(recipe: StudentRecipe) -> dict[str, Any]:
    """Return the recipe as plain JSON values."""
    return {**dataclasses.asdict(recipe), "plan": recipe.plan.numbers()}


def write_student(
    path: str | Path,
    model: Callable[[Array], Array],
    plan: Plan,
    distilled: Distilled,
    test: Float[np.ndarray, "points ..."],
    about: dict[str, Any],
) -> tuple[Student, dict[str, Any]]:
    """Write a student's weights to `path`, `<name>.safetensors`, and its card next to them.

    Returns the student with the weights as they are stored (half precision), and the card.
    The card has the score on inputs `test`, the multiplications of both, and `about`, which names
    at least the `base`.
    """
    path = Path(path)
    network = plan.deployed(distilled.student)
    stored = store(path.parent, path.stem, nnx.split(network)[1])
    student = as_student(plan, about["base"], network)
    student = dataclasses.replace(student, state=load_weights(path, student.state))
    score = score_student(model, student, test)
    costs = [multiplications(each, plan.input_shape) for each in (model, student)]
    card = {
        "name": path.stem,
        **about,
        "plan": plan.numbers(),
        "score": dataclasses.asdict(score),
        "multiplications": costs[1],
        "base_multiplications": costs[0],
        "train_inputs": distilled.train_inputs,
        "held_out_inputs": distilled.held_out_inputs,
        **stored,
        "training_seconds": round(distilled.seconds, 1),
        "machine": made_on(),
        "history": distilled.history,
    }
    write_card(path.parent, card)
    return student, card


# The numbers of a recipe that options may replace.
_CHANGEABLE = ("num_queries", "epochs", "learning_rate", "batch_size", "mixed", "seed")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, or go on from the latest checkpoint, and write weights and card."""
    options = _parse(arguments)
    usual = STUDENT_RECIPES[options.base]
    recipe = dataclasses.replace(usual, **given(options, _CHANGEABLE))
    base, name = load_model(recipe.base), student_name(recipe.base)
    train_data = load_data(base.data, "train", data_dir=options.data_dir)
    test_data = load_data(base.data, "test", data_dir=options.data_dir)
    checkpoint_dir = options.checkpoint_dir or Path("checkpoints") / name
    with progress_bar(name, partial(_line, recipe.epochs)) as (on_step, on_epoch):
        distilled = distill_shipped(
            recipe,
            base,
            train_data.images,
            checkpoint_dir=checkpoint_dir,
            on_step=on_step,
            on_epoch=on_epoch,
        )
    path = (options.output_dir or checkpoint_dir) / f"{name}.safetensors"
    changed = changed_options(recipe, usual, _CHANGEABLE)
    about = {
        "base": recipe.base,
        "base_sha256": fingerprint(WEIGHTS_DIR / f"{recipe.base}.safetensors"),
        "made_by": f"python -m nercc_models.distill {recipe.base}{changed}",
        "data": base.data,
        "recipe": _numbers(recipe),
    }
    test = in_batches(jax.jit(base.preprocess), test_data.images)
    _, card = write_student(path, base, recipe.plan, distilled, test, about)
    print(summary(card))


def summary(card: dict[str, Any]) -> str:
    """Return the facts of a student's card in a sentence or two."""
    score, cost, base = card["score"], card["multiplications"], card["base_multiplications"]
    return (
        f"{card['name']}: agrees with {card['base']} on {score['agreement']:.2%} of "
        f"{score['total']} inputs that it was not trained on (relative error "
        f"{score['relative_mse']:.4f}), and on {score['mixed_agreement']:.2%} of as many sums of "
        f"them ({score['mixed_relative_mse']:.4f}), for {cost:,} of {base:,} multiplications "
        f"({cost / base:.1%})."
    )


def _line(epochs: int, entry: dict[str, Any]) -> str:
    return (
        f"epoch {entry['epoch']}/{epochs}  loss {entry['loss']:.4f}  held-out "
        f"{entry['relative_mse']:.4f}  mixed {entry['mixed_relative_mse']:.4f}  agreement "
        f"{entry['agreement']:.4f}  {entry['seconds']} s"
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nercc_models.distill",
        description="Train a student of a shipped model on its data set's images without labels. "
        "An interrupted run goes on where it was.",
    )
    parser.add_argument("base", choices=sorted(STUDENT_RECIPES), help="which model's student")
    add_folders(parser, "NAME-student")
    for name in _CHANGEABLE:
        kind = type(getattr(_RECIPES[0], name))
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help="the recipe's if unset")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
