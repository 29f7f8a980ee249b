"""Many rows on a pool: `run_rows` computes or predicts each; `run_groups` runs a code on them."""

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
