"""What `nercc run` does: the data points to go over, the pool, the batches, the summary."""

import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..codes import AbstractCode, NeRCC
from ..evaluation import batched, make_forecast
from ..inference import Model
from ..pools import (
    AbstractPool,
    BatchOutcome,
    PoolReport,
    run_batches,
)
from ._errors import fail
from ._options import CALIBRATION
from ._result_parts import Parts
from ._results import Results
from ._run_pool import ATTEMPTS
from ._workload import Answering, Points, load_plain_code

PARTIAL = 3  # the exit code of a run that has results, but not all
LAST_WORDS = 10.0  # seconds to end a run by itself, before something else does
_COMPARED = 1000  # data points that are compared with the model


# What to run.


@dataclasses.dataclass(frozen=True)
class Job:
    """The data points to go over: `rows` are indices into the split, `batches` with the fill."""

    images: np.ndarray
    labels: Int[np.ndarray, " points"]
    preprocess: Any
    groups: int
    rows: Int[np.ndarray, " rows"]
    batches: Int[np.ndarray, "batches batch_size"]

    def inputs(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self.preprocess(self.images[rows]))

    def batch(self, rows: np.ndarray) -> np.ndarray:
        """(groups, K, ...)."""
        x = self.inputs(rows)
        return x.reshape(self.groups, -1, *x.shape[1:])

    def example(self) -> np.ndarray:
        """(groups, ...), what a worker gets at once."""
        return self.batch(self.batches[0])[:, 0]

    def num_outputs(self, network: Model) -> int:
        return jax.eval_shape(network, jnp.asarray(self.inputs(self.rows[:1]))).shape[-1]


def make_job(
    source: Points,
    code: AbstractCode,
    points: int | None,
    batches: int | None,
    groups: int,
) -> Job:
    """Rows in the split's order, from the start again where it ends before the batches do."""
    batch_size = groups * code.num_data
    labels = source.labels[:points]
    number = math.ceil(len(labels) / batch_size) if batches is None else batches
    filled = np.arange(number * batch_size) % len(labels)
    rows = filled[: len(labels)] if batches is None else filled
    batched_rows = filled.reshape(number, -1)
    return Job(source.images[:points], labels, source.preprocess, groups, rows, batched_rows)


def chosen_code(path: Path | None, num_data: int, num_workers: int) -> AbstractCode:
    if path is None:
        return NeRCC(num_data, num_workers)
    return load_plain_code(path, f"--code {path}")


def answers_to_wait_for(
    code: AbstractCode, wait_for: int | None, max_disagreement: float | None
) -> int | None:
    """How many answers will do; None where a forecast says it."""
    if wait_for is not None and max_disagreement is not None:
        raise ValueError("give --wait-for or --max-disagreement, not both")
    if max_disagreement is not None:
        if not 0 <= max_disagreement < 1:
            raise ValueError(f"--max-disagreement must be in [0, 1), not {max_disagreement}")
        return None
    if wait_for is None:
        return min(max(code.num_workers * 85 // 100, code.num_data), code.num_workers)
    if not 1 <= wait_for <= code.num_workers:
        raise ValueError(f"--wait-for must be from 1 to N = {code.num_workers}, not {wait_for}")
    return wait_for


def enough_by_forecast(
    network: Answering,
    code: AbstractCode,
    data_dir: Path | None,
    limit: float,
    seed: int,
    worker_dtype: str | None,
) -> Any:
    """Raises: ValueError where not even all workers' answers are expected to be good enough."""
    x, _ = network.images("train", data_dir, CALIBRATION, seed)
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
class _Seen:
    """What the run has met so far, batch by batch."""

    batches: int = 0
    retried: int = 0
    short: int = 0
    stragglers: int = 0
    trouble: str | None = None
    start: float = dataclasses.field(default_factory=time.monotonic)
    seconds: float = 0.0
    rows: int = 0
    # Of the first batch, which waits for the compiler.
    first: tuple[float, int] = (0.0, 0)
    stopped: str | None = None  # why it ended before its time
    interrupted: bool = False  # by Ctrl-C

    def add(self, outcome: BatchOutcome, rows: int, num_workers: int) -> None:
        self.seconds = time.monotonic() - self.start
        self.rows += rows
        if not self.batches:
            self.first = self.seconds, self.rows
        self.batches += 1
        self.retried += outcome.attempts > 1
        self.short += outcome.short
        heard = 0 if outcome.result is None else int(outcome.result.answers.available.sum())
        self.stragglers += num_workers - heard
        self.trouble = outcome.trouble or self.trouble

    @property
    def mean_stragglers(self) -> float:
        return self.stragglers / max(self.batches, 1)

    @property
    def speed(self) -> float:
        """Data points a second, of all batches but the first if there are others."""
        seconds, rows = self.first if self.batches > 1 else (0.0, 0)
        return (self.rows - rows) / max(self.seconds - seconds, 1e-9)


def run_job(
    console: Console,
    pool: AbstractPool,
    code: AbstractCode,
    job: Job,
    results: Results,
    parts: Parts,
    enough: Any,
    deadline: float,
) -> _Seen:
    """Runs the batches that are not done into the results, and these into their parts."""
    seen = _Seen()
    left = results.unfinished(len(job.batches))
    x = (job.batch(job.batches[batch]) for batch in left)
    with _bar(console) as progress:
        task = progress.add_task("", total=len(job.rows), seen="compiling ...")
        progress.advance(task, len(results))
        try:
            for outcome in run_batches(
                pool, code, x, enough=enough, deadline=deadline, attempts=ATTEMPTS
            ):
                batch = left[outcome.number]
                rows = results.add(batch, outcome)
                parts.add([batch])
                seen.add(outcome, rows, code.num_workers)
                told = (
                    f"{seen.speed:,.0f} points/s, {seen.mean_stragglers:.1f} stragglers a batch, "
                    f"{pool.report().deaths} deaths"
                )
                progress.update(task, advance=rows, seen=told)
                if pool.ends_at - time.monotonic() < LAST_WORDS:
                    seen.stopped = "stopped before Ray ends this process, whose head is gone"
                    break
        except KeyboardInterrupt:
            seen.stopped, seen.interrupted = "interrupted", True
        finally:
            parts.flush(complete=not results.unfinished(len(job.batches)))
    return seen


def _bar(console: Console) -> Progress:
    return Progress(
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[seen]}"),
        TimeRemainingColumn(),
        console=console,
    )


# Telling of it.


def describe(code: AbstractCode) -> str:
    return f"{type(code).__name__} with K={code.num_data}, N={code.num_workers}"


def describe_rule(number: int | None, max_disagreement: float | None) -> str:
    if max_disagreement is None:
        return f"at {number} answers"
    share = f"at most {100 * max_disagreement:g} % of labels"
    return f"once {share} are expected to differ from the model's own"


def numbers_of(
    network: Model,
    code: AbstractCode,
    job: Job,
    results: Results,
    seen: _Seen,
    report: PoolReport,
) -> dict[str, Any]:
    """What the run has met, by name."""
    same, compared = _agreement(network, job, results)
    return {
        "data_points": seen.rows,
        "batches": seen.batches,
        "seconds": seen.seconds,
        "first_batch_seconds": seen.first[0],
        "points_per_second": seen.speed,
        "workers": code.num_workers,
        "stragglers_per_batch": seen.mean_stragglers,
        **pool_numbers(report),
        "batches_sent_again": seen.retried,
        "short_batches": seen.short,
        "lost": results.lost,
        "compared": compared,
        "same_labels": same,
    }


def pool_numbers(report: PoolReport) -> dict[str, Any]:
    """What a pool has met, by name."""
    return {
        "late_answers": report.late,
        "errors": report.errors,
        "deaths": report.deaths,
        "deaths_by_worker": [int(deaths) for deaths in report.deaths_by_worker],
        "hung": report.hung,
    }


def told(numbers: dict[str, Any], report: PoolReport) -> Iterator[tuple[str, str]]:
    """The same for a person."""
    batches = f"{numbers['batches']:,} batches, {numbers['seconds']:.1f} s"
    yield "data points", f"{numbers['data_points']:,} in {batches}"
    first = f"after {numbers['first_batch_seconds']:.1f} s for the first batch"
    yield "speed", f"{numbers['points_per_second']:,.0f} points/s, {first}"
    mean = f"{numbers['stragglers_per_batch']:.2f} of {numbers['workers']}"
    yield "stragglers", f"{mean} a batch, by the time of decoding"
    yield "late answers", f"{report.late:,}"
    yield "errors", f"{report.errors:,}"
    yield "deaths", deaths_told(report)
    yield "batches sent again", f"{numbers['batches_sent_again']:,}"
    short = "decoded at the deadline, from too few answers"
    yield "short batches", f"{numbers['short_batches']:,} ({short})"
    yield "lost data points", f"{numbers['lost']:,}"
    same, compared = numbers["same_labels"], numbers["compared"]
    share = f"{100 * same / compared:.1f} %"
    yield "RelAcc", f"{share}: {same:,} of {compared:,} labels are the model's own"


def deaths_told(report: PoolReport) -> str:
    if not report.deaths:
        return "0"
    by_worker = ", ".join(
        f"worker {worker}: {deaths}"
        for worker, deaths in enumerate(report.deaths_by_worker)
        if deaths
    )
    hung = f", {report.hung} of them hung" if report.hung else ""
    return f"{report.deaths:,}{hung} ({by_worker})"


def _agreement(network: Model, job: Job, results: Results) -> tuple[int, int]:
    """In how many of at most `_COMPARED` rows, evenly spread, the label is the model's own."""
    some = np.unique(np.linspace(0, len(results) - 1, _COMPARED).astype(int))
    own = np.asarray(batched(network, 256)(job.inputs(results.index[some]))).argmax(axis=1)
    return int(np.sum(own == results.predicted[some])), len(some)


def conclude(results: Results, seen: _Seen, job: Job, folder: Path) -> None:
    """Exits with 130 after Ctrl-C, with 3 where data points are missing or lost."""
    resume = f"; {folder} has what is done, and --resume goes on from there"
    if seen.stopped is not None:
        count = f"{len(results):,} of {len(job.rows):,} data points are done"
        fail(f"{seen.stopped}: {count}{resume}", 130 if seen.interrupted else PARTIAL)
    if results.lost:
        fail(
            f"{results.lost:,} of {len(results):,} data points were lost after {ATTEMPTS} "
            f"attempts and are NaN in the result{resume}; the last trouble: {seen.trouble}",
            PARTIAL,
        )
