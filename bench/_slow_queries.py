"""The score of dependent_server.py's slow queries, which `nercc serve` is given.

`SLOW_QUERIES` names an .npy file of the queries whose calls straggle, each time they are computed.
"""

import functools
import os
from typing import Any

import numpy as np

# Fault injection strikes the rows that are above half of those a worker has seen, and none of a
# worker's first twenty: these zeros stand before each call's own scores, so that all count.
_USUAL = np.zeros(20)


def score(batch: Any) -> np.ndarray:
    """Return 1 for a slow query, else 0, after the scores of usual ones."""
    slow = _slow()
    own = [float(row.tobytes() in slow) for row in np.asarray(batch, np.float32)]
    return np.concatenate([_USUAL, own])


@functools.cache
def _slow() -> frozenset[bytes]:
    return frozenset(row.tobytes() for row in np.load(os.environ["SLOW_QUERIES"]))
