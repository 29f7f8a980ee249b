"""`nercc run` with a code: batches of groups over a data set, each decoded at enough answers."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from ..pools.inference import BatchOutcome
from ..rows._interface import ATTEMPTS
from ..rows.files import Parts, fingerprint
from ._options import Options
from ._output import Finished, faults_seen, run_bar
from ._process import compile_quickly
from ._workload import Points, find_workload, load_plain_code

_CALIBRATION = 1000  # training images that a forecast is calibrated on
_COMPARED = 1000  # data points that are compared with the model


def run_groups(
    options: Options, console: Console, open_pool: Callable[..., Any], folder: Path
) -> Finished:
    """Run a model over a data set in coded batches; raise ValueError if an option does not fit."""
    code, share = _checked_code(options), options.max_disagreement
    num_data, num_workers = code.num_data, code.num_workers
    workload = find_workload(options)
    split = options.split or "test"
    network, source = workload.model, workload.rows(split)

    batches = _Batches(source, options, num_data)
    rows = batches.rows

    one = batches.inputs(rows[:1])
    compile_quickly(network, one, batches.number * batches.groups * num_workers)
    enough: Any = options.wait_for or answers_to_wait_for(num_data, num_workers)
    until = f"at {enough} answers"
    if share is not None:
        with console.status(f"calibrating on {_CALIBRATION:,} training images ..."):
            enough = _enough_by_forecast(network, code, options, share)
        until = f"once at most {100 * share:g} % of labels are expected to differ from the model's"
        until += " own"
    outputs = jax.eval_shape(lambda x: call_model(network, x), jnp.asarray(one)).shape[-1]
    results = CodedRows(rows, batches.groups * num_data, outputs, num_workers)
    described = f"{type(code).__name__} with K={num_data}, N={num_workers}"
    settings = {
        "model": options.model,
        "weights": fingerprint(options.weights),
        "outputs": options.outputs,
        "data": workload.fingerprint(split),
        "rows": len(rows),
        "points": batches.count,
        "groups": batches.groups,
        "code": fingerprint(options.code) or described,
        "worker_dtype": options.worker_dtype,
    }
    parts, stopped = Parts(folder, settings, results, source.ids), None
    left, begin, trouble = results.unfinished(batches.number), time.monotonic(), None
    fields: Any = [("rows", int), ("end", float), ("late", int), ("again", bool), ("short", bool)]
    log: Any = np.zeros(len(left), fields)  # of batches
    example = batches.batch(0)[:, 0]  # as a worker gets it at once
    with open_pool(console, network, num_data, num_workers, example=example) as pool:
        console.print(
            f"{options.model}, {len(rows):,} data points of {source.name!r}, {described}; "
            f"{options.workers or num_workers} workers ({options.pool}); decoding {until}, or "
            f"after {options.deadline_s:g} s",
            soft_wrap=True,
        )
        if results.done.any():
            console.print(f"{results.done.sum():,} data points are done already")
        with run_bar(console) as progress:
            task = progress.add_task("compiling ...", total=len(rows), completed=results.done.sum())
            limits: Any = {"enough": enough, "deadline": options.deadline_s, "attempts": ATTEMPTS}
            try:
                for outcome in run_batches(pool, code, map(batches.batch, left), **limits):
                    new, there = results.add(left[outcome.number], outcome), 0
                    parts.add([left[outcome.number]])
                    trouble = outcome.trouble or trouble
                    if outcome.result is not None:
                        there = int(outcome.result.answers.available.sum())
                    more = outcome.attempts > 1, outcome.short
                    log[outcome.number] = new, time.monotonic() - begin, num_workers - there, *more
                    counts = _counts(log[: outcome.number + 1], num_workers)
                    text = (
                        f"{counts['points_per_second']:,.0f} points/s, "
                        f"{counts['stragglers_per_batch']:.1f} stragglers a batch, "
                        f"{pool.report().deaths} deaths"
                    )
                    progress.update(task, advance=new, description=text)
                    stopped = pool.ending
                    if stopped is not None:
                        break
            except KeyboardInterrupt:
                stopped = "interrupted"
            finally:
                parts.flush(complete=not results.unfinished(batches.number))
        report = pool.report()
    done = f"{results.done.sum():,} of {len(rows):,} data points are done"
    if not results.done.any():
        return Finished({}, {}, (), {}, stopped, done, None)
    labelled = options.outputs != "values"
    known = results.rows[results.done]
    lost = int(np.sum(~known["recovered"]))
    numbers = _counts(log[log["rows"] > 0], num_workers) | pool_counts(report) | {"lost": lost}
    numbers |= _compared(network, batches.inputs, known, labelled)
    missing = None
    if lost:
        missing = (
            f"{lost:,} of {len(known):,} data points were lost after {ATTEMPTS} attempts and are "
            f"NaN in the result; the last trouble: {trouble}"
        )
    columns, arrays = results.columns(source, labelled)
    summary = _summary(numbers, faults_seen(report))
    return Finished(columns, arrays, summary, settings | numbers, stopped, done, missing)


class _Batches:
    """Batches of groups in a split's order, from its start again where it ends before they do.

    Attributes:
        count: The data points that are used.
        groups: The groups in a batch.
        number: The batches.
        rows: The places in the split whose predictions are results: the last batch is filled up.
    """

    def __init__(self, source: Points, options: Options, num_data: int):
        self._source, self._num_data = source, num_data
        self.count = len(source.x[: options.max_inputs])
        self.groups = min(options.groups or 1, math.ceil(self.count / num_data))
        size = self.groups * num_data
        self.number = options.batches or math.ceil(self.count / size)
        self._places = np.arange(self.number * size) % self.count
        self.rows = self._places if options.batches else self._places[: self.count]

    def inputs(self, rows: Int[np.ndarray, " rows"]) -> np.ndarray:
        return np.asarray(self._source.preprocess(self._source.x[rows]))

    def batch(self, number: int) -> np.ndarray:
        """Return a batch of (groups, K, ...)."""
        size = self.groups * self._num_data
        x = self.inputs(self._places[number * size : (number + 1) * size])
        return x.reshape(self.groups, self._num_data, *x.shape[1:])


def _checked_code(options: Options) -> AbstractCode:
    """Return the code; raise ValueError unless the options of when to decode fit it."""
    code: AbstractCode = NeRCC(options.num_data, options.num_workers)
    if options.code is not None:
        code = load_plain_code(options.code, f"--code {options.code}")
    wait_for, share = options.wait_for, options.max_disagreement
    if wait_for is not None and share is not None:
        raise ValueError("give --wait-for or --max-disagreement, not both")
    if share is not None and not 0 <= share < 1:
        raise ValueError(f"--max-disagreement must be in [0, 1), not {share}")
    if wait_for is not None and not 1 <= wait_for <= code.num_workers:
        raise ValueError(f"--wait-for must be from 1 to N = {code.num_workers}, not {wait_for}")
    return code


def _enough_by_forecast(network: Any, code: AbstractCode, options: Options, limit: float) -> Any:
    """Return a rule for when to decode; raise ValueError if even all answers would not do."""
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


class CodedRows:
    """The rows of a coded run, in its order, and which of them are done.

    Attributes:
        rows: A structured array with the fields of the result file: "index", the place in the
            split; "predictions", the decoded outputs, NaN where a data point is lost; "recovered",
            False for those; and "responded", the workers whose answers a prediction rests on.
        done: Which rows are done.
    """

    def __init__(self, rows: Int[np.ndarray, " rows"], batch_size: int, outputs: int, workers: int):
        self._batch_size, self.done = batch_size, np.zeros(len(rows), bool)
        numbers = ("predictions", np.float32, (outputs,)), ("responded", bool, (workers,))
        self.rows: Any = np.zeros(len(rows), [("index", rows.dtype), ("recovered", bool), *numbers])
        self.rows["index"], self.rows["predictions"] = rows, np.nan

    def _of(self, batches: Sequence[int]) -> Int[np.ndarray, " rows"]:
        """Return the places of the rows of some batches; the last one is filled, and has fewer."""
        places = np.asarray(batches, int)[:, None] * self._batch_size + np.arange(self._batch_size)
        return places[places < len(self.rows)]

    def add(self, batch: int, outcome: BatchOutcome) -> int:
        """Take a batch, and return how many rows it has: its fill is left out."""
        places = self._of([batch])
        self.done[places] = True
        if outcome.result is not None:
            decoded, rows = outcome.result.decoded, len(places)
            groups, num_data = decoded.recovered.shape
            recovered = np.asarray(decoded.recovered).ravel()[:rows]
            responded = np.repeat(np.asarray(decoded.responded), num_data, axis=0)[:rows]
            predictions = np.asarray(decoded.predictions).reshape(groups * num_data, -1)
            self.rows["predictions"][places] = predictions[:rows]
            self.rows["recovered"][places] = recovered
            self.rows["responded"][places] = responded & recovered[:, None]
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

    def unfinished(self, batches: int) -> list[int]:
        """Return which of the batches are not recovered as a whole."""
        recovered = self.rows["recovered"]
        return [each for each in range(batches) if not recovered[self._of([each])].all()]

    def columns(
        self, source: Points, labelled: bool
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return the done rows as a table's columns, and as arrays for an .npz.

        A table has the number of workers that responded, and a column for each output.
        """
        done = self.rows[self.done]
        place = done["index"]
        columns: dict[str, np.ndarray] = {} if source.ids is None else {"id": source.ids[place]}
        columns |= {"index": place, "batch": np.flatnonzero(self.done) // self._batch_size}
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


def _counts(log: Any, workers: int) -> dict[str, Any]:
    """Return counts of the batches so far, by the names of the summary file.

    The speed is without the first batch, which compiles, if there are others.
    """
    first, ends = int(len(log) > 1), [0.0, *log["end"].tolist()]
    return {
        "data_points": int(log["rows"].sum()),
        "batches": len(log),
        "seconds": ends[-1],
        "first_batch_seconds": ends[min(1, len(log))],
        "points_per_second": log["rows"][first:].sum() / max(ends[-1] - ends[first], 1e-9),
        "workers": workers,
        "stragglers_per_batch": log["late"].sum() / max(len(log), 1),
        "batches_sent_again": int(log["again"].sum()),
        "short_batches": int(log["short"].sum()),
    }


def _summary(
    numbers: dict[str, Any], faults: Iterable[tuple[str, str]]
) -> Iterable[tuple[str, str]]:
    batches = f"{numbers['batches']:,} batches, {numbers['seconds']:.1f} s"
    yield "data points", f"{numbers['data_points']:,} in {batches}"
    first = f"after {numbers['first_batch_seconds']:.1f} s for the first batch"
    yield "speed", f"{numbers['points_per_second']:,.0f} points/s, {first}"
    mean = f"{numbers['stragglers_per_batch']:.2f} of {numbers['workers']}"
    yield "stragglers", f"{mean} in a batch, when it was decoded"
    yield from faults
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
    network: Any, inputs: Callable[[np.ndarray], np.ndarray], rows: Any, labelled: bool
) -> dict[str, int | float]:
    """Return how some evenly spread rows compare with the model's own: labels, or values."""
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, _COMPARED).astype(int))]
    own = np.asarray(batched(network, 256)(inputs(rows["index"])))
    if labelled:
        same = int(np.sum(own.argmax(axis=1) == _labels(rows)))
        return {"compared": len(rows), "same_labels": same}
    own, known = own.reshape(len(rows), -1), rows["recovered"]
    error = (rows["predictions"] - own)[known]
    numbers = {"rmse": np.sqrt(np.mean(error**2)), "spread": np.sqrt(np.mean(np.var(own, axis=0)))}
    return {"compared": int(known.sum()), **{name: float(each) for name, each in numbers.items()}}
