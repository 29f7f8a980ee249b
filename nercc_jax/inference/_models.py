"""Models: callables on a batch."""

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import equinox as eqx
import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

from ..codes._trees import leaves_of
from ..splines.arrays import native

Model: TypeAlias = Callable[..., Array]

# Raised by JAX where a function does not take tracers.
_UNTRACEABLE = (
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerBoolConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.ConcretizationTypeError,
)

# Where functions keep the function, or the object, that they call.
_INNER = ("func", "__self__", "__wrapped__")


class NoDerivative(TypeError, ValueError):
    """A derivative is asked of a model that runs on the host.

    JAX raises TypeErrors for such models; commands print the ValueErrors in a line.
    """


def check_model(model: Model | Sequence[Model]) -> None:
    """Refuse a model, or several, that holds an Equinox or Flax NNX layer in training mode.

    Dropout would draw at random, and batch norm would mix the data points of a batch. Layers are
    looked for in modules, what those hold, and the functions around them (partial ones, bound
    methods, what JAX's transformations make); not in closures.

    Raises:
        ValueError: A layer is in training mode; the message names it, and says how to put the model
            into evaluation mode.
    """
    for name, layer in modules_of(model):
        if remedy := _remedy(layer):
            raise ValueError(
                f"the model is in training mode: its {type(layer).__name__}"
                f"{f' at {name}' if name else ''} answers for a data point otherwise than it will "
                f"when serving. Give the model in evaluation mode: {remedy}"
            )


def modules_of(
    node: Any, name: str = "", seen: dict[int, Any] | None = None
) -> Iterator[tuple[str, Any]]:
    """Yield all modules that a model holds, with their names in it; where, see `check_model`.

    Of a node of a model by this `name`; `seen` are nodes by their id.
    """
    seen = {} if seen is None else seen
    if id(node) in seen:
        return
    seen[id(node)] = node  # alive, so that no other gets its id
    children: dict[str, Any] = {}
    # Whoever has a module of Flax has imported it, which takes most of a second.
    nnx = sys.modules.get("flax.nnx")
    if isinstance(node, eqx.Module) or (nnx is not None and isinstance(node, nnx.Module)):
        yield name, node
        children = {f".{field}": value for field, value in vars(node).items()}
    elif isinstance(node, dict):
        children = {f"[{key!r}]": value for key, value in node.items()}
    elif isinstance(node, list | tuple):
        children = {f"[{place}]": value for place, value in enumerate(node)}
    for field, value in children.items():
        yield from modules_of(value, f"{name}{field}".lstrip("."), seen)
    if callable(node) and not isinstance(node, type):
        inner = [getattr(node, field, None) for field in _INNER]
        if isinstance(node, functools.partial):
            inner += [*node.args, *node.keywords.values()]
        for value in inner:
            yield from modules_of(value, name, seen)


def _remedy(layer: Any) -> str | None:
    """Return how a layer in training mode leaves it."""
    if getattr(layer, "inference", None) is False and _drops(getattr(layer, "p", 1.0)):
        return "eqx.nn.inference_mode(model)"
    rates = [getattr(layer, name, 0.0) for name in ("rate", "dropout_rate")]
    drops = getattr(layer, "deterministic", None) is False and any(map(_drops, rates))
    averages = getattr(layer, "use_running_average", None) is False
    return "model.eval()" if drops or averages else None


def _drops(rate: Any) -> bool:
    return not isinstance(rate, int | float) or rate > 0


def call_model(model: Model, batch: PyTree, *args: Any) -> Any:
    """Return `model(batch, *args)`.

    A model that JAX cannot trace, since it works on NumPy arrays or looks at values, is called on
    the host whenever the program runs. It is called once more when the program is traced, on one
    data point of zeros (or ones), for the shapes of its outputs. A list that it returns is an array
    of rows. It has no derivative.

    Raises:
        ValueError: The model takes one data point instead of a batch (from the model's own error),
            or JAX cannot trace it and it raises at zeros and ones; else what the model raises.
        NoDerivative: A derivative is taken of a model that JAX cannot trace.
    """
    try:
        return model(batch, *args)
    except _UNTRACEABLE:
        return _call_on_host(model, batch, args)
    except Exception as error:
        one = jax.tree.map(lambda leaf: leaf[0], batch)
        # What fails on the batch while running only says nothing of shapes.
        if not _can_trace(model, batch, args) and _can_trace(model, one, args):
            raise ValueError(
                "the model takes one data point, not a batch of them: give jax.vmap(model)"
            ) from error
        raise


def call_on_batch(model: Model, batch: PyTree, *args: Any) -> Any:
    """Return `call_model`'s answer, whose arrays have as many rows as the batch.

    Raises:
        ValueError: It is something else; or as `call_model`.
    """
    y = call_model(model, batch, *args)
    size = jax.tree.leaves(batch)[0].shape[0]  # which may be symbolic, for an export
    for label, leaf in leaves_of("the model's answer", y):
        if not isinstance(leaf, jax.Array) or leaf.ndim < 1 or leaf.shape[0] != size:
            got = leaf.shape if isinstance(leaf, jax.Array) else type(leaf).__name__
            given = ", ".join(str(each.shape) for each in jax.tree.leaves(batch))
            raise ValueError(
                f"the model must map a batch of {size} to arrays of as many answers: for input "
                f"{given}, {label} was {got}"
            )
    return y


def _call_on_host(model: Model, batch: PyTree, args: tuple) -> Any:
    arrays, static = eqx.partition((model, args), eqx.is_array)

    def call(arrays: PyTree, batch: PyTree) -> PyTree:
        arrays, batch = jax.tree.map(np.asarray, (arrays, batch))
        function, further = eqx.combine(arrays, static)
        answer = function(batch, *further)
        answer = np.asarray(answer) if isinstance(answer, list) else answer
        return jax.tree.map(_on_device_dtype, answer)

    known = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, Tracer) else leaf, arrays
    )
    with jax.ensure_compile_time_eval():  # what the model does with JAX is no part of the program
        example = _example(functools.partial(call, known), batch)
    size = len(jax.tree.leaves(batch)[0])
    answers = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype), example
    )

    def cast(leaf: np.ndarray, form: jax.ShapeDtypeStruct) -> np.ndarray:
        return leaf.astype(form.dtype, casting="same_kind")  # whole numbers by JSON are integers

    def answer(arrays: PyTree, batch: PyTree) -> PyTree:
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


def _example(call: Callable[[PyTree], PyTree], batch: PyTree) -> PyTree:
    """Return the answer to one data point of zeros; of ones, if it raises at zeros."""
    raised: Exception | None = None
    for number in (0, 1):
        one = jax.tree.map(lambda x: np.full((1, *x.shape[1:]), number, x.dtype), batch)  # noqa: B023
        try:
            return call(one)
        except Exception as error:
            raised = raised or error
    raise ValueError(
        "JAX cannot trace the model, which was therefore called on one data point of zeros, and on "
        f"one of ones, for the shape of its answers, and raised: {raised!r}"
    ) from raised


def _on_device_dtype(value: Any) -> np.ndarray:
    """Return an array of the dtype that it would have in JAX."""
    array = np.asarray(native(value, "the model's answer"))
    return array.astype(jax.dtypes.canonicalize_dtype(array.dtype))


def _can_trace(model: Model, x: PyTree, args: tuple) -> bool:
    try:
        eqx.filter_eval_shape(lambda x: model(x, *args), x)
    except Exception:
        return False
    return True
