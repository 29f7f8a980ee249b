"""What workers do: run the models of a code on coded data points."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..codes import AbstractCode
from ._models import Model, call_model


def run_workers(
    model: Model | Sequence[Model],
    code: AbstractCode,
    coded: Float[Array, "groups num_workers ..."],
    *args: Any,
) -> Float[Array, "groups num_workers ..."]:
    """What all workers answer: each runs its own model on its coded data point of every group.

    `model(batch, *args)` maps (B, ...) to (B, ...), floats, and is called once. For a code whose
    workers run several (`worker_models`) it is a sequence of such, the served model first; each
    is called once, on the coded data points of all its workers, with the same `args`.

    Raises: ValueError where the number of models is not the code's, one returns another first axis
    or no floats, or their answers differ in shape.
    """
    return run_models(model, code.worker_models, coded, *args)


def run_models(
    model: Model | Sequence[Model],
    kinds: Int[np.ndarray, " slots"],
    coded: Float[Array, "groups slots ..."],
    *args: Any,
) -> Float[Array, "groups slots ..."]:
    """As `run_workers`, for any places of work and which model runs in each of them."""
    models = _models(model, kinds)
    if len(models) == 1:
        return _answers(models[0], coded, args)
    parts = [_answers(each, coded[:, kinds == kind], args) for kind, each in enumerate(models)]
    shapes = [part.shape[2:] for part in parts]
    if len(set(shapes)) != 1:
        raise ValueError(f"the models' answers differ in shape, served model first: {shapes}")
    order = np.argsort(kinds, kind="stable")
    answers = jnp.concatenate(parts, axis=1)
    return answers if np.all(np.diff(order) == 1) else answers[:, np.argsort(order)]


def _models(model: Model | Sequence[Model], kinds: np.ndarray) -> tuple[Model, ...]:
    models = (model,) if callable(model) else tuple(model)
    needed = int(kinds.max()) + 1
    if len(models) != needed:
        wanted = "alone" if needed == 1 else f"and {needed - 1} further, in this order"
        raise ValueError(
            f"the workers of this code run {needed} model{'s' * (needed > 1)}, but {len(models)} "
            f"came: give the served model {wanted}"
        )
    return models


def _answers(model: Model, coded: Array, args: tuple) -> Array:
    batch = coded.reshape(-1, *coded.shape[2:])
    y = call_model(model, batch, *args)
    if not isinstance(y, jax.Array) or y.ndim < 1 or y.shape[0] != batch.shape[0]:
        got = y.shape if isinstance(y, jax.Array) else type(y).__name__
        raise ValueError(
            f"the model must map a batch of {batch.shape[0]} to an array of as many answers: for "
            f"input {batch.shape} it returned {got}"
        )
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise ValueError(f"the model returned {y.dtype}: codes work on floats, logits for labels")
    return y.reshape(*coded.shape[:2], *y.shape[1:])
