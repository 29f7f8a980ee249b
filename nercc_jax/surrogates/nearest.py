"""Faster predictions of a few queries by a learner, with approximate deviations."""

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Shaped

from .kernel import Projection, covariances
from .learner import Learner


def nearest_predictions(
    learner: Learner,
) -> Callable[[Shaped[np.ndarray, "queries ..."]], tuple[np.ndarray, np.ndarray]]:
    """Return a function of queries: a learner's means, and deviations given the nearest pair.

    The means are the learner's, with weights that are computed once. The variance is that given
    only the nearest pair of the window, as if the straight line were known,

        1 + noise - k^2 / (1 + noise),    k the kernel's shape at the nearest pair,

    which takes one operation a pair; the variance given all pairs takes as many operations a pair
    as there are pairs. A calibration loses little by this, since it only compares deviations.

    Each NumPy call on the window may switch to other threads, so there are few calls: z is the
    query's scaled features, 1, and minus half of their squared length; one product with `pairs`
    gives minus half of the squared distances.

    Args:
        learner: A learner on inputs or their projection, without a prior.
    """
    kernel, features, filled = jax.device_get(learner.kernel), learner.features, learner.filled
    directions = 1 / (kernel.unit * kernel.widths[kernel.groups])
    pairs = (np.asarray(learner.window.inputs)[filled] - kernel.centre) * directions
    origin = kernel.centre * directions
    if isinstance(features, Projection):
        directions = np.asarray(features.directions) * directions
        origin = origin + np.asarray(features.centre) @ directions
        directions = np.pad(directions, ((0, 0), (0, 2)))
    origin = np.append(origin, np.array([-1.0, 0.0], origin.dtype))
    weights = learner.mean_weights()[filled].astype(np.float32)
    centre = np.asarray(learner.factor.centre, np.float32)
    line = np.stack([*(kernel.linear * (pairs.T @ weights)), centre, np.zeros_like(centre)])
    # The squared length of z includes its 1, hence the 0.5.
    constant = 0.5 - np.vecdot(pairs, pairs) / 2
    pairs = np.column_stack([pairs, constant, np.ones_like(constant)]).T.copy()
    noise, deviation_of = 1 + kernel.noise, jax.device_get(learner).deviation_of

    def predict(x: Shaped[np.ndarray, "queries ..."]) -> tuple[np.ndarray, np.ndarray]:
        x = np.asarray(x.reshape(len(x), -1), np.float32)
        if directions.ndim == 2:
            z = x @ directions
        else:
            z = np.zeros((len(x), len(origin)), np.float32)
            np.multiply(x, directions, out=z[:, :-2])
        z -= origin
        z[:, -1] = -0.5 * np.vecdot(z, z)
        half = z @ pairs
        half *= -2
        covariance = covariances(kernel.shape, np.maximum(half, 0, out=half))
        nearest = np.minimum(covariance.max(axis=1), 1)
        variance = noise - nearest * nearest / noise
        return covariance @ weights + z @ line, deviation_of(variance)

    return predict
