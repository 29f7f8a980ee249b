"""Results of a run on disk as they come: parts in a folder, and one manifest of them.

A part is a file that appears whole or not at all, and the manifest names those that count. So
whatever ends a run, the results written by then are there, and a later run goes on from them.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from ..codes import NeRCC
from ..codes.whole_files import JsonFormat, read_arrays, write_arrays
from ..risk import ErrorBars, ErrorProbability
from ..schemes import Scheme
from ..schemes._calibrate import FittedScheme
from ..surrogates import learner_card, load_learner, save_learner

_MANIFEST = "manifest.json"
_REMEDY = "restore it from a copy, or remove its folder and run again without --resume (resume)"
_FORMAT = JsonFormat(
    "run", frozenset({"settings", "complete", "parts"}), frozenset({"learner"}), remedy=_REMEDY
)
_EVERY = 1.0  # seconds between two parts, at least


@runtime_checkable
class PartResults(Protocol):
    """Results of numbered pieces, such as batches, that are saved as named arrays.

    The array "index" has the numbers of their rows.
    """

    def rows_of(self, pieces: Sequence[int], /) -> dict[str, np.ndarray]:
        """Return the results of some pieces as arrays by name."""
        ...

    def take(self, arrays: Mapping[str, np.ndarray], /) -> None:
        """Take what `rows_of` returned in another process."""


def check_parts(folder: Path, resume: bool) -> None:
    """Raise ValueError if a folder has parts and a new run is wanted, or holds anything else."""
    found = (folder / _MANIFEST).is_file()
    if found and not resume:
        raise ValueError(
            f"{folder} has the parts of an earlier run: give --resume (resume=True) to go on "
            "with it, or remove the folder"
        )
    if folder.exists() and not found and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists, and holds no results of a run")


class Parts:
    """The folder of one run, with its parts and their manifest.

    It is made when something is written. `settings` are all that the run's numbers depend on, as
    JSON takes it. The results take the parts that an earlier run has written. Each part has the
    ids of its rows, if rows have ids.

    Raises:
        ValueError: The folder holds a run with other settings, or a file is damaged or missing.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        results: PartResults,
        ids: Shaped[np.ndarray, " rows"] | None = None,
    ):
        self._folder, self._results, self._ids = folder, results, ids
        if ids is not None:
            settings = settings | {"ids": fingerprint_of_array(ids)}
        self._manifest: dict[str, Any] = {"settings": settings, "complete": False, "parts": []}
        if (folder / _MANIFEST).is_file():
            earlier = _FORMAT.read(folder / _MANIFEST)
            before = earlier["settings"]
            other = [
                f"{name} was {before.get(name)!r} and is {settings.get(name)!r}"
                for name in sorted(before.keys() | settings.keys())
                if before.get(name) != settings.get(name)
            ]
            if other:
                raise ValueError(
                    f"{folder} holds another run, with which --resume cannot go on: "
                    f"{'; '.join(other)}"
                )
            self._manifest = earlier | {"complete": False}
            for part in earlier["parts"]:
                try:
                    results.take(read_arrays(folder / part["file"], _REMEDY))
                except FileNotFoundError as error:
                    raise ValueError(f"{folder / part['file']} is missing; {_REMEDY}") from error
        self._pending: list[int] = []
        self._written = time.monotonic()

    def add(self, pieces: Iterable[int]) -> None:
        """Have pieces written that the results hold now; at most one part a second is written."""
        self._pending.extend(pieces)
        if time.monotonic() - self._written >= _EVERY:
            self.flush()

    def flush(self, complete: bool = False) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._pending:
            name = f"part-{len(self._manifest['parts']):06d}.npz"
            arrays = self._results.rows_of(self._pending)
            if self._ids is not None:
                arrays["id"] = self._ids[arrays["index"]]
            write_arrays(self._folder / name, arrays)
            self._manifest["parts"].append({"file": name})
        self._manifest["complete"] = complete
        _FORMAT.write(self._folder / _MANIFEST, self._manifest)
        self._pending, self._written = [], time.monotonic()

    def keep(self, name: str, file: str, write: Callable[[Path], Any]) -> None:
        """Write a further file, and enter it in the manifest under a name."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write(self._folder / file)
        self._manifest[name] = file
        self.flush()

    def kept(self, name: str) -> Path | None:
        return self._folder / self._manifest[name] if name in self._manifest else None

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def fingerprint(path: Path | None) -> str | None:
    """Return a hash of a file's content, for the settings of a run; of anything else its name."""
    if path is None or not path.is_file():
        return None if path is None else str(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def fingerprint_of_array(x: np.ndarray) -> str:
    """Return a hash of an array's bytes, for the settings of a run."""
    return hashlib.sha256(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data).hexdigest()


class RowTable:
    """All that is known of each row, in the order of the inputs.

    Attributes:
        predictions: The function's own values where `exact`, otherwise predicted ones; NaN where
            unknown. None before the first is known.
        deviation: How far they may be off: 0 where exact, infinite where unknown.
        score: Their error bar or error probability, which must be small enough.
        exact: Which rows were computed.
        done: Which rows are known well enough.
    """

    def __init__(self, rows: int):
        self.predictions: Float[np.ndarray, "rows ..."] | None = None
        self.exact, self.done = np.zeros(rows, bool), np.zeros(rows, bool)
        self.deviation, self.score = np.full(rows, np.inf), np.full(rows, np.inf)

    def __len__(self) -> int:
        return len(self.done)

    def add(
        self,
        rows: Int[np.ndarray, " few"],
        values: Float[np.ndarray, "few ..."],
        deviation: Float[np.ndarray, " few"],
        score: Float[np.ndarray, " few"],
        exact: bool | Bool[np.ndarray, " few"],
    ) -> None:
        """Take the values of some rows; raise ValueError if their shape is not that of others."""
        if self.predictions is None:
            self.predictions = np.full((len(self), *values.shape[1:]), np.nan, values.dtype)
        elif values.shape[1:] != self.predictions.shape[1:]:
            raise ValueError(
                f"a row came as {values.shape[1:]}, others as {self.predictions.shape[1:]}"
            )
        self.predictions[rows], self.deviation[rows] = values, deviation
        self.score[rows], self.exact[rows], self.done[rows] = score, exact, True

    def take_back(self, rows: Int[np.ndarray, " few"]) -> None:
        """Treat some rows as if they had no values."""
        assert self.predictions is not None
        self.predictions[rows], self.deviation[rows], self.score[rows] = np.nan, np.inf, np.inf
        self.exact[rows] = self.done[rows] = False

    def rows_of(self, pieces: Sequence[int]) -> dict[str, np.ndarray]:
        """Return what is known of some rows, as arrays by name; those taken back are not done."""
        rows = np.unique(np.asarray(pieces, int))
        assert self.predictions is not None
        return {
            "index": rows,
            "predictions": self.predictions[rows],
            "deviation": self.deviation[rows],
            "score": self.score[rows],
            "exact": self.exact[rows],
            "done": self.done[rows],
        }

    def take(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take what `rows_of` returned in another process."""
        names = ("index", "predictions", "deviation", "score", "exact")
        self.add(*(arrays[name] for name in names))
        self.take_back(arrays["index"][~arrays["done"]])

    @property
    def vectors(self) -> Float[np.ndarray, "rows outputs"]:
        assert self.predictions is not None
        return self.predictions.reshape(len(self), -1)

    @property
    def learnable(self) -> Int[np.ndarray, " few"]:
        return np.flatnonzero(self.exact & np.isfinite(self.vectors).all(axis=1))


def save_fitted(path: Path, fitted: FittedScheme) -> None:
    """Write a fitted scheme: its learner's file, with all else in the card."""
    scheme: Any = fitted.scheme
    about = {
        "pairs": fitted.pairs,
        # JSON has no infinity.
        "bars": {
            name: np.nan_to_num(np.asarray(getattr(scheme.bars, name), np.float32)).tolist()
            for name in ("coverages", "factors")
        },
        "doubt": scheme.error_probability and scheme.error_probability.to_json(),
    }
    save_learner(path, scheme.surrogate, about)


def row_code() -> NeRCC:
    """Return the code of a fitted scheme, which must have one. Rows are sent as they are."""
    return NeRCC(1, 2)


def load_fitted(path: Path) -> FittedScheme:
    """Return what `save_fitted` wrote; raise ValueError, naming the file, if it is damaged."""
    try:
        learner, about = load_learner(path), learner_card(path)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{error}; this one is part of a run: {_REMEDY}") from error
    error_probability = about["doubt"]
    bars: Any = {name: jnp.asarray(each, float) for name, each in about["bars"].items()}
    scheme = Scheme(
        row_code(),
        surrogate=learner,
        bars=ErrorBars(**bars),
        error_probability=error_probability and ErrorProbability.from_json(error_probability),
        redundancy="uncertain",
    )
    return FittedScheme(scheme, about["pairs"])
