"""BACC: encoding and decoding by a rational interpolant, Berrut's or one of higher degree."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float

from ..splines._knots import gather_knots
from ..splines.arrays import namespace
from ._barycentric import barycentric_matrix
from ._checks import check_counts
from ._code import AbstractCode, MatrixOnHost, all_or_none, as_mask
from ._kept import decoder_at_hand, encoder_at_hand
from ._points import Points, regression_points

_MOST_DEGREES = 8  # beyond which float32 rounds more away than is gained


class Berrut(AbstractCode):
    """Berrut approximated coded computing (BACC).

    Both layers are Berrut's first rational interpolant, with weights of alternating sign along the
    points in their order on the line. The decoder numbers the signs anew along the workers that
    answered: with the original ones the interpolant has poles. With a higher `degree` both layers
    blend polynomials of that degree through neighbouring points, whose error falls faster where
    the path is smooth.

    Attributes:
        num_data: K.
        num_workers: N.
        alpha: Regression points of the data points; a leaf.
        beta: Regression points of the workers; a leaf.
        degree: Of the blended polynomials; 0 is Berrut's interpolant. With that many answers or
            fewer, they have the degree that the answers allow.

    Source: Jahani-Nezhad and Maddah-Ali 2022 (points "chebyshev"); ApproxIFER, AAAI 2022 (points
    "approxifer"); Borah and Harshan 2025, arXiv 2507.01330 (points "sbacc", without its DCT codes
    against wrong answers); Floater and Hormann 2007, "Barycentric rational interpolation with no
    poles and high rates of approximation", eq. 18 (`degree`), which BRI codes encode and decode
    with (Qiu et al. 2025, arXiv 2509.09435).
    """

    num_data: int = eqx.field(static=True)
    num_workers: int = eqx.field(static=True)
    alpha: Float[Array, " num_data"]
    beta: Float[Array, " num_workers"]
    degree: int = eqx.field(static=True)

    def __init__(
        self, num_data: int, num_workers: int, *, points: Points = "chebyshev", degree: int = 0
    ):
        """Make a code with points by layout name or as (alpha, beta): see `regression_points`.

        Raises:
            ValueError: As `regression_points`; `degree` is no integer from 0 to 7.
        """
        counts = check_counts(num_data=num_data, num_workers=num_workers)
        self.num_data, self.num_workers = counts
        if degree not in range(_MOST_DEGREES):
            raise ValueError(f"degree must be an integer from 0 to 7, not {degree!r}")
        self.degree = int(degree)
        self.alpha, self.beta = regression_points(self.num_data, self.num_workers, points)

    def encoder_matrix(self) -> Float[Array, "num_workers num_data"]:
        if (at_hand := encoder_at_hand(self)) is not None:
            return at_hand
        return berrut_matrix(self.alpha, self.beta, jnp.ones(self.num_data, bool), self.degree)

    def decoder_matrix(
        self, available: Bool[ArrayLike, " num_workers"]
    ) -> Float[Array, "num_data num_workers"]:
        if (at_hand := decoder_at_hand(self, available)) is not None:
            return at_hand
        available = as_mask(available, (self.num_workers,))
        return berrut_matrix(self.beta, self.alpha, available, self.degree)

    def recovered(self, available: Bool[ArrayLike, " num_workers"]) -> Bool[Array, " num_data"]:
        return all_or_none(available, self)

    def encoder_on_host(self) -> Float[np.ndarray, "num_workers num_data"]:
        return berrut_matrix(self.alpha, self.beta, np.ones(self.num_data, bool), self.degree)

    def decoder_on_host(self, available: Bool[np.ndarray, " num_workers"]) -> MatrixOnHost:
        matrix = berrut_matrix(self.beta, self.alpha, available, self.degree)
        return matrix, np.full(self.num_data, available.any())


def berrut_matrix(
    points: Float[Any, " n"],
    at: Float[Any, " m"],
    available: Bool[Any, " n"],
    degree: int = 0,
) -> Float[Any, "m n"]:
    """Return the matrix of the interpolant on the available points, read at others."""
    xp = namespace(points, at, available)
    knots = gather_knots(points, available.astype(points.dtype))
    counts = knots.weights > 0
    place = xp.cumsum(counts) - 1
    weights = (1 - 2 * (place % 2)).astype(points.dtype)
    if degree:
        weights = weights * _sizes(knots.t, counts, degree)[place]
    return knots.spread(barycentric_matrix(knots.t, xp.where(counts, weights, 0), at))


def _sizes(t: Float[Any, " n"], counts: Bool[Any, " n"], degree: int) -> Float[Any, " n"]:
    """Return the sizes of the weights of the knots that count, in their order, before all others.

    A knot's is the sum, over the runs of neighbours that contain it, of the reciprocal product of
    its distances to the others of the run.
    """
    xp = namespace(t, counts)
    slots = xp.arange(t.shape[0])
    number = xp.sum(counts)
    t = t[xp.argsort(xp.where(counts, slots, slots + t.shape[0]))]
    # Of a usual distance, so that products of many remain numbers.
    t = t * (t.shape[0] / xp.maximum(xp.max(t) - xp.min(t), xp.finfo(t.dtype).tiny))
    sizes = xp.ones_like(t)
    for count in range(2, degree + 2):  # knots of a run
        whole = slots + count <= number
        others = [xp.roll(t, -place) for place in range(count)]
        found = xp.zeros_like(t)
        for place, own in enumerate(others):
            product = xp.where(whole, 1.0, 0.0).astype(t.dtype)
            for other in others[:place] + others[place + 1 :]:
                product = product / xp.where(whole, xp.abs(own - other), 1)
            found = found + xp.roll(product, place)
        sizes = xp.where(number >= count, found, sizes)
    return sizes
