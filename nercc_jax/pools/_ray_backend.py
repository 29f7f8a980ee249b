"""Workers that are Ray actors: what is sent to them, what runs there, and how they are reached.

Models travel with their arrays apart. Ray's object store is memory that all processes of a machine
map: what is read from it is not copied, and on a CPU JAX uses it in place. So weights exist once on
a machine, whatever holds them: modules, closures, bound methods.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import inspect
import io
import os
import pickle
import signal
import threading
import time
import types
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from ..inference.models import UNKNOWN
from ._backend import OnOutcome, WorkerBackend, WorkerDied
from ._batch import arrays_of
from ._garbage import short_collections
from ._ray_cluster import last_line, ray_module
from ._ray_nodes import (
    by_node,
    choose_node,
    demand_of,
    live_nodes,
    missing_resources,
    node_to_leave,
)
from ._worker import Program, Worker, check_versions, checksum, code_versions, warm_up

# Size in bytes from which on Ray would put an argument into its store, again for each call.
_LARGE = 100_000
_PAUSE = 0.1  # seconds between two checks whether a worker may be started
_END = 5.0  # seconds to wait, at most, until all that was with workers has failed at the end
_FEWEST_STARTS = 4  # starts under way at once, at least; otherwise as many as there are CPUs


# What is sent.


@dataclasses.dataclass(frozen=True)
class EncodedInputs:
    """A pickled value, with its arrays' bytes apart, which Ray does not copy.

    `code` are the checksums of the modules that it is imported from.
    """

    pickled: bytes
    arrays: list[np.ndarray]
    checksum: int = 0
    code: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def unpack(self) -> Any:
        """Return the value; JAX's arrays are on the default device, at this thread's precision.

        Raises RuntimeError if its arrays or its code are not those that were packed.
        """
        if checksum(self.arrays) != self.checksum:
            raise RuntimeError("a worker has received other weights than were sent")
        value = pickle.loads(self.pickled, buffers=self.arrays)
        check_versions(self.code)
        return value


def pack(value: Any) -> EncodedInputs:
    """Pickle a value, which may hold functions and classes of a script or a notebook.

    Raises ValueError if pickle cannot take it.
    """
    from ray.cloudpickle import cloudpickle  # Ray's own, which knows its actors and references

    modules: set[str] = set()

    class Pickler(cloudpickle.Pickler):
        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, jax.Array) and _plain(obj):
                host = np.ascontiguousarray(obj)
                return _array, (host.reshape(-1).view(np.uint8), host.dtype, host.shape)
            reduced: Any = super().reducer_override(obj)
            if reduced is NotImplemented and isinstance(obj, type | types.FunctionType):
                modules.add(str(obj.__module__))  # it is imported there
            if isinstance(obj, type) and issubclass(obj, eqx.Module) and isinstance(reduced, tuple):
                # The arguments of a class without content, of which the fourth is its namespace.
                reduced[1][3].update(_fields(obj))
            return reduced

    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    try:
        Pickler(file, protocol=5, buffer_callback=buffers.append).dump(value)
    except (TypeError, pickle.PicklingError) as error:
        raise ValueError(f"what workers run is sent to them by pickle: {error}") from error
    arrays = [np.frombuffer(each.raw(), np.uint8) for each in buffers]
    return EncodedInputs(file.getvalue(), arrays, checksum(arrays), code_versions(modules))


def _plain(array: jax.Array) -> bool:
    """Return whether an array is only its numbers: no random key, no weakly typed scalar."""
    extended = jnp.issubdtype(array.dtype, jax.dtypes.extended)
    return array.is_fully_addressable and not extended and not array.weak_type


def _array(numbers: np.ndarray, dtype: DTypeLike, shape: tuple[int, ...]) -> jax.Array:
    # Where that is a CPU's memory, the numbers stay where they are: `jnp.asarray` would copy them.
    return jax.device_put(numbers.view(dtype).reshape(shape))


def _fields(module: type[eqx.Module]) -> dict[str, Any]:
    """Return the attributes by which Equinox knows a class for a pytree when it is made again.

    A class that cannot be imported reaches a worker without content, which follows: Equinox would
    have registered a pytree without leaves by then.
    """
    annotated = inspect.get_annotations(module)
    own = [field for field in dataclasses.fields(module) if field.name in annotated]
    found: dict[str, Any] = {
        # By keyword, so that those with a default may come first; it all is overwritten.
        field.name: eqx.field(static=field.metadata.get("static", False), kw_only=True)
        for field in own
    }
    found["__annotations__"] = {field.name: Any for field in own}
    if not module.__dataclass_params__.init:  # pyright: ignore[reportAttributeAccessIssue]
        found["__init__"] = lambda self: None
    return found


# What runs in the process of an actor.


@dataclasses.dataclass(frozen=True)
class NodePlacement:
    """The place of a worker: its process, JAX's platform there, and Ray's node."""

    process: int
    platform: str
    node: str


class Actor:
    """A worker in a process of Ray: placed by Ray first, and ready once it has loaded."""

    def where(self) -> NodePlacement:
        node = ray_module().get_runtime_context().get_node_id()
        return NodePlacement(os.getpid(), jax.default_backend(), node)

    def load(self, load: EncodedInputs, precision: tuple[Any, Any], worker: int, life: int) -> None:
        x64, products = precision
        jax.config.update("jax_enable_x64", x64)
        jax.config.update("jax_default_matmul_precision", products)
        try:
            models, example, compiled, faults = load.unpack()
        except ImportError as error:
            node = f"node {ray_module().util.get_node_ip_address()}"
            raise RuntimeError(cannot_import(str(error), node)) from error
        self._program = Program(models, jax.local_devices()[0], compiled)
        warm_up([self._program], len(models), example)
        self._worker = Worker(self._program, faults.at(worker, life), _die)
        self._collections = contextlib.ExitStack()
        self._collections.enter_context(short_collections())

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
        "along: --working-dir FOLDER or --py-modules FOLDER of `nercc`, runtime_env={'working_dir':"
        " FOLDER} of RayPool or ray.init"
    )


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# How actors are reached.


class ActorBackend(WorkerBackend):
    """One actor for each worker. Ray reports answers and deaths by callbacks on futures.

    Those come from Ray's own threads, in which a call that makes or ends an actor would wait for
    itself: a thread of ours does that. `precision` is that of JAX there (`jax_enable_x64`,
    `jax_default_matmul_precision`). While the cluster's head is `gone()`, actors can neither be
    made nor ended.
    """

    def __init__(
        self,
        load: EncodedInputs,
        precision: tuple[Any, Any],
        options: Mapping[str, Any],
        gone: Callable[[], bool],
    ):
        ray = ray_module()
        self._load, self._precision, self._gone = ray.put(load), precision, gone
        self._demand = demand_of(options)
        self._fixed = "scheduling_strategy" in options  # placed by the caller
        # Two threads: one works; the other only waits, which shows that the process is alive.
        self._make: Any = ray.remote(max_concurrency=2, max_restarts=0, **options)(Actor)
        self._actors: dict[tuple[int, int], Any] = {}  # by worker and life
        self._on_outcome: dict[int, OnOutcome] = {}
        self._places: dict[int, NodePlacement] = {}  # of workers that have one
        self._ready: set[tuple[int, int]] = set()
        self._planned: dict[int, str | None] = {}  # the node that a worker was started on
        self._pending: set[Any] = set()  # futures of Ray's
        self._closed = False
        self._starts = concurrent.futures.ThreadPoolExecutor(1, "nercc-ray")
        wave = max(_FEWEST_STARTS, int(ray.cluster_resources().get("CPU", 0)))
        self._wave = threading.Semaphore(wave)

    def start(self, worker: int, life: int, on_outcome: OnOutcome) -> None:
        self._starts.submit(self._start, worker, life, on_outcome)

    def _start(self, worker: int, life: int, on_outcome: OnOutcome) -> None:
        while self._gone() or not self._wave.acquire(timeout=1.0):
            if self._closed:
                return
            time.sleep(_PAUSE)

        def placed(future: Any) -> None:
            outcome = _result(future)  # where it failed, so has `loaded`
            if not isinstance(outcome, Exception):
                self._places[worker] = outcome

        def loaded(future: Any) -> None:
            self._wave.release()
            failed = isinstance(_result(future), Exception)
            if not failed:
                self._ready.add((worker, life))
            reason = _reason(future.exception()) if failed else None
            on_outcome(worker, life, RuntimeError(reason) if failed else None)

        def died(future: Any) -> None:
            # Before it was ready, `loaded` has the reason.
            if (worker, life) in self._ready and not future.cancelled():
                on_outcome(worker, life, _result(future))

        try:
            self._kill(worker)
            self._on_outcome[worker] = on_outcome
            self._actors[worker, life] = actor = self._placed_actor(worker).remote()
            there, death = actor.where.remote(), actor.wait_for_death.remote()
            ready = actor.load.remote(self._load, self._precision, worker, life)
        except Exception as error:
            self._wave.release()
            on_outcome(worker, life, error)
            return
        self._when_done(there, placed)
        self._when_done(ready, loaded)
        self._when_done(death, died)

    def _placed_actor(self, worker: int) -> Any:
        """Return the actor's class, to be made on the node that has the fewest of the workers.

        If Ray finds no room there, it takes another node.
        """
        if self._fixed:
            return self._make
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._planned.pop(worker, None)
        node = choose_node(live_nodes(), self._demand, self.held())
        if node is None:
            return self._make.options(scheduling_strategy="SPREAD")
        self._planned[worker] = node.id
        affinity = NodeAffinitySchedulingStrategy(node.id, soft=True, _spill_on_unavailable=True)
        return self._make.options(scheduling_strategy=affinity)

    def prepare(self, batch: PyTree) -> Any:
        large = sum(leaf.nbytes for leaf in arrays_of(batch)) > _LARGE
        return _StoredInputs(batch) if large else batch

    def send(self, worker: int, life: int, kind: int, batch: Any) -> None:
        on_outcome = self._on_outcome[worker]
        actor = self._actors.get((worker, life))
        if actor is None:
            return  # it died meanwhile, as the scheduler knows: the task is another's
        try:
            answer = actor.run.remote(kind, batch.sent() if type(batch) is _StoredInputs else batch)
        except Exception as error:  # Ray itself is gone, for example
            on_outcome(worker, life, WorkerDied(f"it cannot be reached: {error}"))
            return
        self._when_done(answer, lambda future: on_outcome(worker, life, _result(future)))

    def _when_done(self, answer: Any, callback: Callable[[Any], None]) -> None:
        future = answer.future()
        self._pending.add(future)
        future.add_done_callback(callback)
        future.add_done_callback(self._pending.discard)

    def missing(self) -> str | None:
        if self._gone():
            return "Ray's head does not answer"
        waiting = len(self._actors) - len(self._places)  # others have not been started yet
        return missing_resources(self._demand, waiting, live_nodes()) if waiting else None

    def close(self) -> None:
        self._closed = True
        gone = self._gone()
        self._starts.shutdown(wait=not gone, cancel_futures=True)
        if not gone:  # otherwise Ray's nodes end them, as they end those of a dead driver
            for worker in list(self._on_outcome):
                self._kill(worker)
            # What was with them fails in a moment. Ray ends a process that hears of it after
            # `ray.shutdown`.
            concurrent.futures.wait(tuple(self._pending), timeout=_END)

    def places(self) -> list[NodePlacement | None]:
        """Return the place of each worker; None while it is replaced."""
        # Not of `_actors`, which lacks a worker for a moment then.
        ready = {worker for worker, _ in tuple(self._ready)}
        return [
            self._places.get(worker) if worker in ready else None
            for worker in sorted(self._on_outcome)
        ]

    def held(self) -> collections.Counter[str]:
        known = {worker: place.node for worker, place in tuple(self._places.items())}
        return by_node((self._planned | known).values())

    def misplaced(self) -> int | None:
        """Return a worker that should move to another node; None where all lie evenly."""
        if self._fixed:
            return None
        node = node_to_leave(live_nodes(), self._demand, self.held())
        there = (worker for worker, place in self._places.items() if place.node == node)
        return next(there, None)

    def platform(self) -> str:
        found = {place.platform for place in self._places.values()}
        return found.pop() if len(found) == 1 else UNKNOWN

    def _kill(self, worker: int) -> None:
        self._places.pop(worker, None)
        for one in [one for one in self._actors if one[0] == worker]:
            self._ready.discard(one)
            ray_module().kill(self._actors.pop(one))


class _StoredInputs:
    """A large batch, which goes into Ray's store once, however many workers it is sent to."""

    def __init__(self, batch: PyTree):
        self._batch, self._stored = batch, None

    def sent(self) -> Any:
        if self._stored is None:
            self._stored = ray_module().put(self._batch)
        return self._stored


def _reason(error: BaseException | None) -> str:
    from ray.exceptions import RayTaskError

    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        return str(error.cause)
    if "failed to import on the worker" in str(error):
        return cannot_import(f"nercc_jax ({last_line(error)})", "its node")
    return last_line(error)


def _result(future: Any) -> Any:
    """Return the answer, or the exception in its place; a death is `WorkerDied`."""
    try:
        return future.result()
    except concurrent.futures.CancelledError:
        return WorkerDied("Ray gave the call up")
    except Exception as error:
        return _translated(error)


def _translated(error: Exception) -> Exception:
    """Return an exception of Ray's as the scheduler knows it."""
    from ray.exceptions import RayActorError, RayTaskError

    if isinstance(error, RayTaskError):
        return error.cause if isinstance(error.cause, Exception) else error
    if isinstance(error, RayActorError):
        return WorkerDied(f"its process is gone ({type(error).__name__})")
    return error
