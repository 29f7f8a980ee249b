"""A worker's place at the desk."""

import dataclasses
import math

from ._batch import Task
from ._report import WorkerReport, WorkerState


@dataclasses.dataclass
class Seat:
    """A worker's place."""

    life: int = 0
    begun: bool = False  # this life, which is not over
    ready: bool = False
    task: Task | None = None
    since: float = 0.0
    overdue: bool = False
    deaths: int = 0
    failed_starts: int = 0  # lives that ended before it was ready, one after the other
    start_at: float = math.inf  # when the next life begins, should this one not be ready by then

    @property
    def state(self) -> WorkerState:
        if not self.ready:
            return "starting"
        if self.task is None:
            return "idle"
        return "overdue" if self.overdue else "busy"

    def due(self, hang_timeout: float) -> float:
        """When it is to be looked at, if nothing happens until then."""
        if self.task is None:
            return self.start_at
        limit = hang_timeout if self.overdue else min(self.task.limit, hang_timeout)
        return self.since + limit

    def report(self, now: float) -> WorkerReport:
        busy_seconds = 0.0 if self.task is None else now - self.since
        return WorkerReport(self.state, busy_seconds, self.deaths, self.failed_starts)
