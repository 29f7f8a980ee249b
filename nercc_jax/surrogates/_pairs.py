"""Pairs (input, answer) as a learner has them: features, and what the prior leaves of answers."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree, Shaped

from ..codes import Form, finite_points, is_float, join
from ._interface import check_like, outputs_of_groups
from ._window import length_of

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
    """Data points with their answers as rows; what is not observed may be anything.

    Raises: ValueError for x and y of different lengths, outputs that are not of this form."""
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
    known = known & jnp.all(jnp.isfinite(z), axis=1) & jnp.all(jnp.isfinite(r), axis=1)
    z, r, priors = jax.tree.map(lambda leaf: jnp.where(known[:, None], leaf, 0), (z, r, priors))
    return Pairs(z, r, priors, known)


def prior_of_groups(
    prior: Function, groups: PyTree[Shaped[Array, "groups size ..."]], form: Form
) -> Float[Array, "groups size m"]:
    """What the prior makes of groups. Raises: ValueError for outputs that are not of this form."""
    priors, found = join(outputs_of_groups(prior, groups), 2)
    check_like(found, form)
    return priors


def features_of(
    features: Function | None, x: PyTree[Shaped[Array, "points ..."]]
) -> Float[Array, "points d"]:
    """The features of data points, side by side: their own floats without a function."""
    found = x if features is None else features(x)
    floats = [leaf for leaf in jax.tree.leaves(found) if is_float(leaf)]
    if not floats:
        raise ValueError("there is no float among the data points to learn by: give `features`")
    vectors = join(floats, 1)[0]
    return vectors.astype(jnp.promote_types(vectors.dtype, jnp.float32))
