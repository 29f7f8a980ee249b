"""BACC: encoding and decoding by Berrut's rational interpolant."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from ..arrays import namespace
from ..splines.knots import gather_knots
from .points import AbstractPointsCode


class Berrut(AbstractPointsCode):
    """Berrut approximated coded computing (BACC).

    Both layers are Berrut's first rational interpolant, with weights whose signs alternate along
    the points in their order on the line. The decoder assigns the signs again along the workers
    that answered: with the signs of all workers the interpolant would have poles.

    Source: Jahani-Nezhad and Maddah-Ali 2022 (points "chebyshev"); ApproxIFER, AAAI 2022 (points
    "approxifer"); Borah and Harshan 2025, arXiv 2507.01330 (points "sbacc", without its DCT codes
    against wrong answers).
    """

    __init__ = AbstractPointsCode.__init__

    def _encoder(self) -> Float[Any, "num_workers num_data"]:
        every = namespace(self.alpha).ones(self.num_data, bool)
        return berrut_matrix(self.alpha, self.beta, every)

    def _decoder(self, available: Bool[Any, " num_workers"]) -> Float[Any, "num_data num_workers"]:
        return berrut_matrix(self.beta, self.alpha, available)


def berrut_matrix(
    points: Float[Any, " n"],
    at: Float[Any, " m"],
    available: Bool[Any, " n"],
) -> Float[Any, "m n"]:
    """Return the matrix of the interpolant through the available points, evaluated at others."""
    xp = namespace(points, at, available)
    knots = gather_knots(points, available.astype(points.dtype))
    counts = knots.weights > 0
    place = xp.cumsum(counts) - 1
    weights = (1 - 2 * (place % 2)).astype(points.dtype)
    return knots.spread(barycentric_matrix(knots.t, xp.where(counts, weights, 0), at))


def barycentric_matrix(
    nodes: Float[Any, " n"],
    weights: Float[Any, " n"],
    at: Float[Any, " k"],
) -> Float[Any, "k n"]:
    """Return the matrix of the interpolant with entries w_i / (t - t_i), each row over its sum.

    Nodes of weight zero are left out; the others must be distinct. Numerator and denominator are
    multiplied by the distance to the nearest node, so that value and derivative are right where a
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
