"""The descent of tuning: its steps, those rejected, and the best that was seen."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from ..codes._checks import check_fields, check_positive


@dataclasses.dataclass(frozen=True)
class Descent:
    """The length and speed of a descent, and how often it is judged.

    Attributes:
        steps: The most gradient steps.
        learning_rate: The highest learning rate of Adam; it falls to zero along a cosine.
        points_rate: The regression points' learning rate, by `learning_rate`: a shift of 0.1 moves
            a point by a tenth of a gap, where a logarithm of 0.1 changes a lambda by a tenth.
        check_every: Steps between judgements on the held-out part; the last step is judged, too.
        stop_after: Judgements without a better one after which the descent stops; None for never.
        tolerance: The descent has converged if the best judgement of its last quarter is lower than
            that before by this share at most.

    Raises:
        ValueError: A number is out of range.
    """

    steps: int = 300
    learning_rate: float = 0.3
    points_rate: float = 0.25
    check_every: int = 10
    stop_after: int | None = None
    tolerance: float = 0.01

    def __post_init__(self):
        check_positive(learning_rate=self.learning_rate, points_rate=self.points_rate)
        check_fields(self, "steps", "check_every")
        if self.stop_after is not None:
            check_fields(self, "stop_after")
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance must be 0 or positive, not {self.tolerance}")


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


Objective = Callable[..., Float[Array, ""]]


@dataclasses.dataclass
class Journal:
    """The entries of a descent so far, and the best parameters.

    Attributes:
        descent: When it is judged, and when it stops.
        validate: Returns the objective of parameters on the held-out part.
        note: Called with each entry.
        lowest: The best judgement; at first the start's.
        best: Its parameters; None as long as no judgement is below the start's.
        entries: All entries.
    """

    descent: Descent
    validate: Callable[[PyTree], float]
    note: Callable[[Entry], Any]
    lowest: float
    best: PyTree | None = None
    entries: list[Entry] = dataclasses.field(default_factory=list)

    @property
    def judged(self) -> list[float]:
        """Return all judgements."""
        return [each.held_out for each in self.entries if each.held_out is not None]

    def converged(self) -> bool:
        """Return whether the last quarter brought less than the tolerance: see `Descent`."""
        seen = np.nan_to_num(self.judged, nan=np.inf)
        early = len(seen) - max(len(seen) // 4, 1)
        before, after = np.min(seen[:early], initial=np.inf), np.min(seen)
        return bool(np.isfinite(before) and before - after <= self.descent.tolerance * before)

    def visit(self, parameters: PyTree, last: bool = False) -> tuple[float | None, bool]:
        """Judge the parameters of the next entry, if it is time to; return also whether to end."""
        number, descent, held_out = len(self.entries), self.descent, None
        last = last or number == descent.steps
        if number % descent.check_every == 0 or last:
            held_out = self.validate(parameters)
            if held_out < self.lowest:
                self.best, self.lowest = parameters, held_out
        seen = [*self.judged, held_out] if held_out is not None else self.judged
        # Where the start is better than all, none of them was a better one.
        stale = len(seen) - (seen.index(self.lowest) + 1 if self.best is not None else 0)
        return held_out, last or (descent.stop_after is not None and stale >= descent.stop_after)

    def add(
        self, parameters: PyTree, objective: float | None, held_out: float | None, sound: bool
    ) -> None:
        """Note the next entry."""
        entry = Entry(len(self.entries), objective, not sound, held_out, parameters)
        self.entries.append(entry)
        self.note(entry)


def compiled_step(objective: Objective, optimizer: optax.GradientTransformation) -> Any:
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


def compiled_value_and_grad(objective: Objective) -> Any:
    """Return the function to the objective and its gradient in the first argument."""
    return eqx.filter_jit(lambda *arguments: jax.value_and_grad(objective)(*arguments))


def descend(
    step: Any, state: Any, parameters: PyTree, arguments: tuple, key: PRNGKeyArray, journal: Journal
) -> int:
    """Walk down by a `compiled_step`, whose objective has a key of its own in every step.

    Return the number of evaluations of the objective.

    A step whose objective or gradient is not finite is rejected: it changes nothing, if the
    optimizer is one of `optax.apply_if_finite`.
    """
    while True:
        held_out, ends = journal.visit(parameters)
        if ends:
            journal.add(parameters, None, held_out, sound=True)
            return len(journal.entries) - 1
        number = jnp.asarray(len(journal.entries))
        value, sound, after, state = step(parameters, state, arguments, key, number)
        journal.add(parameters, float(value), held_out, bool(sound))
        parameters = after


def descend_by_lbfgs(
    value_and_grad: Any, parameters: PyTree, arguments: tuple, journal: Journal
) -> int:
    """Walk down by SciPy's L-BFGS-B, whose line search is on the host: it compiles once.

    (`optax.lbfgs` compiles its line search, for two minutes.) Return the number of evaluations of
    the objective.
    """
    import scipy.optimize  # which JAX needs, and so is there

    flat, unravel = ravel_pytree(parameters)

    def on_host(z: Float[np.ndarray, " numbers"]) -> tuple[float, Float[np.ndarray, " numbers"]]:
        value, slopes = value_and_grad(unravel(jnp.asarray(z, flat.dtype)), *arguments)
        slopes = np.asarray(ravel_pytree(slopes)[0], np.float64)
        sound = np.isfinite(float(value)) and np.isfinite(slopes).all()
        # The line search turns back from what is not finite.
        return (float(value), slopes) if sound else (np.finfo(float).max, np.zeros_like(slopes))

    def ends_at(z: Float[np.ndarray, " numbers"], value: float, last: bool = False) -> bool:
        here = unravel(jnp.asarray(z, flat.dtype))
        held_out, ends = journal.visit(here, last)
        journal.add(here, None if ends else value, held_out, sound=True)
        return ends

    def after(intermediate_result: Any) -> None:
        if ends_at(intermediate_result.x, float(intermediate_result.fun)):
            raise StopIteration

    start = np.asarray(flat, np.float64)
    known = on_host(start)
    if ends_at(start, known[0]):
        return 1
    found = scipy.optimize.minimize(
        lambda z: known if np.array_equal(z, start) else on_host(z),  # it begins with the start
        start, jac=True, method="L-BFGS-B", callback=after,
        options={"maxiter": journal.descent.steps},
    )  # fmt: skip
    if journal.entries[-1].held_out is None:  # it found no way down before the last step
        ends_at(found.x, found.fun, last=True)
    return found.nfev
