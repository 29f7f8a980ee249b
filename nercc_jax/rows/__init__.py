"""Many rows on a pool: each is computed or known well enough, or is decoded in groups of a code."""

from ._groups import GroupResult, run_groups
from ._interface import RowProgress, RowResult, RowSettings
from ._ray_data import map_rows
from ._run import run_rows

__all__ = [
    "GroupResult",
    "RowProgress",
    "RowResult",
    "RowSettings",
    "map_rows",
    "run_groups",
    "run_rows",
]
