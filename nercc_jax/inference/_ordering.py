"""Ordering: short paths through data points, so that a code's neighbours are alike.

The splines run through the data points in their order, so the order decides how rough they are.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from ..codes import Decoded, check_count, is_float, join, leaves_of, points_of
from ._groups import is_grouped

Features: TypeAlias = Callable[[PyTree], PyTree] | PyTree[Float[ArrayLike, "points ..."]]

# So many rows' distances are held at a time where there are many buffers.
_AT_ONCE = 1024

# A shorter path must be so by more than distances are rounded.
_TOLERANCE = 1e-5


def short_path(features: Float[ArrayLike, "n d"]) -> Int[Array, " n"]:
    """An order of the rows in which the path through them, from one to the next, is short.

    The length is the sum of Euclidean distances between neighbours; the path is open. It starts at
    the row farthest from the mean and goes on to the nearest row not yet visited; then 2-opt turns
    stretches of it round, beginning at the longest steps, until each step has been tried, or 2n
    were. O(n^2) time and memory: 1,024 rows of 128 features take about 20 ms on two CPU cores.
    Batch it with `jax.vmap`. One compilation serves all features of one shape.

    Rows that are alike lie side by side. Inside jit, rows that are not finite come last.

    Raises: ValueError for what is no matrix of floats with a row, and, outside jit, where a row is
    not finite. Source: nearest neighbour and 2-opt are those of the travelling salesman (Croes
    1958).
    """
    features = jnp.asarray(features)
    if features.ndim != 2 or len(features) == 0:
        raise ValueError(f"features must be (n, d) with n of 1 or more, not {features.shape}")
    if not jnp.issubdtype(features.dtype, jnp.floating):
        raise ValueError(f"features are {features.dtype}: convert them to floats first")
    order, finite = _short_path(features)
    _check_finite(finite, "rows of features")
    return order


def order_points(
    x: PyTree,
    num_data: int,
    *,
    features: Features | None = None,
    buffer_size: int = 1024,
) -> Int[Array, " points"]:
    """The order in which to code waiting data points x, (points, ...), in groups of K.

    x may be a pytree of such arrays.

    Within each buffer of `buffer_size` consecutive data points a short path is found (`short_path`)
    and cut into groups: `x[order].reshape(-1, K, ...)`. The larger the buffer, the more alike the
    data points of a group are; a buffer of K orders within the groups as they came.

    - A buffer holds whole groups: of `buffer_size`, the multiple of K below it counts. The last
      buffer is as short as it must be; data points that fill no group are the end of its path.
    - `features`: what distances are taken of: an array (points, ...), or a function of x that makes
      one, and is jitted as models are (first layers, a small student). Without it,
      `random_projection` of x. What is near in features should have alike predictions: the model's
      own outputs would be best, and pixels do for a shallow model only.

    One compilation serves all x of one shape, if `features` is one and the same function.

    Raises: ValueError for counts out of range, a buffer that holds no group, features that are not
    one row a data point, and, outside jit, features that are not finite.
    """
    x = jax.tree.map(jnp.asarray, x)
    order, finite = _order(x, features, _whole_groups(num_data, buffer_size))
    _check_finite(finite, "the features of data points")
    return order


def ordered(
    infer: Callable[..., Any],
    num_data: int,
    *,
    features: Features | None = None,
    buffer_size: int = 1024,
    grouped: bool | None = None,
) -> Callable[..., Any]:
    """`coded_inference`'s function, with the data points ordered on their way in and back again.

    `(x, available, *args) -> predictions`, or `Decoded`, with the arguments and results of `infer`,
    which must be for a code of K = `num_data`; `grouped` as given there, the other arguments as in
    `order_points`. The caller sees nothing of the order: predictions, and `recovered`, are of the
    data points where they came.

    What belongs to workers belongs to the groups that are sent: groups are cut anew, so the g-th
    mask, and the g-th row of `heard`, is of the g-th group in the new order, not of the g-th group
    of x. A mask tells which workers answer the g-th batch sent, whatever data points are in it.

    Data points that are not finite come last in their buffer: `infer` gives NaN for their groups,
    and these are as few as can be.

    Raises: ValueError for x that is not (K, ...) or (groups, K, ...), and as `order_points` and
    `infer` do.
    """
    size = _whole_groups(num_data, buffer_size)

    def infer_ordered(x: PyTree, available: ArrayLike, *args: Any):
        x = jax.tree.map(jnp.asarray, x)
        many = is_grouped(num_data, x, np.ndim(available), grouped)
        flat = points_of(x) if many else x
        sent, back = _there_and_back(flat, features, size)
        sent = jax.tree.map(lambda row, leaf: row.reshape(leaf.shape), sent, x)
        return _in_place(infer(sent, available, *args), back, many)

    return infer_ordered


def random_projection(x: PyTree, size: int = 128) -> Float[Array, "points features"]:
    """Features without a model: sums of x's numbers with random signs, every `size`-th in one.

    Distances are kept in the mean over signs, up to about sqrt(2 / size) of themselves each. It
    takes one pass over x, (points, ...), and the signs are always the same; x with no more than
    `size` numbers a data point is its own projection. Source: the count sketch (Charikar, Chen and
    Farach-Colton 2002), with regular buckets.
    """
    size = check_count("size", size)
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(x)]
    # Token ids beside say nothing by their size; bytes of an image by themselves do.
    leaves = [leaf for leaf in leaves if is_float(leaf)] or leaves
    wide = [leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in leaves]
    flat, _ = join(wide, 1)
    number = flat.shape[1]
    if number <= size:
        return flat
    signs = jax.random.rademacher(jax.random.key(0), (number,), flat.dtype)
    signed = jnp.pad(flat * signs, ((0, 0), (0, -number % size)))
    return jnp.sum(signed.reshape(len(flat), -1, size), axis=1)


@eqx.filter_jit
def _short_path(features: Array) -> tuple[Int[Array, " n"], Bool[Array, " n"]]:
    """The path, and which rows are finite."""
    # An order has no derivative, and loops of unknown length have none in reverse.
    features = jax.lax.stop_gradient(features)
    features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    finite = jnp.all(jnp.isfinite(features), axis=1)
    rows = jnp.where(finite[:, None], features, 0)
    largest = jnp.max(jnp.abs(rows), initial=0)
    rows = rows / jnp.where(largest > 0, largest, 1)  # sums and squares must not overflow
    centred = jnp.where(finite[:, None], rows - jnp.mean(rows, axis=0), 0)
    distances = _distances(centred)
    start = _place_of_least(-jnp.sum(centred**2, axis=1))
    order = _two_opt(distances, _nearest_neighbour(distances, start))
    return order[jnp.argsort(~finite[order], stable=True)], finite


def _distances(rows: Float[Array, "n d"]) -> Float[Array, "n n"]:
    gram = jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)
    square = jnp.diagonal(gram)
    return jnp.sqrt(jnp.maximum(square[:, None] + square - 2 * gram, 0))


def _nearest_neighbour(distances: Float[Array, "n n"], start: Int[Array, ""]) -> Int[Array, " n"]:
    def step(state, _):
        here, visited = state
        visited = visited.at[here].set(jnp.inf)
        return (_place_of_least(distances[here] + visited), visited), here

    nobody = jnp.zeros_like(distances[0])
    return jax.lax.scan(step, (start, nobody), length=len(distances))[1]


def _two_opt(distances: Float[Array, "n n"], order: Int[Array, " n"]) -> Int[Array, " n"]:
    """Turns stretches of the path round while that makes it shorter.

    The path is closed by a row at distance 0 from all, before its first and after its last row, so
    that its ends are no exception. Step e leads from place e to e + 1. To turn places i+1..j round
    replaces the steps i and j by those between p_i and p_j, and p_(i+1) and p_(j+1). One trial
    takes the longest step i that is `untried`, new or not yet looked at, with its best partner j.
    Shorter steps have less to give, so the path is good long before the last trial.
    """
    n = len(order)
    distances = jnp.pad(distances, ((0, 1), (0, 1)))
    path = jnp.pad(order, 1, constant_values=n)
    place, step = jnp.arange(n + 2), jnp.arange(n + 1)

    def trial(state):
        number, path, length, untried = state
        i = _place_of_least(jnp.where(untried, -length, jnp.inf))
        new = distances[path[i]][path[:-1]] + distances[path[i + 1]][path[1:]]
        change = jnp.where(step == i, 0, new - length[i] - length)
        j = _place_of_least(change)
        better = change[j] < -_TOLERANCE * length[i]
        first = jnp.where(better, jnp.minimum(i, j), i)
        last = jnp.where(better, jnp.maximum(i, j), i)
        turned = jnp.where((place > first) & (place <= last), first + last + 1 - place, place)
        path = path[turned]
        inner = jnp.where((step > first) & (step < last), first + last - step, step)
        ends = jnp.stack([first, last])
        length = length[inner].at[ends].set(distances[path[ends], path[ends + 1]])
        return number + 1, path, length, untried[inner].at[ends].set(better)

    def unfinished(state):
        number, _, _, untried = state
        return (number < 2 * n) & jnp.any(untried)

    everything = jnp.ones(n + 1, bool)
    start = (0, path, distances[path[:-1], path[1:]], everything)
    return jax.lax.while_loop(unfinished, trial, start)[1][1:-1]


def _place_of_least(values: Float[Array, " n"]) -> Int[Array, ""]:
    """`argmin`, of which XLA makes slow code on a CPU: 1,024 values in 2 us instead of 9."""
    place = jnp.arange(len(values))
    return jnp.min(jnp.where(values == jnp.min(values), place, len(values) - 1))


@eqx.filter_jit
def _order(
    x: PyTree, features: Features | None, size: int
) -> tuple[Int[Array, " points"], Bool[Array, " points"]]:
    """The order in buffers of `size`, and which data points' features are finite."""
    for label, leaf in leaves_of("x", x):
        if leaf.ndim == 0 or len(leaf) == 0:
            raise ValueError(f"{label} has shape {leaf.shape}: there are no data points to order")
    rows = _rows(x, features)
    size = min(size, len(rows))
    count = len(rows) // size
    whole = rows[: count * size].reshape(count, size, -1)
    together = max(_AT_ONCE // size, 1)
    order, finite = jax.lax.map(_short_path, whole, batch_size=together if together > 1 else None)
    order = (order + size * jnp.arange(count)[:, None]).reshape(-1)
    finite = finite.reshape(-1)
    if count * size < len(rows):
        last, last_finite = _short_path(rows[count * size :])
        order = jnp.concatenate([order, count * size + last])
        finite = jnp.concatenate([finite, last_finite])
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
    rows, _ = join(jax.tree.map(jnp.asarray, made), 1)
    return rows.astype(jnp.promote_types(rows.dtype, jnp.float32))


@eqx.filter_jit
def _there_and_back(
    x: PyTree, features: Features | None, size: int
) -> tuple[PyTree, Int[Array, " points"]]:
    """x in order, and where in that order each data point is."""
    order, _ = _order(x, features, size)
    sent = jax.tree.map(lambda leaf: leaf[order], x)
    return sent, jnp.zeros_like(order).at[order].set(jnp.arange(len(order)))


@eqx.filter_jit
def _in_place(result: Any, back: Int[Array, " points"], grouped: bool) -> Any:
    """Predictions, or `Decoded`, in the places that their data points had."""

    def move(values: Array) -> Array:
        flat = points_of(values) if grouped else values
        return flat[back].reshape(values.shape)

    if not isinstance(result, Decoded):
        return jax.tree.map(move, result)
    predictions = jax.tree.map(move, result.predictions)
    return Decoded(predictions, result.heard, move(result.recovered))


def _whole_groups(num_data: int, buffer_size: int) -> int:
    """How many data points a buffer holds."""
    num_data = check_count("num_data", num_data)
    buffer_size = check_count("buffer_size", buffer_size)
    if buffer_size < num_data:
        raise ValueError(
            f"a buffer of {buffer_size} data points holds no group: buffer_size must be "
            f"{num_data} or more"
        )
    return buffer_size // num_data * num_data


def _check_finite(finite: Bool[Array, " n"], what: str) -> None:
    if not isinstance(finite, Tracer) and not np.all(finite):
        broken = np.flatnonzero(~np.asarray(finite))
        shown = ", ".join(map(str, broken[:10])) + (", ..." if broken.size > 10 else "")
        raise ValueError(f"{what} are not finite: {shown}; take them out")
