"""The features from which the error of a prediction is estimated, a function for each source.

`margin` and `label_features` take arrays of NumPy or of JAX, and work inside `jax.jit`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from ..arrays import namespace
from ..codes.trees import Form

_LEAST = 1e-30  # least argument of a logarithm


def label_features(
    predictions: Float[Any, "*points m"],
    deviation: Float[Any, "*points"],
    cheap: Float[Any, "*points m"] | None,
    form: Form | None,
) -> Float[Any, "*points features"]:
    """Return the features of predictions that have a deviation, with the constant first.

    They are the logarithm of margin over deviation (its negative and positive parts separately,
    neither of which may raise the probability); the logarithm of the margin; and, with a surrogate,
    whether it has the same label, and by how much.
    """
    xp = namespace(predictions, deviation)
    size = xp.log(margin(predictions, form) + _LEAST)
    ratio = xp.clip(size - xp.log(deviation + _LEAST), -10, 10)
    features = [xp.ones_like(ratio), xp.minimum(ratio, 0), xp.maximum(ratio, 0), size]
    if cheap is not None:
        lead = _least_of_labels(lead_of, form, predictions, cheap)
        features += [xp.sign(lead), xp.arcsinh(lead)]
    return xp.nan_to_num(xp.stack(features, axis=-1))


def margin(predictions: Float[Any, "*points m"], form: Form | None = None) -> Float[Any, "*points"]:
    """Return by how much the largest output leads the second.

    A single output's margin is its absolute value. Predictions with several labels (`form`) have
    the margin of their least certain label.
    """

    def of_labels(outputs: Float[Any, "*labels m"]) -> Float[Any, "*labels"]:
        if outputs.shape[-1] == 1:
            return namespace(outputs).abs(outputs[..., 0])
        if namespace(outputs) is np:
            largest = np.partition(outputs, -2, axis=-1)[..., -2:]
            return largest[..., 1] - largest[..., 0]
        first, second = jnp.moveaxis(jax.lax.top_k(outputs, 2)[0], -1, 0)
        return first - second

    return _least_of_labels(of_labels, form, predictions)


def lead_of(
    predictions: Float[Any, "*#labels m"], cheap: Float[Any, "*#labels m"]
) -> Float[Any, "*#labels"]:
    """Return by how much the surrogate prefers the predicted label to all others."""
    xp = namespace(predictions, cheap)
    label = xp.argmax(predictions, axis=-1, keepdims=True)
    others = xp.where(xp.arange(cheap.shape[-1]) == label, -xp.inf, cheap)
    own = xp.take_along_axis(cheap, label, axis=-1)[..., 0]
    return own - xp.max(others, axis=-1)


def _least_of_labels(
    of_labels: Callable[..., Any], form: Form | None, *vectors: Float[Any, "*points m"]
) -> Float[Any, "*points"]:
    """Return the least value over all labels of a data point."""
    xp = namespace(*vectors)
    if form is None:
        return of_labels(*vectors)
    axes = vectors[0].ndim - 1
    least = []
    for parts in zip(*(jax.tree.leaves(form.split(each)) for each in vectors), strict=True):
        labelled = (part[..., None] if part.ndim == axes else part for part in parts)
        found = of_labels(*labelled)
        least.append(xp.min(found.reshape(*found.shape[:axes], -1), axis=-1))
    return xp.min(xp.stack(least), axis=0)


def decoding_features(
    predictions: Float[np.ndarray, "rows num_data m"],
    roughness: Float[np.ndarray, " rows"],
    variance: Float[np.ndarray, " num_data"],
    form: Form | None = None,
) -> tuple[Float[np.ndarray, "rows num_data 5"], Bool[np.ndarray, "rows num_data"]]:
    """Return the features of a server's decoded queries, on the host.

    A prediction's squared deviation is the product of the path's roughness
    (`AbstractCode.process_variance`) and the relative variance that the answers leave
    (`posterior_variance`). In a small group the roughness is hardly known and the variance matters
    most, so here a regression weighs margin, roughness and variance separately. Measured with K = 4
    and N = 8 interleaved, and at most 5 % of the stragglers' labels wrong: LeNet5 on MNIST resends
    42 % of them instead of 50 %, the tuned code on digits 19 % instead of 23 %, and groups of 2
    queries 5 % instead of 25 %.

    A single answer gives no variance. Two answers give no roughness; a feature of its own marks
    this. Of predictions with several labels (`form`) the least certain label counts.

    Returns:
        The features, and a mask of the predictions for which they are informative.
    """
    informative = np.isfinite(predictions).all(axis=-1) & np.isfinite(variance)
    rough = np.isfinite(roughness) & (roughness > 0)
    features = [
        np.ones(()),
        np.log(margin(np.where(informative[..., None], predictions, 0), form) + _LEAST),
        np.log(np.where(rough, roughness, 1))[:, None] / 2,
        np.log(np.where(informative, variance, 1) + _LEAST) / 2,
        ~rough[:, None],
    ]
    features = np.stack([np.broadcast_to(each, informative.shape) for each in features], axis=-1)
    # Larger logarithms carry no more information.
    return np.clip(features, -20, 20).astype(predictions.dtype), informative
