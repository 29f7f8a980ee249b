"""Train a parity model: `python -m nercc_models.parity lenet5-mnist --k 2 --outputs logits`.

A parity model maps the sum of k inputs to the sum of a base model's k outputs. Where one of the k
outputs is missing, the parity model's answer minus the others takes its place. It has the base
model's architecture, starts from its weights, and learns from its outputs alone.

Source: Kosaian, Rashmi and Venkataraman 2019, "Parity Models: Erasure-Coded Resilience for
Prediction Serving Systems", SOSP.
"""

import argparse
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from .cards import made_on, store, write_card
from .checkpoints import Checkpoints
from .commands import add_folders, changed_options, given
from .data import Data, load_data
from .names import WEIGHTS_DIR, list_models
from .progress import progress_bar
from .registry import Outputs, ParityModel, ReadyModel, load_model, parity_name
from .scoring import in_batches
from .training import TrainState, batch_indices, cosine_schedule, run_epochs
from .weights import load_weights


@dataclasses.dataclass(frozen=True)
class ParityRecipe:
    """Everything that decides the training of a parity model.

    An epoch cuts the training images into new random k-tuples. The optimizer is Adam.

    Attributes:
        base: The base model's name.
        k: The number of inputs that are summed.
        outputs: What of the base model is summed, its logits or their softmax.
        epochs: Epochs of training.
        learning_rate: The highest learning rate; it rises over `warmup_epochs` and falls to zero
            along a cosine.
        warmup_epochs: Epochs of the rise.
        batch_size: Tuples in a batch.
        held_out: The share of the images that training never sees, and on which its numbers may be
            chosen.
        seed: Seed of all random numbers.
    """

    base: str
    k: int
    outputs: Outputs
    epochs: int = 20
    learning_rate: float = 1e-3
    warmup_epochs: float = 0.5
    batch_size: int = 64
    held_out: float = 0.05
    seed: int = 0

    def __post_init__(self):
        if self.k < 2:
            raise ValueError(f"A parity model is for the sum of 2 or more inputs, not {self.k}.")

    @property
    def name(self) -> str:
        """Return the name of the model's files."""
        return parity_name(self.base, self.k, self.outputs)


@dataclasses.dataclass(frozen=True)
class ParityScore:
    """Scores of a parity model that rebuilds missing outputs, each of `total` images missing once.

    The images are in random k-tuples.

    Attributes:
        correct: Rebuilt outputs whose largest entry is at the image's label.
        agreeing: Rebuilt outputs whose largest entry is where the base model's is.
        base_correct: Outputs of the base model whose largest entry is at the label.
        total: Images.
        mse: Mean of (rebuilt - base model's)^2 over images and outputs.
        relative_mse: `mse` over the variance of the base model's outputs.
    """

    correct: int
    agreeing: int
    base_correct: int
    total: int
    mse: float
    relative_mse: float

    @property
    def accuracy(self) -> float:
        """Return the share of rebuilt outputs that are right."""
        return self.correct / self.total

    @property
    def agreement(self) -> float:
        """Return the share of rebuilt outputs with the base model's label."""
        return self.agreeing / self.total

    def numbers(self) -> dict[str, Any]:
        """Return all of it as plain JSON values."""
        ratios = {"accuracy": self.accuracy, "agreement": self.agreement}
        return {**dataclasses.asdict(self), **ratios}


def base_outputs(base: ReadyModel, data: Data, outputs: Outputs) -> Float[np.ndarray, "images m"]:
    """Return the base model's logits or probabilities on all images."""

    @eqx.filter_jit
    def run(model: ReadyModel, images: Array) -> Array:
        logits = model(model.preprocess(images))
        return jax.nn.softmax(logits) if outputs == "probabilities" else logits

    return in_batches(partial(run, base), data.images)


def summed(
    preprocess: Callable[..., Array], images: Array
) -> Float[Array, "tuples height width channels"]:
    """Return sums of the preprocessed images of each k-tuple: (B, k, ...) to (B, ...)."""
    flat = preprocess(images.reshape(-1, *images.shape[2:]))
    return flat.reshape(*images.shape[:2], *flat.shape[1:]).sum(axis=1)


def score_parity(
    parity: ParityModel, data: Data, outputs: Float[np.ndarray, "images m"], *, seed: int = 0
) -> ParityScore:
    """Score a parity model on `data`, with the base model's outputs on it.

    A remainder of images that fills no k-tuple is left out. Raises `ValueError` for fewer than k.
    """
    k = parity.k
    if len(data) < k:
        raise ValueError(f"{len(data)} images make no tuple of {k}.")
    tuples = batch_indices(seed, 0, len(data), len(data) // k * k).reshape(-1, k)
    run = eqx.filter_jit(lambda model, images: model(summed(model.network.preprocess, images)))
    answers = in_batches(partial(run, parity), data.images[tuples], 100)
    known, labels = outputs[tuples], data.labels[tuples]
    errors = answers - known.sum(axis=1)
    rebuilt = known + errors[:, None]  # the answer minus the k - 1 others
    guesses, wanted = rebuilt.argmax(axis=-1), known.argmax(axis=-1)
    mse = float(np.mean(errors**2))
    return ParityScore(
        correct=int(np.sum(guesses == labels)),
        agreeing=int(np.sum(guesses == wanted)),
        base_correct=int(np.sum(wanted == labels)),
        total=tuples.size,
        mse=mse,
        relative_mse=mse / _variance(outputs),
    )


@dataclasses.dataclass(frozen=True)
class TrainedParity:
    """A trained parity model in float32, its history by epoch, and its numbers of images."""

    model: ParityModel
    history: tuple[dict[str, Any], ...]
    train_images: int
    held_out_images: int


def train_parity(
    recipe: ParityRecipe,
    base: ReadyModel,
    data: Data,
    *,
    checkpoint_dir: str | Path | None = None,
    on_step: Callable[[int, int], None] = lambda step, total: None,
    on_epoch: Callable[[dict[str, Any]], None] = lambda entry: None,
) -> TrainedParity:
    """Train a parity model of `base`, or go on from the latest checkpoint.

    The loss is the mean squared error over the variance that sums of k outputs have, so that one
    learning rate suits logits and probabilities. The base model's outputs are computed once.

    Raises `ValueError` when a batch of tuples is more than the training images, or the held-out
    ones make no tuple. `checkpoint_dir`, `on_step`, `on_epoch`: see `training.train`.
    """
    held_out, images = _split(recipe, data)
    steps_per_epoch = len(images) // (recipe.batch_size * recipe.k)
    if steps_per_epoch < 1:
        raise ValueError(
            f"A batch of {recipe.batch_size} times {recipe.k} is more than the {len(images)} "
            "training images."
        )
    targets = base_outputs(base, images, recipe.outputs)
    held_out_outputs = base_outputs(base, held_out, recipe.outputs)
    schedule = cosine_schedule(
        recipe.learning_rate, recipe.warmup_epochs, recipe.epochs, steps_per_epoch
    )
    optimizer = optax.adam(schedule)
    params: Any = jax.tree.map(jnp.array, base.state)  # a copy: a step frees its input's memory
    state = TrainState(params, nnx.State({}), optimizer.init(params), jnp.zeros(1))

    def parity_model(params: nnx.State) -> ParityModel:
        network = dataclasses.replace(base, state=params, name=recipe.name)
        return ParityModel(network, recipe.k, recipe.outputs)

    step_fn = _make_step(parity_model, base.preprocess, optimizer, recipe.k * _variance(targets))

    def step(state: TrainState, number: int) -> TrainState:
        size = recipe.batch_size * recipe.k
        chosen = batch_indices(recipe.seed, number, len(images), size)
        chosen = chosen.reshape(recipe.batch_size, recipe.k)
        return step_fn(state, images.images[chosen], targets[chosen].sum(axis=1))

    def report(state: TrainState, means: list[float]) -> dict[str, Any]:
        score = score_parity(parity_model(state.params), held_out, held_out_outputs)
        return {
            "loss": means[0],
            "held_out_loss": score.relative_mse / recipe.k,
            "held_out_agreement": score.agreement,
        }

    state, history = run_epochs(
        step,
        report,
        state,
        epochs=recipe.epochs,
        steps_per_epoch=steps_per_epoch,
        checkpoints=Checkpoints(checkpoint_dir, dataclasses.asdict(recipe)),
        on_step=on_step,
        on_epoch=on_epoch,
    )
    return TrainedParity(parity_model(state.params), history, len(images), len(held_out))


def _split(recipe: ParityRecipe, data: Data) -> tuple[Data, Data]:
    """Return the held-out images, at random, and the others."""
    count = round(recipe.held_out * len(data))
    if count < recipe.k:
        raise ValueError(
            f"held_out={recipe.held_out} of {len(data)} images are {count}: they make no tuple of "
            f"{recipe.k}."
        )
    data = data.shuffled(recipe.seed)
    return data.take(slice(count)), data.take(slice(count, None))


def _variance(outputs: Float[np.ndarray, "images m"]) -> float:
    """Return the mean over outputs of their variance over images."""
    return float(np.mean(np.var(outputs, axis=0)))


def _make_step(
    parity_model: Callable[[nnx.State], ParityModel],
    preprocess: Callable[..., Array],
    optimizer: optax.GradientTransformation,
    scale: float,
) -> Callable[[TrainState, np.ndarray, np.ndarray], TrainState]:
    """Return a jitted step: (state, stored images (B, k, ...), sums of outputs (B, m)) -> state."""

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, images: Array, targets: Array) -> TrainState:
        sums = summed(preprocess, images)

        def loss_fn(params: nnx.State) -> Array:
            return jnp.mean((parity_model(params)(sums) - targets) ** 2) / scale

        loss, gradient = jax.value_and_grad(loss_fn)(state.params)
        updates, moments = optimizer.update(gradient, state.optimizer, state.params)  # pyright: ignore
        params: Any = optax.apply_updates(state.params, updates)  # pyright: ignore
        return TrainState(params, state.rest, moments, state.totals + loss)

    return step


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, or go on from the latest checkpoint, and write weights and card."""
    options = _parse(arguments)
    recipe = _recipe(options)
    base = load_model(recipe.base)
    train_data = load_data(base.data, "train", data_dir=options.data_dir)
    test_data = load_data(base.data, "test", data_dir=options.data_dir)
    checkpoint_dir = options.checkpoint_dir or Path("checkpoints") / recipe.name
    with progress_bar(recipe.name, partial(_line, recipe.epochs)) as (on_step, on_epoch):
        trained = train_parity(
            recipe,
            base,
            train_data,
            checkpoint_dir=checkpoint_dir,
            on_step=on_step,
            on_epoch=on_epoch,
        )
    folder = options.output_dir or checkpoint_dir
    score = write_parity_model(recipe, base, trained, test_data, folder)
    print(
        f"{recipe.name}: of {score.total} test images, rebuilt one at a time, {score.accuracy:.2%} "
        f"are right (base model: {score.base_correct / score.total:.2%}) and {score.agreement:.2%} "
        f"agree with the base model, with the weights as stored in {folder}."
    )


def write_parity_model(
    recipe: ParityRecipe, base: ReadyModel, trained: TrainedParity, test: Data, folder: str | Path
) -> ParityScore:
    """Write `<name>.safetensors` (half precision) and the card `<name>.json`; return the score.

    The score is that of the weights as they are stored.
    """
    network = trained.model.network
    stored = store(folder, recipe.name, network.state)
    state = load_weights(Path(folder) / f"{recipe.name}.safetensors", network.state)
    model = dataclasses.replace(trained.model, network=dataclasses.replace(network, state=state))
    score = score_parity(model, test, base_outputs(base, test, recipe.outputs))
    card = {
        "name": recipe.name,
        "base": recipe.base,
        "base_sha256": fingerprint(WEIGHTS_DIR / f"{recipe.base}.safetensors"),
        "k": recipe.k,
        "outputs": recipe.outputs,
        "made_by": _command(recipe),
        "data": base.data,
        "train_images": trained.train_images,
        "held_out_images": trained.held_out_images,
        "classes": list(base.classes),
        "score": score.numbers(),
        **stored,
        "training_seconds": round(sum(entry["seconds"] for entry in trained.history), 1),
        "machine": made_on(),
        "recipe": dataclasses.asdict(recipe),
        "history": trained.history,
    }
    write_card(folder, card)
    return score


def fingerprint(path: Path) -> str:
    """Return a file's SHA-256: a parity model is good for the very weights that it learned from."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# The numbers of a recipe that options may replace.
_CHANGEABLE = ("epochs", "learning_rate", "warmup_epochs", "batch_size", "held_out", "seed")


def _recipe(options: argparse.Namespace) -> ParityRecipe:
    changes = given(options, _CHANGEABLE)
    return ParityRecipe(options.base, options.k, options.outputs, **changes)


def _command(recipe: ParityRecipe) -> str:
    usual = ParityRecipe(recipe.base, recipe.k, recipe.outputs)
    changed = changed_options(recipe, usual, _CHANGEABLE)
    required = f"{recipe.base} --k {recipe.k} --outputs {recipe.outputs}"
    return f"python -m nercc_models.parity {required}{changed}"


def _line(epochs: int, entry: dict[str, Any]) -> str:
    return (
        f"epoch {entry['epoch']}/{epochs}  loss {entry['loss']:.4f}  held-out "
        f"{entry['held_out_loss']:.4f}  agreement {entry['held_out_agreement']:.4f}  "
        f"{entry['seconds']} s"
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nercc_models.parity",
        description="Train a parity model of a shipped model: sums of k inputs to sums of its "
        "outputs. An interrupted run goes on where it was.",
    )
    parser.add_argument("base", choices=list_models(), help="which model it is the parity of")
    parser.add_argument("--k", type=int, required=True, help="how many inputs are summed")
    parser.add_argument(
        "--outputs",
        choices=["logits", "probabilities"],
        required=True,
        help="which outputs of the model are summed",
    )
    add_folders(parser, "NAME")
    for name in _CHANGEABLE:
        default = getattr(ParityRecipe, name)
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(default), help=f"[{default}]")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
