"""The gradient descent of tuning: its steps, those rejected, and the best that was seen."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from ..codes._checks import check_fields, check_positive


@dataclasses.dataclass(frozen=True)
class Descent:
    """The length and speed of a descent, and how often it is judged.

    Attributes:
        steps: The most gradient steps.
        learning_rate: The optimizer's highest learning rate; it falls to zero along a cosine.
        check_every: Steps between judgements on the held-out part; the last step is judged, too.
        stop_after: Judgements without a better one after which the descent stops; None for never.

    Raises:
        ValueError: A number is out of range.
    """

    steps: int = 150
    learning_rate: float = 0.3
    check_every: int = 10
    stop_after: int | None = 6

    def __post_init__(self):
        check_positive(learning_rate=self.learning_rate)
        check_fields(self, "steps", "check_every")
        if self.stop_after is not None:
            check_fields(self, "stop_after")


class Entry(NamedTuple):
    """One step of a descent, and the parameters that it started from.

    `objective` is that on what the step drew; None for the last entry, which is only judged.
    `held_out` is that on the held-out part; None for a step that was not judged.
    """

    step: int
    objective: float | None
    rejected: bool
    held_out: float | None
    parameters: PyTree


R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class History(Generic[R]):
    """The records of all entries, the best, and how many judgements and steps there were.

    `parameters` are the best; None where no judgement was better than the start's `objective`.
    """

    records: tuple[R, ...]
    parameters: PyTree | None
    objective: float
    judgements: int
    steps: int


def descend(
    objective: Callable[..., Float[Array, ""]],
    parameters: PyTree,
    arguments: tuple,
    *,
    descent: Descent,
    optimizer: optax.GradientTransformation,
    key: PRNGKeyArray,
    validate: Callable[[PyTree], float],
    record: Callable[[Entry], R],
    start: float,
) -> History[R]:
    """Walk down `objective(parameters, *arguments, key)`.

    The objective is compiled once, and has a key of its own in every step. A step whose objective
    or gradient is not finite is rejected: it changes nothing, and a RuntimeWarning counts them.

    Args:
        objective: The objective.
        parameters: What is tuned.
        arguments: Further arguments of the objective.
        descent: Length and speed.
        optimizer: The optimizer.
        key: Random key.
        validate: Returns the objective of parameters on the held-out part.
        record: Makes the history's entry of each step.
        start: The held-out objective before the descent: the best must be lower.
    """
    optimizer = optax.apply_if_finite(optimizer, max_consecutive_errors=descent.steps)
    advance, state = _compiled(objective, optimizer), optimizer.init(parameters)
    best, lowest = None, start
    records, judgements, stale, rejected, done = [], 0, 0, 0, 0
    for number in range(descent.steps + 1):
        here, held_out, value, sound = parameters, None, None, True
        if number % descent.check_every == 0 or number == descent.steps:
            held_out = validate(here)
            judgements, stale = judgements + 1, stale + 1
            if held_out < lowest:
                best, lowest, stale = here, held_out, 0
        ends = number == descent.steps or stale == descent.stop_after
        if not ends:
            value, sound, parameters, state = advance(
                parameters, state, arguments, key, jnp.asarray(number)
            )
            value, done = float(value), done + 1
            rejected += not sound
        records.append(record(Entry(number, value, not sound, held_out, here)))
        if ends:
            break
    if rejected:
        warnings.warn(
            f"{rejected} of {done} steps were rejected: their objective or gradient was not finite",
            RuntimeWarning,
            stacklevel=3,  # the caller of `tune`
        )
    return History(tuple(records), best, lowest, judgements, done)


def _compiled(
    objective: Callable[..., Float[Array, ""]], optimizer: optax.GradientTransformation
) -> Callable[..., Any]:
    """Return a step: to the objective, whether all was finite, and parameters and state after."""

    @eqx.filter_jit
    def step(
        parameters: PyTree, state: Any, arguments: tuple, key: PRNGKeyArray, number: Array
    ) -> tuple[Float[Array, ""], Bool[Array, ""], PyTree, Any]:
        drawn = jax.random.fold_in(key, number)
        value, slopes = jax.value_and_grad(objective)(parameters, *arguments, drawn)
        # A broken objective must not move anything, whatever its gradient says.
        slopes = jax.tree.map(lambda slope: jnp.where(jnp.isfinite(value), slope, jnp.nan), slopes)
        finite = [jnp.all(jnp.isfinite(slope)) for slope in jax.tree.leaves(slopes)]
        updates, state = optimizer.update(slopes, state, parameters)
        return value, jnp.all(jnp.stack(finite)), optax.apply_updates(parameters, updates), state

    return step
