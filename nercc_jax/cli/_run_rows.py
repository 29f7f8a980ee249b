"""`nercc run --inputs`: a function of anyone's on each row of a file, within a tolerance."""

import dataclasses
from pathlib import Path

import numpy as np
from rich.console import Console

from ..codes import NeRCC
from ..pools import Goal, RowFunction
from ._errors import fail
from ._options import Returned
from ._result_parts import Parts, check_parts, fingerprint, parts_folder, summary_file
from ._row_job import RowJob, RowRun, numbers_of, run_rows, told
from ._row_results import RowResults, check_row_file, write_rows
from ._run_job import PARTIAL, answers_to_wait_for
from ._run_pool import ATTEMPTS, ChosenPool
from ._tables import summary_table, write_json
from ._workload import find_workload


@dataclasses.dataclass(frozen=True)
class RowOptions:
    """The command's options, by their names."""

    model: str
    weights: Path | None
    inputs: Path | None
    data_dir: Path | None
    split: str
    outputs: Returned
    tolerance: float | None
    max_disagreement: float | None
    coverage: float
    num_data: int | None
    num_workers: int
    wait_for: int | None
    groups: int | None
    points: int | None
    seed: int

    def goal(self) -> Goal:
        """Raises: ValueError unless one of the two is asked for, and may be."""
        if (self.tolerance is None) == (self.max_disagreement is None):
            raise ValueError(
                "give --tolerance, in units of the outputs (0: all rows are computed), or "
                "--max-disagreement, where the outputs are scores of labels, not both"
            )
        if self.tolerance is not None and not 0 <= self.tolerance < np.inf:
            raise ValueError(f"--tolerance must be 0 or positive, not {self.tolerance}")
        if self.max_disagreement is not None and not 0 <= self.max_disagreement <= 1:
            raise ValueError(f"--max-disagreement must be in [0, 1], not {self.max_disagreement}")
        if not 0 < self.coverage < 1:
            raise ValueError(f"--coverage is a share between 0 and 1, not {self.coverage}")
        return Goal(self.tolerance, self.max_disagreement, self.coverage)

    def code(self) -> NeRCC:
        """K rows and N - K copies. Raises: ValueError for numbers that do not fit."""
        num_data = self.num_data
        if num_data is None:
            num_data = max(1, self.num_workers * 9 // 10)
        if not 1 <= num_data <= self.num_workers:
            raise ValueError(
                f"--num-data must be from 1 to N = {self.num_workers}, not {num_data}: "
                "each row goes to a worker, and the others get copies"
            )
        return NeRCC(num_data, self.num_workers)


def run_function(asked: RowOptions, pool: ChosenPool, output: Path, resume: bool) -> None:
    """Raises: ValueError for options that do not fit. Exits as the command says."""
    check_row_file(output)
    goal, code = asked.goal(), asked.code()
    check_parts(output, resume)
    number = answers_to_wait_for(code, asked.wait_for, None)
    assert number is not None
    workload = find_workload(
        asked.model,
        weights=asked.weights,
        inputs=asked.inputs,
        data_dir=asked.data_dir,
        outputs=asked.outputs,
        traced=False,
    )
    function, source = RowFunction(workload.model), workload.rows(asked.split)
    x = np.asarray(source.preprocess(source.images[: asked.points]))
    job = RowJob.shuffled(x, asked.seed, code, goal, number, asked.groups, pool.deadline)
    results, folder = RowResults(len(x)), parts_folder(output)
    settings = {
        "model": asked.model,
        "weights": fingerprint(asked.weights),
        "inputs": workload.told(asked.split),
        "rows": len(x),
        "tolerance": asked.tolerance,
        "max_disagreement": asked.max_disagreement,
        "coverage": asked.coverage,
        "num_data": code.num_data,
        "num_workers": code.num_workers,
        "seed": asked.seed,
    }
    parts = Parts(folder, settings, results)
    console = Console()
    with pool.open(console, function, asked.model, code, compiled=False) as opened:
        console.print(
            f"{asked.model}, {len(x):,} rows of {source.name!r}, {_wanted(goal)}; "
            f"{pool.count(code)} workers ({pool.kind})",
            soft_wrap=True,
        )
        if results.done.any():
            console.print(f"{results.done.sum():,} rows are done already")
        run = RowRun(opened, job, results, parts)
        try:
            stopped = run_rows(console, opened, run, results, parts)
        except RuntimeError as error:
            if not results.done.any():
                parts.remove()
            fail(str(error), 1)
        report = opened.report()
    if results.predictions is not None:
        if output != folder:
            write_rows(output, results, "bar" if goal.max_disagreement is None else "doubt")
        numbers = numbers_of(run, job, results, report)
        console.print(summary_table(told(numbers, run, job, results, report)))
        console.print(f"results: {output.resolve()}", soft_wrap=True)
        write_json(console, summary_file(output), settings | numbers)
    _conclude(run, results, folder, stopped)
    if output != folder:
        parts.remove()


def _wanted(goal: Goal) -> str:
    if goal.max_disagreement is not None:
        return f"at most {100 * goal.max_disagreement:g} % of labels different"
    return f"each within {goal.tolerance:g} ({100 * goal.coverage:g} % bars) or computed"


def _conclude(run: RowRun, results: RowResults, folder: Path, stopped: str | None) -> None:
    """Exits with 130 after Ctrl-C, with 3 where rows are missing or lost."""
    rest = f"; {folder} has what is done, and --resume goes on from there"
    count = f"{results.done.sum():,} of {len(results):,} rows are done"
    if stopped is not None:
        fail(f"{stopped}: {count}{rest}", 130 if stopped == "interrupted" else PARTIAL)
    if run.lost:
        row, why = min(run.lost.items())
        fail(
            f"{len(run.lost):,} rows are lost after {ATTEMPTS} attempts, and NaN in the result: "
            f"row {row}: {why}; {count}{rest}",
            PARTIAL,
        )
