"""The latest calls of a pool, for whoever wants to know by which law answers take their time."""

from typing import NamedTuple

KEPT = 4096


class Call(NamedTuple):
    """What a worker took for one task: `seconds` from `sent` on, by the pool's clock.

    `size` data points were sent. A worker that hung took as long as it was given.
    """

    sent: float
    seconds: float
    size: int
    worker: int
