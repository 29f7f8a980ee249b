"""What decoded outputs of a function are judged by, where labels are not what matters."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from ..codes import check_count, join


def relative_rmse(
    decoded: PyTree[Float[ArrayLike, "points ..."]], own: PyTree[Float[ArrayLike, "points ..."]]
) -> Float[Array, ""]:
    """The root mean square error by the standard deviation of the function's own outputs.

    Both over all data points and outputs, the deviation about each output's mean: 1 is what
    answering with the mean would give. Raises: ValueError where shapes differ.
    """
    decoded, own = _vectors(decoded, own)
    spread = jnp.mean((own - jnp.mean(own, axis=0)) ** 2)
    return jnp.sqrt(jnp.mean((decoded - own) ** 2) / spread)


def row_errors(
    decoded: PyTree[Float[ArrayLike, "points ..."]], own: PyTree[Float[ArrayLike, "points ..."]]
) -> Float[Array, " points"]:
    """Each data point's error: the root mean square over its outputs, as deviations have it."""
    decoded, own = _vectors(decoded, own)
    return jnp.sqrt(jnp.mean((decoded - own) ** 2, axis=-1))


def coverage(
    decoded: PyTree[Float[ArrayLike, "points ..."]],
    own: PyTree[Float[ArrayLike, "points ..."]],
    bar: Float[ArrayLike, " points"],
) -> Float[Array, ""]:
    """The share of data points whose error is within its bar, of those that are not exact (0).

    NaN where all are. Raises: ValueError where shapes differ.
    """
    bar = jnp.asarray(bar)
    within, uncertain = row_errors(decoded, own) <= bar, bar > 0
    return jnp.mean(within, where=uncertain)


def recall(
    decoded: Float[Array, "points m"],
    own: Float[Array, "points m"],
    others: Float[Array, "others m"],
    *,
    number: int = 10,
) -> Float[Array, ""]:
    """Of embeddings: the share of each one's nearest others that its decoded one finds, too.

    recall@10 for a search of `others`, by Euclidean distance. Raises: ValueError for a `number`
    that is none, or more than there are others.
    """
    check_count("number", number)
    if number > len(others):
        raise ValueError(f"there are {len(others)} others, of which {number} cannot be the nearest")
    found, wanted = (_nearest(each, others, number) for each in (decoded, own))
    return jnp.mean(jnp.any(found[:, :, None] == wanted[:, None], axis=1))


def _nearest(points: Array, others: Array, number: int) -> Int[Array, "points number"]:
    product = jnp.matmul(points, others.T, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.top_k(2 * product - jnp.sum(others**2, axis=1), number)[1]


def _vectors(decoded: PyTree, own: PyTree) -> tuple[Array, Array]:
    decoded, own = jax.tree.map(jnp.asarray, (decoded, own))
    (decoded, form), (own, other) = join(decoded, 1), join(own, 1)
    if (form.structure, form.shapes) != (other.structure, other.shapes):
        raise ValueError(f"decoded outputs have shapes {form.shapes}, the model's {other.shapes}")
    return decoded, own
