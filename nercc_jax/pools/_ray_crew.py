"""Workers that are Ray actors: started where they lie apart, reached, and ended."""

import collections
import concurrent.futures
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import PyTree

from ..inference import UNKNOWN
from ._batch import arrays_of
from ._crew import AbstractCrew, WorkerDied
from ._ray_actor import Actor, Whereabouts, cannot_import
from ._ray_cluster import last_line, ray_module
from ._ray_nodes import by_node, choose_node, demand_of, lacking, live_nodes, node_to_leave
from ._ray_weights import Packed

# Bytes from which on Ray itself would put an argument into its store, for each call again.
_LARGE = 100_000
_PAUSE = 0.1  # seconds between two looks whether a worker may be started
_FEWEST_STARTS = 4  # that are under way at once, at least; else as many as there are CPUs

Hear = Callable[[int, int, Any], None]


class Actors(AbstractCrew):
    """An actor a worker. Ray tells of answers and deaths by callbacks on futures.

    Those come from Ray's own threads, in which a call that makes or ends an actor waits for itself:
    a thread of ours does that. `gone()` says whether the cluster's head is, without which actors
    can neither be made nor ended.
    """

    def __init__(
        self,
        load: Packed,
        precision: tuple[Any, Any],
        options: Mapping[str, Any],
        gone: Callable[[], bool],
    ):
        ray = ray_module()
        self._load, self._precision, self._gone = ray.put(load), precision, gone
        self._demand = demand_of(options)
        self._placed = "scheduling_strategy" in options  # by whoever made the pool
        # Two threads: one works, the other only waits, and so tells that the process is alive.
        self._make: Any = ray.remote(max_concurrency=2, max_restarts=0, **options)(Actor)
        self._actors: dict[tuple[int, int], Any] = {}  # by worker and life
        self._hears: dict[int, Hear] = {}
        self._where: dict[int, Whereabouts] = {}  # of those that have a place
        self._ready: set[tuple[int, int]] = set()
        self._planned: dict[int, str | None] = {}  # the node that a worker was started on
        self._closed = False
        self._starts = concurrent.futures.ThreadPoolExecutor(1, "nercc-ray")
        wave = max(_FEWEST_STARTS, int(ray.cluster_resources().get("CPU", 0)))
        self._wave = threading.Semaphore(wave)

    def start(self, worker: int, life: int, hear: Hear) -> None:
        self._starts.submit(self._start, worker, life, hear)

    def _start(self, worker: int, life: int, hear: Hear) -> None:
        while self._gone() or not self._wave.acquire(timeout=1.0):
            if self._closed:
                return
            time.sleep(_PAUSE)

        def placed(future: Any) -> None:
            outcome = _result(future)  # where it failed, so has `loaded`
            if not isinstance(outcome, Exception):
                self._where[worker] = outcome

        def loaded(future: Any) -> None:
            self._wave.release()
            failed = isinstance(_result(future), Exception)
            if not failed:
                self._ready.add((worker, life))
            reason = _reason(future.exception()) if failed else None
            hear(worker, life, RuntimeError(reason) if failed else None)

        def died(future: Any) -> None:
            # Before it was ready, `loaded` has the reason.
            if (worker, life) in self._ready and not future.cancelled():
                hear(worker, life, _result(future))

        try:
            self._kill(worker)
            self._hears[worker] = hear
            self._actors[worker, life] = actor = self._placed_actor(worker).remote()
            there, death = actor.where.remote(), actor.wait_for_death.remote()
            ready = actor.load.remote(self._load, self._precision, worker, life)
        except Exception as error:
            self._wave.release()
            hear(worker, life, error)
            return
        _when_done(there, placed)
        _when_done(ready, loaded)
        _when_done(death, died)

    def _placed_actor(self, worker: int) -> Any:
        """The actor's class, to be made on the node that has the fewest of the workers.

        Should Ray not find room there, it takes another.
        """
        if self._placed:
            return self._make
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._planned.pop(worker, None)
        node = choose_node(live_nodes(), self._demand, self.held())
        if node is None:
            return self._make.options(scheduling_strategy="SPREAD")
        self._planned[worker] = node.id
        affinity = NodeAffinitySchedulingStrategy(node.id, soft=True, _spill_on_unavailable=True)
        return self._make.options(scheduling_strategy=affinity)

    def parcel(self, batch: PyTree) -> Any:
        large = sum(leaf.nbytes for leaf in arrays_of(batch)) > _LARGE
        return _Parcel(batch) if large else batch

    def send(self, worker: int, life: int, kind: int, batch: Any) -> None:
        hear = self._hears[worker]
        actor = self._actors.get((worker, life))
        if actor is None:
            return  # it died since, which the desk has heard: the task is another's
        try:
            answer = actor.run.remote(kind, batch.sent() if type(batch) is _Parcel else batch)
        except Exception as error:  # Ray itself is gone, for example
            hear(worker, life, WorkerDied(f"it cannot be reached: {error}"))
            return
        _when_done(answer, lambda future: hear(worker, life, _result(future)))

    def lacking(self) -> str | None:
        if self._gone():
            return "Ray's head does not answer"
        waiting = len(self._actors) - len(self._where)  # others' turn has not come
        return lacking(self._demand, waiting, live_nodes()) if waiting else None

    def close(self) -> None:
        self._closed = True
        gone = self._gone()
        self._starts.shutdown(wait=not gone, cancel_futures=True)
        if not gone:  # else Ray's nodes end them, as they end those of a dead driver
            for worker in list(self._hears):
                self._kill(worker)

    def processes(self) -> list[int | None]:
        # Not of `_actors`, which lacks a worker for a moment while it is replaced.
        where = self._lives()
        return [None if each is None else each.process for each in where]

    def nodes(self) -> list[str | None]:
        """The node of each worker, by Ray's id; None while it is replaced."""
        where = self._lives()
        return [None if each is None else each.node for each in where]

    def _lives(self) -> list[Whereabouts | None]:
        """Of each worker, where it is ready."""
        ready = {worker for worker, _ in tuple(self._ready)}
        return [
            self._where.get(worker) if worker in ready else None for worker in sorted(self._hears)
        ]

    def held(self) -> collections.Counter[str]:
        """How many workers each node has, or is to have."""
        known = {worker: where.node for worker, where in tuple(self._where.items())}
        return by_node((self._planned | known).values())

    def misplaced(self) -> int | None:
        """A worker that would better be at another node; None where all lie evenly."""
        if self._placed:
            return None
        node = node_to_leave(live_nodes(), self._demand, self.held())
        there = (worker for worker, where in self._where.items() if where.node == node)
        return next(there, None)

    def platform(self) -> str:
        """The platform of all workers, where it is one."""
        found = {where.platform for where in self._where.values()}
        return found.pop() if len(found) == 1 else UNKNOWN

    def _kill(self, worker: int) -> None:
        self._where.pop(worker, None)
        for one in [one for one in self._actors if one[0] == worker]:
            self._ready.discard(one)
            ray_module().kill(self._actors.pop(one))


class _Parcel:
    """A large batch, which goes into Ray's store once, whoever has it in hand after that."""

    def __init__(self, batch: PyTree):
        self._batch, self._stored = batch, None

    def sent(self) -> Any:
        if self._stored is None:
            self._stored = ray_module().put(self._batch)
        return self._stored


def _when_done(answer: Any, callback: Callable[[Any], None]) -> None:
    answer.future().add_done_callback(callback)


def _reason(error: BaseException | None) -> str:
    """Why an actor did not start."""
    from ray.exceptions import RayTaskError

    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        return str(error.cause)
    if "failed to import on the worker" in str(error):
        return cannot_import(f"nercc_jax ({last_line(error)})", "its node")
    return last_line(error)


def _result(future: Any) -> Any:
    """The answer, or the exception in its place, a death as `WorkerDied`."""
    try:
        return future.result()
    except concurrent.futures.CancelledError:
        return WorkerDied("Ray gave the call up")
    except Exception as error:
        return _as_told(error)


def _as_told(error: Exception) -> Exception:
    """What Ray raised, as the desk knows it."""
    from ray.exceptions import RayActorError, RayTaskError

    if isinstance(error, RayTaskError):
        return error.cause if isinstance(error.cause, Exception) else error
    if isinstance(error, RayActorError):
        return WorkerDied(f"its process is gone ({type(error).__name__})")
    return error
