"""The result of a run over a function's inputs: a row for each input, and the file it becomes."""

import csv
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from ..pools import Rows

FILES = (".npz", ".csv", ".parquet")  # or a folder, of parts


class RowResults:
    """What is known of each row of the inputs, in their order.

    - `predictions`: the function's own values where `exact`, else decoded ones; NaN where unknown.
      None before the first is known;
    - `deviation`: how far they may be off, 0 where exact, infinite where unknown;
    - `score`: their error bar, or doubt: what has to be small enough;
    - `done`: whether it is.
    """

    def __init__(self, rows: int):
        self.predictions: Float[np.ndarray, "rows ..."] | None = None
        self.exact, self.done = np.zeros(rows, bool), np.zeros(rows, bool)
        self.deviation, self.score = np.full(rows, np.inf), np.full(rows, np.inf)

    def __len__(self) -> int:
        return len(self.done)

    def add(self, rows: Int[np.ndarray, " few"], found: Rows, limit: float) -> np.ndarray:
        """Takes what became of some rows, as far as it is good enough. Returns which were done.

        A row may be among them more than once: its best counts."""
        good = found.score <= limit
        order = np.lexsort((found.exact[good], -found.score[good]))  # the best of a row comes last
        if found.values is not None:
            arrays = (found.values, found.deviation, found.score, found.exact)
            self._set(rows[good][order], *(each[good][order] for each in arrays))
        return np.unique(rows[good])

    def rows_of(self, pieces: Sequence[int]) -> dict[str, np.ndarray]:
        """What is known of some rows, as arrays by name."""
        rows = np.asarray(pieces)
        assert self.predictions is not None
        return {
            "index": rows,
            "predictions": self.predictions[rows],
            "deviation": self.deviation[rows],
            "score": self.score[rows],
            "exact": self.exact[rows],
        }

    def take(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes what `rows_of` gave in another process."""
        names = ("index", "predictions", "deviation", "score", "exact")
        self._set(*(arrays[name] for name in names))

    def _set(
        self,
        rows: Int[np.ndarray, " few"],
        values: Float[np.ndarray, "few ..."],
        deviation: Float[np.ndarray, " few"],
        score: Float[np.ndarray, " few"],
        exact: Bool[np.ndarray, " few"],
    ) -> None:
        if self.predictions is None:
            self.predictions = np.full((len(self), *values.shape[1:]), np.nan, values.dtype)
        elif values.shape[1:] != self.predictions.shape[1:]:
            raise ValueError(
                f"a row came as {values.shape[1:]}, others as {self.predictions.shape[1:]}"
            )
        self.predictions[rows], self.deviation[rows] = values, deviation
        self.score[rows], self.exact[rows], self.done[rows] = score, exact, True

    @property
    def vectors(self) -> Float[np.ndarray, "rows outputs"]:
        """The predictions, each as a vector."""
        assert self.predictions is not None
        return self.predictions.reshape(len(self), -1)

    @property
    def learnable(self) -> Int[np.ndarray, " few"]:
        """The rows that were computed, and are finite."""
        computed = np.flatnonzero(self.exact)
        return computed[np.isfinite(self.vectors[computed]).all(axis=1)]


def check_row_file(path: Path) -> None:
    """Raises: ValueError for what is no folder, and no file that `write_rows` can write."""
    if path.suffix not in ("", *FILES):
        raise ValueError(
            f"--output {path}: a result file ends in {', '.join(FILES[:-1])} or {FILES[-1]}; a "
            "folder, which gets parts and a manifest, has no ending"
        )
    if path.suffix == ".parquet":
        needs_pyarrow(f"--output {path}")


def needs_pyarrow(told: str) -> None:
    """Raises: ImportError, beginning with what wants it, where it is missing."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ImportError(f"{told} needs pyarrow: pip install 'nercc-jax[data]'")


def write_rows(path: Path, results: RowResults, score: str) -> None:
    """Writes all rows; `score` is what it is called. Tables have a column for each output."""
    columns: dict[str, Any] = {
        "deviation": results.deviation,
        score: results.score,
        "exact": results.exact,
    }
    if path.suffix == ".npz":
        np.savez(path, **({"predictions": results.predictions} | columns))  # pyright: ignore
        return
    outputs = {f"output_{place}": values for place, values in enumerate(results.vectors.T)}
    columns = outputs | columns
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(columns), path)
        return
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        # The shortest digits that tell a float of its kind.
        writer.writerows(zip(*(each.astype(str) for each in columns.values()), strict=True))
