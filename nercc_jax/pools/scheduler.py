"""The scheduler of a pool: which worker has which task, what waits, and what happens on failures.

All pools share it; only how a worker is started, reached and ended differs (`WorkerBackend`).

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
import contextlib
import dataclasses
import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ..codes._checks import check_counts
from .backend import PoolReport, WorkerBackend, WorkerDied, WorkerReport, WorkerState
from .batch import Batch, Failure, Task, reason_of
from .clock import WALL, AbstractClock, ErrorCounter, Watcher, pause_after
from .times import CALLS_KEPT, AnswerTimes, Call, Overdue
from .worker import WEIGHTS

_LOG = logging.getLogger(__name__)

_STARTS = 3  # failed starts of a worker after which a new pool gives up


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

    @property
    def state(self) -> WorkerState:
        if not self.ready:
            return "starting"
        if self.fenced:
            return "fenced"
        if self.task is None:
            return "idle"
        return "overdue" if self.overdue else "busy"

    def due(self, hang_timeout: float) -> float:
        """Return when the worker must be looked at, if nothing happens until then."""
        if self.task is None:
            return self.start_at
        limit = hang_timeout if self.overdue else min(self.task.limit, hang_timeout)
        return self.since + limit


class SendQueue:
    """Open batches in order of arrival, idle workers in order of idleness, and their matching.

    The worker that has been idle for longest comes first, so that a slow one gets no more than its
    share. Each worker is in the queue once, whatever happens to it. One that is fenced gets only
    tasks that are for it alone. Not thread-safe.

    `capacity(busy)` is `WorkerBackend.spare_capacity`.
    """

    def __init__(self, slots: Sequence[Slot], capacity: Callable[[int], float]):
        self.batches: dict[Batch, None] = {}  # open ones
        self._sending: dict[Batch, None] = {}  # those of them that may have more to send
        self.copies = 0  # second copies sent
        self._slots, self._capacity = slots, capacity
        self._idle: dict[int, None] = {}

    def open(self, batch: Batch) -> None:
        self.batches[batch] = self._sending[batch] = None

    def close(self, batch: Batch) -> None:
        """Remove a batch, if it is there, and all that it has not sent."""
        batch.waiting.clear()
        self.batches.pop(batch, None)
        self._sending.pop(batch, None)

    @property
    def idle(self) -> int:
        """The number of workers without a task that may get any."""
        return sum(not self._slots[worker].fenced for worker in tuple(self._idle))

    @property
    def spare(self) -> float:
        """The number of idle workers that could run and slow down no worker that is on time.

        Infinite where workers do not slow each other down at all.
        """
        busy = [slot for slot in self._slots if slot.task and not slot.overdue]
        room = self._capacity(len(busy))
        return float(room if room == math.inf else max(min(self.idle, room), 0))

    def free(self, worker: int) -> None:
        self._idle[worker] = None

    def take(self, worker: int) -> None:
        """Remove a worker from the idle ones, if it is there."""
        self._idle.pop(worker, None)

    def order(self) -> None:
        """Sort the idle workers, so that a seed means the same in each run."""
        self._idle = dict.fromkeys(sorted(self._idle))

    def first(self, batch: Batch) -> tuple[Task, int] | None:
        """Return a new batch's next task and an idle worker: redundancy is sent while cheap."""
        worker = self._worker_for(batch.waiting[0]) if batch.waiting else None
        return None if worker is None else (batch.waiting.pop(0), worker)

    def next(self) -> tuple[Task, int] | None:
        """Return a task that a batch cannot do without, oldest batch first, and a worker for it."""
        for batch in tuple(self._sending) if self._idle else ():
            if batch.over or not batch.needed:  # a server keeps hundreds, for late answers
                del self._sending[batch]
            elif batch.missing > 0 and (found := self._task(batch)) is not None:
                return found
        return None

    def _task(self, batch: Batch) -> tuple[Task, int] | None:
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
        self.copies += 1
        return min(late, key=lambda pair: (pair[0].running, pair[0].given))

    def _worker_for(self, task: Task) -> int | None:
        """Return an idle worker at which the task has not failed; any, if it failed at all."""
        if task.only is not None:
            return task.only if task.only in self._idle else None
        slots, barred = self._slots, task.avoid
        if task.failed and len(task.failed) < sum(not slot.fenced for slot in slots):
            barred = barred | task.failed
        free = (each for each in self._idle if not slots[each].fenced and each not in barred)
        return next(free, None)


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
    which something has changed.

    Attributes:
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
        self.queue = SendQueue(self.slots, capacity)
        self.todo: list[StartLife | SendTask | Batch] = []
        self.due, self.earlier = -math.inf, False
        self.counts: collections.Counter[str] = collections.Counter()
        self.seconds = self.wasted = 0.0
        self.calls: collections.deque[Call] = collections.deque(maxlen=CALLS_KEPT)
        self.start_trouble: str | None = None  # of the last worker that could not start
        self._overdue, self._max_attempts = overdue, max_attempts
        self.hang_timeout, self.start_timeout = hang_timeout, start_timeout
        # By rule, each of which all of its batches share; a new rule knows the past.
        self.times = {overdue: AnswerTimes(overdue)}

    def times_of(self, rule: Overdue | None) -> AnswerTimes:
        """Return the service times as a rule for overdue tasks sees them (default: the pool's)."""
        rule = rule or self._overdue
        if rule not in self.times:
            self.times[rule] = self.times[self._overdue].under(rule)
        return self.times[rule]

    def add(self, batch: Batch, tasks: Sequence[Task], now: float) -> None:
        """Take tasks of a batch: redundancy is sent while that is cheap, other tasks wait."""
        batch.add(tasks)
        self.queue.open(batch)
        while (chosen := self.queue.first(batch)) is not None:
            self._assign(*chosen, now)
        if batch.at_once > 1:
            self.assign_waiting(now)

    def fence(self, workers: frozenset[int], now: float) -> None:
        """Give these workers nothing but what is for them alone, and all others everything."""
        for worker, slot in enumerate(self.slots):
            slot.fenced = worker in workers
        self.assign_waiting(now)

    def start(self, worker: int, now: float) -> None:
        """Begin a worker's next life, which is over unless it is ready in time."""
        slot = self.slots[worker]
        slot.begun, slot.start_at = True, now + self.start_timeout
        self.todo.append(StartLife(worker, slot.life))

    def restart(self, worker: int, now: float) -> bool:
        """Begin a new life of a worker, if it is idle; return whether it is."""
        slot = self.slots[worker]
        if not slot.ready or slot.task is not None:
            return False
        self.queue.take(worker)
        slot.ready, slot.life = False, slot.life + 1
        self.start(worker, now)
        return True

    def give_up(self, batch: Batch, reason: str) -> None:
        """Fail all that is open of a batch, so that no wait for it goes on."""
        for task in batch.tasks.values():
            if not task.settled:
                batch.failures.append(Failure(-1, task.point, reason))
                batch.settle(task, None)
        self.queue.close(batch)

    def handle(self, worker: int, outcome: Any, now: float) -> None:
        """Take that a worker is ready (None), has answered, failed or died (`WorkerDied`)."""
        slot = self.slots[worker]
        if slot.task is not None:
            self.todo.append(slot.task.batch)
        if not slot.ready and not isinstance(outcome, Exception):
            slot.ready, slot.failed_starts, slot.start_at = True, 0, math.inf
            self.queue.free(worker)
        elif not slot.ready or isinstance(outcome, WorkerDied):
            self._handle_death(worker, outcome, now)
        elif slot.task is not None:
            self._handle_answer(worker, slot.task, outcome, now)
        self.assign_waiting(now)

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
        self.assign_waiting(now)
        self.due, self.earlier = self._next_due(), False

    def assign_waiting(self, now: float) -> None:
        """Assign to idle workers what batches cannot do without, oldest batches first."""
        while (chosen := self.queue.next()) is not None:
            self._assign(*chosen, now)

    def _assign(self, task: Task, worker: int, now: float) -> None:
        self.queue.take(worker)
        slot = self.slots[worker]
        slot.task, slot.since, slot.overdue = task, now, False
        task.sent = now
        task.attempts += 1
        task.running += 1
        task.batch.count_pending(task, 1)
        self.counts["sent"] += 1
        self._look_by(slot.due(self.hang_timeout))
        self.todo.append(SendTask(worker, slot.life, task.kind, task.value))

    def _handle_answer(self, worker: int, task: Task, outcome: Any, now: float) -> None:
        batch, slot = task.batch, self.slots[worker]
        spent = now - slot.since
        late = not batch.open or task.settled
        refused = None if late else batch.refusal(outcome, task.size)
        self._release(slot, task)
        self.queue.free(worker)
        self.seconds += spent
        if refused is None:
            self.calls.append(Call(slot.since, spent, task.size, worker))
            if any([times.add(task.size, spent) for times in self.times.values()]):
                self._look_by(self._next_due())
        if late:
            self.counts["late"] += 1
            self.wasted += spent
        elif refused is None:
            self.counts["answered"] += 1
            batch.settle(task, outcome, worker)
        else:
            self.counts["errors"] += 1
            self.wasted += spent
            answered = not isinstance(outcome, Exception)
            self._try_again(task, Failure(worker, task.point, refused, True, answered))

    def _handle_death(self, worker: int, error: Exception, now: float) -> None:
        """Give a dead worker's task to another, and begin the worker's next life."""
        slot = self.slots[worker]
        reason = str(error) if isinstance(error, WorkerDied) else reason_of(error)
        if not slot.ready:
            self.start_trouble = f"worker {worker} could not start: {reason}"
        task = slot.task
        if task is not None:
            self.seconds += now - slot.since
            self.wasted += now - slot.since
            self._release(slot, task)
            if task.batch.open and not task.settled:
                self._try_again(task, Failure(worker, task.point, reason))
        self.queue.take(worker)
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

    def _release(self, slot: Slot, task: Task) -> None:
        task.running -= 1
        if not slot.overdue:
            task.batch.count_pending(task, -1)
        slot.task, slot.overdue = None, False

    def report(self, now: float, internal_errors: int) -> PoolReport:
        """Return counts of what has happened so far, and the state of the workers."""
        workers = []
        for slot in self.slots:
            busy = 0.0 if slot.task is None else now - slot.since
            workers.append(WorkerReport(slot.state, busy, slot.deaths, slot.failed_starts))
        counted = ("sent", "answered", "late", "errors", "deaths", "hung")
        return PoolReport(
            num_workers=len(workers),
            idle=self.queue.idle,
            busy=sum(slot.task is not None for slot in self.slots),
            starting=sum(not slot.ready for slot in self.slots),
            **{name: self.counts[name] for name in counted},
            copies=self.queue.copies,
            internal_errors=internal_errors,
            seconds=self.seconds,
            wasted_seconds=self.wasted,
            workers=tuple(workers),
        )

    def _next_due(self) -> float:
        return min(slot.due(self.hang_timeout) for slot in self.slots)

    def _look_by(self, at: float) -> None:
        if at < self.due:
            self.due, self.earlier = at, True


class Scheduler:
    """The scheduler of one pool, for the models of each worker; other arguments are as for pools.

    It carries out on a backend what a `Schedule` decides, and owns its lock, its clock and the
    thread that looks after what is due. Every public method may be called from any thread.

    Raises:
        ValueError: If a number does not fit.
        RuntimeError: If too few workers start.
    """

    def __init__(
        self,
        backend: WorkerBackend,
        num_workers: int,
        num_models: int,
        *,
        overdue: Overdue,
        max_attempts: int,
        hang_timeout: float,
        start_timeout: float,
        min_workers: int | None = None,
        clock: AbstractClock = WALL,
    ):
        num_workers, max_attempts = check_counts(num_workers=num_workers, max_attempts=max_attempts)
        if not hang_timeout > 0 or not start_timeout > 0:
            raise ValueError(
                f"hang_timeout {hang_timeout} s and start_timeout {start_timeout} s must be "
                "positive"
            )
        least = num_workers if min_workers is None else min_workers
        if not 1 <= least <= num_workers:
            raise ValueError(
                f"min_workers is from 1 to {num_workers}, the number of workers, not {least}"
            )
        self.num_workers, self.num_models = num_workers, num_models
        self.clock, self.lock = clock, threading.RLock()
        self.on_idle: Callable[[], Any] | None = None
        capacity = backend.spare_capacity
        self.state = Schedule(
            num_workers, capacity, overdue, max_attempts, hang_timeout, start_timeout
        )
        self.backend = backend
        self._changed = threading.Condition(self.lock)  # notified of workers that start or do not
        self._closed = False
        self._broken: str | None = None
        self.errors = ErrorCounter()
        ended = "the pool's watcher ended, so nobody would replace workers that hang"
        self._watcher = Watcher(
            "nercc-scheduler",
            self._look,
            errors=self.errors,
            end=lambda: self._break(ended),
            clock=clock,
        )
        with self.event() as state:
            for worker in range(num_workers):
                state.start(worker, clock.now())
        self._watcher.start()
        reason = self._wait_for_workers(least)
        if reason is not None:
            self.close()
            raise RuntimeError(reason)
        with self.lock:
            self.state.queue.order()

    def _wait_for_workers(self, least: int) -> str | None:
        """Wait until enough workers are ready; return why they are not, if they cannot be."""
        begin, timeout = self.clock.now(), self.state.start_timeout
        end, warn_at = begin + timeout, begin + 10.0
        while True:
            now = self.clock.now()
            with self.lock:
                ready = sum(slot.ready for slot in self.state.slots)
                if ready >= least:
                    return None
                started = f"{ready} of {self.num_workers} workers started"
                failed = max(slot.failed_starts for slot in self.state.slots) >= _STARTS
                if failed or self._broken:
                    return f"{started}; {self._broken or self.state.start_trouble}"
                if now < min(warn_at, end):
                    self.clock.wait(self._changed, min(warn_at, end) - now)
                    continue
            missing = self.backend.missing()  # without the lock: it takes its time
            if now >= end:
                late = f"the others had not after {timeout} s"
                return f"{started}; {missing or self.state.start_trouble or late}"
            warn_at = now + 10.0
            if missing is not None:
                _LOG.warning("%d of %d workers are ready: %s", ready, self.num_workers, missing)

    @property
    def heartbeat(self) -> float:
        return self._watcher.heartbeat

    @property
    def trouble(self) -> str | None:
        return "this pool is closed" if self._closed else self._broken

    def check_send(self, kinds: Sequence[int]) -> None:
        """Raise ValueError or RuntimeError if nothing can be sent to workers' models `kinds`."""
        if self.trouble is not None:
            kind = ValueError if self._closed else RuntimeError
            raise kind(f"{self.trouble}: make a new one")
        if any(not WEIGHTS <= kind < self.num_models for kind in kinds):
            raise ValueError(
                f"the workers of this pool run {self.num_models} model(s), but {max(kinds) + 1} "
                "are asked for: give the pool all models of the code, served one first"
            )

    def restart(self, worker: int) -> bool:
        """Begin a new life of a worker, for its backend to find it a better place.

        Return whether it was idle, and was restarted.
        """
        with self.event() as state:
            return self.trouble is None and state.restart(worker, self.clock.now())

    def forget(self, batch: Batch) -> None:
        with self.lock:
            batch.end()
            self.state.queue.close(batch)

    def close(self) -> None:
        with self.lock:
            if self._closed:
                return
            self._closed = True
            for batch in list(self.state.queue.batches):
                self.state.give_up(batch, "the pool was closed")
        self._watcher.close()
        self.backend.close()

    # Events, and what follows from them.

    @contextlib.contextmanager
    def event(self) -> Iterator[Schedule]:
        """Hold the lock for a change of the state; then carry out what follows, without it."""
        with self.lock:
            yield self.state
            todo, self.state.todo = self.state.todo, []
            earlier, self.state.earlier = self.state.earlier, False
        for each in todo:
            if isinstance(each, StartLife):
                start, what = self.backend.start, f"starting worker {each.worker}"
                error = self.errors.run(what, start, each.worker, each.life, self._on_outcome)
                if error is not None:
                    self._on_outcome(each.worker, each.life, error)
            elif isinstance(each, SendTask):
                what = f"sending to worker {each.worker}"
                error = self.errors.run(what, self.backend.send, *each)
                if error is not None:
                    died = WorkerDied(f"it cannot be reached: {reason_of(error)}")
                    self._on_outcome(each.worker, each.life, died)
        if earlier:
            self._watcher.wake()
        for each in todo:
            if isinstance(each, Batch):
                self._notify(each)

    def _on_outcome(self, worker: int, life: int, outcome: Any) -> None:
        """Handle that a worker is ready, has answered, failed or died."""
        try:
            with self.event() as state:
                if self.trouble is not None or life != state.slots[worker].life:
                    return  # of a life that is over
                state.handle(worker, outcome, self.clock.now())
                self._changed.notify_all()
                free = state.queue.idle > 0
        except Exception as error:  # its records may be wrong, which nothing else would notice
            what = f"handling an outcome of worker {worker}"
            self.errors.count(what)
            return self._break(f"{what} failed: {reason_of(error)}")
        if free and self.on_idle is not None:
            self.errors.run("on_idle", self.on_idle)

    def _look(self) -> float:
        with self.event() as state:
            if self.trouble is not None:
                return math.inf
            state.due = -math.inf  # until it has looked, the watcher need not be woken
            state.tick(self.clock.now())
            self._changed.notify_all()
            return state.due

    def _break(self, reason: str) -> None:
        """Fail all that is open at once: nothing more can be answered."""
        with self.lock:
            if self.trouble is not None:
                return
            self._broken = f"this pool is broken: {reason}"
            batches = list(self.state.queue.batches)
            for batch in batches:
                self.errors.run("giving up a batch", self.state.give_up, batch, self._broken)
            self._changed.notify_all()
        for batch in batches:
            self._notify(batch)

    def _notify(self, batch: Batch) -> None:
        on_change = batch.on_change  # None once the batch is forgotten
        if on_change is not None:
            what = f"on_change of a batch of {batch.num_points}"
            self.errors.run(what, on_change, batch)
