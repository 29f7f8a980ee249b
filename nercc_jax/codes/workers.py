"""The workers' part: running models on coded data points."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Float, Int, PyTree, Shaped

from ..arrays import native
from .code import AbstractCode
from .decoding import encode_groups
from .trees import check_floats, is_float, leaves_of

# Raised by JAX where a function does not take tracers.
_UNTRACEABLE = (
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerBoolConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.ConcretizationTypeError,
)


class NoDerivative(TypeError, ValueError):
    """The error of differentiating a model that runs on the host.

    It is a TypeError, as JAX raises, and a ValueError, which commands print in one line.
    """


def call_model(model: Callable[..., Any], batch: PyTree, *args: Any, rows: bool = False) -> Any:
    """Return `model(batch, *args)`.

    A model that JAX cannot trace, since it works on NumPy arrays or looks at values, is called on
    the host whenever the program runs. It is also called once while the program is traced, on one
    data point of zeros (or ones), for the shapes of its outputs. A list that it returns is taken
    for an array of rows. It has no derivative.

    Args:
        model: The model.
        batch: A batch of data points.
        *args: Further arguments of the model.
        rows: Whether to refuse answers that are not floats with as many rows as the batch.

    Raises:
        ValueError: The model takes one data point instead of a batch (from the model's own error),
            JAX cannot trace it and it raises at zeros and ones, or `rows` is set and the answers
            are refused. Any other error of the model is passed on.
        NoDerivative: A model that JAX cannot trace is differentiated.
    """

    def traces(x: PyTree) -> bool:
        try:
            eqx.filter_eval_shape(lambda x: model(x, *args), x)
        except Exception:
            return False
        return True

    try:
        y = model(batch, *args)
    except _UNTRACEABLE:
        y = _call_on_host(model, batch, args)
    except Exception as error:
        # An error that does not occur while tracing is not about shapes.
        if not traces(batch) and traces(jax.tree.map(lambda leaf: leaf[0], batch)):
            raise ValueError(
                "the model takes one data point, not a batch of them: give jax.vmap(model)"
            ) from error
        raise
    size = jax.tree.leaves(batch)[0].shape[0] if rows else 0  # which may be symbolic, for an export
    for label, leaf in leaves_of("the model's answer", y) if rows else ():
        if not isinstance(leaf, jax.Array) or leaf.ndim < 1 or leaf.shape[0] != size:
            got = leaf.shape if isinstance(leaf, jax.Array) else type(leaf).__name__
            given = ", ".join(str(each.shape) for each in jax.tree.leaves(batch))
            raise ValueError(
                f"the model must map a batch of {size} to arrays of as many answers: for input "
                f"{given}, {label} was {got}"
            )
        if not is_float(leaf):
            check_floats("the model's answer", y)  # says which
    return y


def _call_on_host(model: Callable[..., Any], batch: PyTree, args: tuple) -> Any:
    arrays, static = eqx.partition((model, args), eqx.is_array)

    def call(arrays: PyTree, batch: PyTree) -> PyTree:
        arrays, batch = jax.tree.map(np.asarray, (arrays, batch))
        function, further = eqx.combine(arrays, static)
        answer = function(batch, *further)
        answer = np.asarray(answer) if isinstance(answer, list) else answer
        answer = jax.tree.map(np.asarray, native(answer, "the model's answer"))
        return jax.tree.map(lambda y: y.astype(jax.dtypes.canonicalize_dtype(y.dtype)), answer)

    # The answers to one data point of zeros have their form; to ones, if it raises at zeros.
    known = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, Tracer) else leaf, arrays
    )
    example, raised = None, None
    with jax.ensure_compile_time_eval():  # the model's own JAX calls are not part of the program
        for number in (0, 1):
            one = jax.tree.map(lambda x: np.full((1, *x.shape[1:]), number, x.dtype), batch)  # noqa: B023
            try:
                example = call(known, one)
                break
            except Exception as error:
                raised = raised or error
        else:
            raise ValueError(
                "JAX cannot trace the model, which was therefore called on one data point of "
                f"zeros, and on one of ones, for the shape of its answers, and raised: {raised!r}"
            ) from raised
    size = len(jax.tree.leaves(batch)[0])
    answers = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype), example
    )

    def answer(arrays: PyTree, batch: PyTree) -> PyTree:
        # A model that answers by JSON may return integers for floats that are whole.
        cast = lambda leaf, form: leaf.astype(form.dtype, casting="same_kind")  # noqa: E731
        return jax.tree.map(cast, call(arrays, batch), answers)

    @jax.custom_jvp
    def answered(arrays: PyTree, batch: PyTree) -> PyTree:
        return jax.pure_callback(answer, answers, arrays, batch, vmap_method="sequential")

    @answered.defjvp
    def _(*_: Any) -> Any:
        raise NoDerivative(
            "JAX cannot trace the model, since it works on NumPy arrays or looks at values. So it "
            "runs on the host and has no derivative: tuning and gradients need a model of jax.numpy"
        )

    return answered(arrays, batch)


def check_number_of_models(kinds: Int[np.ndarray, " slots"], number: int) -> None:
    """Raise ValueError if the number of models is not the one that the code's workers run."""
    needed = int(kinds.max()) + 1
    if number != needed:
        wanted = "alone" if needed == 1 else f"and {needed - 1} further, in this order"
        raise ValueError(
            f"the workers of this code run {needed} model{'s' * (needed > 1)}, but {number} "
            f"came: give the served model {wanted}"
        )


def run_workers(
    model: Callable[..., Any] | Sequence[Callable[..., Any]],
    code: AbstractCode | Int[np.ndarray, " slots"],
    coded: PyTree[Shaped[Array, "groups slots ..."]],
    *args: Any,
) -> PyTree[Float[Array, "groups slots ..."]]:
    """Return all workers' answers: each runs its own model on its coded data point of every group.

    Args:
        model: A function `model(batch, *args)`, (B, ...) to (B, ...), of floats, which is called
            once; batch and answers may be pytrees of arrays. For a code whose workers run several
            models (`worker_models`), a sequence of functions, the served model first; each is
            called once, on the coded data points of all its workers.
        code: The code; or the number of each worker's model.
        coded: Coded data points.
        *args: Further arguments of the models.

    Raises:
        ValueError: The number of models is not the code's, the first axis of answers is not the
            batch's, or answers are not floats or differ in shape between models.
    """
    kinds = code if isinstance(code, np.ndarray) else code.worker_models
    models = (model,) if callable(model) else tuple(model)
    check_number_of_models(kinds, len(models))
    parts = []
    for kind, each in enumerate(models):
        theirs, structure = jax.tree.flatten(coded)
        if len(models) > 1:
            theirs = [leaf[:, kinds == kind] for leaf in theirs]
        shape = theirs[0].shape[:2]
        batch = [leaf.reshape(-1, *leaf.shape[2:]) for leaf in theirs]
        with jax.named_scope("nercc.model"):
            y = call_model(each, jax.tree.unflatten(structure, batch), *args, rows=True)
        parts.append(jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), y))  # noqa: B023
    if len(parts) == 1:
        return parts[0]

    forms = [jax.tree.map(lambda leaf: leaf.shape[2:], part) for part in parts]
    if any(form != forms[0] for form in forms):
        raise ValueError(f"the models' answers differ in shape, served model first: {forms}")
    order = np.argsort(kinds, kind="stable")
    together = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *parts)
    if np.all(np.diff(order) == 1):
        return together
    return jax.tree.map(lambda leaf: leaf[:, np.argsort(order)], together)


@eqx.filter_jit
def answer_groups(
    model: Callable[..., Any] | Sequence[Callable[..., Any]],
    code: AbstractCode,
    x: PyTree[Shaped[ArrayLike, "groups num_data ..."]],
    args: tuple,
    encoder: Float[ArrayLike, "num_workers num_data"] | None,
    one: bool,
) -> PyTree[Float[Array, "..."]]:
    """Return all workers' answers for groups of data points; for `one` group without its axis."""
    coded = encode_groups(code, jax.tree.map(jnp.asarray, x), encoder)
    y = run_workers(model, code, coded, *args)
    return jax.tree.map(lambda leaf: leaf[0], y) if one else y


def encode_on_host(
    encoder: Float[np.ndarray, "*groups num_workers num_data"],
    x: Shaped[np.ndarray, "groups num_data ..."],
) -> Shaped[np.ndarray, "num_workers groups ..."]:
    """Return coded data points, worker by worker; each group may have an encoder of its own.

    Integers and booleans pass only through rows that copy one data point.
    """
    groups, num_data, *shape = x.shape
    num_workers = encoder.shape[-2]
    encoder, vectors = encoder.astype(x.dtype), x.reshape(groups, num_data, -1)
    if encoder.ndim == 2:  # one product for all groups
        coded = encoder @ np.moveaxis(vectors, 1, 0).reshape(num_data, -1)
    else:
        coded = np.moveaxis(encoder @ vectors, 1, 0)
    return coded.reshape(num_workers, groups, *shape)
