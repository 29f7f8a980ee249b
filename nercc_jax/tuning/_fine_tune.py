"""Fine-tuning of a model for coding: its parameters are one more leaf of the nested objective."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray

from ..codes import AbstractCode, Uncoded, check_counts, check_positive
from ..evaluation import Loss, Trial, batched, cut_groups, make_trial, nested_objective, own_outputs
from ..inference import Model
from ..stragglers import AbstractStragglers, straggler_sets
from ._descent import sound_step, warn_of_rejected

M = TypeVar("M", bound=Model)
Order = Callable[[Array], Int[Array, " points"]]

_WARM_UP = 0.05  # of the steps
_BATCH = 256  # how many held-out data points the model runs on at a time

# What a data point's answer may change by, of the largest answer, when others share its batch:
# rounding is far below, batch statistics far above.
_SAME = 1e-2


@dataclasses.dataclass(frozen=True)
class FineTuningStep:
    """One step: its number and the loss on the groups it drew, None for the last entry.

    Those steps that looked tell how the model they started from does on the held-out data points:
    `held_out` is the nested objective relative to the original model's, `agreement` the share of
    labels (argmax) that are the original model's, `accuracy` that of true ones, where labels are
    known. A `rejected` step had a loss or a gradient that was not finite, and changed nothing.
    """

    step: int
    loss: float | None
    rejected: bool
    held_out: float | None = None
    agreement: float | None = None
    accuracy: float | None = None


@dataclasses.dataclass(frozen=True)
class FineTuned(Generic[M]):
    """What `fine_tune` found: the model with the best held-out objective among those allowed.

    `objective`, `agreement` and `accuracy` are its own on the held-out data points, as in
    `FineTuningStep`; `original_accuracy` is the original model's. `evaluations` counts the data
    points and coded data points that either model ran on, `differentiated` those of them that the
    gradient ran on too.
    """

    model: M
    objective: float
    agreement: float
    accuracy: float | None
    original_accuracy: float | None
    history: tuple[FineTuningStep, ...]
    evaluations: int
    differentiated: int
    seconds: float

    @property
    def rejected(self) -> int:
        """How many steps were rejected."""
        return sum(step.rejected for step in self.history)


def fine_tune(
    model: M,
    codes: AbstractCode | Sequence[AbstractCode],
    x: Float[ArrayLike, "points ..."],
    stragglers: AbstractStragglers | Sequence[AbstractStragglers],
    *,
    key: PRNGKeyArray,
    original: Model | None = None,
    labels: Int[ArrayLike, " points"] | None = None,
    loss: Loss = "mse",
    fidelity: float = 1.0,
    label_weight: float = 1.0,
    label_loss: Callable[[Array, Array], Array] | None = None,
    order: Order | None = None,
    buffer: int | None = None,
    augment: Callable[[Array, PRNGKeyArray], Array] | None = None,
    steps: int = 1000,
    learning_rate: float = 3e-4,
    weight_decay: float = 1e-4,
    groups_per_step: int = 4,
    sets_per_step: int = 8,
    held_out: int = 512,
    held_out_sets: int = 8,
    check_every: int = 100,
    tolerance: float = 0.003,
    on_check: Callable[[FineTuningStep, M], None] = lambda step, model: None,
) -> FineTuned[M]:
    """Fine-tunes a model so that its coded predictions come nearer to its uncoded ones.

    With f the original model and g the one that is tuned, each step's loss is

        nested objective of g against f  +  fidelity * mean loss(g(x), f(x))
                                         +  label_weight * mean label_loss(g(x), label),

    the last with `labels` only: none are needed. The first term wants g to be smooth along the
    curve through the data points, the second keeps g what f was (distillation).

    **Arguments:**

    - `model`: a callable pytree on a batch, (B, ...) to (B, outputs). Its inexact arrays are
      trained; of Flax NNX variables only `nnx.Param`, so that running statistics stay. It must be
      in evaluation mode: a data point's answer may not depend on the others of its batch.
    - `codes`, `stragglers`: one code, or several, which take turns; one law for all of them, or
      one for each. Straggler sets are drawn afresh in each step, `sets_per_step` of them.
    - `x`: data points of which a random `held_out` judge the model every `check_every` steps, with
      `held_out_sets` fixed straggler sets a code. From the others each step draws its groups.
    - `original`: f, where it is not `model` as it came: to go on with a model tuned earlier.
    - `loss`: as in `nested_errors`. `label_loss`: (outputs, label) to a scalar; without it the
      cross-entropy of outputs that are logits.
    - `order`, `buffer`: a step draws `buffer` data points (of a step's groups, unless given), puts
      them in the order (a permutation) that `order` makes of them, cuts this into groups, and
      takes `groups_per_step` of those at random. Held-out data points are ordered as one buffer.
    - `augment`: random changes to a step's data points, with a key; f sees the changed ones.
    - `learning_rate`, `weight_decay`: AdamW's; the first rises over a twentieth of the steps, then
      falls to zero along a cosine. The gradient's norm is clipped at 1.
    - `tolerance`: a model is allowed if its held-out accuracy is less by no more than this than
      the original's; without labels, if no larger share of held-out labels has changed.
    - `on_check`: called at each look, with its entry of the history and the model.

    The result is the allowed model with the best held-out objective, the one that came included,
    and depends on `key` alone. A step whose loss or gradient is not finite is rejected; a
    RuntimeWarning says how many were.

    Raises: ValueError for too few data points, data points or outputs that are not finite, numbers
    out of range, codes and laws that do not pair, a model with nothing to train or in training
    mode. Source: the nested objective of arXiv 2402.04377; training for smoothness along coded
    paths in the spirit of mixup (arXiv 1710.09412) and Coded-Smoothing (arXiv 2510.00253).
    """
    start = time.perf_counter()
    check_positive(learning_rate=learning_rate)
    _check_not_negative(
        fidelity=fidelity,
        label_weight=label_weight,
        tolerance=tolerance,
        weight_decay=weight_decay,
    )
    check_counts(
        steps=steps,
        groups_per_step=groups_per_step,
        sets_per_step=sets_per_step,
        held_out=held_out,
        held_out_sets=held_out_sets,
        check_every=check_every,
    )
    pairs = _pair(codes, stragglers)
    f = model if original is None else original
    key_split, key_judge, key_steps = jax.random.split(key, 3)
    training, held, train_labels, held_labels = _split(x, labels, pairs, held_out, key_split)
    _check_model(f, training)
    judge = _Judge(f, pairs, held, held_labels, order, key_judge, held_out_sets, loss, tolerance)
    free = _free(model)
    parameters = [jax.tree.leaves(model)[place] for place in free]
    optimizer = _optimizer(learning_rate, weight_decay, steps)
    state = optimizer.init(parameters)
    terms = _Terms(
        loss, fidelity, label_weight, label_loss or _cross_entropy, order, augment,
        groups_per_step, buffer, sets_per_step,
    )  # fmt: skip
    turns = [_make_step(terms, optimizer, free, *pair, len(training)) for pair in pairs]
    points, labelled = jnp.asarray(training), _optional(train_labels)

    best, best_seen, history = model, None, []
    for number in range(steps + 1):
        here, seen = _with(model, free, parameters), None
        if number % check_every == 0 or number == steps:
            seen = judge(here)
            if best_seen is None or (judge.allows(seen) and seen.held_out < best_seen.held_out):
                best, best_seen = here, seen
        value, sound = None, True
        if number < steps:
            value, sound, parameters, state = turns[number % len(turns)](
                parameters, state, model, f, points, labelled, jax.random.fold_in(key_steps, number)
            )
        entry = FineTuningStep(number, None if value is None else float(value), not sound)
        history.append(entry if seen is None else dataclasses.replace(entry, **vars(seen)))
        if seen is not None:
            on_check(history[-1], here)
    assert best_seen is not None
    warn_of_rejected(sum(step.rejected for step in history), steps, "loss")
    evaluations, differentiated = _count(pairs, terms.groups, steps, len(training))
    return FineTuned(
        model=best,
        objective=best_seen.held_out,
        agreement=best_seen.agreement,
        accuracy=best_seen.accuracy,
        original_accuracy=judge.original_accuracy,
        history=tuple(history),
        evaluations=evaluations + judge.evaluations,
        differentiated=differentiated,
        seconds=time.perf_counter() - start,
    )


Pair = tuple[AbstractCode, AbstractStragglers]


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What a look saw: see `FineTuningStep`."""

    held_out: float
    agreement: float
    accuracy: float | None


class _Judge:
    """The held-out data points, and what the original model makes of them."""

    def __init__(
        self,
        original: Model,
        pairs: Sequence[Pair],
        held: np.ndarray,
        labels: np.ndarray | None,
        order: Order | None,
        key: PRNGKeyArray,
        num_sets: int,
        loss: Loss,
        tolerance: float,
    ):
        self._held, self._labels, self._tolerance = held, labels, tolerance
        self._choice = self._choose(original)
        ordered = held if order is None else held[np.asarray(order(jnp.asarray(held)))]
        self._trials: list[tuple[Trial, AbstractCode]] = []
        for place, (code, law) in enumerate(pairs):
            groups = cut_groups(ordered, code.num_data)
            draw = jax.random.fold_in(key, place)
            trial = make_trial(
                original, code, groups, {"law": law}, key=draw, num_sets=num_sets, loss=loss
            )
            self._trials.append((trial, code))
        self.original_accuracy = None if labels is None else float(np.mean(self._choice == labels))
        coded = [len(trial.x) * code.num_workers for trial, code in self._trials]
        own = [len(trial.x) * code.num_data for trial, code in self._trials]
        self.evaluations = len(held) + sum(own) + sum(coded)
        self._look = len(held) + sum(coded)

    def __call__(self, model: Model) -> _Seen:
        self.evaluations += self._look
        objectives = [float(trial.objective(model, code)) for trial, code in self._trials]
        choice = self._choose(model)
        accuracy = None if self._labels is None else float(np.mean(choice == self._labels))
        return _Seen(float(np.mean(objectives)), float(np.mean(choice == self._choice)), accuracy)

    def allows(self, seen: _Seen) -> bool:
        """Whether a model is, on the data points themselves, still as good as the original."""
        if self.original_accuracy is None or seen.accuracy is None:
            return seen.agreement >= 1 - self._tolerance
        return seen.accuracy >= self.original_accuracy - self._tolerance

    def _choose(self, model: Model) -> np.ndarray:
        return np.argmax(np.asarray(batched(model, min(_BATCH, len(self._held)))(self._held)), -1)


@dataclasses.dataclass(frozen=True)
class _Terms:
    """What a step's loss is made of: see `fine_tune`."""

    loss: Loss
    fidelity: float
    label_weight: float
    label_loss: Callable[[Array, Array], Array]
    order: Order | None
    augment: Callable[[Array, PRNGKeyArray], Array] | None
    groups: int
    buffer: int | None
    sets: int

    def __call__(
        self,
        model: Model,
        original: Model,
        code: AbstractCode,
        law: AbstractStragglers,
        x: Float[Array, "groups num_data ..."],
        labels: Int[Array, "groups num_data"] | None,
        key: PRNGKeyArray,
    ) -> Float[Array, ""]:
        """The loss on groups of data points."""
        flat = x.reshape(-1, *x.shape[2:])
        wanted = jax.lax.stop_gradient(original(flat)).reshape(*x.shape[:2], -1)
        available = straggler_sets(law, key, code.num_workers, self.sets)
        options: Any = {"loss": self.loss, "originals": wanted}
        coded = nested_objective(model, code, x, available, **options)
        clean = model(flat)
        # The clean term is the nested objective of a code that does nothing.
        identity = Uncoded(code.num_data, code.num_data)
        everyone = jnp.ones((1, code.num_data), bool)
        kept = nested_objective(lambda batch: clean, identity, x, everyone, **options)
        total = coded + self.fidelity * kept
        if labels is not None:
            wrong = jax.vmap(self.label_loss)(clean, labels.reshape(-1))
            total = total + self.label_weight * jnp.mean(wrong)
        return total

    def draw(
        self, code: AbstractCode, training: Array, labels: Array | None, key: PRNGKeyArray
    ) -> tuple[Array, Array | None]:
        """A step's groups, and their labels."""
        key_points, key_groups, key_augment = jax.random.split(key, 3)
        groups = _affordable(self.groups, code, len(training))
        buffer = groups * code.num_data
        if self.buffer is not None:
            buffer = min(max(self.buffer, buffer), len(training))
        chosen = jax.random.choice(key_points, len(training), (buffer,), replace=False)
        if self.order is not None:
            chosen = chosen[self.order(training[chosen])]
        cut = chosen[: buffer // code.num_data * code.num_data].reshape(-1, code.num_data)
        cut = cut[jax.random.choice(key_groups, len(cut), (groups,), replace=False)]
        x = training[cut]
        if self.augment is not None:
            flat = x.reshape(-1, *x.shape[2:])
            x = self.augment(flat, key_augment).reshape(x.shape)
        return x, None if labels is None else labels[cut]


def _make_step(
    terms: _Terms,
    optimizer: optax.GradientTransformation,
    free: Sequence[int],
    code: AbstractCode,
    law: AbstractStragglers,
    num_training: int,
) -> Callable[..., Any]:
    """One compiled step: (parameters, state, model, original, data points, labels, key) -> (loss,
    whether all was finite, parameters, state)."""

    def objective(parameters: list[Array], model: Model, *arguments: Any) -> Float[Array, ""]:
        return terms(_with(model, free, parameters), *arguments)

    @eqx.filter_jit
    def step(parameters, state, model, original, training, labels, key):
        key_draw, key_sets = jax.random.split(key)
        x, targets = terms.draw(code, training, labels, key_draw)
        return sound_step(
            *(optimizer, objective, parameters, state),
            *(model, original, code, law, x, targets, key_sets),
        )

    return step


def _optimizer(
    learning_rate: float, weight_decay: float, steps: int
) -> optax.GradientTransformation:
    warm_up = max(round(_WARM_UP * steps), 1)
    schedule = optax.warmup_cosine_decay_schedule(
        learning_rate / warm_up, learning_rate, warm_up, max(steps, warm_up + 1)
    )

    def kernels(parameters: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, parameters)

    adamw = optax.adamw(schedule, weight_decay=weight_decay, mask=kernels)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    return optax.apply_if_finite(clipped, max_consecutive_errors=steps)


def _free(model: Model) -> tuple[int, ...]:
    """Which leaves of a model are trained. Raises: ValueError where there is none."""
    from flax import nnx  # it takes most of a second, and nothing else needs it

    def of(node: Any) -> Any:
        trained = not isinstance(node, nnx.Variable) or isinstance(node, nnx.Param)
        return jax.tree.map(lambda leaf: trained and eqx.is_inexact_array(leaf), node)

    marks = jax.tree.map(of, model, is_leaf=lambda node: isinstance(node, nnx.Variable))
    free = tuple(place for place, mark in enumerate(jax.tree.leaves(marks)) if mark)
    if not free:
        raise ValueError(
            f"{type(model).__name__} has no array to train: give a pytree that is called on a "
            "batch, an Equinox or Flax NNX module or a jax.tree_util.Partial, not a closure"
        )
    return free


def _with(model: M, free: Sequence[int], parameters: Sequence[Array]) -> M:
    """The model with other parameters in the places of the trained leaves."""
    leaves, structure = jax.tree.flatten(model)
    for place, value in zip(free, parameters, strict=True):
        leaves[place] = value
    return jax.tree.unflatten(structure, leaves)


def _cross_entropy(logits: Array, label: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def _affordable(groups: int, code: AbstractCode, num_training: int) -> int:
    return min(groups, num_training // code.num_data)


def _count(pairs: Sequence[Pair], groups: int, steps: int, num_training: int) -> tuple[int, int]:
    """Data points and coded ones that all steps run a model on, and that they differentiate."""
    evaluations = differentiated = 0
    for place, (code, _) in enumerate(pairs):
        turns = len(range(place, steps, len(pairs))) * _affordable(groups, code, num_training)
        evaluations += turns * (2 * code.num_data + code.num_workers)
        differentiated += turns * (code.num_data + code.num_workers)
    return evaluations, differentiated


def _optional(labels: np.ndarray | None) -> Array | None:
    return None if labels is None else jnp.asarray(labels)


def _pair(
    codes: AbstractCode | Sequence[AbstractCode],
    stragglers: AbstractStragglers | Sequence[AbstractStragglers],
) -> list[Pair]:
    """Every code with its law of stragglers."""
    codes = [codes] if isinstance(codes, AbstractCode) else list(codes)
    laws = (
        [stragglers] * len(codes) if isinstance(stragglers, AbstractStragglers) else [*stragglers]
    )
    if not codes or len(laws) != len(codes):
        raise ValueError(
            f"{len(codes)} codes came with {len(laws)} laws of stragglers: give one code or more, "
            "and one law for all of them or one for each"
        )
    for code in codes:
        if code.worker_models.any():
            raise ValueError(
                f"{type(code).__name__} has workers that run other models: only codes whose "
                "workers all run the served one can be fine-tuned for"
            )
    return list(zip(codes, laws, strict=True))


def _split(
    x: ArrayLike,
    labels: ArrayLike | None,
    pairs: Sequence[Pair],
    held_out: int,
    key: PRNGKeyArray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Data points to train on and those held out, and the labels of both."""
    x = np.asarray(x)
    most = max(code.num_data for code, _ in pairs)
    if x.ndim < 1 or held_out < most or len(x) < held_out + most:
        raise ValueError(
            f"x has shape {x.shape}, of which {held_out} are held out: groups have {most} data "
            "points, and both parts need one at least"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating) or not np.isfinite(x).all():
        raise ValueError(f"data points must be finite floats; x is {x.dtype}")
    if labels is not None and np.shape(labels) != (len(x),):
        raise ValueError(f"labels have shape {np.shape(labels)}; x has {len(x)} data points")
    order = np.asarray(jax.random.permutation(key, len(x)))
    first, rest = order[:held_out], order[held_out:]
    targets = None if labels is None else np.asarray(labels)
    if targets is None:
        return x[rest], x[first], None, None
    return x[rest], x[first], targets[rest], targets[first]


def _check_model(model: Model, x: np.ndarray) -> None:
    """Raises: ValueError where outputs are no finite vectors, or depend on the batch."""
    few = x[:4]
    together = np.asarray(own_outputs(batched(model, len(few)), few[None]))
    alone = np.asarray(own_outputs(batched(model, 1), few[None, :1]))
    if np.max(np.abs(together[0] - alone[0])) > _SAME * np.max(np.abs(together)):
        raise ValueError(
            "the model's answer on a data point depends on the others of its batch: put it into "
            "evaluation mode, or fold its batch norms"
        )


def _check_not_negative(**numbers: float) -> None:
    for name, value in numbers.items():
        if not 0 <= value < np.inf:
            raise ValueError(f"{name} must be 0 or positive, and finite, not {value}")
