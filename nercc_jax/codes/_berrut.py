"""BACC: encoding and decoding by Berrut's rational interpolant."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float

from ..splines._knots import gather_knots
from ..splines._namespace import namespace
from ._barycentric import barycentric_matrix
from ._checks import check_counts
from ._code import AbstractCode, MatrixOnHost, all_or_none, as_mask
from ._points import Points, regression_points


class Berrut(AbstractCode):
    """Berrut approximated coded computing (BACC).

    Both layers are Berrut's first rational interpolant, with weights of alternating sign along the
    points in their order on the line. The decoder numbers the signs anew along the workers that
    answered: with the original ones the interpolant has poles.

    Source: Jahani-Nezhad and Maddah-Ali 2022 (points "chebyshev"); ApproxIFER, AAAI 2022 (points
    "approxifer").
    """

    num_data: int = eqx.field(static=True)
    num_workers: int = eqx.field(static=True)
    alpha: Float[Array, " num_data"]
    beta: Float[Array, " num_workers"]

    def __init__(self, num_data: int, num_workers: int, *, points: Points = "chebyshev"):
        """Points by layout name or as (alpha, beta), and errors: see `regression_points`."""
        counts = check_counts(num_data=num_data, num_workers=num_workers)
        self.num_data, self.num_workers = counts
        self.alpha, self.beta = regression_points(self.num_data, self.num_workers, points)

    def encoder_matrix(self) -> Float[Array, "num_workers num_data"]:
        return berrut_matrix(self.alpha, self.beta, jnp.ones(self.num_data, bool))

    def decoder_matrix(
        self, available: Bool[ArrayLike, " num_workers"]
    ) -> Float[Array, "num_data num_workers"]:
        available = as_mask(available, (self.num_workers,))
        return berrut_matrix(self.beta, self.alpha, available)

    def recovered(self, available: Bool[ArrayLike, " num_workers"]) -> Bool[Array, " num_data"]:
        return all_or_none(available, self)

    def encoder_on_host(self) -> Float[np.ndarray, "num_workers num_data"]:
        return berrut_matrix(self.alpha, self.beta, np.ones(self.num_data, bool))

    def decoder_on_host(self, available: Bool[np.ndarray, " num_workers"]) -> MatrixOnHost:
        matrix = berrut_matrix(self.beta, self.alpha, available)
        return matrix, np.full(self.num_data, available.any())


def berrut_matrix(
    points: Float[Any, " n"],
    at: Float[Any, " m"],
    available: Bool[Any, " n"],
) -> Float[Any, "m n"]:
    """Return the matrix of the interpolant on the available points, read at others."""
    xp = namespace(points, at, available)
    knots = gather_knots(points, available.astype(points.dtype))
    counts = knots.weights > 0
    signs = 1.0 - 2.0 * ((xp.cumsum(counts) - 1) % 2)
    signs = xp.where(counts, signs, 0).astype(points.dtype)
    return knots.spread(barycentric_matrix(knots.t, signs, at))
