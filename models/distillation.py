"""Distillation: a student learns to answer as a model does.

It learns from unlabelled inputs and the model's own outputs (Hinton et al. 2015), on the inputs
themselves, on random changes of them, and on sums of several with weights that add up to one: what
lies between and a little beyond the inputs (after mixup, Zhang et al. 2018). The squared error of
the outputs is what it minimises, so its answers are on the model's own scale.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .augmentation import Augmentation, augment
from .checkpoints import Checkpoints
from .scoring import in_batches
from .training import TrainState, batch_indices, cosine_schedule, run_epochs

# How many inputs a sum is made of: two to move between, and two that pull a little.
_TERMS = 4
# The weights of those that pull; a cubic spline's midpoint has -0.1 (and 0.6 for its neighbours).
_PULL = (-0.15, 0.05)


class Queries(NamedTuple):
    """Queries to a model: query q is the sum of `weights[q, i]` times input `sources[q, i]`."""

    sources: Int[np.ndarray, "queries terms"]
    weights: Float[np.ndarray, "queries terms"]


def draw_queries(seed: int, num_inputs: int, count: int, mixed: float) -> Queries:
    """Draw `count` queries, of which a share `mixed` are sums and the others single inputs.

    Every input comes first in about equally many. A sum is of four inputs with weights (share m, (1
    - share) m, c, d): share uniform on [0, 1], c and d on [-0.15, 0.05], and m = 1 - c - d, so that
    the weights add up to one.

    Raises:
        ValueError: There are no inputs or queries, or `mixed` is outside [0, 1].
    """
    if num_inputs < 1 or count < 1 or not 0 <= mixed <= 1:
        raise ValueError(
            f"{count} queries to {num_inputs} inputs, mixed={mixed}: needs one or more of both, "
            "and a share from 0 to 1"
        )
    rng = np.random.default_rng(seed)
    rounds = [rng.permutation(num_inputs) for _ in range(-(-count // num_inputs))]
    first = np.concatenate(rounds)[:count]
    others = rng.integers(num_inputs, size=(count, _TERMS - 1))
    pulls = rng.uniform(*_PULL, size=(count, 2))
    share, rest = rng.uniform(size=count), 1 - pulls.sum(axis=1)
    weights = np.column_stack([share * rest, (1 - share) * rest, pulls])
    single = np.arange(count) >= round(mixed * count)
    weights[single] = np.eye(_TERMS)[0]
    return Queries(np.column_stack([first, others]), weights.astype(np.float32))


Change = Callable[[PRNGKeyArray, Array], Array]


def changed_image(how: Augmentation, key: PRNGKeyArray, image: Array) -> Array:
    """Return one image, flipped and shifted at random."""
    return augment(key, image[None], jnp.zeros((1, 1)), how)[0][0]


def make_inputs(change: Change | None, seed: int, x: Array, weights: Array, number: Array) -> Array:
    """Return the inputs of queries `number` (B,) from their sources `x` (B, terms, ...).

    `change(key, data point)` comes before the sum, with keys that depend on seed and number alone,
    so that a query is the same whenever it is asked.
    """
    if change is not None:
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(number)
        keys = jax.vmap(lambda key: jax.random.split(key, x.shape[1]))(keys)
        x = jax.vmap(jax.vmap(change))(keys, x)
    return jnp.einsum("bt...,bt->b...", x, weights)


@dataclasses.dataclass(frozen=True)
class StudentScore:
    """Agreement of a student with its model on `total` inputs, and on as many sums of them.

    Attributes:
        total: The number of inputs.
        agreement: The share of inputs where both outputs are largest at the same place.
        relative_mse: The mean of (student - model)^2 over the mean variance of the model's outputs
            on the inputs.
        mixed_agreement: `agreement` on sums as `draw_queries` makes them.
        mixed_relative_mse: `relative_mse` on these sums, over the same variance.
    """

    agreement: float
    relative_mse: float
    mixed_agreement: float
    mixed_relative_mse: float
    total: int


def score_student(
    model: Callable[[Array], Array],
    student: Callable[[Array], Array],
    x: Float[np.ndarray, "points ..."],
    *,
    seed: int = 0,
) -> StudentScore:
    """Compare a student with its model on inputs as both take them."""
    queries = draw_queries(seed, len(x), len(x), 1.0)

    def both(inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        runs = [eqx.filter_jit(function) for function in (model, student)]
        found = [in_batches(run, inputs).reshape(len(inputs), -1) for run in runs]
        return found[0], found[1]

    expected, got = both(x)
    scale = _variance(expected)
    # In parts: four sources for each sum would be held at once.
    parts = [
        np.einsum("bt...,bt->b...", x[queries.sources[i : i + 500]], queries.weights[i : i + 500])
        for i in range(0, len(x), 500)
    ]
    mixed, mixed_got = both(np.concatenate(parts).astype(x.dtype))
    return StudentScore(
        agreement=_agreement(expected, got),
        relative_mse=float(np.mean((got - expected) ** 2)) / scale,
        mixed_agreement=_agreement(mixed, mixed_got),
        mixed_relative_mse=float(np.mean((mixed_got - mixed) ** 2)) / scale,
        total=len(x),
    )


def _agreement(expected: np.ndarray, got: np.ndarray) -> float:
    return float(np.mean(expected.argmax(axis=-1) == got.argmax(axis=-1)))


def _variance(outputs: np.ndarray) -> float:
    """Return the mean over outputs of their variance over data points."""
    return float(np.mean(np.var(outputs, axis=0)))


@dataclasses.dataclass(frozen=True)
class Distilled:
    """A trained student with its history, one entry for each epoch, and its inputs."""

    student: Any
    history: tuple[dict[str, Any], ...]
    train_inputs: int
    held_out_inputs: int

    @property
    def seconds(self) -> float:
        """Wall time of all epochs, without that of the model's answers before them."""
        return sum(entry["seconds"] for entry in self.history)


def distill(
    model: Callable[[Array], Array],
    student: Any,
    x: Float[np.ndarray, "points ..."],
    *,
    seed: int = 0,
    num_queries: int | None = None,
    epochs: int = 10,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    mixed: float = 0.5,
    change: Change | None = None,
    held_out: int | None = None,
    checkpoint_dir: str | Path | None = None,
    numbers: dict[str, Any] | None = None,
    on_step: Callable[[int, int], None] = lambda step, total: None,
    on_epoch: Callable[[dict[str, Any]], None] = lambda entry: None,
) -> Distilled:
    """Train a student to answer as a model does, on unlabelled inputs.

    The model is asked `num_queries` times, once and for all; then the student goes over these
    queries `epochs` times. The loss is the mean squared error over the variance of the answers.

    **Arguments:**

    - `model`: a callable on a batch, (B, ...) to (B, ...), that `jax.jit` can trace.
    - `student`: a Flax NNX module, whose batch statistics are kept, or any callable pytree; maps
      (B, ...) to the model's outputs, flat or not. It is left as it is. Outputs of about unit size
      are learnt best.
    - `x`: inputs as the model takes them.
    - `num_queries`: twice as many as inputs unless given. `mixed`: the share that are sums.
    - `learning_rate`: of Adam; rises in the first half epoch, and falls to zero along a cosine.
    - `change(key, data point)`: a random change, such as a mirror image.
    - `held_out`: inputs that the history is measured on, and training never sees; a twentieth, and
      1,000 at most, unless given.
    - `checkpoint_dir`, `on_step`, `on_epoch`: as for `training.train`; `numbers` name the run whose
      checkpoints these are.

    **Raises:** `ValueError` when a batch is more than the queries, no inputs are left to train or
    to score, the shapes of the answers differ, or the model's answers are all alike or not finite.
    """
    held_out = min(1000, len(x) // 20) if held_out is None else held_out
    if not 1 <= held_out < len(x):
        raise ValueError(f"held_out={held_out} of {len(x)} inputs: needs some on both sides")
    num_queries = 2 * (len(x) - held_out) if num_queries is None else num_queries
    if num_queries < batch_size:
        raise ValueError(f"A batch of {batch_size} is more than the {num_queries} queries.")
    order = np.random.default_rng((seed, 1)).permutation(len(x))
    held, inputs = x[np.sort(order[:held_out])], x[np.sort(order[held_out:])]
    queries = draw_queries(seed, len(inputs), num_queries, mixed)
    make = partial(make_inputs, change, seed)
    answers = _ask(model, make, inputs, queries)
    parts = _Parts.of(student)
    _check_answers(answers, parts, inputs[:1])
    steps_per_epoch = num_queries // batch_size
    schedule = cosine_schedule(learning_rate, 0.5, epochs, steps_per_epoch)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    params = jax.tree.map(jnp.array, parts.params)  # a copy: a step frees its input's memory
    state = TrainState(params, parts.rest, optimizer.init(params), jnp.zeros(1))
    step_fn = _make_step(parts, make, optimizer, _variance(answers))

    def step(state: TrainState, number: int) -> TrainState:
        chosen = batch_indices(seed, number, num_queries, batch_size)
        sources = inputs[queries.sources[chosen]]
        return step_fn(state, sources, queries.weights[chosen], chosen, answers[chosen])

    def report(state: TrainState, means: list[float]) -> dict[str, Any]:
        score = score_student(model, parts.whole(state.params, state.rest), held)
        return {"loss": means[0], **dataclasses.asdict(score)}

    state, history = run_epochs(
        step,
        report,
        state,
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        checkpoints=Checkpoints(checkpoint_dir, numbers),
        on_step=on_step,
        on_epoch=on_epoch,
    )
    return Distilled(parts.whole(state.params, state.rest), history, len(inputs), len(held))


class _Parts(NamedTuple):
    """A student taken apart: what is trained, what changes beside it, and how it runs.

    `run(params, rest, x)` is (outputs, the new rest); `whole(params, rest)` the student, for
    inference.
    """

    params: Any
    rest: Any
    run: Callable[[Any, Any, Array], tuple[Array, Any]]
    whole: Callable[[Any, Any], Any]

    @staticmethod
    def of(student: Any) -> "_Parts":
        return _nnx_parts(student) if isinstance(student, nnx.Module) else _pytree_parts(student)


def _nnx_parts(student: nnx.Module) -> _Parts:
    network: Any = nnx.clone(student)
    network.eval()
    inferring = nnx.split(network, nnx.Param, ...)[0]
    network.train()
    training, params, rest = nnx.split(network, nnx.Param, ...)

    def run(params: Any, rest: Any, x: Array) -> tuple[Array, Any]:
        merged: Any = nnx.merge(training, params, rest, copy=True)  # its statistics are mutated
        return merged(x), nnx.split(merged, nnx.Param, ...)[2]

    return _Parts(params, rest, run, lambda params, rest: nnx.merge(inferring, params, rest))


def _pytree_parts(student: Any) -> _Parts:
    params, static = eqx.partition(student, eqx.is_inexact_array)

    def run(params: Any, rest: Any, x: Array) -> tuple[Array, Any]:
        return eqx.combine(params, static)(x), rest

    return _Parts(params, (), run, lambda params, rest: eqx.combine(params, static))


def _ask(
    model: Callable[[Array], Array], make: Callable[..., Array], x: np.ndarray, queries: Queries
) -> Float[np.ndarray, "queries outputs"]:
    """Return the model's answers to all queries, flat."""

    @eqx.filter_jit
    def answer(model: Any, x: Any, weights: Any, number: Any) -> Array:
        return model(make(x, weights, number))

    def run(numbers: Array) -> Array:
        chosen = np.asarray(numbers)
        return answer(model, x[queries.sources[chosen]], queries.weights[chosen], chosen)

    answers = in_batches(run, np.arange(len(queries.weights)))
    return answers.reshape(len(answers), -1)


def _check_answers(answers: np.ndarray, parts: _Parts, x: np.ndarray) -> None:
    if not np.isfinite(answers).all():
        raise ValueError("The model's answers are not all finite: nothing can be learnt from them.")
    if not _variance(answers) > 0:
        raise ValueError("The model answers everything alike: there is nothing to learn.")
    got = jax.eval_shape(lambda: parts.run(parts.params, parts.rest, jnp.asarray(x))[0]).shape
    if np.prod(got[1:]) != answers.shape[1]:
        raise ValueError(
            f"The model has {answers.shape[1]} outputs, and the student answers with shape {got}."
        )


def _make_step(
    parts: _Parts,
    make: Callable[..., Array],
    optimizer: optax.GradientTransformation,
    scale: float,
) -> Callable[..., TrainState]:
    """Return a jitted step: (state, sources, weights, numbers, answers (B, outputs)) -> state."""

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, x: Array, weights: Array, number: Array, answers: Array) -> Any:
        inputs = make(x, weights, number)

        def loss_fn(params: Any) -> tuple[Array, Any]:
            outputs, rest = parts.run(params, state.rest, inputs)
            return jnp.mean((outputs.reshape(answers.shape) - answers) ** 2) / scale, rest

        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, rest), grads = gradient(state.params)
        updates, moments = optimizer.update(grads, state.optimizer, state.params)
        params: Any = optax.apply_updates(state.params, updates)  # pyright: ignore
        return TrainState(params, rest, moments, state.totals + loss)

    return step
