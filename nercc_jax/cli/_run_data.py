"""`nercc run` over a data set: coded batches of a classifier, decoded at so many answers."""

import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console

from ._compiled import compile_quickly
from ._options import CALIBRATION, Returned
from ._result_parts import Parts, check_parts, fingerprint, parts_folder, summary_file
from ._results import Results, check_kind, write_results
from ._run_job import (
    answers_to_wait_for,
    chosen_code,
    conclude,
    describe,
    describe_rule,
    enough_by_forecast,
    make_job,
    numbers_of,
    run_job,
    told,
)
from ._run_pool import ChosenPool
from ._tables import summary_table, write_json
from ._workload import find_workload


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """The command's options, by their names."""

    model: str
    weights: Path | None
    inputs: Path | None
    data_dir: Path | None
    split: str
    outputs: Returned
    code: Path | None
    num_data: int
    num_workers: int
    wait_for: int | None
    max_disagreement: float | None
    groups: int
    points: int | None
    batches: int | None
    seed: int


def run_data(asked: DataOptions, pool: ChosenPool, output: Path, resume: bool) -> None:
    """Raises: ValueError for options that do not fit. Exits as the command says."""
    check_kind(output)
    check_parts(output, resume)
    chosen = chosen_code(asked.code, asked.num_data, asked.num_workers)
    number = answers_to_wait_for(chosen, asked.wait_for, asked.max_disagreement)
    model = asked.model
    workload = find_workload(
        model,
        weights=asked.weights,
        inputs=asked.inputs,
        data_dir=asked.data_dir,
        outputs=asked.outputs,
    )
    network, source = workload.model, workload.rows(asked.split)
    job = make_job(source, chosen, asked.points, asked.batches, asked.groups)
    rows = job.batches.size * chosen.num_workers // chosen.num_data
    compile_quickly(network, job.inputs(job.rows[:1]), rows)
    console = Console()
    enough: Any = number
    if asked.max_disagreement is not None:
        with console.status(f"calibrating on {CALIBRATION:,} training images ..."):
            enough = enough_by_forecast(
                network,
                chosen,
                asked.data_dir,
                asked.max_disagreement,
                asked.seed,
                pool.worker_dtype,
            )
    size, num_outputs = job.batches.shape[1], job.num_outputs(network)
    results = Results(job.rows, size, num_outputs, chosen.num_workers)
    folder = parts_folder(output)
    settings = {
        "model": model,
        "weights": fingerprint(asked.weights),
        "outputs": asked.outputs,
        "data": workload.told(asked.split),
        "rows": len(job.rows),
        "points": len(job.labels),
        "groups": asked.groups,
        "code": fingerprint(asked.code) or describe(chosen),
        "worker_dtype": pool.worker_dtype,
    }
    parts = Parts(folder, settings, results)
    with pool.open(console, network, model, chosen, example=job.example()) as opened:
        what = f"{model}, {len(job.rows):,} data points of {source.name!r}, {describe(chosen)}; "
        until = describe_rule(number, asked.max_disagreement)
        console.print(
            f"{what}{pool.count(chosen)} workers ({pool.kind}); decoding {until}, or after "
            f"{pool.deadline:g} s",
            soft_wrap=True,
        )
        if len(results):
            console.print(f"{len(results):,} data points are done already")
        seen = run_job(console, opened, chosen, job, results, parts, enough, pool.deadline)
        report = opened.report()
    if len(results):
        if output != folder:
            write_results(output, results, job.labels)
        numbers = numbers_of(network, chosen, job, results, seen, report)
        console.print(summary_table(told(numbers, report)))
        console.print(f"results: {output.resolve()}", soft_wrap=True)
        write_json(console, summary_file(output), settings | numbers)
    conclude(results, seen, job, folder)
    if output != folder:
        parts.remove()
