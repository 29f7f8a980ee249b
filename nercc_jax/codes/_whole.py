"""Files that are there whole or not at all, whoever ends the process, or reads meanwhile."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Put on disk what `write` writes into a file, in place of what was there.

    Of two processes that write the same, one is the last. The file is as before where it fails.

    Raises:
        OSError: As `open`; and what `write` raises.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
