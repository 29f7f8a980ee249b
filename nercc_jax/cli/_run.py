"""`nercc run`: coded batch inference over a data set on a pool of workers."""

import contextlib
import dataclasses
import importlib.util
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jaxtyping import Int
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..codes import AbstractCode, NeRCC
from ..evaluation import batched, make_forecast
from ..pools import (
    AbstractPool,
    BatchOutcome,
    DevicePool,
    Fault,
    Faults,
    PoolReport,
    RayPool,
    run_batches,
)
from ..stragglers import TraceLatency
from ._errors import fail, told_plainly
from ._results import Results, check_kind, write_results
from ._workload import (
    Answering,
    DataDir,
    ModelName,
    NumData,
    NumWorkers,
    OutputsOption,
    answering,
    check_folder,
    load_plain_code,
)

# How often a batch is dispatched before its data points are lost.
_ATTEMPTS = 3
# A worker is taken to hang when all attempts but one are over: the last finds new ones if all hung.
# But not sooner than this many seconds: it may straggle, and a new one needs its time too.
_HANG = 10.0
# Training images that a forecast is calibrated on; data points that are compared with the model.
_CALIBRATION = _COMPARED = 1000


def run_command(
    model: ModelName = "lenet5-digits",
    data_dir: DataDir = None,
    split: Annotated[str, typer.Option(help="The data set's split to go over.")] = "test",
    num_data: NumData = 8,
    num_workers: NumWorkers = 20,
    code: Annotated[
        Path | None,
        typer.Option(help="A code that `nercc tune` wrote; K and N are its own. NeRCC unless set."),
    ] = None,
    pool: Annotated[
        Literal["devices", "ray"],
        typer.Option(help="Workers: threads on this process's devices, or Ray actors."),
    ] = "devices",
    workers: Annotated[
        int | None, typer.Option(help="Workers in the pool, spare ones or fewer; N unless given.")
    ] = None,
    wait_for: Annotated[
        int | None,
        typer.Option(help="Decode at so many answers; 85 % of N unless given, but at least K."),
    ] = None,
    max_disagreement: Annotated[
        float | None,
        typer.Option(
            help="Instead: decode once no larger share of labels is expected to differ from the "
            f"model's own, by {_CALIBRATION:,} training images."
        ),
    ] = None,
    deadline: Annotated[
        float, typer.Option(help="Seconds after which a batch is decoded from what is in.")
    ] = 30.0,
    groups: Annotated[int, typer.Option(help="Groups of K data points in a batch.")] = 1,
    points: Annotated[
        int | None, typer.Option(help="Data points to use, at most; the whole split unless given.")
    ] = None,
    batches: Annotated[
        int | None,
        typer.Option(help="Batches to run, over the data again and again; once unless given."),
    ] = None,
    outputs: OutputsOption = "logits",
    straggler_rate: Annotated[
        float, typer.Option(help="On trial: the share of calls that are delayed on purpose ...")
    ] = 0.0,
    straggler_delay: Annotated[float, typer.Option(help="... and by how many seconds.")] = 1.0,
    death_rate: Annotated[
        float, typer.Option(help="On trial: the share of calls in which the worker dies.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the faults and of the calibration.")] = 0,
    output: Annotated[Path, typer.Option(help="Result file, .npz or .csv.")] = Path(
        "nercc-run.npz"
    ),
) -> None:
    """Coded inference over a data set on a pool; workers may straggle or die while it runs.

    Each batch is encoded, sent to the workers, and decoded once enough answered.
    One that cannot be recovered is sent again; what is lost in spite of that is
    told, and the exit code is 1. Ctrl-C writes what is done.
    """
    with told_plainly():
        check_folder("--output", output)
        check_kind(output)
        _check_positive("--groups", groups, "--points", points, "--batches", batches)
        _check_positive("--workers", workers, "--deadline", deadline)
        faults = _faults(straggler_rate, straggler_delay, death_rate, seed)
        if pool == "ray" and importlib.util.find_spec("ray") is None:
            raise ImportError("--pool ray needs Ray: pip install 'nercc-jax[ray]'")
        chosen = _code(code, num_data, num_workers)
        number = _answers_to_wait_for(chosen, wait_for, max_disagreement)
        network = answering(model, outputs)
        job = _job(network, chosen, split, data_dir, points, batches, groups)
        console = Console()
        enough: Any = number
        if max_disagreement is not None:
            with console.status(f"calibrating on {_CALIBRATION:,} training images ..."):
                enough = _forecast(network, chosen, data_dir, max_disagreement, seed)
        count = chosen.num_workers if workers is None else workers
        with _open(console, pool, network, count, job, faults, deadline) as opened:
            told = f"{model}, {len(job.rows):,} data points of {split!r}, {_describe(chosen)}; "
            until = _when(number, max_disagreement)
            console.print(
                f"{told}{count} workers ({pool}); decoding {until}, or after {deadline:g} s",
                soft_wrap=True,
            )
            size, outputs_number = job.batches.shape[1], job.num_outputs(network)
            results = Results(job.rows, size, outputs_number, chosen.num_workers)
            seen, interrupted = _go(console, opened, chosen, job, results, enough, deadline)
            report = opened.report()
        if len(results):
            write_results(output, results, job.labels)
            console.print(_summary(network, chosen, job, results, seen, report))
            console.print(f"results: {output.resolve()}", soft_wrap=True)
        _conclude(results, seen, job, interrupted)


# What to run.


@dataclasses.dataclass(frozen=True)
class _Job:
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

    def num_outputs(self, network: Answering) -> int:
        return jax.eval_shape(network, jnp.asarray(self.inputs(self.rows[:1]))).shape[-1]


def _job(
    network: Answering,
    code: AbstractCode,
    split: str,
    data_dir: Path | None,
    points: int | None,
    batches: int | None,
    groups: int,
) -> _Job:
    """Rows in the split's order, from the start again where it ends before the batches do."""
    from nercc_models import load_data

    batch_size = groups * code.num_data
    data = load_data(network.network.data, split, data_dir=data_dir, limit=points)
    number = math.ceil(len(data.labels) / batch_size) if batches is None else batches
    filled = np.arange(number * batch_size) % len(data.labels)
    rows = filled[: len(data.labels)] if batches is None else filled
    preprocess = network.network.preprocess
    return _Job(data.images, data.labels, preprocess, groups, rows, filled.reshape(number, -1))


def _code(path: Path | None, num_data: int, num_workers: int) -> AbstractCode:
    if path is None:
        return NeRCC(num_data, num_workers)
    return load_plain_code(path, f"--code {path}")


def _answers_to_wait_for(
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


def _forecast(
    network: Answering, code: AbstractCode, data_dir: Path | None, limit: float, seed: int
) -> Any:
    """Raises: ValueError where not even all workers' answers are expected to be good enough."""
    x, _ = network.images("train", data_dir, _CALIBRATION, seed)
    forecast = make_forecast(network, code, x)
    enough = forecast.below(max_disagreement=limit)
    everyone = np.ones(code.num_workers, bool)
    if not enough(everyone):
        best = float(forecast.disagreement(everyone))
        raise ValueError(
            f"--max-disagreement {limit}: with this code {best:.4f} is expected even when all "
            f"{code.num_workers} workers answer; allow more, or use a tuned code (`nercc tune`)"
        )
    return enough


def _faults(rate: float, delay: float, death_rate: float, seed: int) -> Faults:
    for option, value in (("--straggler-rate", rate), ("--death-rate", death_rate)):
        if not 0 <= value <= 1:
            raise ValueError(f"{option} is a share of the calls, from 0 to 1, not {value}")
    _check_positive("--straggler-delay", delay)
    return Faults(
        [
            Fault("delay", rate, latency=TraceLatency(jnp.array([delay]))),
            Fault("death", death_rate),
        ],
        seed=seed,
    )


def _check_positive(*options: Any) -> None:
    """Options and values in turn. Raises: ValueError for one that is given and not positive."""
    for option, value in zip(options[::2], options[1::2], strict=True):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{option} must be positive, not {value}")


# Running it.


def _open(
    console: Console,
    kind: str,
    network: Answering,
    count: int,
    job: _Job,
    faults: Faults,
    deadline: float,
) -> AbstractPool:
    """The pool, compiled for the run's batches. Exits with code 1 where it does not start."""
    make = RayPool if kind == "ray" else DevicePool
    options: Any = {"faults": faults, "hang_timeout": max((_ATTEMPTS - 1) * deadline, _HANG)}
    try:
        with console.status(f"starting {count} workers ({kind}) ..."):
            return make(network, count, example=job.example(), **options)
    except RuntimeError as error:
        fail(f"the pool did not start: {error}", 1)


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
        return self.stragglers / self.batches

    @property
    def speed(self) -> float:
        """Data points a second, of all batches but the first if there are others."""
        seconds, rows = self.first if self.batches > 1 else (0.0, 0)
        return (self.rows - rows) / (self.seconds - seconds)


def _go(
    console: Console,
    pool: AbstractPool,
    code: AbstractCode,
    job: _Job,
    results: Results,
    enough: Any,
    deadline: float,
) -> tuple[_Seen, bool]:
    """Runs the batches into the results; what was seen, and whether Ctrl-C ended it."""
    seen = _Seen()
    x = (job.batch(rows) for rows in job.batches)
    with _bar(console) as progress, contextlib.suppress(KeyboardInterrupt):
        task = progress.add_task("", total=len(job.rows), seen="compiling ...")
        for outcome in run_batches(
            pool, code, x, enough=enough, deadline=deadline, attempts=_ATTEMPTS
        ):
            rows = results.add(outcome)
            seen.add(outcome, rows, code.num_workers)
            told = (
                f"{seen.speed:,.0f} points/s, {seen.mean_stragglers:.1f} stragglers a batch, "
                f"{pool.report().deaths} deaths"
            )
            progress.update(task, advance=rows, seen=told)
    return seen, seen.batches < len(job.batches)


def _bar(console: Console) -> Progress:
    return Progress(
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[seen]}"),
        TimeRemainingColumn(),
        console=console,
    )


# Telling of it.


def _describe(code: AbstractCode) -> str:
    return f"{type(code).__name__} with K={code.num_data}, N={code.num_workers}"


def _when(number: int | None, max_disagreement: float | None) -> str:
    if max_disagreement is None:
        return f"at {number} answers"
    share = f"at most {100 * max_disagreement:g} % of labels"
    return f"once {share} are expected to differ from the model's own"


def _summary(
    network: Answering,
    code: AbstractCode,
    job: _Job,
    results: Results,
    seen: _Seen,
    report: PoolReport,
) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _told(network, code, job, results, seen, report):
        table.add_row(name, value)
    return table


def _told(network, code, job, results, seen, report) -> Iterator[tuple[str, str]]:
    yield "data points", f"{seen.rows:,} in {seen.batches:,} batches, {seen.seconds:.1f} s"
    first = f"after {seen.first[0]:.1f} s for the first batch"
    yield "speed", f"{seen.speed:,.0f} points/s, {first}"
    mean = f"{seen.mean_stragglers:.2f} of {code.num_workers}"
    yield "stragglers", f"{mean} a batch, by the time of decoding"
    yield "late answers", f"{report.late:,}"
    yield "errors", f"{report.errors:,}"
    yield "deaths", _deaths(report)
    yield "batches sent again", f"{seen.retried:,}"
    yield "short batches", f"{seen.short:,} (decoded at the deadline, from too few answers)"
    yield "lost data points", f"{results.lost:,}"
    same, compared = _agreement(network, job, results)
    share = f"{100 * same / compared:.1f} %"
    yield "RelAcc", f"{share}: {same:,} of {compared:,} labels are the model's own"


def _deaths(report: PoolReport) -> str:
    if not report.deaths:
        return "0"
    by_worker = ", ".join(
        f"worker {worker}: {deaths}"
        for worker, deaths in enumerate(report.deaths_by_worker)
        if deaths
    )
    hung = f", {report.hung} of them hung" if report.hung else ""
    return f"{report.deaths:,}{hung} ({by_worker})"


def _agreement(network: Answering, job: _Job, results: Results) -> tuple[int, int]:
    """In how many of at most `_COMPARED` rows, evenly spread, the label is the model's own."""
    some = np.unique(np.linspace(0, len(results) - 1, _COMPARED).astype(int))
    own = np.asarray(batched(network, 256)(job.inputs(results.index[some]))).argmax(axis=1)
    return int(np.sum(own == results.predicted[some])), len(some)


def _conclude(results: Results, seen: _Seen, job: _Job, interrupted: bool) -> None:
    """Exits with 130 after Ctrl-C, with 1 where data points were lost."""
    if interrupted:
        written = "are done" if len(results) else "are done, and no file is written"
        fail(f"interrupted: {len(results):,} of {len(job.rows):,} data points {written}", 130)
    if results.lost:
        fail(
            f"{results.lost:,} of {len(results):,} data points were lost after {_ATTEMPTS} "
            f"attempts and are NaN in the result; the last trouble: {seen.trouble}",
            1,
        )
