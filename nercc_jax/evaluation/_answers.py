"""Recorded answers of all workers, with the model's own predictions.

Answers do not depend on who straggles, so one record serves every straggler set: decode it under
masks, and compare.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree, Shaped

from ..codes import AbstractCode, Decoded, as_mask, decode_groups, encode_groups
from ..codes._kept import encoder_of
from ..codes._trees import (
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
from ..inference import cast_model
from ..inference.models import Model, check_model
from ..splines.arrays import namespace, native
from ._criteria import Criterion, agree_on_labels, labels_of, point_criterion, same_labels

Run: TypeAlias = Callable[[PyTree], PyTree]  # a model for any number of data points: `batched`


class Answers(eqx.Module):
    """All workers' answers to groups of data points, and the served model's own predictions.

    Outputs of any shape, or pytrees of them, are joined to vectors. `error` and `disagreement`
    decode under a mask, by one compilation for all masks. They forecast what batches like the
    recorded data points will have, if workers straggle whatever the data; they know nothing of the
    batch at hand. A disagreement p seen on n data points is known to sqrt(p (1 - p) / n) at best,
    less well where those of a group go wrong together. A model does better on data that it was
    trained on, so record others.

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

        Each set's matrix is made once. If there is an answer that is not finite, or for a
        derivative, the groups get matrices of their own.
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

        The sets are masks, or what was decoded under them. It is NaN for a set that loses all, and
        differentiable in code and answers.

        Raises:
            ValueError: The criterion is unknown.
        """
        decoded = sets if isinstance(sets, Decoded) else self.decode_sets(sets)
        recovered = decoded.recovered
        # What is lost must not reach a gradient either.
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
        """Return, for each group, the sums of its data points that the metrics are means of.

        They are the number that is recovered, squared norms of errors, and labels that are the
        model's own (`rel_acc`) and the true ones (`accuracy`).
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

    def error(self, available: Bool[ArrayLike, " num_workers"]) -> Float[Array, ""]:
        """Return sqrt(mean |u_k - f_k|^2), the `rmse` of `Evaluation`, in units of the outputs.

        It is infinite where a data point is not recovered. So a pool that has waited for enough may
        be told by `lambda mask: answers.error(mask) <= limit`. More answers need not be better; and
        the first set that looks good enough looks better than it is, the more so the fewer the data
        points. The first call compiles.

        Raises:
            ValueError: The mask has another shape or dtype.
        """
        return _expect(self, available)[0]

    def disagreement(self, available: Bool[ArrayLike, " num_workers"]) -> Float[Array, ""]:
        """Return the share of data points whose label is not the model's own: 1 - `rel_acc`.

        Data points that are not recovered count as wrong.

        Raises:
            ValueError: The mask has another shape or dtype, or the outputs have no labels.
        """
        if not self.form.has_labels:
            raise ValueError("outputs with one number a row have no labels: ask for the error")
        return _expect(self, available)[1]


@eqx.filter_jit
def _expect(answers: Answers, available: Bool[ArrayLike, " num_workers"]) -> tuple[Array, Array]:
    """Return the error, infinite where a data point is lost, and the disagreement."""
    decoded = answers.decode(as_mask(available, (answers.code.num_workers,)))
    sums = {metric: jnp.sum(each) for metric, each in answers.sums_of(decoded).items()}
    total = answers.own.shape[0] * answers.own.shape[1]
    error = jnp.where(jnp.all(decoded.recovered), jnp.sqrt(sums["squares"] / total), jnp.inf)
    return error, 1 - sums["rel_acc"] / total


def record_answers(
    model: Model | Sequence[Model],
    code: AbstractCode,
    x: PyTree[Shaped[ArrayLike, "points ..."]],
    *,
    batch_size: int = 256,
    worker_dtype: DTypeLike | None = None,
) -> Answers:
    """Run a model on data points and on their coded data points, once for all straggler sets.

    Args:
        model: A function of a batch, (B, ...) to (B, outputs...), which is compiled. For a code
            whose workers run several (`worker_models`), a sequence of such, the served model first.
        code: The code.
        x: Unlabelled data points, in the order in which they are cut into groups of K; a remainder
            is left out.
        batch_size: The number of data points in a call of the model.
        worker_dtype: The dtype that coded data points are answered in (`cast_model`). The model's
            own outputs stay as they are.

    Raises:
        ValueError: x fills no group or is not finite floats, the model's outputs on it are not
            finite, the models are not those that the code's workers run, or `worker_dtype` is no
            float.
    """
    models = (model,) if callable(model) else tuple(model)
    check_number_of_models(code.worker_models, len(models))
    groups = cut_groups(x, code.num_data)
    run, *further = [batched(each, batch_size) for each in cast_model(models, worker_dtype)]
    own = None if worker_dtype is None else batched(models[0], batch_size)
    return Recorder(run, groups, batch_size, own).of(code, further)


class Recorder:
    """A model's answers to the coded data points of many codes on the same groups.

    Each answer is computed once.

    Attributes:
        own: The model's outputs on the data points, (groups, K, m).
        form: The structure of the outputs.
    """

    def __init__(
        self,
        run: Run,
        groups: PyTree[Shaped[np.ndarray, "groups num_data ..."]],
        batch_size: int,
        own: Run | tuple[Float[np.ndarray, "groups num_data m"], Form] | None = None,
    ):
        """Start a record, on groups of data points, of the model (`batched`) that workers run.

        `own` is the model whose outputs on the data points count, where it is not `run`, or its
        outputs, where they are known.

        Raises:
            ValueError: The outputs on the data points are not finite floats.
        """
        self._run, self._groups, self._batch_size = run, groups, batch_size
        self._shape = jax.tree.leaves(groups)[0].shape[:2]
        self._known: dict[bytes, np.ndarray] = {}
        if isinstance(own, tuple):
            self.own, self.form = own
        else:
            outputs = (own or run)(points_of(groups))
            check_floats("the model's answer", outputs)
            flat, self.form = join(outputs, 1)
            finite = np.isfinite(flat).all(axis=-1)
            if not finite.all():
                raise ValueError(
                    "the model's own outputs must be finite; they are not for data points "
                    f"{np.flatnonzero(~finite)[:10].tolist()}"
                )
            self.own = np.asarray(flat).reshape(*self._shape, -1)
        if not callable(own):
            names = map(_row_name, np.eye(self._shape[1]))
            self._known = {name: self.own[:, place] for place, name in enumerate(names)}

    def of(self, code: AbstractCode, further: Sequence[Run] = ()) -> Answers:
        """Return all workers' answers with a code, and its `further` models (`batched`).

        Raises:
            ValueError: The number of models is not the code's.
        """
        rows, kinds = encoder_of(code), code.worker_models
        check_number_of_models(kinds, 1 + len(further))
        names = [_row_name(row) for row in rows]
        answers = {}
        for kind, run in enumerate((self._run, *further)):
            known = self._known if kind == 0 else {}
            theirs = {n: r for n, r, k in zip(names, rows, kinds, strict=True) if k == kind}
            if new := {name: row for name, row in theirs.items() if name not in known}:
                matrix = np.stack(list(new.values()))

                def ask(x: PyTree, run: Run = run, matrix: np.ndarray = matrix) -> np.ndarray:
                    """Return a model's outputs for the new combinations of some groups."""
                    flat = np.asarray(join(run(points_of(_combine(matrix, x))), 1)[0])
                    return flat.reshape(-1, len(matrix), flat.shape[-1])

                at_once = min(max(self._batch_size // len(matrix), 1), self._shape[0])
                found = in_parts(ask, self._groups, at_once)
                known |= {name: found[:, place] for place, name in enumerate(new)}
            answers |= {(kind, name): known[name] for name in theirs}
        coded = np.stack([answers[each] for each in zip(kinds, names, strict=True)], axis=1)
        own = jnp.asarray(self.own)
        return Answers(code, jnp.asarray(coded), own, self.form)


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

    Fewer data points than that are filled up to a power of two. Raises ValueError if the model is
    in training mode.
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
    """Return what a function makes of rows, so many at once.

    The last part is filled up with copies of the last row: one shape is one compilation.
    """
    number, parts = len(jax.tree.leaves(rows)[0]), []
    for place in range(0, number, at_once):
        here = np.minimum(np.arange(place, place + at_once), number - 1)
        parts.append(run(jax.tree.map(lambda leaf: leaf[here], rows)))  # noqa: B023
    return jax.tree.map(lambda *each: namespace(*each).concatenate(each)[:number], *parts)


def _row_name(row: np.ndarray) -> bytes:
    """Equal for rows of encoders that are the same to a millionth."""
    return (np.round(np.asarray(row, np.float32), 6) + 0.0).tobytes()  # -0.0 becomes 0.0


_combine = jax.jit(lambda rows, x: encode_groups(None, x, rows))
