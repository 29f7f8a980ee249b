"""Ordering: short paths through data points, so that a code's neighbours are alike.

The splines run through the data points in their order, so the order decides how rough they are.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from ..codes import Decoded
from ..codes._checks import check_count
from ..codes._trees import is_float, join, leaves_of, points_of, to_device
from ..splines.arrays import native, working_dtype
from ._groups import is_grouped
from ._paths import check_rows_finite, short_paths

Features: TypeAlias = Callable[[PyTree], PyTree] | PyTree[Float[ArrayLike, "points ..."]]


def order_points(
    x: PyTree,
    num_data: int,
    *,
    features: Features | None = None,
    buffer_size: int = 1024,
) -> Int[Array, " points"]:
    """Return the order in which to code waiting data points x, (points, ...), in groups of K.

    Within each buffer of consecutive data points a short path is found (`short_path`) and cut into
    groups: `x[order].reshape(-1, K, ...)`. The larger the buffer, the more similar are the data
    points of a group; a buffer of K orders within the groups as they came. Points that are near in
    features should have similar predictions: the model's own outputs would be best, and pixels do
    for a shallow model only. One compilation serves all x of one shape, if `features` is one and
    the same function.

    Args:
        x: Data points, or a pytree of such arrays.
        num_data: K.
        features: What distances are taken of: an array (points, ...), or a function of x that makes
            one, and is jitted as models are (first layers, a small student). Default:
            `random_projection` of x.
        buffer_size: Data points in a buffer, of which the multiple of K below counts. The last
            buffer is as short as it must be; data points that fill no group are the end of its
            path.

    Raises:
        ValueError: Counts are out of range, a buffer holds no group, features are not one row for
            each data point, or, outside jit, features are not finite.
    """
    x = to_device(x)
    features = native(features, "features")
    order, finite = _order(x, features, _whole_groups(num_data, buffer_size))
    check_rows_finite(finite, "the features of data points")
    return order


def ordered(
    infer: Callable[..., Any],
    num_data: int,
    *,
    features: Features | None = None,
    buffer_size: int = 1024,
    grouped: bool | None = None,
) -> Callable[..., Any]:
    """Return `coded_inference`'s function, with the data points ordered on their way in and back.

    `(x, available, *args) -> predictions`, or `Decoded`, has the arguments and results of `infer`.
    The caller sees nothing of the order: predictions, and `recovered`, are of the data points where
    they came. What belongs to workers belongs to the groups that are sent: the g-th mask, and the
    g-th row of `responded`, is of the g-th group in the new order. Data points that are not finite
    come last in their buffer: `infer` gives NaN for their groups, and these are as few as can be.

    Args:
        infer: A function of `coded_inference` for a code of K = `num_data`.
        num_data: K.
        features: As in `order_points`.
        buffer_size: As in `order_points`.
        grouped: As in `coded_inference`.

    Raises:
        ValueError: x is not (K, ...) or (groups, K, ...); and as `order_points` and `infer`.
    """
    size = _whole_groups(num_data, buffer_size)

    def infer_ordered(x: PyTree, available: ArrayLike, *args: Any):
        x = to_device(x)
        many = is_grouped(num_data, x, np.ndim(available), grouped)
        flat = points_of(x) if many else x
        sent, back = _there_and_back(flat, native(features, "features"), size)
        sent = jax.tree.map(lambda row, leaf: row.reshape(leaf.shape), sent, x)
        return _in_place(infer(sent, available, *args), back, many)

    return infer_ordered


def random_projection(x: PyTree, size: int = 128) -> Float[Array, "points features"]:
    """Return features without a model: sums of x's numbers with random signs.

    Every `size`-th number is in the same sum.

    Distances are kept in the mean over signs, up to about sqrt(2 / size) of themselves each. It
    takes one pass over x, (points, ...), and the signs are always the same; x with no more than
    `size` numbers for each data point is its own projection.

    Source: the count sketch (Charikar, Chen and Farach-Colton 2002), with regular buckets.
    """
    size = check_count("size", size)
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(x)]
    # Token ids beside say nothing by their size; bytes of an image by themselves do.
    leaves = [leaf for leaf in leaves if is_float(leaf)] or leaves
    wide = [leaf.astype(working_dtype(leaf.dtype)) for leaf in leaves]
    flat, _ = join(wide, 1)
    number = flat.shape[1]
    if number <= size:
        return flat
    signs = _signs(number, flat.dtype)
    signed = jnp.pad(flat * signs, ((0, 0), (0, -number % size)))
    return jnp.sum(signed.reshape(len(flat), -1, size), axis=1)


def _signs(number: int, dtype: DTypeLike) -> Float[Array, " number"]:
    return jax.random.rademacher(jax.random.key(0), (number,), dtype)


def projection_on_host(
    shape: Sequence[int], size: int = 128
) -> Callable[[Float[np.ndarray, "..."]], Float[np.ndarray, " features"]]:
    """Return `random_projection` of one data point of this shape in float32, by NumPy.

    It is for data points that are on the host and come one by one: an image of 224 x 224 x 3 takes
    0.05 ms.
    """
    number = math.prod(shape)
    if number <= size:
        return np.ravel
    signs = np.zeros(number + -number % size, np.float32)
    signs[:number] = _signs(number, jnp.float32)
    signs, filling = signs.reshape(-1, size), np.zeros(-number % size, np.float32)

    def project(x: Float[np.ndarray, "..."]) -> Float[np.ndarray, " features"]:
        flat = np.ravel(x)
        if number % size:  # NumPy's own `pad` takes longer than all the rest
            flat = np.concatenate([flat, filling])
        with np.errstate(over="ignore", invalid="ignore"):
            return np.einsum("ij,ij->j", flat.reshape(signs.shape), signs)

    return project


@eqx.filter_jit
def _order(
    x: PyTree, features: Features | None, size: int
) -> tuple[Int[Array, " points"], Bool[Array, " points"]]:
    """Return the order in buffers of `size`, and which data points' features are finite."""
    for label, leaf in leaves_of("x", x):
        if leaf.ndim == 0 or len(leaf) == 0:
            raise ValueError(f"{label} has shape {leaf.shape}: there are no data points to order")
    rows = _rows(x, features)
    size = min(size, len(rows))
    count = len(rows) // size
    whole = rows[: count * size].reshape(count, size, -1)
    order, finite = short_paths(whole)
    order = (order + size * jnp.arange(count)[:, None]).reshape(-1)
    finite = finite.reshape(-1)
    if count * size < len(rows):
        last, last_finite = short_paths(rows[None, count * size :])
        order = jnp.concatenate([order, count * size + last[0]])
        finite = jnp.concatenate([finite, last_finite[0]])
    return order, finite


def _rows(x: PyTree, features: Features | None) -> Float[Array, "points features"]:
    made = random_projection(x) if features is None else features
    if callable(made):
        made = made(x)
    points = len(jax.tree.leaves(x)[0])
    for label, leaf in leaves_of("features", made):
        if jnp.shape(leaf)[:1] != (points,):
            raise ValueError(
                f"{label} have shape {jnp.shape(leaf)}; of {points} data points they must be "
                f"({points}, ...)"
            )
    rows, _ = join(to_device(made), 1)
    return rows.astype(working_dtype(rows.dtype))


@eqx.filter_jit
def _there_and_back(
    x: PyTree, features: Features | None, size: int
) -> tuple[PyTree, Int[Array, " points"]]:
    """Return x in order, and where in that order each data point is."""
    order, _ = _order(x, features, size)
    sent = jax.tree.map(lambda leaf: leaf[order], x)
    return sent, jnp.zeros_like(order).at[order].set(jnp.arange(len(order)))


@eqx.filter_jit
def _in_place(result: Any, back: Int[Array, " points"], grouped: bool) -> Any:
    """Return predictions, or `Decoded`, in the places that their data points had."""

    def move(values: Array) -> Array:
        flat = points_of(values) if grouped else values
        return flat[back].reshape(values.shape)

    if not isinstance(result, Decoded):
        return jax.tree.map(move, result)
    predictions = jax.tree.map(move, result.predictions)
    errors = None if result.expected_error is None else move(result.expected_error)
    return Decoded(predictions, result.responded, move(result.recovered), errors)


def _whole_groups(num_data: int, buffer_size: int) -> int:
    """Return the number of data points in a buffer."""
    num_data = check_count("num_data", num_data)
    buffer_size = check_count("buffer_size", buffer_size)
    if buffer_size < num_data:
        raise ValueError(
            f"a buffer of {buffer_size} data points holds no group: buffer_size must be "
            f"{num_data} or more"
        )
    return buffer_size // num_data * num_data
