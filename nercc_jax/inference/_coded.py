"""Coded inference: encode, model, decode as one jitted program."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Bool, Float

from ..codes import AbstractCode, Decoded, as_mask, decode_groups, encode_groups
from ._spmd import spmd_inference
from ._workers import Model, run_workers


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
    model: Model | Sequence[Model],
    code: AbstractCode,
    *,
    with_status: bool = False,
    mesh: Mesh | None = None,
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

    With a `mesh` that has an axis `workers`, the coded data points are spread over that axis, any N
    on any number of devices, and the predictions come back on all of them. Arrays of the model and
    of the code are placed once, here: those that lie on just this mesh's devices keep their
    sharding (over a further axis, say), others are replicated. `args` are placed likewise, on each
    call. Several processes (`jax.distributed`) all call with the same x and mask.

    One compilation serves every straggler set. Raises: ValueError for shapes and dtypes that do
    not fit, before anything runs, and for a mesh without the axis.
    """
    run = functools.partial(_run, model, code)
    if mesh is not None:
        run = spmd_inference(model, code, mesh)

    def infer(x: ArrayLike, available: ArrayLike, *args: Any):
        x, available, grouped = as_groups(code, x, available)
        decoded = run(x, available, args, grouped)
        return decoded if with_status else decoded.predictions

    return infer


@eqx.filter_jit
def _run(
    model: Model | Sequence[Model],
    code: AbstractCode,
    x: ArrayLike,
    available: ArrayLike,
    args: tuple,
    grouped: bool,
) -> Decoded:
    decoded = coded_predictions(model, code, x, available, *args)
    return decoded if grouped else jax.tree.map(lambda leaf: leaf[0], decoded)


def as_groups(
    code: AbstractCode, x: ArrayLike, available: ArrayLike
) -> tuple[ArrayLike, Array, bool]:
    """The inputs of `coded_inference` as groups with a mask each, and whether x came as groups.

    What is not on a device stays where it is. Raises: see there.
    """
    if not isinstance(x, jax.Array):
        x = np.asarray(x)
        x = x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False)
    available = jnp.asarray(available)
    grouped = is_grouped(code, x, available)
    groups = in_groups(code, x, grouped)
    masks = (len(groups), code.num_workers) if available.ndim == 2 else (code.num_workers,)
    available = jnp.broadcast_to(as_mask(available, masks), (len(groups), code.num_workers))
    return groups, available, grouped


def in_groups(code: AbstractCode, x: Any, grouped: bool) -> Any:
    """x as (groups, K, ...). Raises: ValueError where it is no floats, or empty."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype}: codes work on floats, so convert it first")
    x = x if grouped else x[None]
    if x.size == 0:
        raise ValueError(f"x holds no group of {code.num_data} data points: shape {x.shape}")
    return x


def is_grouped(code: AbstractCode, x: Array | np.ndarray, available: Array) -> bool:
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
