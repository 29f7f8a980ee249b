"""`nercc run`: its workers, its result files, and an engine for rows or for groups of a code."""

import csv
import functools
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler
from rich.table import Table

from ..pools import AbstractPool, DevicePool, Faults, PoolReport, RayPool, leave_ray
from ..rows import RowSettings
from ..rows.files import check_parts
from ._command import fail
from ._options import Options, refuse, table_of_option
from ._output import Finished, write_json
from ._own_models import find_score
from ._ray_job import RayJob, leave_accelerators
from ._run_groups import run_groups
from ._run_rows import run_function
from ._workload import needs_pyarrow


def run(options: Options) -> None:
    """Run a model over a data set or row by row, and exit with a code if not all is done."""
    if options.inputs is None or options.inputs.suffix not in (".csv", ".parquet"):
        refuse(options, "inputs other than a .csv or .parquet", "columns", "id_column")
    if options.outputs == "values" and options.max_disagreement is not None:
        raise ValueError(
            "--max-disagreement is about labels, and --outputs values have none: give --tolerance"
        )
    engine, endings = run_groups, (".npz", ".csv")
    if options.by_row:
        engine, endings = run_function, (".npz", ".csv", ".parquet")
        other = "--tolerance" if options.max_disagreement is None else "--max-disagreement"
        refuse(options, other, "code", "batches", "worker_dtype", "num_data", "wait_for")
    else:
        refuse(options, "a coded run", "job_deadline_s", "max_calls", "check_answers", "grace_s")
    if options.pool == "ray":
        leave_accelerators()
    console, open_pool, path = Console(), pool_opener(options), options.output
    if path.suffix not in ("", *endings):
        raise ValueError(
            f"--output {path}: a result file ends in {', '.join(endings[:-1])} or {endings[-1]}; "
            "a folder, which gets parts and a manifest, has no ending"
        )
    if path.suffix == ".parquet":
        needs_pyarrow(f"--output {path}")
    # A file has its parts beside it until it is whole; a folder is the result itself.
    folder = path.with_name(f"{path.name}.parts") if path.suffix else path
    check_parts(folder, options.resume)

    found = engine(options, console, open_pool, folder)
    if found.columns:
        _write(console, path, folder, found)
    rest = f"{found.done}; {folder} has what is done, and --resume goes on from there"
    if found.stopped is not None:
        fail(f"{found.stopped}: {rest}", 130 if found.stopped == "interrupted" else 3)
    if found.missing is not None:
        fail(f"{found.missing}; {rest}", 3)  # there are results, but not all
    if path.suffix:
        shutil.rmtree(folder)
    if options.pool == "ray":
        leave_ray()


def pool_opener(options: Options) -> Callable[..., AbstractPool]:
    """Return a function that opens the pool that options ask for.

    It takes the console, the model, K (None without a code), N, and further arguments of a pool. It
    exits with code 1 if the workers do not start.

    Raises:
        ValueError: An option of Ray or of faults is wrong.
    """
    modules = tuple(options.py_modules or ())
    ray = RayJob(options.address, options.working_dir, modules, options.runtime_env)
    amounts = {"num_cpus": options.worker_cpus, "num_gpus": options.worker_gpus}
    actor: dict[str, Any] = {name: each for name, each in amounts.items() if each is not None}
    if (asked := options.worker_resources) is not None:
        actor["resources"] = table_of_option("--worker-resources", asked, "{TPU = 4}")
    asked, example = options.wrong_workers, "{swap = [1]}"
    wrong = table_of_option("--wrong-workers", asked or "{}", example)
    lists = (each if isinstance(each, list) else [None] for each in wrong.values())
    if not all(type(worker) is int for each in lists for worker in each):
        raise ValueError(f"--wrong-workers: a table of workers is needed, '{example}', not {asked}")
    faults = Faults.from_rates(
        straggler_rate=options.straggler_rate,
        straggler_delay=options.straggler_delay_s,
        straggler_score=find_score(options.straggler_score),
        straggler_leaning=options.straggler_leaning,
        death_rate=options.death_rate,
        wrong_workers=wrong,
        wrong_rate=options.wrong_rate,
        seed=options.seed,
    )

    def open_pool(
        console: Console, model: Any, num_data: int | None, num_workers: int, **further: Any
    ) -> AbstractPool:
        make: Any = DevicePool
        count = options.workers or num_workers
        if options.pool == "ray":
            # What pools log, such as which Ray was joined, in a line each.
            log = logging.getLogger("nercc_jax.pools")
            shown: Any = {"show_time": False, "show_level": False, "show_path": False}
            log.handlers[:] = [RichHandler(console=console, highlighter=NullHighlighter(), **shown)]
            log.setLevel(logging.INFO)
            ray.connect([options.model])
            make = functools.partial(
                RayPool,
                actor_options=actor,
                max_per_node=None if num_data is None else num_workers - num_data or None,
                min_workers=1 if num_data is None else min(num_data, count),
            )
        further |= {"faults": faults, "worker_dtype": options.worker_dtype}
        further |= {"hang_timeout": RowSettings(0.0, deadline=options.deadline_s).hang_timeout}
        try:
            with console.status(f"starting {count} workers ({options.pool}) ..."):
                return make(model, count, **further)
        except RuntimeError as error:
            fail(f"the pool did not start: {error}", 1)

    return open_pool


def _write(console: Console, path: Path, folder: Path, found: Finished) -> None:
    """Write the rows, as a table or as arrays, and print and write their summary."""
    if path.suffix == ".npz":
        np.savez(path, **found.arrays)  # pyright: ignore[reportArgumentType]
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(dict(found.columns)), path)
    elif path.suffix:
        with path.open("w", newline="") as opened:
            writer = csv.writer(opened)
            writer.writerow(found.columns)
            # As texts, floats have the shortest digits that identify them.
            texts = (each.astype(str) for each in found.columns.values())
            writer.writerows(zip(*texts, strict=True))
    table = Table("", "", box=box.SIMPLE_HEAD, show_header=False)
    for name, value in (*found.summary, *_faults_seen(found.report)):
        table.add_row(f"[bold]{name}[/bold]", value)
    console.print(table)
    console.print(f"results: {path.resolve()}", soft_wrap=True)
    file = path.with_suffix(".summary.json") if path.suffix else folder / "summary.json"
    write_json(console, file, found.numbers)


def _faults_seen(report: PoolReport) -> Iterator[tuple[str, str]]:
    """Yield the lines of a summary about late answers, errors and deaths, worker by worker."""
    yield "late answers", f"{report.late:,}"
    yield "errors", f"{report.errors:,}"
    workers = enumerate(report.deaths_by_worker)
    deaths = ", ".join(f"worker {worker}: {number}" for worker, number in workers if number)
    hung = f", {report.hung} of them hung" if report.hung else ""
    yield "deaths", f"{report.deaths:,}{hung} ({deaths})" if report.deaths else "0"
