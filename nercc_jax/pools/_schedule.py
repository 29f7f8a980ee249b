"""The scheduler of a pool: which worker has which task, which tasks wait, and how failures end.

All pools share it; only how workers are started, called and ended differs (`WorkerBackend`). It has
no lock, clock or thread: these are the `Runner`'s.

The rules:

- A worker has one task at a time. A straggling worker is busy, so it gets no new task.
- An answer belongs to its task, and the task to its batch, so late answers are never mixed up.
- A task whose worker failed or died is sent to another worker, at most `max_attempts` times in all.
  After two answers that cannot be used it is given up: the cause is the model, not the workers.
- A task that finds no idle worker waits. It is sent later only if its batch could otherwise not get
  the number of answers that it needs: further answers are not worth a worker that the next batch
  could use.
- A task is *overdue* when it has taken longer than recent service times of batches of its size
  allow (`Overdue`). Its batch then no longer counts on its answer: a waiting task is sent instead,
  or copies of the overdue task, if the batch allows copies. This is hedging, and it keeps a batch
  from waiting for a straggler while other workers are idle.
- An exception in a backend's step or in a callback is logged and counted; a failed start is tried
  again. If one of the scheduler's own steps raises, the pool is broken: all open tasks fail at
  once, and the pool's `trouble` says why.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .backend import PoolReport, WorkerDied, WorkerReport, WorkerState
from .batch import Batch, Failure, Task, reason_of
from .clock import pause_after
from .times import AnswerTimes, Call, Overdue


@dataclasses.dataclass
class Slot:
    """The scheduler's record of a worker, through all its lives."""

    life: int = 0
    begun: bool = False  # whether this life has begun, and is not over
    ready: bool = False
    task: Task | None = None
    since: float = 0.0  # when it got its task
    overdue: bool = False
    fenced: bool = False
    deaths: int = 0
    failed_starts: int = 0  # lives in a row that ended before it was ready
    start_at: float = math.inf  # when it must be ready; or, before its life, when that begins

    def due(self, hang_timeout: float) -> float:
        """Return the time at which `tick` must handle this worker, if nothing happens earlier."""
        if self.task is None:
            return self.start_at
        limit = hang_timeout if self.overdue else min(self.task.limit, hang_timeout)
        return self.since + limit


class StartLife(NamedTuple):
    """An instruction to begin a life of a worker."""

    worker: int
    life: int


class SendTask(NamedTuple):
    """An instruction to send a worker a batch for its model number `kind`."""

    worker: int
    life: int
    kind: int
    value: Any


class Schedule:
    """The state of a pool: methods take events and times, and append instructions to `todo`.

    An instruction is a `StartLife`, a `SendTask`, or a `Batch` whose `on_change` must be called.
    `capacity(busy)` is `WorkerBackend.spare_capacity`.

    Attributes:
        slots: The records of the workers.
        batches: The open batches, in order of arrival.
        available: The ready workers without a task, the longest idle one first, so that a slow
            worker gets no more than its share.
        due: When `tick` must be called, if no event comes earlier.
        earlier: Whether `due` is earlier than the watcher knows, so that it must be woken.
    """

    def __init__(
        self,
        num_workers: int,
        capacity: Callable[[int], float],
        overdue: Overdue,
        max_attempts: int,
        hang_timeout: float,
        start_timeout: float,
    ):
        self.slots = [Slot() for _ in range(num_workers)]
        self.batches: dict[Batch, None] = {}
        self._sending: dict[Batch, None] = {}  # the open batches that may have more to send
        self.available: dict[int, None] = {}
        self.todo: list[StartLife | SendTask | Batch] = []
        self.due, self.earlier = -math.inf, False
        self.counts: collections.Counter[str] = collections.Counter()
        self.seconds = self.wasted = 0.0
        self.calls: collections.deque[Call] = collections.deque(maxlen=4096)
        self.start_trouble: str | None = None  # why the last failed start failed
        self._capacity, self._max_attempts = capacity, max_attempts
        self.hang_timeout, self.start_timeout = hang_timeout, start_timeout
        self.times = AnswerTimes(overdue)

    @property
    def idle(self) -> int:
        """The number of workers without a task that are not fenced."""
        return sum(not self.slots[worker].fenced for worker in tuple(self.available))

    @property
    def spare(self) -> float:
        """The number of idle workers that could run without slowing down workers on time.

        Infinite if workers do not slow each other down at all.
        """
        busy = [slot for slot in self.slots if slot.task and not slot.overdue]
        room = self._capacity(len(busy))
        return float(room if room == math.inf else max(min(self.idle, room), 0))

    # Events.

    def add(self, batch: Batch, tasks: Sequence[Task], now: float) -> None:
        """Add tasks to a batch: send as many as there are idle workers; the others wait."""
        batch.add(tasks)
        self.batches[batch] = self._sending[batch] = None
        while batch.waiting and (worker := self._worker_for(batch.waiting[0])) is not None:
            self._assign(batch.waiting.pop(0), worker, now)
        if batch.at_once > 1:
            self._assign_waiting(now)

    def forget(self, batch: Batch) -> None:
        """Remove a batch and its unsent tasks; do nothing if it is not there."""
        batch.waiting.clear()
        self.batches.pop(batch, None)
        self._sending.pop(batch, None)

    def give_up(self, batch: Batch, reason: str) -> None:
        """Fail all open tasks of a batch, so that waits for it end."""
        for task in batch.tasks.values():
            if not task.settled:
                batch.failures.append(Failure(-1, task.point, reason))
                batch.settle(task, None)
        self.forget(batch)

    def fence(self, workers: frozenset[int], now: float) -> None:
        """Fence exactly these workers: they get no tasks."""
        for worker, slot in enumerate(self.slots):
            slot.fenced = worker in workers
        self._assign_waiting(now)

    def start(self, worker: int, now: float) -> None:
        """Begin a worker's next life, which must be ready within `start_timeout`."""
        slot = self.slots[worker]
        slot.begun, slot.start_at = True, now + self.start_timeout
        self.todo.append(StartLife(worker, slot.life))

    def handle(self, worker: int, outcome: Any, now: float) -> None:
        """Handle a worker's outcome: ready (None), an answer, an exception, or `WorkerDied`."""
        slot = self.slots[worker]
        if slot.task is not None:
            self.todo.append(slot.task.batch)
        if not slot.ready and not isinstance(outcome, Exception):
            slot.ready, slot.failed_starts, slot.start_at = True, 0, math.inf
            self.available[worker] = None
        elif not slot.ready or isinstance(outcome, WorkerDied):
            self._handle_death(worker, outcome, now)
        elif slot.task is not None:
            task, spent = slot.task, now - slot.since
            late = not task.batch.open or task.settled
            refused = None if late else task.batch.refusal(outcome, task.size)
            self._release(slot, task, now)
            self.available[worker] = None
            if refused is None:
                self.calls.append(Call(slot.since, spent, task.size, worker))
                if self.times.add(task.size, spent):
                    self._look_by(min(each.due(self.hang_timeout) for each in self.slots))
            self.counts["late" if late else "answered" if refused is None else "errors"] += 1
            if late or refused is not None:
                self.wasted += spent
            else:
                task.batch.settle(task, outcome, worker)
            if refused is not None:
                answered = not isinstance(outcome, Exception)
                self._try_again(task, Failure(worker, task.point, refused, True, answered))
        self._assign_waiting(now)

    def tick(self, now: float) -> None:
        """Handle what is due at `now`: overdue tasks, hanging workers, late and delayed starts."""
        for worker, slot in enumerate(self.slots):
            if slot.due(self.hang_timeout) > now:
                continue
            task = slot.task
            if task is None and slot.begun:
                late = WorkerDied(f"it was not ready within {self.start_timeout} s")
                self._handle_death(worker, late, now)
            elif task is None:
                self.start(worker, now)
            elif slot.since + self.hang_timeout <= now:  # rounded exactly as in `Slot.due`
                self.calls.append(Call(slot.since, now - slot.since, task.size, worker))
                self.counts["hung"] += 1
                self.todo.append(task.batch)
                hung = WorkerDied(f"no answer within {self.hang_timeout} s: it hangs")
                self._handle_death(worker, hung, now)
            else:
                slot.overdue = True
                task.batch.hedge(task)
        self._assign_waiting(now)
        self.due, self.earlier = min(slot.due(self.hang_timeout) for slot in self.slots), False

    # Assignment of tasks to workers.

    def _assign_waiting(self, now: float) -> None:
        """Assign to idle workers the tasks that batches still need, oldest batches first."""
        for batch in tuple(self._sending) if self.available else ():
            if batch.over or not batch.needed:  # a server keeps hundreds of them for late answers
                del self._sending[batch]
                continue
            while self.available and batch.missing > 0 and (found := self._next(batch)) is not None:
                self._assign(*found, now)

    def _next(self, batch: Batch) -> tuple[Task, int] | None:
        """Return a waiting task, else an overdue one to copy, and an idle worker for it."""
        for number, task in enumerate(batch.waiting):
            if (worker := self._worker_for(task)) is not None:
                return batch.waiting.pop(number), worker
        late = [
            (task, worker)
            for task in batch.tasks.values()
            if not task.pending
            and 0 < task.running < batch.copies
            and not task.settled
            and (worker := self._worker_for(task)) is not None
        ]
        if not late:
            return None
        self.counts["copies"] += 1
        return min(late, key=lambda pair: (pair[0].running, pair[0].given))

    def _worker_for(self, task: Task) -> int | None:
        """Return an idle worker where the task has not failed; any, if it failed at all workers."""
        slots, barred = self.slots, task.avoid
        if task.failed and len(task.failed) < sum(not slot.fenced for slot in slots):
            barred = barred | task.failed
        free = (each for each in self.available if not slots[each].fenced and each not in barred)
        return next(free, None)

    def _assign(self, task: Task, worker: int, now: float) -> None:
        self.available.pop(worker, None)
        slot = self.slots[worker]
        slot.task, slot.since, slot.overdue = task, now, False
        task.sent = now
        task.attempts += 1
        task.running += 1
        task.batch.count_pending(task, 1)
        self.counts["sent"] += 1
        self._look_by(slot.due(self.hang_timeout))
        self.todo.append(SendTask(worker, slot.life, task.kind, task.value))

    # The end of a task at a worker.

    def _handle_death(self, worker: int, error: Exception, now: float) -> None:
        """Send a dead worker's task to another worker, and begin or schedule its next life."""
        slot = self.slots[worker]
        reason = str(error) if isinstance(error, WorkerDied) else reason_of(error)
        if not slot.ready:
            self.start_trouble = f"worker {worker} could not start: {reason}"
        task = slot.task
        if task is not None:
            self.wasted += now - slot.since
            self._release(slot, task, now)
            if task.batch.open and not task.settled:
                self._try_again(task, Failure(worker, task.point, reason))
        self.available.pop(worker, None)
        failed = slot.failed_starts = 0 if slot.ready else slot.failed_starts + 1
        slot.ready = slot.begun = False
        slot.life += 1
        slot.deaths += 1
        self.counts["deaths"] += 1
        if failed:
            slot.start_at = now + pause_after(failed)
            self._look_by(slot.start_at)
        else:
            self.start(worker, now)

    def _try_again(self, task: Task, failure: Failure) -> None:
        task.batch.failures.append(failure)
        task.failed.add(failure.worker)
        task.refusals += failure.refused
        if task.running:
            return  # a copy of it is still in flight
        if task.attempts < self._max_attempts and task.refusals < 2:
            task.batch.waiting.insert(0, task)
        else:
            task.batch.settle(task, None)

    def _release(self, slot: Slot, task: Task, now: float) -> None:
        self.seconds += now - slot.since
        task.running -= 1
        if not slot.overdue:
            task.batch.count_pending(task, -1)
        slot.task, slot.overdue = None, False

    def _look_by(self, at: float) -> None:
        if at < self.due:
            self.due, self.earlier = at, True


def report_of(state: Schedule, now: float, internal_errors: int) -> PoolReport:
    """Return counts of what has happened so far, and the state of the workers."""
    workers = []
    for slot in state.slots:
        now_is: WorkerState = "starting"
        if slot.ready and slot.fenced:
            now_is = "fenced"
        elif slot.ready:
            working = "overdue" if slot.overdue else "busy"
            now_is = "idle" if slot.task is None else working
        busy = 0.0 if slot.task is None else now - slot.since
        workers.append(WorkerReport(now_is, busy, slot.deaths, slot.failed_starts))
    counted = ("sent", "answered", "late", "errors", "deaths", "hung", "copies")
    return PoolReport(
        num_workers=len(workers),
        idle=state.idle,
        busy=sum(slot.task is not None for slot in state.slots),
        starting=sum(not slot.ready for slot in state.slots),
        **{name: state.counts[name] for name in counted},
        internal_errors=internal_errors,
        seconds=state.seconds,
        wasted_seconds=state.wasted,
        workers=tuple(workers),
    )
