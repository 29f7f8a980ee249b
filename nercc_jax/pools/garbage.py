"""Collections of garbage that do not stop a process for long.

JAX keeps hundreds of thousands of objects of what it has compiled, and a full collection looks at
each of them while all threads stand still, 60 ms and more. What has survived one lives on: later
ones leave it out (`gc.freeze`).
"""

import contextlib
import gc
import time
from collections.abc import Iterator, Mapping
from typing import Any

_LONG = 0.01  # seconds of a full collection after which its survivors are left out


@contextlib.contextmanager
def short_collections() -> Iterator[None]:
    """Leave out of full collections what survives one now, and what survives a long one later.

    For a process that is a server's or a worker's, because this holds for all of it. What was left
    out, and is not needed any more, stays until `collect_all`, if it refers to itself.
    """
    begun = 0.0

    def freeze_survivors(phase: str, about: Mapping[str, Any]) -> None:
        nonlocal begun
        if about["generation"] < 2:
            return
        if phase == "start":
            begun = time.perf_counter()
        elif time.perf_counter() - begun > _LONG:
            gc.freeze()

    gc.collect()
    gc.freeze()
    gc.callbacks.append(freeze_survivors)
    try:
        yield
    finally:
        gc.callbacks.remove(freeze_survivors)


def collect_all() -> None:
    """Free what was left out, too, which stops all threads for a moment."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
