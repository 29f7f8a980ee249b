"""The books of a pool: who has what in hand, what waits, and what to do when somebody fails.

All pools share them; only how a worker is started, reached and ended differs (`AbstractCrew`).

The rules:

- A worker has one task in hand at a time. One that straggles is busy, so it gets no new work.
- An answer belongs to its task, and the task to its batch: a late one cannot be taken for another.
- A task whose worker failed or died goes to another worker, `max_attempts` times in all.
- What finds no free worker waits. It is sent as long as its batch may otherwise not get the number
  of answers it needs; coded data points beyond that number are not worth a worker that the next
  batch could use.
- What goes wrong in a step that is not the desk's own (a crew's, a callback's) is logged and
  counted, and a start is tried again. Where its own steps fail the pool is broken: all that is open
  fails at once, and the pool says so.
- A task is *overdue* when it has taken longer than the running service times of batches of its size
  allow (`Overdue`). It no longer counts among those that a batch may hope for: what waits is sent
  in its place, or a copy of itself if its batch allows copies. That is hedging, and what keeps a
  batch from waiting for a straggler while others are free.
"""

import collections
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jaxtyping import PyTree

from ..codes import check_counts
from ._batch import Batch, Books, Failure, Refuse, Task, refuse_odd
from ._calls import KEPT, Call
from ._clock import WALL, AbstractClock
from ._crew import AbstractCrew, WorkerDied, reason_of
from ._outbox import Outbox
from ._overdue import Overdue, TimesByRule
from ._report import PoolReport
from ._seat import Seat
from ._startup import StartUp
from ._supervision import Guard, Watcher, pause_after


class Desk:
    """The books. Every public method may be called from any thread."""

    def __init__(
        self,
        crew: AbstractCrew,
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
        self._crew, self.clock = crew, clock
        self._overdue = overdue
        self._max_attempts = max_attempts
        self._hang_timeout, self._start_timeout = hang_timeout, start_timeout
        self._lock = threading.RLock()
        self._seats = [Seat() for _ in range(num_workers)]
        self._startup = StartUp(self._lock, self._seats, min_workers, crew.lacking, clock)
        self._outbox = Outbox(self._seats, crew.room)
        self._times = TimesByRule(overdue)
        self._calls: collections.deque[Call] = collections.deque(maxlen=KEPT)
        self._counts: collections.Counter[str] = collections.Counter()
        self._seconds = self._wasted = 0.0
        self._closed = False
        self._broken: str | None = None
        self._look_at = -math.inf  # when the watcher looks next
        self._early = False  # whether it is to be woken for that
        self._on_idle: Callable[[], None] | None = None
        self._guard = Guard()
        self._watcher = Watcher("nercc-desk", self._look, self._guard, self._watch_ended, clock)
        with self._lock:
            for worker in range(num_workers):
                self._start(worker)
        self._watcher.start()
        reason = self._startup.wait(lambda: self._broken, start_timeout)
        if reason is not None:
            self.close()
            raise RuntimeError(reason)
        with self._lock:
            self._outbox.order()

    # What pools offer.

    def open(
        self,
        num_points: int,
        needed: int | None,
        copies: int,
        on_change: Callable[[Batch], None] | None,
        overdue: Overdue | None,
        refuse: Refuse = refuse_odd,
    ) -> Batch:
        with self._lock:
            times = self._times.under(overdue or self._overdue)
        books = Books(self._lock, self.clock, self._forget)
        return Batch(books, num_points, needed, copies, times, on_change, refuse)

    def add(
        self,
        batch: Batch,
        points: Sequence[int],
        values: Iterable[PyTree],
        kinds: Sequence[int],
    ) -> None:
        if any(not 0 <= kind < self.num_models for kind in kinds):
            raise ValueError(
                f"the workers of this pool run {self.num_models} model(s), but {max(kinds) + 1} "
                "are asked for: give the pool all models of the code, served one first"
            )
        # Outside the lock: values may be cast while they are taken.
        tasks = [Task(batch, *each) for each in zip(points, kinds, values, strict=True)]
        for task in tasks:
            task.value = self._crew.parcel(task.value)
        with self._lock:
            if self.trouble is not None:
                kind = ValueError if self._closed else RuntimeError
                raise kind(f"{self.trouble}: make a new one")
            batch.check_new(points)
            for task in tasks:
                batch.add(task)
            self._outbox.open(batch)
            sends = []
            while (chosen := self._outbox.first(batch)) is not None:
                sends.append(self._assign(*chosen))
        self._send(sends)

    def report(self) -> PoolReport:
        with self._lock:
            busy = sum(seat.task is not None for seat in self._seats)
            ready = sum(seat.ready for seat in self._seats)
            count = self._counts
            now = self.clock.now()
            return PoolReport(
                num_workers=len(self._seats),
                idle=ready - busy,
                busy=busy,
                starting=len(self._seats) - ready,
                **{name: count[name] for name in _COUNTED},
                copies=self._outbox.copies,
                internal_errors=self._guard.errors,
                seconds=self._seconds,
                wasted_seconds=self._wasted,
                workers=tuple(seat.report(now) for seat in self._seats),
            )

    def calls(self) -> list[Call]:
        with self._lock:
            return list(self._calls)

    @property
    def idle(self) -> int:
        return self._outbox.idle

    @property
    def spare(self) -> float:
        return self._outbox.spare

    @property
    def heartbeat(self) -> float:
        return self._watcher.heartbeat

    @property
    def trouble(self) -> str | None:
        return "this pool is closed" if self._closed else self._broken

    def on_idle(self, callback: Callable[[], None]) -> None:
        self._on_idle = callback

    def renew(self, worker: int) -> bool:
        """Begins a new life of a worker, if it is idle: its crew finds it a better place."""
        with self._lock:
            seat = self._seats[worker]
            if self.trouble is not None or not seat.ready or seat.task is not None:
                return False
            self._outbox.take(worker)
            seat.ready, seat.life = False, seat.life + 1
            self._start(worker)
        return True

    def close(self) -> None:
        """Ends the workers; batches that still wait come back with what they have."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for batch in list(self._outbox.batches):
                self._give_up(batch, "the pool was closed")
        self._watcher.close()
        self._crew.close()

    # What happens.

    def _hear(self, worker: int, life: int, outcome: Any) -> None:
        """A worker is ready, has answered, failed or died."""
        try:
            self._enter(worker, life, outcome)
        except Exception as error:  # the books may be wrong, and nobody else notice
            self._guard.count(f"hearing of worker {worker}")
            self._break(f"hearing of worker {worker} failed: {reason_of(error)}")

    def _enter(self, worker: int, life: int, outcome: Any) -> None:
        with self._lock:
            seat = self._seats[worker]
            if self.trouble is not None or life != seat.life:
                return  # of a life that is over
            batch = seat.task.batch if seat.task is not None else None
            if not seat.ready:
                self._ready(worker, outcome)
            elif isinstance(outcome, WorkerDied):
                self._bury(worker, str(outcome))
            elif seat.task is not None:
                self._settle(worker, outcome)
            sends = self._pump()
            free = self._outbox.idle > 0
        self._send(sends)
        if batch is not None:
            self._tell_of(batch)
        if free and self._on_idle is not None:
            self._guard.run("on_idle", self._on_idle)

    def _ready(self, worker: int, outcome: Any) -> None:
        seat = self._seats[worker]
        if isinstance(outcome, Exception):
            self._fail_start(worker, outcome)
            return
        seat.ready, seat.failed_starts, seat.start_at = True, 0, math.inf
        self._outbox.free(worker)
        self._startup.told()

    def _settle(self, worker: int, outcome: Any) -> None:
        seat = self._seats[worker]
        task = seat.task
        assert task is not None
        batch = task.batch
        spent = self.clock.now() - seat.since
        late = not batch.open or task.settled
        refused = None if late else batch.refusal(outcome, task.size)
        self._release(worker)
        self._outbox.free(worker)
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
            self._try_again(worker, task, refused, raised=True)

    def _bury(self, worker: int, reason: str) -> None:
        """A worker is gone: its task goes to another, and it gets a new life."""
        seat = self._seats[worker]
        task = seat.task
        if task is not None:
            spent = self.clock.now() - seat.since
            self._seconds += spent
            self._wasted += spent
            self._release(worker)
            if task.batch.open and not task.settled:
                self._try_again(worker, task, reason)
        self._outbox.take(worker)
        failed = seat.failed_starts = 0 if seat.ready else seat.failed_starts + 1
        seat.ready = seat.begun = False
        seat.life += 1
        seat.deaths += 1
        self._counts["deaths"] += 1
        if failed:
            seat.start_at = self.clock.now() + pause_after(failed)
            self._plan(seat.start_at)
        else:
            self._start(worker)
        self._startup.told()

    def _start(self, worker: int) -> None:
        """Begins a worker's next life, which is over unless it is ready in time."""
        seat = self._seats[worker]
        seat.begun, seat.start_at = True, self.clock.now() + self._start_timeout
        what = f"starting worker {worker}"
        error = self._guard.run(what, self._crew.start, worker, seat.life, self._hear)
        if error is not None:
            self._fail_start(worker, error)

    def _fail_start(self, worker: int, error: Exception) -> None:
        told = str(error) if isinstance(error, WorkerDied) else reason_of(error)
        self._startup.trouble = f"worker {worker} could not start: {told}"
        self._bury(worker, self._startup.trouble)

    def _try_again(self, worker: int, task: Task, reason: str, raised: bool = False) -> None:
        batch = task.batch
        batch.failures.append(Failure(worker, task.point, reason, raised))
        task.failed.add(worker)
        if task.running:
            return  # a copy of it is still on its way
        if task.attempts < self._max_attempts:
            batch.waiting.insert(0, task)
        else:
            batch.settle(task, None)

    def _release(self, worker: int) -> None:
        seat = self._seats[worker]
        task = seat.task
        assert task is not None
        task.running -= 1
        if not seat.overdue:
            task.batch.hope(task, -1)
        seat.task, seat.overdue = None, False

    def _give_up(self, batch: Batch, reason: str) -> None:
        """Nothing more will come: whoever waits for the batch is told."""
        for task in batch.tasks.values():
            if not task.settled:
                batch.failures.append(Failure(-1, task.point, reason))
                batch.settle(task, None)
        self._outbox.close(batch)

    def _forget(self, batch: Batch) -> None:
        with self._lock:
            batch.end()
            self._outbox.close(batch)

    # What is sent, and when.

    def _pump(self) -> list[tuple[int, int, int, Any]]:
        """Gives free workers what batches cannot do without; oldest batches first."""
        sends = []
        while (chosen := self._outbox.next()) is not None:
            sends.append(self._assign(*chosen))
        return sends

    def _assign(self, task: Task, worker: int) -> tuple[int, int, int, Any]:
        self._outbox.take(worker)
        seat = self._seats[worker]
        seat.task, seat.since, seat.overdue = task, self.clock.now(), False
        task.attempts += 1
        task.running += 1
        task.batch.hope(task, 1)
        self._counts["sent"] += 1
        self._plan(seat.due(self._hang_timeout))
        return worker, seat.life, task.kind, task.value

    def _send(self, sends: Sequence[tuple[int, int, int, Any]]) -> None:
        """Outside the lock, for which neither workers nor the watcher need to wait then."""
        for worker, life, *task in sends:
            what = f"sending to worker {worker}"
            error = self._guard.run(what, self._crew.send, worker, life, *task)
            if error is not None:
                self._hear(worker, life, WorkerDied(f"it cannot be reached: {reason_of(error)}"))
        if self._early:
            self._early = False
            self._watcher.wake()

    # Time.

    def _observe(self, worker: int, size: int, seconds: float) -> None:
        self._calls.append(Call(self.clock.now() - seconds, seconds, size, worker))
        if self._times.add(size, seconds):
            self._plan(self._next_look())

    def _look(self) -> float:
        """What is due: tasks that are overdue, workers that hang or are to be started."""
        with self._lock:
            if self.trouble is not None:
                return math.inf
            now = self.clock.now()
            self._look_at = -math.inf  # nobody needs to wake the watcher now
            failed = [
                self._attend(worker, now)
                for worker, seat in enumerate(self._seats)
                if seat.due(self._hang_timeout) <= now
            ]
            sends = self._pump()
            self._look_at = self._next_look()
        self._send(sends)
        for batch in failed:
            if batch is not None:
                self._tell_of(batch)
        return self._look_at

    def _attend(self, worker: int, now: float) -> Batch | None:
        """Does what is due of a worker. Returns the batch whose task failed by that, if any."""
        seat = self._seats[worker]
        if seat.task is None and seat.begun:
            late = WorkerDied(f"it was not ready within {self._start_timeout} s")
            self._fail_start(worker, late)
        elif seat.task is None:
            self._start(worker)
        elif seat.since + self._hang_timeout <= now:  # as `Seat.due` has it, to the last digit
            batch = seat.task.batch
            self._calls.append(Call(seat.since, now - seat.since, seat.task.size, worker))
            self._counts["hung"] += 1
            self._bury(worker, f"no answer within {self._hang_timeout} s: it hangs")
            return batch
        else:
            seat.overdue = True
            seat.task.batch.hope(seat.task, -1)
        return None

    def _next_look(self) -> float:
        return min(seat.due(self._hang_timeout) for seat in self._seats)

    def _plan(self, at: float) -> None:
        """Has the watcher woken if this is earlier than it would look."""
        if at < self._look_at:
            self._look_at, self._early = at, True

    # What must not go wrong.

    def _watch_ended(self) -> None:
        self._break("the pool's watcher ended, so nobody would replace workers that hang")

    def _break(self, reason: str) -> None:
        """Nothing more can be answered: all that is open fails at once."""
        with self._lock:
            if self.trouble is not None:
                return
            self._broken = f"this pool is broken: {reason}"
            batches = list(self._outbox.batches)
            for batch in batches:
                self._guard.run("giving up a batch", self._give_up, batch, self._broken)
            self._startup.told()
        for batch in batches:
            self._tell_of(batch)

    def _tell_of(self, batch: Batch) -> None:
        on_change = batch.on_change  # it has none once it is forgotten
        if on_change is not None:
            what = f"on_change of a batch of {batch.num_points}"
            self._guard.run(what, on_change, batch)


_COUNTED = ("sent", "answered", "late", "errors", "deaths", "hung")
