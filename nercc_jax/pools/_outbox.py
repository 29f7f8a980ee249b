"""What waits to be sent, who is free, and who gets what."""

import math
from collections.abc import Callable, Sequence

from ._batch import Batch, Task
from ._seat import Seat


class Outbox:
    """Open batches in the order in which they came, and idle workers in that in which they did.

    The longest idle comes first, so that one slow worker gets no more than its share. Each stands
    here once, whatever happens to it. For one thread at a time.
    """

    def __init__(self, seats: Sequence[Seat], room: Callable[[int], float]):
        """`room(busy)`: how many more could work beside so many and not slow them down."""
        self.batches: dict[Batch, None] = {}  # open ones
        self._wanting: dict[Batch, None] = {}  # those of them that may want to send
        self.copies = 0  # second ones given out
        self._seats, self._room = seats, room
        self._idle: dict[int, None] = {}

    def open(self, batch: Batch) -> None:
        """A batch has something to send."""
        self.batches[batch] = self._wanting[batch] = None

    def close(self, batch: Batch) -> None:
        """A batch sends nothing more, whatever it has; it may not be open."""
        batch.waiting.clear()
        self.batches.pop(batch, None)
        self._wanting.pop(batch, None)

    @property
    def idle(self) -> int:
        """How many workers are free."""
        return len(self._idle)

    @property
    def spare(self) -> float:
        """How many of those could work and slow down nobody who is not overdue anyway.

        Infinite where workers do not slow each other down at all.
        """
        busy = [seat for seat in self._seats if seat.task and not seat.overdue]
        room = self._room(len(busy))
        return float(room if room == math.inf else max(min(self.idle, room), 0))

    def free(self, worker: int) -> None:
        """A worker has nothing in hand."""
        self._idle[worker] = None

    def take(self, worker: int) -> None:
        """A worker is free no more; it may not have been."""
        self._idle.pop(worker, None)

    def order(self) -> None:
        """Puts idle workers in order, whoever came first: a seed means the same in each run."""
        self._idle = dict.fromkeys(sorted(self._idle))

    def first(self, batch: Batch) -> tuple[Task, int] | None:
        """A new batch's next task, and a free worker: redundancy is sent while it is cheap."""
        if not self._idle or not batch.waiting:
            return None
        worker = self._whom(batch.waiting[0])
        return None if worker is None else (batch.waiting.pop(0), worker)

    def next(self) -> tuple[Task, int] | None:
        """What a batch cannot do without, and a free worker for it; the oldest batch first."""
        for batch in tuple(self._wanting) if self._idle else ():
            if batch.over or not batch.needed:  # a server keeps hundreds, to hear their stragglers
                del self._wanting[batch]
            elif batch.short > 0 and (found := self._task(batch)) is not None:
                return found
        return None

    def _task(self, batch: Batch) -> tuple[Task, int] | None:
        """One that waits, or a copy of one that is overdue."""
        for number, task in enumerate(batch.waiting):
            if (worker := self._whom(task)) is not None:
                return batch.waiting.pop(number), worker
        late = [
            (task, worker)
            for task in batch.tasks.values()
            if task.fresh < task.running < batch.copies
            and not task.settled
            and (worker := self._whom(task)) is not None
        ]
        if not late:
            return None
        self.copies += 1
        return min(late, key=lambda pair: (pair[0].running, pair[0].given))

    def _whom(self, task: Task) -> int | None:
        """A free worker that has not failed the task; any, when all have."""
        failed = task.failed if len(task.failed) < len(self._seats) else ()
        if not failed:
            return next(iter(self._idle), None)
        return next((worker for worker in self._idle if worker not in failed), None)
