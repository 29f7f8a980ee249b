"""A function on many rows, by the workers of a pool: each row is computed, or known well enough."""

from ._interface import RowFunction, RowProgress, RowResult, RowSettings
from ._ray_data import map_rows
from ._run import run_rows

__all__ = ["RowFunction", "RowProgress", "RowResult", "RowSettings", "map_rows", "run_rows"]
