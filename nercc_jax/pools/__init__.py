"""Pools of independent workers, and coded inference and batches on them."""

import importlib
from typing import Any

from ._devices import DevicePool
from ._faults import Fault, Faults
from ._pool import AbstractPool
from ._ray import RayPool
from .backend import PoolReport
from .batch import Batch, BatchAnswers
from .inference import PoolResult, pool_inference
from .ray_cluster import ray_is_lost
from .times import Overdue

__all__ = [
    "AbstractPool",
    "Batch",
    "BatchAnswers",
    "DevicePool",
    "Fault",
    "Faults",
    "Overdue",
    "PoolReport",
    "PoolResult",
    "RayPool",
    "pool_inference",
    "ray_is_lost",
]


def __getattr__(name: str) -> Any:
    """Return a name that moved to `nercc_jax.rows`, imported lazily since `rows` imports pools."""
    if name in ("RowResult", "map_rows", "run_rows"):
        return getattr(importlib.import_module("nercc_jax.rows"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
