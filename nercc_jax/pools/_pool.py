"""The interface of all pools: coded data points go out, answers and a mask come back.

It carries out on a backend what a `Schedule` decides.
"""

import abc
import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree, Shaped

from ..codes.checks import check_counts
from ..inference.models import cast_floats
from ._schedule import Schedule, SendTask, StartLife
from .backend import PoolReport, WorkerBackend, WorkerDied
from .batch import Batch, Refuse, Task, arrays_of, reason_of, refuse_odd
from .clock import WALL, AbstractClock, Watcher
from .times import Call, Overdue

_LOG = logging.getLogger(__name__)

_STARTS = 3  # failed starts of a worker after which a new pool gives up
_CLOSED = "this pool is closed"


class AbstractPool(abc.ABC):
    """Independent workers that run the same models; the first answers to come are decoded.

    Any worker can run any coded data point, one at a time, so a pool may have more workers than a
    code (spare ones), or fewer (each then runs several). The rules of which worker gets which task
    are at the top of `_schedule.py`. A pool holds threads or processes: `close` it, or use it as a
    context manager. Every method may be called from any thread.

    A pool of other workers is a subclass whose constructor calls `_begin`.

    Attributes:
        num_workers: The number of workers, dead ones that are being replaced included.
        clock: The clock of the pool, and of a server on it.
        worker_dtype: The dtype that coded data points are cast to before they are sent; None: no
            cast.
        conditions: The precision and platform of the workers, to compare calibrations with.
    """

    num_workers: int
    clock: AbstractClock
    worker_dtype: str | None = None
    conditions: str = ""
    _head: Any = None  # of the cluster that the workers are part of (`ray_cluster.Head`)

    def _begin(
        self,
        backend: WorkerBackend,
        num_workers: int,
        num_models: int,
        *,
        overdue: Overdue | None = None,
        max_attempts: int = 3,
        hang_timeout: float = 60.0,
        start_timeout: float = 120.0,
        min_workers: int | None = None,
        clock: AbstractClock = WALL,
    ) -> None:
        """Start the workers, and wait until enough of them are ready.

        Args:
            backend: The workers, which it ends if they do not start.
            num_workers: Their number.
            num_models: The number of models of each.
            overdue: As for `DevicePool`, and so are `max_attempts` and `hang_timeout`.
            max_attempts: See `overdue`.
            hang_timeout: See `overdue`.
            start_timeout: Seconds until enough workers must be ready.
            min_workers: How many are enough (default: all).
            clock: The clock that the pool lives by.

        Raises:
            ValueError: If a number does not fit.
            RuntimeError: If too few workers start.
        """
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
        self.num_workers, self.clock = num_workers, clock
        self._num_models, self._backend = num_models, backend
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)  # notified of workers that start or do not
        self._trouble: str | None = None
        self._errors = 0  # of steps that are not the pool's own
        self._idle_callback: Callable[[], Any] | None = None
        rules = overdue or Overdue(), max_attempts, hang_timeout, start_timeout
        self._schedule = Schedule(num_workers, backend.spare_capacity, *rules)
        ended = "the pool's watcher ended, so nobody would replace workers that hang"
        self._watcher = Watcher(
            "nercc-scheduler", self._look, end=lambda: self._break(ended), clock=clock
        )
        with self._event() as state:
            for worker in range(num_workers):
                state.start(worker, clock.now())
        if (reason := self._wait_for_workers(least)) is not None:
            AbstractPool.close(self)
            raise RuntimeError(reason)
        with self._lock:  # sorted, so that a seed means the same in each run
            state.available = dict.fromkeys(sorted(state.available))

    def _wait_for_workers(self, least: int) -> str | None:
        """Wait until enough workers are ready; return why they are not, if they cannot be."""
        state, begin = self._schedule, self.clock.now()
        end, warn_at = begin + state.start_timeout, begin + 10.0
        while True:
            now = self.clock.now()
            with self._lock:
                ready = sum(slot.ready for slot in state.slots)
                if ready >= least:
                    return None
                started = f"{ready} of {self.num_workers} workers started"
                failed = max(slot.failed_starts for slot in state.slots) >= _STARTS
                if failed or self._trouble:
                    return f"{started}; {self._trouble or state.start_trouble}"
                if now < min(warn_at, end):
                    self.clock.wait(self._changed, min(warn_at, end) - now)
                    continue
            missing = self._backend.missing()  # without the lock: it takes its time
            if now >= end:
                late = f"the others had not after {state.start_timeout} s"
                return f"{started}; {missing or state.start_trouble or late}"
            warn_at = now + 10.0
            if missing is not None:
                _LOG.warning("%d of %d workers are ready: %s", ready, self.num_workers, missing)

    def __reduce__(self) -> Any:
        raise TypeError(
            f"a {type(self).__name__} cannot be sent to another process, which Ray's tasks and Ray "
            "Data's map_batches would do: call it from here; for rows of a dataset there is "
            "nercc_jax.rows.map_rows"
        )

    def dispatch(
        self,
        coded: PyTree[Shaped[Array | np.ndarray, "num_points batch ..."]],
        *,
        kinds: Sequence[int] | None = None,
        needed: int | None = None,
        copies: int = 2,
    ) -> Batch:
        """Send each coded data point, a batch for one worker's model, and return at once.

        Args:
            coded: Coded data points; a pytree's leaves share the first two axes.
            kinds: Which of the pool's models each runs; 0 is the served one (default: all 0).
            needed: Answers that are enough (default: all). Beyond that number nothing is sent to a
                worker that could do something else.
            copies: How many workers may have the same coded data point, if the first is overdue and
                the batch lacks answers.

        Returns:
            A batch to wait for.

        Raises:
            ValueError: If the pool is closed, or a number does not fit.
            RuntimeError: If the pool is broken (`trouble`).
        """
        leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, coded))
        leads = {leaf.shape[:2] for leaf in leaves}
        if len(leads) != 1 or len(min(leads)) < 2 or 0 in min(leads):
            shapes = ", ".join(str(leaf.shape) for leaf in leaves)
            raise ValueError(
                f"coded data points are (num_points, batch, ...), not of shape {shapes}"
            )
        each = [jax.tree.unflatten(structure, parts) for parts in zip(*leaves, strict=True)]
        batch = self.open(len(each), needed=needed, copies=copies)
        self.send(batch, range(len(each)), each, kinds=kinds)
        return batch

    def open(
        self,
        num_points: int,
        *,
        needed: int | None = None,
        copies: int = 2,
        at_once: int = 1,
        on_change: Callable[[Batch], Any] | None = None,
        overdue: Overdue | None = None,
        refuse: Refuse = refuse_odd,
    ) -> Batch:
        """Open a batch whose coded data points are sent one after the other, by `send`.

        A client that waits for more answers than `needed` may have to wait for stragglers: the rest
        is only sent if a worker is idle at once, or something is overdue.

        Args:
            num_points: Coded data points, in all.
            needed: As in `dispatch`.
            copies: As in `dispatch`.
            at_once: Workers that compute each coded data point from the start, if so many are idle.
                When it is overdue, as many copies follow as the rule says (`Overdue.copies`).
            on_change: Called with the batch after each answer or failure, from one of the pool's
                threads. It must be quick, and must not wait for the batch.
            overdue: When this batch's coded data points are overdue (default: the pool's rule).
            refuse: Returns why an answer cannot be used, in which case the worker has failed
                (default: answers that are not finite floats).
        """
        times = self._schedule.times.under(overdue)
        return Batch(self, num_points, needed, copies, at_once, times, on_change, refuse)

    def send(
        self,
        batch: Batch,
        points: Sequence[int],
        values: Iterable[PyTree],
        *,
        kinds: Sequence[int] | None = None,
        avoid: Iterable[int] = (),
    ) -> None:
        """Send some coded data points of an open batch.

        Args:
            batch: From `open`.
            points: Their places in the batch.
            values: Inputs (batch, ...) for each.
            kinds: As in `dispatch`.
            avoid: Workers that must not get them.

        Raises:
            ValueError: If the batch has been forgotten, a point was sent before or does not exist,
                or the pool is closed.
            RuntimeError: If the pool is broken (`trouble`).
        """
        kinds = [0] * len(points) if kinds is None else kinds
        tasks = []
        for point, kind, value in zip(points, kinds, values, strict=True):
            size, given = len(arrays_of(value)[0]), self.clock.now()
            value = self._backend.prepare(cast_floats(value, self.worker_dtype))
            tasks.append(Task(batch, point, kind, value, size, given, frozenset(avoid)))
        with self._event() as state:
            if self._trouble is not None:
                error = ValueError if self._trouble == _CLOSED else RuntimeError
                raise error(f"{self._trouble}: make a new one")
            if any(not 0 <= kind < self._num_models for kind in kinds):
                raise ValueError(
                    f"the workers of this pool run {self._num_models} model(s), but "
                    f"{max(kinds) + 1} are asked for: give the pool all models of the code, served "
                    "one first"
                )
            state.add(batch, tasks, self.clock.now())

    def forget(self, batch: Batch) -> None:
        """Drop what a batch has not sent, and ignore answers that still come: `Batch.forget`."""
        with self._lock:
            batch.end()
            self._schedule.forget(batch)

    def fence(self, workers: Iterable[int]) -> None:
        """Send these workers nothing, until the next call."""
        with self._event() as state:
            state.fence(frozenset(workers), self.clock.now())

    def report(self) -> PoolReport:
        """Return counts of what the pool has seen so far, and the state of its workers."""
        with self._lock:
            errors = self._errors + self._watcher.errors
            return self._schedule.report(self.clock.now(), errors)

    def calls(self) -> list[Call]:
        """Return the latest 4,096 calls that were answered, or given up as hanging.

        Each is of `size` data points, was sent at `sent` by the pool's clock, in seconds, to
        `worker`, and took `seconds`; if the worker hung, as long as it was given.
        """
        with self._lock:
            return list(self._schedule.calls)

    @property
    def trouble(self) -> str | None:
        """Why no answer will come any more; None where the pool works.

        The pool is closed, or one of its own threads failed. All that was open has then failed, and
        what is sent is refused. Workers that die, hang or do not start are replaced instead.
        """
        return self._trouble

    @property
    def alarm(self) -> str | None:
        """The fault that will end the pool unless it is repaired; None where all is well."""
        return None if self._head is None else self._head.alarm

    @property
    def ends_at(self) -> float:
        """The monotonic time at which `alarm` ends this process; infinite where it does not."""
        return math.inf if self._head is None else self._head.ends_at

    @property
    def ending(self) -> str | None:
        """Why a run must end now: something else ends its process within ten seconds; else None."""
        soon = self.ends_at - time.monotonic() < 10.0
        return "stopped before Ray ends this process, whose head is gone" if soon else None

    @property
    def heartbeat(self) -> float:
        """The monotonic time at which the pool last looked after its workers: once a second."""
        return self._watcher.heartbeat

    @property
    def idle(self) -> int:
        """The number of workers without a task, at this moment."""
        return self._schedule.idle

    @property
    def spare(self) -> float:
        """The number of idle workers that could run without slowing down busy ones.

        Threads share their host's cores; overdue tasks are not counted as work. Infinite where
        workers share nothing: then waiting tasks slow down no other, either.
        """
        return self._schedule.spare

    def on_idle(self, callback: Callable[[], Any]) -> None:
        """Have `callback()` called whenever a worker is left without a task: one listener a pool.

        It is called from one of the pool's threads, as `on_change` is, and must be as quick.
        """
        self._idle_callback = callback

    def close(self) -> None:
        """End the workers. Whoever still waits gets the answers that are in."""
        with self._lock:
            if self._trouble == _CLOSED:
                return
            self._trouble = _CLOSED
            for batch in list(self._schedule.batches):
                self._schedule.give_up(batch, "the pool was closed")
        self._watcher.close()
        self._backend.close()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # Events, and what follows from them.

    @contextlib.contextmanager
    def _event(self) -> Iterator[Schedule]:
        """Hold the lock for a change of the state; then carry out what follows, without it.

        Lives begin under the lock, so that none begins once the pool is closed.
        """
        with self._lock:
            state = self._schedule
            yield state
            for start in [each for each in state.todo if isinstance(each, StartLife)]:
                what = f"starting worker {start.worker}"
                error = self._run(what, self._backend.start, *start, self._on_outcome)
                if error is not None:
                    state.handle(start.worker, error, self.clock.now())
            todo, state.todo = state.todo, []
            earlier, state.earlier = state.earlier, False
            self._changed.notify_all()
        for each in todo:
            if isinstance(each, SendTask):
                what = f"sending to worker {each.worker}"
                error = self._run(what, self._backend.send, *each)
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

        def handle() -> None:
            nonlocal free
            with self._event() as state:
                if self._trouble is None and life == state.slots[worker].life:  # not over
                    state.handle(worker, outcome, self.clock.now())
                    free = state.idle > 0

        free, what = False, f"handling an outcome of worker {worker}"
        error = self._run(what, handle)
        if error is not None:  # the records may be wrong, which nothing else would notice
            self._break(f"{what} failed: {reason_of(error)}")
        elif free and self._idle_callback is not None:
            self._run("on_idle", self._idle_callback)

    def _look(self) -> float:
        with self._event() as state:
            if self._trouble is not None:
                return math.inf
            state.due = -math.inf  # until it has looked, the watcher need not be woken
            state.tick(self.clock.now())
            return state.due

    def _break(self, reason: str) -> None:
        """Fail all that is open at once: nothing more can be answered."""
        with self._lock:
            if self._trouble is not None:
                return
            self._trouble = f"this pool is broken: {reason}"
            batches = list(self._schedule.batches)
            for batch in batches:
                self._run("giving up a batch", self._schedule.give_up, batch, self._trouble)
            self._changed.notify_all()
        for batch in batches:
            self._notify(batch)

    def _notify(self, batch: Batch) -> None:
        on_change = batch.on_change  # None once the batch is forgotten
        if on_change is not None:
            self._run(f"on_change of a batch of {batch.num_points}", on_change, batch)

    def _run(self, what: str, step: Callable[..., Any], *arguments: Any) -> Exception | None:
        """Run a step that may fail; log and count the exception that it raised, and return it."""
        try:
            step(*arguments)
        except Exception as error:
            with self._lock:
                self._errors += 1
            _LOG.exception("%s failed", what)
            return error
        return None
