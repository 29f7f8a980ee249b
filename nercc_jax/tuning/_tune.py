"""Gradient descent on the nested objective, through encoder, model and decoder."""

import dataclasses
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, PyTree, Shaped

from ..codes import AbstractCode
from ..codes._trees import Form, join, to_device
from ..evaluation._criteria import Criterion, point_criterion
from ..evaluation._objective import Trial, draw_sets, make_trial
from ..inference.models import Model, check_model
from ..stragglers import AbstractStragglers
from ._descent import (
    Descent,
    Entry,
    Journal,
    compiled_step,
    compiled_value_and_grad,
    descend,
    descend_by_lbfgs,
)
from ._parameters import SAME_ANGLE, Code, Parameters, Rebuild, parametrize
from ._sampling import Sampling, split_points

# An error below this share of what the mean output for every data point would cost is rounding.
ROUNDING = 1e-9

# What is folded into the key, for draws that must not be the same.
_SPLIT, _DRAWS = 0, 1


@dataclasses.dataclass(frozen=True)
class TuningStep:
    """One step: its number, the objective on the groups it drew, and the lambdas it started from.

    `start` is the number of the start whose descent it belongs to.
    `held_out` is the objective on the held-out groups, in those steps that looked; the last entry
    only looks. A `rejected` step had an objective or a gradient that was not finite, and changed
    nothing.
    """

    start: int
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
        converged: Whether the best judgement on the held-out groups in the last quarter of its
            descent was lower than that before by `Descent.tolerance` at most. (A learning rate that
            falls to zero ends all progress, too: compare with more steps.)
        history: The entries of all steps, start after start.
        start: The number of the start that the code is from.
        evaluations: Data points and coded data points that the model ran on.
        differentiated: Those of them that its gradient ran on, too.
        seconds: The time it took.
    """

    code: Code
    objective: float
    converged: bool
    history: tuple[TuningStep, ...]
    start: int
    evaluations: int
    differentiated: int
    seconds: float

    @property
    def path(self) -> tuple[TuningStep, ...]:
        """Return the steps from the start that the code is from."""
        return tuple(step for step in self.history if step.start == self.start)

    @property
    def rejected(self) -> int:
        """Return the number of rejected steps."""
        return sum(step.rejected for step in self.history)


def tune(
    model: Model,
    code: Code | Sequence[Code],
    x: PyTree[Shaped[ArrayLike, "points ..."]],
    stragglers: Mapping[str, AbstractStragglers],
    *,
    key: PRNGKeyArray,
    points: bool = True,
    optimizer: optax.GradientTransformation | Literal["adam", "lbfgs"] = "adam",
    criterion: Criterion = "mse",
    power: float = 1.0,
    sampling: Sampling = Sampling(),  # noqa: B008
    descent: Descent = Descent(),  # noqa: B008
    on_step: Callable[[TuningStep, Code], None] = lambda step, code: None,
) -> Tuned[Code]:
    """Tune a code by gradient descent on the nested objective; it needs no labels.

    One code is tuned for all laws together, on its error under each relative to the starting code's
    (`make_trial`). The tuned numbers are `lambda_enc`, `lambda_dec` and `end_penalty`, as
    logarithms, and `gap_exponent`; with `points`, the regression points, too, in their order.
    Another kind of code is tuned in what it has of these, and a code of your own in the fields that
    it declares by `eqx.field(metadata={"tune": "log"})`, for positive numbers, or "plain". A step
    whose objective or gradient is not finite is rejected; a RuntimeWarning counts them. The result
    depends on `key` alone.

    The objective has many local minima, and which one a descent ends in depends on where the points
    start. So with `points` a code is tuned twice: from its own points, and with the worker that is
    nearest to each data point moved to its place. Each start costs a descent, and all of them one
    compilation. Laws under which the first start makes no error (all answers of an `exact` code)
    are left out.

    Args:
        model: A differentiable function of a batch, (B, ...) to (B, outputs...).
        code: The starting code; or a sequence of all starts, of the same K and N, where errors are
            relative to the first.
        x: Unlabelled data points. Some are held out and judge the code; each step draws its groups
            of K from the others (`Sampling`).
        stragglers: Laws by name.
        key: Random key.
        points: Whether the regression points are tuned. False tunes what the paper does.
        optimizer: "adam" (as `descent` says); any optax transformation, for all parameters; or
            "lbfgs", which descends on one draw of four times the groups and twice the sets of a
            step, the more precisely: start it from what another has found.
        criterion: As in `nested_objective`.
        power: As in `make_trial`; the higher, the more equal are the gains under all laws.
        sampling: What a step draws, and what is held out.
        descent: Length, speed and judgements; its learning rate is for the logarithms of the
            lambdas.
        on_step: Called with each entry of the history, and the code that it started from.

    Returns:
        The code with the best held-out objective, the starting ones included.

    Raises:
        ValueError: There are too few data points, they are not finite, numbers are out of range,
            the model is in training mode, starts differ in more than their numbers, or the code has
            nothing to tune or to gain; and as `make_trial`.

    Source: arXiv 2402.04377, which tunes the lambdas on this objective.
    """
    start = time.perf_counter()
    check_model(model)
    if isinstance(optimizer, str) and optimizer not in ("adam", "lbfgs"):
        raise ValueError(
            f"optimizer must be 'adam', 'lbfgs' or an optax transformation, not {optimizer!r}"
        )
    starts = _starts(code, points) if isinstance(code, AbstractCode) else tuple(code)
    if not starts:
        raise ValueError("there is no code to start from")
    first, parametrized = starts[0], [parametrize(each, points=points) for each in starts]
    if len({jax.tree.structure(each) for each in parametrized}) != 1:
        raise ValueError("several starts must be codes of one kind, with the same K and N")
    training, held = split_points(x, first.num_data, sampling, jax.random.fold_in(key, _SPLIT))
    training, held = to_device(training), sampling.cut_held_out(held, first.num_data)
    key_held, key_steps = jax.random.split(jax.random.fold_in(key, _DRAWS))
    trial = _trial_of_errors(model, first, held, stragglers, key_held, sampling, criterion, power)

    drawn, lbfgs = sampling, optimizer == "lbfgs"
    if lbfgs:
        groups, sets = 4 * sampling.groups_per_step, 2 * sampling.sets_per_step
        drawn = dataclasses.replace(sampling, groups_per_step=groups, sets_per_step=sets)
    chosen = _adam(parametrized[0][0], descent) if isinstance(optimizer, str) else optimizer
    chosen = optax.apply_if_finite(chosen, max_consecutive_errors=descent.steps)
    objective = _objective(drawn, stragglers)
    step = compiled_value_and_grad(objective) if lbfgs else compiled_step(objective, chosen)

    best, lowest, converged, winner, asked = first, 1.0, True, 0, 0
    history: list[TuningStep] = []
    for number, (begin, rebuild) in enumerate(parametrized):

        def note(entry: Entry, rebuild: Rebuild = rebuild, number: int = number) -> None:
            here = rebuild(entry.parameters)
            seen = entry.step, entry.objective, entry.held_out, entry.rejected
            history.append(TuningStep(number, *seen, _scalars(here)))
            on_step(history[-1], here)

        def validate(parameters: Parameters, rebuild: Rebuild = rebuild) -> float:
            return float(trial.objective(model, rebuild(parameters)))

        journal = Journal(descent, validate, note, lowest)
        arguments = (rebuild, model, training, trial)
        if lbfgs:
            asked += descend_by_lbfgs(step, begin, (*arguments, key_steps), journal)
        else:
            asked += descend(step, chosen.init(begin), begin, arguments, key_steps, journal)
        if journal.best is not None:
            best, lowest, winner = rebuild(journal.best), journal.lowest, number
            converged = journal.converged()
    taken = [each for each in history if each.objective is not None]
    if rejected := sum(each.rejected for each in taken):
        warnings.warn(
            f"{rejected} of {len(taken)} steps were rejected: their objective or gradient was not "
            "finite",
            RuntimeWarning,
            stacklevel=2,
        )
    k, n = first.num_data, first.num_workers
    held_groups, points_left = (len(jax.tree.leaves(tree)[0]) for tree in (held, training))
    count = asked * drawn.groups(k, points_left)
    judged = sum(each.held_out is not None for each in history)
    return Tuned(
        code=best,
        objective=lowest,
        converged=converged,
        history=tuple(history),
        start=winner,
        evaluations=held_groups * (k + (judged + 1) * n) + count * (k + n),
        differentiated=count * n,
        seconds=time.perf_counter() - start,
    )


def _starts(code: Code, points: bool) -> tuple[Code, ...]:
    """Return a code, and the same with a worker on each data point's place, where it has none."""
    alpha, beta = (getattr(code, name, None) for name in ("alpha", "beta"))
    if not points or alpha is None or beta is None or code.num_workers < code.num_data:
        return (code,)
    angles = [np.arccos(np.asarray(each, np.float64)) for each in (alpha, beta)]
    distances = np.abs(angles[0][:, None] - angles[1])
    moved = np.array(beta)
    if (distances.min(axis=1) < SAME_ANGLE).all():
        return (code,)
    for _ in range(code.num_data):
        data_point, worker = np.unravel_index(np.argmin(distances), distances.shape)
        moved[worker] = alpha[data_point]
        distances[data_point], distances[:, worker] = np.inf, np.inf
    return code, eqx.tree_at(lambda c: c.beta, code, jnp.asarray(moved))


def _trial_of_errors(
    model: Model,
    code: AbstractCode,
    held: PyTree,
    stragglers: Mapping[str, AbstractStragglers],
    key: PRNGKeyArray,
    sampling: Sampling,
    criterion: Criterion,
    power: float,
) -> Trial:
    """Return the trial that judges, in which laws without errors have a scale of infinity.

    The exact answers of some codes have errors of rounding alone, to which nothing can be relative.
    """
    trial = make_trial(
        model, code, held, stragglers,
        key=key, num_sets=sampling.held_out_sets, criterion=criterion, power=power,
    )  # fmt: skip
    own, form = join(trial.originals, 2)
    cost = cost_of_the_mean(criterion, form, own.reshape(-1, own.shape[-1]))
    errs = trial.scales > ROUNDING * cost
    if not errs.any():
        raise ValueError("there is nothing to gain: the starting code makes no error")
    return eqx.tree_at(lambda t: t.scales, trial, jnp.where(errs, trial.scales, jnp.inf))


def _objective(
    sampling: Sampling, stragglers: Mapping[str, AbstractStragglers]
) -> Callable[..., Float[Array, ""]]:
    """Return the objective on groups and straggler sets of one step."""

    def objective(
        parameters: Parameters,
        rebuild: Rebuild,
        model: Model,
        training: PyTree,
        trial: Trial,
        key: PRNGKeyArray,
    ) -> Float[Array, ""]:
        key_groups, key_sets = jax.random.split(key)
        code = rebuild(parameters)
        chosen = sampling.draw(code.num_data, training, key_groups)
        available, law = draw_sets(stragglers, key_sets, code.num_workers, sampling.sets_per_step)
        fresh = dataclasses.replace(trial, x=chosen, originals=None, available=available, law=law)
        return fresh.objective_by_products(model, code)

    return objective


def _adam(parameters: Parameters, descent: Descent) -> optax.GradientTransformation:
    def adam(rate: float) -> optax.GradientTransformation:
        return optax.adam(optax.cosine_decay_schedule(rate * descent.learning_rate, descent.steps))

    kinds = {name: "shifts" if name.endswith("_shifts") else "numbers" for name in parameters}
    return optax.partition({"shifts": adam(descent.points_rate), "numbers": adam(1.0)}, kinds)


@eqx.filter_jit
def cost_of_the_mean(
    criterion: Criterion, form: Form, own: Float[Array, "points m"]
) -> Float[Array, ""]:
    """Return the criterion of the mean output as a prediction."""
    mean = jnp.broadcast_to(jnp.mean(own, axis=0), own.shape)
    return jnp.mean(jax.vmap(point_criterion(criterion))(form.split(mean), form.split(own)))


def _scalars(code: AbstractCode) -> dict[str, float]:
    """Return the code's scalar leaves by name."""
    fields = ((f.name, getattr(code, f.name)) for f in dataclasses.fields(code))
    return {name: float(value) for name, value in fields if eqx.is_array(value) and value.ndim == 0}
