"""The results of a run on disk, written during the run: parts in a folder, and their manifest.

A part is written atomically, and only parts that the manifest names count. So whatever ends a run,
the results written by then are valid, and a later run continues from them.
"""

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from ..arrays import read_arrays, read_entries, write_arrays, write_entries

_MANIFEST = "manifest.json"
REMEDY = "restore it from a copy, or remove its folder and run again without --resume (resume)"
_EVERY = 1.0  # seconds between two parts, at least


def check_parts(folder: Path, resume: bool) -> None:
    """Raise ValueError if a folder holds a run and `resume` is False, or holds other files."""
    found = (folder / _MANIFEST).is_file()
    if found and not resume:
        raise ValueError(
            f"{folder} has the parts of an earlier run: give --resume (resume=True) to go on "
            "with it, or remove the folder"
        )
    # The files that a run leaves if it is killed before it has written its manifest.
    inside = folder.iterdir() if folder.is_dir() else [folder] if folder.exists() else []
    if not found and not all(each.name.startswith((".", "part-")) for each in inside):
        raise ValueError(f"{folder} exists, and holds no results of a run")


class Parts:
    """The folder of one run, with its parts and their manifest.

    The folder is created when something is written. `settings` are the JSON values on which the
    run's results depend. Each part contains the ids of its rows, if rows have ids.

    Raises:
        ValueError: The folder holds a run with other settings, or `check_parts` refuses it.
    """

    def __init__(
        self,
        folder: Path | str,
        settings: dict[str, Any],
        ids: Shaped[np.ndarray, " rows"] | None = None,
        *,
        resume: bool = False,
    ):
        self._folder, self._ids = (folder := Path(folder)), ids
        check_parts(folder, resume)
        if ids is not None:
            settings = settings | {"ids": fingerprint(ids)}
        self._manifest: dict[str, Any] = {"settings": settings, "complete": False, "parts": []}
        if (folder / _MANIFEST).is_file():
            entries = {"settings", "complete", "parts"}
            self._manifest = read_entries(folder / _MANIFEST, "run", entries, REMEDY)
            before = self._manifest["settings"]
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
        self._pending: list[dict[str, np.ndarray]] = []
        self._written = time.monotonic()

    def read(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield the arrays of each part that an earlier run has written, in order.

        Raises:
            ValueError: A file is damaged or missing.
        """
        for part in self._manifest["parts"]:
            try:
                yield read_arrays(self._folder / part["file"], REMEDY)
            except FileNotFoundError as error:
                raise ValueError(f"{self._folder / part['file']} is missing; {REMEDY}") from error

    def add(self, arrays: dict[str, np.ndarray]) -> None:
        """Queue rows to be written, in order; at most one part a second is written.

        Each array is (rows, ...), and "index" has the numbers of the rows. If a row is added again,
        its last values count.
        """
        self._pending.append(arrays)
        if time.monotonic() - self._written >= _EVERY:
            self.flush()

    def flush(self, complete: bool = False) -> None:
        """Write the queued rows as a part, and the manifest, with whether the run is `complete`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._pending:
            name = f"part-{len(self._manifest['parts']):06d}.npz"
            together = {
                each: np.concatenate([arrays[each] for arrays in self._pending])
                for each in self._pending[0]
            }
            if self._ids is not None:
                together["id"] = self._ids[together["index"]]
            rows = together["index"]
            last = len(rows) - 1 - np.unique(rows[::-1], return_index=True)[1]
            write_arrays(self._folder / name, {key: each[last] for key, each in together.items()})
            self._manifest["parts"].append({"file": name})
        self._manifest["complete"] = complete
        write_entries(self._folder / _MANIFEST, "run", self._manifest)
        self._pending, self._written = [], time.monotonic()


def fingerprint(content: Path | np.ndarray | None) -> str | None:
    """Return a hash of an array or a file, for a run's settings; the path if there is no file."""
    if isinstance(content, np.ndarray):
        content = np.ascontiguousarray(content).reshape(-1).view(np.uint8)
        return hashlib.sha256(content.data).hexdigest()
    if content is None or not content.is_file():
        return None if content is None else str(content)
    return hashlib.sha256(content.read_bytes()).hexdigest()[:16]


def ids_of_rows(ids: Any, rows: int) -> Shaped[np.ndarray, " rows"] | None:
    """Return ids as an array; raise ValueError unless they are one text or integer for each row."""
    found = None if ids is None else np.asarray(ids)
    if found is not None and (found.shape != (rows,) or found.dtype.kind not in "iuU"):
        raise ValueError(
            f"ids are a text or a whole number for each of {rows} rows, not {found.dtype} of shape "
            f"{found.shape}"
        )
    return found
