"""Interpolation by barycentric weights: what Berrut's and Lagrange's codes share."""

from typing import Any

import numpy as np
from jaxtyping import Float

from ..splines.arrays import namespace


def barycentric_matrix(
    nodes: Float[Any, " n"],
    weights: Float[Any, " n"],
    at: Float[Any, " k"],
) -> Float[Any, "k n"]:
    """Return the matrix of the interpolant with entries w_i / (t - t_i), each row over its sum.

    Nodes of weight zero take no part; the others must be distinct. Both sides of the fraction are
    multiplied by the distance to the nearest node, so that value and derivative stay right where a
    point coincides with a node. With no node the matrix is zero.

    Source: Berrut and Trefethen 2004, SIAM Review 46(3), eq. 4.2.
    """
    xp = namespace(nodes, weights, at)
    used = (weights != 0)[None]
    distance = at[:, None] - nodes[None]
    nearest = xp.argmin(xp.where(used, xp.abs(distance), np.inf), axis=1)
    here = xp.arange(nodes.shape[0])[None] == nearest[:, None]
    close = xp.take_along_axis(distance, nearest[:, None], axis=1)
    ratio = xp.where(here, 1, close / xp.where(here | ~used, 1, distance))
    terms = xp.where(used, weights[None] * ratio, 0)
    total = xp.sum(terms, axis=1, keepdims=True)
    return terms / xp.where(xp.any(used), total, 1)
