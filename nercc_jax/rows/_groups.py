"""Coded inference on many data points: batches of groups on a pool, with results on disk."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from ..arrays import check_count
from ..codes import AbstractCode
from ..pools import AbstractPool, PoolReport, pool_inference
from ..pools.batch import Enough, check_deadline
from ._interface import RowProgress, summary_text
from .files import Parts, fingerprint, ids_of_rows


@dataclasses.dataclass(frozen=True)
class GroupResult:
    """The result of coded inference on many data points, in the order of the batches.

    Attributes:
        arrays: By name, for rows whose batch has ended: `index`, the number of the data point; its
            `batch`; `recovered`; `responded`, the mask of the workers whose answers were decoded,
            (rows, N); and `predictions`, the decoded outputs as a vector, NaN if it is lost.
        reasons: Why data points are lost, by row.
        summary: The settings and counts of the run, by name.
        report: The pool's report.
        stopped: Why the run was stopped early; None if it was not.
        ids: The ids of the rows, if they have any.
    """

    arrays: dict[str, Shaped[np.ndarray, "rows ..."]]
    reasons: dict[int, str]
    summary: dict[str, Any]
    report: PoolReport
    stopped: str | None
    ids: Shaped[np.ndarray, " rows"] | None = None

    def columns(self) -> dict[str, Shaped[np.ndarray, " rows"]]:
        """Return the columns of a table, for `pandas.DataFrame` or `pyarrow.table`.

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
        """Return the summary, one line for each number."""
        return summary_text(self.summary)


def run_groups(
    pool: AbstractPool,
    code: AbstractCode,
    x: Shaped[np.ndarray, "points ..."],
    *,
    enough: Enough | None = None,
    deadline: float = 60.0,
    groups: int = 1,
    batches: int | None = None,
    prepare: Callable[[np.ndarray], Any] = np.asarray,
    folder: Path | str | None = None,
    resume: bool = False,
    about: Mapping[str, Any] | None = None,
    ids: Shaped[np.ndarray, " points"] | Sequence[str | int] | None = None,
    on_progress: Callable[[RowProgress], Any] = lambda progress: None,
) -> GroupResult:
    """Run coded inference on each group of K data points, in batches, despite worker failures.

    The pool sends failed calls to other workers until the batch's deadline. Data points that are
    lost nevertheless are NaN, and the next batch follows. Results are written after each batch; a
    later run can continue from there, and tries lost data points again.

    Args:
        pool: The workers. One call has one coded data point of each group of a batch.
        code: The code.
        x: Data points. The last batch is filled up with the first data points.
        enough: When to decode, as in `pool_inference`.
        deadline: Seconds for each batch.
        groups: Groups in a batch, at most as many as the data points fill.
        batches: The most batches to run now; a later run goes on with the others (default: all).
        prepare: Maps the data points of a batch to the model's inputs.
        folder: The folder to which results are written during the run (default: none).
        resume: Continue the run in the folder, which must be of the same data points and code.
        about: Further facts that predictions depend on, such as the model, as JSON values; a run
            with other facts cannot be resumed.
        ids: An id of each data point, which the result and its files contain.
        on_progress: Called at the beginning, and after each batch.

    Returns:
        Predictions of the batches that have ended. After Ctrl-C, or if Ray is about to end this
        process, `stopped` gives the reason why others have not.

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
    deadline = check_deadline(deadline)
    num_data, workers, begin = code.num_data, code.num_workers, pool.clock.now()
    groups = min(check_count("groups", groups), math.ceil(len(x) / num_data))
    size, names = groups * num_data, ids_of_rows(ids, len(x))
    most = math.inf if batches is None else check_count("batches", batches)
    total, index, parts = len(x), np.arange(len(x)), None
    facts = {"rows": total, "groups": groups} | dict(about or {})
    table = {"index": index, "batch": index // size, "recovered": np.zeros(total, bool)}
    table |= {"responded": np.zeros((total, workers), bool), "predictions": np.zeros((total, 0))}
    recovered, came, reasons = table["recovered"], np.zeros(total, bool), dict[int, str]()

    def take(arrays: Mapping[str, np.ndarray]) -> None:
        own, predictions = arrays["index"], arrays["predictions"]
        if not came.any():  # the first predictions: their width is known now
            wide = (total, predictions.shape[1])
            table["predictions"] = np.full(wide, np.nan, np.float32)
        for name in ("recovered", "responded", "predictions"):
            table[name][own] = arrays[name]
        came[own] = True

    if folder is not None:
        arrays = [np.ravel(leaf) for leaf in jax.tree.leaves(code)]
        numbers = np.concatenate(arrays) if arrays else np.zeros(0)
        identity = {"inputs": fingerprint(x), "code": [type(code).__name__, fingerprint(numbers)]}
        parts = Parts(folder, facts | identity, names, resume=resume)
        for each in parts.read():
            take(each)
    done = batches_done = missing = 0  # data points, batches, and answers that did not come in time
    seconds = 0.0  # when the last batch ended

    def progress() -> RowProgress:
        known, report = int(np.sum(recovered)), pool.report()
        alive, lost = report.num_workers - report.starting, int(np.sum(came)) - known
        return RowProgress(total, known, 0, lost, alive, seconds, done / max(seconds, 1e-9))

    infer, stopped = pool_inference(pool, code, with_status=True, grouped=True), None
    on_progress(progress())
    try:
        for own in np.split(index, range(size, total, size)):
            if recovered[own].all():  # by an earlier run
                continue
            filled = np.arange(own[0], own[0] + size) % len(x)  # with the first rows, in the last
            made = np.asarray(prepare(x[filled]))
            try:
                found = infer(made.reshape(groups, num_data, *made.shape[1:]), enough, deadline)
            except (TimeoutError, RuntimeError) as error:  # nothing to decode, or recovered
                trouble, missing, came[own] = str(error), missing + workers, True
            else:
                decoded, available = found.decoded, found.answers.available
                missing += workers - int(available.sum())
                mask = np.asarray(decoded.recovered).reshape(-1)
                by_row = np.repeat(decoded.responded, num_data, axis=0) & mask[:, None]
                given = {"index": own, "recovered": mask, "responded": by_row}
                given["predictions"] = np.asarray(decoded.predictions).reshape(size, -1)
                take({name: each[: len(own)] for name, each in given.items()})
                trouble = (
                    f"{size - mask.sum()} of {size} data points cannot be recovered from the "
                    f"{available.sum()} answers that were in"
                )
                if parts is not None:  # a batch that raised is not written: a later run repeats it
                    parts.add({name: each[own] for name, each in table.items()})
            reasons |= dict.fromkeys(own[~recovered[own]].tolist(), trouble)
            done, batches_done = done + len(own), batches_done + 1
            seconds = pool.clock.now() - begin
            on_progress(progress())
            if (stopped := pool.ending) is not None or batches_done == most:
                break
    except KeyboardInterrupt:
        stopped = "interrupted"
    finally:
        if parts is not None:
            parts.flush(complete=bool(recovered.all()))

    report = pool.report()
    counts = {
        "rows_done": int(recovered.sum()),
        "data_points": done,
        "batches": batches_done,
        "seconds": seconds,
        "rows_per_second": progress().rows_per_second,
        "workers": workers,
        "stragglers_per_batch": missing / max(batches_done, 1),
        "lost": int(np.sum(came & ~recovered)),
    }
    arrays = {name: each[came] for name, each in table.items()}
    names, summary = None if names is None else names[index[came]], facts | counts
    return GroupResult(arrays, reasons, summary | report.summary(), report, stopped, names)
