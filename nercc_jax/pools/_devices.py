"""A pool of threads on the devices of this process."""

import math
import os
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
from jax.typing import DTypeLike
from jaxtyping import PyTree

from ..arrays import check_count
from ..inference import current_conditions
from ..inference.models import Model, check_worker_dtype
from ._faults import Faults
from ._pool import AbstractPool
from .backend import OnOutcome, WorkerBackend, WorkerDied
from .batch import reason_of
from .times import Overdue
from .worker import Device, Examples, Program, Worker, as_models, warm_up

_LAST_CALL = 1.0  # seconds for which closing waits for in-flight calls


class DevicePool(AbstractPool):
    """A pool of threads, assigned to the devices of this process in round-robin order.

    Several workers may share a device, and then share its copy of the model. A device runs calls in
    the order in which it gets them, so workers on one accelerator are slow together. A thread
    cannot be killed: one that hangs is abandoned, and a new thread replaces it.

    The constructor starts the workers, and waits until all of them are ready.

    Args:
        model: Any callable on a batch of floats, (B, ...) to (B, ...); or several, the served one
            first, for a code whose workers run further models (`AbstractCode.worker_models`).
        num_workers: The number of workers.
        devices: The devices that they use (default: `jax.local_devices()`).
        example: A batch as a worker will get it, (B, ...), or several: every program is compiled
            for them before the pool is ready. Without it, the first batches wait for compilation.
        compiled: Whether to compile the model; False for one that is not a JAX function.
        worker_dtype: The dtype in which workers compute, "bfloat16" or another floating dtype of up
            to 32 bits. Inputs are cast before they are sent, and the models' arrays once, as
            `cast_model` describes. Answers are float32. Data points that are run again are computed
            in this dtype, too.
        faults: Faults to inject on purpose.
        overdue: The rule for when a task is overdue (default: `Overdue()`).
        max_attempts: The most times that a coded data point is sent, if it fails.
        hang_timeout: Seconds after which a worker that has not answered is replaced.
        start_timeout: Seconds within which all workers must be ready.

    Raises:
        ValueError: If a number is not positive, or a model cannot be cast.
        RuntimeError: If a model does not run on the example.

    Example:
        >>> import jax.numpy as jnp
        >>> from nercc_jax import NeRCC, pool_inference
        >>> with DevicePool(jnp.tanh, 6) as pool:
        ...     predictions = pool_inference(pool, NeRCC(4, 6))(jnp.ones((4, 3)), 5, deadline=60.0)
        >>> predictions.shape
        (4, 3)
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
        devices = list(jax.local_devices() if devices is None else devices)
        num_workers = check_count("num_workers", num_workers)
        models = as_models(model, worker_dtype)
        self.worker_dtype = check_worker_dtype(worker_dtype)
        platforms = {device.platform for device in devices[:num_workers]}
        platform = platforms.pop() if len(platforms) == 1 else "several"
        self.conditions = current_conditions(worker_dtype, platform)
        programs = [Program(models, device, compiled) for device in devices[:num_workers]]
        warm_up(programs, len(models), example)
        faults = faults or Faults()
        # Threads share a CPU's cores. With injected faults they simulate separate machines instead.
        cores = math.inf
        if compiled and platform == "cpu" and not faults.faults:
            here = hasattr(os, "sched_getaffinity")  # those that this process may use
            cores = float(len(os.sched_getaffinity(0)) if here else os.cpu_count() or 1)
        self._begin(
            _ThreadBackend(programs, faults, cores),
            num_workers,
            len(models),
            overdue=overdue,
            max_attempts=max_attempts,
            hang_timeout=hang_timeout,
            start_timeout=start_timeout,
        )


class _Death(BaseException):
    """An exception that ends a worker's thread without an answer, as SIGKILL ends a process."""


class _ThreadBackend(WorkerBackend):
    """A backend with one thread for each worker, each with a queue of at most one task.

    All threads share `cores` CPU cores; infinity means that they do not slow each other down.
    """

    def __init__(self, programs: Sequence[Program], faults: Faults, cores: float):
        self._programs, self._faults, self._cores = programs, faults, cores
        # By worker: its life, its thread, its queue, and the event that tells it to end.
        self._lives: dict[int, tuple[int, threading.Thread, queue.SimpleQueue, Any]] = {}

    def start(self, worker: int, life: int, on_outcome: OnOutcome) -> None:
        self._end(worker)
        inbox, ended = queue.SimpleQueue(), threading.Event()

        def die() -> NoReturn:
            raise _Death

        def live() -> None:
            """Answer batches until the worker is ended."""
            end = "its thread ended"
            try:
                program = self._programs[worker % len(self._programs)]
                run = Worker(program, self._faults.at(worker, life), die, ended.wait)
                with program.at_home():
                    on_outcome(worker, life, None)
                    while (item := inbox.get()) is not None and not ended.is_set():
                        try:
                            outcome = run(*item)
                        except Exception as error:  # it concerns this task only
                            outcome = error
                        on_outcome(worker, life, outcome)
                        del outcome, item  # free them: the next task may not come soon
            except _Death:
                pass
            except BaseException as error:  # for example SystemExit from the model
                end += f": {reason_of(error)}"
            finally:  # the pool ignores it if the worker was ended
                on_outcome(worker, life, WorkerDied(end))

        thread = threading.Thread(target=live, name=f"nercc-worker-{worker}", daemon=True)
        self._lives[worker] = life, thread, inbox, ended
        thread.start()

    def send(self, worker: int, life: int, kind: int, batch: PyTree) -> None:
        there, _, inbox, _ = self._lives[worker]
        if there == life:  # otherwise that life is over, and the scheduler knows it
            inbox.put((kind, batch))

    def spare_capacity(self, busy: int) -> float:
        return self._cores - busy

    def close(self) -> None:
        for worker in self._lives:
            self._end(worker)
        end = time.monotonic() + _LAST_CALL
        for _, thread, *_ in self._lives.values():
            thread.join(max(end - time.monotonic(), 0.0))

    def _end(self, worker: int) -> None:
        """Tell a worker's thread to end after its present call; do not wait for it."""
        if worker in self._lives:
            _, _, inbox, ended = self._lives[worker]
            ended.set()
            inbox.put(None)
