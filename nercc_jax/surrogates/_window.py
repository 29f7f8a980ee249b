"""Rows of a window that forgets: a ring, whose oldest are written over."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..codes import leaves_of


def length_of(name: str, tree: PyTree) -> int:
    """How many rows all leaves have. Raises: ValueError where they differ."""
    lengths = {leaf.shape[:1] for _, leaf in leaves_of(name, tree)}
    if len(lengths) != 1 or () in lengths:
        shapes = ", ".join(f"{label} {leaf.shape}" for label, leaf in leaves_of(name, tree))
        raise ValueError(f"{name} must have as many rows in every part: {shapes}")
    return lengths.pop()[0]


def one_row(tree: PyTree) -> PyTree:
    """A row of zeros like those of a tree, which may have none."""
    return jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape[1:]), leaf.dtype), tree)


def turn(
    observed: Bool[Array, " pairs"], place: Int[Array, ""], capacity: int
) -> tuple[Int[Array, " width"], Int[Array, ""], Int[Array, " width"]]:
    """Rows of the window whose turn it is, how many of them are written, and from which pairs.

    Of more pairs than the window holds, the last."""
    width = min(len(observed), capacity)
    order = jnp.argsort(~observed, stable=True)
    total = jnp.sum(observed)
    first = jnp.maximum(total - width, 0)
    source = jax.lax.dynamic_slice(order, (first,), (width,))
    return (place + jnp.arange(width)) % capacity, jnp.minimum(total, width), source


def written(
    rows: Float[Array, "capacity n"],
    new: Float[Array, "pairs n"],
    places: Int[Array, " width"],
    fresh: Bool[Array, " width"],
    source: Int[Array, " width"],
) -> Float[Array, "capacity n"]:
    """The window's rows with the new ones in these places, where they are fresh."""
    return rows.at[places].set(
        jnp.where(fresh[:, None], new[source].astype(rows.dtype), rows[places])
    )
