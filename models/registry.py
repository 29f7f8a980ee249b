"""The shipped models by name, ready to run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
from flax import nnx
from jaxtyping import Array, Float

from .data import load_data
from .recipes import RECIPES, Recipe
from .scoring import Score, score
from .weights import load_weights, num_parameters

WEIGHTS_DIR = Path(__file__).parent / "weights"


class ReadyModel(eqx.Module):
    """A trained model as a function of a batch: `model(images)` are the logits.

    A pytree whose leaves are the model's arrays: pass it through `jax.jit` as an argument, and
    `jax.grad` with respect to it is the gradient in the parameters. `preprocess` makes the float32
    batch (B, *input_shape) out of images as `load_data(model.data)` gives them, and `classes` are
    the names of the labels. `model_card(name)` says how it was made and what it scores.
    """

    state: nnx.State
    graphdef: Any = eqx.field(static=True)
    name: str = eqx.field(static=True)
    data: str = eqx.field(static=True)
    input_shape: tuple[int, int, int] = eqx.field(static=True)
    classes: tuple[str, ...] = eqx.field(static=True)
    preprocess: Callable[..., Float[Array, "batch height width channels"]] = eqx.field(static=True)

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch classes"]:
        """Logits of a preprocessed batch. Raises `ValueError` for any other shape of image."""
        if images.ndim != 4 or tuple(images.shape[1:]) != self.input_shape:
            raise ValueError(
                f"{self.name} takes preprocessed images (B, {', '.join(map(str, self.input_shape))}"
                f"); got shape {tuple(images.shape)}. See its `preprocess`."
            )
        model: Any = nnx.merge(self.graphdef, self.state)
        return model(images)

    @property
    def num_parameters(self) -> int:
        return num_parameters(self.state)


def list_models(weights_dir: str | Path = WEIGHTS_DIR) -> tuple[str, ...]:
    """The names that `load_model` knows: the recipes whose weights are in `weights_dir`."""
    folder = Path(weights_dir)
    return tuple(name for name in RECIPES if (folder / f"{name}.safetensors").is_file())


def load_model(name: str, *, weights_dir: str | Path = WEIGHTS_DIR) -> ReadyModel:
    """A shipped model with its trained weights; see `ReadyModel`.

    `weights_dir` is where a training of your own wrote `<name>.safetensors` and `<name>.json`.
    Raises `ValueError`, listing what exists, for an unknown name, and `ImportError` naming the
    extra when safetensors is missing.
    """
    _check_name(name, weights_dir)
    recipe = RECIPES[name]
    graphdef, blank = nnx.split(blank_model(recipe))
    return ReadyModel(
        state=load_weights(Path(weights_dir) / f"{name}.safetensors", blank),
        graphdef=graphdef,
        name=name,
        data=recipe.data,
        input_shape=recipe.input_shape,
        classes=tuple(model_card(name, weights_dir=weights_dir)["classes"]),
        preprocess=recipe.preprocess,
    )


def model_card(name: str, *, weights_dir: str | Path = WEIGHTS_DIR) -> dict[str, Any]:
    """How a shipped model was made, on which data, what it scores; the JSON beside its weights."""
    _check_name(name, weights_dir)
    return json.loads((Path(weights_dir) / f"{name}.json").read_text())


def evaluate_model(
    name: str,
    data_dir: str | Path | None = None,
    *,
    split: str = "test",
    weights_dir: str | Path = WEIGHTS_DIR,
) -> Score:
    """Accuracy and counts of a shipped model on its own data set; `data_dir` as in `load_data`."""
    model = load_model(name, weights_dir=weights_dir)
    classify = eqx.filter_jit(lambda model, images: model(model.preprocess(images)))
    data = load_data(model.data, split, data_dir=data_dir)
    return score(lambda images: classify(model, images), data)


def blank_model(recipe: Recipe) -> nnx.Module:
    """The recipe's shipped form, in evaluation mode, with shapes in the place of arrays."""

    def build() -> nnx.Module:
        model = recipe.deploy(recipe.build(nnx.Rngs(0)))
        model.eval()
        return model

    return nnx.eval_shape(build)


def _check_name(name: str, weights_dir: str | Path) -> None:
    known = list_models(weights_dir)
    if name not in known:
        raise ValueError(
            f"There is no model {name!r} in {Path(weights_dir).resolve()}. "
            f"Known: {', '.join(known) or 'none'}."
        )
