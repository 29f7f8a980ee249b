"""Rows of a Ray Data dataset through `run_rows`: every row by the deadline, with an error bar."""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

from ..pools import RayPool
from ..pools.ray_cluster import ray_module
from ._run import run_rows

_LOG = logging.getLogger(__name__)

ADDED = ("value", "error_bar", "status", "reason")
_ROW = "__nercc_row__"  # the column that keeps rows and their results together


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
    of a `RayPool`, one for each CPU, which end before this returns: Ray Data, which waits for
    CPUs without a word, never has to share them with the pool. Actors and nodes that die are
    replaced, and their rows are computed again.

    Rows do not stream through. Those that tell most about all others are computed first, and
    answers that come last may still change an error bar: so all inputs are needed at the beginning,
    and bars are known at the end. `on_rows` gets computed rows as they come. Inputs and values pass
    through this process, but no other columns: with a million rows of 10 inputs and 10 outputs its
    memory grew from 0.5 to 1.0 GB.

    Args:
        dataset: A `ray.data.Dataset`.
        function: Any callable on (rows, ...) that returns an array (rows, ...).
        columns: The column that the function gets, as (rows, ...); or several, which it gets side
            by side as (rows, inputs).
        num_workers: Actors (default: one for each CPU; those that find none free join later).
        **options: Those of `run_rows`: `tolerance`, `job_deadline`, `on_progress`, `folder`, ...

    Returns:
        A dataset with the rows and columns of the given one, and the columns `value`, `error_bar`
        (0 where computed, infinite where nothing is known), `status` ("computed", "predicted" or
        "unknown") and `reason` (why a row is unknown, else empty).

    Raises:
        ImportError: Without Ray Data.
        ValueError: A column is missing, is not of finite numbers, or has the name of one of those
            that are added; the dataset is empty; or an argument of `run_rows` does not fit.
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
    except ImportError as error:
        raise ImportError(
            f"Ray Data is missing ({error}): pip install '.[ray-data]' in a clone"
        ) from error
    names = [columns] if isinstance(columns, str) else list(columns)
    held, rows = _with_row_numbers(ray, dataset, names)
    x = _inputs(held, rows, names, stacked=not isinstance(columns, str))
    if num_workers is None:
        # Not those that are free: Ray counts the CPUs of tasks that have just ended for a while.
        num_workers = max(1, int(ray.cluster_resources().get("CPU", 1)))
    pool = functools.partial(RayPool, min_workers=1)
    result = run_rows(function, x, pool, num_workers=num_workers, **options)
    _LOG.info("rows: %s", result.summary)
    reasons = [result.reasons.get(row, "") for row in range(rows)]
    values = np.full(rows, np.nan) if result.values is None else result.values
    found = (values, result.deviation, result.status, np.array(reasons, dtype=object))
    # In a list it is passed on as a reference, and stays once on each node.
    known = {"known": [ray.put(dict(zip(ADDED, found, strict=True)))]}
    get: Any = ray.get
    joined = held.map_batches(
        lambda batch, known: (
            batch | {name: each[batch[_ROW]] for name, each in get(known[0]).items()}
        ),
        fn_kwargs=known,
        batch_format="numpy",
    )
    return joined.drop_columns([_ROW])


def _with_row_numbers(ray: Any, dataset: Any, names: Sequence[str]) -> tuple[Any, int]:
    """Execute the dataset, and return it with a column of row numbers, and how many there are.

    Ray Data may reorder what it processes: the number goes along with the row.
    """
    # Ray's workers get lambdas by value, and import neither this package nor JAX for them. A task
    # takes a CPU: of those without one Ray would start as many processes as there are blocks.
    blocks = dataset.to_arrow_refs()
    size = ray.remote(lambda table: (table.num_rows, table.column_names))
    number = ray.remote(
        lambda table, first: table.append_column(_ROW, [np.arange(first, first + table.num_rows)])
    )
    known = ray.get([size.remote(block) for block in blocks])
    present = next((columns for rows, columns in known if rows), None)
    if present is None:
        raise ValueError("the dataset has no rows")
    if missing := [name for name in names if name not in present]:
        raise ValueError(f"the dataset has no column {missing[0]!r}; it has {', '.join(present)}")
    if taken := [name for name in present if name in ADDED]:
        raise ValueError(
            f"the dataset has a column {taken[0]!r}, which map_rows adds: rename it, or drop it"
        )

    ends = np.cumsum([rows for rows, _ in known])
    blocks = [
        number.remote(block, int(end) - rows)
        for block, end, (rows, _) in zip(blocks, ends, known, strict=True)
        if rows
    ]
    return ray.data.from_arrow_refs(blocks), int(ends[-1])


def _inputs(
    held: Any, rows: int, names: Sequence[str], stacked: bool
) -> Shaped[np.ndarray, "rows ..."]:
    """Return the function's inputs, in the order of the row numbers."""
    x = np.zeros((0, 0))
    inputs = held.select_columns([_ROW, *names])
    for batch in inputs.iter_batches(batch_size=None, batch_format="numpy"):
        columns = [np.asarray(batch[name]) for name in names]
        for name, each in zip(names, columns, strict=True):
            if each.dtype.kind not in "biuf" or not np.isfinite(each).all():
                raise ValueError(f"column {name!r} must hold finite numbers, all of one shape")
        part = columns[0]
        if stacked:
            part = np.concatenate([each.reshape(len(each), -1) for each in columns], axis=1)
        if not len(x):
            x = np.empty((rows, *part.shape[1:]), part.dtype)
        x = x.astype(np.result_type(x, part), copy=False)  # blocks may differ
        x[batch[_ROW]] = part
    return x
