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
import logging
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxtyping import PyTree

from ..codes._checks import check_counts
from ._backend import PoolReport, WorkerBackend, WorkerDied, WorkerSlot
from ._batch import Batch, BatchContext, Failure, Refuse, Task, reason_of, refuse_odd
from ._clock import WALL, AbstractClock, ErrorCounter, Watcher, pause_after
from ._times import CALLS_KEPT, AnswerTimes, Call, Overdue
from ._worker import WEIGHTS

_LOG = logging.getLogger(__name__)

_STARTS = 3  # failed starts of a worker after which a new pool gives up


class SendQueue:
    """Open batches in order of arrival, idle workers in order of idleness, and their matching.

    The worker that has been idle for longest comes first, so that a slow one gets no more than its
    share. Each worker is in the queue once, whatever happens to it. One that is fenced gets only
    tasks that are for it alone. Not thread-safe.

    `capacity(busy)` is `WorkerBackend.spare_capacity`.
    """

    def __init__(self, slots: Sequence[WorkerSlot], capacity: Callable[[int], float]):
        self.batches: dict[Batch, None] = {}  # open ones
        self._sending: dict[Batch, None] = {}  # those of them that may have more to send
        self.copies = 0  # second copies sent
        self._slots, self._capacity = slots, capacity
        self._idle: dict[int, None] = {}
        self._fenced_idle: dict[int, None] = {}

    def open(self, batch: Batch) -> None:
        self.batches[batch] = self._sending[batch] = None

    def close(self, batch: Batch) -> None:
        """Remove a batch, if it is there, and all that it has not sent."""
        batch.waiting.clear()
        self.batches.pop(batch, None)
        self._sending.pop(batch, None)

    @property
    def idle(self) -> int:
        return len(self._idle)

    @property
    def spare(self) -> float:
        """The number of idle workers that could run and slow down no worker that is on time.

        Infinite where workers do not slow each other down at all.
        """
        busy = [slot for slot in self._slots if slot.task and not slot.overdue]
        room = self._capacity(len(busy))
        return float(room if room == math.inf else max(min(self.idle, room), 0))

    def free(self, worker: int) -> None:
        (self._fenced_idle if self._slots[worker].fenced else self._idle)[worker] = None

    def take(self, worker: int) -> None:
        """Remove a worker from the idle ones, if it is there."""
        self._idle.pop(worker, None)
        self._fenced_idle.pop(worker, None)

    def fence(self, workers: frozenset[int]) -> None:
        """Give these workers nothing but what is for them alone, and all others everything."""
        idle = {**self._idle, **self._fenced_idle}
        self._idle, self._fenced_idle = {}, {}
        for worker, slot in enumerate(self._slots):
            slot.fenced = worker in workers
        for worker in idle:
            self.free(worker)

    def order(self) -> None:
        """Sort the idle workers, so that a seed means the same in each run."""
        self._idle = dict.fromkeys(sorted(self._idle))

    def first(self, batch: Batch) -> tuple[Task, int] | None:
        """Return a new batch's next task and an idle worker: redundancy is sent while cheap."""
        if not batch.waiting:
            return None
        worker = self._worker_for(batch.waiting[0])
        return None if worker is None else (batch.waiting.pop(0), worker)

    def next(self) -> tuple[Task, int] | None:
        """Return a task that a batch cannot do without, oldest batch first, and a worker for it."""
        for batch in tuple(self._sending) if self._idle or self._fenced_idle else ():
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
            idle = task.only in self._idle or task.only in self._fenced_idle
            return task.only if idle else None
        serving = sum(not slot.fenced for slot in self._slots) if task.failed else 0
        barred = task.failed if task.failed and len(task.failed) < serving else ()
        if not barred and not task.avoid:
            return next(iter(self._idle), None)
        barred = task.avoid.union(barred)
        return next((worker for worker in self._idle if worker not in barred), None)


class Scheduler:
    """The scheduler of one pool, for the models of each worker; other arguments are as for pools.

    Every public method may be called from any thread. Those of a pool are described there.

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
        self.num_workers, self.num_models = num_workers, num_models
        self._backend, self.clock = backend, clock
        self._overdue = overdue
        self._max_attempts = max_attempts
        self._hang_timeout, self._start_timeout = hang_timeout, start_timeout
        self._lock = threading.RLock()
        self._slots = [WorkerSlot() for _ in range(num_workers)]
        least = num_workers if min_workers is None else min_workers
        if not 1 <= least <= num_workers:
            raise ValueError(
                f"min_workers is from 1 to {num_workers}, the number of workers, not {least}"
            )
        self._changed = threading.Condition(self._lock)  # notified of workers that start or do not
        self._start_trouble: str | None = None  # of the last worker that could not start
        self._queue = SendQueue(self._slots, backend.spare_capacity)
        # By rule, each of which all of its batches share; a new rule knows the past.
        self._times = {overdue: AnswerTimes(overdue)}
        self._calls: collections.deque[Call] = collections.deque(maxlen=CALLS_KEPT)
        self._counts: collections.Counter[str] = collections.Counter()
        self._seconds = self._wasted = 0.0
        self._closed = False
        self._broken: str | None = None
        self._next_turn = -math.inf  # when the watcher looks next
        self._wake = False  # whether it must be woken to look earlier
        self._on_idle: Callable[[], None] | None = None
        self._errors = ErrorCounter()
        ended = "the pool's watcher ended, so nobody would replace workers that hang"
        self._watcher = Watcher(
            "nercc-scheduler", self._look, self._errors, lambda: self._break(ended), clock
        )
        with self._lock:
            for worker in range(num_workers):
                self._start(worker)
        self._watcher.start()
        reason = self._wait_for_workers(least)
        if reason is not None:
            self.close()
            raise RuntimeError(reason)
        with self._lock:
            self._queue.order()

    def _wait_for_workers(self, least: int) -> str | None:
        """Wait until enough workers are ready; return why they are not, if they cannot be."""
        begin = self.clock.now()
        end, warn_at = begin + self._start_timeout, begin + 10.0
        while True:
            now = self.clock.now()
            with self._lock:
                ready = sum(slot.ready for slot in self._slots)
                if ready >= least:
                    return None
                started = f"{ready} of {self.num_workers} workers started"
                failed = max(slot.failed_starts for slot in self._slots) >= _STARTS
                if failed or self._broken:
                    return f"{started}; {self._broken or self._start_trouble}"
                if now < min(warn_at, end):
                    self.clock.wait(self._changed, min(warn_at, end) - now)
                    continue
            missing = self._backend.missing()  # without the lock: it takes its time
            if now >= end:
                late = f"the others had not after {self._start_timeout} s"
                return f"{started}; {self._start_trouble or missing or late}"
            warn_at = now + 10.0
            if missing is not None:
                _LOG.warning("%d of %d workers are ready: %s", ready, self.num_workers, missing)

    # The interface of pools.

    def open(
        self,
        num_points: int,
        needed: int | None,
        copies: int,
        on_change: Callable[[Batch], None] | None,
        overdue: Overdue | None,
        refuse: Refuse = refuse_odd,
        *,
        at_once: int = 1,
    ) -> Batch:
        rule = overdue or self._overdue
        with self._lock:
            if rule not in self._times:
                self._times[rule] = self._times[self._overdue].under(rule)
            times = self._times[rule]
        context = BatchContext(self._lock, self.clock, self._forget)
        return Batch(context, num_points, needed, copies, at_once, times, on_change, refuse)

    def add(
        self,
        batch: Batch,
        points: Sequence[int],
        values: Iterable[PyTree],
        kinds: Sequence[int],
        avoid: frozenset[int] = frozenset(),
        only: int | None = None,
    ) -> None:
        if any(not WEIGHTS <= kind < self.num_models for kind in kinds):
            raise ValueError(
                f"the workers of this pool run {self.num_models} model(s), but {max(kinds) + 1} "
                "are asked for: give the pool all models of the code, served one first"
            )
        # Outside the lock: values may be cast while they are taken.
        parts = zip(points, kinds, values, strict=True)
        tasks = [Task(batch, *each, avoid, only) for each in parts]
        for task in tasks:
            task.value = self._backend.prepare(task.value)
        with self._lock:
            if self.trouble is not None:
                kind = ValueError if self._closed else RuntimeError
                raise kind(f"{self.trouble}: make a new one")
            batch.check_new(points)
            for task in tasks:
                batch.add(task)
            self._queue.open(batch)
            sends = []
            while (chosen := self._queue.first(batch)) is not None:
                sends.append(self._assign(*chosen))
            if batch.at_once > 1:
                sends += self._assign_waiting()
        self._send(sends)

    def report(self) -> PoolReport:
        with self._lock:
            busy = sum(slot.task is not None for slot in self._slots)
            ready = sum(slot.ready for slot in self._slots)
            count = self._counts
            now = self.clock.now()
            return PoolReport(
                num_workers=len(self._slots),
                idle=self._queue.idle,
                busy=busy,
                starting=len(self._slots) - ready,
                **{name: count[name] for name in _COUNTED},
                copies=self._queue.copies,
                internal_errors=self._errors.errors,
                seconds=self._seconds,
                wasted_seconds=self._wasted,
                workers=tuple(slot.report(now) for slot in self._slots),
            )

    def calls(self) -> list[Call]:
        with self._lock:
            return list(self._calls)

    @property
    def idle(self) -> int:
        return self._queue.idle

    @property
    def spare(self) -> float:
        return self._queue.spare

    @property
    def heartbeat(self) -> float:
        return self._watcher.heartbeat

    @property
    def trouble(self) -> str | None:
        return "this pool is closed" if self._closed else self._broken

    def on_idle(self, callback: Callable[[], None]) -> None:
        self._on_idle = callback

    def fence(self, workers: Iterable[int]) -> None:
        with self._lock:
            self._queue.fence(frozenset(workers))
            sends = self._assign_waiting()
        self._send(sends)

    def restart(self, worker: int) -> bool:
        """Begin a new life of a worker, for its backend to find it a better place.

        Return whether it was idle, and was restarted.
        """
        with self._lock:
            slot = self._slots[worker]
            if self.trouble is not None or not slot.ready or slot.task is not None:
                return False
            self._queue.take(worker)
            slot.ready, slot.life = False, slot.life + 1
            self._start(worker)
        return True

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for batch in list(self._queue.batches):
                self._give_up(batch, "the pool was closed")
        self._watcher.close()
        self._backend.close()

    # Outcomes.

    def _on_outcome(self, worker: int, life: int, outcome: Any) -> None:
        """Handle that a worker is ready, has answered, failed or died."""
        try:
            self._handle(worker, life, outcome)
        except Exception as error:  # its records may be wrong, which nothing else would notice
            what = f"handling an outcome of worker {worker}"
            self._errors.count(what)
            self._break(f"{what} failed: {reason_of(error)}")

    def _handle(self, worker: int, life: int, outcome: Any) -> None:
        with self._lock:
            slot = self._slots[worker]
            if self.trouble is not None or life != slot.life:
                return  # of a life that is over
            batch = slot.task.batch if slot.task is not None else None
            if not slot.ready:
                if isinstance(outcome, Exception):
                    self._fail_start(worker, outcome)
                else:
                    slot.ready, slot.failed_starts, slot.start_at = True, 0, math.inf
                    self._queue.free(worker)
                    self._changed.notify_all()
            elif isinstance(outcome, WorkerDied):
                self._handle_death(worker, str(outcome))
            elif slot.task is not None:
                self._handle_answer(worker, outcome)
            sends = self._assign_waiting()
            free = self._queue.idle > 0
        self._send(sends)
        if batch is not None:
            self._notify(batch)
        if free and self._on_idle is not None:
            self._errors.run("on_idle", self._on_idle)

    def _handle_answer(self, worker: int, outcome: Any) -> None:
        slot = self._slots[worker]
        task = slot.task
        assert task is not None
        batch = task.batch
        spent = self.clock.now() - slot.since
        late = not batch.open or task.settled
        refused = None if late else batch.refusal(outcome, task.size)
        self._release(worker)
        self._queue.free(worker)
        self._seconds += spent
        if refused is None:
            self._observe(worker, task.size, spent)
        if late:
            self._counts["late"] += 1
            self._wasted += spent
        elif refused is None:
            self._counts["answered"] += 1
            batch.settle(task, outcome, worker)
        else:
            self._counts["errors"] += 1
            self._wasted += spent
            answered = not isinstance(outcome, Exception)
            self._try_again(worker, task, Failure(worker, task.point, refused, True, answered))

    def _handle_death(self, worker: int, reason: str) -> None:
        """Give a dead worker's task to another, and begin the worker's next life."""
        slot = self._slots[worker]
        task = slot.task
        if task is not None:
            spent = self.clock.now() - slot.since
            self._seconds += spent
            self._wasted += spent
            self._release(worker)
            if task.batch.open and not task.settled:
                self._try_again(worker, task, Failure(worker, task.point, reason))
        self._queue.take(worker)
        failed = slot.failed_starts = 0 if slot.ready else slot.failed_starts + 1
        slot.ready = slot.begun = False
        slot.life += 1
        slot.deaths += 1
        self._counts["deaths"] += 1
        if failed:
            slot.start_at = self.clock.now() + pause_after(failed)
            self._look_by(slot.start_at)
        else:
            self._start(worker)
        self._changed.notify_all()

    def _start(self, worker: int) -> None:
        """Begin a worker's next life, which is over unless it is ready in time."""
        slot = self._slots[worker]
        slot.begun, slot.start_at = True, self.clock.now() + self._start_timeout
        what = f"starting worker {worker}"
        start = self._backend.start
        error = self._errors.run(what, start, worker, slot.life, self._on_outcome)
        if error is not None:
            self._fail_start(worker, error)

    def _fail_start(self, worker: int, error: Exception) -> None:
        reason = str(error) if isinstance(error, WorkerDied) else reason_of(error)
        self._start_trouble = f"worker {worker} could not start: {reason}"
        self._handle_death(worker, self._start_trouble)

    def _try_again(self, worker: int, task: Task, failure: Failure) -> None:
        batch = task.batch
        batch.failures.append(failure)
        task.failed.add(worker)
        task.refusals += failure.refused
        if task.running:
            return  # a copy of it is still on its way
        if task.attempts < self._max_attempts and task.refusals < 2:
            batch.waiting.insert(0, task)
        else:
            batch.settle(task, None)

    def _release(self, worker: int) -> None:
        slot = self._slots[worker]
        task = slot.task
        assert task is not None
        task.running -= 1
        if not slot.overdue:
            task.batch.count_pending(task, -1)
        slot.task, slot.overdue = None, False

    def _give_up(self, batch: Batch, reason: str) -> None:
        """Fail all that is open of a batch, so that no wait for it goes on."""
        for task in batch.tasks.values():
            if not task.settled:
                batch.failures.append(Failure(-1, task.point, reason))
                batch.settle(task, None)
        self._queue.close(batch)

    def _forget(self, batch: Batch) -> None:
        with self._lock:
            batch.end()
            self._queue.close(batch)

    # Sending.

    def _assign_waiting(self) -> list[tuple[int, int, int, Any]]:
        """Assign to idle workers what batches cannot do without, oldest batches first."""
        sends = []
        while (chosen := self._queue.next()) is not None:
            sends.append(self._assign(*chosen))
        return sends

    def _assign(self, task: Task, worker: int) -> tuple[int, int, int, Any]:
        self._queue.take(worker)
        slot = self._slots[worker]
        slot.task, slot.since, slot.overdue = task, self.clock.now(), False
        task.sent = slot.since
        task.attempts += 1
        task.running += 1
        task.batch.count_pending(task, 1)
        self._counts["sent"] += 1
        self._look_by(slot.due(self._hang_timeout))
        return worker, slot.life, task.kind, task.value

    def _send(self, sends: Sequence[tuple[int, int, int, Any]]) -> None:
        """Send what was assigned: without the lock, which workers and the watcher want, too."""
        for worker, life, *task in sends:
            what = f"sending to worker {worker}"
            error = self._errors.run(what, self._backend.send, worker, life, *task)
            if error is not None:
                died = WorkerDied(f"it cannot be reached: {reason_of(error)}")
                self._on_outcome(worker, life, died)
        if self._wake:
            self._wake = False
            self._watcher.wake()

    # Time.

    def _observe(self, worker: int, size: int, seconds: float) -> None:
        self._calls.append(Call(self.clock.now() - seconds, seconds, size, worker))
        fell = [times.add(size, seconds) for times in self._times.values()]
        if any(fell):
            self._look_by(self._next_due())

    def _look(self) -> float:
        """Handle what is due: overdue tasks, workers that hang, starts. Return the next time."""
        with self._lock:
            if self.trouble is not None:
                return math.inf
            now = self.clock.now()
            self._next_turn = -math.inf  # until then, the watcher need not be woken
            failed = [
                self._handle_due(worker, now)
                for worker, slot in enumerate(self._slots)
                if slot.due(self._hang_timeout) <= now
            ]
            sends = self._assign_waiting()
            self._next_turn = self._next_due()
        self._send(sends)
        for batch in failed:
            if batch is not None:
                self._notify(batch)
        return self._next_turn

    def _handle_due(self, worker: int, now: float) -> Batch | None:
        """Handle what is due at a worker. Return the batch whose task failed by that, if any."""
        slot = self._slots[worker]
        if slot.task is None and slot.begun:
            late = WorkerDied(f"it was not ready within {self._start_timeout} s")
            self._fail_start(worker, late)
        elif slot.task is None:
            self._start(worker)
        elif slot.since + self._hang_timeout <= now:  # as `WorkerSlot.due`, to the last digit
            batch = slot.task.batch
            self._calls.append(Call(slot.since, now - slot.since, slot.task.size, worker))
            self._counts["hung"] += 1
            self._handle_death(worker, f"no answer within {self._hang_timeout} s: it hangs")
            return batch
        else:
            slot.overdue = True
            slot.task.batch.hedge(slot.task)
        return None

    def _next_due(self) -> float:
        return min(slot.due(self._hang_timeout) for slot in self._slots)

    def _look_by(self, at: float) -> None:
        """Have the watcher woken, if this is earlier than it would look."""
        if at < self._next_turn:
            self._next_turn, self._wake = at, True

    # Failures of the scheduler itself.

    def _break(self, reason: str) -> None:
        """Fail all that is open at once: nothing more can be answered."""
        with self._lock:
            if self.trouble is not None:
                return
            self._broken = f"this pool is broken: {reason}"
            batches = list(self._queue.batches)
            for batch in batches:
                self._errors.run("giving up a batch", self._give_up, batch, self._broken)
            self._changed.notify_all()
        for batch in batches:
            self._notify(batch)

    def _notify(self, batch: Batch) -> None:
        on_change = batch.on_change  # None once the batch is forgotten
        if on_change is not None:
            what = f"on_change of a batch of {batch.num_points}"
            self._errors.run(what, on_change, batch)


_COUNTED = ("sent", "answered", "late", "errors", "deaths", "hung")
