"""The shipped models by name, ready to run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from .data import load_data
from .names import WEIGHTS_DIR, check_model_name, read_card
from .recipes import RECIPES, Recipe
from .scoring import Score, score
from .weights import load_weights, num_parameters

Outputs: TypeAlias = Literal["logits", "probabilities"]


class ReadyModel(eqx.Module):
    """A trained model as a function of a batch: `model(images)` are the logits, or their softmax.

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
    outputs: Outputs = eqx.field(static=True, default="logits")

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch classes"]:
        """Return outputs of a preprocessed batch; raise ValueError for any other shape of image."""
        if images.ndim != 4 or tuple(images.shape[1:]) != self.input_shape:
            raise ValueError(
                f"{self.name} takes preprocessed images (B, {', '.join(map(str, self.input_shape))}"
                f"); got shape {tuple(images.shape)}. See its `preprocess`."
            )
        model: Any = nnx.merge(self.graphdef, self.state)
        logits = model(images)
        return jax.nn.softmax(logits) if self.outputs == "probabilities" else logits

    def images(
        self, split: str, data_dir: str | Path | None, count: int, seed: int
    ) -> tuple[Float[np.ndarray, "points ..."], Int[np.ndarray, " points"]]:
        """Return at most `count` preprocessed images of the model's data set, and their labels."""
        data = load_data(self.data, split, data_dir=data_dir)
        data = data.take(np.random.default_rng(seed).permutation(len(data))[:count])
        return np.asarray(self.preprocess(data.images)), data.labels

    @property
    def num_parameters(self) -> int:
        """Return the number of parameters."""
        return num_parameters(self.state)


class ParityModel(eqx.Module):
    """A model for sums of k inputs: maps them to about the sum of another model's k outputs.

    `network` has that model's form, and `outputs` says what of the model's is summed: its "logits",
    and the network's logits are the answer; or "probabilities", their softmax, and the answer is
    k softmax(logits / 2k), which has the right sum and the right range from the start.

    (A network that starts from the model's weights answers a sum of inputs with logits about k
    times too large, and a saturated softmax learns slowly. LeNet5 on MNIST, k = 2, agreement on
    held-out images: 92.7 % after three epochs with 2k, 91.8 % after six without it; at a lower
    learning rate 85 % after three without it, 56 % with linear answers.)
    """

    network: ReadyModel
    k: int = eqx.field(static=True)
    outputs: Outputs = eqx.field(static=True)

    def __call__(
        self, sums: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch classes"]:
        """About the sum of the k outputs, from the sum of k preprocessed images."""
        logits = self.network(sums)
        if self.outputs == "logits":
            return logits
        return self.k * jax.nn.softmax(logits / (2 * self.k))


def load_model(
    name: str, *, outputs: Outputs = "logits", weights_dir: str | Path = WEIGHTS_DIR
) -> ReadyModel:
    """Load a shipped model with its trained weights; see `ReadyModel`.

    To compile it, give JAX a function, `jax.jit(lambda images: model(images))`, or the model as an
    argument: `eqx.filter_jit(lambda model, images: model(images))`. `jax.jit(model)` asks for the
    hash of the model, and arrays have none.

    Args:
        name: One of `list_models()`.
        outputs: What the model returns: logits, or their softmax.
        weights_dir: The folder where a training of your own wrote `<name>.safetensors` and
            `<name>.json`. Default: the shipped weights.

    Raises:
        ValueError: The name is unknown; the message lists what exists.
        ImportError: safetensors is missing; the message names the extra.
    """
    check_model_name(name, weights_dir)
    return _ready(RECIPES[name], name, weights_dir, outputs)


def _ready(
    recipe: Recipe, file: str, weights_dir: str | Path, outputs: Outputs = "logits"
) -> ReadyModel:
    graphdef, blank = nnx.split(blank_model(recipe))
    card, path = read_card(file, weights_dir), Path(weights_dir) / f"{file}.safetensors"
    return ReadyModel(
        state=load_weights(path, blank, card.get("sha256")),
        graphdef=graphdef,
        name=file,
        data=recipe.data,
        input_shape=recipe.input_shape,
        classes=tuple(card["classes"]),
        preprocess=recipe.preprocess,
        outputs=outputs,
    )


def parity_name(base: str, k: int, outputs: str) -> str:
    """Return the name of a parity model, and of its files."""
    return f"{base}-parity-k{k}-{outputs}"


def list_parity_models(weights_dir: str | Path = WEIGHTS_DIR) -> tuple[tuple[str, int, str], ...]:
    """Return the (base model's name, k, outputs) that `load_parity_model` knows."""
    files = sorted(Path(weights_dir).glob("*-parity-k*.json"))
    cards = [read_card(path.stem, weights_dir) for path in files]
    return tuple((card["base"], card["k"], card["outputs"]) for card in cards)


def load_parity_model(
    name: str, k: int, outputs: Outputs, *, weights_dir: str | Path = WEIGHTS_DIR
) -> ParityModel:
    """Load the shipped parity model of a model by name, for k and its `outputs`; see `ParityModel`.

    `nercc_models.parity` trains others.

    Raises:
        ValueError: There is no such model; the message lists what exists.
    """
    file = _parity_file(name, k, outputs, weights_dir)
    return ParityModel(_ready(RECIPES[name], file, weights_dir), k, outputs)


def parity_card(
    name: str, k: int, outputs: str, *, weights_dir: str | Path = WEIGHTS_DIR
) -> dict[str, Any]:
    """Return the card of a shipped parity model: its making and its score."""
    return read_card(_parity_file(name, k, outputs, weights_dir), weights_dir)


def _parity_file(name: str, k: int, outputs: str, weights_dir: str | Path) -> str:
    known = list_parity_models(weights_dir)
    if (name, k, outputs) not in known:
        listed = "; ".join(f"{base}, k={k}, {outputs}" for base, k, outputs in known) or "none"
        raise ValueError(
            f"There is no parity model of {name!r} for k={k} and {outputs!r} in "
            f"{Path(weights_dir).resolve()}. Known: {listed}."
        )
    return parity_name(name, k, outputs)


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
    """Return the recipe's shipped form, in evaluation mode, with shapes in the place of arrays."""

    def build() -> nnx.Module:
        model = recipe.deploy(recipe.build(nnx.Rngs(0)))
        model.eval()
        return model

    return nnx.eval_shape(build)
