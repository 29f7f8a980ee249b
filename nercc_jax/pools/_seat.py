"""A worker's place at the desk."""

import dataclasses

import numpy as np

from ._batch import Task
from ._report import WorkerState


@dataclasses.dataclass
class Seat:
    """A worker's place."""

    life: int = 0
    ready: bool = False
    task: Task | None = None
    since: float = 0.0
    overdue: bool = False
    deaths: int = 0
    failed_starts: int = 0  # lives that ended before it was ready, one after the other
    start_at: float = np.inf  # when the next life begins

    @property
    def state(self) -> WorkerState:
        if not self.ready:
            return "starting"
        if self.task is None:
            return "idle"
        return "overdue" if self.overdue else "busy"
