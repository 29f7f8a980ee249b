"""Workers: the models of a code on coded data points."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, Shaped

from ..codes import AbstractCode
from ..codes._trees import is_float, leaves_of, points_of
from ._models import Model, call_on_batch


def run_workers(
    model: Model | Sequence[Model],
    code: AbstractCode,
    coded: PyTree[Shaped[Array, "groups num_workers ..."]],
    *args: Any,
) -> PyTree[Float[Array, "groups num_workers ..."]]:
    """Return all workers' answers: each runs its own model on its coded data point of every group.

    Args:
        model: A function `model(batch, *args)`, (B, ...) to (B, ...), of floats, which is called
            once; both may be pytrees of such arrays. For a code whose workers run several
            (`worker_models`), a sequence of such, the served model first; each is called once, on
            the coded data points of all its workers.
        code: The code.
        coded: Coded data points.
        *args: Further arguments of the models.

    Raises:
        ValueError: The number of models is not the code's, one returns another first axis or no
            floats, or their answers differ in shape.
    """
    return run_models(model, code.worker_models, coded, *args)


def run_models(
    model: Model | Sequence[Model],
    kinds: Int[np.ndarray, " slots"],
    coded: PyTree[Shaped[Array, "groups slots ..."]],
    *args: Any,
) -> PyTree[Float[Array, "groups slots ..."]]:
    """Run models as `run_workers`, for any places of work and which model runs in each of them."""
    models = _models(model, kinds)
    if len(models) == 1:
        return _answers(models[0], coded, args)
    parts = []
    for kind, each in enumerate(models):
        theirs = jax.tree.map(lambda leaf, kind=kind: leaf[:, kinds == kind], coded)
        parts.append(_answers(each, theirs, args))
    forms = [jax.tree.map(lambda leaf: leaf.shape[2:], part) for part in parts]
    if any(form != forms[0] for form in forms):
        raise ValueError(f"the models' answers differ in shape, served model first: {forms}")
    order = np.argsort(kinds, kind="stable")

    def in_order(*leaves: Array) -> Array:
        together = jnp.concatenate(leaves, axis=1)
        return together if np.all(np.diff(order) == 1) else together[:, np.argsort(order)]

    return jax.tree.map(in_order, *parts)


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


def _answers(model: Model, coded: PyTree, args: tuple) -> PyTree:
    shape = jax.tree.leaves(coded)[0].shape[:2]
    batch = points_of(coded)
    with jax.named_scope("nercc.model"):
        y = call_on_batch(model, batch, *args)
    for label, leaf in leaves_of("the model's answer", y):
        if not is_float(leaf):
            raise ValueError(f"{label} was {leaf.dtype}: codes work on floats, logits for labels")
    return jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), y)
