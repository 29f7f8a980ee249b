"""Inputs without labels from a file: arrays, or tables with a column for each number."""

import csv
import importlib.util
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

_SUFFIXES = (".npy", ".npz", ".csv", ".parquet")


def load_inputs(
    path: str | Path, columns: Sequence[str] | None = None, id_column: str | None = None
) -> tuple[Float[np.ndarray, "rows ..."], Shaped[np.ndarray, " rows"] | None]:
    """Load the inputs of a file, one a row, and the rows' ids if a column holds them.

    The file is .npy, .npz with one array, or a table (.csv or .parquet) with an input in each row
    and one number of it in each column. A .csv may begin with a line of column names. Inputs are
    float32 where the file has that, otherwise float64.

    Args:
        path: The file.
        columns: The names of a table's columns that are inputs, in the order of the inputs
            (default: all but that of the ids).
        id_column: The name of the column that holds ids: texts or whole numbers.

    Raises:
        ValueError: There is no such column, or inputs are anything but finite numbers.
        OSError: As `open`.
        ImportError: pyarrow, which reads .parquet files, is missing.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "table.csv"
        >>> np.savetxt(path, [[1, 2], [3, 4]], delimiter=",", header="a,b", comments="")
        >>> x, ids = load_inputs(path, ["b", "a"])
        >>> x.tolist()
        [[2.0, 1.0], [4.0, 3.0]]
    """
    path, ids = Path(path), None
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"a file ends in {', '.join(_SUFFIXES)}")
    table = path.suffix in (".csv", ".parquet")
    if not table and (columns is not None or id_column is not None):
        raise ValueError("columns are named in .csv and .parquet files only")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ImportError(f"{path} needs pyarrow: pip install '.[data]' in a clone")
    try:
        if table:
            found, ids = _read_table(path, columns, id_column)
        elif path.suffix == ".npy":
            found = np.load(path, allow_pickle=False)
        else:
            with np.load(path, allow_pickle=False) as arrays:
                if len(arrays) != 1:
                    raise ValueError(f"it holds {len(arrays)} arrays, {[*arrays]}: one is needed")
                (found,) = arrays.values()
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"it cannot be read: {error}") from error
    if found.dtype.kind not in "biuf":
        raise ValueError(f"it holds {found.dtype}: numbers are needed")
    found = found if found.dtype == np.float32 else found.astype(np.float64)
    found = found[:, None] if found.ndim == 1 and path.suffix != ".npy" else found
    if found.ndim < 2 or not found.size:
        raise ValueError(f"needs shape (rows, *shape of a data point), not {found.shape}")
    sound = np.isfinite(found.reshape(len(found), -1)).all(axis=1)
    if not sound.all():
        row, count = int(np.argmin(sound)), int(np.sum(~sound))
        raise ValueError(f"{count} rows are not finite, the first is row {row}")
    if ids is not None and ids.dtype.kind not in "iuU":
        raise ValueError(
            f"column {id_column} holds {ids.dtype}: each row needs a text or a whole number"
        )
    return found, ids


def _read_table(path: Path, columns: Sequence[str] | None, id_column: str | None) -> Any:
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
        if not rows:
            raise ValueError("it has no rows")
        if short := next((row for row in rows if len(row) != width), None):
            raise ValueError(f"a row has {len(short)} cells, and the first line {width}: {short}")
        cells = list(np.array(rows, str).reshape(-1, width).T)  # texts, for ids of any kind

    ids = [] if id_column is None else [id_column]
    for name in (*(columns or ()), *ids):
        if names.count(name) != 1:
            count = "no column" if name not in names else f"{names.count(name)} columns"
            there = ", ".join(names) if names else "no names in its first line"
            raise ValueError(f"it has {count} {name!r}, but {there}")
    places = [place for place in range(len(cells)) if names[place : place + 1] != [id_column]]
    if columns is not None:
        places = [names.index(name) for name in columns]
    inputs = [cells[place] for place in places]
    for number, place in enumerate(places):
        if cells[place].dtype.kind == "U":
            numbers = []
            for row, text in enumerate(cells[place].tolist()):
                try:
                    numbers.append(float(text))
                except ValueError:
                    name = repr(names[place]) if names else place + 1
                    raise ValueError(
                        f"column {name} has {text!r} in row {row}, and inputs are numbers: name "
                        "the columns of inputs, and the one of ids"
                    ) from None
            inputs[number] = np.array(numbers)
    x = np.column_stack(inputs or [np.zeros(0)])
    if id_column is None:
        return x, None
    named = cells[names.index(id_column)]
    if named.dtype == object:  # texts of a .parquet
        if None in named:
            raise ValueError(f"some rows have no {id_column!r}")
        named = named.astype(str)
    return x, named
