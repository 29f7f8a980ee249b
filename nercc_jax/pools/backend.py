"""Workers as the scheduler sees them: how they are reached, their state, reports, and start."""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from jaxtyping import PyTree

WorkerState: TypeAlias = Literal["idle", "busy", "overdue", "starting", "fenced"]

# Called with a worker, its life, and what became of it: see `WorkerBackend`.
OnOutcome: TypeAlias = Callable[[int, int, Any], None]


class WorkerDied(Exception):
    """A worker is gone, with the task that it had."""


class WorkerBackend(abc.ABC):
    """The way in which the workers of a pool are started, reached and ended.

    A worker has lives, numbered from 0. A backend calls `on_outcome(worker, life, outcome)` once a
    life when the worker is ready, with None, and once for each task sent: with the answer, or with
    an exception, which is `WorkerDied` if the life is over. Only `missing` and `close` may block.
    Where `start` raises, the start has failed; where `send` raises, the worker is dead.
    """

    @abc.abstractmethod
    def start(self, worker: int, life: int, on_outcome: OnOutcome) -> None:
        """Begin a life of a worker, and end an earlier one that is still there."""

    def prepare(self, batch: PyTree) -> Any:
        """Return what `send` takes for a batch: made once, however often the batch is sent."""
        return batch

    @abc.abstractmethod
    def send(self, worker: int, life: int, kind: int, batch: Any) -> None:
        """Send a worker a batch for its model number `kind`."""

    def spare_capacity(self, busy: int) -> float:
        """Return how many more workers could run next to `busy` ones and slow none of them down."""
        return math.inf

    def missing(self) -> str | None:
        """Return what workers that have not started may be waiting for, if known; may block."""
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
        num_workers: Workers, dead ones that are being replaced included.
        idle: Workers without a task now.
        busy: Workers with a task now.
        starting: Workers that are not ready now.
        sent: Tasks sent to a worker.
        answered: Answers that were used.
        late: Answers that came after their batch was forgotten, or second.
        errors: Answers that were exceptions, not finite, or of the wrong shape.
        deaths: Workers lost, hung ones and failed starts included. Each is replaced, at once or,
            after a failed start, after a pause that grows.
        hung: Workers replaced because they did not answer in time.
        copies: Second copies of a coded data point that were sent.
        internal_errors: Exceptions in the pool's own steps, such as starting a worker, and in
            callers' callbacks. The log has each.
        seconds: Workers' time that the tasks took.
        wasted_seconds: The part of it that went into answers that were not used.
        workers: Of each worker: its `state`, "idle", "busy", "overdue", "starting", or "fenced",
            where it answers wrongly and gets no traffic; for how long it has had its task
            (`busy_seconds`, 0 without one); how many of its lives ended (`deaths`); and how many,
            one after the other, ended before it was ready (`failed_starts`): the next begins after
            a pause that grows with them.
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
        """Return what the pool has met, by the names of a run's summary."""
        return {
            "late_answers": self.late,
            "errors": self.errors,
            "deaths": self.deaths,
            "deaths_by_worker": list(self.deaths_by_worker),
            "hung": self.hung,
        }
