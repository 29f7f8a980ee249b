"""What a model must be: a callable on a batch."""

from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
from jaxtyping import Array, PyTree

Model: TypeAlias = Callable[..., Array]


def call_model(model: Model, batch: PyTree, *args: Any) -> Any:
    """`model(batch, *args)`, for a model that JAX can trace.

    Raises: ValueError, from the model's own error, where it takes one data point instead of a batch
    of them; else whatever the model raises.
    """
    try:
        return model(batch, *args)
    except Exception as error:
        one = jax.tree.map(lambda leaf: leaf[0], batch)
        # What fails on the batch while running only says nothing of shapes.
        if not _can_trace(model, batch, args) and _can_trace(model, one, args):
            raise ValueError(
                "the model takes one data point, not a batch of them: give jax.vmap(model)"
            ) from error
        raise


def _can_trace(model: Model, x: PyTree, args: tuple) -> bool:
    try:
        eqx.filter_eval_shape(lambda x: model(x, *args), x)
    except Exception:
        return False
    return True
