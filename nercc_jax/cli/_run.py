"""`nercc run`: coded batch inference over a data set on a pool of workers."""

import functools
import importlib.util
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ._errors import told_plainly
from ._options import (
    CALIBRATION,
    DataDir,
    NumData,
    NumWorkers,
    OutputsOption,
    check_folder,
    check_positive,
    check_shipped,
)
from ._ray_job import RayJob, actor_options, end_at_once, leave_accelerators


def run_command(
    model: Annotated[
        str, typer.Option(help="A shipped model, or module:function, which takes --data.")
    ] = "lenet5-digits",
    data: Annotated[
        Path | None,
        typer.Option(help="Data points of module:function: .npy, (points, *shape of one)."),
    ] = None,
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
    address: Annotated[
        str | None,
        typer.Option(
            help="Of Ray's head: HOST:6379, ray://HOST:10001, auto or local; unless given "
            "RAY_ADDRESS, what runs on this machine, or a new one.",
            rich_help_panel="Ray",
        ),
    ] = None,
    working_dir: Annotated[
        Path | None,
        typer.Option(
            help="Sent to the nodes; unless given the folder of a module:function that is not "
            "installed.",
            rich_help_panel="Ray",
        ),
    ] = None,
    py_modules: Annotated[
        list[Path] | None, typer.Option(help="Sent to the nodes.", rich_help_panel="Ray")
    ] = None,
    runtime_env: Annotated[
        Path | None,
        typer.Option(
            help="A file with Ray's runtime environment: .yaml, .json, .toml.",
            rich_help_panel="Ray",
        ),
    ] = None,
    worker_cpus: Annotated[
        float | None,
        typer.Option(help="That a worker takes; half of one or less.", rich_help_panel="Ray"),
    ] = None,
    worker_gpus: Annotated[
        float | None,
        typer.Option(
            help="That a worker takes; one, or an equal part, where there are GPUs.",
            rich_help_panel="Ray",
        ),
    ] = None,
    worker_resources: Annotated[
        str | None, typer.Option(help="Further ones: '{TPU = 4}'.", rich_help_panel="Ray")
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
    output: Annotated[
        Path, typer.Option(help="Result file, .npz or .csv, or a folder for parts of it.")
    ] = Path("nercc-run.npz"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that ended before its time.")
    ] = False,
) -> None:
    """Coded inference over a data set on a pool; workers may straggle or die while it runs.

    Each batch is encoded, sent to the workers, and decoded once enough answered.
    One that cannot be recovered is sent again. Results are written as they come:
    --resume goes on after any end. Exit codes: 0 all is done, 1 nothing is, 2 an
    option does not fit, 3 a part is missing or lost, 130 Ctrl-C.
    """
    with told_plainly():
        check_folder("--output", output)
        check_model(model, data, max_disagreement)
        check_positive("--groups", groups, "--points", points, "--batches", batches)
        check_positive("--workers", workers, "--deadline", deadline)
        if pool == "ray" and importlib.util.find_spec("ray") is None:
            raise ImportError("--pool ray needs Ray: pip install 'nercc-jax[ray]'")
        job_of_ray = RayJob(address, working_dir, tuple(py_modules or ()), runtime_env)
        if pool == "ray":
            leave_accelerators()
        # JAX takes a second or two: not for --help, nor for a word that is misspelt.
        from rich.console import Console

        from ..pools import DevicePool, RayPool, leave_ray
        from ..serving._servable import load_callable
        from ._result_parts import Parts, check_parts, fingerprint, parts_folder
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
            show_pools,
            summary,
        )
        from ._workload import answering, own_points, points_of

        check_kind(output)
        check_parts(output, resume)
        faults = make_faults(straggler_rate, straggler_delay, death_rate, seed)
        chosen = chosen_code(code, num_data, num_workers)
        number = answers_to_wait_for(chosen, wait_for, max_disagreement)
        network: Any = load_callable(model, None) if data else answering(model, outputs)
        source = own_points(data) if data else points_of(network, split, data_dir)
        job = make_job(source, chosen, points, batches, groups)
        console = Console()
        enough: Any = number
        if max_disagreement is not None:
            with console.status(f"calibrating on {CALIBRATION:,} training images ..."):
                enough = enough_by_forecast(
                    network, chosen, data_dir, max_disagreement, seed, worker_dtype
                )
        count = chosen.num_workers if workers is None else workers
        size, num_outputs = job.batches.shape[1], job.num_outputs(network)
        results = Results(job.rows, size, num_outputs, chosen.num_workers)
        folder = parts_folder(output)
        parts = Parts(
            folder,
            {
                "model": model,
                "outputs": outputs,
                "data": fingerprint(data) or split,
                "rows": len(job.rows),
                "points": len(job.labels),
                "groups": groups,
                "code": fingerprint(code) or describe(chosen),
                "worker_dtype": worker_dtype,
            },
            results,
        )
        kind: Any = DevicePool
        if pool == "ray":
            show_pools(console)
            job_of_ray.connect([model])
            kind = functools.partial(
                RayPool,
                actor_options=actor_options(worker_cpus, worker_gpus, worker_resources),
                max_per_node=chosen.num_workers - chosen.num_data or None,
                min_workers=min(chosen.num_data, count),
            )
        with open_pool(
            console, kind, pool, network, count, job, faults, deadline, worker_dtype
        ) as opened:
            told = (
                f"{model}, {len(job.rows):,} data points of {source.name!r}, {describe(chosen)}; "
            )
            until = describe_rule(number, max_disagreement)
            console.print(
                f"{told}{count} workers ({pool}); decoding {until}, or after {deadline:g} s",
                soft_wrap=True,
            )
            if len(results):
                console.print(f"{len(results):,} data points are done already")
            seen = run_job(console, opened, chosen, job, results, parts, enough, deadline)
            report = opened.report()
        if len(results):
            if output != folder:
                write_results(output, results, job.labels)
            console.print(summary(network, chosen, job, results, seen, report))
            console.print(f"results: {output.resolve()}", soft_wrap=True)
        try:
            conclude(results, seen, job, folder)
        except typer.Exit as end:
            end_at_once(end.exit_code)
            raise
        if output != folder:
            parts.remove()
        if pool == "ray":
            leave_ray()


def check_model(model: str, data: Path | None, max_disagreement: float | None) -> None:
    """Raises: ValueError for a model or data that do not go together, before JAX is imported."""
    if ":" not in model:
        check_shipped(model)
        if data is not None:
            raise ValueError("--data is for a model of your own: --model module:function")
    elif data is None:
        raise ValueError(f"--model {model}: say with --data, a .npy file, what it is to run on")
    elif max_disagreement is not None:
        raise ValueError("--max-disagreement is estimated on a shipped model's training images")
