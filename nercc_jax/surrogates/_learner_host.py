"""A learner's predictions on the host, with NumPy: of a query they cost less than a call of JAX.

With k the covariances of a query with the window's pairs, the means are those of `Learner`, by
weights that are solved for once. The variance is that given the one pair of the window that tells
most about the query,

    k(x, x) + noise - max_i k_i^2 / (k(x_i, x_i) + noise),

no less than given all of them. It takes one operation a pair, where the other takes as many as
there are pairs. Whoever calibrates by it loses little, as deviations are compared with each other.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from ._interface import AbstractSurrogate
from ._kernels import Shape, of_squares
from ._learner import Learner
from ._projection import Projection

_OUTPUTS = 256  # at most: the weights have to be solved for at every update


@dataclasses.dataclass(frozen=True)
class LearnerOnHost:
    """A learner that predicts with NumPy, as it was when it was copied.

    Attributes:
        directions: Maps inputs to scaled features; a factor of each without a projection.
        origin: What is subtracted then.
        pairs: The scaled features of the window's pairs, by columns.
        squares: The squares of their lengths.
        precision: The reciprocals of their variances, noise included.
        weights: The weights of their covariances in the means.
        centre: The mean of the answers.
        linear: The weight of the kernel's straight line.
        noise: The variance of its noise.
        unit: The process's standard deviation in units of the outputs.
        shape: The kernel's shape.
    """

    directions: Float[np.ndarray, "floats features"] | Float[np.ndarray, " features"]
    origin: Float[np.ndarray, " features"]
    pairs: Float[np.ndarray, "features pairs"]
    squares: Float[np.ndarray, " pairs"]
    precision: Float[np.ndarray, " pairs"]
    weights: Float[np.ndarray, "pairs m"]
    centre: Float[np.ndarray, " m"]
    linear: Float[np.ndarray, ""]
    noise: Float[np.ndarray, ""]
    unit: Float[np.ndarray, ""]
    shape: Shape

    def predict(
        self, x: Shaped[np.ndarray, "queries ..."]
    ) -> tuple[Float[np.ndarray, "queries m"], Float[np.ndarray, " queries"]]:
        """Return the means of answers, and their deviations given the nearest pair."""
        z = np.asarray(x.reshape(len(x), -1), np.float32)
        z = z @ self.directions if self.directions.ndim == 2 else z * self.directions
        z -= self.origin
        product = z @ self.pairs
        own = np.einsum("qf,qf->q", z, z)
        known = of_squares(self.shape, self.squares + own[:, None] - 2 * product)
        product *= self.linear
        known += product
        np.multiply(known, known, out=product)
        product *= self.precision
        nearest = product.max(axis=1)
        variance = np.maximum(1 + self.linear * own - nearest, 0) + self.noise
        return known @ self.weights + self.centre, self.unit * np.sqrt(variance)


def learner_on_host(surrogate: AbstractSurrogate) -> LearnerOnHost | None:
    """Return a learner's predictions on the host; None where it takes more than NumPy.

    That is a learner of inputs or of their projection, without a prior, with at most 256 outputs.
    """
    if not isinstance(surrogate, Learner) or surrogate.prior is not None:
        return None
    if not isinstance(surrogate.features, Projection | None) or surrogate.form.size > _OUTPUTS:
        return None
    inputs, rows, numbers = jax.device_get(_prepared(surrogate))
    filled = np.asarray(surrogate.filled)
    rows = {name: each[filled] for name, each in rows.items()}
    rows["pairs"] = np.ascontiguousarray(rows["pairs"].T)
    return LearnerOnHost(**inputs, **rows, **numbers, shape=surrogate.kernel.shape)


@eqx.filter_jit
def _prepared(learner: Learner) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    """Return the fields for inputs, those of the window's rows, and the rest."""
    kernel, features = learner.kernel, learner.features
    directions = 1 / (kernel.unit * kernel.widths[kernel.groups])
    pairs = (learner.inputs - kernel.centre) * directions
    origin = kernel.centre * directions
    if isinstance(features, Projection):
        directions = features.directions * directions
        origin += features.centre @ directions
    weights, centre = learner.mean_weights()
    rows = {
        "pairs": pairs,
        "squares": jnp.sum(pairs**2, axis=1),
        "precision": 1 / (kernel.variance(learner.inputs) + kernel.noise),
        "weights": weights,
    }
    unit = learner.deviation_of(jnp.ones(()))
    numbers = {"centre": centre, "linear": kernel.linear, "noise": kernel.noise, "unit": unit}
    return {"directions": directions, "origin": origin}, rows, numbers
