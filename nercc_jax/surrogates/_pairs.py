"""Pairs (input, answer) as a learner holds them, and principal components as their features."""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree, Shaped

from ..codes._checks import check_count
from ..codes._products import multiply
from ..codes._trees import Form, finite_points, is_float, join, leaves_of
from ._interface import check_like, outputs_of_groups

Function = Callable[[PyTree], PyTree]


class Pairs(NamedTuple):
    """Rows of pairs; zeros where a pair is not `known` (not observed, or not finite)."""

    features: Float[Array, "pairs features"]
    residuals: Float[Array, "pairs m"]
    priors: Float[Array, "pairs m"] | None
    known: Bool[Array, " pairs"]


def pairs_of(
    features: Function | None,
    prior: Function | None,
    form: Form,
    x: PyTree[Shaped[Array, "pairs ..."]],
    y: PyTree[Float[Array, "pairs ..."]],
    observed: Bool[Array, " pairs"] | None = None,
) -> Pairs:
    """Return inputs and answers as rows; values that are not observed may be anything.

    Raises:
        ValueError: x and y have different lengths, or outputs another structure.
    """
    check_like(form, join(y, 1)[1])
    pairs = length_of("y", y)
    if length_of("x", x) != pairs:
        raise ValueError(f"x are {length_of('x', x)} data points, y {pairs} answers")
    sound = finite_points(x, 1) & finite_points(y, 1)
    known = sound if observed is None else sound & jnp.asarray(observed)

    def clean(leaf: Array) -> Array:
        mask = known.reshape(-1, *[1] * (leaf.ndim - 1))
        return jnp.where(mask, leaf, jnp.zeros_like(leaf)) if is_float(leaf) else leaf

    x, y = jax.tree.map(clean, (x, y))
    z, r = features_of(features, x), join(y, 1)[0]
    priors = None
    if prior is not None:
        priors, found = join(prior(x), 1)
        check_like(found, form)
        r = r - priors
    known = jnp.asarray(known) & jnp.all(jnp.isfinite(z), axis=1) & jnp.all(jnp.isfinite(r), axis=1)
    z, r, priors = jax.tree.map(lambda leaf: jnp.where(known[:, None], leaf, 0), (z, r, priors))
    return Pairs(z, r, priors, known)


def prior_of_groups(
    prior: Function, groups: PyTree[Shaped[Array, "groups size ..."]], form: Form
) -> Float[Array, "groups size m"]:
    """Return the prior's outputs on groups; raise ValueError where their structure is another."""
    priors, found = join(outputs_of_groups(prior, groups), 2)
    check_like(found, form)
    return priors


def features_of(
    features: Function | None, x: PyTree[Shaped[Array, "points ..."]]
) -> Float[Array, "points d"]:
    """Return the features of data points as vectors: their own floats without a function."""
    found = x if features is None else features(x)
    floats = [leaf for leaf in jax.tree.leaves(found) if is_float(leaf)]
    if not floats:
        raise ValueError("there is no float among the data points to learn by: give `features`")
    vectors = join(floats, 1)[0]
    return vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32))


def length_of(name: str, tree: PyTree) -> int:
    """Return the number of rows of all leaves; raise ValueError where they differ."""
    lengths = {leaf.shape[:1] for _, leaf in leaves_of(name, tree)}
    if len(lengths) != 1 or () in lengths:
        shapes = ", ".join(f"{label} {leaf.shape}" for label, leaf in leaves_of(name, tree))
        raise ValueError(f"{name} must have as many rows in every part: {shapes}")
    return lengths.pop()[0]


def one_row(tree: PyTree) -> PyTree:
    """Return one row of zeros like those of a tree, which may have none."""
    return jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape[1:]), leaf.dtype), tree)


def next_rows(
    observed: Bool[Array, " pairs"], place: Int[Array, ""], capacity: int
) -> tuple[Int[Array, " width"], Int[Array, ""], Int[Array, " width"]]:
    """Return the window's rows to write next, how many are written, and the pairs they come from.

    Of more pairs than the window holds, the last are taken.
    """
    width = min(len(observed), capacity)
    order = jnp.argsort(~observed, stable=True)
    total = jnp.sum(observed)
    first = jnp.maximum(total - width, 0)
    source = jax.lax.dynamic_slice(order, (first,), (width,))
    return (place + jnp.arange(width)) % capacity, jnp.minimum(total, width), source


def write_rows(
    rows: Float[Array, "capacity n"],
    new: Float[Array, "pairs n"],
    places: Int[Array, " width"],
    fresh: Bool[Array, " width"],
    source: Int[Array, " width"],
) -> Float[Array, "capacity n"]:
    """Return the window's rows with new ones at these places, where they are fresh."""
    return rows.at[places].set(
        jnp.where(fresh[:, None], new[source].astype(rows.dtype), rows[places])
    )


class Projection(eqx.Module):
    """An orthogonal projection of data points, as `features` of a learner.

    Attributes:
        centre: What is subtracted from the data points.
        directions: Orthonormal directions.
    """

    centre: Float[Array, " floats"]
    directions: Float[Array, "floats features"]

    def __call__(self, x: PyTree[Shaped[Array, "points ..."]]) -> Float[Array, "points features"]:
        return multiply(features_of(None, x) - self.centre, self.directions)


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
    floats = np.asarray(features_of(None, jax.tree.map(jnp.asarray, x)), np.float64)
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
    return Projection(jnp.asarray(centre, jnp.float32), jnp.asarray(directions, jnp.float32))
