"""A pool of Ray actors, on one machine or a cluster."""

import concurrent.futures
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.typing import DTypeLike
from jaxtyping import PyTree

from ..codes import x64_enabled
from ..inference import UNKNOWN, Model, check_worker_dtype, current_conditions, matmul_precision
from ._crew import AbstractCrew, WorkerDied
from ._desk import Desk
from ._faults import Faults
from ._overdue import Overdue
from ._pool import AbstractPool
from ._worker import Examples, Program, Worker, as_models, warm_up


class RayPool(AbstractPool):
    """Workers that are Ray actors: processes of their own, each with JAX and the models loaded.

    Nothing is shared between them, so neither a slow one nor a dead one holds up another. A death
    is noticed at once, whether the worker has something in hand or not, and a new actor takes the
    place. Uses the Ray that this process is connected to (`ray.init(address="auto")` joins a
    cluster), and starts one on this machine, for as long as the pool is open, if there is none.
    """

    def __init__(
        self,
        model: Model | Sequence[Model],
        num_workers: int,
        *,
        example: Examples = None,
        compiled: bool = True,
        worker_dtype: DTypeLike | None = None,
        actor_options: Mapping[str, Any] | None = None,
        faults: Faults | None = None,
        overdue: Overdue | None = None,
        max_attempts: int = 3,
        hang_timeout: float = 60.0,
        start_timeout: float = 300.0,
    ):
        """Starts the workers, and waits until all are ready.

        `actor_options` are Ray's: `num_gpus`, `resources`, `scheduling_strategy`, `runtime_env` and
        so on; a worker takes no CPU from Ray's budget unless they say so. Several workers on a GPU
        need `runtime_env={"env_vars": {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.1"}}` or so: each JAX
        process takes three quarters of the memory otherwise. Everything else as in `DevicePool`;
        the models are sent to the actors by pickle.

        Raises: ImportError without Ray; RuntimeError where not all workers start, for example
        because a model does not run on the example; ValueError for numbers that do not fit.
        """
        ray = _ray()
        owner = not ray.is_initialized()
        if owner:
            _start_ray()
        options = {"num_cpus": 0} | dict(actor_options or {})
        models = as_models(model, worker_dtype)
        self._worker_dtype = check_worker_dtype(worker_dtype)
        precision = x64_enabled(), matmul_precision()
        load = ray.put((models, example, compiled, faults or Faults(), precision))
        self._crew = _Actors(load, options, owner)
        self._desk = Desk(
            self._crew,
            num_workers,
            len(models),
            overdue=overdue or Overdue(),
            max_attempts=max_attempts,
            hang_timeout=hang_timeout,
            start_timeout=start_timeout,
        )
        self._conditions = current_conditions(worker_dtype, self._crew.platform())

    def processes(self) -> list[int | None]:
        """The process id of each worker, on whatever machine it is; None while it is replaced."""
        return self._crew.processes()


_log = logging.getLogger(__name__)

# On a busy machine Ray's head may need longer than Ray waits for it (30 s for its port).
_RAY_STARTS = 3


def _ray():
    try:
        import ray
    except ImportError as error:
        raise ImportError("RayPool needs Ray: pip install 'nercc-jax[ray]'") from error
    return ray


def _init() -> None:
    _ray().init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)


def _start_ray() -> None:
    """Starts a Ray of our own.

    Linux kills Ray's processes when the thread ends that started them, and then Ray ends ours. So
    that is the main thread, or one that does nothing else for good: pools may be made by any.
    """

    def start() -> None:
        with warnings.catch_warnings():
            # Of os.fork, which Ray follows by exec at once: no thread of JAX is missed.
            warnings.simplefilter("ignore", RuntimeWarning)
            for _ in range(_RAY_STARTS - 1):
                try:
                    return _init()
                except Exception as error:
                    _log.warning("Ray did not start, and is started again: %s", _last_line(error))
                    _ray().shutdown()
            _init()

    if threading.current_thread() is threading.main_thread():
        start()
        return
    started: concurrent.futures.Future[None] = concurrent.futures.Future()

    def stay() -> None:
        try:
            start()
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        threading.Event().wait()

    threading.Thread(target=stay, name="nercc-ray", daemon=True).start()
    started.result()


class _Actors(AbstractCrew):
    """An actor a worker. Ray tells of answers and deaths by callbacks on futures.

    Those come from Ray's own threads, in which a call that makes or ends an actor waits for itself:
    a thread of ours does that.
    """

    def __init__(self, load: Any, options: Mapping[str, Any], owner: bool):
        self._load, self._owner = load, owner
        # Two threads: one works, the other only waits, and so tells that the process is alive.
        remote: Any = _ray().remote
        self._make = remote(max_concurrency=2, max_restarts=0, **options)(_Actor)
        self._actors: dict[tuple[int, int], Any] = {}  # by worker and life
        self._hears: dict[int, Callable[[int, int, Any], None]] = {}
        self._pids: dict[int, int] = {}
        self._platforms: dict[int, str] = {}
        self._starts = concurrent.futures.ThreadPoolExecutor(1, "nercc-ray")

    def start(self, worker: int, life: int, hear: Callable[[int, int, Any], None]) -> None:
        self._starts.submit(self._start, worker, life, hear)

    def _start(self, worker: int, life: int, hear: Callable[[int, int, Any], None]) -> None:
        def started(future) -> None:
            outcome = _result(future)
            if isinstance(outcome, Exception):
                hear(worker, life, RuntimeError(_last_line(future.exception())))
                return
            self._pids[worker], self._platforms[worker] = outcome
            hear(worker, life, None)

        def died(future) -> None:
            # Before it was ready, `started` has the reason.
            if worker in self._pids and not future.cancelled():
                hear(worker, life, _result(future))

        try:
            self._kill(worker)
            self._hears[worker] = hear
            self._actors[worker, life] = actor = self._make.remote(self._load, worker, life)
            _when_done(actor.process.remote(), started)
            _when_done(actor.wait_for_death.remote(), died)
        except Exception as error:
            hear(worker, life, error)

    def send(self, worker: int, life: int, kind: int, batch: PyTree) -> None:
        hear = self._hears[worker]
        actor = self._actors.get((worker, life))
        if actor is None:
            return  # it died since, which the desk has heard: the task is another's
        try:
            answer = actor.run.remote(kind, batch)
        except Exception as error:  # Ray itself is gone, for example
            hear(worker, life, WorkerDied(f"it cannot be reached: {error}"))
            return
        _when_done(answer, lambda future: hear(worker, life, _result(future)))

    def close(self) -> None:
        self._starts.shutdown(wait=True, cancel_futures=True)
        for worker in list(self._hears):
            self._kill(worker)
        if self._owner:
            _ray().shutdown()

    def processes(self) -> list[int | None]:
        # Not of `_actors`, which lacks a worker for a moment while it is replaced.
        return [self._pids.get(worker) for worker in sorted(self._hears)]

    def platform(self) -> str:
        """The platform of all workers, where it is one."""
        found = set(self._platforms.values())
        return found.pop() if len(found) == 1 else UNKNOWN

    def _kill(self, worker: int) -> None:
        self._pids.pop(worker, None)
        for one in [one for one in self._actors if one[0] == worker]:
            _ray().kill(self._actors.pop(one))


class _Actor:
    """What runs in a worker's process."""

    def __init__(self, load: Any, worker: int, life: int):
        models, example, compiled, faults, (x64, products) = load
        jax.config.update("jax_enable_x64", x64)
        jax.config.update("jax_default_matmul_precision", products)
        self._program = Program(models, jax.local_devices()[0], compiled)
        warm_up([self._program], len(models), example)
        self._worker = Worker(self._program, faults, worker, life, _die)

    def process(self) -> tuple[int, str]:
        """Answers when the actor is ready: with its process id, and JAX's platform there."""
        return os.getpid(), jax.default_backend()

    def run(self, kind: int, batch: PyTree) -> PyTree:
        with self._program.at_home():
            return self._worker(kind, batch)

    def wait_for_death(self) -> None:
        """Never answers: the caller hears when this process is gone."""
        threading.Event().wait()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _when_done(answer: Any, callback: Callable[[Any], None]) -> None:
    answer.future().add_done_callback(callback)


def _last_line(error: BaseException | None) -> str:
    """Ray puts the reason for which an actor did not start at the end of a page."""
    return str(error).strip().splitlines()[-1]


def _result(future: Any) -> Any:
    """The answer, or the exception in its place, a death as `WorkerDied`."""
    from ray.exceptions import RayActorError, RayTaskError

    if future.cancelled():
        return WorkerDied("Ray gave the call up")
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, RayTaskError):
        return error.cause if isinstance(error.cause, Exception) else error
    if isinstance(error, RayActorError):
        return WorkerDied(f"its process is gone ({type(error).__name__})")
    return error
