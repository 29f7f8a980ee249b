"""`nercc run --tolerance`: any function on each row of a file, by `nercc_jax.rows.run_rows`."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import TaskID

from ..risk import EnsembleEstimate
from ..rows import RowProgress, RowResult, RowSettings, run_rows
from ..rows.files import fingerprint
from ._command import fail
from ._options import Options
from ._output import Finished, progress_bar
from ._own_models import load_callable
from ._workload import find_workload

# By the settings of `run_rows`, the options.
_SETTINGS = {field.name: field.name for field in dataclasses.fields(RowSettings)} | {
    "rows_per_call": "groups",
    **{name: f"{name}_s" for name in ("deadline", "job_deadline", "grace")},
}
del _SETTINGS["learner_share"]


def run_function(
    options: Options, console: Console, open_pool: Callable[..., Any], folder: Path
) -> Finished:
    """Run a function on rows; raise ValueError if an option does not fit."""
    numbers: dict[str, Any] = {name: getattr(options, each) for name, each in _SETTINGS.items()}
    with _naming_options():
        settings = RowSettings(**numbers)
    workload, split = find_workload(options, traced=False), options.split or "test"
    source = workload.rows(split)
    ids = None if source.ids is None else source.ids[: options.max_inputs]
    x = np.asarray(source.preprocess(source.x[: options.max_inputs]))

    def open_and_say(function: Any, num_workers: int, **further: Any) -> Any:
        opened = open_pool(console, function, None, num_workers, **further)
        target = f"at most {100 * (settings.max_disagreement or 0):g} % of labels different"
        if settings.tolerance is not None:
            bars = f"{100 * settings.coverage:g} % bars"
            target = f"each within {settings.tolerance:g} ({bars}) or computed"
        console.print(
            f"{options.model}, {len(x):,} rows of {source.name!r}, {target}; "
            f"{options.workers or num_workers} workers ({options.pool})",
            soft_wrap=True,
        )
        return opened

    bar = progress_bar(console)

    def show(progress: RowProgress) -> None:
        if not bar.task_ids:
            if progress.done:
                console.print(f"{progress.done:,} rows are done already")
            bar.add_task("computing the first rows ...", total=progress.rows)
            bar.start()
            return
        late = f", of them late {progress.late:,}" if progress.late else ""
        unknown = f", unknown {progress.unknown:,}" if progress.unknown else ""
        text = (
            f"computed {progress.computed:,}, predicted {progress.predicted:,}, waiting "
            f"{progress.waiting:,}{late}{unknown}; {progress.rows_per_second:,.1f} rows/s, "
            f"{progress.workers:,} workers"
        )
        bar.update(TaskID(0), completed=progress.done, description=text)

    statistic = _statistic(options)
    about = {"model": options.model, "weights": fingerprint(options.weights)}
    about["inputs"] = workload.fingerprint(split)
    further: Any = {"folder": folder, "resume": options.resume, "about": about, "ids": ids}
    further |= {"on_progress": show, "num_workers": options.num_workers, "statistic": statistic}
    if options.stop_at is not None:
        further["stop_when"] = lambda estimate: estimate.width <= options.stop_at
    try:
        with _naming_options():
            result = run_rows(workload.model, x, open_and_say, settings, **further)
    except RuntimeError as error:
        fail(str(error), 1)
    finally:
        bar.stop()
    columns: dict[str, np.ndarray] = {}
    arrays: dict[str, Any] = {}
    if result.values is not None:
        columns = result.columns()
        # Tables have a column for each output, arrays the function's own shape.
        arrays = {} if result.ids is None else {"id": result.ids}
        arrays |= {"predictions": result.values}
        arrays |= {name: columns[name] for name in ("deviation", result.score_name, "exact")}
    numbers, enough = dict(result.summary), False
    if statistic is not None and result.evidence is not None:
        estimate = statistic(result)
        numbers["statistic"] = {"name": options.statistic, **dataclasses.asdict(estimate)}
        enough = options.stop_at is not None and estimate.width <= options.stop_at
    done = f"{result.summary['rows_done']:,} of {len(result.status):,} rows are done"
    unknown = None
    if result.reasons and not enough:
        row, why = next(iter(result.reasons.items()))
        unknown = f"{len(result.reasons):,} rows are unknown: row {row}: {why}"
    summary, report = _summary(result, numbers, settings), result.report
    return Finished(columns, arrays, summary, numbers, report, result.stopped, done, unknown)


@contextlib.contextmanager
def _naming_options() -> Iterator[None]:
    """Name the command's options in errors that begin with an argument's name."""
    try:
        yield
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        if name not in _SETTINGS:
            raise
        raise ValueError(f"--{_SETTINGS[name].replace('_', '-')} {rest}") from error


def _statistic(options: Options) -> Callable[[RowResult], EnsembleEstimate] | None:
    """Return the statistic that options ask for, if any; raise ValueError if one does not fit."""
    if options.statistic is None:
        if options.stop_at is not None:
            raise ValueError("--stop-at needs a --statistic")
        return None
    name, _, quantity = options.statistic.partition("@")
    kind, _, number = name.partition(":")
    try:
        at = 0.0 if name == "mean" else float(number)
    except ValueError:
        at = math.nan
    if name != "mean" and not (kind in ("quantile", "above") and math.isfinite(at)):
        raise ValueError(f"--statistic is mean, quantile:Q or above:VALUE, not {name!r}")
    own = (
        None
        if quantity.isdecimal() or not quantity
        else load_callable(quantity, None, "--statistic")
    )

    def estimate(result: RowResult) -> EnsembleEstimate:
        size = 1 if result.values is None else result.values[0].size
        output = 0 if own is not None else int(quantity or 0)
        if own is None and size > 1 and (not quantity or output >= size):
            raise ValueError(
                f"rows have {size} outputs: --statistic {name}@0 to {name}@{size - 1} is of one, "
                f"and {name}@module:function of what a function gives of them"
            )
        f: Any = own or (lambda y: y.reshape(len(y), -1)[:, output])
        if kind == "above":
            return result.probability(lambda v: v > at, f, coverage=options.coverage)
        if kind == "quantile":
            return result.quantile(at, f, coverage=options.coverage)
        return result.mean(f, coverage=options.coverage)

    return estimate


def _summary(
    result: RowResult, numbers: dict[str, Any], settings: RowSettings
) -> Iterator[tuple[str, str]]:
    if found := numbers.get("statistic"):
        low, high = found["interval"]
        text = f"{found['value']:.6g}, {100 * found['coverage']:g} % in [{low:.6g}, {high:.6g}]"
        yield found["name"], text + (f"; {found['note']}" if found["note"] else "")
    done = f"{numbers['rows_done']:,} of {len(result.status):,}, {numbers['seconds']:.1f} s"
    yield "rows", f"{done}, {numbers['rows_per_second']:,.1f} rows/s"
    yield "computed", f"{numbers['computed']:,}"
    if odd := numbers["not_finite"]:
        yield "of them not finite", f"{odd:,}, as the function gave them"
    bar = numbers["largest_bar"]
    largest = "" if bar is None else f", the largest error bar {bar:.3g}"
    yield "predicted", f"{numbers['predicted']:,}{largest}"
    if result.learner is None:
        yield "learner", "none: all rows were computed before anything was learned"
    else:
        learner = f"fitted to {numbers['learned_from']:,} rows"
        if settings.tolerance is not None and result.values is not None:
            vectors = result.values[result.status == "computed"].reshape(numbers["computed"], -1)
            spread = np.sqrt(np.mean(np.var(vectors[np.isfinite(vectors).all(axis=1)], axis=0)))
            share = f" ({100 * settings.tolerance / spread:.2g} % of the spread)" * bool(spread > 0)
            learner += f"; the tolerance is {settings.tolerance:g}{share}"
        yield "learner", learner
        drawn = {"audited": "rows drawn at random", "came_late": "rows that came late"}
        for name, rows in drawn.items():
            if numbers[name]:
                yield f"bars held, {rows}", f"{numbers[f'{name}_held']:,} of {numbers[name]:,}"
        yield "all computed", f"would have taken {numbers['seconds_if_all_were_computed']:.0f} s"
    if settings.check_answers is not None:
        again, corrected = numbers["suspicious"], numbers["corrected"]
        yield "answers checked", f"{numbers['checked']:,}; {again:,} computed again elsewhere"
        yield "corrected", f"{corrected:,}"
        for name in ("fenced", "not_fenced"):
            for worker, why in numbers[name].items():
                yield f"{name.replace('_', ' ')}, worker {worker}", why
    yield "unknown", f"{numbers['unknown']:,}"
