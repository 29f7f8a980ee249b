"""Results as they come: a part for every second's in a folder, and one manifest of them.

A part is a file that appears whole or not at all, and the manifest names those that count. So
whatever ends a run, what it had written is there, and `nercc run --resume` computes the rest.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..codes import write_whole

_MANIFEST = "manifest.json"
_EVERY = 1.0  # seconds between two parts, at least


def parts_folder(output: Path) -> Path:
    """Where the parts of a result lie: beside a file, or the output itself where it is a folder."""
    return output if not output.suffix else output.with_name(f"{output.name}.parts")


def summary_file(output: Path) -> Path:
    """Where the summary's numbers lie: beside a file, or in the output where it is a folder."""
    return output / "summary.json" if not output.suffix else output.with_suffix(".summary.json")


def check_parts(output: Path, resume: bool) -> None:
    """Raises: ValueError where there are parts and none are wanted, or the reverse."""
    folder = parts_folder(output)
    found = (folder / _MANIFEST).is_file()
    if found and not resume:
        raise ValueError(
            f"{folder} has the parts of an earlier run: give --resume to go on with it, or remove "
            "the folder"
        )
    if folder.exists() and not found and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there, and is no result of `nercc run`")


@runtime_checkable
class PartResults(Protocol):
    """Results of pieces by number, such as batches, which become arrays by name and come back."""

    def rows_of(self, pieces: Sequence[int], /) -> dict[str, np.ndarray]:
        """What is known of these."""
        ...

    def take(self, arrays: Mapping[str, np.ndarray], /) -> None:
        """Takes what `rows_of` gave in another process."""


class Parts:
    """The folder of one run. `settings` is all that its numbers depend on."""

    def __init__(self, folder: Path, settings: dict[str, Any], results: PartResults):
        """Takes what an earlier run has written into the results.

        Raises: ValueError where that was another run.
        """
        self._folder, self._results = folder, results
        self._manifest: dict[str, Any] = {"settings": settings, "complete": False, "parts": []}
        if (folder / _MANIFEST).is_file():
            earlier = json.loads((folder / _MANIFEST).read_text())
            _check_same(folder, earlier["settings"], settings)
            self._manifest = earlier | {"complete": False}
            for part in earlier["parts"]:
                with np.load(folder / part["file"]) as file:
                    results.take(dict(file))
        self._pending: list[int] = []
        self._written = time.monotonic()

    def add(self, pieces: Iterable[int]) -> None:
        """These are in the results; they are written soon."""
        self._pending.extend(pieces)
        if time.monotonic() - self._written >= _EVERY:
            self.flush()

    def flush(self, complete: bool = False) -> None:
        """Writes what is not written."""
        self._folder.mkdir(exist_ok=True)
        if self._pending:
            name = f"part-{len(self._manifest['parts']):06d}.npz"
            arrays: Any = self._results.rows_of(self._pending)
            write_whole(self._folder / name, lambda file: np.savez(file, **arrays))
            self._manifest["parts"].append({"file": name})
        self._manifest["complete"] = complete
        text = json.dumps(self._manifest).encode()
        write_whole(self._folder / _MANIFEST, lambda file: file.write(text))
        self._pending, self._written = [], time.monotonic()

    def keep(self, name: str, file: str, write: Callable[[Path], Any]) -> None:
        """Has another file written beside the parts, whole; the manifest has it under this name."""
        self._folder.mkdir(exist_ok=True)
        write(self._folder / file)
        self._manifest[name] = file
        self.flush()

    def kept(self, name: str) -> Path | None:
        """The file that was kept under this name."""
        return self._folder / self._manifest[name] if name in self._manifest else None

    def remove(self) -> None:
        shutil.rmtree(self._folder)


def fingerprint(path: Path | None) -> str | None:
    """Of a file's content, for the settings of a run; of anything else its name."""
    if path is None or not path.is_file():
        return None if path is None else str(path)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _check_same(folder: Path, earlier: dict[str, Any], now: dict[str, Any]) -> None:
    other = [
        f"{name} was {earlier.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(earlier.keys() | now.keys())
        if earlier.get(name) != now.get(name)
    ]
    if other:
        raise ValueError(
            f"{folder} holds another run, with which --resume cannot go on: {'; '.join(other)}"
        )
