"""A pool of Ray actors, on one machine or a cluster."""

import collections
import concurrent.futures
import dataclasses
import functools
import gc
import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.typing import DTypeLike
from jaxtyping import PyTree

from ..codes.kept import x64_enabled
from ..inference import current_conditions
from ..inference.models import Model, check_worker_dtype, matmul_precision
from ._faults import Faults
from ._payload import EncodedInputs, pack
from ._pool import AbstractPool
from .backend import OnOutcome, WorkerBackend, WorkerDied
from .batch import arrays_of
from .ray_cluster import Head, join_ray, ray_module
from .worker import Examples, Program, Worker, as_models, warm_up

_LOG = logging.getLogger(__name__)


class RayPool(AbstractPool):
    """A pool of Ray actors: separate processes, each with JAX and the models loaded.

    Workers share nothing, so a slow or dead one does not delay others. A death is noticed at once,
    whether the worker has a task or not, and a new actor replaces the worker. Ray spreads workers
    over the nodes as they start. Weights and large data points exist once on a node, however many
    workers use them.

    The pool uses the Ray that this process is connected to. Otherwise it connects to the Ray at
    `address`, at RAY_ADDRESS, or on this machine, and starts one here if there is none. The process
    stays connected until it ends, or until `ray.shutdown()`. Models are sent to the actors by
    pickle, including classes and functions of a script or a notebook.

    Further arguments are as for `DevicePool`, and so are the `rules`: `overdue`, `max_attempts` and
    `hang_timeout`.

    Args:
        address: The address of Ray's head: "HOST:6379"; "ray://HOST:10001" from outside of the
            cluster; "auto" for the Ray that runs on this machine; or "local" for a new one.
        runtime_env: Ray's runtime environment for all workers; `{"working_dir": FOLDER}` sends a
            folder to them.
        actor_options: Ray's `num_cpus`, `num_gpus`, `resources` and so on. By default a worker
            reserves at most half a CPU and, if the cluster has GPUs, one GPU or an equal part of
            one and of its memory. `scheduling_strategy` places the workers (default: "SPREAD").
        min_workers: Workers to wait for (default: all); the others join while the pool runs.
        start_timeout: Seconds within which `min_workers` must be ready.

    Raises:
        ImportError: Without Ray.
        ConnectionError: If there is no Ray at the address.
        RuntimeError: If too few workers start, for example because a model does not run on the
            example.
        ValueError: If a number does not fit.

    Example:
        ```text
        with RayPool(model, 8, example=x[:1]) as pool:
            predictions = pool_inference(pool, code)(x, 7, deadline=5.0)
        ```
    """

    def __init__(
        self,
        model: Model | Sequence[Model],
        num_workers: int,
        *,
        example: Examples = None,
        compiled: bool = True,
        worker_dtype: DTypeLike | None = None,
        address: str | None = None,
        runtime_env: Mapping[str, Any] | None = None,
        actor_options: Mapping[str, Any] | None = None,
        faults: Faults | None = None,
        start_timeout: float = 300.0,
        min_workers: int | None = None,
        **rules: Any,
    ):
        models = as_models(model, worker_dtype)
        self.worker_dtype = check_worker_dtype(worker_dtype)
        self._head = join_ray(address, runtime_env)
        self._backend = ActorBackend(
            pack((models, example, compiled, faults or Faults())),
            (x64_enabled(), matmul_precision()),
            worker_options(actor_options or {}, num_workers),
            self._head,
        )
        self._begin(
            self._backend,
            num_workers,
            len(models),
            start_timeout=start_timeout,
            min_workers=min_workers,
            **rules,
        )
        places = list(self._backend.places.values())
        platforms = {place.platform for place in places}
        platform = platforms.pop() if len(platforms) == 1 else "several"
        self.conditions = current_conditions(worker_dtype, platform)
        held = sorted(collections.Counter(place.node for place in places).values(), reverse=True)
        _LOG.info("workers on %d node(s): %s", len(held), ", ".join(map(str, held)))

    def nodes(self) -> list[str | None]:
        """Return the Ray node id of each worker; None while it starts or is replaced."""
        places = map(self._backend.places.get, range(self.num_workers))
        return [place and place.node for place in places]


def worker_options(options: Mapping[str, Any], num_workers: int) -> dict[str, Any]:
    """Return an actor's options, with defaults for CPUs and GPUs.

    If the cluster has GPUs, each worker gets one, or an equal part of one and of its memory.
    """
    ray = ray_module()
    found = dict(options)
    if "num_cpus" not in found:
        # At most four fifths of the free CPUs in total, so that other work finds some.
        free = 0.8 * ray.available_resources().get("CPU", 0.0) / num_workers
        found["num_cpus"] = min(0.5, math.floor(100 * free) / 100)
    gpus = ray.cluster_resources().get("GPU", 0.0)
    if gpus and "num_gpus" not in found:
        sharing = math.ceil(num_workers / gpus)
        found["num_gpus"] = math.floor(1e4 / sharing) / 1e4 if sharing > 1 else 1
    if 0 < found.get("num_gpus", 0) < 1:
        environment = dict(found.get("runtime_env") or {})
        # A GPU's workers get nine tenths of its memory; XLA and the driver need the rest.
        share = f"{0.9 * found['num_gpus']:.3f}"
        variables = {"XLA_PYTHON_CLIENT_MEM_FRACTION": share}
        environment["env_vars"] = variables | dict(environment.get("env_vars") or {})
        found["runtime_env"] = environment
    return found


# The code that runs in an actor's process.


@dataclasses.dataclass(frozen=True)
class Placement:
    """The platform of a worker's JAX, and the id of its Ray node."""

    platform: str
    node: str


class Actor:
    """A worker in a Ray process, which is ready when `load` has returned."""

    def load(
        self, load: EncodedInputs, precision: tuple[Any, Any], worker: int, life: int
    ) -> Placement:
        x64, products = precision
        jax.config.update("jax_enable_x64", x64)
        jax.config.update("jax_default_matmul_precision", products)
        ray = ray_module()
        try:
            models, example, compiled, faults = load.unpack()
        except ImportError as error:
            node = f"node {ray.util.get_node_ip_address()}"
            raise RuntimeError(cannot_import(str(error), node)) from error
        self._program = Program(models, jax.local_devices()[0], compiled)
        warm_up([self._program], len(models), example)
        faults = faults.at(worker, life)
        self._worker = Worker(self._program, faults, lambda: os.kill(os.getpid(), signal.SIGKILL))
        gc.collect()
        gc.freeze()  # otherwise a full collection stops all threads and visits all compiled code
        node = ray.get_runtime_context().get_node_id()
        return Placement(jax.default_backend(), node)

    def run(self, kind: int, batch: PyTree) -> PyTree:
        with self._program.at_home():
            return self._worker(kind, batch)

    def wait_for_death(self) -> None:
        """Block for ever, so that the call fails when this process dies."""
        threading.Event().wait()


def cannot_import(reason: str, where: str) -> str:
    """Return a message for a worker that cannot import what it needs."""
    return (
        f"a worker cannot import what it needs on {where}: {reason}. Install it there, or send it "
        "along: runtime_env={'working_dir': FOLDER} of RayPool or ray.init, or `nercc`'s "
        "--runtime-env"
    )


class ActorBackend(WorkerBackend):
    """A backend with one actor for each life of a worker; Ray reports outcomes through futures.

    Futures' callbacks run in Ray's threads, where creating or killing an actor would deadlock, so a
    thread of this class does that. Ray must not restart actors (`max_restarts=0`): it would report
    a death after 1.5 s instead of 0.01 (measured), and the scheduler has to replace workers that
    hang or cannot load anyway.

    Attributes:
        places: The placements of the workers that are ready, by worker.
    """

    def __init__(
        self,
        load: EncodedInputs,
        precision: tuple[Any, Any],
        options: Mapping[str, Any],
        head: Head,
    ):
        """Prepare the creation of actors.

        Args:
            load: The packed models, example batches, whether to compile the models, and faults.
            precision: The workers' `jax_enable_x64` and `jax_default_matmul_precision`.
            options: Ray's options for each actor.
            head: The cluster's head, without which actors can be neither created nor killed.
        """
        ray = ray_module()
        self._load, self._precision, self._head = ray.put(load), precision, head
        named = {"CPU": options.get("num_cpus"), "GPU": options.get("num_gpus")}
        named |= {"memory": options.get("memory"), **(options.get("resources") or {})}
        self._demand = {name: float(amount) for name, amount in named.items() if amount}
        options = {"scheduling_strategy": "SPREAD", **options}
        # Two threads: one for tasks, and one for `wait_for_death`.
        self._make: Any = ray.remote(max_concurrency=2, max_restarts=0, **options)(Actor)
        self._actors: dict[int, tuple[int, Any, OnOutcome]] = {}  # with their lives, by worker
        self.places: dict[int, Placement] = {}
        self._pending: set[Any] = set()  # Ray's futures that are not done
        self._starts = concurrent.futures.ThreadPoolExecutor(1, "nercc-ray")

    def start(self, worker: int, life: int, on_outcome: OnOutcome) -> None:
        self.places.pop(worker, None)
        self._starts.submit(self._start, worker, life, on_outcome)

    def _start(self, worker: int, life: int, on_outcome: OnOutcome) -> None:
        def loaded(future: Any) -> None:
            error = future.exception()
            if error is None:
                if self._actors[worker][0] == life:
                    self.places[worker] = future.result()
                self._when_done(actor.wait_for_death.remote(), died)
                return on_outcome(worker, life, None)
            # In Ray's long message the reason is the last line.
            reason, cause = str(error).strip().splitlines()[-1], getattr(error, "cause", None)
            if isinstance(cause, Exception):
                reason = str(cause)
            elif "failed to import on the worker" in str(error):
                reason = cannot_import(f"nercc_jax ({reason})", "its node")
            on_outcome(worker, life, RuntimeError(reason))

        def died(future: Any) -> None:
            if not future.cancelled():
                on_outcome(worker, life, _result(future))

        try:
            if worker in self._actors:
                ray_module().kill(self._actors[worker][1])
            actor = self._make.remote()
            self._actors[worker] = life, actor, on_outcome
            ready = actor.load.remote(self._load, self._precision, worker, life)
            self._when_done(ready, loaded)
        except Exception as error:
            on_outcome(worker, life, error)

    def prepare(self, batch: PyTree) -> Any:
        # Ray stores an argument over 100 kB again for each call; this stores it only once.
        if sum(leaf.nbytes for leaf in arrays_of(batch)) > 100_000:
            return functools.cache(lambda: ray_module().put(batch))
        return lambda: batch

    def send(self, worker: int, life: int, kind: int, batch: Any) -> None:
        there, actor, on_outcome = self._actors[worker]
        if there != life:
            return  # the worker died meanwhile, and the scheduler has moved the task
        answer = actor.run.remote(kind, batch())
        self._when_done(answer, lambda future: on_outcome(worker, life, _result(future)))

    def _when_done(self, answer: Any, callback: Callable[[Any], None]) -> None:
        future = answer.future()
        self._pending.add(future)
        future.add_done_callback(callback)
        future.add_done_callback(self._pending.discard)

    def missing(self) -> str | None:
        if self._head.alarm:
            return "Ray's head does not answer"
        waiting, free = len(self._actors) - len(self.places), ray_module().available_resources()
        short = [
            f"{name}: {waiting * amount:g} needed, {free.get(name, 0):g} free"
            for name, amount in self._demand.items()
            if amount > free.get(name, 0) + 1e-6
        ]
        if not waiting or not short:
            return None
        each = ", ".join(f"{name} {amount:g}" for name, amount in self._demand.items())
        return f"{waiting} take {each} each; in the whole cluster {'; '.join(short)}"

    def close(self) -> None:
        gone = self._head.alarm is not None
        self._starts.shutdown(wait=not gone, cancel_futures=True)
        if not gone:  # otherwise Ray's nodes end the actors, as they do when a driver dies
            for _, actor, _ in self._actors.values():
                ray_module().kill(actor)
            # Wait until their calls have failed: Ray ends a process that learns of this only after
            # `ray.shutdown`.
            concurrent.futures.wait(tuple(self._pending), timeout=5.0)


def _result(future: Any) -> Any:
    """Return a future's answer or exception, in the form that `on_outcome` takes."""
    from ray.exceptions import RayActorError, RayTaskError

    try:
        return future.result()
    except concurrent.futures.CancelledError:
        return WorkerDied("Ray gave the call up")
    except RayTaskError as error:
        return error.cause if isinstance(error.cause, Exception) else error
    except RayActorError as error:
        return WorkerDied(f"its process is gone ({type(error).__name__})")
    except Exception as error:
        return error
