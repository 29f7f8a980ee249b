"""Predictions of a few queries, at less than what a call of JAX costs where NumPy can do them.

A learner predicts with NumPy. The means are those of `Learner`, by weights that are solved for
once. The variance is that given the nearest pair of the window alone, where a straight line is
known,

    1 + noise - k^2 / (1 + noise),    k the kernel's shape at the nearest pair,

which takes one operation a pair, where the variance given all of them takes as many as there are
pairs. Whoever calibrates by it loses little: deviations are compared with each other.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Shaped

from ..codes._products import multiply
from ..codes._trees import join
from ._interface import AbstractLearner, AbstractSurrogate
from ._kernels import Shape
from ._learner import Learner
from ._projection import Projection

# A function of queries that returns the means of their answers as vectors, and the deviations. They
# may have more rows than queries, and be JAX's arrays, which are still being computed.
HostPredictions: TypeAlias = Callable[
    [np.ndarray], tuple[np.ndarray | Array, np.ndarray | Array]
]

_OUTPUTS = 256  # at most: the weights have to be solved for at every update


@dataclasses.dataclass(frozen=True)
class LearnerOnHost:
    """A learner that predicts with NumPy, as it was when it was copied.

    Attributes:
        directions: Maps inputs to scaled features; a factor of each without a projection.
        origin: What is subtracted then.
        pairs: The scaled features of the window's pairs, by columns.
        squares: Half of the squares of their lengths.
        weights: The weights of their covariances in the means, without the straight line.
        line: The weights of scaled features in the means.
        centre: The mean of the answers.
        noise: The variance of the noise.
        unit: The process's standard deviation in units of the outputs.
        shape: The kernel's shape.
    """

    directions: Float[np.ndarray, "floats features"] | Float[np.ndarray, " features"]
    origin: Float[np.ndarray, " features"]
    pairs: Float[np.ndarray, "features pairs"]
    squares: Float[np.ndarray, " pairs"]
    weights: Float[np.ndarray, "pairs m"]
    line: Float[np.ndarray, "features m"]
    centre: Float[np.ndarray, " m"]
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
        half = z @ self.pairs
        half -= self.squares
        half -= 0.5 * np.vecdot(z, z)[:, None]
        covariances = _covariances(self.shape, half)
        nearest = covariances.max(axis=1)
        mean = covariances @ self.weights
        mean += z @ self.line
        mean += self.centre
        noise = 1 + self.noise
        return mean, self.unit * np.sqrt(noise - nearest * nearest / noise)


def predictions_on_host(surrogate: AbstractSurrogate) -> HostPredictions:
    """Return a surrogate's predictions, by JAX where they take more than `LearnerOnHost` does.

    That has learners of inputs or of their projection, without a prior, of at most 256 outputs. By
    JAX the deviations are the surrogate's own, or 1. Programs are compiled for few sizes.
    """
    if isinstance(surrogate, Learner) and surrogate.prior is None:
        fits = surrogate.form.size <= _OUTPUTS
        if fits and isinstance(surrogate.features, Projection | None):
            return learner_on_host(surrogate).predict
    if isinstance(surrogate, AbstractLearner):
        # It changes: one program serves all.
        return lambda x: _predicted(surrogate, _padded(x))
    arrays, rest = eqx.partition(surrogate, eqx.is_array)
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, arrays))

    @jax.jit  # a call passes its arrays alone
    def outputs(leaves: list[Array], x: Array) -> Float[Array, "queries m"]:
        whole = eqx.combine(jax.tree.unflatten(structure, leaves), rest)
        return join(whole.outputs(x), 1)[0]

    return lambda x: (outputs(leaves, _padded(x)), np.ones(len(x), np.float32))


def _padded(x: Shaped[np.ndarray, "queries ..."]) -> Shaped[np.ndarray, "padded ..."]:
    """Return as many queries as the next power of two, by repeating some."""
    return repeat_rows(x, 1 << (len(x) - 1).bit_length())


def repeat_rows(x: Shaped[np.ndarray, "few ..."], number: int) -> Shaped[np.ndarray, "number ..."]:
    """Repeat rows up to this number, so that one compiled program serves all."""
    return x if len(x) == number else x[np.arange(number) % len(x)]


@eqx.filter_jit
def _predicted(
    learner: AbstractLearner, x: Shaped[Array | np.ndarray, "queries ..."]
) -> tuple[Float[Array, "queries m"], Float[Array, " queries"]]:
    mean, deviation = learner.predict(jnp.asarray(x))
    return join(mean, 1)[0], deviation


def learner_on_host(surrogate: Learner) -> LearnerOnHost:
    """Return a learner's predictions; for which learners says `predictions_on_host`."""
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
    rows = {"pairs": pairs, "squares": jnp.sum(pairs**2, axis=1) / 2, "weights": weights}
    line = kernel.linear * multiply(pairs.T, weights)
    unit = learner.deviation_of(jnp.ones(()))
    numbers = {"line": line, "centre": centre, "noise": kernel.noise, "unit": unit}
    return {"directions": directions, "origin": origin}, rows, numbers


def _covariances(shape: Shape, half: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Return a kernel's shape at minus half of squared distances, which are overwritten."""
    half = np.minimum(half, 0, out=half)
    if shape == "squared_exponential":
        return np.exp(half, out=half)
    half *= -6 if shape == "matern32" else -10
    r = np.sqrt(half, out=half)
    found = r + 1 if shape == "matern32" else (r / 3 + 1) * r + 1
    found *= np.exp(np.negative(r, out=r), out=r)
    return found
