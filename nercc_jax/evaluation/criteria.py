"""Criteria that compare a decoded prediction with the model's own, and metrics."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from ..arrays import namespace, native, root_mean_square, working_dtype
from ..codes.trees import Form, join

CriterionName: TypeAlias = Literal["mse", "cross_entropy", "disagreement"]
Criterion: TypeAlias = CriterionName | Callable[[PyTree, PyTree], Float[Array, ""]]


def point_criterion(criterion: Criterion) -> Callable[[PyTree, PyTree], Float[Array, ""]]:
    """Return a criterion of one data point, (decoded, original) -> scalar.

    For predictions with several parts (pytrees, heads) the named criteria take the mean over them;
    "disagreement" is 1 if any part has another label.

    Raises:
        ValueError: The name is unknown.
    """
    if callable(criterion):
        return criterion
    if not isinstance(criterion, str) or criterion not in get_args(CriterionName):
        known = ", ".join(get_args(CriterionName))
        raise ValueError(f"criterion must be one of {known} or a function, not {criterion!r}")

    def named(decoded: PyTree, original: PyTree) -> Float[Array, ""]:
        if criterion == "disagreement":
            dtype = working_dtype(*(leaf.dtype for leaf in jax.tree.leaves(decoded)))
            return (~same_labels(labels_of(decoded, 0), labels_of(original, 0), 0)).astype(dtype)
        pairs = [*zip(jax.tree.leaves(decoded), jax.tree.leaves(original), strict=True)]
        if criterion == "mse":  # the mean over all outputs of all leaves
            squares = [jnp.sum((mine - theirs) ** 2) for mine, theirs in pairs]
            return jnp.sum(jnp.stack(squares)) / sum(theirs.size for _, theirs in pairs)
        parts = []
        for both in pairs:
            mine, wanted = (jax.nn.log_softmax(each, axis=-1) for each in both)
            parts.append(jnp.mean(jnp.sum(jnp.exp(wanted) * (wanted - mine), axis=-1)))
        return jnp.mean(jnp.stack(parts))

    return named


def labels_of(outputs: PyTree, axes: int) -> PyTree[Int[Any, "..."]]:
    """Return the labels of data points: the largest outputs along the last axis of every part.

    Data points are the first axes. An output without any other axis has the label 0.
    """
    outputs = jax.tree.map(lambda y: y if y.ndim > axes else y[..., None], outputs)
    return jax.tree.map(lambda y: namespace(y).argmax(y, axis=-1), outputs)


def same_labels(labels: PyTree, others: PyTree, axes: int) -> Bool[Any, "*lead"]:
    """Return whether all labels of data points are the same; `axes` as in `labels_of`."""
    xp = namespace(*jax.tree.leaves((labels, others)))
    same = [
        xp.all((mine.reshape(theirs.shape) == theirs).reshape(*theirs.shape[:axes], -1), axis=-1)
        for mine, theirs in zip(jax.tree.leaves(labels), jax.tree.leaves(others), strict=True)
    ]
    return xp.all(xp.stack(same), axis=0)


def agree_on_labels(
    vectors: Float[ArrayLike, "*points m"],
    others: Float[ArrayLike, "*points m"],
    form: Form | None = None,
) -> Bool[Any, "*points"]:
    """Return whether outputs, as vectors, have the same labels (`form` splits several)."""
    xp = namespace(vectors, others)
    outputs = [xp.asarray(vectors), xp.asarray(others)]
    axes = outputs[0].ndim - 1
    if form is not None:
        outputs = [form.split(each) for each in outputs]
    return same_labels(*(labels_of(each, axes) for each in outputs), axes)


def row_errors(
    decoded: PyTree[Float[ArrayLike, "points ..."]], own: PyTree[Float[ArrayLike, "points ..."]]
) -> Float[Any, " points"]:
    """Return each data point's error: the root mean square over its outputs."""
    xp = namespace(*jax.tree.leaves((decoded, own)))
    decoded, own = jax.tree.map(xp.asarray, native((decoded, own)))
    (mine, form), (theirs, other) = join(decoded, 1), join(own, 1)
    if (form.structure, form.shapes) != (other.structure, other.shapes):
        raise ValueError(f"decoded outputs have shapes {form.shapes}, the model's {other.shapes}")
    return root_mean_square(mine - theirs, axis=-1)
