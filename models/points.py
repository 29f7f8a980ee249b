"""Data points of a model: of a data set by name, of a file, or of the model's own module."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Shaped

from .data import list_data, load_data
from .finding import example_inputs
from .inputs import load_inputs
from .names import HUB


class Split(NamedTuple):
    """The data points of a split in their order, as they are stored.

    Attributes:
        name: The split's name, or the file's.
        x: The data points.
        labels: Their labels; -1 where unknown.
        ids: Ids of the user's choice, such as names, if there are any.
    """

    name: str
    x: Shaped[np.ndarray, "rows ..."]
    labels: Int[np.ndarray, " rows"]
    ids: Shaped[np.ndarray, " rows"] | None = None


@dataclasses.dataclass(frozen=True)
class DataPoints:
    """Data points of a data set by name or, if `x` is given, the rows of `x`.

    The "test" split of `x` is a fifth of its rows, at most 1,000, and always the same ones; "train"
    is the rest.

    Attributes:
        source: Where they come from: a data set's name, a file, or a module.
        x: The rows.
        ids: The rows' ids, if they have any.
        data_dir: The folder of the data set.
        preprocess: Makes of stored data points what the model takes.
    """

    source: str
    x: Shaped[np.ndarray, "rows ..."] | None = None
    ids: Shaped[np.ndarray, " rows"] | None = None
    data_dir: Path | None = None
    # By a factory, since a function on the class would be taken for a method of it.
    preprocess: Callable[[Any], Any] = dataclasses.field(default_factory=lambda: np.asarray)

    def split(self, name: str) -> Split:
        """Return a split of the data set, or all rows, in their order.

        Raises:
            ValueError: The data set has no such split.
        """
        if self.x is None:
            data = load_data(self.source, name, data_dir=self.data_dir)
            return Split(name, data.images, data.labels)
        return Split(Path(self.source).name, self.x, np.full(len(self.x), -1), self.ids)

    def shuffled(self, split: str, count: int, seed: int) -> Shaped[np.ndarray, "rows ..."]:
        """Return at most `count` data points of a split, shuffled, as the model takes them.

        Raises:
            ValueError: There is no such split.
        """
        random = np.random.default_rng(seed)
        if self.x is None:
            found = self.split(split)
            return np.asarray(self.preprocess(found.x[random.permutation(len(found.x))[:count]]))
        if split not in ("train", "test"):
            raise ValueError(f"{self.source} has only the splits train and test, not {split!r}")
        order = np.random.default_rng(0).permutation(len(self.x))
        held = min(1000, len(order) // 5)
        rows = order[:held] if split == "test" else order[held:]
        return self.x[random.permutation(rows)[:count]]


def find_points(
    name: str,
    model: Any = None,
    inputs: str | Path | None = None,
    columns: Sequence[str] | None = None,
    id_column: str | None = None,
    data_dir: Path | None = None,
) -> DataPoints:
    """Return the data points on which every `nercc` command runs a model.

    Images of a data set are float32 as they are stored, unless a shipped model has preprocessing.

    Args:
        name: The model's name, as for `find_model`.
        model: The model, whose data set and preprocessing count if it is a shipped one.
        inputs: A file, as for `load_inputs`, or a data set by name (default: the model's data set,
            or `example_inputs` of its module).
        columns: Of a table, as for `load_inputs`.
        id_column: Of a table, as for `load_inputs`.
        data_dir: The folder of the data set.

    Raises:
        ValueError: There are no data points, or they cannot be read.

    Example:
        >>> find_points("lenet5-digits", inputs="digits").shuffled("test", 5, seed=0).shape
        (5, 8, 8, 1)
    """
    shipped = None if ":" in name else getattr(model, "data", None)
    prepare: Any = lambda images: np.asarray(images, np.float32)  # noqa: E731
    prepare = prepare if shipped is None else model.preprocess
    if inputs is None and shipped is not None:
        return DataPoints(shipped, data_dir=data_dir, preprocess=prepare)
    if inputs is not None and not Path(inputs).is_file() and str(inputs) in list_data():
        return DataPoints(str(inputs), data_dir=data_dir, preprocess=prepare)
    if inputs is not None:
        return DataPoints(str(inputs), *load_inputs(inputs, columns, id_column))
    hub = name.startswith(HUB)
    found = None if hub else example_inputs(name)
    if found is None:
        module = "" if hub else ", or define example_inputs() in its module"
        raise ValueError(f"your own model needs data points: use --inputs FILE{module}")
    x = np.asarray(found)
    if x.ndim < 2 or not x.size or x.dtype.kind not in "biuf":
        raise ValueError(
            f"example_inputs() gave {x.dtype} of shape {x.shape}: an array of numbers is needed, "
            "of shape (rows, *shape of a data point)"
        )
    return DataPoints(f"example_inputs() of {name.partition(':')[0]}", x)
