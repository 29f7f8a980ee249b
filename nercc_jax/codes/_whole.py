"""Files that are there whole or not at all, whoever ends the process, or reads meanwhile."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Puts on disk what `write` writes into a file, in place of what was there.

    Of two processes that write the same, one does last. Raises: OSError as `open` does, and what
    `write` does; the file is as before then.
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
