"""The runner of a pool: carries out a `Schedule`'s instructions on a backend, with one lock."""

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ..arrays import check_counts
from ._schedule import Schedule, SendTask, StartLife
from .backend import WorkerBackend, WorkerDied
from .batch import Batch, reason_of
from .clock import WALL, AbstractClock, Watcher
from .times import Overdue

_LOG = logging.getLogger(__name__)

_STARTS = 3  # failed starts of a worker after which a new pool gives up
CLOSED = "this pool is closed"


class Runner:
    """The running workers of a pool, from their start until they are closed.

    Attributes:
        schedule: The scheduler's state.
        lock: The lock that is held while `schedule` changes.
        trouble: Why the pool gives no more answers; None while it works.
        errors: The number of exceptions in steps of backends, callbacks and outcome handlers.
        on_idle: Called whenever a worker is left without a task.
        watcher: The thread that handles overdue tasks, hanging workers and due starts.
    """

    def __init__(
        self,
        backend: WorkerBackend,
        num_workers: int,
        *,
        overdue: Overdue | None = None,
        max_attempts: int = 3,
        hang_timeout: float = 60.0,
        start_timeout: float = 120.0,
        min_workers: int | None = None,
        clock: AbstractClock = WALL,
    ):
        """Start the workers, and wait until enough of them are ready: see `AbstractPool._begin`."""
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
        self.clock, self.backend = clock, backend
        self.lock = threading.RLock()
        self._changed = threading.Condition(self.lock)  # notified after each event
        self.trouble: str | None = None
        self.errors = 0
        self.on_idle: Callable[[], Any] | None = None
        rules = overdue or Overdue(), max_attempts, hang_timeout, start_timeout
        self.schedule = Schedule(num_workers, backend.spare_capacity, *rules)
        ended = "the pool's watcher ended, so nobody would replace workers that hang"
        self.watcher = Watcher(
            "nercc-scheduler", self._look, end=lambda: self._break(ended), clock=clock
        )
        with self.event() as state:
            for worker in range(num_workers):
                state.start(worker, clock.now())
        if (reason := self._wait_for_workers(least)) is not None:
            self.close()
            raise RuntimeError(reason)
        with self.lock:  # sorted, so that runs with the same seed use workers in the same order
            state.available = dict.fromkeys(sorted(state.available))

    def _wait_for_workers(self, least: int) -> str | None:
        """Wait until enough workers are ready; return None, or why that failed."""
        state, begin = self.schedule, self.clock.now()
        end, warn_at = begin + state.start_timeout, begin + 10.0
        while True:
            now = self.clock.now()
            with self.lock:
                ready = sum(slot.ready for slot in state.slots)
                if ready >= least:
                    return None
                started = f"{ready} of {len(state.slots)} workers started"
                failed = max(slot.failed_starts for slot in state.slots) >= _STARTS
                if failed or self.trouble:
                    return f"{started}; {self.trouble or state.start_trouble}"
                if now < min(warn_at, end):
                    self.clock.wait(self._changed, min(warn_at, end) - now)
                    continue
            missing = self.backend.missing()  # without the lock, since it may block
            if now >= end:
                late = f"the others had not after {state.start_timeout} s"
                return f"{started}; {missing or state.start_trouble or late}"
            warn_at = now + 10.0
            if missing is not None:
                _LOG.warning("%d of %d workers are ready: %s", ready, len(state.slots), missing)

    def close(self) -> None:
        """End the workers. Waits that are in progress return the answers that have arrived."""
        with self.lock:
            if self.trouble == CLOSED:
                return
            self.trouble = CLOSED
            for batch in list(self.schedule.batches):
                self.schedule.give_up(batch, "the pool was closed")
        self.watcher.close()
        self.backend.close()

    @contextlib.contextmanager
    def event(self) -> Iterator[Schedule]:
        """Hold the lock for a change of the state; afterwards carry out the instructions unlocked.

        Only starts of lives are carried out under the lock, so that none follows `close`.
        """
        with self.lock:
            state = self.schedule
            yield state
            for start in [each for each in state.todo if isinstance(each, StartLife)]:
                what = f"starting worker {start.worker}"
                error = self._run(what, self.backend.start, *start, self._on_outcome)
                if error is not None:
                    state.handle(start.worker, error, self.clock.now())
            todo, state.todo = state.todo, []
            earlier, state.earlier = state.earlier, False
            self._changed.notify_all()
        for each in todo:
            if isinstance(each, SendTask):
                what = f"sending to worker {each.worker}"
                error = self._run(what, self.backend.send, *each)
                if error is not None:
                    died = WorkerDied(f"it cannot be reached: {reason_of(error)}")
                    self._on_outcome(each.worker, each.life, died)
        if earlier:
            self.watcher.wake()
        for each in todo:
            if isinstance(each, Batch):
                self._notify(each)

    def _on_outcome(self, worker: int, life: int, outcome: Any) -> None:
        """Handle a report of the backend: a worker is ready, has answered, failed or died."""

        def handle() -> None:
            nonlocal free
            with self.event() as state:
                if self.trouble is None and life == state.slots[worker].life:  # not over
                    state.handle(worker, outcome, self.clock.now())
                    free = state.idle > 0

        free, what = False, f"handling an outcome of worker {worker}"
        error = self._run(what, handle)
        if error is not None:  # the state may be inconsistent, which nothing else would notice
            self._break(f"{what} failed: {reason_of(error)}")
        elif free and self.on_idle is not None:
            self._run("on_idle", self.on_idle)

    def _look(self) -> float:
        with self.event() as state:
            if self.trouble is not None:
                return math.inf
            state.due = -math.inf  # the watcher need not be woken during its own turn
            state.tick(self.clock.now())
            return state.due

    def _break(self, reason: str) -> None:
        """Mark the pool as broken, and fail all open tasks at once."""
        with self.lock:
            if self.trouble is not None:
                return
            self.trouble = f"this pool is broken: {reason}"
            batches = list(self.schedule.batches)
            for batch in batches:
                self._run("giving up a batch", self.schedule.give_up, batch, self.trouble)
            self._changed.notify_all()
        for batch in batches:
            self._notify(batch)

    def _notify(self, batch: Batch) -> None:
        on_change = batch.on_change  # None once the batch is forgotten
        if on_change is not None:
            self._run(f"on_change of a batch of {batch.num_points}", on_change, batch)

    def _run(self, what: str, step: Callable[..., Any], *arguments: Any) -> Exception | None:
        """Run a step that may raise; log, count and return its exception, or return None."""
        try:
            step(*arguments)
        except Exception as error:
            with self.lock:
                self.errors += 1
            _LOG.exception("%s failed", what)
            return error
        return None
