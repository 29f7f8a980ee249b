"""`nercc run`: coded batch inference over a data set on a pool of workers."""

import importlib.util
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ._errors import told_plainly
from ._options import (
    CALIBRATION,
    DataDir,
    ModelName,
    NumData,
    NumWorkers,
    OutputsOption,
    check_folder,
    check_positive,
    check_shipped,
)


def run_command(
    model: ModelName = "lenet5-digits",
    data_dir: DataDir = None,
    split: Annotated[str, typer.Option(help="The data set's split to go over.")] = "test",
    num_data: NumData = 8,
    num_workers: NumWorkers = 20,
    code: Annotated[
        Path | None,
        typer.Option(help="A code that `nercc tune` wrote; K and N are its own. NeRCC unless set."),
    ] = None,
    pool: Annotated[
        Literal["devices", "ray"],
        typer.Option(help="Workers: threads on this process's devices, or Ray actors."),
    ] = "devices",
    workers: Annotated[
        int | None, typer.Option(help="Workers in the pool, spare ones or fewer; N unless given.")
    ] = None,
    worker_dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option(help="What workers run in; what they are sent, and weights, are cast to it."),
    ] = None,
    wait_for: Annotated[
        int | None,
        typer.Option(help="Decode at so many answers; 85 % of N unless given, but at least K."),
    ] = None,
    max_disagreement: Annotated[
        float | None,
        typer.Option(
            help="Instead: decode once no larger share of labels is expected to differ from the "
            f"model's own, by {CALIBRATION:,} training images."
        ),
    ] = None,
    deadline: Annotated[
        float, typer.Option(help="Seconds after which a batch is decoded from what is in.")
    ] = 30.0,
    groups: Annotated[int, typer.Option(help="Groups of K data points in a batch.")] = 1,
    points: Annotated[
        int | None, typer.Option(help="Data points to use, at most; the whole split unless given.")
    ] = None,
    batches: Annotated[
        int | None,
        typer.Option(help="Batches to run, over the data again and again; once unless given."),
    ] = None,
    outputs: OutputsOption = "logits",
    straggler_rate: Annotated[
        float, typer.Option(help="On trial: the share of calls that are delayed on purpose ...")
    ] = 0.0,
    straggler_delay: Annotated[float, typer.Option(help="... and by how many seconds.")] = 1.0,
    death_rate: Annotated[
        float, typer.Option(help="On trial: the share of calls in which the worker dies.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the faults and of the calibration.")] = 0,
    output: Annotated[Path, typer.Option(help="Result file, .npz or .csv.")] = Path(
        "nercc-run.npz"
    ),
) -> None:
    """Coded inference over a data set on a pool; workers may straggle or die while it runs.

    Each batch is encoded, sent to the workers, and decoded once enough answered.
    One that cannot be recovered is sent again; what is lost in spite of that is
    told, and the exit code is 1. Ctrl-C writes what is done.
    """
    with told_plainly():
        check_folder("--output", output)
        check_shipped(model)
        check_positive("--groups", groups, "--points", points, "--batches", batches)
        check_positive("--workers", workers, "--deadline", deadline)
        if pool == "ray" and importlib.util.find_spec("ray") is None:
            raise ImportError("--pool ray needs Ray: pip install 'nercc-jax[ray]'")
        # JAX takes a second or two: not for --help, nor for a word that is misspelt.
        from rich.console import Console

        from ._results import Results, check_kind, write_results
        from ._run_job import (
            answers_to_wait_for,
            chosen_code,
            conclude,
            describe,
            describe_rule,
            enough_by_forecast,
            make_faults,
            make_job,
            open_pool,
            run_job,
            summary,
        )
        from ._workload import answering

        check_kind(output)
        faults = make_faults(straggler_rate, straggler_delay, death_rate, seed)
        chosen = chosen_code(code, num_data, num_workers)
        number = answers_to_wait_for(chosen, wait_for, max_disagreement)
        network = answering(model, outputs)
        job = make_job(network, chosen, split, data_dir, points, batches, groups)
        console = Console()
        enough: Any = number
        if max_disagreement is not None:
            with console.status(f"calibrating on {CALIBRATION:,} training images ..."):
                enough = enough_by_forecast(
                    network, chosen, data_dir, max_disagreement, seed, worker_dtype
                )
        count = chosen.num_workers if workers is None else workers
        with open_pool(
            console, pool, network, count, job, faults, deadline, worker_dtype
        ) as opened:
            told = f"{model}, {len(job.rows):,} data points of {split!r}, {describe(chosen)}; "
            until = describe_rule(number, max_disagreement)
            console.print(
                f"{told}{count} workers ({pool}); decoding {until}, or after {deadline:g} s",
                soft_wrap=True,
            )
            size, outputs_number = job.batches.shape[1], job.num_outputs(network)
            results = Results(job.rows, size, outputs_number, chosen.num_workers)
            seen, interrupted = run_job(console, opened, chosen, job, results, enough, deadline)
            report = opened.report()
        if len(results):
            write_results(output, results, job.labels)
            console.print(summary(network, chosen, job, results, seen, report))
            console.print(f"results: {output.resolve()}", soft_wrap=True)
        conclude(results, seen, job, interrupted)
