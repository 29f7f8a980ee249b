"""The result of a run over a data set: a row for each data point, and the file it becomes."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from ..pools import BatchOutcome

FILES = (".npz", ".csv")


class Results:
    """Rows in the order of the run; those of batches that are not done yet are no part of it.

    - `index`: which data point of the split it is;
    - `batch`: in which batch it went, from 0;
    - `predictions`: decoded outputs, NaN where the data point is lost;
    - `recovered`: whether it is not;
    - `heard`: the workers whose answers its prediction rests on.
    """

    def __init__(self, rows: Int[np.ndarray, " rows"], batch_size: int, outputs: int, workers: int):
        """For a run over the data points `rows`, `batch_size` at a time, the last batch filled."""
        self._index, self._batch_size = rows, batch_size
        self._predictions = np.full((len(rows), outputs), np.nan, np.float32)
        self._recovered = np.zeros(len(rows), bool)
        self._heard = np.zeros((len(rows), workers), bool)
        self._done = 0

    def __len__(self) -> int:
        return self._done

    def add(self, outcome: BatchOutcome) -> int:
        """Takes the next batch. Returns how many rows it brought: what filled it is left out."""
        start = self._done
        self._done = stop = min(start + self._batch_size, len(self._index))
        if outcome.result is not None:
            decoded = outcome.result.decoded
            groups, num_data = decoded.recovered.shape
            heard = np.repeat(np.asarray(decoded.heard), num_data, axis=0)
            predictions = np.asarray(decoded.predictions).reshape(groups * num_data, -1)
            self._predictions[start:stop] = predictions[: stop - start]
            self._recovered[start:stop] = np.ravel(decoded.recovered)[: stop - start]
            self._heard[start:stop] = heard[: stop - start]
            self._heard[start:stop] &= self._recovered[start:stop, None]
        return stop - start

    @property
    def index(self) -> Int[np.ndarray, " done"]:
        return self._index[: self._done]

    @property
    def batch(self) -> Int[np.ndarray, " done"]:
        return np.arange(self._done) // self._batch_size

    @property
    def predictions(self) -> Float[np.ndarray, "done outputs"]:
        return self._predictions[: self._done]

    @property
    def recovered(self) -> Bool[np.ndarray, " done"]:
        return self._recovered[: self._done]

    @property
    def heard(self) -> Bool[np.ndarray, "done num_workers"]:
        return self._heard[: self._done]

    @property
    def predicted(self) -> Int[np.ndarray, " done"]:
        """The label of each prediction, -1 for lost ones."""
        clean = np.where(self.recovered[:, None], self.predictions, 0)
        return np.where(self.recovered, clean.argmax(axis=1), -1)

    @property
    def lost(self) -> int:
        return int(np.sum(~self.recovered))


def check_kind(path: Path) -> None:
    """Raises: ValueError for a file that `write_results` cannot write."""
    if path.suffix not in FILES:
        raise ValueError(f"--output {path}: a result file ends in {' or '.join(FILES)}")


def write_results(path: Path, results: Results, labels: Int[np.ndarray, " points"]) -> None:
    """Writes the rows with the split's true labels; a .csv has the number of workers heard.

    Raises: ValueError for another kind of file, OSError as `open` does.
    """
    check_kind(path)
    columns: dict[str, Any] = {
        "index": results.index,
        "batch": results.batch,
        "label": labels[results.index],
        "predicted": results.predicted,
        "recovered": results.recovered,
    }
    if path.suffix == ".npz":
        np.savez(path, **columns, heard=results.heard, predictions=results.predictions)
        return
    columns["heard"] = results.heard.sum(axis=1)
    for output, values in enumerate(results.predictions.T):
        columns[f"output_{output}"] = values.astype(str)  # the shortest digits that tell a float32
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
