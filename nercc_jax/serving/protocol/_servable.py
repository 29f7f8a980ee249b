"""A model that can be served: a callable on a batch, and its named tensors."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np

from ...inference import Model, call_model, check_model
from ._tensors import DTYPES, FLOAT, RowModel, Tensor, Tensors

# The name of a model's only input.
INPUT = "input"
# The names of the outputs that the server adds to the model's own.
ADDED_OUTPUTS = ("exact", "expected_disagreement", "expected_error")

# The shape of a query, or shapes by name where the model takes a dict of arrays.
Shapes = Sequence[int] | Mapping[str, Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Servable:
    """A model to serve; `make_servable` makes one.

    Attributes:
        name: the name that clients use.
        model: maps rows of inputs, (B, ...), to rows of outputs (see `_tensors.py`).
        inputs: the input tensors.
        outputs: the output tensors.
        calibration: rows of unlabelled inputs, or a function that returns them, to estimate errors
            from; None to estimate them from the traffic.
    """

    name: str
    model: Model
    inputs: Tensors
    outputs: Tensors
    calibration: np.ndarray | Callable[[], np.ndarray] | None = None

    def __post_init__(self):
        if not self.name or "/" in self.name:
            raise ValueError(f"a model's name is not empty and has no slash, not {self.name!r}")
        names = self.outputs.names
        for name in names:
            if not name or name in ADDED_OUTPUTS:
                raise ValueError(f"an output cannot be called {name!r}: the server's is")
        if len(set(names)) < len(names):
            raise ValueError(f"{self.name}: outputs must have different names, not {names}")

    def on_rows(self, model: Model) -> Model:
        """Return another model with the same inputs and outputs, as a model on rows."""
        alone = self.inputs.alone and self.outputs.alone
        return model if alone else RowModel(model, self.inputs, self.outputs)

    @property
    def uncodable(self) -> str | None:
        """The reason why no code can be used; None if one can."""
        for what, tensors in (("input", self.inputs), ("output", self.outputs)):
            if tensors.uncodable is not None:
                return f"{what} {tensors.uncodable}"
        return None


def make_servable(
    name: str,
    model: Model,
    shape: Shapes,
    *,
    datatype: str | Mapping[str, str] = FLOAT,
    output_name: str = "output",
    calibration: np.ndarray | Mapping[str, np.ndarray] | Callable[[], np.ndarray] | None = None,
) -> Servable:
    """Describe a model by tracing it on one query.

    A model that returns one array has one output, `output_name`. Of a dict of arrays, or a tuple
    with named fields, each array is an output of its name; of any other tuple they are
    `output_name` with their places, `output_0`, `output_1`; nested names are joined by dots.

    Args:
        name: the name that clients use, without a slash.
        model: a callable on a batch; a model of several inputs takes a dict of arrays.
        shape: the shape of one query, or a dict of shapes.
        datatype: the protocol's datatype ("FP32", "INT64", ...) of all inputs, or a dict of them.
        output_name: the name of an unnamed output.
        calibration: unlabelled inputs, (points, *shape), or a dict of them; or a function that
            returns them as rows, called when they are needed.

    Raises:
        ValueError: where the model does not run on such a query, returns anything but float32,
            integers and booleans with an axis B, or is in training mode; where `datatype` or
            `calibration` do not fit.
    """
    check_model(model)
    inputs = _inputs(name, shape, datatype)
    batch = _example(inputs)
    try:
        answer: Any = eqx.filter_eval_shape(lambda x: call_model(model, x), batch)
    except Exception as error:
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{name} does not run on a batch of {inputs}: {first}") from error
    outputs = _outputs(name, answer, output_name)
    if not (inputs.alone and outputs.alone):
        model = RowModel(model, inputs, outputs)
    try:
        rows = (
            calibration
            if calibration is None or callable(calibration)
            else inputs.pack(calibration)
        )
    except ValueError as error:
        raise ValueError(f"{name}: calibration data do not fit: {error}") from error
    return Servable(name, model, inputs, outputs, rows)


def _inputs(name: str, shape: Shapes, datatype: str | Mapping[str, str]) -> Tensors:
    alone = not isinstance(shape, Mapping)
    shapes: Mapping[str, Sequence[int]] = {INPUT: shape} if alone else shape  # pyright: ignore
    words = dict.fromkeys(shapes, datatype) if isinstance(datatype, str) else datatype
    unknown = [each for each in words if each not in shapes]
    if unknown or not shapes:
        raise ValueError(f"{name}: inputs {list(shapes)} have shapes, but {unknown} have none")
    try:
        parts = (Tensor(n, words.get(n, FLOAT), tuple(each)) for n, each in shapes.items())
        return Tensors(tuple(parts), alone)
    except ValueError as error:
        raise ValueError(f"{name}: input {error}") from error


def _example(inputs: Tensors) -> Any:
    """Return one query as shapes and dtypes."""
    each = {p.name: jax.ShapeDtypeStruct((1, *p.shape), p.dtype) for p in inputs.parts}
    return each[INPUT] if inputs.alone else each


def _outputs(name: str, answer: Any, output_name: str) -> Tensors:
    words = {dtype: word for word, dtype in DTYPES.items()}
    found = jax.tree_util.tree_flatten_with_path(answer)[0]
    parts = []
    for path, leaf in found:
        shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        called = _name_of(path, output_name)
        if not shape or shape[0] != 1 or dtype not in words:
            raise ValueError(
                f"{name} must map a batch of B queries to arrays (B, ...) of float32, integers or "
                f"booleans; for B = 1, {called!r} was {leaf}"
            )
        parts.append(Tensor(called, words[np.dtype(dtype)], shape[1:]))
    if not parts:
        raise ValueError(f"{name} must map a batch to arrays; it returned {answer}")
    return Tensors(tuple(parts), alone=not found[0][0])


def _name_of(path: tuple[Any, ...], output_name: str) -> str:
    if not path:
        return output_name
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return f"{output_name}_{name}" if isinstance(path[0], jax.tree_util.SequenceKey) else name
