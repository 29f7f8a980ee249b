"""What a pool tells of itself."""

import dataclasses
from typing import Literal, TypeAlias

WorkerState: TypeAlias = Literal["idle", "busy", "overdue", "starting"]


@dataclasses.dataclass(frozen=True)
class WorkerReport:
    """What one worker does now, for how many seconds it has had a task in hand, and its deaths.

    `failed_starts` is how many of its lives, one after the other, ended before it was ready: the
    next begins after a pause that grows with them. 0 where it is ready.
    """

    state: WorkerState
    busy_seconds: float
    deaths: int
    failed_starts: int = 0


@dataclasses.dataclass(frozen=True)
class PoolReport:
    """What a pool has seen so far, and what its workers do now.

    `deaths` counts workers lost, hung ones and failed starts included: each is replaced, at once
    or, after a failed start, after a pause that grows. `errors` are answers that were exceptions or
    none (not finite, of the wrong shape); `late` ones came after their batch was forgotten, or
    second. `internal_errors` are exceptions in the pool's own steps, such as starting a worker, and
    in callers' callbacks; the log has each. `seconds` is the workers' time that `sent` tasks took,
    and `wasted_seconds` what of it went into answers that nobody used. `workers` tells of each.
    """

    num_workers: int
    idle: int
    busy: int
    starting: int
    sent: int
    answered: int
    late: int
    errors: int
    deaths: int
    hung: int
    copies: int
    internal_errors: int
    seconds: float
    wasted_seconds: float
    workers: tuple[WorkerReport, ...]

    @property
    def deaths_by_worker(self) -> tuple[int, ...]:
        return tuple(worker.deaths for worker in self.workers)
