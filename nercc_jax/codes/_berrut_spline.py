"""BSCC: encoding by Berrut's rational interpolant, decoding by a cubic spline."""

from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float

from ..arrays import namespace
from ..splines.ends import Ends, check_ends
from ._nercc import AbstractSplineCode
from .berrut import berrut_matrix
from .points import AbstractPointsCode, Points
from .trees import scalar_leaf


class BerrutSpline(AbstractSplineCode):
    """Basis-spline assisted coded computing (BSCC): `Berrut`'s encoder, decoding by a spline.

    Predictions are the values at alpha of the cubic spline through the answers at beta. As
    published it interpolates; with a positive `lambda_dec` it smooths. Beyond the outermost answers
    it is a straight line, where a B-spline would continue as a cubic. `ends` are "not-a-knot", as
    for an interpolating B-spline without further conditions, or "natural". Variances are those of
    natural ends.

    Source: Borah, Harshan and Lalitha 2026, "Basis-Spline Assisted Coded Computing: Strategies and
    Error Bounds", arXiv 2601.10616.

    >>> import jax.numpy as jnp
    >>> from nercc_jax.codes import BerrutSpline
    >>> code, x = BerrutSpline(4, 12), jnp.linspace(0, 1, 4)[:, None]
    >>> error = code.decode(jnp.sin(code.encode(x)), jnp.arange(12) != 5) - jnp.sin(x)
    >>> bool(jnp.abs(error).max() < 0.01)
    True
    """

    lambda_dec: Float[Array, ""]
    ends: Ends = eqx.field(static=True)

    def __init__(
        self,
        num_data: int,
        num_workers: int,
        *,
        lambda_dec: Float[ArrayLike, ""] = 0.0,
        points: Points = "chebyshev",
        ends: Ends = "not-a-knot",
    ):
        """Make a code; arguments and errors are those of `NeRCC`."""
        AbstractPointsCode.__init__(self, num_data, num_workers, points=points)
        self.ends = check_ends(ends)  # pyright: ignore[reportIncompatibleVariableOverride]
        self.lambda_dec = scalar_leaf(
            "lambda_dec", lambda_dec, self.alpha.dtype, least=0.0, most=np.inf
        )

    def _encoder(self) -> Float[Any, "num_workers num_data"]:
        every = namespace(self.alpha).ones(self.num_data, bool)
        return berrut_matrix(self.alpha, self.beta, every)

    def decoding_options(self, available: Bool[Any, " num_workers"]) -> dict[str, Any]:
        return {"lambda_": self.lambda_dec, "available": available}
