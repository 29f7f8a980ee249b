"""`run_rows` for a Ray Data dataset: every row by the deadline, with its expected error."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..pools import RayPool
from ..pools.ray_cluster import ray_module
from ._run import run_rows

ADDED = ("value", "error_bar", "status", "reason")


def map_rows(
    dataset: Any,
    function: Callable[[Any], Any],
    columns: str | Sequence[str],
    *,
    num_workers: int | None = None,
    **options: Any,
) -> Any:
    """Run a function on each row of a Ray Data dataset, as `run_rows` does.

    The dataset is executed first, and stays in Ray's object store. Then the function runs on actors
    of a `RayPool`, one for each CPU, which end before this function returns. So the pool never
    competes for CPUs with Ray Data, which waits for them without a message. Actors and nodes that
    die are replaced, and their rows are computed again.

    Rows are not streamed: all inputs are needed at the beginning, since the least certain rows are
    computed first, and error bars are known at the end, since the last answers may change them.
    `on_rows` gets computed rows during the run. All columns pass through this process.

    Args:
        dataset: A `ray.data.Dataset`.
        function: Any callable on (rows, ...) that returns an array (rows, ...).
        columns: The column that the function gets, as (rows, ...); or several columns, which it
            gets side by side as (rows, inputs).
        num_workers: Actors (default: one for each CPU; those that find no free CPU join later).
        **options: Those of `run_rows`: `tolerance`, `job_deadline`, `on_progress`, `folder`, ...

    Returns:
        A dataset with the rows and columns of the given one, and the columns `value`, `error_bar`
        (`RowResult.score`: 0 where computed, infinite without a value), `status` ("computed",
        "predicted", "unknown" or, after Ctrl-C, "waiting") and `reason` (why a row is unknown).

    Raises:
        ImportError: Without Ray Data.
        ValueError: A column is missing, does not hold finite numbers, or has the name of an added
            column; the dataset is empty; or an argument of `run_rows` does not fit.
        RuntimeError: No worker starts, or the function raises on all of the first rows.

    Example:
        ```text
        dataset = ray.data.read_parquet("inputs.parquet")
        found = map_rows(dataset, simulate, ["angle", "speed"], tolerance=0.02, job_deadline=600.0)
        found.write_parquet("outputs")
        ```
    """
    ray = ray_module()
    try:
        import ray.data
        from ray.data.block import BlockAccessor
    except ImportError as error:
        raise ImportError(
            f"Ray Data is missing ({error}): pip install '.[ray-data]' in a clone"
        ) from error
    names = [columns] if isinstance(columns, str) else list(columns)
    # Executed once, in the order of the rows. Ray's object store is read in place.
    tables = [each for each in ray.get(dataset.to_arrow_refs()) if each.num_rows]
    if not tables:
        raise ValueError("the dataset has no rows")
    present = tables[0].column_names
    if missing := [name for name in names if name not in present]:
        raise ValueError(f"the dataset has no column {missing[0]!r}; it has {', '.join(present)}")
    if taken := [name for name in present if name in ADDED]:
        raise ValueError(
            f"the dataset has a column {taken[0]!r}, which map_rows adds: rename it, or drop it"
        )
    parts: list[Any] = [BlockAccessor.for_block(table).to_numpy(names) for table in tables]
    inputs = []
    for name in names:
        each = [np.asarray(part[name]) for part in parts]
        finite = all(part.dtype.kind in "biuf" and np.isfinite(part).all() for part in each)
        if not finite or len({part.shape[1:] for part in each}) > 1:
            raise ValueError(f"column {name!r} must hold finite numbers, all of one shape")
        inputs.append(np.concatenate(each))
    x = inputs[0]
    if not isinstance(columns, str):
        x = np.concatenate([each.reshape(len(x), -1) for each in inputs], axis=1)
    if num_workers is None:
        # All CPUs, not the free ones: Ray counts those of tasks that have just ended as busy.
        num_workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
    pool = functools.partial(RayPool, min_workers=1)
    result = run_rows(function, x, pool, num_workers=num_workers, **options)
    reasons = np.array([result.reasons.get(row, "") for row in range(len(x))], dtype=object)
    values = np.full(len(x), np.nan) if result.values is None else result.values
    added = dict(zip(ADDED, (values, result.score, result.status, reasons), strict=True))
    found, begin = [], 0
    for table in tables:
        own = slice(begin, begin := begin + table.num_rows)
        piece = BlockAccessor.batch_to_arrow_block({name: y[own] for name, y in added.items()})
        found.append(BlockAccessor.for_block(table).zip(piece))
    return ray.data.from_arrow(found)
