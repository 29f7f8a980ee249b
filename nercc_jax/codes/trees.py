"""Pytrees of arrays that share their first axes, as one array of vectors, and back.

A code acts on every coordinate alike, so a data point or an answer may be any pytree of arrays: a
dict of heads, an image with its metadata. Data points are encoded leaf by leaf; answers are joined,
so that one mask of workers serves all leaves.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree, Shaped

from ..arrays import namespace, native, working_dtype


def leaves_of(name: str, tree: PyTree) -> Iterator[tuple[str, Any]]:
    """Return every leaf with its name: "x" for an array, "x['image']" in a dict.

    Raises:
        ValueError: The tree has no leaves, or is a list of numbers.
    """
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    if not found:
        raise ValueError(f"{name} holds no array: {tree!r}")
    if isinstance(tree, list) and not any(np.ndim(leaf) for _, leaf in found):
        raise ValueError(f"{name} is a list of numbers: give one array, np.asarray({name})")
    for path, leaf in found:
        yield name + jax.tree_util.keystr(path), leaf


def any_tracer(*trees: PyTree) -> bool:
    """Return whether a leaf is one of JAX's tracers."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees))


def to_device(
    tree: PyTree[Shaped[ArrayLike, "..."]], name: str = "an argument"
) -> PyTree[Shaped[Array, "..."]]:
    """Return the leaves as JAX's arrays.

    NumPy arrays are put on the device: `jnp.asarray` would compile a program for each shape.

    Raises:
        ValueError: As `native`.
    """

    def moved(leaf: Any) -> Array:
        return jax.device_put(leaf) if isinstance(leaf, np.ndarray) else jnp.asarray(leaf)

    return jax.tree.map(moved, native(tree, name))


def scalar_leaf(
    name: str, value: ArrayLike, dtype, *, least: float, most: float
) -> Float[Array, ""]:
    """Return a number of a code as a leaf.

    Raises:
        ValueError: It is not a scalar, or (outside a trace) not from `least` to `most`.
    """
    known = not isinstance(value, jax.Array)
    value = to_device(np.asarray(value, dtype)) if known else jnp.asarray(value, dtype)
    if value.shape != ():
        raise ValueError(f"{name} must be a scalar, not an array of shape {value.shape}")
    if not isinstance(value, Tracer) and not least <= float(value) <= most:
        wanted = "0 or positive" if least == 0 else "a number"
        finite = " and finite" if most < np.inf else ""
        raise ValueError(f"{name} must be {wanted}{finite}, not {value}")
    return value


def is_float(leaf: Any) -> bool:
    """Return whether an array is of a floating dtype, bfloat16 included."""
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def check_floats(name: str, tree: PyTree, hint: str = "") -> None:
    """Raise ValueError, which may end with a hint, if a leaf is not of floats."""
    for label, leaf in leaves_of(name, tree):
        if not is_float(leaf):
            raise ValueError(
                f"{label} is {leaf.dtype}: codes work on floats, so convert it first{hint}"
            )


def check_data(x: PyTree) -> None:
    """Raise ValueError if a part of the data points is not of floats, and cannot be coded."""
    check_floats(
        "x",
        x,
        "; token ids and labels cannot be mixed: code their embeddings, and give what all data "
        "points share to the model as a further argument",
    )


def check_leading(name: str, tree: PyTree, wanted: tuple[int, ...], what: str) -> None:
    """Raise ValueError if a leaf's first axes do not have the wanted sizes."""
    for label, leaf in leaves_of(name, tree):
        if leaf.shape[: len(wanted)] != wanted:
            axes = "first axis" if len(wanted) == 1 else f"first {len(wanted)} axes"
            size = wanted[0] if len(wanted) == 1 else wanted
            raise ValueError(
                f"{label} has shape {leaf.shape}; its {axes} must be the {size} {what}"
            )


@dataclasses.dataclass(frozen=True)
class Form:
    """The structure of a pytree whose leaves were joined to vectors: shapes and dtypes."""

    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]

    @property
    def size(self) -> int:
        """Return the length of the vectors."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def is_vector(self) -> bool:
        """Return whether it was one array of vectors."""
        return self.structure == jax.tree.structure(0) and len(self.shapes[0]) == 1

    @property
    def has_labels(self) -> bool:
        """Return whether all parts have two numbers or more, of which the largest is a label."""
        return all(shape[-1:] not in ((), (1,)) for shape in self.shapes)

    def split(self, vectors: Float[Any, "*lead m"]) -> PyTree[Float[Any, "..."]]:
        """Return the tree of vectors with any first axes, in its precision, float32 at least."""
        parts = [vectors]
        if len(self.shapes) > 1:
            ends = np.cumsum([math.prod(shape) for shape in self.shapes])
            parts = namespace(vectors).split(vectors, ends[:-1], axis=-1)
            parts = [part.astype(d) for part, d in zip(parts, self.dtypes, strict=True)]
        whole = [
            part.reshape(*part.shape[:-1], *shape)
            for part, shape in zip(parts, self.shapes, strict=True)
        ]
        return jax.tree.unflatten(self.structure, whole)


def join(tree: PyTree, axes: int) -> tuple[Float[Any, "*lead m"], Form]:
    """Return the leaves as vectors, next to each other, and the way back.

    `axes` is the number of first axes, which all leaves share.
    """
    leaves, structure = jax.tree.flatten(tree)
    shapes = tuple(leaf.shape[axes:] for leaf in leaves)
    dtypes = [leaf.dtype for leaf in leaves]
    flat = [  # there may be no row
        leaf.reshape(*leaf.shape[:axes], math.prod(shape))
        for leaf, shape in zip(leaves, shapes, strict=True)
    ]
    if len(flat) > 1:
        dtypes = list(map(working_dtype, dtypes))
        together = working_dtype(*dtypes)
        flat = [namespace(*flat).concatenate([part.astype(together) for part in flat], axis=-1)]
    return flat[0], Form(structure, shapes, tuple(map(str, dtypes)))


def points_of(groups: PyTree[Shaped[Array | np.ndarray, "groups size ..."]]) -> PyTree:
    """Return the data points of all groups in a row: (groups * K, ...)."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), groups)


def groups_of(points: PyTree[Shaped[Array | np.ndarray, "points ..."]], num_data: int) -> PyTree:
    """Return data points in a row as groups (groups, K, ...), which they fill."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, num_data, *leaf.shape[1:]), points)


def finite_points(x: PyTree, axes: int) -> Bool[Any, "*lead"]:
    """Return which data points are finite in all their coordinates; by NumPy for its arrays."""
    vectors = join(x, axes)[0]
    xp = namespace(vectors)
    return xp.all(xp.isfinite(vectors), axis=-1)


def check_finite(x: PyTree, axes: int) -> None:
    """Raise ValueError that names the data points that are not finite; not for tracers."""
    if any_tracer(x):
        return
    known = all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(x))
    find = finite_points if known else jax.jit(finite_points, static_argnums=1)
    finite = np.asarray(find(x, axes))
    if not finite.all():
        broken = np.argwhere(~finite) if axes > 1 else np.flatnonzero(~finite)
        raise ValueError(f"data points {broken.tolist()} are not finite: take them out")
