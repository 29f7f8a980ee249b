"""The model and the data points that a command runs on.

A shipped model with its data set, or any other (`_own_models.py`) with inputs from a file.
"""

import dataclasses
import importlib.util
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Float

from ..codes import AbstractCode, load_code
from ..inference._models import call_model, check_model
from ..pools._batch import reason_of
from ..pools._row_files import fingerprint_of_array
from ..stragglers import AbstractStragglers, ExactStragglers
from ._errors import of_option
from ._options import Returned
from ._own_models import EXAMPLES, example_inputs, is_own, is_shipped, load_callable, load_hub

_HELD_OUT = 1000  # most inputs in the test split; a fifth of the inputs if that is fewer
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


@dataclasses.dataclass(frozen=True)
class Points:
    """Data points as they are stored, their preprocessing, and labels (-1 where unknown)."""

    name: str
    images: np.ndarray
    labels: np.ndarray
    preprocess: Callable[[np.ndarray], Any]


def inputs_of(network: WorkerModel, split: str, data_dir: Path | None) -> Points:
    from nercc_models import load_data

    try:
        data = load_data(network.network.data, split, data_dir=data_dir)
    except ValueError as error:
        raise ValueError(f"--split {split}: {error}") from error
    return Points(split, data.images, data.labels, network.network.preprocess)


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model as workers run it, and its data points.

    The data points come from the model's data set or, if `x` is given, are the rows of `x`.
    `source` names where they come from. The "test" split of `x` is a fifth of its rows, at most
    `_HELD_OUT`, and every command chooses the same ones; "train" is the rest.
    """

    name: str
    model: Any
    source: str
    x: np.ndarray | None
    data_dir: Path | None

    def points(self, split: str, count: int, seed: int) -> np.ndarray:
        """Return at most `count` data points of a split, shuffled.

        Raises ValueError if there is no such split.
        """
        if self.x is None:
            return self.model.images(split, self.data_dir, count, seed)[0]
        if split not in ("train", "test"):
            raise ValueError(f"--split {split}: {self.source} has only the splits train and test")
        order = np.random.default_rng(0).permutation(len(self.x))
        held = min(_HELD_OUT, len(order) // 5)
        rows = order[:held] if split == "test" else order[held:]
        return self.x[np.random.default_rng(seed).permutation(rows)[:count]]

    def fingerprint(self, split: str) -> str:
        """Return a text that identifies the data: the split's name, or a fingerprint of all `x`."""
        return split if self.x is None else fingerprint_of_array(self.x)

    def rows(self, split: str) -> Points:
        """Return all data points of a split, or all of `x`, in their order."""
        if self.x is None:
            return inputs_of(self.model, split, self.data_dir)
        return Points(Path(self.source).name, self.x, np.full(len(self.x), -1), np.asarray)


def find_workload(
    name: str,
    weights: Path | None = None,
    inputs: Path | None = None,
    data_dir: Path | None = None,
    outputs: Returned = "logits",
    *,
    traced: bool = True,
) -> Workload:
    """Return the model and data points that the options of the command line select.

    Where JAX calls the model (`traced`), inputs of your own are converted to float32; otherwise
    they keep the type in which they were read.

    Raises:
        ValueError: If there is no such model, no inputs are known, or the model does not run on
            them.
        ImportError: If an extra is missing; it says which.
    """
    model = find_model(name, weights, outputs)
    if inputs is None and is_shipped(name):
        return Workload(name, model, model.network.data, None, data_dir)
    x, source = own_inputs(name, inputs)
    if traced:
        x = x.astype(np.float32)
        shape = _check_runs(name, model, x, source)
        if outputs != "values" and shape[-1] == 1:
            raise ValueError(
                f"--outputs {outputs}: {name} gives one number a row, whose largest is always "
                "itself, so that there are no labels: say --outputs values"
            )
    return Workload(name, model, source, x, None)


def find_model(name: str, weights: Path | None, outputs: Returned) -> Any:
    """Return the model that an option names, as workers run it; raise as `find_workload`."""
    if is_shipped(name):
        return load_worker_model(name, outputs)
    network = load_callable(name, weights) if is_own(name) else load_hub(name)
    return WorkerModel(network, outputs) if outputs == "probabilities" else network


def own_inputs(name: str, path: Path | None) -> tuple[np.ndarray, str]:
    """Return data points, one a row, and their source; raise ValueError if there are none."""
    if path is not None:
        return read_inputs(path), str(path)
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
    return x, f"{EXAMPLES}() of {name.partition(':')[0]}"


def _check_runs(name: str, model: Any, x: np.ndarray, source: str) -> tuple[int, ...]:
    """Return the shape of the model's answer to one row of `x`.

    Raises ValueError if JAX cannot run it on rows of `x`, or it gives no row for each.
    """
    check_model(model)
    one = jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
    try:
        answer: Any = eqx.filter_eval_shape(lambda batch: call_model(model, batch), one)
    except Exception as error:
        raise ValueError(
            f"--model {name} does not run on a batch of shape {one.shape} of {source}: "
            f"{reason_of(error)}"
        ) from error
    if getattr(answer, "shape", ())[:1] != (1,) or len(answer.shape) < 2:
        wanted = f"--model {name} must give an array, a row for each of a batch"
        got = type(answer).__name__
        if isinstance(answer, jax.ShapeDtypeStruct):
            got = f"{answer.dtype} of shape {answer.shape} for {one.shape}"
        raise ValueError(f"{wanted}, not {got}")
    return answer.shape


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


def require_groups(
    x: np.ndarray, source: str, num_data: int, groups: int, option: str
) -> np.ndarray:
    """Return `x`; raise ValueError if its rows do not fill `groups` groups."""
    if len(x) < groups * num_data:
        what = "a group" if groups == 1 else f"{groups} groups"
        raise ValueError(
            f"{option} gives {len(x)} data points of {source}, too few for {what} of {num_data}; "
            "ask for more data points or a smaller --num-data"
        )
    return x


def straggler_laws(
    num_data: int, num_workers: int, max_stragglers: int | None
) -> dict[str, AbstractStragglers]:
    """Return laws for each number of stragglers from 0 to `max_stragglers` (default: N - K).

    Raises:
        ValueError: If `max_stragglers` is negative, or leaves no worker to answer.
    """
    if max_stragglers is None:
        max_stragglers = max(num_workers - num_data, 0)
    if not 0 <= max_stragglers < num_workers:
        raise ValueError(
            f"--max-stragglers {max_stragglers}: it must be from 0 to {num_workers - 1}, for "
            f"{num_workers} workers"
        )
    return {str(s): ExactStragglers(s) for s in range(max_stragglers + 1)}


# Inputs from files.


def needs_pyarrow(option: str) -> None:
    """Raise ImportError, beginning with the option that needs it, if pyarrow is missing."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ImportError(f"{option} needs pyarrow: pip install '.[data]' in a clone")


def read_inputs(path: Path) -> Float[np.ndarray, "rows ..."]:
    """Return a row for each input of a file: float32 where the file has that, otherwise float64.

    The file is .npy, .npz with one array, or a table (.csv or .parquet) with one input a row and
    one number of it in each column. A .csv may begin with a line of column names.

    Raises:
        ValueError: If there is no such file, or it has anything but finite numbers; it names the
            option.
    """
    option = f"--inputs {path}"
    if not path.is_file():
        raise ValueError(f"{option}: there is no such file")
    if path.suffix not in _FILES:
        raise ValueError(f"{option}: a file ends in {', '.join(_FILES)}")
    try:
        found = _READERS[path.suffix](path)
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
    return found


def read_named_inputs(path: Path) -> np.ndarray | dict[str, np.ndarray]:
    """Return inputs as `read_inputs` does, but float32, and of an .npz file its arrays by name.

    For models that take a dict.
    """
    if path.suffix != ".npz" or not path.is_file():
        return read_inputs(path).astype(np.float32)
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name].astype(np.float32) for name in file.files}
    except (ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"--inputs {path} has no arrays of numbers by name: {error}") from error


def _npz(path: Path) -> np.ndarray:
    with np.load(path, allow_pickle=False) as file:
        if len(file.files) != 1:
            raise ValueError(f"it holds {len(file.files)} arrays, {file.files}: one is needed")
        return file[file.files[0]]


def _csv(path: Path) -> np.ndarray:
    with path.open() as file:
        first = file.readline().rstrip("\n").split(",")
    named = not all(_is_number(cell) for cell in first)
    return np.loadtxt(path, delimiter=",", skiprows=int(named), ndmin=2)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _parquet(path: Path) -> np.ndarray:
    needs_pyarrow(f"--inputs {path}")
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error
    return np.column_stack([column.to_numpy() for column in table.columns])


_READERS: dict[str, Any] = {
    ".npy": lambda path: np.load(path, allow_pickle=False),
    ".npz": _npz,
    ".csv": _csv,
    ".parquet": _parquet,
}
