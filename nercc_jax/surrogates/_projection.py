"""Principal components as features of data points with many floats."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree, Shaped

from ..codes._checks import check_count
from ..codes._products import multiply
from ._pairs import features_of


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
