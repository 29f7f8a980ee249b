"""`nercc run` with a code: batches of groups over a data set, each decoded at enough answers."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from rich.console import Console

from ..codes import AbstractCode, NeRCC
from ..evaluation import record_answers
from ..evaluation._answers import batched
from ..inference.models import call_model
from ..pools import run_batches
from ..pools.backend import pool_counts
from ..pools.batch import answers_to_wait_for
from ..rows.files import Parts, fingerprint
from ._options import Options
from ._output import Finished, progress_bar
from ._process import compile_quickly
from ._workload import Points, Workload, find_workload, load_plain_code

_SOME = 1000  # data points that a forecast is calibrated on, and that are compared with the model


def run_groups(
    options: Options, console: Console, open_pool: Callable[..., Any], folder: Path
) -> Finished:
    """Run a model over a data set in coded batches; raise ValueError if an option does not fit."""
    code: Any = NeRCC(options.num_data, options.num_workers)
    if options.code is not None:
        code = load_plain_code(options.code, f"--code {options.code}")
    num_data, num_workers = code.num_data, code.num_workers
    if options.wait_for is not None and options.max_disagreement is not None:
        raise ValueError("give --wait-for or --max-disagreement, not both")
    if options.wait_for is not None and not 1 <= options.wait_for <= num_workers:
        raise ValueError(f"--wait-for must be from 1 to N = {num_workers}, not {options.wait_for}")
    workload, split = find_workload(options), options.split or "test"
    network, source = workload.model, workload.rows(split)
    rows = CodedRows(network, source, options, num_data, num_workers)
    compile_quickly(network, rows.batch(0)[0, :1], rows.batches * rows.size * num_workers)
    enough: Any = options.wait_for or answers_to_wait_for(num_data, num_workers)
    until = f"at {enough} answers"
    if (share := options.max_disagreement) is not None:
        with console.status(f"calibrating on {_SOME:,} training inputs ..."):
            enough = _forecast(options, workload, code, share)
        until = f"once at most {100 * share:g} % of labels are expected to differ from the model's"
    described = f"{type(code).__name__} with K={num_data}, N={num_workers}"
    settings = {
        "model": options.model,
        "weights": fingerprint(options.weights),
        "outputs": options.outputs,
        "data": workload.fingerprint(split),
        "rows": len(rows.done),
        "points": rows.count,
        "groups": rows.groups,
        "code": fingerprint(options.code) or described,
        "worker_dtype": options.worker_dtype,
    }
    parts, stopped, trouble = Parts(folder, settings, rows, source.ids), None, None
    limits: Any = {"enough": enough, "deadline": options.deadline_s, "attempts": 3}
    left, begin, log = rows.unfinished(), time.monotonic(), _Log(num_workers)
    # A worker gets one coded data point of each group of a batch at once.
    with open_pool(console, network, num_data, num_workers, example=rows.batch(0)[:, 0]) as pool:
        console.print(
            f"{options.model}, {len(rows.done):,} data points of {source.name!r}, {described}; "
            f"{options.workers or num_workers} workers ({options.pool}); decoding {until}, or "
            f"after {options.deadline_s:g} s",
            soft_wrap=True,
        )
        if rows.done.any():
            console.print(f"{rows.done.sum():,} data points are done already")
        with progress_bar(console) as bar:
            task = bar.add_task("compiling ...", total=len(rows.done), completed=rows.done.sum())
            try:
                for outcome in run_batches(pool, code, map(rows.batch, left), **limits):
                    new = rows.add(left[outcome.number], outcome)
                    parts.add([left[outcome.number]])
                    trouble = outcome.trouble or trouble
                    log.add(new, time.monotonic() - begin, outcome)
                    text = f"{log.speed:,.0f} points/s, {log.late / log.batches:.1f} stragglers "
                    text += f"a batch, {pool.report().deaths} deaths"
                    bar.update(task, advance=new, description=text)
                    stopped = pool.ending
                    if stopped is not None:
                        break
            except KeyboardInterrupt:
                stopped = "interrupted"
            finally:
                parts.flush(complete=not rows.unfinished())
        report = pool.report()

    done = f"{rows.done.sum():,} of {len(rows.done):,} data points are done"
    if not rows.done.any():
        return Finished({}, {}, (), {}, report, stopped, done, None)
    known, labelled = rows.rows[rows.done], options.outputs != "values"
    lost = int(np.sum(~known["recovered"]))
    numbers = settings | log.numbers() | pool_counts(report) | {"lost": lost}
    compared, close = _compared(network, rows, known, labelled)
    missing = None
    if lost:
        missing = (
            f"{lost:,} of {len(known):,} data points were lost after {limits['attempts']} attempts "
            f"and are NaN in the result; the last trouble: {trouble}"
        )
    summary = *log.lines(), ("lost data points", f"{lost:,}"), close
    columns, arrays = rows.columns(labelled)
    return Finished(columns, arrays, summary, numbers | compared, report, stopped, done, missing)


def _forecast(options: Options, workload: Workload, code: AbstractCode, share: float) -> Any:
    """Return a rule for when to decode; raise ValueError if even all answers would not do."""
    if not 0 <= share < 1:
        raise ValueError(f"--max-disagreement must be in [0, 1), not {share}")
    x, workers = workload.points("train", _SOME, options.seed), code.num_workers
    answers = record_answers(workload.model, code, x, worker_dtype=options.worker_dtype)
    enough, everyone = answers.below(max_disagreement=share), np.ones(workers, bool)
    if not enough(everyone):
        best = float(answers.disagreement(everyone))
        raise ValueError(
            f"--max-disagreement {share}: with this code {best:.4f} is expected even when all "
            f"{workers} workers answer; allow more, or use a tuned code (`nercc tune`)"
        )
    return enough


def _compared(
    network: Any, rows: "CodedRows", known: Any, labelled: bool
) -> tuple[dict[str, Any], tuple[str, str]]:
    """Compare some evenly spread rows with the model's own: labels, or values.

    Return numbers by the names of the summary file, and a line of the summary.
    """
    some = known[np.unique(np.linspace(0, len(known) - 1, _SOME).astype(int))]
    own = np.asarray(batched(network, 256)(rows.inputs(some["index"]))).reshape(len(some), -1)
    if labelled:
        same = int(np.sum(own.argmax(axis=1) == _labels(some)))
        share = f"{100 * same / len(some):.1f} %"
        words = f"{share}: {same:,} of {len(some):,} labels are the model's own"
        return {"compared": len(some), "same_labels": same}, ("RelAcc", words)
    error = (some["predictions"] - own)[some["recovered"]]
    rmse, spread = float(np.sqrt(np.mean(error**2))), float(np.sqrt(np.var(own, axis=0).mean()))
    words = f"RMSE {rmse:.3g} of {len(error):,} rows, whose outputs spread by {spread:.3g}"
    return {"compared": len(error), "rmse": rmse, "spread": spread}, ("error", words)


class CodedRows:
    """The rows of a coded run, batch after batch of groups of K, and which of them are done.

    Batches are in the order of the data; the last one, and with `--batches` all after the data's
    end, begin again at their start.

    Attributes:
        count: The data points that are used.
        groups: The groups in a batch.
        size: The data points in a batch.
        batches: The number of batches.
        rows: A structured array with the fields of the result file: "index", the place in the
            split; "predictions", the decoded outputs, NaN where a data point is lost; "recovered",
            False for those; and "responded", the workers whose answers a prediction rests on.
        done: Which rows are done.
    """

    def __init__(self, network: Any, source: Points, options: Options, num_data: int, workers: int):
        self._source = source
        self.count = len(source.x[: options.max_inputs])
        self.groups = min(options.groups or 1, math.ceil(self.count / num_data))
        self.size = self.groups * num_data
        self.batches = options.batches or math.ceil(self.count / self.size)
        self._places = np.arange(self.batches * self.size) % self.count
        index = self._places if options.batches else self._places[: self.count]
        one = jnp.asarray(self.inputs(index[:1]))
        outputs = jax.eval_shape(lambda x: call_model(network, x), one).shape[-1]
        fields = ("predictions", np.float32, (outputs,)), ("responded", bool, (workers,))
        kinds = [("index", index.dtype), ("recovered", bool), *fields]
        self.rows: Any = np.zeros(len(index), kinds)
        self.rows["index"], self.rows["predictions"] = index, np.nan
        self.done = np.zeros(len(index), bool)

    def inputs(self, places: Int[np.ndarray, " rows"]) -> np.ndarray:
        """Return data points as the model takes them."""
        return np.asarray(self._source.preprocess(self._source.x[places]))

    def batch(self, number: int) -> np.ndarray:
        """Return a batch of (groups, K, ...)."""
        x = self.inputs(self._places[number * self.size : (number + 1) * self.size])
        return x.reshape(self.groups, -1, *x.shape[1:])

    def _of(self, batches: Sequence[int]) -> Int[np.ndarray, " rows"]:
        """Return the places of the rows of some batches; the last one is filled, and has fewer."""
        places = (np.asarray(batches, int)[:, None] * self.size + np.arange(self.size)).ravel()
        return places[places < len(self.rows)]

    def add(self, batch: int, outcome: Any) -> int:
        """Take a batch, and return how many rows it has: its fill is left out."""
        places = self._of([batch])
        self.done[places] = True
        if outcome.result is not None:
            decoded, count = outcome.result.decoded, len(places)
            recovered = np.asarray(decoded.recovered)
            responded = np.repeat(np.asarray(decoded.responded), recovered.shape[1], axis=0)
            predictions = np.asarray(decoded.predictions).reshape(recovered.size, -1)
            recovered = recovered.ravel()[:count]
            self.rows["predictions"][places] = predictions[:count]
            self.rows["recovered"][places] = recovered
            self.rows["responded"][places] = responded[:count] & recovered[:, None]
        return len(places)

    def rows_of(self, batches: Sequence[int]) -> dict[str, np.ndarray]:
        """Return the rows of some batches, one after the other, as arrays by name."""
        rows = self.rows[self._of(batches)]
        return {"batches": np.asarray(batches)} | {name: rows[name] for name in rows.dtype.names}

    def take(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take what `rows_of` returned of some batches in another process."""
        places = self._of(arrays["batches"].tolist())
        for name in ("predictions", "recovered", "responded"):
            self.rows[name][places] = arrays[name]
        self.done[places] = True

    def unfinished(self) -> list[int]:
        """Return which batches are not recovered as a whole."""
        recovered = self.rows["recovered"]
        return [each for each in range(self.batches) if not recovered[self._of([each])].all()]

    def columns(self, labelled: bool) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return the done rows as a table's columns, and as arrays for an .npz.

        A table has the number of workers that responded, and a column for each output.
        """
        done, source = self.rows[self.done], self._source
        place = done["index"]
        columns: dict[str, np.ndarray] = {} if source.ids is None else {"id": source.ids[place]}
        columns |= {"index": place, "batch": np.flatnonzero(self.done) // self.size}
        if labelled:
            columns |= {"label": source.labels[place], "predicted": _labels(done)}
        columns["recovered"] = done["recovered"]
        arrays = columns | {name: done[name] for name in ("responded", "predictions")}
        columns["responded"] = done["responded"].sum(axis=1)
        outputs = enumerate(done["predictions"].T)
        return columns | {f"output_{number}": each for number, each in outputs}, arrays


def _labels(rows: Any) -> Int[np.ndarray, " rows"]:
    """Return the label of each prediction, -1 for lost ones."""
    return np.where(rows["recovered"], np.nan_to_num(rows["predictions"]).argmax(axis=1), -1)


class _Log:
    """Counts of the batches so far; the first one compiles, and is left out of the speed."""

    def __init__(self, workers: int):
        self._workers, self._ends = workers, [(0, 0.0)]  # data points by a time
        self.batches = self.late = self.again = self.short = 0

    def add(self, points: int, end: float, outcome: Any) -> None:
        """Count a batch of so many data points."""
        there = 0
        if outcome.result is not None:
            there = int(outcome.result.answers.available.sum())
        self.batches, self.late = self.batches + 1, self.late + self._workers - there
        self.again, self.short = self.again + (outcome.attempts > 1), self.short + outcome.short
        self._ends.append((self._ends[-1][0] + points, end))

    @property
    def speed(self) -> float:
        """Data points a second."""
        before, (points, end) = self._ends[int(self.batches > 1)], self._ends[-1]
        return (points - before[0]) / max(end - before[1], 1e-9)

    def numbers(self) -> dict[str, Any]:
        """Return the counts by the names of the summary file."""
        return {
            "data_points": self._ends[-1][0],
            "batches": self.batches,
            "seconds": self._ends[-1][1],
            "first_batch_seconds": self._ends[min(1, self.batches)][1],
            "points_per_second": self.speed,
            "workers": self._workers,
            "stragglers_per_batch": self.late / max(self.batches, 1),
            "batches_sent_again": self.again,
            "short_batches": self.short,
        }

    def lines(self) -> list[tuple[str, str]]:
        """Return the first lines of the summary."""
        points, seconds = self._ends[-1]
        first, mean = self._ends[min(1, self.batches)][1], self.late / max(self.batches, 1)
        return [
            ("data points", f"{points:,} in {self.batches:,} batches, {seconds:.1f} s"),
            ("speed", f"{self.speed:,.0f} points/s, after {first:.1f} s for the first batch"),
            ("stragglers", f"{mean:.2f} of {self._workers} in a batch, when it was decoded"),
            ("batches sent again", f"{self.again:,}"),
            ("short batches", f"{self.short:,} (decoded at the deadline, from too few answers)"),
        ]
