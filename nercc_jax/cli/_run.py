"""`nercc run`: coded batches of a classifier over a data set, each decoded at enough answers."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jaxtyping import Int
from rich.console import Console

from ..codes import AbstractCode, NeRCC
from ..evaluation import record_answers
from ..evaluation._answers import batched
from ..inference.models import Model, call_model
from ..pools import PoolReport, leave_ray, run_batches
from ..pools._backend import pool_counts
from ..pools._batch import answers_to_wait_for
from ..pools._inference import BatchOutcome
from ..rows._interface import ATTEMPTS
from ..rows.files import Parts, fingerprint
from ._options import RunOptions
from ._output import run_bar
from ._process import compile_quickly
from ._ray_job import end_at_once, leave_accelerators
from ._run_parts import Destination, RunPool, deaths_text
from ._run_rows import run_function
from ._workload import find_workload, load_plain_code

_CALIBRATION = 1000  # training images that a forecast is calibrated on
_COMPARED = 1000  # data points that are compared with the model


def run(options: RunOptions) -> None:
    """Run a model over a data set or row by row, and exit with a code if not all is done."""
    if options.pool == "ray":
        leave_accelerators()
    pool = RunPool(options)
    try:
        (run_function if options.by_row else run_data)(options, pool)
    except typer.Exit as end:
        end_at_once(end.exit_code)
        raise
    if options.pool == "ray":
        leave_ray()


def run_data(options: RunOptions, pool: RunPool) -> None:
    """Run a model over a data set in coded batches.

    Raises ValueError if an option does not fit, and exits with a code if not everything is done.
    """
    to = Destination(options, (".npz", ".csv"))
    if options.code is None:
        code: AbstractCode = NeRCC(options.num_data or 8, options.num_workers)
    else:
        code = load_plain_code(options.code, f"--code {options.code}")
    num_data, num_workers = code.num_data, code.num_workers
    number = _number_to_wait_for(code, options)
    table: Any = {"columns": options.columns, "id_column": options.id_column}
    workload = find_workload(options, options.outputs, **table)
    network, source = workload.model, workload.rows(options.split)

    # Batches in the split's order, from its start again where it ends before they do.
    count = len(source.labels[: options.max_inputs])
    groups = min(options.groups or 1, math.ceil(count / num_data))
    size = groups * num_data
    batches = math.ceil(count / size) if options.batches is None else options.batches
    places = np.arange(batches * size) % count
    rows = places[:count] if options.batches is None else places

    def inputs(rows: np.ndarray) -> np.ndarray:
        return np.asarray(source.preprocess(source.images[rows]))

    def batch(number: int) -> np.ndarray:
        x = inputs(places[number * size : (number + 1) * size])
        return x.reshape(groups, num_data, *x.shape[1:])

    one = inputs(rows[:1])
    compile_quickly(network, one, batches * groups * num_workers)
    console = Console()
    enough: Any = number
    if number is None:
        with console.status(f"calibrating on {_CALIBRATION:,} training images ..."):
            enough = _enough_by_forecast(network, code, options)
    outputs = jax.eval_shape(lambda x: call_model(network, x), jnp.asarray(one)).shape[-1]
    results = CodedRows(rows, size, outputs, num_workers)
    described = f"{type(code).__name__} with K={num_data}, N={num_workers}"
    settings = {
        "model": options.model,
        "weights": fingerprint(options.weights),
        "outputs": options.outputs,
        "data": workload.fingerprint(options.split),
        "rows": len(rows),
        "points": count,
        "groups": groups,
        "code": fingerprint(options.code) or described,
        "worker_dtype": options.worker_dtype,
    }
    parts = Parts(to.folder, settings, results, source.ids)
    counts, left = _Counts(), results.unfinished(batches)
    example = batch(0)[:, 0]  # as a worker gets it at once
    with pool.open(console, network, num_data, num_workers, example=example) as opened:
        until = f"at {number} answers"
        if number is None:
            share = f"at most {100 * (options.max_disagreement or 0):g} % of labels"
            until = f"once {share} are expected to differ from the model's own"
        console.print(
            f"{options.model}, {len(rows):,} data points of {source.name!r}, {described}; "
            f"{pool.count(num_workers)} workers ({options.pool}); decoding {until}, or after "
            f"{options.deadline_s:g} s",
            soft_wrap=True,
        )
        if len(results):
            console.print(f"{len(results):,} data points are done already")
        with run_bar(console) as progress:
            task = progress.add_task("compiling ...", total=len(rows), completed=len(results))
            limits: Any = {"enough": enough, "deadline": options.deadline_s, "attempts": ATTEMPTS}
            try:
                for outcome in run_batches(opened, code, map(batch, left), **limits):
                    new = results.add(left[outcome.number], outcome)
                    parts.add([left[outcome.number]])
                    counts.add(outcome, new, num_workers)
                    text = (
                        f"{counts.speed:,.0f} points/s, {counts.mean_stragglers:.1f} stragglers a "
                        f"batch, {opened.report().deaths} deaths"
                    )
                    progress.update(task, advance=new, description=text)
                    counts.stopped = opened.ending
                    if counts.stopped is not None:
                        break
            except KeyboardInterrupt:
                counts.stopped = "interrupted"
            finally:
                parts.flush(complete=not results.unfinished(batches))
        report = opened.report()
    if len(results):
        compared = _compared(network, inputs, results, options.outputs != "values")
        numbers = counts.numbers(num_workers) | pool_counts(report)
        numbers |= {"lost": results.lost, **compared}
        columns, arrays = results.columns(source.ids, source.labels, options.outputs != "values")
        to.write(console, columns, arrays, _summary(numbers, report), settings | numbers)
    lost = None
    if results.lost:
        lost = (
            f"{results.lost:,} of {len(results):,} data points were lost after {ATTEMPTS} "
            f"attempts and are NaN in the result; the last trouble: {counts.trouble}"
        )
    to.end(counts.stopped, f"{len(results):,} of {len(rows):,} data points are done", lost)


def _number_to_wait_for(code: AbstractCode, options: RunOptions) -> int | None:
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


def _enough_by_forecast(network: Any, code: AbstractCode, options: RunOptions) -> Any:
    """Return a rule for when to decode; raise ValueError if even all answers would not do."""
    limit = options.max_disagreement
    x, _ = network.images("train", options.data_dir, _CALIBRATION, options.seed)
    answers = record_answers(network, code, x, worker_dtype=options.worker_dtype)
    enough = answers.below(max_disagreement=limit)
    everyone = np.ones(code.num_workers, bool)
    if not enough(everyone):
        best = float(answers.disagreement(everyone))
        raise ValueError(
            f"--max-disagreement {limit}: with this code {best:.4f} is expected even when all "
            f"{code.num_workers} workers answer; allow more, or use a tuned code (`nercc tune`)"
        )
    return enough


@dataclasses.dataclass
class _Counts:
    """Counts of a run's batches so far; rows and seconds since the start are by batch."""

    rows: list[int] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    stragglers: int = 0
    retried: int = 0
    short: int = 0
    trouble: str | None = None
    stopped: str | None = None  # why the run ended early
    start: float = dataclasses.field(default_factory=time.monotonic)

    def add(self, outcome: BatchOutcome, rows: int, num_workers: int) -> None:
        self.rows.append(rows)
        self.seconds.append(time.monotonic() - self.start)
        self.retried += outcome.attempts > 1
        self.short += outcome.short
        answered = 0 if outcome.result is None else int(outcome.result.answers.available.sum())
        self.stragglers += num_workers - answered
        self.trouble = outcome.trouble or self.trouble

    @property
    def mean_stragglers(self) -> float:
        return self.stragglers / max(len(self.rows), 1)

    @property
    def speed(self) -> float:
        """The rows in a second, without the first batch, which compiles, if there are others."""
        first = int(len(self.rows) > 1)
        begin, end = [0.0, *self.seconds][first], max(self.seconds, default=0.0)
        return sum(self.rows[first:]) / max(end - begin, 1e-9)

    def numbers(self, num_workers: int) -> dict[str, Any]:
        """Return the counts by the names of the summary file."""
        return {
            "data_points": sum(self.rows),
            "batches": len(self.rows),
            "seconds": max(self.seconds, default=0.0),
            "first_batch_seconds": [*self.seconds, 0.0][0],
            "points_per_second": self.speed,
            "workers": num_workers,
            "stragglers_per_batch": self.mean_stragglers,
            "batches_sent_again": self.retried,
            "short_batches": self.short,
        }


class CodedRows:
    """The rows of a coded run, in its order: a structured array, and which of them are done.

    Its fields are those of the result file: "index", the place in the split; "predictions", the
    decoded outputs, NaN where a data point is lost; "recovered", False for those; and "responded",
    the workers whose answers a prediction rests on.
    """

    def __init__(self, rows: Int[np.ndarray, " rows"], batch_size: int, outputs: int, workers: int):
        self._batch_size = batch_size
        self._done = np.zeros(len(rows), bool)
        fields: Any = [
            ("index", rows.dtype),
            ("predictions", np.float32, (outputs,)),
            ("recovered", bool),
            ("responded", bool, (workers,)),
        ]
        self._rows: Any = np.zeros(len(rows), fields)
        self._rows["index"], self._rows["predictions"] = rows, np.nan

    def __len__(self) -> int:
        return int(self._done.sum())

    @property
    def done(self) -> Any:
        """The rows that are done, as a structured array."""
        return self._rows[self._done]

    @property
    def lost(self) -> int:
        return int(np.sum(~self.done["recovered"]))

    @property
    def predicted(self) -> Int[np.ndarray, " done"]:
        """The label of each prediction, -1 for lost ones."""
        clean = np.nan_to_num(self.done["predictions"])
        return np.where(self.done["recovered"], clean.argmax(axis=1), -1)

    def add(self, batch: int, outcome: BatchOutcome) -> int:
        """Take a batch, and return how many rows it has: its fill is left out."""
        rows = self._of(batch)
        self._done[rows] = True
        if outcome.result is not None:
            decoded = outcome.result.decoded
            groups, num_data = decoded.recovered.shape
            recovered = np.asarray(decoded.recovered).ravel()[: len(rows)]
            responded = np.repeat(np.asarray(decoded.responded), num_data, axis=0)
            predictions = np.asarray(decoded.predictions).reshape(groups * num_data, -1)
            self._rows["predictions"][rows] = predictions[: len(rows)]
            self._rows["recovered"][rows] = recovered
            self._rows["responded"][rows] = responded[: len(rows)] & recovered[:, None]
        return len(rows)

    def rows_of(self, batches: Sequence[int]) -> dict[str, np.ndarray]:
        """Return the rows of some batches, one after the other, as arrays by name."""
        rows = self._rows[np.concatenate([self._of(batch) for batch in batches])]
        return {"batches": np.asarray(batches)} | {name: rows[name] for name in rows.dtype.names}

    def take(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take what `rows_of` returned of some batches in another process."""
        rows = np.concatenate([self._of(batch) for batch in arrays["batches"].tolist()])
        for name in ("predictions", "recovered", "responded"):
            self._rows[name][rows] = arrays[name]
        self._done[rows] = True

    def unfinished(self, batches: int) -> list[int]:
        """Return which of the batches are not recovered as a whole."""
        recovered = self._rows["recovered"]
        return [each for each in range(batches) if not recovered[self._of(each)].all()]

    def _of(self, batch: int) -> np.ndarray:
        start = batch * self._batch_size
        return np.arange(start, min(start + self._batch_size, len(self._rows)))

    def columns(
        self, ids: np.ndarray | None, labels: np.ndarray, labelled: bool
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return the done rows as a table's columns, and as arrays for an .npz.

        A table has the number of workers that responded, and a column for each output.
        """
        done = self.done
        columns: dict[str, np.ndarray] = {} if ids is None else {"id": ids[done["index"]]}
        columns |= {"index": done["index"]}
        columns |= {"batch": np.flatnonzero(self._done) // self._batch_size}
        if labelled:
            columns |= {"label": labels[done["index"]], "predicted": self.predicted}
        columns |= {"recovered": done["recovered"]}
        responded, predictions = done["responded"], done["predictions"]
        arrays = columns | {"responded": responded, "predictions": predictions}
        columns |= {"responded": responded.sum(axis=1)}
        return columns | {f"output_{n}": each for n, each in enumerate(predictions.T)}, arrays


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
    else:
        same, share = numbers["same_labels"], f"{100 * numbers['same_labels'] / compared:.1f} %"
        yield "RelAcc", f"{share}: {same:,} of {compared:,} labels are the model's own"


def _compared(
    network: Model, inputs: Callable[[np.ndarray], np.ndarray], results: CodedRows, labelled: bool
) -> dict[str, int | float]:
    """Return how some evenly spread rows compare with the model's own: labels, or values."""
    some = np.unique(np.linspace(0, len(results) - 1, _COMPARED).astype(int))
    rows = results.done[some]
    own = np.asarray(batched(network, 256)(inputs(rows["index"])))
    if labelled:
        same = int(np.sum(own.argmax(axis=1) == results.predicted[some]))
        return {"compared": len(some), "same_labels": same}
    own, known = own.reshape(len(some), -1), rows["recovered"]
    error = (rows["predictions"] - own)[known]
    numbers = {"rmse": np.sqrt(np.mean(error**2)), "spread": np.sqrt(np.mean(np.var(own, axis=0)))}
    return {"compared": int(known.sum()), **{name: float(each) for name, each in numbers.items()}}
