"""Orders of data points: short paths through them, so that neighbours in a code are similar.

The splines run through the data points in their order, so the order decides how rough they are.
"""

from collections.abc import Callable
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from ..arrays import check_count, native, working_dtype
from ..codes.trees import is_float, join, leaves_of, to_device

Features: TypeAlias = Callable[[PyTree], PyTree] | PyTree[Float[ArrayLike, "points ..."]]


def order_points(
    x: PyTree,
    num_data: int,
    *,
    features: Features | None = None,
    buffer_size: int = 1024,
) -> Int[Array, " points"]:
    """Return the order in which to code waiting data points x, (points, ...), in groups of K.

    Within each buffer of consecutive data points a short path is found and cut into groups:
    `x[order].reshape(-1, K, ...)`. The larger the buffer, the more similar are the data points of a
    group; a buffer of K keeps groups and orders each. Points that are near in features should have
    similar predictions: the model's own outputs would be best, and pixels are good only for a
    shallow model. One compilation serves all x of one shape if `features` is the same function.

    The length of a path is the sum of Euclidean distances between neighbours; the path is open, and
    equal rows are neighbours. It starts at the row farthest from the mean and continues to the
    nearest row not yet visited. Then 2-opt reverses stretches of it, starting at the longest steps,
    until each step has been tried, or 2n trials were made. It takes O(n^2) time and memory on the
    host's CPU: about 20 ms for 1,024 rows of 128 features on two cores. Inside jit, the search is
    part of the program, which is slow on accelerators, and data points that are not finite come
    last in their buffer.

    Args:
        x: Data points, or a pytree of such arrays.
        num_data: K.
        features: The vectors whose distances count: an array (points, ...), or a function of x that
            returns one and is jitted as models are (first layers, a small student). Default:
            `random_projection` of x.
        buffer_size: Data points in a buffer, rounded down to a multiple of K. The last buffer may
            be shorter; data points that fill no group are the end of its path.

    Raises:
        ValueError: Counts are out of range, a buffer holds no group, features do not have one row
            for each data point, or, outside jit, features are not finite.

    Source: nearest neighbour and 2-opt are those of the travelling salesman (Croes 1958).
    """
    num_data = check_count("num_data", num_data)
    buffer_size = check_count("buffer_size", buffer_size)
    if buffer_size < num_data:
        raise ValueError(
            f"a buffer of {buffer_size} data points holds no group: buffer_size must be "
            f"{num_data} or more"
        )
    rows = _rows(to_device(x), native(features, "features"))
    here = not isinstance(rows, Tracer) and rows.is_fully_addressable
    elsewhere = here and jax.default_backend() != "cpu"
    if elsewhere:  # each of the 3n steps would be several launches
        rows = jax.device_put(rows, jax.local_devices(backend="cpu")[0])
    size = min(buffer_size // num_data * num_data, len(rows))
    count = len(rows) // size
    whole = count * size
    orders, finites = [], []
    parts = [(0, rows[:whole].reshape(count, size, rows.shape[1])), (whole, rows[None, whole:])]
    for start, part in parts:
        if part.shape[1]:
            found, finite = _search(part)
            places = start + size * np.arange(len(found))[:, None]
            orders.append((found + places.astype(found.dtype)).ravel())
            finites.append(finite.ravel())
    order, finite = jnp.concatenate(orders), jnp.concatenate(finites)
    if not isinstance(finite, Tracer) and not np.all(finite):
        broken = np.flatnonzero(~np.asarray(finite))
        shown = ", ".join(map(str, broken[:10])) + (", ..." if broken.size > 10 else "")
        raise ValueError(f"the features of data points are not finite: {shown}; take them out")
    return jax.device_put(np.asarray(order)) if elsewhere else order


def random_projection(x: PyTree, size: int = 128) -> Float[Array, "points features"]:
    """Return features without a model: sums of x's numbers with random signs.

    Every `size`-th number is in the same sum. Squared distances are kept in the mean over signs,
    each with a relative deviation of about sqrt(2 / size). The signs are always the same; x with no
    more than `size` numbers for each data point is its own projection.

    Source: the count sketch (Charikar, Chen and Farach-Colton 2002), with regular buckets.
    """
    leaves = jax.tree.leaves(x)
    # The size of token ids means nothing; that of an image's bytes does, if there are no floats.
    leaves = [leaf for leaf in leaves if is_float(leaf)] or leaves
    flat, _ = join([leaf.astype(working_dtype(leaf.dtype)) for leaf in leaves], 1)
    points, number = flat.shape
    if number <= size:
        return flat
    signed = flat * jax.random.rademacher(jax.random.key(0), (number,), flat.dtype)
    signed = jnp.pad(signed, ((0, 0), (0, -number % size)))
    return jnp.sum(signed.reshape(points, -1, size), axis=1)


@eqx.filter_jit
def _rows(x: PyTree, features: Features | None) -> Float[Array, "points features"]:
    for label, leaf in leaves_of("x", x):
        if leaf.ndim == 0 or len(leaf) == 0:
            raise ValueError(f"{label} has shape {leaf.shape}: there are no data points to order")
    points = len(jax.tree.leaves(x)[0])
    made = random_projection(x) if features is None else features
    made = made(x) if callable(made) else made
    for label, leaf in leaves_of("features", made):
        if jnp.shape(leaf)[:1] != (points,):
            raise ValueError(
                f"{label} have shape {jnp.shape(leaf)}; of {points} data points they must be "
                f"({points}, ...)"
            )
    return join(to_device(made), 1)[0]


@jax.jit
def _search(
    rows: Float[Array, "buffers n d"],
) -> tuple[Int[Array, "buffers n"], Bool[Array, "buffers n"]]:
    """Return a short path through each buffer, and which rows are finite; others come last."""
    # An order has no derivative, and loops of unknown length have none in reverse.
    rows = jax.lax.stop_gradient(rows.astype(working_dtype(rows.dtype)))
    finite = jnp.all(jnp.isfinite(rows), axis=2)
    rows = jnp.where(finite[..., None], rows, 0)
    largest = jnp.max(jnp.abs(rows), axis=(1, 2), keepdims=True, initial=0)
    rows = rows / jnp.where(largest > 0, largest, 1)  # sums and squares must not overflow
    rows = jnp.where(finite[..., None], rows - jnp.mean(rows, axis=1, keepdims=True), 0)
    # Small buffers are searched together. A loop over several ends when the last one is done, and
    # keeps the results of the others.
    together = min(1024 // rows.shape[1], len(rows))
    order = jax.lax.map(_path, rows, batch_size=together if together > 1 else None)
    broken = jnp.take_along_axis(~finite, order, axis=1)
    last = jnp.argsort(broken, axis=1, stable=True)
    return jnp.take_along_axis(order, last, axis=1), finite


def _path(rows: Float[Array, "n d"]) -> Int[Array, " n"]:
    """Return a path that visits the nearest row each time, improved by 2-opt."""
    n = len(rows)
    gram = jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)
    square = jnp.diagonal(gram)
    distances = jnp.sqrt(jnp.maximum(square[:, None] + square - 2 * gram, 0))

    def go_on(state, _):
        here, visited = state
        visited = visited.at[here].set(jnp.inf)
        return (_place_of_least(distances[here] + visited), visited), here

    start = _place_of_least(-jnp.sum(rows**2, axis=1)), jnp.zeros_like(distances[0])
    order = jax.lax.scan(go_on, start, length=n)[1]

    # 2-opt: reverse stretches of the path while that makes it shorter. A row at distance 0 from all
    # stands before the first and after the last row, so that ends are not an exception. Step e
    # leads from place e to e + 1. Reversing places i+1..j replaces the steps i and j by those
    # between p_i and p_j, and p_(i+1) and p_(j+1). One trial takes the longest step i that is
    # `untried`, that is, new or not yet looked at, with its best partner j. Shorter steps can save
    # less, so the path is good long before the last trial.
    distances = jnp.pad(distances, ((0, 1), (0, 1)))
    path = jnp.pad(order, 1, constant_values=n)
    place, step = jnp.arange(n + 2), jnp.arange(n + 1)

    def trial(state):
        number, path, length, untried = state
        i = _place_of_least(jnp.where(untried, -length, jnp.inf))
        new = distances[path[i]][path[:-1]] + distances[path[i + 1]][path[1:]]
        change = jnp.where(step == i, 0, new - length[i] - length)
        j = _place_of_least(change)
        better = change[j] < -1e-5 * length[i]  # by more than distances are rounded
        first = jnp.where(better, jnp.minimum(i, j), i)
        last = jnp.where(better, jnp.maximum(i, j), i)
        turned = jnp.where((place > first) & (place <= last), first + last + 1 - place, place)
        path = path[turned]
        inner = jnp.where((step > first) & (step < last), first + last - step, step)
        ends = jnp.stack([first, last])
        length = length[inner].at[ends].set(distances[path[ends], path[ends + 1]])
        return number + 1, path, length, untried[inner].at[ends].set(better)

    start = 0, path, distances[path[:-1], path[1:]], jnp.ones(n + 1, bool)
    found = jax.lax.while_loop(lambda state: (state[0] < 2 * n) & jnp.any(state[3]), trial, start)
    return found[1][1:-1]


def _place_of_least(values: Float[Array, " n"]) -> Int[Array, ""]:
    """Return `argmin`, of which XLA makes slow code on a CPU: 1,024 values in 2 us instead of 9."""
    place = jnp.arange(len(values))
    return jnp.min(jnp.where(values == jnp.min(values), place, len(values) - 1))
