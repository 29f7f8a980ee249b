"""Gradient descent on the nested objective, through encoder, model and decoder."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, Generic

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from ..codes import AbstractCode, check_counts, check_positive
from ..evaluation import Loss, Trial, draw_sets, make_trial, relative_objective
from ..inference import Model
from ..stragglers import AbstractStragglers
from ._descent import sound_step, warn_of_rejected
from ._parameters import Code, Parameters, parametrize

# Adam's steps of the points by those of the lambdas: 5 % of a gap by 35 % of a lambda.
_SHIFT_STEP = 1 / 6


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
    """What `tune` found: the code with the best objective on the held-out groups.

    `objective` is relative to the starting code's, which is 1. `evaluations` counts the data points
    and coded data points that the model ran on, `differentiated` those of them that its gradient
    ran on too.
    """

    code: Code
    objective: float
    history: tuple[TuningStep, ...]
    evaluations: int
    differentiated: int
    seconds: float

    @property
    def rejected(self) -> int:
        """How many steps were rejected."""
        return sum(step.rejected for step in self.history)


def tune(
    model: Model,
    code: Code,
    x: Float[ArrayLike, "points ..."],
    stragglers: Mapping[str, AbstractStragglers],
    *,
    key: PRNGKeyArray,
    points: bool = False,
    grouped: bool = False,
    loss: Loss = "mse",
    order: float = 2.0,
    steps: int = 150,
    learning_rate: float = 0.3,
    groups_per_step: int = 2,
    sets_per_step: int = 8,
    held_out_share: float = 0.25,
    held_out_sets: int = 32,
    check_every: int = 10,
    patience: int = 6,
    on_step: Callable[[TuningStep], None] = lambda step: None,
) -> Tuned[Code]:
    """Tunes a code by gradient descent (Adam) on the nested objective; needs no labels.

    One code is tuned for all the laws of `stragglers` (by name) together, on its error under each
    relative to the starting code's (see `make_trial`). Tuned are `lambda_enc`, `lambda_dec` and
    `end_penalty`, as logarithms, and `gap_exponent`; with `points`, the regression points too, in
    their order. A code of another kind is tuned in what it has of these.

    **Arguments:**

    - `model`: any differentiable callable on a batch, (B, ...) to (B, outputs...).
    - `x`: unlabelled data points. A random `held_out_share` of them, in whole groups, with
      `held_out_sets` fixed straggler sets a law, judges the code every `check_every` steps; groups
      of K are drawn from the others, afresh in each step. With `grouped`, every K data points in
      the order given are a group that stays together, in all of this: for data points that come
      in an order that matters (a short path through them), whose groups are what will be coded. A
      remainder that fills no group is left out.
    - `loss`: as in `nested_errors`. `order`: as in `make_trial`; the higher, the more alike the
      gains under all laws.
    - `groups_per_step`, `sets_per_step`: groups in a step, and straggler sets a law in a step, each
      of which meets all the groups. A law with no more sets than that gives all of them.
    - `learning_rate`: Adam's, for the logarithms of the lambdas; it falls to zero along a cosine.
    - `patience`: stop after so many looks at the held-out groups without a better one.
    - `on_step`: called with each entry of the history as it comes.

    The result is the code with the best held-out objective, the starting one included, and depends
    on `key` alone. A step whose objective or gradient is not finite is rejected; a RuntimeWarning
    says how many were.

    Raises: ValueError for too few data points, for data points that are not finite, numbers out of
    range, a code with nothing to tune, and as `make_trial` does. Source: arXiv 2402.04377, which
    tunes the lambdas on this objective.
    """
    start = time.perf_counter()
    check_positive(learning_rate=learning_rate)
    check_counts(
        steps=steps,
        groups_per_step=groups_per_step,
        sets_per_step=sets_per_step,
        held_out_sets=held_out_sets,
        check_every=check_every,
        patience=patience,
    )
    training, held = split_groups(
        np.asarray(x), code.num_data, key, held_out_share, grouped=grouped
    )
    groups = min(groups_per_step, len(training) * training.shape[1] // code.num_data)
    key_held, key_steps = jax.random.split(jax.random.fold_in(key, 1))
    judge = make_trial(
        model, code, held, stragglers, key=key_held, num_sets=held_out_sets, loss=loss, order=order
    )
    parameters, rebuild = parametrize(code, points=points)
    optimizer = _optimizer(parameters, learning_rate, steps)
    state = optimizer.init(parameters)

    step = _make_step(code, rebuild, judge, stragglers, optimizer, key_steps, groups, sets_per_step)
    training = jnp.asarray(training)
    best, best_objective, looks, stale = code, 1.0, 0, 0
    history: list[TuningStep] = []
    for number in range(steps + 1):
        here, value, sound, judged = rebuild(parameters), None, True, None
        if number % check_every == 0 or number == steps:
            judged = float(judge.objective(model, here))
            looks, stale = looks + 1, stale + 1
            if judged < best_objective:
                best, best_objective, stale = here, judged, 0
        ends = number == steps or stale >= patience
        if not ends:
            value, sound, parameters, state = step(
                parameters, state, model, training, jnp.asarray(number)
            )
        history.append(
            TuningStep(
                number, None if value is None else float(value), judged, not sound, _scalars(here)
            )
        )
        on_step(history[-1])
        if ends:
            break
    done = len(history) - 1
    warn_of_rejected(sum(step.rejected for step in history), done, "objective")
    judging = len(judge.x) * (code.num_data + (looks + 1) * code.num_workers)
    return Tuned(
        code=best,
        objective=best_objective,
        history=tuple(history),
        evaluations=judging + done * groups * (code.num_data + code.num_workers),
        differentiated=done * groups * code.num_workers,
        seconds=time.perf_counter() - start,
    )


def _make_step(
    code: AbstractCode,
    rebuild: Callable[[Parameters], AbstractCode],
    judge: Trial,
    stragglers: Mapping[str, AbstractStragglers],
    optimizer: optax.GradientTransformation,
    key: PRNGKeyArray,
    groups: int,
    sets: int,
) -> Callable[..., Any]:
    """One compiled step: (parameters, state, model, training data points, number of the step) ->
    (objective, whether all was finite, parameters, state)."""

    def objective(parameters: Parameters, model: Model, training: Array, key: PRNGKeyArray):
        """The objective on groups and straggler sets of one step."""
        key_groups, key_sets = jax.random.split(key)
        # Of data points that stand alone, K make a group.
        size = (groups * code.num_data // training.shape[1],)
        chosen = training[jax.random.choice(key_groups, len(training), size, replace=False)]
        chosen = chosen.reshape(groups, code.num_data, *training.shape[2:])
        available, law = draw_sets(stragglers, key_sets, code.num_workers, sets)
        fresh = dataclasses.replace(judge, x=chosen, originals=None, available=available, law=law)
        return relative_objective(fresh, model, rebuild(parameters))

    @eqx.filter_jit
    def step(parameters: Parameters, state: Any, model: Model, training: Array, number: Array):
        drawn = jax.random.fold_in(key, number)
        return sound_step(optimizer, objective, parameters, state, model, training, drawn)

    return step


def _optimizer(
    parameters: Parameters, learning_rate: float, steps: int
) -> optax.GradientTransformation:
    def adam(size: float) -> optax.GradientTransformation:
        return optax.adam(optax.cosine_decay_schedule(size * learning_rate, steps))

    kinds = {name: "shifts" if name.endswith("_shifts") else "numbers" for name in parameters}
    both = optax.partition({"shifts": adam(_SHIFT_STEP), "numbers": adam(1.0)}, kinds)
    return optax.apply_if_finite(both, max_consecutive_errors=steps)


def split_groups(
    x: np.ndarray, num_data: int, key: PRNGKeyArray, held_out_share: float, *, grouped: bool
) -> tuple[Float[np.ndarray, "units size ..."], Float[np.ndarray, "groups num_data ..."]]:
    """Data points to train on, in units that stay together, and groups held out.

    A unit is one data point, or, with `grouped`, K in the order given. Raises: ValueError as `tune`
    does.
    """
    if not 0 < held_out_share < 1:
        raise ValueError(f"held_out_share must be between 0 and 1, not {held_out_share}")
    if x.ndim < 1 or len(x) < 2 * num_data:
        raise ValueError(
            f"x has shape {x.shape}: tuning needs two groups of {num_data} data points at least, "
            "one of them held out"
        )
    if not np.isfinite(x).all():
        raise ValueError("data points must be finite: take out those that are not")
    size = num_data if grouped else 1
    units = x[: len(x) // size * size].reshape(-1, size, *x.shape[1:])
    groups = len(x) // num_data
    held = min(max(round(held_out_share * groups), 1), groups - 1)
    order = np.asarray(jax.random.permutation(jax.random.fold_in(key, 0), len(units)))
    first = held * num_data // size
    return units[order[first:]], units[order[:first]].reshape(held, num_data, *x.shape[1:])


def _scalars(code: AbstractCode) -> dict[str, float]:
    """The code's scalar leaves by name."""
    fields = ((f.name, getattr(code, f.name)) for f in dataclasses.fields(code))
    return {name: float(value) for name, value in fields if eqx.is_array(value) and value.ndim == 0}
