"""What all gradient descents here do alike: a step that is not finite changes nothing."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree


def sound_step(
    optimizer: optax.GradientTransformation,
    objective: Callable[..., Float[Array, ""]],
    parameters: PyTree,
    state: Any,
    *arguments: Any,
) -> tuple[Float[Array, ""], Bool[Array, ""], PyTree, Any]:
    """One step down `objective(parameters, *arguments)`, by an optimizer that leaves out what is
    not finite (`optax.apply_if_finite`): its value, whether all was finite, parameters, state."""
    value, slopes = jax.value_and_grad(objective)(parameters, *arguments)
    # A broken objective must not move anything, whatever its gradient says.
    slopes = jax.tree.map(lambda slope: jnp.where(jnp.isfinite(value), slope, jnp.nan), slopes)
    finite = [jnp.all(jnp.isfinite(slope)) for slope in jax.tree.leaves(slopes)]
    updates, state = optimizer.update(slopes, state, parameters)
    return value, jnp.all(jnp.stack(finite)), optax.apply_updates(parameters, updates), state


def warn_of_rejected(rejected: int, steps: int, name: str) -> None:
    """A RuntimeWarning, to the caller's caller, where steps were rejected; `name` is what was
    descended."""
    if rejected:
        warnings.warn(
            f"{rejected} of {steps} steps were rejected: their {name} or gradient was not finite",
            RuntimeWarning,
            stacklevel=3,
        )
