"""The result of a run over a data set: a row for each data point, and the file it becomes."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from ..pools import BatchOutcome

FILES = (".npz", ".csv")  # or a folder, of parts


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
        self._done = np.zeros(len(rows), bool)

    def __len__(self) -> int:
        return int(self._done.sum())

    def add(self, batch: int, outcome: BatchOutcome) -> int:
        """Takes a batch. Returns how many rows it has: what filled it is left out."""
        rows = self._rows(batch)
        count = rows.stop - rows.start
        self._done[rows] = True
        if outcome.result is not None:
            decoded = outcome.result.decoded
            groups, num_data = decoded.recovered.shape
            heard = np.repeat(np.asarray(decoded.heard), num_data, axis=0)
            predictions = np.asarray(decoded.predictions).reshape(groups * num_data, -1)
            self._predictions[rows] = predictions[:count]
            self._recovered[rows] = np.ravel(decoded.recovered)[:count]
            self._heard[rows] = heard[:count]
            self._heard[rows] &= self._recovered[rows, None]
        return count

    def take(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes what `rows_of` gave of some batches in another process."""
        rows = np.concatenate([np.r_[self._rows(batch)] for batch in arrays["batches"].tolist()])
        self._predictions[rows] = arrays["predictions"]
        self._recovered[rows] = arrays["recovered"]
        self._heard[rows] = arrays["heard"]
        self._done[rows] = True

    def rows_of(self, batches: Sequence[int]) -> dict[str, np.ndarray]:
        """The rows of some batches, one after the other, as arrays by name."""
        rows = np.concatenate([np.r_[self._rows(batch)] for batch in batches])
        return {
            "batches": np.asarray(batches),
            "index": self._index[rows],
            "predictions": self._predictions[rows],
            "recovered": self._recovered[rows],
            "heard": self._heard[rows],
        }

    def unfinished(self, batches: int) -> list[int]:
        """Which of so many batches are not recovered whole."""
        return [each for each in range(batches) if not self._recovered[self._rows(each)].all()]

    def _rows(self, batch: int) -> slice:
        start = batch * self._batch_size
        return slice(start, min(start + self._batch_size, len(self._index)))

    @property
    def index(self) -> Int[np.ndarray, " done"]:
        return self._index[self._done]

    @property
    def batch(self) -> Int[np.ndarray, " done"]:
        return np.flatnonzero(self._done) // self._batch_size

    @property
    def predictions(self) -> Float[np.ndarray, "done outputs"]:
        return self._predictions[self._done]

    @property
    def recovered(self) -> Bool[np.ndarray, " done"]:
        return self._recovered[self._done]

    @property
    def heard(self) -> Bool[np.ndarray, "done num_workers"]:
        return self._heard[self._done]

    @property
    def predicted(self) -> Int[np.ndarray, " done"]:
        """The label of each prediction, -1 for lost ones."""
        clean = np.where(self.recovered[:, None], self.predictions, 0)
        return np.where(self.recovered, clean.argmax(axis=1), -1)

    @property
    def lost(self) -> int:
        return int(np.sum(~self.recovered))


def check_kind(path: Path) -> None:
    """Raises: ValueError for what is no folder, and no file that `write_results` can write."""
    if path.suffix not in ("", *FILES):
        raise ValueError(
            f"--output {path}: a result file ends in {' or '.join(FILES)}; a folder, which gets "
            "parts and a manifest, has no ending"
        )


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
