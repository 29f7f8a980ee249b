"""What calibration told, kept in a file between starts: to find it takes seconds of each."""

import contextlib
import zipfile
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike

from ..codes import write_whole
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
        state = fidelity.state()
        with contextlib.suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_whole(kept, lambda file: np.savez(file, **state))  # pyright: ignore[reportArgumentType]


def _read(path: Path) -> dict[str, np.ndarray] | None:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
