"""The pool of `nercc run`, and what both of its kinds of runs share."""

import csv
import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler

from ..pools import AbstractPool, DevicePool, Faults, PoolReport, RayPool
from ..pools._rows import hang_timeout
from ._errors import fail
from ._options import check_positive_options, table_of_option
from ._own_models import find_score
from ._ray_job import RayJob

PARTIAL = 3  # the exit code of a run that has results, but not all


@dataclasses.dataclass(frozen=True)
class ChosenPool:
    """The workers that the options ask for; `workers` is None for N of them."""

    kind: Literal["devices", "ray"]
    workers: int | None
    ray: RayJob
    actor_options: dict[str, Any]
    faults: Faults
    deadline: float
    worker_dtype: str | None = None

    def count(self, num_workers: int) -> int:
        return num_workers if self.workers is None else self.workers

    def open(
        self,
        console: Console,
        model: Any,
        name: str,
        num_data: int | None,
        num_workers: int,
        **options: Any,
    ) -> AbstractPool:
        """Open the pool for a model of that name and a code of K and N; without a code K is None.

        Exits with code 1 if it does not start.
        """
        make: Any = DevicePool
        count = self.count(num_workers)
        if self.kind == "ray":
            _show_log(console)
            self.ray.connect([name])
            make = functools.partial(
                RayPool,
                actor_options=self.actor_options,
                max_per_node=None if num_data is None else num_workers - num_data or None,
                min_workers=1 if num_data is None else min(num_data, count),
            )
        options |= {
            "faults": self.faults,
            "worker_dtype": self.worker_dtype,
            "hang_timeout": hang_timeout(self.deadline),
        }
        try:
            with console.status(f"starting {count} workers ({self.kind}) ..."):
                return make(model, count, **options)
        except RuntimeError as error:
            fail(f"the pool did not start: {error}", 1)


def make_faults(options: Any) -> Faults:
    """Return the faults that the options ask for; raise ValueError, naming the option, if wrong."""
    for name in ("straggler_rate", "straggler_leaning", "death_rate", "wrong_rate"):
        if not 0 <= (value := getattr(options, name)) <= 1:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is a share of the calls, from 0 to 1, not {value}")
    check_positive_options("--straggler-delay-s", options.straggler_delay_s)
    score, wrong, example = options.straggler_score, options.wrong_workers, "{swap = [1]}"
    found = table_of_option("--wrong-workers", wrong or "{}", example)
    if not all(isinstance(each, list) and {*map(type, each)} <= {int} for each in found.values()):
        raise ValueError(f"--wrong-workers: a table of workers is needed, '{example}', not {wrong}")
    return Faults.from_rates(
        straggler_rate=options.straggler_rate,
        straggler_delay=options.straggler_delay_s,
        straggler_score=None if score is None else find_score(score),
        straggler_leaning=options.straggler_leaning,
        death_rate=options.death_rate,
        wrong_workers=found,
        wrong_rate=options.wrong_rate,
        seed=options.seed,
    )


def _show_log(console: Console) -> None:
    """Show what pools log, such as which Ray was joined, in a line each."""
    log = logging.getLogger("nercc_jax.pools")
    shown: Any = {"show_time": False, "show_level": False, "show_path": False}
    log.handlers[:] = [RichHandler(console=console, highlighter=NullHighlighter(), **shown)]
    log.setLevel(logging.INFO)


def check_result_file(path: Path, endings: Sequence[str]) -> None:
    """Raise ValueError for a result file with another ending; a folder has none."""
    if path.suffix not in ("", *endings):
        raise ValueError(
            f"--output {path}: a result file ends in {', '.join(endings[:-1])} or {endings[-1]}; a "
            "folder, which gets parts and a manifest, has no ending"
        )


def write_csv(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Write columns by name; floats have the shortest digits that identify them."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*(each.astype(str) for each in columns.values()), strict=True))


def parts_folder(output: Path) -> Path:
    """Return the folder of a result's parts: next to a file, or the output itself."""
    return output if not output.suffix else output.with_name(f"{output.name}.parts")


def summary_file(output: Path) -> Path:
    """Return the file of a summary's numbers: next to a file, or in the output folder."""
    return output / "summary.json" if not output.suffix else output.with_suffix(".summary.json")


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
