"""Inputs of a model from a file: an array, or a table of numbers."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from ._row_results import needs_pyarrow

INPUTS = (".npy", ".npz", ".csv", ".parquet")


def read_inputs(path: Path) -> Float[np.ndarray, "rows ..."]:
    """A row for each input, float32 where the file has that, else float64.

    A .npy file, an .npz file with one array, or a table, whose columns are the inputs, side by
    side; a .csv may begin with their names. Raises: ValueError, naming the option, where there is
    no such file, or it has anything but finite numbers.
    """
    told = f"--inputs {path}"
    if not path.is_file():
        raise ValueError(f"{told}: there is no such file")
    if path.suffix not in INPUTS:
        raise ValueError(f"{told}: a file ends in {', '.join(INPUTS)}")
    try:
        found = _READERS[path.suffix](path)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{told} cannot be read: {error}") from error
    if found.dtype.kind not in "biuf":
        raise ValueError(f"{told} holds {found.dtype}: numbers are needed")
    found = found if found.dtype == np.float32 else found.astype(np.float64)
    found = found[:, None] if found.ndim == 1 and path.suffix != ".npy" else found
    if found.ndim < 2 or not found.size:
        raise ValueError(f"{told}: (rows, *shape of one) is needed, not {found.shape}")
    sound = np.isfinite(found.reshape(len(found), -1)).all(axis=1)
    if not sound.all():
        row, count = int(np.argmin(sound)), int(np.sum(~sound))
        raise ValueError(f"{told}: {count} rows are not finite, the first is row {row}")
    return found


def read_named_inputs(path: Path) -> np.ndarray | dict[str, np.ndarray]:
    """As `read_inputs`, float32, but of an .npz file its arrays by name.

    For models that take a dict. Raises: ValueError, as `read_inputs`.
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
