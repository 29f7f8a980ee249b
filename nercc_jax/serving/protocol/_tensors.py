"""Named tensors of a model, and their packing into rows.

The batcher and its coder know only arrays of which each row is a query, or an answer: a code acts
on every number alike. So the tensors of a query are packed into one row before they reach the
batcher, and unpacked in front of the model, in its own program. A model of one array needs none of
that.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, Shaped

from ...codes import Form

FLOAT = "FP32"
# By the protocol's datatype, the dtype on the wire.
DTYPES: Mapping[str, np.dtype] = {
    "BOOL": np.dtype("bool"),
    **{f"{'U' * unsigned}INT{8 * size}": np.dtype(f"<{'iu'[unsigned]}{size}")
       for unsigned in (False, True) for size in (1, 2, 4, 8)},
    FLOAT: np.dtype("<f4"),
}  # fmt: skip
_HINTS = {
    "BYTES": "JAX, which runs models here, has no strings: take token ids (INT32 or INT64) instead",
    **dict.fromkeys(
        ("FP16", "FP64", "BF16"),
        "floats come and go as FP32; workers may compute in others (worker_dtype)",
    ),
}
_BYTES = np.dtype(np.uint8)
# By kind of dtype, the kinds that may be given for it.
_KINDS = {"f": "f", "i": "iu", "u": "iu", "b": "b"}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An input or output: its name, the protocol's datatype, and its shape for one query."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def __post_init__(self):
        if self.datatype not in DTYPES:
            hint = _HINTS.get(self.datatype, f"there are {', '.join(DTYPES)}")
            raise ValueError(f"{self.name!r} cannot be {self.datatype}: {hint}")

    @property
    def sent(self) -> np.dtype:
        """The dtype on the wire."""
        return DTYPES[self.datatype]

    @property
    def dtype(self) -> np.dtype:
        """The dtype in JAX: 64 bits become 32 unless JAX_ENABLE_X64 is set."""
        return jax.dtypes.canonicalize_dtype(self.sent)

    @property
    def batch_shape(self) -> list[int]:
        """The shape of a batch in the protocol's terms."""
        return [-1, *self.shape]

    def fit(self, x: np.ndarray) -> np.ndarray:
        """Return queries (B, *shape) in the model's dtype.

        Raises:
            ValueError: where they have another shape or kind, or do not fit into the dtype.
        """
        if x.ndim != len(self.shape) + 1 or x.shape[1:] != self.shape or not len(x):
            raise ValueError(f"the model takes {self}, not of shape {list(x.shape)}")
        if x.dtype.kind not in _KINDS[self.dtype.kind]:
            raise ValueError(f"the model takes {self}, not {x.dtype}")
        with np.errstate(over="ignore"):
            fitting = np.ascontiguousarray(x, self.dtype)
        if self.dtype.kind == "f":
            good = np.isfinite(fitting)
            wrong = f"are not finite in {self.dtype}"
        elif x.dtype == self.dtype:
            return fitting
        else:
            limits = np.iinfo(self.dtype)
            good = (x >= limits.min) & (x <= limits.max)
            wrong = f"have numbers beyond {self.dtype}"
            if self.sent != self.dtype:
                wrong += ", in which JAX computes unless JAX_ENABLE_X64 is set"
        if not good.all():
            bad = np.flatnonzero(~good.reshape(len(x), -1).all(axis=1)).tolist()
            raise ValueError(f"{self.name!r}: queries {bad} {wrong}")
        return fitting

    def __str__(self) -> str:
        return f"{self.name!r}, {self.datatype}, of shape {self.batch_shape}"


@dataclasses.dataclass(frozen=True)
class Tensors:
    """The tensors of a query or an answer.

    A row is the tensor itself where there is one, (d,) float32 where all are floats, and otherwise
    the bytes of all, which are never coded.

    Attributes:
        parts: the tensors.
        alone: whether the model has one array instead of a dict.
    """

    parts: tuple[Tensor, ...]
    alone: bool = False

    @property
    def names(self) -> list[str]:
        """The tensors' names."""
        return [part.name for part in self.parts]

    @functools.cached_property
    def dtype(self) -> np.dtype:
        """The dtype of rows."""
        kinds = {part.dtype for part in self.parts}
        return kinds.pop() if len(self.parts) == 1 or kinds == {DTYPES[FLOAT]} else _BYTES

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of a row."""
        return self.parts[0].shape if len(self.parts) == 1 else (sum(self._widths),)

    @functools.cached_property
    def _widths(self) -> list[int]:
        size = 1 if self.dtype == _BYTES else self.dtype.itemsize
        return [math.prod(p.shape) * p.dtype.itemsize // size for p in self.parts]

    @functools.cached_property
    def form(self) -> Form | None:
        """The parts of an answer, each with a label of its own; None for one array."""
        if len(self.parts) == 1:
            return None
        structure = jax.tree.structure((0,) * len(self.parts))
        shapes = tuple(part.shape for part in self.parts)
        return Form(structure, shapes, ("float32",) * len(self.parts))

    @property
    def plain(self) -> bool:
        """Whether it is one array of floats."""
        return self.alone and self.parts[0].datatype == FLOAT

    @property
    def uncodable(self) -> str | None:
        """The reason why it cannot be coded; None if it can."""
        for part in self.parts:
            if part.datatype != FLOAT:
                return f"{part.name!r} is {part.datatype}, and codes mix floats ({FLOAT}) only"
        return None

    def pack(self, given: Any) -> np.ndarray:
        """Return rows of queries from arrays (B, *shape) by name, or from one array.

        Raises:
            ValueError: where a name is missing or unknown, the numbers of queries differ, or as
                `Tensor.fit`.
        """
        if isinstance(given, Mapping) == self.alone:
            told = f"arrays by name {list(given)}" if self.alone else f"a {type(given).__name__}"
            raise ValueError(f"the model takes {self}, not {told}")
        arrays = {self.parts[0].name: given} if self.alone else given
        self.check_names(list(arrays))
        columns = {part.name: part.fit(np.asarray(arrays[part.name])) for part in self.parts}
        self.check_sizes(columns)
        if len(columns) == 1:
            return columns[self.parts[0].name]
        flat = [column.reshape(len(column), -1) for column in columns.values()]
        if self.dtype == _BYTES:
            flat = [column.view(np.uint8) for column in flat]
        return np.concatenate(flat, axis=1)

    def check_names(self, names: Sequence[str]) -> None:
        """Raise ValueError where a name is missing, unknown, or there twice."""
        if list(names) == self.names or sorted(names) == sorted(self.names):
            return
        missing = [name for name in self.names if name not in names]
        unknown = [name for name in names if name not in self.names]
        trouble = [f"{missing} missing"] * bool(missing) + [f"{unknown} unknown"] * bool(unknown)
        told = ", ".join(trouble) or "each comes once"
        raise ValueError(f"the model takes {self}, not inputs {list(names)}: {told}")

    def check_sizes(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Raise ValueError where arrays have different numbers of queries."""
        if len({len(array) for array in arrays.values()}) > 1:
            told = ", ".join(f"{name!r} has {len(array)}" for name, array in arrays.items())
            raise ValueError(f"all inputs have as many queries, their first axis, but {told}")

    def refuse(self, rows: np.ndarray) -> str | None:
        """Return why rows are no valid answers, None if they are: an output is not finite."""
        for name, array in self.named(rows).items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                return f"the model's output {name!r} is not finite"
        return None

    def named(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return rows, on the host, as arrays by name."""
        return dict(zip(self.names, self._split(rows, _view), strict=True))

    def split(self, rows: Array) -> PyTree[Array]:
        """Return rows as the model takes them; to be compiled."""
        arrays = list(self._split(rows, _bitcast))
        return arrays[0] if self.alone else dict(zip(self.names, arrays, strict=True))

    def join(self, answer: PyTree[Array]) -> Array:
        """Return the model's answer as rows; to be compiled."""
        leaves = jax.tree.leaves(answer)
        if len(leaves) == 1:
            return leaves[0]
        if self.dtype == _BYTES:
            leaves = [_bytes(x, p.dtype) for x, p in zip(leaves, self.parts, strict=True)]
        return jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=-1)

    def _split(self, rows: Any, of_bytes: Callable[[Any, np.dtype], Any]) -> Iterator[Any]:
        if len(self.parts) == 1:
            yield rows
            return
        begin = 0
        for part, width in zip(self.parts, self._widths, strict=True):
            column = rows[:, begin : begin + width]
            if self.dtype == _BYTES:
                column = of_bytes(column, part.dtype)
            yield column.reshape(len(rows), *part.shape)
            begin += width

    def __str__(self) -> str:
        if self.alone:
            return f"one input {self.parts[0]}"
        return f"inputs {'; '.join(map(str, self.parts))}"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowModel:
    """A model of named tensors as a model of rows, which workers run.

    Floats among bytes are float32 whatever `worker_dtype` is; the weights follow it.
    """

    func: Any
    inputs: Tensors = dataclasses.field(metadata={"static": True})
    outputs: Tensors = dataclasses.field(metadata={"static": True})

    def __call__(self, rows: Shaped[Array, "batch ..."]) -> Shaped[Array, "batch ..."]:
        return self.outputs.join(self.func(self.inputs.split(rows)))


def _view(column: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return np.ascontiguousarray(column).view(dtype)


def _bitcast(column: Array, dtype: np.dtype) -> Array:
    if dtype.kind == "b":
        return column != 0
    if dtype.itemsize > 1:
        column = column.reshape(len(column), -1, dtype.itemsize)
    return jax.lax.bitcast_convert_type(column, dtype)


def _bytes(leaf: Array, dtype: np.dtype) -> Array:
    return jax.lax.bitcast_convert_type(
        leaf.astype(np.uint8 if dtype.kind == "b" else dtype), np.uint8
    )
