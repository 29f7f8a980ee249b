"""A pool of Ray actors, on one machine or a cluster."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from jax.typing import DTypeLike

from ..codes import x64_enabled
from ..inference import Model, check_worker_dtype, current_conditions, matmul_precision
from ._desk import Desk
from ._faults import Faults
from ._overdue import Overdue
from ._pool import AbstractPool
from ._ray_cluster import MEMBERSHIP
from ._ray_crew import Actors
from ._ray_nodes import by_node, crowding, worker_options
from ._ray_watch import HeadWatch, Moves, NodeWatch
from ._ray_weights import pack
from ._supervision import Guard, Watcher
from ._worker import Examples, as_models

_LOG = logging.getLogger(__name__)


class RayPool(AbstractPool):
    """Workers that are Ray actors: processes of their own, each with JAX and the models loaded.

    Nothing is shared between them, so neither a slow one nor a dead one holds up another. A death
    is noticed at once, whether the worker has something in hand or not, and a new actor takes the
    place. Workers lie on the nodes as evenly as those have room, and move, one at a time, when
    nodes come or go. Weights and large data points exist once a node, whoever uses them.

    Uses the Ray that this process is connected to. Else it joins the one at `address`, at
    RAY_ADDRESS, or on this machine, and starts one here if there is none, for as long as a pool of
    this process is open.
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
        """Starts the workers, and waits until `min_workers` are ready: all unless given.

        Args:
            address: Ray's head, "HOST:6379", "ray://HOST:10001" from outside of the cluster,
                "auto" for the Ray that runs on this machine, "local" for a new one.
            runtime_env: Ray's, for all workers: `{"working_dir": FOLDER}` sends a folder along.
            actor_options: Ray's `num_cpus`, `num_gpus`, `resources` and so on. Unless they say so,
                a worker counts for half a CPU or less, and where the cluster has GPUs for one or an
                equal part, of whose memory it takes that part. A `scheduling_strategy` places the
                workers, which are then not moved.
            max_per_node: workers that may be lost together, N - K; a warning tells where a node
                has more.
            rebalance_every: seconds between two looks whether a worker should move.
            min_workers: workers to wait for; the others come in while the pool runs.

        Everything else is as in `DevicePool`. The models are sent to the actors by pickle, with
        classes and functions of a script or a notebook.

        Raises: ImportError without Ray; ConnectionError where the address has none; RuntimeError
        where too few workers start, for example because a model does not run on the example;
        ValueError for numbers that do not fit.
        """
        models = as_models(model, worker_dtype)
        self._worker_dtype = check_worker_dtype(worker_dtype)
        self._probe = MEMBERSHIP.enter(address, runtime_env)
        try:
            self._crew = Actors(
                pack((models, example, compiled, faults or Faults())),
                (x64_enabled(), matmul_precision()),
                worker_options(actor_options or {}, num_workers),
                lambda: self._probe.gone,
            )
            self._desk = Desk(
                self._crew,
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
        self._conditions = current_conditions(worker_dtype, self._crew.platform())
        self._open = True
        self._max_per_node = max_per_node
        moves = Moves(self._crew.misplaced, self._desk.renew, rebalance_every)
        watch = NodeWatch(self._probe, self._settled, self._tell, moves)
        looks = {"nercc-head": HeadWatch(self._probe).look, "nercc-nodes": watch.look}
        self._watchers = [
            Watcher(name, look, Guard(), lambda: None) for name, look in looks.items()
        ]
        for each in self._watchers:
            each.start()

    def processes(self) -> list[int | None]:
        """The process id of each worker, on whatever machine it is; None while it is replaced."""
        return self._crew.processes()

    def nodes(self) -> list[str | None]:
        """The node of each worker, by Ray's id; None while it is replaced."""
        return self._crew.nodes()

    @property
    def alarm(self) -> str | None:
        return self._probe.alarm

    @property
    def ends_at(self) -> float:
        return self._probe.ends_at

    def close(self) -> None:
        """Ends the workers. Who still waits gets what is in."""
        if self._open:
            self._open = False
            for each in self._watchers:
                each.close()
            self._desk.close()
            MEMBERSHIP.leave()

    def _settled(self) -> bool:
        return self._desk.report().starting == 0

    def _tell(self) -> None:
        held = by_node(self.nodes())
        each = ", ".join(str(number) for number in sorted(held.values(), reverse=True))
        _LOG.info("workers on %d node(s): %s", len(held), each)
        if (trouble := crowding(held, self._max_per_node)) is not None:
            _LOG.warning("%s", trouble)
