"""A pool of Ray actors, on one machine or a cluster."""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jax.typing import DTypeLike

from ..codes._kept import x64_enabled
from ..inference.models import Model, check_worker_dtype, current_conditions, matmul_precision
from ._clock import ErrorCounter, Watcher
from ._faults import Faults
from ._pool import AbstractPool
from ._ray_backend import ActorBackend, by_node, crowding, pack, worker_options
from ._ray_cluster import MEMBERSHIP, HeadProbe
from ._scheduler import Scheduler
from ._times import Overdue
from ._worker import Examples, as_models, weights_checksum

_LOG = logging.getLogger(__name__)


class RayPool(AbstractPool):
    """A pool of Ray actors: processes of their own, each with JAX and the models loaded.

    Nothing is shared between them, so neither a slow one nor a dead one holds up another. A death
    is noticed at once, whether the worker has a task or not, and a new actor takes the place.
    Workers lie on the nodes as evenly as those have room, and move, one at a time, when nodes come
    or go. Weights and large data points exist once on a node, however many workers use them.

    The pool uses the Ray that this process is connected to. Otherwise it joins the one at
    `address`, at RAY_ADDRESS, or on this machine, and starts one here if there is none, for as long
    as a pool of this process is open. The models are sent to the actors by pickle, with classes and
    functions of a script or a notebook.

    Further arguments are as for `DevicePool`.

    Args:
        address: Of Ray's head: "HOST:6379", "ray://HOST:10001" from outside of the cluster, "auto"
            for the Ray that runs on this machine, "local" for a new one.
        runtime_env: Ray's, for all workers: `{"working_dir": FOLDER}` sends a folder along.
        actor_options: Ray's `num_cpus`, `num_gpus`, `resources` and so on. By default a worker
            counts for half a CPU or less and, where the cluster has GPUs, for one or an equal part,
            of whose memory it takes that part. A `scheduling_strategy` places the workers, which
            are then not moved.
        max_per_node: Workers that may be lost together, N - K; a node with more causes a warning.
        rebalance_every: Seconds between two checks whether a worker should move.
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
        max_per_node: int | None = None,
        rebalance_every: float = 10.0,
        min_workers: int | None = None,
        faults: Faults | None = None,
        overdue: Overdue | None = None,
        max_attempts: int = 3,
        hang_timeout: float = 60.0,
        start_timeout: float = 300.0,
    ):
        models = as_models(model, worker_dtype)
        self._worker_dtype = check_worker_dtype(worker_dtype)
        self._weights = weights_checksum(models)
        self._probe = MEMBERSHIP.enter(address, runtime_env)
        try:
            self._backend = ActorBackend(
                pack((models, example, compiled, faults or Faults())),
                (x64_enabled(), matmul_precision()),
                worker_options(actor_options or {}, num_workers),
                lambda: self._probe.gone,
            )
            self._scheduler = Scheduler(
                self._backend,
                num_workers,
                len(models),
                overdue=overdue or Overdue(),
                max_attempts=max_attempts,
                hang_timeout=hang_timeout,
                start_timeout=start_timeout,
                min_workers=min_workers,
            )
        except BaseException:
            MEMBERSHIP.leave()
            raise
        self._conditions = current_conditions(worker_dtype, self._backend.platform())
        self._open = True
        parts = self._probe, self._scheduler, self._backend
        watch = NodeWatch(*parts, max_per_node, rebalance_every)
        looks = {"nercc-head": self._probe.look, "nercc-nodes": watch.look}
        self._watchers = [
            Watcher(name, look, ErrorCounter(), lambda: None) for name, look in looks.items()
        ]
        for each in self._watchers:
            each.start()

    def processes(self) -> list[int | None]:
        """Return the process id of each worker, on whatever machine; None while it is replaced."""
        return [place and place.process for place in self._backend.places()]

    def nodes(self) -> list[str | None]:
        """Return the node of each worker, by Ray's id; None while it is replaced."""
        return [place and place.node for place in self._backend.places()]

    @property
    def alarm(self) -> str | None:
        return self._probe.alarm

    @property
    def ends_at(self) -> float:
        return self._probe.ends_at

    def close(self) -> None:
        """End the workers. Whoever still waits gets the answers that are in."""
        if self._open:
            self._open = False
            for each in self._watchers:
                each.close()
            self._scheduler.close()
            MEMBERSHIP.leave()


class NodeWatch:
    """The watch over the places of workers, once all are ready: logs them, then moves workers.

    A worker moves to a node that has fewer: one at a time, every `every` seconds at most. A node
    with more than `max_per_node` causes a warning.
    """

    def __init__(
        self,
        probe: HeadProbe,
        scheduler: Scheduler,
        backend: ActorBackend,
        max_per_node: int | None,
        every: float,
    ):
        self._probe, self._scheduler, self._backend = probe, scheduler, backend
        self._max_per_node, self._every = max_per_node, every
        self._logged, self._due = False, time.monotonic() + every

    def look(self) -> float:
        """Move a worker if one should move, and return the time of the next turn."""
        now = time.monotonic()
        # Without a head, we would wait for Ray's answer about nodes until it ends us.
        if self._probe.gone or self._scheduler.report().starting:
            return now + 1.0
        if not self._logged:
            self._logged = True
            held = by_node(place and place.node for place in self._backend.places())
            each = ", ".join(str(number) for number in sorted(held.values(), reverse=True))
            _LOG.info("workers on %d node(s): %s", len(held), each)
            if (trouble := crowding(held, self._max_per_node)) is not None:
                _LOG.warning("%s", trouble)
        if now >= self._due:
            worker = self._backend.misplaced()
            moved = worker is not None and self._scheduler.restart(worker)
            if moved:
                _LOG.info("worker %d moves to a node that has fewer of them", worker)
            if moved or worker is None:  # otherwise it was busy
                self._due = now + self._every
        return now + 1.0
