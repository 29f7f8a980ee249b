"""Pairs (input, answer) as a learner holds them, and principal components as their features."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree, Shaped

from ..codes._checks import check_count
from ..codes._trees import Form, finite_points, is_float, join, leaves_of, to_device
from ..evaluation._criteria import root_mean_square, safe_sqrt
from ..splines.arrays import constant, namespace, product, working_dtype
from ._interface import check_like, outputs_of_groups
from ._kernels import Kernel

Function = Callable[[PyTree], PyTree]


class Pairs(NamedTuple):
    """Rows of pairs; zeros where a pair is not `known` (not observed, or not finite)."""

    features: Float[Any, "pairs features"]
    residuals: Float[Any, "pairs m"]
    priors: Float[Any, "pairs m"] | None
    known: Bool[Any, " pairs"]


def pairs_of(
    features: Function | None,
    prior: Function | None,
    form: Form,
    x: PyTree[Shaped[Any, "pairs ..."]],
    y: PyTree[Float[Any, "pairs ..."]],
    observed: Bool[Any, " pairs"] | None = None,
) -> Pairs:
    """Return inputs and answers as rows; values that are not observed may be anything.

    The rows are NumPy's arrays if x and y are.

    Raises:
        ValueError: x and y have different lengths, or outputs another structure.
    """
    check_like(form, join(y, 1)[1])
    pairs = length_of("y", y)
    if length_of("x", x) != pairs:
        raise ValueError(f"x are {length_of('x', x)} data points, y {pairs} answers")
    xp = namespace(*jax.tree.leaves((x, y)))
    sound = finite_points(x, 1) & finite_points(y, 1)
    known = sound if observed is None else sound & xp.asarray(observed)

    def clean(leaf: Any) -> Any:
        mask = known.reshape(-1, *[1] * (leaf.ndim - 1))
        return xp.where(mask, leaf, xp.zeros_like(leaf)) if is_float(leaf) else leaf

    x, y = jax.tree.map(clean, (x, y))
    z, r = xp.asarray(features_of(features, x)), xp.asarray(join(y, 1)[0])
    priors = None
    if prior is not None:
        priors, found = join(prior(x), 1)
        check_like(found, form)
        priors = xp.asarray(priors)
        r = r - priors
    known = xp.asarray(known) & xp.all(xp.isfinite(z), axis=1) & xp.all(xp.isfinite(r), axis=1)
    z, r, priors = jax.tree.map(lambda leaf: xp.where(known[:, None], leaf, 0), (z, r, priors))
    return Pairs(z, r, priors, known)


def prior_of_groups(
    prior: Function, groups: PyTree[Shaped[Array, "groups size ..."]], form: Form
) -> Float[Array, "groups size m"]:
    """Return the prior's outputs on groups; raise ValueError where their structure is another."""
    priors, found = join(outputs_of_groups(prior, groups), 2)
    check_like(found, form)
    return priors


def features_of(
    features: Function | None, x: PyTree[Shaped[Any, "points ..."]]
) -> Float[Any, "points d"]:
    """Return the features of data points as vectors: their own floats without a function."""
    found = x if features is None else features(x)
    floats = [leaf for leaf in jax.tree.leaves(found) if is_float(leaf)]
    if not floats:
        raise ValueError("there is no float among the data points to learn by: give `features`")
    vectors = join(floats, 1)[0]
    return vectors.astype(working_dtype(vectors.dtype))


def length_of(name: str, tree: PyTree) -> int:
    """Return the number of rows of all leaves; raise ValueError where they differ."""
    lengths = {leaf.shape[:1] for _, leaf in leaves_of(name, tree)}
    if len(lengths) != 1 or () in lengths:
        shapes = ", ".join(f"{label} {leaf.shape}" for label, leaf in leaves_of(name, tree))
        raise ValueError(f"{name} must have as many rows in every part: {shapes}")
    return lengths.pop()[0]


def one_row(tree: PyTree) -> PyTree:
    """Return one row of zeros like those of a tree, which may have none."""
    return jax.tree.map(lambda leaf: namespace(leaf).zeros((1, *leaf.shape[1:]), leaf.dtype), tree)


class PairWindow(eqx.Module):
    """The latest pairs, in a ring of rows. Answers to the same input are one pair.

    Left apart, copies of a pair would vouch for each other: leaving one out would leave its copy.
    So would inputs that differ by rounding alone (`Kernel.same`): the earliest stands for all.

    Attributes:
        inputs: Features of the pairs.
        residuals: Mean answers of the pairs less the prior.
        priors: The prior's outputs, if there is a prior.
        counts: The number of answers of each pair; 0 where a row holds none.
        scatter: The root mean square distance of answers to the same input from their mean.
        place: The row that is written next, unless its input has come again.
    """

    inputs: Float[Any, "capacity features"]
    residuals: Float[Any, "capacity m"]
    priors: Float[Any, "capacity m"] | None
    counts: Int[Any, " capacity"]
    scatter: Float[Any, " capacity"]
    place: Int[Any, ""]


def learn_pairs(
    window: PairWindow, new: Pairs, kernel: Kernel
) -> tuple[PairWindow, Int[Any, " changed"]]:
    """Return the window with new pairs in place of the oldest, and the rows that may differ.

    Of more inputs than the window holds, the last are taken. Rows whose input has come again are
    kept for another turn of the ring.
    """
    z, r, priors, known = new
    xp, size, number = namespace(z), len(window.counts), len(known)
    if number == 0:
        return window, xp.zeros(0, int)
    width, rows = min(number, size), xp.arange(size)

    # Which row or, for an input that is new, which earlier pair has the same input.
    old = kernel.same(z, window.inputs) & known[:, None] & (window.counts > 0)
    first = xp.argmax(kernel.same(z, z) & known, axis=1)
    for _ in range(number.bit_length()):  # what is the same as the same is the same
        first = first[first]
    merged = xp.any(old, axis=1)[first]
    leads = known & ~merged & (first == xp.arange(number))
    order = xp.argsort((rows - window.place) % size + size * xp.any(old, axis=0))[:width]
    rank = xp.cumsum(leads) - 1
    total = xp.sum(leads)
    rank = rank - xp.maximum(total - width, 0)
    count = xp.minimum(total, width)
    written = _add(xp.zeros(size, int), order, xp.arange(width) < count) > 0
    at = xp.where(merged, xp.argmax(old, axis=1)[first], order[xp.maximum(rank, 0)[first]])
    lost = ~known | xp.where(merged, written[at], rank[first] < 0)
    at = xp.where(lost, size, at)

    # Means are those of the earlier answers plus changes: equal answers change nothing.
    source = _add(xp.zeros(size, int), xp.where(leads, at, size), xp.arange(number))
    counts = xp.where(written, 0, window.counts)

    def start(rows: Any, new: Any) -> Any:
        return xp.where(written[:, None], new[source].astype(rows.dtype), rows)

    base = start(window.residuals, r)
    held = xp.minimum(at, size - 1)
    added = _add(xp.zeros(size, int), at, xp.ones(number, int))
    change = _add(xp.zeros_like(base), at, r.astype(base.dtype) - base[held])
    after = counts + added
    each = xp.maximum(after, 1)
    mean = base + change / each[:, None]
    apart = root_mean_square(r.astype(base.dtype) - mean[held], axis=1)
    before = xp.where(written, 0, window.scatter)
    moved = root_mean_square(base - mean, axis=1)
    unit = constant(xp.maximum(xp.max(xp.where(lost, 0, apart)), xp.max(before)))
    unit = xp.where(unit > 0, unit, 1)
    square = counts * ((before / unit) ** 2 + (moved / unit) ** 2)
    square = _add(square, at, (apart / unit) ** 2) / each
    scatter = xp.where(added > 0, unit * safe_sqrt(square), before)
    learned = PairWindow(
        start(window.inputs, z),
        mean,
        None if window.priors is None else start(window.priors, priors),
        after.astype(window.counts.dtype),
        scatter.astype(window.scatter.dtype),
        xp.where(count > 0, (order[count - 1] + 1) % size, window.place).astype(window.place.dtype),
    )
    return learned, xp.argsort(~(written | (added > 0)), stable=True)[:width]


def _add(rows: Any, places: Any, values: Any) -> Any:
    """Return rows plus values at their places; what lies beyond the rows is left out."""
    if namespace(rows, places, values) is np:
        rows, inside = rows.copy(), places < len(rows)
        np.add.at(rows, places[inside], values[inside])
        return rows
    return rows.at[places].add(values.astype(rows.dtype), mode="drop")


class Projection(eqx.Module):
    """An orthogonal projection of data points, as `features` of a learner.

    Attributes:
        centre: What is subtracted from the data points.
        directions: Orthonormal directions.
    """

    centre: Float[Array, " floats"]
    directions: Float[Array, "floats features"]

    def __call__(self, x: PyTree[Shaped[Any, "points ..."]]) -> Float[Any, "points features"]:
        return product(features_of(None, x) - self.centre, self.directions)


def principal_components(
    x: PyTree[Shaped[ArrayLike, "points ..."]], number: int = 64
) -> Projection:
    """Return the directions in which data points differ most.

    Args:
        x: Data points; parts that are no floats do not count.
        number: The number of directions; there may be fewer.

    Raises:
        ValueError: There is no float, fewer than two data points, or the number is not positive.
    """
    number = check_count("number", number)
    floats = np.asarray(features_of(None, jax.tree.map(np.asarray, x)), np.float64)
    check_count("data points", len(floats), 2)
    centre = floats.mean(axis=0)
    deviations = floats - centre
    few = min(number, *floats.shape)
    # By whichever of the two products is smaller.
    if len(floats) <= floats.shape[1]:
        values, vectors = np.linalg.eigh(deviations @ deviations.T)
        vectors = deviations.T @ vectors[:, ::-1]
        values = values[::-1]
        kept = values[:few] > 1e-10 * values[0]
        directions = vectors[:, :few][:, kept] / np.sqrt(values[:few][kept])
    else:
        directions = np.linalg.eigh(deviations.T @ deviations)[1][:, ::-1][:, :few]
    return Projection(*to_device((centre.astype(np.float32), directions.astype(np.float32))))
