"""A model that can be served: a callable on a batch, its named tensors, and their rows.

The batcher and its coder handle only arrays in which each row is a query, or an answer. So the
tensors of a query are packed into one row before they reach the batcher, and unpacked inside the
model's compiled program. A model of one array needs no packing.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from ...codes.trees import Form
from ...codes.workers import call_model
from ...evaluation.answers import in_parts
from ...inference.models import Model, check_model
from ...pools.batch import reason_of
from ..core._setup import fit_rows

FLOAT = "FP32"
# By the protocol's datatype, the dtype in binary data.
DTYPES: Mapping[str, np.dtype] = {
    "BOOL": np.dtype("bool"),
    **{f"{'U' * unsigned}INT{8 * size}": np.dtype(f"<{'iu'[unsigned]}{size}")
       for unsigned in (False, True) for size in (1, 2, 4, 8)},
    FLOAT: np.dtype("<f4"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An input or output: its name, the protocol's datatype, and its shape for one query."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def __post_init__(self):
        if self.datatype not in DTYPES:
            known = ", ".join(DTYPES)
            raise ValueError(f"{self.name!r} cannot be {self.datatype}: there are {known}")

    @property
    def sent(self) -> np.dtype:
        """The dtype on the wire."""
        return DTYPES[self.datatype]

    @property
    def dtype(self) -> np.dtype:
        """The dtype in JAX: 64 bits become 32 unless JAX_ENABLE_X64 is set."""
        return jax.dtypes.canonicalize_dtype(self.sent)

    @property
    def about(self) -> dict[str, Any]:
        """The tensor's metadata."""
        return {"name": self.name, "datatype": self.datatype, "shape": [-1, *self.shape]}

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError if it is not the shape of one or more queries."""
        if len(shape) != len(self.shape) + 1 or shape[1:] != self.shape or shape[0] < 1:
            raise ValueError(f"the model takes {self}, not of shape {list(shape)}")

    def fit(self, x: np.ndarray) -> np.ndarray:
        """Return queries (B, *shape) in the model's dtype. Raises ValueError as `fit_rows` does."""
        return fit_rows(x, self.shape, self.dtype, str(self), f"{self.name!r}: ")

    def __str__(self) -> str:
        return f"{self.name!r}, {self.datatype}, of shape {[-1, *self.shape]}"


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The tensors of a query or an answer; `alone` if the model has one array instead of a dict.

    A row of a single tensor has its shape. Several tensors must have the same dtype, and a row has
    shape (d,), with the numbers of all tensors.
    """

    parts: tuple[Tensor, ...]
    alone: bool = False

    @property
    def names(self) -> list[str]:
        return [part.name for part in self.parts]

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        if len(self.parts) == 1:
            return self.parts[0].shape
        return (sum(math.prod(part.shape) for part in self.parts),)

    @functools.cached_property
    def form(self) -> Form | None:
        """The parts of an answer, each with a label of its own; None for one array."""
        if len(self.parts) == 1:
            return None
        structure = jax.tree.structure((0,) * len(self.parts))
        shapes = tuple(part.shape for part in self.parts)
        return Form(structure, shapes, ("float32",) * len(self.parts))

    def pack(self, given: Any) -> np.ndarray:
        """Return rows of queries from arrays (B, *shape) by name, or from one array.

        Raises ValueError if a name is missing or unknown, or the numbers of queries differ, and as
        `Tensor.fit` does.
        """
        columns = self.fit(given)
        if len(columns) == 1:
            return columns[self.parts[0].name]
        flat = [column.reshape(len(column), -1) for column in columns.values()]
        return np.concatenate(flat, axis=1)

    def fit(self, given: Any) -> dict[str, np.ndarray]:
        """Return arrays (B, *shape) by name in the model's dtypes. Raises as `pack` does."""
        if isinstance(given, Mapping) == self.alone:
            kind = f"arrays by name {list(given)}" if self.alone else f"a {type(given).__name__}"
            raise ValueError(f"the model takes {self}, not {kind}")
        arrays = {self.parts[0].name: given} if self.alone else given
        self.check_names(list(arrays))
        columns = {part.name: part.fit(np.asarray(arrays[part.name])) for part in self.parts}
        if len({len(column) for column in columns.values()}) > 1:
            sizes = ", ".join(f"{name!r} has {len(column)}" for name, column in columns.items())
            raise ValueError(f"all inputs have as many queries, their first axis, but {sizes}")
        return columns

    def check_names(self, names: Sequence[str]) -> None:
        """Raise ValueError if a name is missing, unknown, or duplicate."""
        if sorted(names) != sorted(self.names):
            missing = [name for name in self.names if name not in names]
            unknown = [name for name in names if name not in self.names]
            found = [f"{missing} missing"] * bool(missing) + [f"{unknown} unknown"] * bool(unknown)
            problem = ", ".join(found) or "each comes once"
            raise ValueError(f"the model takes {self}, not inputs {list(names)}: {problem}")

    def refuse(self, rows: np.ndarray) -> str | None:
        """Return which output of the rows is not finite; None if all are."""
        for name, array in self.named(rows).items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                return f"the model's output {name!r} is not finite"
        return None

    def named(self, rows: Any) -> dict[str, Any]:
        """Return NumPy's or JAX's rows as arrays by name."""
        if len(self.parts) == 1:
            return {self.parts[0].name: rows}
        found, begin = {}, 0
        for part in self.parts:
            end = begin + math.prod(part.shape)
            found[part.name] = rows[:, begin:end].reshape(len(rows), *part.shape)
            begin = end
        return found

    def __str__(self) -> str:
        return f"{'one input' if self.alone else 'inputs'} {'; '.join(map(str, self.parts))}"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowModel:
    """A wrapper that turns a model of named tensors into a model of rows, which workers run."""

    func: Any
    inputs: Tensors = dataclasses.field(metadata={"static": True})
    outputs: Tensors = dataclasses.field(metadata={"static": True})

    def __call__(self, rows: Shaped[Array, "batch ..."]) -> Shaped[Array, "batch ..."]:
        given = self.inputs.named(rows)
        leaves = jax.tree.leaves(self.func(given[INPUT] if self.inputs.alone else given))
        if len(leaves) == 1:
            return leaves[0]
        return jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=-1)


# The name of a model's only input.
INPUT = "input"
# The outputs that the server adds to the model's own.
ADDED = (
    Tensor("exact", "BOOL", ()),
    Tensor("expected_disagreement", FLOAT, ()),
    Tensor("expected_error", FLOAT, ()),
)

# The shape of a query, or shapes by name if the model takes a dict of arrays.
Shapes = Sequence[int] | Mapping[str, Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Servable:
    """A model to serve; `make_servable` creates one.

    Attributes:
        name: the name that clients use.
        model: maps rows of inputs, (B, ...), to rows of outputs (`Tensors`).
        inputs: the input tensors.
        outputs: the output tensors.
        calibration: rows of unlabelled inputs, or a function that returns them, from which errors
            are estimated; None to estimate them from the traffic.
        preprocess: turns a batch of inputs into the model's floats, before queries are coded; None
            if the model takes the inputs themselves.
        prepared: the tensors that preprocessing returns; None without it.
        version: the model's version, a positive number.
    """

    name: str
    model: Model
    inputs: Tensors
    outputs: Tensors
    calibration: np.ndarray | Callable[[], np.ndarray] | None = None
    preprocess: Callable[..., Any] | None = None
    prepared: Tensors | None = None
    version: str = "1"

    def __post_init__(self):
        if not self.name or "/" in self.name:
            raise ValueError(f"a model's name is not empty and has no slash, not {self.name!r}")
        names, ours = self.outputs.names, {"", *(each.name for each in ADDED)}
        for name in names:
            if name in ours:
                raise ValueError(f"an output cannot be called {name!r}: the server's is")
        if len(set(names)) < len(names):
            raise ValueError(f"{self.name}: outputs must have different names, not {names}")
        for parts in (self.queries.parts, self.outputs.parts):
            if len({part.dtype for part in parts}) > 1:
                some = "; ".join(map(str, parts))
                raise ValueError(f"{self.name}: {some} have several datatypes: cast them to one")

    def on_rows(self, model: Model) -> Model:
        """Return a model with these inputs and outputs as a model of rows."""
        alone = self.queries.alone and self.outputs.alone
        return model if alone else RowModel(model, self.queries, self.outputs)

    @property
    def queries(self) -> Tensors:
        """The tensors that the model takes, which are packed into rows."""
        return self.inputs if self.prepared is None else self.prepared

    @property
    def growth(self) -> float:
        """The bytes of a query after preprocessing, as a multiple of the input's; 0 without any."""
        if self.preprocess is None:
            return 0.0
        sent = sum(math.prod(each.shape) * each.sent.itemsize for each in self.inputs.parts)
        return math.prod(self.queries.shape) * self.queries.dtype.itemsize / sent

    @property
    def uncodable(self) -> str | None:
        """The reason why no code can be used; None if one can."""
        for what, tensors in (("input", self.queries), ("output", self.outputs)):
            for part in tensors.parts:
                if part.datatype != FLOAT:
                    kind = f"{what} {part.name!r} is {part.datatype}"
                    return f"{kind}, and codes mix floats ({FLOAT}) only"
        return None


def make_servable(
    name: str,
    model: Model,
    shape: Shapes,
    *,
    datatype: str | Mapping[str, str] = FLOAT,
    output_name: str = "output",
    calibration: np.ndarray | Mapping[str, np.ndarray] | Callable[[], np.ndarray] | None = None,
    preprocess: Callable[..., Any] | None = None,
    version: str = "1",
) -> Servable:
    """Describe a model to serve, by tracing it on one query.

    A model that returns one array has one output, `output_name`. The arrays of a dict or a named
    tuple are outputs with their own names; those of another tuple are `output_name` with their
    numbers, `output_0`, `output_1`. Nested names are joined by dots.

    Args:
        name: the name that clients use, without a slash.
        model: a callable on a batch; a model with several inputs takes a dict of arrays.
        shape: the shape of one query, or a dict of shapes.
        datatype: the protocol's datatype ("FP32", "INT64", ...) of all inputs, or a dict of them.
        output_name: the name of an unnamed output.
        calibration: unlabelled inputs, (points, *shape), or a dict of them; or a function that
            returns them as rows of the model's inputs, called when they are needed.
        preprocess: a JAX function that turns a batch of inputs, such as bytes of images, into the
            model's floats, (B, ...). It runs on the host before queries are coded, so that inputs
            of any datatype can be coded.
        version: the model's version, a positive number.

    Raises:
        ValueError: if the model does not run on such a query, returns anything but float32,
            integers and booleans with an axis B, or is in training mode; or if `datatype` or
            `calibration` do not fit.
    """
    check_model(model)
    alone = not isinstance(shape, Mapping)
    shapes: Mapping[str, Sequence[int]] = {INPUT: shape} if alone else shape  # pyright: ignore
    words = dict.fromkeys(shapes, datatype) if isinstance(datatype, str) else datatype
    unknown = [each for each in words if each not in shapes]
    if unknown or not shapes:
        raise ValueError(f"{name}: inputs {list(shapes)} have shapes, but {unknown} have none")
    try:
        parts = [Tensor(n, words.get(n, FLOAT), tuple(each)) for n, each in shapes.items()]
    except ValueError as error:
        raise ValueError(f"{name}: input {error}") from error
    inputs, prepared = Tensors(tuple(parts), alone), None

    def traced(what: str, function: Callable[..., Any], tensors: Tensors, on: str) -> Any:
        """Return the shapes of a function's result for one query, without computing it."""
        one = {p.name: jax.ShapeDtypeStruct((1, *p.shape), p.dtype) for p in tensors.parts}
        try:
            return eqx.filter_eval_shape(function, one[INPUT] if tensors.alone else one)
        except Exception as error:
            raise ValueError(f"{what} does not run on {on}{tensors}: {reason_of(error)}") from error

    if preprocess is not None:
        found = traced(f"{name}: preprocessing", preprocess, inputs, "")
        named: Mapping[str, Any] = found if isinstance(found, Mapping) else {INPUT: found}
        for each, leaf in named.items():
            form, dtype = getattr(leaf, "shape", ()), getattr(leaf, "dtype", np.dtype(object))
            if form[:1] != (1,) or not jax.numpy.issubdtype(dtype, np.floating):
                raise ValueError(
                    f"{name}: preprocessing must map a batch of B inputs to floats (B, ...), or a "
                    f"dict of them; for B = 1, {each!r} was {leaf}"
                )
        parts = [Tensor(n, FLOAT, leaf.shape[1:]) for n, leaf in named.items()]
        prepared = Tensors(tuple(parts), named is not found)

    queries, parts = prepared or inputs, []
    answer = traced(name, lambda x: call_model(model, x), queries, "a batch of ")
    of_dtype = {dtype: word for word, dtype in DTYPES.items()}
    leaves = jax.tree_util.tree_flatten_with_path(answer)[0]
    for path, leaf in leaves:
        form, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
        called = jax.tree_util.keystr(path, simple=True, separator=".")
        if not path or isinstance(path[0], jax.tree_util.SequenceKey):
            called = f"{output_name}_{called}" if path else output_name
        if not form or form[0] != 1 or dtype not in of_dtype:
            raise ValueError(
                f"{name} must map a batch of B queries to arrays (B, ...) of float32, integers or "
                f"booleans; for B = 1, {called!r} was {leaf}"
            )
        parts.append(Tensor(called, of_dtype[np.dtype(dtype)], form[1:]))
    if not parts:
        raise ValueError(f"{name} must map a batch to arrays; it returned {answer}")
    outputs = Tensors(tuple(parts), alone=not leaves[0][0])

    rows: Any = calibration
    if calibration is not None and not callable(calibration):
        try:
            columns = inputs.fit(calibration)
            rows = columns[INPUT] if inputs.alone else columns
            rows = rows if preprocess is None else jax.jit(preprocess)(rows)
            rows = queries.pack(jax.tree.map(np.asarray, rows))
        except ValueError as error:
            raise ValueError(f"{name}: calibration data do not fit: {error}") from error
    made = Servable(name, model, inputs, outputs, rows, preprocess, prepared, version)
    return dataclasses.replace(made, model=made.on_rows(model))


class Preprocessing:
    """A servable's preprocessing, compiled for some batch sizes, on the host's CPU."""

    def __init__(self, servable: Servable, sizes: Sequence[int]):
        """Compile it for batches of these sizes, in ascending order; other batches are padded."""
        assert servable.preprocess is not None
        self._inputs, self._queries = servable.inputs, servable.queries
        self._sizes, self._function = sizes, jax.jit(servable.preprocess)
        for size in sizes:
            zeros = {p.name: np.zeros((size, *p.shape), p.dtype) for p in self._inputs.parts}
            with contextlib.suppress(ValueError):  # its result for zeros may not be finite
                self(zeros[INPUT] if self._inputs.alone else zeros)

    def __call__(self, given: Any) -> Float[np.ndarray, "batch ..."]:
        """Return rows of floats from an array (B, *shape), or from several arrays by name.

        Raises ValueError if the inputs do not fit, or the result is not finite.
        """
        columns = self._inputs.fit(given)
        number = len(columns[self._inputs.names[0]])

        def run(piece: Any) -> Any:
            with jax.default_device(jax.local_devices(backend="cpu")[0]):
                found = self._function(piece[INPUT] if self._inputs.alone else piece)
            return jax.tree.map(lambda y: np.asarray(y, np.float32), found)

        at_once = next((size for size in self._sizes if size >= number), self._sizes[-1])
        return self._queries.pack(in_parts(run, columns, at_once))
