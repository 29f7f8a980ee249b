"""What calibration told, kept in a file between starts: to find it takes seconds of each."""

import contextlib
import os
import zipfile
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike

from ..inference import current_conditions
from ._fidelity import Fidelity
from ._servable import Servable


def calibrate(
    fidelity: Fidelity, servable: Servable, worker_dtype: DTypeLike | None, kept: Path | None
) -> None:
    """Calibrates on the servable's data, or as the file says where it can be read.

    Otherwise it is written; `kept` names what all of it depends on. None: nothing is kept.

    Raises: as `Fidelity.calibrate`.
    """
    state = None if kept is None else _read(kept)
    if state is not None:
        fidelity.restore(state, current_conditions(worker_dtype))
        return
    x = servable.calibration
    assert x is not None
    fidelity.calibrate(servable.model, x() if callable(x) else x, worker_dtype=worker_dtype)
    if kept is not None:
        _write(kept, fidelity.state())


def _read(path: Path) -> dict[str, np.ndarray] | None:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def _write(path: Path, state: dict[str, np.ndarray]) -> None:
    """As a whole, or not at all: another server may start at the same moment."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.savez(file, **state)  # pyright: ignore[reportArgumentType]
        part.replace(path)
