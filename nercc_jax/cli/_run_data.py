"""`nercc run` over a data set: coded batches of a classifier, each decoded at enough answers."""

import dataclasses
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..codes import AbstractCode, NeRCC
from ..evaluation import make_forecast
from ..evaluation._answers import batched
from ..inference.models import Model, call_model
from ..pools import AbstractPool, PoolReport, run_batches
from ..pools._backend import pool_counts
from ..pools._batch import answers_to_wait_for
from ..pools._inference import BatchOutcome
from ..pools._row_files import Parts, check_parts, fingerprint
from ..pools._rows import ATTEMPTS, reason_to_stop
from ._errors import fail
from ._options import CALIBRATION, Returned
from ._output import summary_table, write_json
from ._process import compile_quickly
from ._run_pool import (
    PARTIAL,
    ChosenPool,
    check_result_file,
    deaths_text,
    parts_folder,
    summary_file,
    write_csv,
)
from ._workload import Points, WorkerModel, find_workload, load_plain_code

_FILES = (".npz", ".csv")  # or a folder, of parts
_COMPARED = 1000  # data points that are compared with the model


def run_data(options: Any, pool: ChosenPool, output: Path, resume: bool) -> None:
    """Run a model over a data set, as the command's options say.

    Raises ValueError if one does not fit, and exits with a code if not everything is done.
    """
    check_result_file(output, _FILES)
    folder = parts_folder(output)
    check_parts(folder, resume)
    if options.code is None:
        code = NeRCC(8 if options.num_data is None else options.num_data, options.num_workers)
    else:
        code = load_plain_code(options.code, f"--code {options.code}")
    number = _number_to_wait_for(code, options)
    model, groups = options.model, options.groups or 1
    asked = options.weights, options.inputs, options.data_dir, options.outputs
    table = {"columns": options.columns, "id_column": options.id_column}
    workload = find_workload(model, *asked, **table)
    network, source = workload.model, workload.rows(options.split)
    job = _Job.of(source, code, options.max_inputs, options.batches, groups)
    rows = job.batches.size * code.num_workers // code.num_data
    compile_quickly(network, job.inputs(job.rows[:1]), rows)
    console = Console()
    enough: Any = number
    if number is None:
        with console.status(f"calibrating on {CALIBRATION:,} training images ..."):
            enough = _enough_by_forecast(network, code, options, pool.worker_dtype)
    one = jnp.asarray(job.inputs(job.rows[:1]))
    outputs = jax.eval_shape(lambda x: call_model(network, x), one).shape[-1]
    results = _Results(job.rows, job.batches.shape[1], outputs, code.num_workers)
    settings = {
        "model": model,
        "weights": fingerprint(options.weights),
        "outputs": options.outputs,
        "data": workload.fingerprint(options.split),
        "rows": len(job.rows),
        "points": len(job.labels),
        "groups": job.groups,
        "code": fingerprint(options.code) or _describe(code),
        "worker_dtype": pool.worker_dtype,
    }
    parts = Parts(folder, settings, results, source.ids)
    sizes = code.num_data, code.num_workers
    example = job.batch(job.batches[0])[:, 0]  # as a worker gets it at once
    with pool.open(console, network, model, *sizes, example=example) as opened:
        until = _describe_rule(number, options.max_disagreement)
        console.print(
            f"{model}, {len(job.rows):,} data points of {source.name!r}, {_describe(code)}; "
            f"{pool.count(code.num_workers)} workers ({pool.kind}); decoding {until}, or after "
            f"{pool.deadline:g} s",
            soft_wrap=True,
        )
        if len(results):
            console.print(f"{len(results):,} data points are done already")
        counts = _run(console, opened, code, job, results, parts, enough, pool.deadline)
        report = opened.report()
    if len(results):
        if output != folder:
            _write(output, results, source, options.outputs)
        numbers = _numbers(network, code, job, results, counts, report, options.outputs)
        console.print(summary_table(_summary(numbers, report)))
        console.print(f"results: {output.resolve()}", soft_wrap=True)
        write_json(console, summary_file(output), settings | numbers)
    _exit_unless_done(results, counts, job, folder)
    if output != folder:
        shutil.rmtree(folder)


# What to run.


@dataclasses.dataclass(frozen=True)
class _Job:
    """The data points to go over.

    `rows` are indices into the split, `batches` the same with the fill of the last batch.
    """

    images: np.ndarray
    labels: Int[np.ndarray, " points"]
    preprocess: Any
    groups: int
    rows: Int[np.ndarray, " rows"]
    batches: Int[np.ndarray, "batches batch_size"]

    @classmethod
    def of(
        cls,
        source: Points,
        code: AbstractCode,
        points: int | None,
        batches: int | None,
        groups: int,
    ) -> "_Job":
        """Take rows in the split's order, from its start again if it ends before the batches do.

        A batch has as many groups as are asked for, at most as many as all data points fill.
        """
        labels = source.labels[:points]
        groups = min(groups, math.ceil(len(labels) / code.num_data))
        batch_size = groups * code.num_data
        number = math.ceil(len(labels) / batch_size) if batches is None else batches
        filled = np.arange(number * batch_size) % len(labels)
        rows = filled[: len(labels)] if batches is None else filled
        images = source.images[:points]
        return cls(images, labels, source.preprocess, groups, rows, filled.reshape(number, -1))

    def inputs(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self.preprocess(self.images[rows]))

    def batch(self, rows: np.ndarray) -> np.ndarray:
        x = self.inputs(rows)
        return x.reshape(self.groups, -1, *x.shape[1:])


def _number_to_wait_for(code: AbstractCode, options: Any) -> int | None:
    """Return how many answers are enough; None where a forecast decides."""
    wait_for, share = options.wait_for, options.max_disagreement
    if wait_for is not None and share is not None:
        raise ValueError("give --wait-for or --max-disagreement, not both")
    if share is not None:
        if not 0 <= share < 1:
            raise ValueError(f"--max-disagreement must be in [0, 1), not {share}")
        return None
    if wait_for is None:
        return answers_to_wait_for(code.num_data, code.num_workers)
    if not 1 <= wait_for <= code.num_workers:
        raise ValueError(f"--wait-for must be from 1 to N = {code.num_workers}, not {wait_for}")
    return wait_for


def _enough_by_forecast(
    network: WorkerModel, code: AbstractCode, options: Any, worker_dtype: str | None
) -> Any:
    """Return a rule for when to decode; raise ValueError if even all answers would not do."""
    limit = options.max_disagreement
    x, _ = network.images("train", options.data_dir, CALIBRATION, options.seed)
    forecast = make_forecast(network, code, x, worker_dtype=worker_dtype)
    enough = forecast.below(max_disagreement=limit)
    everyone = np.ones(code.num_workers, bool)
    if not enough(everyone):
        best = float(forecast.disagreement(everyone))
        raise ValueError(
            f"--max-disagreement {limit}: with this code {best:.4f} is expected even when all "
            f"{code.num_workers} workers answer; allow more, or use a tuned code (`nercc tune`)"
        )
    return enough


# Running it.


@dataclasses.dataclass
class _Counts:
    """Counts of a run so far."""

    batches: int = 0
    retried: int = 0
    short: int = 0
    stragglers: int = 0
    trouble: str | None = None
    start: float = dataclasses.field(default_factory=time.monotonic)
    seconds: float = 0.0
    rows: int = 0
    # Seconds and rows of the first batch, which waits for the compiler.
    first: tuple[float, int] = (0.0, 0)
    stopped: str | None = None  # why the run ended early
    interrupted: bool = False  # by Ctrl-C

    def add(self, outcome: BatchOutcome, rows: int, num_workers: int) -> None:
        self.seconds = time.monotonic() - self.start
        self.rows += rows
        if not self.batches:
            self.first = self.seconds, self.rows
        self.batches += 1
        self.retried += outcome.attempts > 1
        self.short += outcome.short
        answered = 0 if outcome.result is None else int(outcome.result.answers.available.sum())
        self.stragglers += num_workers - answered
        self.trouble = outcome.trouble or self.trouble

    @property
    def mean_stragglers(self) -> float:
        return self.stragglers / max(self.batches, 1)

    @property
    def speed(self) -> float:
        """The data points in a second, of all batches but the first if there are others."""
        seconds, rows = self.first if self.batches > 1 else (0.0, 0)
        return (self.rows - rows) / max(self.seconds - seconds, 1e-9)


def _run(
    console: Console,
    pool: AbstractPool,
    code: AbstractCode,
    job: _Job,
    results: "_Results",
    parts: Parts,
    enough: Any,
    deadline: float,
) -> _Counts:
    """Run the batches that are not done into the results, and these into their parts."""
    counts = _Counts()
    left = results.unfinished(len(job.batches))
    x = (job.batch(job.batches[batch]) for batch in left)
    columns = BarColumn(bar_width=12), MofNCompleteColumn(), TextColumn("{task.description}")
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("compiling ...", total=len(job.rows))
        progress.advance(task, len(results))
        try:
            for outcome in run_batches(
                pool, code, x, enough=enough, deadline=deadline, attempts=ATTEMPTS
            ):
                batch = left[outcome.number]
                rows = results.add(batch, outcome)
                parts.add([batch])
                counts.add(outcome, rows, code.num_workers)
                text = (
                    f"{counts.speed:,.0f} points/s, {counts.mean_stragglers:.1f} stragglers a "
                    f"batch, {pool.report().deaths} deaths"
                )
                progress.update(task, advance=rows, description=text)
                if (reason := reason_to_stop(pool)) is not None:
                    counts.stopped = reason
                    break
        except KeyboardInterrupt:
            counts.stopped, counts.interrupted = "interrupted", True
        finally:
            parts.flush(complete=not results.unfinished(len(job.batches)))
    return counts


# Results.


class _Results:
    """Rows in the order of the run, without those of batches that are not done yet.

    By name, as in their file: "index", the place in the split; "predictions", the decoded outputs,
    NaN where a data point is lost; "recovered", False for those; "responded", the workers whose
    answers a prediction rests on; and "batch", from 0.
    """

    def __init__(self, rows: Int[np.ndarray, " rows"], batch_size: int, outputs: int, workers: int):
        self._batch_size = batch_size
        self._done = np.zeros(len(rows), bool)
        self._arrays: dict[str, np.ndarray] = {
            "index": rows,
            "predictions": np.full((len(rows), outputs), np.nan, np.float32),
            "recovered": np.zeros(len(rows), bool),
            "responded": np.zeros((len(rows), workers), bool),
        }

    def __len__(self) -> int:
        return int(self._done.sum())

    def __getitem__(self, name: str) -> np.ndarray:
        """Return one thing of all rows that are done."""
        if name == "batch":
            return np.flatnonzero(self._done) // self._batch_size
        return self._arrays[name][self._done]

    def add(self, batch: int, outcome: BatchOutcome) -> int:
        """Take a batch, and return how many rows it has: its fill is left out."""
        rows = self._rows(batch)
        count = rows.stop - rows.start
        self._done[rows] = True
        if outcome.result is not None:
            decoded = outcome.result.decoded
            groups, num_data = decoded.recovered.shape
            recovered = np.asarray(decoded.recovered).ravel()[:count]
            responded = np.repeat(np.asarray(decoded.responded), num_data, axis=0)
            predictions = np.asarray(decoded.predictions).reshape(groups * num_data, -1)
            self._arrays["predictions"][rows] = predictions[:count]
            self._arrays["recovered"][rows] = recovered
            self._arrays["responded"][rows] = responded[:count] & recovered[:, None]
        return count

    def take(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take what `rows_of` returned of some batches in another process."""
        rows = np.concatenate([np.r_[self._rows(batch)] for batch in arrays["batches"].tolist()])
        for name in ("predictions", "recovered", "responded"):
            self._arrays[name][rows] = arrays[name]
        self._done[rows] = True

    def rows_of(self, batches: Sequence[int]) -> dict[str, np.ndarray]:
        """Return the rows of some batches, one after the other, as arrays by name."""
        rows = np.concatenate([np.r_[self._rows(batch)] for batch in batches])
        return {"batches": np.asarray(batches)} | {n: a[rows] for n, a in self._arrays.items()}

    def unfinished(self, batches: int) -> list[int]:
        """Return which of the batches are not recovered as a whole."""
        recovered = self._arrays["recovered"]
        return [each for each in range(batches) if not recovered[self._rows(each)].all()]

    def _rows(self, batch: int) -> slice:
        start = batch * self._batch_size
        return slice(start, min(start + self._batch_size, len(self._done)))

    @property
    def predicted(self) -> Int[np.ndarray, " done"]:
        """The label of each prediction, -1 for lost ones."""
        recovered = self["recovered"]
        clean = np.where(recovered[:, None], self["predictions"], 0)
        return np.where(recovered, clean.argmax(axis=1), -1)

    @property
    def lost(self) -> int:
        return int(np.sum(~self["recovered"]))


def _write(path: Path, results: _Results, source: Points, outputs: Returned) -> None:
    """Write the rows with the true labels; a .csv has the number of workers that responded."""
    index = results["index"]
    columns: dict[str, Any] = {} if source.ids is None else {"id": source.ids[index]}
    columns |= {
        "index": index,
        "batch": results["batch"],
        "label": source.labels[index],
        "predicted": results.predicted,
        "recovered": results["recovered"],
    }
    if outputs == "values":
        del columns["label"], columns["predicted"]
    responded, predictions = results["responded"], results["predictions"]
    if path.suffix == ".npz":
        np.savez(path, **columns, responded=responded, predictions=predictions)
        return
    columns["responded"] = responded.sum(axis=1)
    for output, values in enumerate(predictions.T):
        columns[f"output_{output}"] = values
    write_csv(path, columns)


# Reporting.


def _describe(code: AbstractCode) -> str:
    return f"{type(code).__name__} with K={code.num_data}, N={code.num_workers}"


def _describe_rule(number: int | None, max_disagreement: float | None) -> str:
    if max_disagreement is None:
        return f"at {number} answers"
    share = f"at most {100 * max_disagreement:g} % of labels"
    return f"once {share} are expected to differ from the model's own"


def _numbers(
    network: Model,
    code: AbstractCode,
    job: _Job,
    results: _Results,
    counts: _Counts,
    report: PoolReport,
    outputs: Returned,
) -> dict[str, Any]:
    """Return the counts of a run by the names of its summary file."""
    return {
        "data_points": counts.rows,
        "batches": counts.batches,
        "seconds": counts.seconds,
        "first_batch_seconds": counts.first[0],
        "points_per_second": counts.speed,
        "workers": code.num_workers,
        "stragglers_per_batch": counts.mean_stragglers,
        **pool_counts(report),
        "batches_sent_again": counts.retried,
        "short_batches": counts.short,
        "lost": results.lost,
        **_compared(network, job, results, outputs),
    }


def _summary(numbers: dict[str, Any], report: PoolReport) -> Iterator[tuple[str, str]]:
    batches = f"{numbers['batches']:,} batches, {numbers['seconds']:.1f} s"
    yield "data points", f"{numbers['data_points']:,} in {batches}"
    first = f"after {numbers['first_batch_seconds']:.1f} s for the first batch"
    yield "speed", f"{numbers['points_per_second']:,.0f} points/s, {first}"
    mean = f"{numbers['stragglers_per_batch']:.2f} of {numbers['workers']}"
    yield "stragglers", f"{mean} in a batch, when it was decoded"
    yield "late answers", f"{report.late:,}"
    yield "errors", f"{report.errors:,}"
    yield "deaths", deaths_text(report)
    yield "batches sent again", f"{numbers['batches_sent_again']:,}"
    short = "decoded at the deadline, from too few answers"
    yield "short batches", f"{numbers['short_batches']:,} ({short})"
    yield "lost data points", f"{numbers['lost']:,}"
    compared = numbers["compared"]
    if "rmse" in numbers:
        rmse, spread = numbers["rmse"], numbers["spread"]
        yield "error", f"RMSE {rmse:.3g} of {compared:,} rows, whose outputs spread by {spread:.3g}"
        return
    same = numbers["same_labels"]
    share = f"{100 * same / compared:.1f} %"
    yield "RelAcc", f"{share}: {same:,} of {compared:,} labels are the model's own"


def _compared(
    network: Model, job: _Job, results: _Results, outputs: Returned
) -> dict[str, int | float]:
    """Return how some evenly spread rows compare with the model's own: labels, or values."""
    some = np.unique(np.linspace(0, len(results) - 1, _COMPARED).astype(int))
    own = np.asarray(batched(network, 256)(job.inputs(results["index"][some])))
    if outputs != "values":
        same = int(np.sum(own.argmax(axis=1) == results.predicted[some]))
        return {"compared": len(some), "same_labels": same}
    own, known = own.reshape(len(some), -1), results["recovered"][some]
    error = (results["predictions"][some] - own)[known]
    numbers = {"rmse": np.sqrt(np.mean(error**2)), "spread": np.sqrt(np.mean(np.var(own, axis=0)))}
    return {"compared": int(known.sum()), **{name: float(each) for name, each in numbers.items()}}


def _exit_unless_done(results: _Results, counts: _Counts, job: _Job, folder: Path) -> None:
    """Exit with 130 after Ctrl-C, with 3 where data points are missing or lost."""
    resume = f"; {folder} has what is done, and --resume goes on from there"
    if counts.stopped is not None:
        count = f"{len(results):,} of {len(job.rows):,} data points are done"
        code = 130 if counts.interrupted else PARTIAL
        fail(f"{counts.stopped}: {count}{resume}", code)
    if results.lost:
        fail(
            f"{results.lost:,} of {len(results):,} data points were lost after {ATTEMPTS} "
            f"attempts and are NaN in the result{resume}; the last trouble: {counts.trouble}",
            PARTIAL,
        )
