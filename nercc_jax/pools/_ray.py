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
    """A pool of Ray actors: processes of their own, each with JAX and the models loaded.

    Nothing is shared between them, so neither a slow one nor a dead one holds up another. A death
    is noticed at once, whether the worker has a task or not, and a new actor takes the place. Ray
    spreads workers over the nodes as they start. Weights and large data points exist once on a
    node, however many workers use them.

    The pool uses the Ray that this process is connected to. Otherwise it joins the one at
    `address`, at RAY_ADDRESS, or on this machine, and starts one here if there is none. The process
    stays part of it to its end, or to `ray.shutdown()`. The models are sent to the actors by
    pickle, with classes and functions of a script or a notebook.

    Further arguments are as for `DevicePool`, and so are the `rules`: `overdue`, `max_attempts` and
    `hang_timeout`.

    Args:
        address: Of Ray's head: "HOST:6379", "ray://HOST:10001" from outside of the cluster, "auto"
            for the Ray that runs on this machine, "local" for a new one.
        runtime_env: Ray's, for all workers: `{"working_dir": FOLDER}` sends a folder along.
        actor_options: Ray's `num_cpus`, `num_gpus`, `resources` and so on. By default a worker
            counts for half a CPU or less and, where the cluster has GPUs, for one or an equal part,
            of whose memory it takes that part. A `scheduling_strategy` places the workers (default:
            "SPREAD").
        min_workers: Workers to wait for (default: all); the others come in while the pool runs.
        start_timeout: Seconds until `min_workers` must be ready.

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
        """Return the node of each worker, by Ray's id; None while it is replaced."""
        places = map(self._backend.places.get, range(self.num_workers))
        return [place and place.node for place in places]


def worker_options(options: Mapping[str, Any], num_workers: int) -> dict[str, Any]:
    """Return an actor's options, with defaults for CPUs and GPUs.

    Where the cluster has GPUs, each worker gets one, or an equal part of one and of its memory.
    """
    ray = ray_module()
    found = dict(options)
    if "num_cpus" not in found:
        # No more than four fifths of the free ones together, so that others find room.
        free = 0.8 * ray.available_resources().get("CPU", 0.0) / num_workers
        found["num_cpus"] = min(0.5, math.floor(100 * free) / 100)
    gpus = ray.cluster_resources().get("GPU", 0.0)
    if gpus and "num_gpus" not in found:
        sharing = math.ceil(num_workers / gpus)
        found["num_gpus"] = math.floor(1e4 / sharing) / 1e4 if sharing > 1 else 1
    if 0 < found.get("num_gpus", 0) < 1:
        environment = dict(found.get("runtime_env") or {})
        # Its workers take nine tenths of a GPU's memory: the rest is XLA's and the driver's.
        share = f"{0.9 * found['num_gpus']:.3f}"
        variables = {"XLA_PYTHON_CLIENT_MEM_FRACTION": share}
        environment["env_vars"] = variables | dict(environment.get("env_vars") or {})
        found["runtime_env"] = environment
    return found


# What runs in the process of an actor.


@dataclasses.dataclass(frozen=True)
class Placement:
    """The place of a worker: JAX's platform there, and Ray's node."""

    platform: str
    node: str


class Actor:
    """A worker in a process of Ray, ready once it has loaded."""

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
        gc.freeze()  # a full collection would stop all threads, and look at all that was compiled
        node = ray.get_runtime_context().get_node_id()
        return Placement(jax.default_backend(), node)

    def run(self, kind: int, batch: PyTree) -> PyTree:
        with self._program.at_home():
            return self._worker(kind, batch)

    def wait_for_death(self) -> None:
        """Never return, so that the caller notices when this process is gone."""
        threading.Event().wait()


def cannot_import(reason: str, where: str) -> str:
    """Return a message for a worker that cannot import what it needs."""
    return (
        f"a worker cannot import what it needs on {where}: {reason}. Install it there, or send it "
        "along: runtime_env={'working_dir': FOLDER} of RayPool or ray.init, or `nercc`'s "
        "--runtime-env"
    )


class ActorBackend(WorkerBackend):
    """One actor for each life of a worker. Ray reports answers and deaths by futures' callbacks.

    Those come from Ray's own threads, in which a call that makes or ends an actor would wait for
    itself: a thread of ours does that. Ray restarts no actor (`max_restarts`): it would report a
    death after 1.5 s instead of 0.01 (measured), and what hangs or cannot load is the scheduler's
    to start again in every pool.

    Attributes:
        places: The places of workers that are ready.
    """

    def __init__(
        self,
        load: EncodedInputs,
        precision: tuple[Any, Any],
        options: Mapping[str, Any],
        head: Head,
    ):
        """Prepare actors.

        Args:
            load: Models, example, whether they are compiled, and faults.
            precision: JAX's `jax_enable_x64` and `jax_default_matmul_precision` there.
            options: Ray's, of each actor.
            head: The cluster's head, without which actors are neither made nor ended.
        """
        ray = ray_module()
        self._load, self._precision, self._head = ray.put(load), precision, head
        named = {"CPU": options.get("num_cpus"), "GPU": options.get("num_gpus")}
        named |= {"memory": options.get("memory"), **(options.get("resources") or {})}
        self._demand = {name: float(amount) for name, amount in named.items() if amount}
        options = {"scheduling_strategy": "SPREAD", **options}
        # Two threads: one works; the other only waits, which shows that the process is alive.
        self._make: Any = ray.remote(max_concurrency=2, max_restarts=0, **options)(Actor)
        self._actors: dict[int, tuple[int, Any, OnOutcome]] = {}  # with their lives, by worker
        self.places: dict[int, Placement] = {}
        self._pending: set[Any] = set()  # futures of Ray's
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
            # Ray puts the reason at the end of a page.
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
        # Ray puts a larger argument into its store, again for each call; so it goes there once.
        if sum(leaf.nbytes for leaf in arrays_of(batch)) > 100_000:
            return functools.cache(lambda: ray_module().put(batch))
        return lambda: batch

    def send(self, worker: int, life: int, kind: int, batch: Any) -> None:
        there, actor, on_outcome = self._actors[worker]
        if there != life:
            return  # it died meanwhile, as the scheduler knows: the task is another's
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
        if not gone:  # otherwise Ray's nodes end them, as they end those of a dead driver
            for _, actor, _ in self._actors.values():
                ray_module().kill(actor)
            # What was with them fails in a moment. Ray ends a process that hears of it after
            # `ray.shutdown`.
            concurrent.futures.wait(tuple(self._pending), timeout=5.0)


def _result(future: Any) -> Any:
    """Return the answer, or in its place the exception as the scheduler knows it."""
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
