"""`nercc run --tolerance`: any function on each row of a file, by `nercc_jax.pools.run_rows`."""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..pools import RowResult, run_rows
from ..pools._row_files import check_parts, fingerprint
from ..pools._rows import RowProgress, RowSettings
from ._errors import fail
from ._output import summary_table, write_json
from ._run_pool import (
    PARTIAL,
    ChosenPool,
    check_result_file,
    deaths_text,
    parts_folder,
    summary_file,
    write_csv,
)
from ._workload import find_workload, needs_pyarrow

_FILES = (".npz", ".csv", ".parquet")  # or a folder, of parts
# By the settings of `run_rows`, the options.
_SETTINGS = {field.name: field.name for field in dataclasses.fields(RowSettings)} | {
    "rows_per_call": "groups",
    **{name: f"{name}_s" for name in ("deadline", "job_deadline", "grace")},
}


def run_function(options: Any, pool: ChosenPool, output: Path, resume: bool) -> None:
    """Run a function on rows, as the command's options say.

    Raises ValueError if one does not fit, and exits with a code if not everything is done.
    """
    check_result_file(output, _FILES)
    if output.suffix == ".parquet":
        needs_pyarrow(f"--output {output}")
    numbers = {name: getattr(options, option) for name, option in _SETTINGS.items()}
    with _naming_options():
        settings = RowSettings(**numbers)
    folder = parts_folder(output)
    check_parts(folder, resume)
    asked = options.weights, options.inputs, options.data_dir, options.outputs
    table = {"columns": options.columns, "id_column": options.id_column}
    workload = find_workload(options.model, *asked, traced=False, **table)
    source = workload.rows(options.split)
    ids = None if source.ids is None else source.ids[: options.max_inputs]
    x = np.asarray(source.preprocess(source.images[: options.max_inputs]))
    console = Console()

    def open_pool(function: Any, num_workers: int, **further: Any) -> Any:
        opened = pool.open(console, function, options.model, None, num_workers, **further)
        console.print(
            f"{options.model}, {len(x):,} rows of {source.name!r}, {_target_text(settings)}; "
            f"{pool.count(num_workers)} workers ({pool.kind})",
            soft_wrap=True,
        )
        return opened

    about = {
        "model": options.model,
        "weights": fingerprint(options.weights),
        "inputs": workload.fingerprint(options.split),
    }
    try:
        with _naming_options(), _Bar(console) as bar:
            result = run_rows(
                workload.model,
                x,
                open_pool,
                folder=folder,
                resume=resume,
                about=about,
                ids=ids,
                on_progress=bar.show,
                num_workers=options.num_workers,
                **numbers,
            )
    except RuntimeError as error:
        fail(str(error), 1)
    if result.values is not None:
        if output != folder:
            _write_rows(output, result)
        console.print(summary_table(_summary(result, settings)))
        console.print(f"results: {output.resolve()}", soft_wrap=True)
        write_json(console, summary_file(output), result.summary)
    _exit_unless_done(result, folder)
    if output != folder:
        shutil.rmtree(folder)


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


class _Bar(contextlib.ExitStack):
    """A progress bar, which begins with the first progress that is shown."""

    def __init__(self, console: Console):
        super().__init__()
        self._console = console
        self._bar: Progress | None = None

    def show(self, progress: RowProgress) -> None:
        if self._bar is None:
            if progress.done:
                self._console.print(f"{progress.done:,} rows are done already")
            columns = BarColumn(bar_width=12), TextColumn("{task.description}")
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console)
            self.enter_context(self._bar)
            self._task = self._bar.add_task("computing the first rows ...", total=progress.rows)
            return
        text = (
            f"computed {progress.computed:,}, predicted {progress.predicted:,}, "
            f"waiting {progress.waiting:,}"
        )
        if progress.late:
            text += f", of them late {progress.late:,}"
        if progress.unknown:
            text += f", unknown {progress.unknown:,}"
        text += f"; {progress.rows_per_second:,.1f} rows/s, {progress.workers:,} workers"
        self._bar.update(self._task, completed=progress.done, description=text)


def _target_text(settings: RowSettings) -> str:
    if settings.max_disagreement is not None:
        return f"at most {100 * settings.max_disagreement:g} % of labels different"
    bars = f"{100 * settings.coverage:g} % bars"
    return f"each within {settings.tolerance:g} ({bars}) or computed"


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
    if result.fitted is not None:
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
    if result.fitted is None:
        return "none: all rows were computed before anything was learned"
    text = f"fitted to {result.fitted.pairs:,} rows"
    if settings.tolerance is not None and result.values is not None:
        vectors = result.values[result.status == "computed"].reshape(result.summary["computed"], -1)
        vectors = vectors[np.isfinite(vectors).all(axis=1)]
        spread = float(np.sqrt(np.mean(np.var(vectors, axis=0))))
        share = f" ({100 * settings.tolerance / spread:.2g} % of the spread)" if spread > 0 else ""
        text += f"; the tolerance is {settings.tolerance:g}{share}"
    return text


def _exit_unless_done(result: RowResult, folder: Path) -> None:
    """Exit with 130 after Ctrl-C, with 3 where rows are missing or unknown."""
    rest = f"; {folder} has what is done, and --resume goes on from there"
    count = f"{result.summary['rows_done']:,} of {len(result.status):,} rows are done"
    if result.stopped is not None:
        code = 130 if result.stopped == "interrupted" else PARTIAL
        fail(f"{result.stopped}: {count}{rest}", code)
    if result.reasons:
        row, why = next(iter(result.reasons.items()))
        fail(
            f"{len(result.reasons):,} rows are unknown: row {row}: {why}; {count}{rest}",
            PARTIAL,
        )


def _write_rows(path: Path, result: RowResult) -> None:
    """Write all rows. Tables have a column for each output, arrays the function's own shape."""
    columns: dict[str, Any] = result.columns()
    if path.suffix == ".npz":
        names = ("deviation", result.score_name, "exact")
        arrays = {} if result.ids is None else {"id": result.ids}
        arrays |= {"predictions": result.values} | {name: columns[name] for name in names}
        np.savez(path, **arrays)  # pyright: ignore
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(columns), path)
    else:
        write_csv(path, columns)
