"""Workers that are Ray actors: what is sent to them, what runs there, where, and how it is reached.

Models travel with their arrays apart. Ray's object store is memory that all processes of a machine
map: what is read from it is not copied, and on a CPU JAX uses it in place. So weights exist once on
a machine, whatever holds them: modules, closures, bound methods.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import inspect
import io
import math
import os
import pickle
import signal
import threading
import time
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from ._worker import Program, Worker, check_versions, checksum, code_versions, warm_up

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


# Where actors run.


@dataclasses.dataclass(frozen=True)
class Node:
    """A node that is alive: Ray's id, its address, and its resources in all."""

    id: str
    address: str
    resources: Mapping[str, float]

    def room(self, demand: Mapping[str, float]) -> float:
        """Return how many workers it can hold; infinitely many where they take nothing."""
        # Ray counts in ten-thousandths.
        return min(
            (
                math.floor(self.resources.get(name, 0.0) / amount + 1e-3) + 0.0
                for name, amount in demand.items()
            ),
            default=math.inf,
        )


def live_nodes() -> list[Node]:
    """Return the cluster's nodes that are alive, in Ray's order."""
    return [
        Node(each["NodeID"], each["NodeManagerAddress"], dict(each["Resources"]))
        for each in ray_module().nodes()
        if each["Alive"]
    ]


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


def demand_of(options: Mapping[str, Any]) -> dict[str, float]:
    """Return the resources that a worker takes, by Ray's names."""
    named = {"CPU": options.get("num_cpus", 0.0), "GPU": options.get("num_gpus", 0.0)}
    named["memory"] = options.get("memory") or 0.0
    named |= dict(options.get("resources") or {})
    return {name: float(amount) for name, amount in named.items() if amount}


def choose_node(
    nodes: Iterable[Node], demand: Mapping[str, float], held: Mapping[str, int]
) -> Node | None:
    """Return the node with the fewest workers among those with room for one more, if any."""
    roomy = [node for node in nodes if node.room(demand) > held.get(node.id, 0)]
    return min(roomy, key=lambda node: held.get(node.id, 0), default=None)


def node_to_leave(
    nodes: Sequence[Node], demand: Mapping[str, float], held: Mapping[str, int]
) -> str | None:
    """Return the node that should give a worker to another, which has at least two fewer.

    None where workers lie as evenly as the nodes' room allows.
    """
    target = choose_node(nodes, demand, held)
    if target is None or not held:
        return None
    fullest = max(held, key=lambda node: held[node])
    return fullest if held[fullest] >= held.get(target.id, 0) + 2 else None


def crowding(held: Mapping[str, int], bound: int | None) -> str | None:
    """Return a warning if one node holds more than `bound` workers, which may die together."""
    most = max(held.values(), default=0)
    if bound is None or most <= bound:
        return None
    needed = math.ceil(sum(held.values()) / max(bound, 1))
    return (
        f"one of {len(held)} node(s) holds {most} of {sum(held.values())} workers, but the code "
        f"can do without {bound}: should that node die, queries wait until others replace its "
        f"workers. {needed} nodes with room for {bound} workers each would do"
    )


def missing_resources(
    demand: Mapping[str, float], waiting: int, nodes: Sequence[Node]
) -> str | None:
    """Return the resources that workers without a process are waiting for; None if none.

    While there is enough of everything for one more, nothing is missing.
    """
    free = ray_module().available_resources()
    each = ", ".join(f"{name} {amount:g}" for name, amount in demand.items()) or "no resource"
    short = [
        f"{name}: {waiting * amount:g} needed, {free.get(name, 0.0):g} free"
        for name, amount in demand.items()
        if amount > free.get(name, 0.0) + 1e-6
    ]
    if not any(node.room(demand) for node in nodes):
        return f"none of {len(nodes)} nodes has what a worker takes ({each})"
    if short:
        return f"{waiting} take {each} each; on {len(nodes)} nodes together {'; '.join(short)}"
    return None


def by_node(places: Iterable[str | None]) -> collections.Counter[str]:
    return collections.Counter(place for place in places if place is not None)


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
        # Starts under way at once: as many as there are CPUs, and 4 at least.
        wave = max(4, int(ray.cluster_resources().get("CPU", 0)))
        self._wave = threading.Semaphore(wave)

    def start(self, worker: int, life: int, on_outcome: OnOutcome) -> None:
        self._starts.submit(self._start, worker, life, on_outcome)

    def _start(self, worker: int, life: int, on_outcome: OnOutcome) -> None:
        while self._gone() or not self._wave.acquire(timeout=1.0):
            if self._closed:
                return
            time.sleep(0.1)

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
        # Ray puts a larger argument into its store, again for each call; so it goes there once.
        if sum(leaf.nbytes for leaf in arrays_of(batch)) > 100_000:
            return functools.cache(lambda: ray_module().put(batch))
        return lambda: batch

    def send(self, worker: int, life: int, kind: int, batch: Any) -> None:
        on_outcome = self._on_outcome[worker]
        actor = self._actors.get((worker, life))
        if actor is None:
            return  # it died meanwhile, as the scheduler knows: the task is another's
        try:
            answer = actor.run.remote(kind, batch())
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
            concurrent.futures.wait(tuple(self._pending), timeout=5.0)

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


def _reason(error: BaseException | None) -> str:
    from ray.exceptions import RayTaskError

    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        return str(error.cause)
    if "failed to import on the worker" in str(error):
        return cannot_import(f"nercc_jax ({last_line(error)})", "its node")
    return last_line(error)


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
