"""The scheduler of a pool: which worker has which task, what waits, and what happens on failures.

All pools share it; only how a worker is started, reached and ended differs (`WorkerBackend`). It is
pure: `AbstractPool` has the lock, the clock and the threads.

The rules:

- A worker has one task at a time. One that straggles is busy, so it gets no new work.
- An answer belongs to its task, and the task to its batch: a late one cannot be taken for another.
- A task whose worker failed or died goes to another worker, `max_attempts` times in all. After two
  answers that cannot be used it is given up: that is the model's doing, no accident of a worker.
- A task that finds no idle worker waits. It is sent as long as its batch may otherwise not get the
  number of answers it needs; coded data points beyond that number are not worth a worker that the
  next batch could use.
- A task is *overdue* when it has taken longer than the running service times of batches of its size
  allow (`Overdue`). It then no longer counts among the answers that its batch may expect: what
  waits is sent in its place, or copies of the task itself if its batch allows them. That is
  hedging, and it keeps a batch from waiting for a straggler while other workers are idle.
- An exception in a step that is not the scheduler's own (a backend's, a callback's) is logged and
  counted, and a start is tried again. If the scheduler's own steps fail, the pool is broken: all
  that is open fails at once, and the pool says so.
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
    """A worker's record at the scheduler, through all its lives."""

    life: int = 0
    begun: bool = False  # this life has begun, and is not over
    ready: bool = False
    task: Task | None = None
    since: float = 0.0  # when it was given its task
    overdue: bool = False
    fenced: bool = False
    deaths: int = 0
    failed_starts: int = 0  # lives that ended before it was ready, one after the other
    start_at: float = math.inf  # when the next life begins, should this one not be ready by then

    def due(self, hang_timeout: float) -> float:
        """Return when the worker must be looked at, if nothing happens until then."""
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
    """The state of a pool: events and their times go in, instructions come out in `todo`.

    It has no thread, lock or clock. An instruction is a `StartLife`, a `SendTask`, or a `Batch` of
    which something has changed. `capacity(busy)` is `WorkerBackend.spare_capacity`.

    Attributes:
        slots: The workers.
        batches: The open batches, in order of arrival.
        available: The workers without a task. The one that has been idle for longest comes first,
            so that a slow one gets no more than its share. Each is there once.
        due: When `tick` must be called, if nothing happens until then.
        earlier: Whether that is earlier than was known when it was last called.
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
        self._sending: dict[Batch, None] = {}  # those of them that may have more to send
        self.available: dict[int, None] = {}
        self.todo: list[StartLife | SendTask | Batch] = []
        self.due, self.earlier = -math.inf, False
        self.counts: collections.Counter[str] = collections.Counter()
        self.seconds = self.wasted = 0.0
        self.calls: collections.deque[Call] = collections.deque(maxlen=4096)
        self.start_trouble: str | None = None  # of the last worker that could not start
        self._capacity, self._max_attempts = capacity, max_attempts
        self.hang_timeout, self.start_timeout = hang_timeout, start_timeout
        self.times = AnswerTimes(overdue)

    @property
    def idle(self) -> int:
        """The number of workers without a task that may get any."""
        return sum(not self.slots[worker].fenced for worker in tuple(self.available))

    @property
    def spare(self) -> float:
        """The number of idle workers that could run and slow down no worker that is on time.

        Infinite where workers do not slow each other down at all.
        """
        busy = [slot for slot in self.slots if slot.task and not slot.overdue]
        room = self._capacity(len(busy))
        return float(room if room == math.inf else max(min(self.idle, room), 0))

    # Events.

    def add(self, batch: Batch, tasks: Sequence[Task], now: float) -> None:
        """Take tasks of a batch: redundancy is sent while that is cheap, other tasks wait."""
        batch.add(tasks)
        self.batches[batch] = self._sending[batch] = None
        while batch.waiting and (worker := self._worker_for(batch.waiting[0])) is not None:
            self._assign(batch.waiting.pop(0), worker, now)
        if batch.at_once > 1:
            self._assign_waiting(now)

    def forget(self, batch: Batch) -> None:
        """Remove a batch, if it is there, and all that it has not sent."""
        batch.waiting.clear()
        self.batches.pop(batch, None)
        self._sending.pop(batch, None)

    def give_up(self, batch: Batch, reason: str) -> None:
        """Fail all that is open of a batch, so that no wait for it goes on."""
        for task in batch.tasks.values():
            if not task.settled:
                batch.failures.append(Failure(-1, task.point, reason))
                batch.settle(task, None)
        self.forget(batch)

    def fence(self, workers: frozenset[int], now: float) -> None:
        """Give these workers nothing, and all others everything."""
        for worker, slot in enumerate(self.slots):
            slot.fenced = worker in workers
        self._assign_waiting(now)

    def start(self, worker: int, now: float) -> None:
        """Begin a worker's next life, which is over unless it is ready in time."""
        slot = self.slots[worker]
        slot.begun, slot.start_at = True, now + self.start_timeout
        self.todo.append(StartLife(worker, slot.life))

    def handle(self, worker: int, outcome: Any, now: float) -> None:
        """Take that a worker is ready (None), has answered, failed or died (`WorkerDied`)."""
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
        """Handle what is due: overdue tasks, workers that hang, starts."""
        for worker, slot in enumerate(self.slots):
            if slot.due(self.hang_timeout) > now:
                continue
            task = slot.task
            if task is None and slot.begun:
                late = WorkerDied(f"it was not ready within {self.start_timeout} s")
                self._handle_death(worker, late, now)
            elif task is None:
                self.start(worker, now)
            elif slot.since + self.hang_timeout <= now:  # as `Slot.due`, to the last digit
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

    # Who gets what.

    def _assign_waiting(self, now: float) -> None:
        """Assign to idle workers what batches cannot do without, oldest batches first."""
        for batch in tuple(self._sending) if self.available else ():
            if batch.over or not batch.needed:  # a server keeps hundreds, for late answers
                del self._sending[batch]
                continue
            while self.available and batch.missing > 0 and (found := self._next(batch)) is not None:
                self._assign(*found, now)

    def _next(self, batch: Batch) -> tuple[Task, int] | None:
        """Return a task that waits, or a copy of one that is overdue, and a worker for it."""
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
        """Return an idle worker at which the task has not failed; any, if it failed at all."""
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

    # What became of it.

    def _handle_death(self, worker: int, error: Exception, now: float) -> None:
        """Give a dead worker's task to another, and begin the worker's next life."""
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
            return  # a copy of it is still on its way
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
