"""Metrics of decoded functions, where labels are not what matters."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree

from ..codes._trees import join


def row_errors(
    decoded: PyTree[Float[ArrayLike, "points ..."]], own: PyTree[Float[ArrayLike, "points ..."]]
) -> Float[Array, " points"]:
    """Return each data point's error: the root mean square over its outputs."""
    decoded, own = _vectors(decoded, own)
    return jnp.sqrt(jnp.mean((decoded - own) ** 2, axis=-1))


def coverage(
    decoded: PyTree[Float[ArrayLike, "points ..."]],
    own: PyTree[Float[ArrayLike, "points ..."]],
    bar: Float[ArrayLike, " points"],
) -> Float[Array, ""]:
    """Return the share of data points whose error is within its bar; exact ones (0) do not count.

    NaN where all are exact.

    Raises:
        ValueError: Shapes differ.
    """
    bar = jnp.asarray(bar)
    within, uncertain = row_errors(decoded, own) <= bar, bar > 0
    return jnp.mean(within, where=uncertain)


def _vectors(decoded: PyTree, own: PyTree) -> tuple[Array, Array]:
    decoded, own = jax.tree.map(jnp.asarray, (decoded, own))
    (decoded, form), (own, other) = join(decoded, 1), join(own, 1)
    if (form.structure, form.shapes) != (other.structure, other.shapes):
        raise ValueError(f"decoded outputs have shapes {form.shapes}, the model's {other.shapes}")
    return decoded, own
