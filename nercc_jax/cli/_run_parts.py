"""The pool of `nercc run`, and the files of its results: both for coded runs and row by row."""

import csv
import functools
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler

from ..pools import AbstractPool, DevicePool, Faults, PoolReport, RayPool
from ..rows import RowSettings
from ..rows.files import check_parts
from ._errors import fail
from ._options import RunOptions, table_of_option
from ._output import summary_table, write_json
from ._own_models import find_score
from ._ray_job import RayJob
from ._workload import needs_pyarrow

_PARTIAL = 3  # the exit code of a run that has results, but not all


class RunPool:
    """The workers that options ask for.

    Raises:
        ValueError: An option of Ray or of faults is wrong.
    """

    def __init__(self, options: RunOptions):
        self._options = options
        modules = tuple(options.py_modules or ())
        self._ray = RayJob(options.address, options.working_dir, modules, options.runtime_env)
        actor = {"num_cpus": options.worker_cpus, "num_gpus": options.worker_gpus}
        self._actor: dict[str, Any] = {n: each for n, each in actor.items() if each is not None}
        if options.worker_resources is not None:
            self._actor["resources"] = table_of_option(
                "--worker-resources", options.worker_resources, "{TPU = 4}"
            )
        asked, example = options.wrong_workers, "{swap = [1]}"
        wrong = table_of_option("--wrong-workers", asked or "{}", example)
        lists = (each if isinstance(each, list) else [None] for each in wrong.values())
        if not all(type(worker) is int for each in lists for worker in each):
            raise ValueError(
                f"--wrong-workers: a table of workers is needed, '{example}', not {asked}"
            )
        score = options.straggler_score
        self._faults = Faults.from_rates(
            straggler_rate=options.straggler_rate,
            straggler_delay=options.straggler_delay_s,
            straggler_score=None if score is None else find_score(score),
            straggler_leaning=options.straggler_leaning,
            death_rate=options.death_rate,
            wrong_workers=wrong,
            wrong_rate=options.wrong_rate,
            seed=options.seed,
        )

    def count(self, num_workers: int) -> int:
        return self._options.workers or num_workers

    def open(
        self,
        console: Console,
        model: Any,
        num_data: int | None,
        num_workers: int,
        **further: Any,
    ) -> AbstractPool:
        """Open the pool for a model and a code of K and N; without a code K is None.

        Exits with code 1 if it does not start.
        """
        make: Any = DevicePool
        count, kind = self.count(num_workers), self._options.pool
        if kind == "ray":
            # What pools log, such as which Ray was joined, in a line each.
            log = logging.getLogger("nercc_jax.pools")
            shown: Any = {"show_time": False, "show_level": False, "show_path": False}
            log.handlers[:] = [RichHandler(console=console, highlighter=NullHighlighter(), **shown)]
            log.setLevel(logging.INFO)
            self._ray.connect([self._options.model])
            make = functools.partial(
                RayPool,
                actor_options=self._actor,
                max_per_node=None if num_data is None else num_workers - num_data or None,
                min_workers=1 if num_data is None else min(num_data, count),
            )
        further |= {
            "faults": self._faults,
            "worker_dtype": self._options.worker_dtype,
            "hang_timeout": RowSettings(0.0, deadline=self._options.deadline_s).hang_timeout,
        }
        try:
            with console.status(f"starting {count} workers ({kind}) ..."):
                return make(model, count, **further)
        except RuntimeError as error:
            fail(f"the pool did not start: {error}", 1)


class Destination:
    """The files of a run's results: a file, with a folder of parts until it is whole, or a folder.

    Raises:
        ValueError: The file has another ending, or the folder may not be written to.
    """

    def __init__(self, options: RunOptions, endings: Sequence[str]):
        self.path = path = options.output
        if path.suffix not in ("", *endings):
            raise ValueError(
                f"--output {path}: a result file ends in {', '.join(endings[:-1])} or "
                f"{endings[-1]}; a folder, which gets parts and a manifest, has no ending"
            )
        if path.suffix == ".parquet":
            needs_pyarrow(f"--output {path}")
        self.folder = path.with_name(f"{path.name}.parts") if path.suffix else path
        check_parts(self.folder, options.resume)

    def write(
        self,
        console: Console,
        columns: Mapping[str, np.ndarray],
        arrays: Mapping[str, Any],
        summary: Iterable[tuple[str, str]],
        numbers: Mapping[str, Any],
    ) -> None:
        """Write the rows, as a table or as arrays, and print and write their summary."""
        path, file = self.path, self.folder / "summary.json"
        if path.suffix:
            file = path.with_suffix(".summary.json")
        if path.suffix == ".npz":
            np.savez(path, **arrays)  # pyright: ignore
        elif path.suffix == ".parquet":
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.table(dict(columns)), path)
        elif path.suffix:
            with path.open("w", newline="") as opened:
                writer = csv.writer(opened)
                writer.writerow(columns)
                # As texts, floats have the shortest digits that identify them.
                writer.writerows(zip(*(each.astype(str) for each in columns.values()), strict=True))
        console.print(summary_table(summary))
        console.print(f"results: {path.resolve()}", soft_wrap=True)
        write_json(console, file, numbers)

    def end(self, stopped: str | None, done: str, missing: str | None) -> None:
        """Exit with 130 after Ctrl-C and with 3 where rows are missing, else remove a file's parts.

        The texts say why the run stopped early, how many rows are done, and which are missing.
        """
        rest = f"; {self.folder} has what is done, and --resume goes on from there"
        if stopped is not None:
            fail(f"{stopped}: {done}{rest}", 130 if stopped == "interrupted" else _PARTIAL)
        if missing is not None:
            fail(f"{missing}{rest}", _PARTIAL)
        if self.path.suffix:
            shutil.rmtree(self.folder)


def deaths_text(report: PoolReport) -> str:
    """Return the deaths of workers, worker by worker."""
    if not report.deaths:
        return "0"
    by_worker = ", ".join(
        f"worker {worker}: {deaths}"
        for worker, deaths in enumerate(report.deaths_by_worker)
        if deaths
    )
    hung = f", {report.hung} of them hung" if report.hung else ""
    return f"{report.deaths:,}{hung} ({by_worker})"
