"""Recipes of all shipped models, in one table."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from flax import nnx

from . import hybrid, lenet5, repvgg
from .augmentation import Augmentation


def _as_trained(model: nnx.Module) -> nnx.Module:
    return model


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run, so that the same recipe gives the same numbers.

    Attributes:
        name: The model's name.
        data: The data set's name.
        build: Makes the untrained model from Flax `rngs`.
        preprocess: Turns stored images (B, ...) into the model's float batch (B, *input_shape).
        input_shape: The shape of one preprocessed image.
        epochs: Epochs of training.
        learning_rate: The highest learning rate; it rises over `warmup_epochs` and falls to zero
            along a cosine.
        optimizer: "adamw" or "sgd".
        batch_size: Images in a batch.
        warmup_epochs: Epochs of the rise.
        weight_decay: Weight decay of kernels; biases and scales have none.
        label_smoothing: Share of each label that is spread over all classes.
        augmentation: Changes to the training images.
        keyed_epochs: The first epoch, counted from 0, and the one behind the last in which the
            model is called with `key=...`, for stochastic depth or the dropping of tokens.
        seed: Seed of all random numbers.
        deploy: Turns the trained model into the one that is shipped.
    """

    name: str
    data: str
    build: Callable[[nnx.Rngs], nnx.Module]
    preprocess: Callable[..., Any]
    input_shape: tuple[int, int, int]
    epochs: int
    learning_rate: float
    optimizer: Literal["adamw", "sgd"] = "adamw"
    batch_size: int = 128
    warmup_epochs: float = 1.0
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
    keyed_epochs: tuple[int, int] = (0, 0)
    seed: int = 0
    deploy: Callable[[Any], nnx.Module] = _as_trained

    def numbers(self) -> dict[str, Any]:
        """Return the recipe as plain JSON values: all but the model and the preprocessing."""
        functions = ("build", "deploy", "preprocess")
        fields = dataclasses.asdict(self)
        fields |= {n: list(fields[n]) for n in ("input_shape", "keyed_epochs")}
        return {name: value for name, value in fields.items() if name not in functions}


_RECIPES = (
    Recipe(
        name="lenet5-digits",
        data="digits",
        build=lambda rngs: lenet5.LeNet5(rngs=rngs),
        preprocess=lenet5.preprocess_digits,
        input_shape=lenet5.INPUT_SHAPE,
        epochs=60,
        batch_size=64,
        learning_rate=2e-3,
        warmup_epochs=3,
        weight_decay=1e-2,
        augmentation=Augmentation(padding=2),
    ),
    Recipe(
        name="lenet5-mnist",
        data="mnist",
        build=lambda rngs: lenet5.LeNet5(rngs=rngs),
        preprocess=lenet5.preprocess_mnist,
        input_shape=lenet5.INPUT_SHAPE,
        epochs=15,
        learning_rate=3e-3,
        weight_decay=1e-2,
        augmentation=Augmentation(padding=2),
    ),
    Recipe(
        name="repvgg-cifar10",
        data="cifar10",
        build=lambda rngs: repvgg.repvgg_cifar(rngs=rngs),
        deploy=repvgg.reparameterize,
        preprocess=repvgg.preprocess_cifar10,
        input_shape=repvgg.CIFAR_SHAPE,
        epochs=9,
        optimizer="sgd",
        batch_size=64,
        learning_rate=0.1,
        warmup_epochs=2,
        weight_decay=5e-4,
        label_smoothing=0.1,
        augmentation=Augmentation(padding=4, flip=True),
    ),
    Recipe(
        name="vit-cifar10",
        data="cifar10",
        build=lambda rngs: hybrid.hybrid_vit_cifar(rngs=rngs),
        deploy=hybrid.fold_stem,
        preprocess=repvgg.preprocess_cifar10,
        input_shape=repvgg.CIFAR_SHAPE,
        epochs=6,
        batch_size=64,
        learning_rate=1e-3,
        warmup_epochs=1,
        weight_decay=0.05,
        label_smoothing=0.1,
        keyed_epochs=(2, 5),  # half the tokens; the last epoch sees all of them again
        augmentation=Augmentation(padding=2, flip=True),
    ),
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _RECIPES}


def find_recipe(name: str) -> Recipe:
    """Return the recipe of that name; raise ValueError that lists the names otherwise."""
    if name not in RECIPES:
        raise ValueError(f"Unknown recipe {name!r}. Known: {', '.join(sorted(RECIPES))}.")
    return RECIPES[name]
