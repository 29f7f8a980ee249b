"""Coded inference: encode, model, decode as one jitted program."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float

from ._codes import AbstractCode, Decoded, as_mask, decode_groups, encode_groups

Model: TypeAlias = Callable[..., Array]


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
    kinds = code.worker_models
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
    y = model(batch, *args)
    if not isinstance(y, jax.Array) or y.ndim < 1 or y.shape[0] != batch.shape[0]:
        got = y.shape if isinstance(y, jax.Array) else type(y).__name__
        raise ValueError(
            f"the model must map a batch of {batch.shape[0]} to an array of as many answers: for "
            f"input {batch.shape} it returned {got}"
        )
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise ValueError(f"the model returned {y.dtype}: codes work on floats, logits for labels")
    return y.reshape(*coded.shape[:2], *y.shape[1:])


def coded_predictions(
    model: Model | Sequence[Model],
    code: AbstractCode,
    x: Float[ArrayLike, "groups num_data ..."],
    available: Bool[ArrayLike, "groups num_workers"],
    *args: Any,
) -> Decoded:
    """Encodes groups of K data points, runs the model on all coded ones at once, and decodes.

    A pure function: jit it, and differentiate it in x, the code, the model and its arguments.
    Models, and the errors raised for them: see `run_workers`. Source: arXiv 2402.04377, the three
    steps of NeRCC.
    """
    coded = encode_groups(code, jnp.asarray(x))
    y = run_workers(model, code, coded, *args)
    return decode_groups(code, y, as_mask(available, coded.shape[:2]))


def coded_inference(
    model: Model | Sequence[Model], code: AbstractCode, *, with_status: bool = False
) -> Callable[..., Any]:
    """One jitted function `(x, available, *args) -> predictions` for a model behind a code.

    x: (K, ...) for one group, or (groups, K, ...), of a float dtype; available: a mask (N,) for all
    groups, or one per group (groups, N). Predictions are (K, ...) or (groups, K, ...) accordingly,
    NaN where nothing can be recovered: in a group with a data point that is not finite, or where
    no worker is available. `with_status=True` returns `Decoded`, which tells the workers that were
    heard and the predictions that were recovered.

    `model` is any callable on a batch. If it is a pytree (an Equinox or NNX module, a
    `jax.tree_util.Partial`), its arrays are arguments of the program, not constants in it. `args`
    are passed on to it: `model(batch, *args)`. A code whose workers run further models beside the
    served one takes all of them, (served, further...).

    One compilation serves every straggler set. Raises: ValueError for shapes and dtypes that do
    not fit, before anything runs.
    """

    def infer(x: ArrayLike, available: ArrayLike, *args: Any):
        x, available = jnp.asarray(x), jnp.asarray(available)
        grouped = _grouped(code, x, available)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"x is {x.dtype}: codes work on floats, so convert it first")
        if not grouped:
            x = x[None]
        if x.shape[0] == 0:
            raise ValueError(f"x holds no group of {code.num_data} data points: shape {x.shape}")
        masks = (x.shape[0], code.num_workers) if available.ndim == 2 else (code.num_workers,)
        available = jnp.broadcast_to(as_mask(available, masks), (x.shape[0], code.num_workers))
        decoded = _run(model, code, x, available, *args)
        if not grouped:
            decoded = jax.tree.map(lambda leaf: leaf[0], decoded)
        return decoded if with_status else decoded.predictions

    return infer


_run = eqx.filter_jit(coded_predictions)


def _grouped(code: AbstractCode, x: Array, available: Array) -> bool:
    """Whether x is many groups; said by the mask's shape, else by which axis has length K."""
    single = x.ndim >= 1 and x.shape[0] == code.num_data
    many = x.ndim >= 2 and x.shape[1] == code.num_data
    if available.ndim == 2:
        single = False
    if single and many:
        raise ValueError(
            f"x of shape {x.shape} may be one group of {code.num_data} or {x.shape[0]} groups: "
            "give a mask per group, (groups, N), or x as (1, K, ...)"
        )
    if not single and not many:
        wanted = "(groups, K, ...)" if available.ndim == 2 else "(K, ...) or (groups, K, ...)"
        raise ValueError(
            f"x has shape {x.shape}, but with this code and mask it must be {wanted}, "
            f"K = {code.num_data}"
        )
    return many
