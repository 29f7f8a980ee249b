"""The model and the data points that a command runs on.

A shipped model with its data set, or any other (`_own_models.py`) with inputs from a file.
"""

import csv
import dataclasses
import importlib.util
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Float, Shaped

from ..codes import AbstractCode, load_code
from ..inference.models import call_model, check_model
from ..pools.batch import reason_of
from ..rows.files import fingerprint
from ._command import of_option
from ._options import Options, Returned
from ._own_models import (
    EXAMPLES,
    example_inputs,
    hub_name,
    is_data_set,
    is_own,
    is_shipped,
    load_callable,
)

_FILES = (".npy", ".npz", ".csv", ".parquet")  # suffixes of files of inputs


class WorkerModel(eqx.Module):
    """A network as workers run it: its logits, or their softmax."""

    network: Any
    outputs: Returned = eqx.field(static=True)

    def __call__(self, batch: Array) -> Array:
        logits = self.network(batch)
        return jax.nn.softmax(logits) if self.outputs == "probabilities" else logits

    @property
    def input_shape(self) -> tuple[int, ...] | None:
        """The shape of one data point, or None if the network does not state it."""
        return getattr(self.network, "input_shape", None)

    def images(
        self, split: str, data_dir: Path | None, count: int, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return at most `count` preprocessed images of the network's data set, and labels."""
        from nercc_models import load_data

        data = load_data(self.network.data, split, data_dir=data_dir)
        chosen = np.random.default_rng(seed).permutation(len(data.labels))[:count]
        return np.asarray(self.network.preprocess(data.images[chosen])), data.labels[chosen]


class Points(NamedTuple):
    """Data points as they are stored, their preprocessing, and labels (-1 where unknown).

    They may have `ids` of the user's choice, such as names.
    """

    name: str
    x: np.ndarray
    labels: np.ndarray
    preprocess: Callable[[np.ndarray], Any]
    ids: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model as workers run it, and its data points.

    The data points come from a data set by name or, if `x` is given, are the rows of `x`. `source`
    names where they come from. The "test" split of `x` is a fifth of its rows, at most 1,000, and
    every command chooses the same ones; "train" is the rest.
    """

    name: str
    model: Any
    source: str
    x: np.ndarray | None = None
    ids: np.ndarray | None = None
    data_dir: Path | None = None
    preprocess: Callable[[np.ndarray], Any] = np.asarray

    def points(self, split: str, count: int, seed: int) -> np.ndarray:
        """Return at most `count` data points of a split, shuffled.

        Raises ValueError if there is no such split.
        """
        random = np.random.default_rng(seed)
        if self.x is None:
            found = self.rows(split)
            return np.asarray(self.preprocess(found.x[random.permutation(len(found.x))[:count]]))
        if split not in ("train", "test"):
            raise ValueError(f"--split {split}: {self.source} has only the splits train and test")
        order = np.random.default_rng(0).permutation(len(self.x))
        held = min(1000, len(order) // 5)
        rows = order[:held] if split == "test" else order[held:]
        return self.x[random.permutation(rows)[:count]]

    def groups(self, split: str, options: Options, num_data: int, least: int = 1) -> np.ndarray:
        """Return data points as a comparison asks for them; raise ValueError for too few groups."""
        count = options.max_inputs or 1000
        x = self.points(split, count, options.seed)
        if len(x) < least * num_data:
            what = "a group" if least == 1 else f"{least} groups"
            raise ValueError(
                f"--max-inputs {count} gives {len(x)} data points of {self.source}, too few for "
                f"{what} of {num_data}; ask for more data points or a smaller --num-data"
            )
        return x

    def fingerprint(self, split: str) -> str:
        """Return a text that identifies the data: the split's name, or a fingerprint of all `x`."""
        return split if self.x is None else str(fingerprint(self.x))

    def rows(self, split: str) -> Points:
        """Return all data points of a split, or all of `x`, in their order."""
        if self.x is None:
            from nercc_models import load_data

            with of_option(f"--split {split}"):
                data = load_data(self.source, split, data_dir=self.data_dir)
            return Points(split, data.images, data.labels, self.preprocess)
        labels = np.full(len(self.x), -1)
        return Points(Path(self.source).name, self.x, labels, np.asarray, self.ids)


def find_workload(options: Options, *, traced: bool = True) -> Workload:
    """Return the model and data points that the options of the command line select.

    Where JAX calls the model (`traced`), inputs of your own are converted to float32; otherwise
    they keep the type in which they were read. Images of a data set are as they are stored, unless
    a shipped model has preprocessing.

    Raises:
        ValueError: If there is no such model, no inputs are known, or the model does not run on
            them.
        ImportError: If an extra is missing; it says which.
    """
    name, outputs, inputs = options.model, options.outputs, options.inputs
    model, ids, x = find_model(name, options.weights, outputs), None, None
    prepare: Any = lambda images: np.asarray(images, np.float32)  # noqa: E731
    if is_shipped(name):
        prepare = model.network.preprocess
    if is_shipped(name) and inputs is None:
        source = model.network.data
        return Workload(name, model, source, data_dir=options.data_dir, preprocess=prepare)
    if inputs is not None and is_data_set(inputs):
        source = str(inputs)
    elif inputs is not None:
        source = str(inputs)
        x, ids = read_input_file(inputs, options.columns, options.id_column)
    else:
        source = f"{EXAMPLES}() of {name.partition(':')[0]}"
        found = example_inputs(name) if is_own(name) else None
        if found is None:
            module = f", or define {EXAMPLES}() in its module" if is_own(name) else ""
            raise ValueError(f"--model {name} needs data points: use --inputs FILE{module}")
        x = np.asarray(found)
        if x.ndim < 2 or not x.size or x.dtype.kind not in "biuf":
            raise ValueError(
                f"--model {name}: {EXAMPLES}() gave {x.dtype} of shape {x.shape}: an array of "
                "numbers is needed, of shape (rows, *shape of a data point)"
            )
    x = x if x is None or not traced else x.astype(np.float32)
    workload = Workload(name, model, source, x, ids, options.data_dir, prepare)
    if not traced:
        return workload

    # JAX must be able to run it, and give a row for each.
    check_model(model)
    shape = (workload.points(options.split or "test", 1, 0) if x is None else x).shape[1:]
    one = jax.ShapeDtypeStruct((1, *shape), np.float32)
    try:
        answer: Any = eqx.filter_eval_shape(lambda batch: call_model(model, batch), one)
    except Exception as error:
        raise ValueError(
            f"--model {name} does not run on a batch of shape {one.shape} of {source}: "
            f"{reason_of(error)}"
        ) from error
    if getattr(answer, "shape", ())[:1] != (1,) or len(answer.shape) < 2:
        got = type(answer).__name__
        if isinstance(answer, jax.ShapeDtypeStruct):
            got = f"{answer.dtype} of shape {answer.shape} for {one.shape}"
        raise ValueError(f"--model {name} must give an array, a row for each of a batch, not {got}")
    if outputs != "values" and answer.shape[-1] == 1:
        raise ValueError(
            f"--outputs {outputs}: {name} gives one number a row, whose largest is always itself, "
            "so that there are no labels: say --outputs values"
        )
    return workload


def find_model(name: str, weights: Path | None, outputs: Returned) -> Any:
    """Return the model that an option names, as workers run it; raise as `find_workload`."""
    if is_shipped(name):
        return load_worker_model(name, outputs)
    if is_own(name):
        network = load_callable(name, weights)
    else:
        from nercc_models import load_hub_model

        network = load_hub_model(hub_name(name))
    return WorkerModel(network, outputs) if outputs == "probabilities" else network


def load_worker_model(model: str, outputs: Returned) -> WorkerModel:
    """Return a shipped model by name, as workers run it."""
    from nercc_models import load_model

    return WorkerModel(load_model(model), outputs)


def load_plain_code(path: Path, option: str) -> AbstractCode:
    """Return a code from its file, for workers that all run the served model.

    Errors name the option.

    Raises:
        ValueError: If some workers would run other models; and as `load_code`.
    """
    with of_option(option):
        code = load_code(path)
    if code.worker_models.any():
        raise ValueError(
            f"{option}: {type(code).__name__} has workers that run other models; here all "
            "workers must run the served model"
        )
    return code


# Inputs from files.


def needs_pyarrow(option: str) -> None:
    """Raise ImportError, beginning with the option that needs it, if pyarrow is missing."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ImportError(f"{option} needs pyarrow: pip install '.[data]' in a clone")


def read_input_file(
    path: Path, columns: str | None = None, id_column: str | None = None
) -> tuple[Float[np.ndarray, "rows ..."], Shaped[np.ndarray, " rows"] | None]:
    """Return a row for each input of a file, and the rows' ids if a column holds them.

    Inputs are float32 where the file has that, otherwise float64. The file is .npy, .npz with one
    array, or a table (.csv or .parquet) with one input a row and one number of it in each column. A
    .csv may begin with a line of column names.

    Args:
        path: The file.
        columns: The names of a table's columns that are inputs, in the order of the inputs,
            separated by commas (default: all but that of the ids).
        id_column: The name of the column that holds ids: texts or whole numbers.

    Raises:
        ValueError: There is no such file or column, or inputs are anything but finite numbers; it
            names the option.
    """
    option, ids = f"--inputs {path}", None
    if not path.is_file():
        raise ValueError(f"{option}: there is no such file")
    if path.suffix not in _FILES:
        raise ValueError(f"{option}: a file ends in {', '.join(_FILES)}")
    if path.suffix not in (".csv", ".parquet") and (columns or id_column):
        raise ValueError(f"{option}: --columns and --id-column are for .csv and .parquet files")
    if path.suffix == ".parquet":
        needs_pyarrow(option)
    try:
        if path.suffix in (".csv", ".parquet"):
            found, ids = _read_table(path, columns, id_column)
        elif path.suffix == ".npy":
            found = np.load(path, allow_pickle=False)
        else:
            arrays = _read_arrays(path)
            if len(arrays) != 1:
                raise ValueError(f"it holds {len(arrays)} arrays, {[*arrays]}: one is needed")
            (found,) = arrays.values()
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{option} cannot be read: {error}") from error
    if found.dtype.kind not in "biuf":
        raise ValueError(f"{option} holds {found.dtype}: numbers are needed")
    found = found if found.dtype == np.float32 else found.astype(np.float64)
    found = found[:, None] if found.ndim == 1 and path.suffix != ".npy" else found
    if found.ndim < 2 or not found.size:
        raise ValueError(f"{option}: needs shape (rows, *shape of a data point), not {found.shape}")
    sound = np.isfinite(found.reshape(len(found), -1)).all(axis=1)
    if not sound.all():
        row, count = int(np.argmin(sound)), int(np.sum(~sound))
        raise ValueError(f"{option}: {count} rows are not finite, the first is row {row}")
    if ids is not None and ids.dtype.kind not in "iuU":
        raise ValueError(
            f"--id-column {id_column} holds {ids.dtype}: each row needs a text or a whole number"
        )
    return found, ids


def read_named_inputs(path: Path) -> np.ndarray | dict[str, np.ndarray]:
    """Return inputs as `read_input_file` does, but float32, and of an .npz file its arrays by name.

    For models that take a dict.
    """
    if path.suffix != ".npz" or not path.is_file():
        return read_input_file(path)[0].astype(np.float32)
    try:
        return {name: each.astype(np.float32) for name, each in _read_arrays(path).items()}
    except (ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"--inputs {path} has no arrays of numbers by name: {error}") from error


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def _read_table(
    path: Path, columns: str | None, id_column: str | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the numbers of a .csv or .parquet, a row for each of it, and the ids."""
    names: list[str] = []
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        try:
            table = parquet.read_table(path)
        except pyarrow.ArrowException as error:
            raise ValueError(str(error)) from error
        names, cells = table.column_names, [each.to_numpy() for each in table.columns]
    else:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin with a mark
            rows = [row for row in csv.reader(file) if row]
        width = len(rows[0]) if rows else 0
        try:
            np.array(rows[:1], float)
        except ValueError:  # the first line has names
            names, rows = [name.strip() for name in rows[0]], rows[1:]
        if not names and (columns or id_column):
            raise ValueError("its first line has no names of columns")
        if short := next((row for row in rows if len(row) != width), None):
            raise ValueError(f"a row has {len(short)} cells, and the first line {width}: {short}")
        cells = list(np.array(rows, str).reshape(-1, width).T)  # texts, for ids of any kind

    asked = [] if columns is None else columns.split(",")
    for name in (*asked, *([] if id_column is None else [id_column])):
        if names.count(name) != 1:
            count = "no column" if name not in names else f"{names.count(name)} columns"
            raise ValueError(f"it has {count} {name!r}, but {', '.join(names)}")
    x = [cells[names.index(name)] for name in asked]
    if columns is None:
        x = [each for place, each in enumerate(cells) if names[place : place + 1] != [id_column]]
    x = np.column_stack(x)
    ids = None if id_column is None else cells[names.index(id_column)]
    if ids is not None and ids.dtype == object:  # texts of a .parquet
        if None in ids:
            raise ValueError(f"some rows have no {id_column!r}")
        ids = ids.astype(str)
    return x.astype(float) if x.dtype.kind == "U" else x, ids
