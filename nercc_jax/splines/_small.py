"""Small dense matrices, one for each knot, with the knots on the last axis."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def product_of(
    a: Float[Array, "i j knots"], b: Float[Array, "j k knots"]
) -> Float[Array, "i k knots"]:
    return jnp.sum(a[:, :, None] * b[None], axis=1)


def diagonal(values: Float[Array, "2 knots"]) -> Float[Array, "2 2 knots"]:
    return jnp.eye(2, dtype=values.dtype)[..., None] * values


def triangle_of(
    rows: Float[Array, "rows columns knots"], size: int
) -> tuple[Float[Array, "size columns knots"], Float[Array, "left _ knots"]]:
    """Return the QR of the first `size` columns: the triangle's rows, and the rest without them."""
    made = []
    for place in range(size):
        pivot, rows = _column(rows)
        made.append(jnp.pad(pivot, ((place, 0), (0, 0))))
    return jnp.stack(made), rows


def _column(
    rows: Float[Array, "rows columns knots"],
) -> tuple[Float[Array, "columns knots"], Float[Array, "rows-1 columns-1 knots"]]:
    """Rotate all rows' first entries into the first row; return it, and the others without them.

    That is one Givens rotation after the other, in closed form: after k of them the first row is
    sum_{i<=k} a_i row_i / l_k, where a_i are the first entries and l_k^2 = sum_{i<=k} a_i^2.
    """
    entries = rows[:, 0]
    upto = np.tril(np.ones((len(rows), len(rows)), bool))[..., None, None]
    moments = jnp.sum(jnp.where(upto, entries[:, None] * rows, 0), axis=1)
    square = moments[:, 0]
    some = square > 0
    # Two `where`s, or the gradient of sqrt at zero is infinite.
    length = jnp.sqrt(jnp.where(some, square, 1))
    turned = jnp.where(some[:, None], moments / length[:, None], rows[:1])
    cosine = jnp.where(some[1:], jnp.where(some[:-1], length[:-1], 0) / length[1:], 1)
    sine = jnp.where(some[1:], entries[1:] / length[1:], 0)
    others = cosine[:, None] * rows[1:, 1:] - sine[:, None] * turned[:-1, 1:]
    return turned[-1], others


def back(triangle: Float[Array, "4 4"], right: Float[Array, "4 m"]) -> Float[Array, "4 m"]:
    """Solve with the upper triangle."""
    found: list[Array] = []
    for i in reversed(range(4)):
        rest = right[i] - sum(
            triangle[i, j] * x for j, x in zip(range(i + 1, 4), found, strict=True)
        )
        found.insert(0, rest / triangle[i, i])
    return jnp.stack(found)


def forth(triangle: Float[Array, "4 4"], right: Float[Array, "4 k"]) -> Float[Array, "4 k"]:
    """Solve with the upper triangle's transpose."""
    found: list[Array] = []
    for i in range(4):
        rest = right[i] - sum(triangle[j, i] * x for j, x in enumerate(found))
        found.append(rest / triangle[i, i])
    return jnp.stack(found)
