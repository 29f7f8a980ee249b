"""`nercc run --tolerance`: any function on each row of a file, by `nercc_jax.rows.run_rows`."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, TaskID

from ..rows import RowProgress, RowResult, RowSettings, run_rows
from ..rows.files import fingerprint
from ._errors import fail
from ._options import RunOptions
from ._output import run_bar
from ._run_parts import Destination, RunPool, deaths_text
from ._workload import find_workload

# By the settings of `run_rows`, the options.
_SETTINGS = {
    **{field.name: field.name for field in dataclasses.fields(RowSettings)},
    "rows_per_call": "groups",
    **{name: f"{name}_s" for name in ("deadline", "job_deadline", "grace")},
}
del _SETTINGS["learner_share"]


def run_function(options: RunOptions, pool: RunPool) -> None:
    """Run a function on rows, as the command's options say.

    Raises ValueError if one does not fit, and exits with a code if not everything is done.
    """
    numbers = {name: getattr(options, option) for name, option in _SETTINGS.items()}
    with _naming_options():
        settings = RowSettings(**numbers)
    to = Destination(options, (".npz", ".csv", ".parquet"))
    table: Any = {"columns": options.columns, "id_column": options.id_column}
    workload = find_workload(options, options.outputs, traced=False, **table)
    source = workload.rows(options.split)
    ids = None if source.ids is None else source.ids[: options.max_inputs]
    x = np.asarray(source.preprocess(source.images[: options.max_inputs]))
    console = Console()

    def open_pool(function: Any, num_workers: int, **further: Any) -> Any:
        opened = pool.open(console, function, None, num_workers, **further)
        target = f"at most {100 * (settings.max_disagreement or 0):g} % of labels different"
        if settings.tolerance is not None:
            bars = f"{100 * settings.coverage:g} % bars"
            target = f"each within {settings.tolerance:g} ({bars}) or computed"
        console.print(
            f"{options.model}, {len(x):,} rows of {source.name!r}, {target}; "
            f"{pool.count(num_workers)} workers ({options.pool})",
            soft_wrap=True,
        )
        return opened

    bar: Progress | None = None
    task = TaskID(0)

    def show(progress: RowProgress) -> None:
        nonlocal bar, task
        if bar is None:
            if progress.done:
                console.print(f"{progress.done:,} rows are done already")
            bar = shown.enter_context(run_bar(console))
            task = bar.add_task("computing the first rows ...", total=progress.rows)
            return
        late = f", of them late {progress.late:,}" if progress.late else ""
        unknown = f", unknown {progress.unknown:,}" if progress.unknown else ""
        text = (
            f"computed {progress.computed:,}, predicted {progress.predicted:,}, waiting "
            f"{progress.waiting:,}{late}{unknown}; {progress.rows_per_second:,.1f} rows/s, "
            f"{progress.workers:,} workers"
        )
        bar.update(task, completed=progress.done, description=text)

    about = {
        "model": options.model,
        "weights": fingerprint(options.weights),
        "inputs": workload.fingerprint(options.split),
    }
    try:
        with _naming_options(), contextlib.ExitStack() as shown:
            result = run_rows(
                workload.model,
                x,
                open_pool,
                settings,
                folder=to.folder,
                resume=options.resume,
                about=about,
                ids=ids,
                on_progress=show,
                num_workers=options.num_workers,
            )
    except RuntimeError as error:
        fail(str(error), 1)
    if result.values is not None:
        columns = result.columns()
        # Tables have a column for each output, arrays the function's own shape.
        arrays = {} if result.ids is None else {"id": result.ids}
        arrays |= {"predictions": result.values}
        arrays |= {name: columns[name] for name in ("deviation", result.score_name, "exact")}
        to.write(console, columns, arrays, _summary(result, settings), result.summary)
    done = f"{result.summary['rows_done']:,} of {len(result.status):,} rows are done"
    unknown = None
    if result.reasons:
        row, why = next(iter(result.reasons.items()))
        unknown = f"{len(result.reasons):,} rows are unknown: row {row}: {why}; {done}"
    to.end(result.stopped, done, unknown)


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


def _summary(result: RowResult, settings: RowSettings) -> Iterator[tuple[str, str]]:
    numbers, report = result.summary, result.report
    done = f"{numbers['rows_done']:,} of {len(result.status):,}, {numbers['seconds']:.1f} s"
    yield "rows", f"{done}, {numbers['rows_per_second']:,.1f} rows/s"
    yield "computed", f"{numbers['computed']:,}"
    if odd := numbers["not_finite"]:
        yield "of them not finite", f"{odd:,}, as the function gave them"
    bar = numbers["largest_bar"]
    largest = "" if bar is None else f", the largest error bar {bar:.3g}"
    yield "predicted", f"{numbers['predicted']:,}{largest}"
    yield "learner", _learner_text(result, settings)
    if result.learner is not None:
        for name, rows in (
            ("audited", "rows drawn at random"),
            ("came_late", "rows that came late"),
        ):
            if numbers[name]:
                held = f"{numbers[f'{name}_held']:,} of {numbers[name]:,}"
                yield f"bars held, {rows}", held
        yield "all computed", f"would have taken {numbers['seconds_if_all_were_computed']:.0f} s"
    if settings.check_answers is not None:
        again, corrected = numbers["suspicious"], numbers["corrected"]
        yield "answers checked", f"{numbers['checked']:,}; {again:,} computed again elsewhere"
        yield "corrected", f"{corrected:,}"
        for name in ("fenced", "not_fenced"):
            for worker, why in numbers[name].items():
                yield f"{name.replace('_', ' ')}, worker {worker}", why
    yield "late answers", f"{report.late:,}"
    yield "errors", f"{report.errors:,}"
    yield "deaths", deaths_text(report)
    yield "unknown", f"{numbers['unknown']:,}"


def _learner_text(result: RowResult, settings: RowSettings) -> str:
    if result.learner is None:
        return "none: all rows were computed before anything was learned"
    text = f"fitted to {result.summary['learned_from']:,} rows"
    if settings.tolerance is not None and result.values is not None:
        vectors = result.values[result.status == "computed"].reshape(result.summary["computed"], -1)
        vectors = vectors[np.isfinite(vectors).all(axis=1)]
        spread = float(np.sqrt(np.mean(np.var(vectors, axis=0))))
        share = f" ({100 * settings.tolerance / spread:.2g} % of the spread)" if spread > 0 else ""
        text += f"; the tolerance is {settings.tolerance:g}{share}"
    return text
