"""Fine-tuning of a model for coding: its parameters are one more leaf of the nested objective."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray

from ..codes import AbstractCode, Uncoded
from ..codes._checks import check_not_negative
from ..evaluation import nested_objective
from ..evaluation._answers import batched, own_outputs
from ..evaluation._criteria import Criterion
from ..evaluation._trial import Trial, make_trial
from ..inference._models import Model, check_model
from ..stragglers import AbstractStragglers, straggler_sets
from ._descent import Descent, Entry, Judgement, descend
from ._sampling import Sampling, Split, split_points

M = TypeVar("M", bound=Model)

_WARM_UP = 0.05  # of the steps
_BATCH = 256  # how many held-out data points the model runs on at a time

# What a data point's answer may change by, of the largest answer, when others share its batch:
# rounding is far below, batch statistics far above.
_SAME = 1e-2


@dataclasses.dataclass(frozen=True)
class Target:
    """The objective of fine-tuning: what a model must keep, and what it must gain.

    With f the original model and g the one that is tuned, each step's objective is

        nested objective of g against f  +  fidelity * mean criterion(g(x), f(x))
                                         +  label_weight * mean label_criterion(g(x), label),

    the last only with labels. The first term makes g smooth along the curve through the data
    points, the second keeps g close to f (distillation).

    Attributes:
        original: f, where it is not the model as it came, so as to go on with one tuned earlier.
        fidelity: The weight of the second term.
        label_weight: The weight of the third term.
        label_criterion: (outputs, label) to a scalar; by default the cross-entropy of logits.
        weight_decay: AdamW's, on matrices and kernels.
        tolerance: The largest loss of held-out accuracy against the original's at which a model is
            allowed; without labels, the largest share of held-out labels that changed.

    Raises:
        ValueError: A number is out of range.
    """

    original: Model | None = None
    fidelity: float = 1.0
    label_weight: float = 1.0
    label_criterion: Callable[[Array, Array], Array] | None = None
    weight_decay: float = 1e-4
    tolerance: float = 0.003

    def __post_init__(self):
        check_not_negative(
            fidelity=self.fidelity,
            label_weight=self.label_weight,
            weight_decay=self.weight_decay,
            tolerance=self.tolerance,
        )


@dataclasses.dataclass(frozen=True)
class FineTuningStep:
    """One step: its number and the objective on the groups it drew, None for the last entry.

    Those steps that looked tell how the model they started from does on the held-out data points:
    `held_out` is the nested objective relative to the original model's, `agreement` the share of
    labels (argmax) that are the original model's, `accuracy` that of true ones, where labels are
    known. A `rejected` step had an objective or a gradient that was not finite: it changed nothing.
    """

    step: int
    objective: float | None
    held_out: float | None
    rejected: bool
    agreement: float | None = None
    accuracy: float | None = None


@dataclasses.dataclass(frozen=True)
class FineTuned(Generic[M]):
    """The result of `fine_tune`: the allowed model with the best held-out objective.

    Attributes:
        model: The model.
        objective: Its objective on the held-out data points, as in `FineTuningStep`.
        agreement: The share of held-out labels that it has in common with the original model.
        accuracy: Its held-out accuracy, with labels.
        original_accuracy: The original model's.
        history: The entries of all steps.
        evaluations: Data points and coded data points that either model ran on.
        differentiated: Those of them that the gradient ran on, too.
        seconds: The time it took.
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
        """Return the number of rejected steps."""
        return sum(step.rejected for step in self.history)


def fine_tune(
    model: M,
    codes: AbstractCode | Sequence[AbstractCode],
    x: Float[ArrayLike, "points ..."],
    stragglers: AbstractStragglers | Sequence[AbstractStragglers],
    *,
    key: PRNGKeyArray,
    labels: Int[ArrayLike, " points"] | None = None,
    criterion: Criterion = "mse",
    target: Target = Target(),
    sampling: Sampling = Sampling(groups_per_step=4, held_out_sets=8),  # noqa: B008
    descent: Descent = Descent(1000, 3e-4, check_every=100, stop_after=None),  # noqa: B008
    on_step: Callable[[FineTuningStep, M], None] = lambda step, model: None,
) -> FineTuned[M]:
    """Fine-tune a model so that its coded predictions come nearer to its uncoded ones.

    The objective is that of `Target`. A step whose objective or gradient is not finite is rejected;
    a RuntimeWarning counts them. The result depends on `key` alone.

    Args:
        model: A callable pytree on a batch, (B, ...) to (B, outputs). Its inexact arrays are
            trained; of Flax NNX variables only `nnx.Param`, so running statistics stay. It must be
            in evaluation mode: an answer may not depend on the others of its batch.
        codes: One code, or several, which take turns.
        x: Data points. Some are held out and judge the model; each step draws its groups from the
            others (`Sampling`). With `augment`, the original model sees the changed ones, too.
        stragglers: One law for all codes, or one for each. Sets are drawn in each step.
        key: Random key.
        labels: True labels, if the objective has them.
        criterion: As in `nested_objective`.
        target: What the model must keep.
        sampling: What a step draws, and what is held out.
        descent: Length, speed and judgements. The learning rate is AdamW's, which rises over a
            twentieth of the steps first. The gradient's norm is clipped at 1.
        on_step: Called with each entry of the history, and the model that it started from.

    Returns:
        The allowed model with the best held-out objective, the one that came included.

    Raises:
        ValueError: There are too few data points, data points or outputs are not finite, numbers
            are out of range, codes and laws do not pair, or the model has nothing to train or is in
            training mode.

    Source: the nested objective of arXiv 2402.04377; training for smoothness along coded paths in
    the spirit of mixup (arXiv 1710.09412) and Coded-Smoothing (arXiv 2510.00253).
    """
    start = time.perf_counter()
    pairs = _pair(codes, stragglers)
    f = model if target.original is None else target.original
    key_split, key_judge, key_steps = jax.random.split(key, 3)
    most = max(code.num_data for code, _ in pairs)
    split = split_points(x, most, sampling, key_split, labels)
    _check_evaluation_mode(f, split.training)
    validate = _Looks(f, pairs, split, sampling, key_judge, criterion, target.tolerance)
    free = _free(model)
    goal = _Goal(criterion, target, sampling)

    def record(entry: Entry) -> FineTuningStep:
        summary = {} if entry.judgement is None else entry.judgement.summary._asdict()
        held = None if entry.judgement is None else entry.judgement.objective
        step = FineTuningStep(entry.step, entry.objective, held, entry.rejected, **summary)
        on_step(step, _with(model, free, entry.parameters))
        return step

    history = descend(
        [goal.of_pair(free, *pair) for pair in pairs],
        [jax.tree.leaves(model)[place] for place in free],
        (model, f, *jax.tree.map(jnp.asarray, (split.training, split.training_labels))),
        descent=descent,
        optimizer=_optimizer(descent, target.weight_decay),
        key=key_steps,
        validate=lambda parameters: validate(_with(model, free, parameters)),
        record=record,
    )
    best = history.best
    evaluations, differentiated = _count(pairs, sampling, history.steps, len(split.training))
    assert best.parameters is not None
    return FineTuned(
        model=_with(model, free, best.parameters),
        objective=best.judgement.objective,
        agreement=best.judgement.summary.agreement,
        accuracy=best.judgement.summary.accuracy,
        original_accuracy=validate.original_accuracy,
        history=history.records,
        evaluations=evaluations + validate.evaluations,
        differentiated=differentiated,
        seconds=time.perf_counter() - start,
    )


Pair = tuple[AbstractCode, AbstractStragglers]


class _Labels(NamedTuple):
    """Numbers of right labels: see `FineTuningStep`."""

    agreement: float
    accuracy: float | None


class _Looks:
    """The held-out data points, and what the original model makes of them."""

    def __init__(
        self,
        original: Model,
        pairs: Sequence[Pair],
        split: Split,
        sampling: Sampling,
        key: PRNGKeyArray,
        criterion: Criterion,
        tolerance: float,
    ):
        self._held, self._labels, self._tolerance = split.held, split.held_labels, tolerance
        self._choice = self._choose(original)
        self._trials: list[tuple[Trial, AbstractCode]] = []
        for place, (code, law) in enumerate(pairs):
            trial = make_trial(
                original,
                code,
                sampling.cut_held_out(split.held, code.num_data),
                {"law": law},
                key=jax.random.fold_in(key, place),
                num_sets=sampling.held_out_sets,
                criterion=criterion,
            )
            self._trials.append((trial, code))
        right = self._right(self._choice)
        self.original_accuracy = right.accuracy
        coded = [len(trial.x) * code.num_workers for trial, code in self._trials]
        own = [len(trial.x) * code.num_data for trial, code in self._trials]
        self.evaluations = len(self._held) + sum(own) + sum(coded)
        self._look = len(self._held) + sum(coded)

    def __call__(self, model: Model) -> Judgement:
        self.evaluations += self._look
        objectives = [float(trial.objective(model, code)) for trial, code in self._trials]
        right = self._right(self._choose(model))
        # It must be as good as the original on the data points themselves.
        allowed = right.agreement >= 1 - self._tolerance
        if self.original_accuracy is not None and right.accuracy is not None:
            allowed = right.accuracy >= self.original_accuracy - self._tolerance
        return Judgement(float(np.mean(objectives)), allowed, right)

    def _right(self, choice: np.ndarray) -> _Labels:
        accuracy = None if self._labels is None else float(np.mean(choice == self._labels))
        return _Labels(float(np.mean(choice == self._choice)), accuracy)

    def _choose(self, model: Model) -> np.ndarray:
        return np.argmax(np.asarray(batched(model, min(_BATCH, len(self._held)))(self._held)), -1)


@dataclasses.dataclass(frozen=True)
class _Goal:
    """The parts of a step's objective: see `Target`."""

    criterion: Criterion
    target: Target
    sampling: Sampling

    def of_pair(
        self, free: Sequence[int], code: AbstractCode, law: AbstractStragglers
    ) -> Callable[..., Float[Array, ""]]:
        """Return the objective, in the trained leaves, of one code under its law."""

        def objective(parameters, model, original, x, labels, key) -> Float[Array, ""]:
            key_draw, key_sets = jax.random.split(key)
            drawn, wanted = self.sampling.draw(code.num_data, x, labels, key_draw)
            moved = _with(model, free, parameters)
            return self(moved, original, code, law, drawn, wanted, key_sets)

        return objective

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
        """Return the objective on groups of data points."""
        flat = x.reshape(-1, *x.shape[2:])
        wanted = jax.lax.stop_gradient(original(flat)).reshape(*x.shape[:2], -1)
        available = straggler_sets(law, key, code.num_workers, self.sampling.sets_per_step)
        options: Any = {"criterion": self.criterion, "originals": wanted}
        coded = nested_objective(model, code, x, available, **options)
        clean = model(flat)
        # The clean term is the nested objective of a code that does nothing.
        identity = Uncoded(code.num_data, code.num_data)
        everyone = jnp.ones((1, code.num_data), bool)
        kept = nested_objective(lambda batch: clean, identity, x, everyone, **options)
        total = coded + self.target.fidelity * kept
        if labels is not None:
            cross_entropy = optax.softmax_cross_entropy_with_integer_labels
            wrong = jax.vmap(self.target.label_criterion or cross_entropy)
            total = total + self.target.label_weight * jnp.mean(wrong(clean, labels.reshape(-1)))
        return total


def _optimizer(descent: Descent, weight_decay: float) -> optax.GradientTransformation:
    warm_up = max(round(_WARM_UP * descent.steps), 1)
    rate = descent.learning_rate
    schedule = optax.warmup_cosine_decay_schedule(
        rate / warm_up, rate, warm_up, max(descent.steps, warm_up + 1)
    )

    def kernels(parameters: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, parameters)

    adamw = optax.adamw(schedule, weight_decay=weight_decay, mask=kernels)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


def _free(model: Model) -> tuple[int, ...]:
    """Return the places of the leaves that are trained; raise ValueError where there is none."""
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
    """Return the model with other parameters in the places of the trained leaves."""
    leaves, structure = jax.tree.flatten(model)
    for place, value in zip(free, parameters, strict=True):
        leaves[place] = value
    return jax.tree.unflatten(structure, leaves)


def _count(
    pairs: Sequence[Pair], sampling: Sampling, steps: int, num_training: int
) -> tuple[int, int]:
    """Return how many data points all steps run a model on, and how many they differentiate."""
    evaluations = differentiated = 0
    for place, (code, _) in enumerate(pairs):
        turns = len(range(place, steps, len(pairs)))
        groups = turns * sampling.groups(code.num_data, num_training)
        evaluations += groups * (2 * code.num_data + code.num_workers)
        differentiated += groups * (code.num_data + code.num_workers)
    return evaluations, differentiated


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


def _check_evaluation_mode(model: Model, x: np.ndarray) -> None:
    """Raise ValueError where outputs are not finite, or depend on the batch."""
    check_model(model)
    few = x[:4]
    together = np.asarray(own_outputs(batched(model, len(few)), few[None])[0])[0]
    alone = np.asarray(own_outputs(batched(model, 1), few[None, :1])[0])[0]
    if np.max(np.abs(together[0] - alone[0])) > _SAME * np.max(np.abs(together)):
        raise ValueError(
            "the model's answer on a data point depends on the others of its batch: put it into "
            "evaluation mode, or fold its batch norms"
        )
