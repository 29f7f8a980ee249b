"""Training loops: optax, a checkpoint an epoch, exact resumption.

Batch order and augmentation derive from (seed, step) alone, never from a running generator, so an
interrupted run that resumes from a checkpoint ends at the same numbers as one that was not.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from .augmentation import augment
from .checkpoints import Checkpoints
from .data import Data
from .recipes import Recipe
from .scoring import Score, score


class TrainState(NamedTuple):
    """The state that a step changes.

    `totals` are the epoch's sums of what the steps measure: the loss, and for a classifier the
    correct guesses.
    """

    params: nnx.State
    rest: nnx.State
    optimizer: optax.OptState
    totals: Float[Array, " measures"]


@dataclasses.dataclass(frozen=True)
class Trained:
    """`model` in the form that trained, `history` one entry an epoch, `score` on the test data."""

    model: nnx.Module
    history: tuple[dict[str, Any], ...]
    score: Score

    @property
    def seconds(self) -> float:
        """Wall time of all epochs, those before an interruption included."""
        return sum(entry["seconds"] for entry in self.history)


def cosine_schedule(
    peak: float, warmup_epochs: float, epochs: int, steps_per_epoch: int
) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine down to zero at the end of the last epoch."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=round(warmup_epochs * steps_per_epoch),
        decay_steps=epochs * steps_per_epoch,
    )


def make_optimizer(recipe: Recipe, steps_per_epoch: int) -> optax.GradientTransformation:
    """Return the recipe's optimizer: linear warm-up, then a cosine down to zero."""
    schedule = cosine_schedule(
        recipe.learning_rate, recipe.warmup_epochs, recipe.epochs, steps_per_epoch
    )

    def kernels(params: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    if recipe.optimizer == "sgd":
        return optax.chain(
            optax.add_decayed_weights(recipe.weight_decay, kernels),
            optax.sgd(schedule, momentum=0.9, nesterov=True),
        )
    adamw = optax.adamw(schedule, weight_decay=recipe.weight_decay, mask=kernels)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def make_step(
    recipe: Recipe, graphdef: Any, optimizer: optax.GradientTransformation, num_classes: int
) -> Callable[..., TrainState]:
    """Return a jitted step: (state, images (B, ...), labels (B,), step number, keyed) -> state.

    With the static `keyed` the model gets a key of its own and may drop branches or tokens.
    """

    def loss_fn(
        params: nnx.State, rest: nnx.State, images: Array, targets: Array, options: dict
    ) -> Any:
        model = nnx.merge(graphdef, params, rest, copy=True)  # its batch statistics are mutated
        logits = model(images, **options)  # pyright: ignore[reportCallIssue]
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        return loss, (logits, nnx.split(model, nnx.Param, ...)[2])

    @partial(jax.jit, donate_argnums=0, static_argnames="keyed")
    def step(
        state: TrainState,
        images: Array,
        labels: Int[Array, " batch"],
        number: Array,
        keyed: bool = False,
    ) -> Any:
        key = jax.random.fold_in(jax.random.key(recipe.seed), number)
        targets = jax.nn.one_hot(labels, num_classes)
        targets = optax.smooth_labels(targets, recipe.label_smoothing)
        inputs, targets = augment(key, recipe.preprocess(images), targets, recipe.augmentation)
        options = {"key": jax.random.fold_in(key, 1)} if keyed else {}
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (logits, rest)), grads = gradient(state.params, state.rest, inputs, targets, options)
        updates, moments = optimizer.update(grads, state.optimizer, state.params)
        params: Any = optax.apply_updates(state.params, updates)  # pyright: ignore
        hits = jnp.mean(jnp.argmax(logits, -1) == labels)
        return TrainState(params, rest, moments, state.totals + jnp.stack([loss, hits]))

    return step


def batch_indices(seed: int, step: int, num_images: int, batch_size: int) -> np.ndarray:
    """Return the images of one step: each epoch is a permutation of its own, without remainder."""
    epoch, place = divmod(step, num_images // batch_size)
    order = np.random.default_rng((seed, epoch)).permutation(num_images)
    return order[place * batch_size : (place + 1) * batch_size]


def train(
    recipe: Recipe,
    train_data: Data,
    test_data: Data,
    *,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int | None = None,
    start_from: str | Path | None = None,
    on_step: Callable[[int, int], None] = lambda step, total: None,
    on_epoch: Callable[[dict[str, Any]], None] = lambda entry: None,
) -> Trained:
    """Train a recipe's model from its seed, or go on from the latest checkpoint.

    **Arguments:**

    - `train_data`, `test_data`: as `load_data` gives them.
    - `checkpoint_dir`: where the state is kept; nothing is written without it.
    - `checkpoint_every`: how many steps lie between checkpoints; an epoch's when it is left out.
    - `start_from`: the checkpoint folder of an earlier run, whose latest weights and batch
      statistics replace the untrained ones; schedule and optimizer start afresh.
    - `on_step(step, total)`: called at the start and after every step; may raise to interrupt.
    - `on_epoch(entry)`: called with each new entry of the history.

    **Raises:** `ValueError` when a batch is larger than the training data, when the checkpoints
    belong to a recipe with other numbers, or when there are none in `start_from`.
    """
    steps_per_epoch = len(train_data) // recipe.batch_size
    if steps_per_epoch < 1:
        raise ValueError(
            f"A batch of {recipe.batch_size} is more than the {len(train_data)} training images."
        )
    model = recipe.build(nnx.Rngs(recipe.seed))
    model.eval()
    eval_graphdef = nnx.split(model, nnx.Param, ...)[0]
    model.train()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = make_optimizer(recipe, steps_per_epoch)
    state = TrainState(params, rest, optimizer.init(params), jnp.zeros(2))  # pyright: ignore
    state = _started(state, start_from)
    step_fn = make_step(recipe, graphdef, optimizer, len(train_data.classes))

    @jax.jit
    def classify(params: nnx.State, rest: nnx.State, images: Array) -> Array:
        trained = nnx.merge(eval_graphdef, params, rest)
        return trained(recipe.preprocess(images))  # pyright: ignore[reportCallIssue]

    def test(state: TrainState) -> Score:
        return score(partial(classify, state.params, state.rest), test_data)

    def step(state: TrainState, number: int) -> TrainState:
        chosen = batch_indices(recipe.seed, number, len(train_data), recipe.batch_size)
        keyed = number // steps_per_epoch in range(*recipe.keyed_epochs)
        return step_fn(state, train_data.images[chosen], train_data.labels[chosen], number, keyed)

    def report(state: TrainState, means: list[float]) -> dict[str, Any]:
        result = test(state)
        loss, hits = means
        return {
            "loss": loss,
            "train_accuracy": hits,
            "test_correct": result.correct,
            "test_total": result.total,
        }

    state, history = run_epochs(
        step,
        report,
        state,
        epochs=recipe.epochs,
        steps_per_epoch=steps_per_epoch,
        checkpoints=Checkpoints(checkpoint_dir, recipe.numbers()),
        checkpoint_every=checkpoint_every,
        on_step=on_step,
        on_epoch=on_epoch,
    )
    return Trained(nnx.merge(eval_graphdef, state.params, state.rest), history, test(state))


def run_epochs(
    step: Callable[[TrainState, int], TrainState],
    report: Callable[[TrainState, list[float]], dict[str, Any]],
    state: TrainState,
    *,
    epochs: int,
    steps_per_epoch: int,
    checkpoints: Checkpoints,
    checkpoint_every: int | None = None,
    on_step: Callable[[int, int], None] = lambda step, total: None,
    on_epoch: Callable[[dict[str, Any]], None] = lambda entry: None,
) -> tuple[TrainState, tuple[dict[str, Any], ...]]:
    """Run from the latest checkpoint, or from `state`, to the end; return last state and history.

    `step(state, number)` makes one step; its effect must derive from the number. After each epoch
    `report(state, means)`, with the means of the state's totals over the epoch's steps, gives the
    entry for the history, to which the epoch and its seconds are added.
    """
    total = epochs * steps_per_epoch
    start, state, history, earlier = checkpoints.restore(state)
    on_step(start, total)
    began = time.monotonic() - earlier
    for number in range(start, total):
        state = step(state, number)
        done = number + 1
        if done % steps_per_epoch == 0:
            means = [float(value) / steps_per_epoch for value in state.totals]
            entry = {"epoch": done // steps_per_epoch, **report(state, means)}
            entry["seconds"] = round(time.monotonic() - began, 3)
            history.append(entry)
            on_epoch(entry)
            state = state._replace(totals=jnp.zeros_like(state.totals))
            began = time.monotonic()
        if done % (checkpoint_every or steps_per_epoch) == 0 or done == total:
            checkpoints.save(done, state, history, time.monotonic() - began)
        on_step(done, total)
    checkpoints.close()
    return state, tuple(history)


def _started(state: TrainState, start_from: str | Path | None) -> TrainState:
    """Return `state` with the weights and batch statistics of an earlier run's last checkpoint."""
    if start_from is None:
        return state
    if not Path(start_from).is_dir():
        raise ValueError(f"There is no checkpoint folder {Path(start_from).resolve()}.")
    earlier = Checkpoints(start_from)
    step, restored, _, _ = earlier.restore(state)
    earlier.close()
    if step == 0:
        raise ValueError(f"There is no checkpoint in {Path(start_from).resolve()}.")
    return state._replace(params=restored.params, rest=restored.rest)
