"""Pools of independent workers, and coded inference, batches and rows on them."""

from ._backend import PoolReport
from ._batch import Batch, BatchAnswers
from ._devices import DevicePool
from ._faults import Episodes, Fault, Faults
from ._inference import PoolResult, pool_inference, run_batches
from ._pool import AbstractPool
from ._ray import RayPool
from ._ray_cluster import join_ray, leave_ray, ray_is_lost
from ._row_engine import run_rows
from ._rows import RowFunction, RowResult
from ._times import Overdue
from .ray_data import map_rows

__all__ = [
    "AbstractPool",
    "Batch",
    "BatchAnswers",
    "DevicePool",
    "Episodes",
    "Fault",
    "Faults",
    "Overdue",
    "PoolReport",
    "PoolResult",
    "RayPool",
    "RowFunction",
    "RowResult",
    "join_ray",
    "leave_ray",
    "map_rows",
    "pool_inference",
    "ray_is_lost",
    "run_batches",
    "run_rows",
]
