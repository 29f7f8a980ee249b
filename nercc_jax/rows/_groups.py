"""Coded inference on many data points: batches of groups on a pool, kept on disk as they come."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from ..codes import AbstractCode
from ..codes._checks import check_count
from ..evaluation.tables import text_table
from ..pools import AbstractPool, PoolReport, PoolResult, pool_inference
from ..pools.backend import pool_counts
from ..pools.batch import Enough, check_deadline
from ._interface import RowProgress
from .files import Parts, check_parts, ids_of_rows


@dataclasses.dataclass(frozen=True)
class GroupResult:
    """The result of coded inference on many data points, in the order of the batches.

    Attributes:
        arrays: By name: `index`, the data point's place; its `batch`; `recovered`; `responded`, the
            workers whose answers its prediction rests on, (rows, N); and `predictions`, the decoded
            outputs as a vector, NaN where the data point is lost. Only rows whose batch has ended.
        reasons: Why data points are lost, by row.
        summary: The settings and counts of the run, by name.
        report: Of the pool.
        stopped: Why the run ended early, if it did.
        ids: The ids of the rows, if they have any.
    """

    arrays: dict[str, Shaped[np.ndarray, "rows ..."]]
    reasons: dict[int, str]
    summary: dict[str, Any]
    report: PoolReport
    stopped: str | None
    ids: Shaped[np.ndarray, " rows"] | None = None

    def columns(self) -> dict[str, Shaped[np.ndarray, " rows"]]:
        """Return a table's columns, as `pandas.DataFrame` and `pyarrow.table` take them.

        Returns:
            `id`, if rows have ids; `index`, `batch`, `recovered`; `responded`, the number of
            workers; `output_0`, `output_1` and so on.
        """
        columns = {} if self.ids is None else {"id": self.ids}
        columns |= {name: self.arrays[name] for name in ("index", "batch", "recovered")}
        columns["responded"] = self.arrays["responded"].sum(axis=1)
        outputs = enumerate(self.arrays["predictions"].T)
        return columns | {f"output_{number}": each for number, each in outputs}

    def __str__(self) -> str:
        """Return what the run did, a line for each count."""
        of = self.summary
        speed, first = of["points_per_second"], of["first_batch_seconds"]
        many = self.arrays["responded"].shape[1]
        late = f"{of['stragglers_per_batch']:.2f} of {many} in a batch, when it was decoded"
        lines = {
            "data points": f"{of['data_points']:,} in {of['batches']:,} batches, "
            f"{of['seconds']:.1f} s",
            "speed": f"{speed:,.0f} points/s, after {first:.1f} s for the first batch",
            "stragglers": late,
            "batches sent again": f"{of['batches_sent_again']:,}",
            "short batches": f"{of['short_batches']:,} (decoded from too few answers)",
            "lost data points": f"{of['lost']:,}",
            "workers": str(self.report),
        }
        return text_table(lines.items(), left=2)


def run_groups(
    pool: AbstractPool,
    code: AbstractCode,
    x: Shaped[np.ndarray, "points ..."],
    *,
    enough: Enough | None = None,
    deadline: float = 60.0,
    attempts: int = 3,
    groups: int = 1,
    batches: int | None = None,
    prepare: Callable[[np.ndarray], Any] = np.asarray,
    folder: Path | str | None = None,
    resume: bool = False,
    about: Mapping[str, Any] | None = None,
    ids: Shaped[np.ndarray, " points"] | Sequence[str | int] | None = None,
    on_progress: Callable[[RowProgress], Any] = lambda progress: None,
) -> GroupResult:
    """Run coded inference on each group of K data points, in batches, whatever happens to workers.

    A batch that is not recovered whole is dispatched again, each time with its own deadline; the
    attempt that recovered most counts. Data points that are lost in spite of that are NaN, and the
    next batch follows. What is known is written to a folder as it comes, and a later run continues
    from there.

    Args:
        pool: The workers. One of them gets a coded data point of each group of a batch at once.
        code: The code.
        x: Data points. The last batch begins again at their start, to be full.
        enough: When to decode, as in `pool_inference`.
        deadline: Seconds for each attempt at a batch.
        attempts: How often a batch is dispatched at most.
        groups: Groups in a batch, at most as many as the data points fill.
        batches: Batches to run, over the data again and again (default: once over them).
        prepare: Called with the data points of a batch, as the model takes them.
        folder: Where results are written as they come (default: nowhere).
        resume: Go on with the run that the folder holds.
        about: What else predictions depend on, such as the model, as JSON takes it; a run with
            other values cannot be resumed.
        ids: An id of each data point, which the result and its files carry.
        on_progress: Called at the beginning, and after each batch.

    Returns:
        Predictions of the batches that have ended. After Ctrl-C, or where the pool is about to end,
        `stopped` says why others have not.

    Raises:
        ValueError: If an argument does not fit, or the folder holds another run.

    Example:
        >>> from nercc_jax import DevicePool, NeRCC
        >>> from nercc_jax.rows import run_groups
        >>> x = np.linspace(0, 1, 30, dtype=np.float32).reshape(10, 3)
        >>> with DevicePool(np.tanh, 6, compiled=False) as pool:
        ...     result = run_groups(pool, NeRCC(4, 6), x, enough=5)
        >>> result.arrays["predictions"].shape
        (10, 3)
    """
    attempts, deadline = check_count("attempts", attempts), check_deadline(deadline)
    count, num_data, begin = len(x), code.num_data, pool.clock.now()
    groups = min(check_count("groups", groups), math.ceil(count / num_data))
    size = groups * num_data
    number = math.ceil(count / size) if batches is None else check_count("batches", batches)
    places = np.arange(number * size) % count
    rows = _Rows(places[: count if batches is None else None], size, code.num_workers)
    total, names = len(rows.known), ids_of_rows(ids, count)
    facts, parts = {"rows": total, "points": count, "groups": groups} | dict(about or {}), None
    if folder is not None:
        check_parts(Path(folder), resume)
        parts = Parts(Path(folder), facts, rows, names)
    recovered, ended = rows.known["recovered"], rows.known["done"]
    left = [each for each in range(number) if not recovered[each * size :][:size].all()]

    def progress() -> RowProgress:
        known, report = int(np.sum(recovered & ended)), pool.report()
        alive, seconds = report.num_workers - report.starting, pool.clock.now() - begin
        new = sum(each[0] for each in log[1:] or log)  # the first batch compiles
        speed = new / max(log[-1][1] - log[0][1] * (len(log) > 1), 1e-9) if log else 0.0
        lost = int(np.sum(ended)) - known
        return RowProgress(total, known, 0, lost, 0, alive, seconds, speed)

    # Of each batch: rows, when it ended, stragglers, whether it was sent again, or was short.
    log: list[tuple[int, float, int, bool, bool]] = []
    reasons: dict[int, str] = {}
    infer, stopped = pool_inference(pool, code, with_status=True, grouped=True), None
    on_progress(progress())
    try:
        for number in left:
            made = np.asarray(prepare(x[places[number * size :][:size]]))
            made = made.reshape(groups, num_data, *made.shape[1:])
            result: PoolResult | None = None
            most, tries, trouble, own = 0, 0, "", np.arange(total)[number * size :][:size]
            while tries < attempts and most < size:
                tries += 1
                try:
                    found = infer(made, enough, deadline)
                except (TimeoutError, RuntimeError) as error:  # nothing to decode, or recovered
                    trouble = str(error)
                    continue
                known = int(np.sum(found.decoded.recovered))
                if known > most:
                    result, most = found, known
                if known < size:
                    trouble = (
                        f"{size - known} of {size} data points cannot be recovered from the "
                        f"{found.answers.available.sum()} answers that were in"
                    )

            late, short = code.num_workers, False
            if result is None:
                ended[own] = True
            else:
                decoded, available = result.decoded, result.answers.available
                late -= int(available.sum())
                needed = code.num_workers if enough is None else enough
                short = not (needed(available) if callable(needed) else available.sum() >= needed)
                whole = np.asarray(decoded.recovered)
                by_row = np.repeat(decoded.responded, num_data, axis=0) & whole.reshape(-1, 1)
                predictions = np.asarray(decoded.predictions).reshape(size, -1)
                given = {"row": own, "predictions": predictions}
                rows.take(given | {"recovered": whole.ravel(), "responded": by_row})
            lost = own[~recovered[own]].tolist()
            reasons |= dict.fromkeys(lost, f"{trouble} (after {tries} attempts)")
            log.append((len(own), pool.clock.now() - begin, late, tries > 1, short))
            if parts is not None:
                parts.add(own.tolist())
            on_progress(progress())
            if (stopped := pool.ending) is not None:
                break
    except KeyboardInterrupt:
        stopped = "interrupted"
    finally:
        if parts is not None:
            parts.flush(complete=bool(recovered.all()))

    done, ends, late, again, short = np.array(log or np.zeros((0, 5))).T
    report = pool.report()
    counts = {
        "rows_done": int(recovered.sum()),
        "data_points": int(done.sum()),
        "batches": len(log),
        "seconds": float(ends.max(initial=0.0)),
        "first_batch_seconds": float(ends[:1].sum()),
        "points_per_second": progress().rows_per_second,
        "workers": code.num_workers,
        "stragglers_per_batch": float(late.sum() / max(len(log), 1)),
        "batches_sent_again": int(again.sum()),
        "short_batches": int(short.sum()),
        "lost": int(np.sum(ended & ~recovered)),
    }
    arrays = rows.rows_of(np.flatnonzero(ended))
    arrays.pop("row")
    names = None if names is None else names[arrays["index"]]
    return GroupResult(
        arrays, reasons, facts | counts | pool_counts(report), report, stopped, names
    )


class _Rows:
    """The rows of a run's batches, as its parts have them: what is known of each, and outputs."""

    def __init__(self, index: Shaped[np.ndarray, " rows"], size: int, workers: int):
        columns = {"index": int, "batch": int, "recovered": bool, "responded": (bool, workers)}
        self.known = np.zeros(len(index), [*columns.items(), ("done", bool)])
        self.known["index"], self.known["batch"] = index, np.arange(len(index)) // size
        self.predictions = np.zeros((len(index), 0), np.float32)  # until their width is known

    def take(self, arrays: Mapping[str, np.ndarray], /) -> None:
        """Take what `rows_of` returned; a batch's filling beyond the rows is cut."""
        rows, predictions = arrays["row"], arrays["predictions"]
        if predictions.shape[1] > self.predictions.shape[1]:
            self.predictions = np.full((len(self.known), predictions.shape[1]), np.nan, np.float32)
        if predictions.shape[1] == self.predictions.shape[1]:
            self.predictions[rows] = predictions[: len(rows)]
        for name in ("recovered", "responded"):
            self.known[name][rows] = arrays[name][: len(rows)]
        self.known["done"][rows] = True

    def rows_of(self, pieces: Sequence[int] | np.ndarray, /) -> dict[str, np.ndarray]:
        """Return some rows as arrays by name."""
        rows, names = np.asarray(pieces), ("index", "batch", "recovered", "responded")
        known = {name: self.known[name][rows] for name in names}
        return {"row": rows} | known | {"predictions": self.predictions[rows]}
