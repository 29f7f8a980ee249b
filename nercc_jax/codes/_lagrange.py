"""LCC: encoding and decoding by Lagrange polynomials."""

from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Bool, Float

from ..arrays import check_count, namespace, product
from ..splines.knots import gather_knots
from .berrut import barycentric_matrix
from .points import AbstractPointsCode, Points


class Lagrange(AbstractPointsCode):
    """Lagrange coded computing (LCC): exact for a polynomial model, useless for a network.

    The encoder is the polynomial of degree K - 1 through the data points. For a model that is a
    polynomial of degree `degree`, the answers lie on a polynomial of degree (K - 1) * degree, and
    any `threshold` = (K - 1) * degree + 1 of them decode it exactly; with fewer, nothing is
    recovered. Of more answers the decoder takes `threshold` that are spread evenly over the workers
    that answered, which is the best conditioned choice.

    Source: Yu et al. 2019, "Lagrange Coded Computing".
    """

    degree: int = eqx.field(static=True)

    def __init__(
        self, num_data: int, num_workers: int, *, degree: int = 1, points: Points = "chebyshev"
    ):
        """Make a code with points by layout name or as (alpha, beta): see `regression_points`.

        Raises:
            ValueError: As `regression_points`; or the degree's threshold exceeds N.
        """
        AbstractPointsCode.__init__(self, num_data, num_workers, points=points)
        self.degree = check_count("degree", degree)
        if self.threshold > self.num_workers:
            raise ValueError(
                f"degree {degree} does not fit: (num_data - 1) * degree + 1 answers are needed, "
                f"{self.threshold} for {num_data} data points, of {num_workers} workers"
            )

    @property
    def threshold(self) -> int:
        """Return the number of answers that decoding needs and uses."""
        return (self.num_data - 1) * self.degree + 1

    def _encoder(self) -> Float[Any, "num_workers num_data"]:
        return barycentric_matrix(self.alpha, _lagrange_weights(self.alpha), self.beta)

    def _decoder(self, available: Bool[Any, " num_workers"]) -> Float[Any, "num_data num_workers"]:
        knots = gather_knots(self.beta, available.astype(self.beta.dtype))
        step = np.arange(self.threshold)
        xp, number = namespace(knots.t), knots.number
        rank = (step * (number - 1) + (self.threshold - 1) // 2) // max(self.threshold - 1, 1)
        chosen = xp.searchsorted(xp.cumsum(knots.weights > 0), rank + 1)
        # If too few answered, the result is discarded below: any distinct nodes serve.
        chosen = xp.where(number >= self.threshold, chosen, step)
        nodes = knots.t[chosen]
        matrix = barycentric_matrix(nodes, _lagrange_weights(nodes), self.alpha)
        places = (chosen[:, None] == np.arange(len(knots.t))[None]).astype(matrix.dtype)
        decoder = knots.spread(product(matrix, places))
        return xp.where(number >= self.threshold, decoder, 0)


def _lagrange_weights(nodes: Float[Any, " n"]) -> Float[Any, " n"]:
    """Barycentric weights 1 / prod_j (t_i - t_j), times a factor that keeps them in range."""
    xp = namespace(nodes)
    difference = nodes[:, None] - nodes[None]
    difference = xp.where(np.eye(nodes.shape[0], dtype=bool), 1, difference)
    size = -xp.sum(xp.log(xp.abs(difference)), axis=1)
    sign = xp.prod(xp.sign(difference), axis=1)
    return sign * xp.exp(size - xp.max(size))
