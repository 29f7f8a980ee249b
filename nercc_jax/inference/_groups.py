"""Data points in groups of K, and the masks of their workers, as they are given."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, PyTree

from ..codes import AbstractCode
from ..codes._code import check_mask
from ..codes._trees import any_tracer, check_beside, check_floats, leaves_of
from ..splines.arrays import native


def as_groups(
    code: AbstractCode, x: PyTree, available: ArrayLike, grouped: bool | None = None
) -> tuple[PyTree, Bool[Array | np.ndarray, "groups num_workers"], bool]:
    """Return data points as groups with a mask each, and whether they came as groups.

    x, and errors, are those of `group_points`; `available` is a mask (N,) for all groups or one for
    each.
    """
    known = not (isinstance(available, jax.Array) or any_tracer(x))
    available = np.asarray(available) if known else jnp.asarray(available)
    groups, grouped = group_points(code, x, grouped, available.ndim)
    count = jax.tree.leaves(groups)[0].shape[0]
    masks = (count, code.num_workers) if available.ndim == 2 else (code.num_workers,)
    check_mask(available, masks)
    broadcast = np.broadcast_to if known else jnp.broadcast_to
    return groups, broadcast(available, (count, code.num_workers)), grouped


def group_points(
    code: AbstractCode, x: PyTree, grouped: bool | None = None, mask_axes: int = 1
) -> tuple[PyTree, bool]:
    """Return data points as groups (groups, K, ...), and whether they came so.

    What is not on a device stays where it is.

    Args:
        code: The code.
        x: A pytree of arrays (K, ...) or (groups, K, ...).
        grouped: Which of the two. Default: by the axes, of x or of the mask.
        mask_axes: The number of axes of the mask.

    Raises:
        ValueError: Shapes or dtypes do not fit, there is no group, or a part that is not coded
            differs within a group.
    """
    x = native(x, "x")
    x = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf), x)
    check_floats("x", x, beside=True)
    x = jax.tree.map(_in_working_precision, x)
    grouped = is_grouped(code.num_data, x, mask_axes, grouped)
    check_beside("x", x, 2 if grouped else 1)
    x = x if grouped else jax.tree.map(lambda leaf: leaf[None], x)
    for label, leaf in leaves_of("x", x):
        if any(isinstance(size, int) and size == 0 for size in leaf.shape):  # none is symbolic
            raise ValueError(f"{label} holds no group of {code.num_data} data points: {leaf.shape}")
    if len({leaf.shape[0] for leaf in jax.tree.leaves(x)}) > 1:
        shapes = ", ".join(f"{label} {leaf.shape}" for label, leaf in leaves_of("x", x))
        raise ValueError(f"the parts of x are of different numbers of groups: {shapes}")
    return x, grouped


def is_grouped(num_data: int, x: PyTree, mask_axes: int = 1, grouped: bool | None = None) -> bool:
    """Return whether x is many groups: as `grouped` says, else by the mask's axes or where K is.

    Raises:
        ValueError: That does not decide, or x is neither.
    """
    shapes = [(label, leaf.shape) for label, leaf in leaves_of("x", x)]
    single = all(shape[:1] == (num_data,) for _, shape in shapes) and mask_axes != 2
    many = all(shape[1:2] == (num_data,) for _, shape in shapes)
    summary = ", ".join(f"{label} of shape {shape}" for label, shape in shapes)
    if grouped is None and single and many:
        raise ValueError(
            f"{summary} may be one group of {num_data} or {shapes[0][1][0]} groups: say which with "
            "grouped=True or grouped=False, or give a mask per group, (groups, N)"
        )
    if grouped is not None:
        single, many = single and not grouped, many and grouped
    if not single and not many:
        forms = {None: "(K, ...) or (groups, K, ...)", True: "(groups, K, ...)", False: "(K, ...)"}
        wanted = forms[True if mask_axes == 2 else grouped]
        raise ValueError(
            f"{summary}: with this code and mask it must be {wanted}, K = {num_data}"
            + (", and one mask (N,)" if mask_axes == 2 and grouped is False else "")
        )
    return many


def _in_working_precision(leaf: Array | np.ndarray) -> Array | np.ndarray:
    if isinstance(leaf, jax.Array):
        return leaf
    return leaf.astype(jax.dtypes.canonicalize_dtype(leaf.dtype), copy=False)
