"""Pools of independent workers, and coded inference, batches and rows on them."""

from ._backend import PoolReport, WorkerReport, WorkerState
from ._batch import Batch, BatchAnswers, Failure, Refuse, refuse_odd
from ._clock import AbstractClock
from ._devices import DevicePool
from ._faults import Episodes, Fault, Faults, InjectedError
from ._inference import BatchOutcome, PoolResult, Timing, pool_inference, run_batches
from ._pool import AbstractPool
from ._ray import RayPool
from ._ray_cluster import join_ray, leave_ray, ray_is_lost
from ._row_engine import RowProgress, RowResult, run_rows
from ._rows import RowFunction
from ._times import AnswerTimes, Call, Overdue

__all__ = [
    "AbstractClock",
    "AbstractPool",
    "AnswerTimes",
    "Batch",
    "BatchAnswers",
    "BatchOutcome",
    "Call",
    "DevicePool",
    "Episodes",
    "Failure",
    "Fault",
    "Faults",
    "InjectedError",
    "Overdue",
    "PoolReport",
    "PoolResult",
    "RayPool",
    "Refuse",
    "RowFunction",
    "RowProgress",
    "RowResult",
    "Timing",
    "WorkerReport",
    "WorkerState",
    "join_ray",
    "leave_ray",
    "pool_inference",
    "ray_is_lost",
    "refuse_odd",
    "run_batches",
    "run_rows",
]
