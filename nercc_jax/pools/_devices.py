"""A pool of threads on the devices of this process."""

import math
import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.typing import DTypeLike
from jaxtyping import PyTree

from ..inference import UNKNOWN, Model, check_worker_dtype, current_conditions
from ._crew import AbstractCrew, WorkerDied, reason_of
from ._desk import Desk
from ._faults import Faults
from ._overdue import Overdue
from ._pool import AbstractPool
from ._worker import Device, Examples, Program, Worker, as_models, warm_up


class DevicePool(AbstractPool):
    """Workers that are threads, dealt in rounds over the devices of this process.

    Several workers may share a device; its copy of the model is then theirs together. A device
    works on what it is given in its own order, so workers of one accelerator are slow together. A
    thread cannot be killed: one that hangs is left behind, and another takes its place.
    """

    def __init__(
        self,
        model: Model | Sequence[Model],
        num_workers: int,
        *,
        devices: Sequence[Device] | None = None,
        example: Examples = None,
        compiled: bool = True,
        worker_dtype: DTypeLike | None = None,
        faults: Faults | None = None,
        overdue: Overdue | None = None,
        max_attempts: int = 3,
        hang_timeout: float = 60.0,
        start_timeout: float = 120.0,
    ):
        """Starts the workers, and waits until all are ready.

        Args:
            model: any callable on a batch, (B, ...) to (B, ...), floats; or several, for a code
                whose workers run further ones (`AbstractCode.worker_models`), served one first.
            num_workers: how many.
            devices: where they are; `jax.local_devices()` unless given.
            example: a batch as a worker will get it, (B, ...), or several: every program is
                compiled for them before the pool is ready. Without, the first batches wait for the
                compiler.
            compiled: False for a model that is no JAX function.
            worker_dtype: what workers run in, "bfloat16" or another floating dtype of up to 32
                bits: their inputs are cast before they are sent, and the models' arrays once, as
                far as `cast_model` reaches; answers come in float32. The model's own answers, of
                what is run again, are the workers', too.
            faults: what goes wrong on purpose.
            overdue: when a task counts as overdue (`Overdue`).
            max_attempts: how many workers are tried for a coded data point that fails.
            hang_timeout: seconds after which a worker that has not answered is replaced.
            start_timeout: seconds until all workers must be ready.

        Raises: ValueError for numbers that are not positive, and a model that cannot be cast;
        RuntimeError where a model does not
        run on the example.
        """
        devices = list(jax.local_devices() if devices is None else devices)
        models = as_models(model, worker_dtype)
        self._worker_dtype = check_worker_dtype(worker_dtype)
        platforms = {device.platform for device in devices[:num_workers]}
        platform = platforms.pop() if len(platforms) == 1 else UNKNOWN
        self._conditions = current_conditions(worker_dtype, platform)
        programs = [Program(models, device, compiled) for device in devices[:num_workers]]
        warm_up(programs, len(models), example)
        faults = faults or Faults()
        # Faults on purpose let two cores stand for many machines.
        shared = compiled and platform == "cpu" and not faults.faults
        self._desk = Desk(
            _Threads(programs, faults, _cores() if shared else math.inf),
            num_workers,
            len(models),
            overdue=overdue or Overdue(),
            max_attempts=max_attempts,
            hang_timeout=hang_timeout,
            start_timeout=start_timeout,
        )


class _Threads(AbstractCrew):
    """A thread a worker, each with a queue of its own that holds one task at most."""

    def __init__(self, programs: Sequence[Program], faults: Faults, cores: float):
        """`cores`: that all share; infinite where nobody can tell who slows down whom."""
        self._programs, self._faults, self._cores = programs, faults, cores
        self._hands: dict[int, _Hand] = {}

    def start(self, worker: int, life: int, hear: Callable[[int, int, Any], None]) -> None:
        if worker in self._hands:
            self._hands[worker].end()
        program = self._programs[worker % len(self._programs)]
        self._hands[worker] = _Hand(program, self._faults, worker, life, hear)

    def parcel(self, batch: PyTree) -> PyTree:
        return batch

    def send(self, worker: int, life: int, kind: int, batch: PyTree) -> None:
        self._hands[worker].inbox.put((life, kind, batch))

    def room(self, busy: int) -> float:
        return self._cores - busy

    def lacking(self) -> None:
        """Threads start at once."""

    def close(self) -> None:
        for hand in self._hands.values():
            hand.end()
        for hand in self._hands.values():
            hand.thread.join(timeout=1)


class _Death(BaseException):
    """Ends a thread as SIGKILL ends a process: nothing is answered."""


class _Hand:
    """One life of a worker's thread."""

    def __init__(
        self,
        program: Program,
        faults: Faults,
        worker: int,
        life: int,
        hear: Callable[[int, int, Any], None],
    ):
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._ended = threading.Event()
        self._program, self._faults = program, faults
        self._worker, self._life, self._hear = worker, life, hear
        name = f"nercc-worker-{worker}"
        self.thread = threading.Thread(target=self._work, name=name, daemon=True)
        self.thread.start()

    def end(self) -> None:
        """Lets the thread end when it next looks; it is not waited for."""
        self._ended.set()
        self.inbox.put(None)

    def _work(self) -> None:
        end = "its thread ended"
        try:
            worker = Worker(
                self._program, self._faults, self._worker, self._life, _die, self._ended.wait
            )
            with self._program.at_home():
                self._hear(self._worker, self._life, None)
                self._answer(worker)
        except _Death:
            pass
        except BaseException as error:  # a model may have exited
            end += f": {reason_of(error)}"
        finally:  # who was told to end is not listened to
            self._hear(self._worker, self._life, WorkerDied(end))

    def _answer(self, worker: Worker) -> None:
        """Batches as they come, until it is told to end."""
        while (item := self.inbox.get()) is not None and not self._ended.is_set():
            life, kind, batch = item
            if life == self._life:
                self._hear(self._worker, self._life, _outcome(worker, kind, batch))
            del item, batch  # it may be large, and the next may not come soon


def _outcome(worker: Worker, kind: int, batch: PyTree) -> PyTree | Exception:
    try:
        return worker(kind, batch)
    except Exception as error:  # whatever a model raises is that answer's trouble, not the pool's
        return error


def _cores() -> float:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return float(len(os.sched_getaffinity(0)))
    return float(os.cpu_count() or 1)


def _die() -> None:
    raise _Death
