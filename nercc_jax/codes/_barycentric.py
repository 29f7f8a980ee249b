"""Interpolation by barycentric weights: what Berrut's and Lagrange's codes share."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def barycentric_matrix(
    nodes: Float[Array, " n"], weights: Float[Array, " n"], at: Float[Array, " k"]
) -> Float[Array, "k n"]:
    """The matrix of the interpolant with entries w_i / (t - t_i), each row over its sum.

    Nodes of weight zero take no part; the others must be distinct. Both sides of the fraction are
    multiplied by the distance to the nearest node, so that value and derivative stay right where a
    point coincides with a node. With no node the matrix is zero.

    Source: Berrut and Trefethen 2004, SIAM Review 46(3), eq. 4.2.
    """
    used = weights != 0
    distance = at[:, None] - nodes
    nearest = jnp.argmin(jnp.where(used, jnp.abs(distance), jnp.inf), axis=1)
    here = jnp.arange(nodes.shape[0]) == nearest[:, None]
    close = jnp.take_along_axis(distance, nearest[:, None], axis=1)
    ratio = jnp.where(here, 1, close / jnp.where(here | ~used, 1, distance))
    terms = jnp.where(used, weights * ratio, 0)
    total = jnp.sum(terms, axis=1, keepdims=True)
    return terms / jnp.where(jnp.any(used), total, 1)
