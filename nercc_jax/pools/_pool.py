"""The interface of all pools: coded data points go out, answers and a mask come back.

A `Schedule` makes the decisions, and a `Runner` carries them out on a backend.
"""

import abc
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree, Shaped

from ..inference.models import cast_floats
from ._runner import CLOSED, Runner
from ._schedule import Schedule, report_of
from .backend import PoolReport, WorkerBackend
from .batch import Batch, Refuse, Task, arrays_of, refuse_odd
from .clock import AbstractClock
from .times import Call, Overdue


class AbstractPool(abc.ABC):
    """Independent workers that run the same models; the first answers to arrive are decoded.

    Any worker can compute any coded data point, one at a time. So a pool may have more workers than
    a code (spare ones), or fewer (each then computes several). The scheduling rules are at the top
    of `_schedule.py`. A pool holds threads or processes: `close` it, or use it as a context
    manager. Every method may be called from any thread.

    To support another kind of worker, write a subclass whose constructor calls `_begin`.

    Attributes:
        num_workers: The number of workers, including dead ones that are being replaced.
        clock: The clock of the pool, and of a server on it.
        worker_dtype: The dtype that coded data points are cast to before they are sent; None: no
            cast.
        conditions: The precision and platform of the workers, to compare calibrations with.
    """

    num_workers: int
    clock: AbstractClock
    worker_dtype: str | None = None
    conditions: str = ""
    _runner: Runner
    _schedule: Schedule
    _num_models: int
    _head: Any = None  # the head of the workers' Ray cluster (`ray_cluster.Head`)

    def _begin(
        self, backend: WorkerBackend, num_workers: int, num_models: int, **rules: Any
    ) -> None:
        """Start the workers, and wait until enough of them are ready.

        Args:
            backend: The backend, which is closed if too few workers start.
            num_workers: The number of workers.
            num_models: The number of models that each worker runs.
            **rules: `overdue`, `max_attempts`, `hang_timeout` and `start_timeout`, as for
                `DevicePool`; `min_workers`, how many workers are enough (default: all); and the
                `clock` (default: the computer's).

        Raises:
            ValueError: If a number does not fit.
            RuntimeError: If too few workers start.
        """
        self._runner = Runner(backend, num_workers, **rules)
        self.clock, self._schedule = self._runner.clock, self._runner.schedule
        self.num_workers, self._num_models = len(self._schedule.slots), num_models

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
        """Send each coded data point to one worker, as a batch for its model; return at once.

        Args:
            coded: Coded data points; a pytree's leaves share the first two axes.
            kinds: For each, the number of the model that runs it; 0 is the served model (default:
                all 0).
            needed: The number of answers that is enough (default: all). Further coded data points
                are only sent if a worker is idle at once, or something is overdue.
            copies: The most workers that may have the same coded data point. Copies are sent if it
                is overdue and the batch lacks answers.

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
        """Open a batch whose coded data points are sent later, by one or more calls of `send`.

        A client that waits for more than `needed` answers may have to wait for stragglers, since
        further coded data points are not always sent (see `dispatch`).

        Args:
            num_points: The number of coded data points.
            needed: As in `dispatch`.
            copies: As in `dispatch`.
            at_once: Workers that compute each coded data point from the start, if that many are
                idle. Once it is overdue, `Overdue.copies` more may get it.
            on_change: Called with the batch after each answer or failure, from one of the pool's
                threads. It must be fast, and must not wait for the batch.
            overdue: The rule for when coded data points are overdue (default: the pool's rule).
            refuse: Returns why an answer cannot be used, or None. An answer that cannot be used
                counts as a failure (default: unless it consists of finite floats).
        """
        times = self._schedule.times.under(overdue)
        return Batch(self._runner, num_points, needed, copies, at_once, times, on_change, refuse)

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
            batch: A batch from `open`.
            points: The numbers of the coded data points, from 0 to `num_points` - 1.
            values: The inputs (batch, ...) of each.
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
            value = self._runner.backend.prepare(cast_floats(value, self.worker_dtype))
            tasks.append(Task(batch, point, kind, value, size, given, frozenset(avoid)))
        with self._runner.event() as state:
            if self.trouble is not None:
                error = ValueError if self.trouble == CLOSED else RuntimeError
                raise error(f"{self.trouble}: make a new one")
            if any(not 0 <= kind < self._num_models for kind in kinds):
                raise ValueError(
                    f"the workers of this pool run {self._num_models} model(s), but "
                    f"{max(kinds) + 1} are asked for: give the pool all models of the code, served "
                    "one first"
                )
            state.add(batch, tasks, self.clock.now())

    def fence(self, workers: Iterable[int]) -> None:
        """Send these workers no tasks, and all others again, until the next call of `fence`."""
        with self._runner.event() as state:
            state.fence(frozenset(workers), self.clock.now())

    def report(self) -> PoolReport:
        """Return counts of tasks and failures so far, and the state of the workers."""
        with self._runner.lock:
            errors = self._runner.errors + self._runner.watcher.errors
            return report_of(self._schedule, self.clock.now(), errors)

    def calls(self) -> list[Call]:
        """Return the latest 4,096 calls whose answers could be used, or that hung.

        Each had `size` data points, was sent to `worker` at time `sent` of the pool's clock, and
        took `seconds`: if the worker hung, until it was given up.
        """
        with self._runner.lock:
            return list(self._schedule.calls)

    @property
    def trouble(self) -> str | None:
        """The reason why the pool gives no more answers; None while it works.

        It is closed, or one of its own threads failed. Open tasks have then failed, and `send`
        raises. Workers that die, hang or do not start are no such trouble: they are replaced.
        """
        return self._runner.trouble

    @property
    def alarm(self) -> str | None:
        """The fault that will end the pool unless it is repaired; None without one."""
        return None if self._head is None else self._head.alarm

    @property
    def ends_at(self) -> float:
        """The monotonic time at which Ray ends this process after an `alarm`; infinite if never."""
        return math.inf if self._head is None else self._head.ends_at

    @property
    def ending(self) -> str | None:
        """The reason to end a run now: Ray ends this process within ten seconds; else None."""
        soon = self.ends_at - time.monotonic() < 10.0
        return "stopped before Ray ends this process, whose head is gone" if soon else None

    @property
    def heartbeat(self) -> float:
        """The time, by `clock`, of the pool's last check of its workers; at least once a second."""
        return self._runner.watcher.heartbeat

    @property
    def idle(self) -> int:
        """The number of workers without a task that may get one, at this moment."""
        return self._schedule.idle

    @property
    def spare(self) -> float:
        """The number of idle workers that could run without slowing down busy ones.

        Threads share their host's cores; overdue tasks do not count as busy. Infinite, even if no
        worker is idle, where workers do not slow each other down.
        """
        return self._schedule.spare

    def on_idle(self, callback: Callable[[], Any]) -> None:
        """Call `callback()` whenever a worker is left without a task; it replaces an earlier one.

        It is called from one of the pool's threads, as `on_change` is, and must be as fast.
        """
        self._runner.on_idle = callback

    def close(self) -> None:
        """End the workers. Waits that are in progress return the answers that have arrived."""
        self._runner.close()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()
