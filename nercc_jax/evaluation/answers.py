"""Recorded answers of all workers, with the model's own predictions.

Answers do not depend on which workers straggle, so one record serves every straggler set.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree, Shaped

from ..arrays import namespace, native
from ..codes import AbstractCode, Decoded, decode_groups, encode_groups
from ..codes.kept import copies_of, encoder_of
from ..codes.trees import (
    Form,
    check_data,
    check_finite,
    check_floats,
    groups_of,
    join,
    leaves_of,
    points_of,
)
from ..codes.workers import call_model, check_number_of_models
from ..inference.models import Model, check_model
from .criteria import Criterion, agree_on_labels, labels_of, point_criterion, same_labels

Run: TypeAlias = Callable[[PyTree], PyTree]  # a model for any number of data points: `batched`


class Answers(eqx.Module):
    """All workers' answers to groups of data points, and the served model's own predictions.

    Outputs of any shape, or pytrees of them, are joined to vectors. Record other data than the
    model was trained on, where it does better.

    Attributes:
        code: The code.
        coded: The workers' answers.
        own: The model's outputs on the data points.
        form: The structure of the outputs.
    """

    code: AbstractCode
    coded: Float[Array, "groups num_workers m"]
    own: Float[Array, "groups num_data m"]
    form: Form = eqx.field(static=True)

    def __init__(
        self,
        code: AbstractCode,
        coded: Float[Array, "groups num_workers m"],
        own: Float[Array, "groups num_data m"],
        form: Form | None = None,
    ):
        """Make a record; without a form, outputs are vectors."""
        self.code, self.coded, self.own = code, coded, own
        self.form = join(own, 2)[1] if form is None else form

    def decode(self, available: Bool[Array, " num_workers"]) -> Decoded:
        """Decode all groups from these workers' answers; predictions are vectors."""
        return decode_groups(self.code, self.coded, available[None])

    @eqx.filter_jit
    def decode_sets(self, available: Bool[Array, "sets num_workers"]) -> Decoded:
        """Decode all groups under each straggler set; the axis of sets comes first.

        Each set has one matrix. Only if an answer is not finite, and for derivatives, each group
        has its own.
        """
        return jax.vmap(self.decode)(jnp.asarray(available))

    def same_labels(
        self, decoded: Float[Array, "*lead groups num_data m"]
    ) -> Bool[Array, "*lead groups num_data"]:
        """Return which decoded labels are the model's own."""
        decoded, own = jnp.broadcast_arrays(decoded, self.own)
        return agree_on_labels(decoded, own, self.form)

    def losses(
        self, sets: Bool[Array, "sets num_workers"] | Decoded, criterion: Criterion
    ) -> Float[Array, " sets"]:
        """Return the mean of a criterion over recovered data points, for each straggler set.

        The sets are masks, or the result of decoding under them. The mean is NaN for a set that
        recovers nothing, and differentiable in code and answers.

        Raises:
            ValueError: The criterion is unknown.
        """
        decoded = sets if isinstance(sets, Decoded) else self.decode_sets(sets)
        recovered = decoded.recovered
        # A lost prediction, NaN, must not reach a gradient either.
        filled = jnp.where(recovered[..., None], decoded.predictions, 0)
        own = self.own.astype(filled.dtype)
        of_points = jax.vmap(jax.vmap(point_criterion(criterion)))
        losses = jax.vmap(lambda here: of_points(self.form.split(here), self.form.split(own)))
        total = jnp.sum(jnp.where(recovered, losses(filled), 0), axis=(1, 2))
        count = jnp.sum(recovered, axis=(1, 2))
        return jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.nan)

    def sums_of(
        self, decoded: Decoded, labels: PyTree[Int[Array, "points ..."]] | None = None
    ) -> dict[str, Float[Array, " groups"]]:
        """Return, for each group, the sums over its data points from which metrics are computed.

        They are the number of recovered data points, the squared norms of errors, and the numbers
        of labels that equal the model's own (`rel_acc`) and the true ones (`accuracy`).
        """
        recovered = decoded.recovered
        error = jnp.where(recovered[..., None], decoded.predictions - self.own, 0)
        points = {
            "recovered": recovered,
            "squares": jnp.sum(error**2, axis=-1),
            "rel_acc": recovered & self.same_labels(decoded.predictions),
        }
        if labels is not None:
            labels = groups_of(labels, recovered.shape[1])
            found = labels_of(self.form.split(decoded.predictions), 2)
            points["accuracy"] = recovered & same_labels(found, labels, 2)
        return {
            metric: jnp.sum(value, axis=1, dtype=error.dtype) for metric, value in points.items()
        }


def record_answers(
    model: Model | Sequence[Model],
    code: AbstractCode,
    x: PyTree[Shaped[ArrayLike, "points ..."]],
    *,
    batch_size: int = 256,
) -> Answers:
    """Run a model on data points and on their coded data points, once for all straggler sets.

    Args:
        model: A function of a batch, (B, ...) to (B, outputs...), which is compiled. For a code
            whose workers run several models (`worker_models`), a sequence of functions, the served
            model first.
        code: The code.
        x: Unlabelled data points, in the order in which they are cut into groups of K; a remainder
            is left out.
        batch_size: The number of data points in a call of the model.

    Raises:
        ValueError: x fills no group or is not finite floats, the model's outputs on it are not
            finite, or the models are not those that the code's workers run.
    """
    models = (model,) if callable(model) else tuple(model)
    check_number_of_models(code.worker_models, len(models))
    groups = cut_groups(x, code.num_data)
    runs = [batched(each, batch_size) for each in models]
    own, form = own_outputs(runs[0], groups)
    coded = coded_outputs(runs, code, groups, batch_size, own)
    return Answers(code, jnp.asarray(coded), jnp.asarray(own), form)


def own_outputs(
    run: Run, groups: PyTree[Shaped[np.ndarray, "groups num_data ..."]]
) -> tuple[Float[np.ndarray, "groups num_data m"], Form]:
    """Return a model's outputs on groups of data points as vectors, and their structure.

    Raises:
        ValueError: They are not finite floats.
    """
    outputs = run(points_of(groups))
    check_floats("the model's answer", outputs)
    flat, form = join(outputs, 1)
    finite = np.isfinite(flat).all(axis=-1)
    if not finite.all():
        raise ValueError(
            "the model's own outputs must be finite; they are not for data points "
            f"{np.flatnonzero(~finite)[:10].tolist()}"
        )
    return np.asarray(flat).reshape(*jax.tree.leaves(groups)[0].shape[:2], -1), form


def coded_outputs(
    runs: Sequence[Run],
    code: AbstractCode,
    groups: PyTree[Shaped[np.ndarray, "groups num_data ..."]],
    batch_size: int,
    own: Float[np.ndarray, "groups num_data m"] | None = None,
) -> Float[np.ndarray, "groups num_workers m"]:
    """Return all workers' answers to groups of data points, as vectors.

    Args:
        runs: The models that the code's workers run, the served one first.
        code: The code.
        groups: The data points.
        batch_size: The most data points in a call of a model.
        own: The served model's outputs on the data points. They are used as the answers of workers
            that run the served model on a data point itself.

    Raises:
        ValueError: The number of models is not the code's.
    """
    rows, kinds = np.asarray(encoder_of(code)), code.worker_models
    check_number_of_models(kinds, len(runs))
    copies = copies_of(rows) & (kinds[:, None] == 0) & (own is not None)
    workers, data_points = np.nonzero(copies)
    places, parts = [workers], [] if own is None else [own[:, data_points]]
    for kind, run in enumerate(runs):
        asked = np.flatnonzero((kinds == kind) & ~copies.any(axis=1))

        def ask(x: PyTree, run: Run = run, matrix: np.ndarray = rows[asked]) -> np.ndarray:
            """Return a model's outputs on some groups' coded data points."""
            flat = np.asarray(join(run(points_of(_combine(matrix, x))), 1)[0])
            return flat.reshape(-1, len(matrix), flat.shape[-1])

        if asked.size:
            number = len(jax.tree.leaves(groups)[0])
            at_once = min(max(batch_size // asked.size, 1), number)
            places.append(asked)
            parts.append(in_parts(ask, groups, at_once))
    return np.concatenate(parts, axis=1)[:, np.argsort(np.concatenate(places))]


def cut_groups(x: PyTree, num_data: int) -> PyTree[Shaped[np.ndarray, "groups num_data ..."]]:
    """Cut data points into groups of K, in the order given and without a remainder.

    Returns:
        Groups, (groups, K, ...).

    Raises:
        ValueError: There is no whole group, or data points are not finite floats.
    """
    x = jax.tree.map(np.asarray, native(x, "x"))
    sizes = {leaf.shape[:1] for _, leaf in leaves_of("x", x)}
    if len(sizes) != 1 or () in sizes:
        shapes = ", ".join(f"{label} {leaf.shape}" for label, leaf in leaves_of("x", x))
        raise ValueError(f"x must be (points, ...), as many in every part: {shapes}")
    points = sizes.pop()[0]
    groups = points // num_data
    if groups == 0:
        raise ValueError(f"{points} data points fill no group of {num_data}")
    check_data(x)
    check_finite(x, 1)
    return groups_of(jax.tree.map(lambda leaf: leaf[: groups * num_data], x), num_data)


def batched(model: Model, batch_size: int) -> Run:
    """Return the model for any number of data points, in batches of one shape: one compilation.

    Fewer data points than a batch are filled up to a power of two. Raises ValueError if the model
    is in training mode.
    """
    check_model(model)
    compiled = eqx.filter_jit(functools.partial(call_model, rows=True))

    def run(x: PyTree) -> PyTree:
        x = jax.tree.map(np.asarray, native(x))
        least = 1 << (len(jax.tree.leaves(x)[0]) - 1).bit_length()  # a model may be expensive
        on_device = lambda part: compiled(model, jax.tree.map(jnp.asarray, part))  # noqa: E731
        return in_parts(on_device, x, min(batch_size, least))

    return run


def in_parts(
    run: Callable[[PyTree], PyTree], rows: PyTree[Shaped[Any, "rows ..."]], at_once: int
) -> PyTree:
    """Return a function's results for all rows, from calls with `at_once` rows.

    The last call is filled up with copies of the last row, since each shape is a compilation.
    """
    number, parts = len(jax.tree.leaves(rows)[0]), []
    for place in range(0, number, at_once):
        here = np.minimum(np.arange(place, place + at_once), number - 1)
        parts.append(run(jax.tree.map(lambda leaf: leaf[here], rows)))  # noqa: B023
    return jax.tree.map(lambda *each: namespace(*each).concatenate(each)[:number], *parts)


_combine = jax.jit(lambda rows, x: encode_groups(None, x, rows))
