"""Metrics of decoded functions, where labels are not what matters."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from ..codes._checks import check_count
from ..codes._trees import join


def relative_rmse(
    decoded: PyTree[Float[ArrayLike, "points ..."]], own: PyTree[Float[ArrayLike, "points ..."]]
) -> Float[Array, ""]:
    """Return the root mean square error over the standard deviation of the function's outputs.

    Both are over all data points and outputs, the deviation about each output's mean: answering
    with the mean would give 1.

    Raises:
        ValueError: Shapes differ.
    """
    decoded, own = _vectors(decoded, own)
    spread = jnp.mean((own - jnp.mean(own, axis=0)) ** 2)
    return jnp.sqrt(jnp.mean((decoded - own) ** 2) / spread)


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


def recall(
    decoded: Float[Array, "points m"],
    own: Float[Array, "points m"],
    others: Float[Array, "others m"],
    *,
    number: int = 10,
) -> Float[Array, ""]:
    """Return the share of each embedding's nearest others that its decoded embedding finds, too.

    This is recall@10 (or another `number`) for a search of `others` by Euclidean distance.

    Raises:
        ValueError: `number` is not positive, or exceeds the number of others.
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
