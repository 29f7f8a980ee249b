"""The least-squares problem of a smoothing spline, as a symmetric system of equations.

Over values and slopes z at the knots the fit minimises |M z - r|^2 - 2 f'z, whose rows are those of
`_filter`, and f are forces. With the multipliers p = (shear, bend) of the penalty's rows,

    -C p + A z = a        C = diag(h^3 / (12 mu), h / mu),  A z = (g' - g - h (v + v') / 2, v' - v),
    A' p + W z = f        W = diag(weights, slope weights).

K x = b is rational in gaps, weights and mu, without a root and without a division by a weight.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from ..arrays import where


class Problem(NamedTuple):
    """The numbers that determine K.

    They are the gaps between knots, the weights of the knots' observations and of their slopes'
    squares, and mu.
    """

    gaps: Float[Array, " gaps"]
    weights: Float[Array, " n"]
    slope_weights: Float[Array, " n"]
    mu: Float[Array, ""]

    def roots(self) -> tuple[Float[Array, " gaps"], Float[Array, " gaps"]]:
        """Return the factors of the shear rows and of the bend rows of M."""
        return jnp.sqrt(12 * self.mu / self.gaps) / self.gaps, jnp.sqrt(self.mu / self.gaps)


class Columns(NamedTuple):
    """Columns of x or of b, in parts.

    The parts of x are the multipliers of shear and bend, values and slopes; those of b are a for
    shear and bend, and f for values and slopes, each of which may be None for zeros.
    """

    shear: Float[Array, "gaps m"] | Any = None
    bend: Float[Array, "gaps m"] | Any = None
    value: Float[Array, "n m"] | Any = None
    slope: Float[Array, "n m"] | Any = None


def system_times(problem: Problem, x: Columns) -> Columns:
    """Return K x."""
    gaps, weights, slope_weights, mu = problem
    h, of_bend = gaps[:, None], gaps[:, None] / mu
    of_shear = h * h * of_bend / 12
    turned = -h / 2 * x.shear

    def to_knots(before: Array, after: Array) -> Array:
        none = jnp.zeros_like(before[:1])
        return jnp.concatenate([before, none]) + jnp.concatenate([none, after])

    return Columns(
        -of_shear * x.shear + steps(x.value) - h / 2 * (x.slope[1:] + x.slope[:-1]),
        -of_bend * x.bend + steps(x.slope),
        weights[:, None] * x.value + to_knots(-x.shear, x.shear),
        slope_weights[:, None] * x.slope + to_knots(turned - x.bend, turned + x.bend),
    )


def steps(columns: Float[Array, "n *m"]) -> Float[Array, "n-1 *m"]:
    """Return the differences of neighbouring rows."""
    return columns[1:] - columns[:-1]


def root(weights: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Return the square root, with a finite derivative at zero."""
    return jnp.sqrt(where(weights > 0, weights, 1)) * (weights > 0)
