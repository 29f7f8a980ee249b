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
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from ..codes._trees import join
from ._interface import AbstractLearner, AbstractSurrogate
from ._kernels import Shape
from ._learner import Learner
from ._pairs import Projection


class Pending(NamedTuple):
    """Predictions that are asked for.

    Attributes:
        wait: Returns the means of answers as vectors, and their deviations.
        begun: Whether JAX computes them already. NumPy begins when it is waited for: at once it
            would compete with the thread that sends the queries to the model.
    """

    wait: Callable[[], tuple[np.ndarray, np.ndarray]]
    begun: bool


# A function that asks for the answers to queries.
HostPredictions: TypeAlias = Callable[[np.ndarray], Pending]

_OUTPUTS = 256  # at most: the weights have to be solved for at every update


@dataclasses.dataclass(frozen=True)
class LearnerOnHost:
    """A learner that predicts with NumPy, as it was when it was copied.

    Every NumPy call on the window gives way to other threads, so they are few: z is the query's
    scaled features, 1 and minus half of the square of their length, and one product with `pairs`
    is minus half of the squares of the distances.

    Attributes:
        directions: Maps inputs to z, before `origin` is subtracted; without a projection a factor
            of each input.
        origin: What is subtracted then.
        pairs: The scaled features of the window's pairs, minus half of the squares of their
            lengths, and 1, by columns.
        weights: The weights of their covariances in the means, without the straight line.
        line: The weights of z in the means.
        noise: The variance of the noise.
        unit: The process's standard deviation in units of the outputs.
        shape: The kernel's shape.
    """

    directions: Float[np.ndarray, "floats z"] | Float[np.ndarray, " floats"]
    origin: Float[np.ndarray, " z"]
    pairs: Float[np.ndarray, "z pairs"]
    weights: Float[np.ndarray, "pairs m"]
    line: Float[np.ndarray, "z m"]
    noise: Float[np.ndarray, ""]
    unit: Float[np.ndarray, ""]
    shape: Shape

    def predict(
        self, x: Shaped[np.ndarray, "queries ..."]
    ) -> tuple[Float[np.ndarray, "queries m"], Float[np.ndarray, " queries"]]:
        """Return the means of answers, and their deviations given the nearest pair."""
        x = np.asarray(x.reshape(len(x), -1), np.float32)
        if self.directions.ndim == 2:
            z = x @ self.directions
        else:
            z = np.zeros((len(x), len(self.origin)), np.float32)
            np.multiply(x, self.directions, out=z[:, :-2])
        z -= self.origin
        z[:, -1] = -0.5 * np.vecdot(z, z)
        covariances = _covariances(self.shape, z @ self.pairs)
        nearest = np.minimum(covariances.max(axis=1), 1)
        mean = covariances @ self.weights
        mean += z @ self.line
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
            on_host = learner_on_host(surrogate)
            return lambda x: Pending(lambda: on_host.predict(x), begun=False)
    if isinstance(surrogate, Learner) and surrogate.is_on_host:
        return lambda x: Pending(lambda: _vectors(surrogate.predict(x)), begun=False)
    if isinstance(surrogate, AbstractLearner):
        # It changes: one program serves all.
        return lambda x: _first(len(x), _predicted(surrogate, _padded(x)))
    arrays, rest = eqx.partition(surrogate, eqx.is_array)
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, arrays))

    @jax.jit  # a call passes its arrays alone
    def outputs(leaves: list[Array], x: Array) -> Float[Array, "queries m"]:
        whole = eqx.combine(jax.tree.unflatten(structure, leaves), rest)
        return join(whole.outputs(x), 1)[0]

    return lambda x: _first(len(x), (outputs(leaves, _padded(x)), np.ones(len(x), np.float32)))


def _vectors(found: tuple[Any, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(join(found[0], 1)[0]), found[1]


def _padded(x: Shaped[np.ndarray, "queries ..."]) -> Shaped[np.ndarray, "padded ..."]:
    """Return as many queries as the next power of two, by repeating some."""
    return repeat_rows(x, 1 << (len(x) - 1).bit_length())


def _first(number: int, found: tuple[Array | np.ndarray, ...]) -> Pending:
    """Return the first rows of arrays, once they are computed."""

    def wait() -> tuple[np.ndarray, np.ndarray]:
        mean, deviation = map(np.asarray, found)
        return mean[:number], deviation[:number]

    return Pending(wait, begun=True)


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
    learner = surrogate.on_host()
    kernel, features, filled = learner.kernel, learner.features, learner.filled
    directions = 1 / (kernel.unit * kernel.widths[kernel.groups])
    pairs = (learner.window.inputs[filled] - kernel.centre) * directions
    origin = kernel.centre * directions
    if isinstance(features, Projection):
        directions = features.directions * directions
        origin = origin + features.centre @ directions
        directions = np.pad(directions, ((0, 0), (0, 2)))
    weights, centre = learner.mean_weights()
    weights = weights[filled].astype(np.float32)
    line = kernel.linear * (pairs.T @ weights)
    # The square of z's length has the 1 in it, too.
    constant = 0.5 - np.vecdot(pairs, pairs) / 2
    pairs = np.column_stack([pairs, constant, np.ones_like(constant)])
    return LearnerOnHost(
        directions=np.asarray(directions),
        origin=np.append(origin, np.array([-1.0, 0.0], origin.dtype)),
        pairs=np.ascontiguousarray(pairs.T),
        weights=weights,
        line=np.concatenate([line, centre[None], np.zeros_like(centre)[None]]),
        noise=np.asarray(kernel.noise),
        unit=learner.deviation_of(np.ones((), kernel.noise.dtype)),
        shape=kernel.shape,
    )


def _covariances(shape: Shape, half: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Return a kernel's shape at minus half of squared distances, which are overwritten."""
    if shape == "squared_exponential":
        return np.exp(half, out=half)
    half = np.minimum(half, 0, out=half)
    half *= -6 if shape == "matern32" else -10
    r = np.sqrt(half, out=half)
    found = r + 1 if shape == "matern32" else (r / 3 + 1) * r + 1
    found *= np.exp(np.negative(r, out=r), out=r)
    return found
