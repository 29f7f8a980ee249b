"""Gradient descent on the nested objective, through encoder, model and decoder."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Generic

import equinox as eqx
import jax
import optax
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, PyTree, Shaped

from ..codes import AbstractCode
from ..codes._trees import to_device
from ..evaluation._criteria import Criterion
from ..evaluation._objective import Trial, draw_sets, make_trial
from ..inference.models import Model, check_model
from ..stragglers import AbstractStragglers
from ._descent import Descent, Entry, descend
from ._parameters import Code, Parameters, parametrize
from ._sampling import Sampling, split_points

# Adam's steps of the points by those of the lambdas: 5 % of a gap by 35 % of a lambda.
_SHIFT_STEP = 1 / 6

# What is folded into the key, for draws that must not be the same.
_SPLIT, _DRAWS = 0, 1


@dataclasses.dataclass(frozen=True)
class TuningStep:
    """One step: its number, the objective on the groups it drew, and the lambdas it started from.

    `held_out` is the objective on the held-out groups, in those steps that looked; the last entry
    only looks. A `rejected` step had an objective or a gradient that was not finite, and changed
    nothing.
    """

    step: int
    objective: float | None
    held_out: float | None
    rejected: bool
    parameters: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Tuned(Generic[Code]):
    """The result of `tune`: the code with the best objective on the held-out groups.

    Attributes:
        code: The code.
        objective: Its objective relative to the starting code's, which is 1.
        history: The entries of all steps.
        evaluations: Data points and coded data points that the model ran on.
        differentiated: Those of them that its gradient ran on, too.
        seconds: The time it took.
    """

    code: Code
    objective: float
    history: tuple[TuningStep, ...]
    evaluations: int
    differentiated: int
    seconds: float

    @property
    def rejected(self) -> int:
        """Return the number of rejected steps."""
        return sum(step.rejected for step in self.history)


def tune(
    model: Model,
    code: Code,
    x: PyTree[Shaped[ArrayLike, "points ..."]],
    stragglers: Mapping[str, AbstractStragglers],
    *,
    key: PRNGKeyArray,
    points: bool = False,
    criterion: Criterion = "mse",
    power: float = 2.0,
    sampling: Sampling = Sampling(),  # noqa: B008
    descent: Descent = Descent(),  # noqa: B008
    on_step: Callable[[TuningStep, Code], None] = lambda step, code: None,
) -> Tuned[Code]:
    """Tune a code by gradient descent (Adam) on the nested objective; it needs no labels.

    One code is tuned for all laws together, on its error under each relative to the starting code's
    (`make_trial`). The tuned numbers are `lambda_enc`, `lambda_dec` and `end_penalty`, as
    logarithms, and `gap_exponent`; with `points`, the regression points, too, in their order.
    Another kind of code is tuned in what it has of these, and a code of your own in the fields that
    it declares by `eqx.field(metadata={"tune": "log"})`, for positive numbers, or "plain". A step
    whose objective or gradient is not finite is rejected; a RuntimeWarning counts them. The result
    depends on `key` alone.

    Args:
        model: A differentiable function of a batch, (B, ...) to (B, outputs...).
        code: The starting code.
        x: Unlabelled data points. Some are held out and judge the code; each step draws its groups
            of K from the others (`Sampling`).
        stragglers: Laws by name.
        key: Random key.
        points: Whether the regression points are tuned.
        criterion: As in `nested_objective`.
        power: As in `make_trial`; the higher, the more equal are the gains under all laws.
        sampling: What a step draws, and what is held out.
        descent: Length, speed and judgements; its learning rate is for the logarithms of the
            lambdas.
        on_step: Called with each entry of the history, and the code that it started from.

    Returns:
        The code with the best held-out objective, the starting one included.

    Raises:
        ValueError: There are too few data points, they are not finite, numbers are out of range,
            the model is in training mode, or the code has nothing to tune; and as `make_trial`.

    Source: arXiv 2402.04377, which tunes the lambdas on this objective.
    """
    start = time.perf_counter()
    check_model(model)
    training, held = split_points(x, code.num_data, sampling, jax.random.fold_in(key, _SPLIT))
    training, held = to_device(training), sampling.cut_held_out(held, code.num_data)
    key_held, key_steps = jax.random.split(jax.random.fold_in(key, _DRAWS))
    validate = make_trial(
        model, code, held, stragglers,
        key=key_held, num_sets=sampling.held_out_sets, criterion=criterion, power=power,
    )  # fmt: skip
    parameters, rebuild = parametrize(code, points=points)

    def record(entry: Entry) -> TuningStep:
        here = rebuild(entry.parameters)
        step = TuningStep(
            entry.step, entry.objective, entry.held_out, entry.rejected, _scalars(here)
        )
        on_step(step, here)
        return step

    history = descend(
        _objective(code, rebuild, validate, stragglers, sampling),
        parameters,
        (model, training),
        descent=descent,
        optimizer=_optimizer(parameters, descent),
        key=key_steps,
        validate=lambda parameters: float(validate.objective(model, rebuild(parameters))),
        record=record,
        start=1.0,
    )
    held_groups, points_left = (len(jax.tree.leaves(tree)[0]) for tree in (held, training))
    drawn = history.steps * sampling.groups(code.num_data, points_left)
    judging = held_groups * (code.num_data + (history.judgements + 1) * code.num_workers)
    return Tuned(
        code=code if history.parameters is None else rebuild(history.parameters),
        objective=history.objective,
        history=history.records,
        evaluations=judging + drawn * (code.num_data + code.num_workers),
        differentiated=drawn * code.num_workers,
        seconds=time.perf_counter() - start,
    )


def _objective(
    code: AbstractCode,
    rebuild: Callable[[Parameters], AbstractCode],
    validate: Trial,
    stragglers: Mapping[str, AbstractStragglers],
    sampling: Sampling,
) -> Callable[..., Float[Array, ""]]:
    """Return the objective on groups and straggler sets of one step."""

    def objective(parameters: Parameters, model: Model, training: PyTree, key: PRNGKeyArray):
        key_groups, key_sets = jax.random.split(key)
        chosen = sampling.draw(code.num_data, training, key_groups)
        available, law = draw_sets(stragglers, key_sets, code.num_workers, sampling.sets_per_step)
        fresh = dataclasses.replace(
            validate, x=chosen, originals=None, available=available, law=law
        )
        return fresh.objective(model, rebuild(parameters))

    return objective


def _optimizer(parameters: Parameters, descent: Descent) -> optax.GradientTransformation:
    def adam(size: float) -> optax.GradientTransformation:
        schedule = optax.cosine_decay_schedule(size * descent.learning_rate, descent.steps)
        return optax.adam(schedule)

    kinds = {name: "shifts" if name.endswith("_shifts") else "numbers" for name in parameters}
    return optax.partition({"shifts": adam(_SHIFT_STEP), "numbers": adam(1.0)}, kinds)


def _scalars(code: AbstractCode) -> dict[str, float]:
    """Return the code's scalar leaves by name."""
    fields = ((f.name, getattr(code, f.name)) for f in dataclasses.fields(code))
    return {name: float(value) for name, value in fields if eqx.is_array(value) and value.ndim == 0}
