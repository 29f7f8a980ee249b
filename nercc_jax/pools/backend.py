"""The interface between a pool and its workers: the backend, and reports of their state."""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from jaxtyping import PyTree

WorkerState: TypeAlias = Literal["idle", "busy", "overdue", "starting", "fenced"]

# Called with a worker, its life, and the outcome of a start or a task: see `WorkerBackend`.
OnOutcome: TypeAlias = Callable[[int, int, Any], None]


class WorkerDied(Exception):
    """The outcome of a task whose worker has died."""


class WorkerBackend(abc.ABC):
    """An interface to start, call and end the workers of a pool.

    A worker has lives, numbered from 0. A backend calls `on_outcome(worker, life, None)` once a
    life when the worker is ready, and `on_outcome(worker, life, outcome)` once for each task sent:
    with the answer, or an exception, which is `WorkerDied` if the life is over. Only `missing` and
    `close` may block. If `start` raises, the start has failed; if `send` raises, the worker died.
    """

    @abc.abstractmethod
    def start(self, worker: int, life: int, on_outcome: OnOutcome) -> None:
        """Begin a life of a worker, and end its earlier life if that still runs."""

    def prepare(self, batch: PyTree) -> Any:
        """Return the form of a batch that `send` takes. Called once, even if sends are repeated."""
        return batch

    @abc.abstractmethod
    def send(self, worker: int, life: int, kind: int, batch: Any) -> None:
        """Send a worker a batch for its model number `kind`."""

    def spare_capacity(self, busy: int) -> float:
        """Return how many more workers could run without slowing down `busy` ones."""
        return math.inf

    def missing(self) -> str | None:
        """Return what workers that have not started may be waiting for, None if unknown."""
        return None

    @abc.abstractmethod
    def close(self) -> None:
        """End all workers."""


@dataclasses.dataclass(frozen=True)
class WorkerReport:
    """The state of one worker: see `PoolReport`."""

    state: WorkerState
    busy_seconds: float
    deaths: int
    failed_starts: int = 0


@dataclasses.dataclass(frozen=True)
class PoolReport:
    """Counts of what a pool has seen so far, and the state of its workers.

    Attributes:
        num_workers: Workers, including dead ones that are being replaced.
        idle: Workers without a task now that are not fenced.
        busy: Workers with a task now.
        starting: Workers that are not ready now.
        sent: Tasks sent to a worker.
        answered: Answers that were used.
        late: Answers that came after their batch was forgotten, or after another copy's answer.
        errors: Answers that were exceptions, not finite, or of the wrong shape or type.
        deaths: Workers lost, including hung ones and failed starts. Each is replaced: at once, or
            after a failed start with a pause that grows.
        hung: Workers replaced because they did not answer within the pool's `hang_timeout`.
        copies: Copies of overdue coded data points that were sent.
        internal_errors: Exceptions in the pool's own steps, such as starting a worker, and in
            callers' callbacks. Each one is logged.
        seconds: Seconds that workers spent on tasks.
        wasted_seconds: The part of `seconds` spent on answers that were not used.
        workers: For each worker: its `state`, "idle", "busy", "overdue", "starting", or "fenced"
            (it answers wrongly and gets no tasks); `busy_seconds`, for how long it has had its task
            (0 without one); `deaths`, the lives that ended; and `failed_starts`, how many lives in
            a row ended before it was ready: the pause before the next one grows with them.
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
        """The deaths of each worker."""
        return tuple(worker.deaths for worker in self.workers)

    def summary(self) -> dict[str, Any]:
        """Return counts of late answers and failures, by their names in a run's summary."""
        return {
            "late_answers": self.late,
            "errors": self.errors,
            "deaths": self.deaths,
            "deaths_by_worker": list(self.deaths_by_worker),
            "hung": self.hung,
        }
