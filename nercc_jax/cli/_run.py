"""`nercc run`: run a model on data, row by row or in groups of a code, on workers that may fail."""

import csv
import dataclasses
import functools
import importlib.util
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import TaskID

from ..codes import NeRCC
from ..pools import AbstractPool
from ..pools.options import open_pool
from ..pools.ray_cluster import join_ray
from ..risk import EnsembleEstimate
from ..rows import GroupResult, RowProgress, RowResult, RowSettings, run_groups, run_rows
from ..rows.files import check_parts, fingerprint
from ._command import fail, of_option
from ._options import Options, refuse
from ._output import progress_bar, show, write_json
from ._process import leave_accelerators
from ._workload import callable_of, faults_of, find_workload, load_plain_code


def run(options: Options) -> None:
    """Run a model on a data set, on a pool whose workers may straggle or die.

    Each batch is encoded, sent to the workers, and decoded once enough of them have answered. With
    --tolerance or --max-disagreement, the model may be any function, and each row is computed or
    predicted. Exit codes: 0 done, 1 no result, 2 wrong options, 3 rows are missing, 130 Ctrl-C.
    """
    if options.inputs is None or options.inputs.suffix not in (".csv", ".parquet"):
        refuse(options, "inputs other than a .csv or .parquet", "columns", "id_column")
    if options.outputs == "values" and options.max_disagreement is not None:
        raise ValueError(
            "--max-disagreement is about labels, and --outputs values have none: give --tolerance"
        )
    if options.by_row:
        other = "--tolerance" if options.max_disagreement is None else "--max-disagreement"
        refuse(options, other, "code", "batches", "worker_dtype", "num_data", "wait_for")
    else:
        refuse(options, "a coded run", "job_deadline_s", "max_calls", "check_answers", "grace_s")
    path, endings = options.output, (".npz", ".csv", ".parquet")
    if path.suffix not in ("", *endings):
        raise ValueError(
            f"--output {path}: a result file ends in {', '.join(endings[:-1])} or {endings[-1]}; "
            "a folder, which gets parts and a manifest, has no ending"
        )
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ImportError(f"--output {path} needs pyarrow: pip install '.[data]' in a clone")
    if options.pool == "ray":
        leave_accelerators()
    console = Console()
    opened, bar = pool_opener(options, console), progress_bar(console)
    # The parts of a result file are in a folder next to it until the run is complete.
    folder = path.with_name(f"{path.name}.parts") if path.suffix else path
    check_parts(folder, options.resume)

    def follow(progress: RowProgress) -> None:
        if not bar.task_ids:
            if progress.done:
                console.print(f"{progress.done:,} rows are done already")
            bar.add_task("computing the first rows ...", total=progress.rows)
            return bar.start()
        bar.update(TaskID(0), completed=progress.done, description=str(progress))

    kept = {"folder": folder, "resume": options.resume, "on_progress": follow}
    engine = _by_row if options.by_row else _by_group
    try:
        result, columns, found = engine(options, opened, kept)
    finally:
        if bar.task_ids:
            bar.stop()
    numbers, (low, high) = {}, (0.0, np.inf) if found is None else found.interval
    if found is not None:
        numbers["statistic"] = {"name": options.statistic, **dataclasses.asdict(found)}
        words = f"{options.statistic}: {found.value:.6g}, {100 * found.coverage:g} % in "
        show(console, f"{words}[{low:.6g}, {high:.6g}]{'; ' * bool(found.note)}{found.note}")
    if columns:
        _write(path, result, columns)
        show(console, result, f"results: {path.resolve()}")
        file = path.with_suffix(".summary.json") if path.suffix else folder / "summary.json"
        write_json(console, file, result.summary | numbers)
    done = f"{result.summary['rows_done']:,} of {result.summary['rows']:,} rows are done"
    rest = f"{done}; {folder} has what is done, and --resume goes on from there"
    if result.stopped is not None:
        fail(f"{result.stopped}: {rest}", 130 if result.stopped == "interrupted" else 3)
    if result.reasons and not (options.stop_at is not None and high - low <= options.stop_at):
        row, why = next(iter(result.reasons.items()))
        fail(f"{len(result.reasons):,} rows are unknown: row {row}: {why}; {rest}", 3)
    if options.batches is not None and result.summary["rows_done"] < result.summary["rows"]:
        show(console, rest)
    elif path.suffix:
        shutil.rmtree(folder)


def pool_opener(options: Options, console: Console) -> Callable[..., AbstractPool]:
    """Return a function that opens the pool that the options describe, and prints its purpose.

    It takes a description, the model, N, and further arguments of `open_pool`. It exits with code 1
    if the workers do not start.
    """
    asked = dataclasses.replace(options, faults=faults_of(options.faults))
    hang_timeout = RowSettings(0.0, deadline=options.deadline_s).hang_timeout
    further = {"seed": options.seed, "hang_timeout": hang_timeout}

    def opened(what: str, model: Any, num_workers: int, **others: Any) -> AbstractPool:
        words = f"{options.workers or num_workers} workers ({options.pool})"
        if options.pool == "ray":
            logging.basicConfig(format="%(message)s")
            logging.getLogger("nercc_jax.pools").setLevel(logging.INFO)  # logs Ray's address
            join_ray(options.address, options.runtime_env)
        try:
            with console.status(f"starting {words} ..."):
                pool = open_pool(model, num_workers, asked, **others | further)
        except RuntimeError as error:
            fail(f"the pool did not start: {error}", 1)
        show(console, f"{options.model}, {what}; {words}")
        return pool

    return opened


def _by_row(
    options: Options, opened: Callable[..., Any], kept: dict[str, Any]
) -> tuple[RowResult, dict[str, np.ndarray], EnsembleEstimate | None]:
    """Run a function on rows; return the result, its table, and the statistic if there is one."""
    fields = {field.name for field in dataclasses.fields(RowSettings)}
    named = {"rows_per_call": "groups"}
    named |= {name: f"{name}_s" for name in ("deadline", "job_deadline", "grace")}
    settings = RowSettings(**{name: getattr(options, named.get(name, name)) for name in fields})
    (model, data), split = find_workload(options, traced=False), options.split or "test"
    with of_option(f"--split {split}"):
        source = data.split(split)
    x = np.asarray(data.preprocess(source.x[: options.max_inputs]))
    ids = None if source.ids is None else source.ids[: len(x)]
    statistic = _statistic(options)
    about = {"model": options.model, "weights": fingerprint(options.weights)}
    further: Any = kept | {"about": about, "ids": ids, "num_workers": options.num_workers}
    if options.stop_at is not None:
        further["stop_when"] = lambda estimate: estimate.width <= options.stop_at
    opening = functools.partial(opened, f"{len(x):,} rows of {source.name!r}")
    try:
        result = run_rows(model, x, opening, settings, statistic=statistic, **further)
    except RuntimeError as error:
        fail(str(error), 1)
    found = None if statistic is None or result.evidence is None else statistic(result)
    return result, {} if result.values is None else result.columns(), found


def _statistic(options: Options) -> Callable[[RowResult], EnsembleEstimate] | None:
    """Return the function of --statistic, if it is set; raise ValueError if it is invalid."""
    if options.statistic is None:
        if options.stop_at is not None:
            raise ValueError("--stop-at needs a --statistic")
        return None
    name, _, quantity = options.statistic.partition("@")
    found = re.fullmatch(r"mean|(quantile|above):([-+.\de]+)", name)
    if found is None:
        raise ValueError(f"--statistic is mean, quantile:Q or above:VALUE, not {name!r}")
    with of_option("--statistic"):
        at = float(found[2] or 0)
    f = callable_of("--statistic", quantity) if quantity else None
    further: Any = {"f": f, "coverage": options.coverage}

    def estimate(result: RowResult) -> EnsembleEstimate:
        with of_option(f"--statistic {name}@module:function"):
            if found[1] == "above":
                return result.probability(lambda v: v > at, **further)
            return result.quantile(at, **further) if found[1] else result.mean(**further)

    return estimate


def _by_group(
    options: Options, opened: Callable[..., Any], kept: dict[str, Any]
) -> tuple[GroupResult, dict[str, np.ndarray], None]:
    """Run a model on groups of a code, and return the result and its table."""
    code: Any = NeRCC(options.num_data, options.num_workers)
    if options.code is not None:
        code = load_plain_code(options.code, f"--code {options.code}")
    num_workers = code.num_workers
    if options.wait_for is not None and not 1 <= options.wait_for <= num_workers:
        raise ValueError(f"--wait-for must be from 1 to N = {num_workers}, not {options.wait_for}")
    (model, data), split = find_workload(options), options.split or "test"
    with of_option(f"--split {split}"):
        source = data.split(split)
    x = source.x[: options.max_inputs]
    ids = None if source.ids is None else source.ids[: len(x)]
    # By default 85 % of N, and at least K.
    enough = options.wait_for or min(max(num_workers * 85 // 100, code.num_data), num_workers)
    described = f"{type(code).__name__} with K={code.num_data}, N={num_workers}"
    about = {
        "model": options.model,
        "weights": fingerprint(options.weights),
        "outputs": options.outputs,
        "code": fingerprint(options.code) or described,
        "worker_dtype": options.worker_dtype,
    }
    what = f"{len(x):,} data points of {source.name!r}, {described}; decoding at {enough} "
    what += f"answers, or after {options.deadline_s:g} s"
    groups = min(options.groups or 1, -(-len(x) // code.num_data))
    example = np.repeat(np.asarray(data.preprocess(x[:1])), groups, axis=0)
    opening = {"num_data": code.num_data, "example": example}
    further: Any = kept | {"about": about, "ids": ids, "prepare": data.preprocess}
    further |= {"enough": enough, "deadline": options.deadline_s, "groups": groups}
    with opened(what, model, num_workers, **opening) as pool:
        found = run_groups(pool, code, x, batches=options.batches, **further)

    columns = found.columns() if len(found.arrays["index"]) else {}
    if columns and options.outputs != "values":
        index, recovered, y = (found.arrays[n] for n in ("index", "recovered", "predictions"))
        predicted = np.full(len(index), -1)
        predicted[recovered] = y[recovered].argmax(axis=1) if recovered.any() else -1
        columns |= {"label": source.labels[index], "predicted": predicted}
    return found, columns, None


def _write(path: Path, result: Any, columns: dict[str, np.ndarray]) -> None:
    """Write rows to a file, as arrays or a table; a result folder already has its parts."""
    if path.suffix == ".npz":
        wide: Any = (
            {"predictions": result.values}
            if isinstance(result, RowResult)
            else {name: result.arrays[name] for name in ("responded", "predictions")}
        )
        plain = {n: each for n, each in columns.items() if not n.startswith(("output_", "reason"))}
        np.savez(path, **plain | wide)
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(dict(columns)), path)
    elif path.suffix:
        with path.open("w", newline="") as opened:
            writer = csv.writer(opened)
            writer.writerow(columns)
            # As text, floats have the shortest digits that identify them.
            writer.writerows(zip(*(each.astype(str) for each in columns.values()), strict=True))
