"""`nercc run`: coded batch inference over a data set on a pool of workers."""

import importlib.util
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ._errors import told_plainly
from ._options import (
    CALIBRATION,
    DataDir,
    Inputs,
    ModelName,
    NumWorkers,
    OutputsOption,
    Weights,
    check_folder,
    check_model,
    check_positive,
)
from ._own_models import is_shipped
from ._ray_job import RayJob, actor_options, end_at_once, leave_accelerators


def run_command(
    model: ModelName = "lenet5-digits",
    weights: Weights = None,
    inputs: Inputs = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Of any function, a simulator's, say: how far a row may be off, in units of the "
            "outputs (root mean square over them). Whose error bar is larger is computed; 0: all.",
            rich_help_panel="Row by row",
        ),
    ] = None,
    coverage: Annotated[
        float,
        typer.Option(
            help="The share of errors that error bars cover.", rich_help_panel="Row by row"
        ),
    ] = 0.9,
    data_dir: DataDir = None,
    split: Annotated[str, typer.Option(help="The data set's split to go over.")] = "test",
    num_data: Annotated[
        int | None,
        typer.Option(help="K: data points coded together: 8; row by row nine tenths of N."),
    ] = None,
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
            f"model's own, by {CALIBRATION:,} training images; of a model of your own row by row, "
            "by what is computed."
        ),
    ] = None,
    deadline: Annotated[
        float, typer.Option(help="Seconds after which a batch is decoded from what is in.")
    ] = 30.0,
    groups: Annotated[
        int | None,
        typer.Option(
            help="Groups of K data points in a batch: 1; row by row as many as take a quarter "
            "of a second."
        ),
    ] = None,
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
        Path,
        typer.Option(
            help="Result file, .npz, .csv or row by row .parquet, or a folder for parts of it; the "
            "summary's numbers lie beside it, NAME.summary.json, or in the folder."
        ),
    ] = Path("nercc-run.npz"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that ended before its time.")
    ] = False,
) -> None:
    """Coded inference over a data set on a pool; workers may straggle or die while it runs.

    Each batch is encoded, sent to the workers, and decoded once enough answered; or, with a
    tolerance, each row is computed or known well enough.
    One that cannot be recovered is sent again. Results are written as they come:
    --resume goes on after any end. Exit codes: 0 all is done, 1 nothing is, 2 an
    option does not fit, 3 a part is missing or lost, 130 Ctrl-C.
    """
    with told_plainly():
        check_folder("--output", output)
        check_model(model, weights, inputs)
        own = inputs is not None or not is_shipped(model)
        by_row = tolerance is not None or (own and max_disagreement is not None)
        check_positive("--groups", groups, "--points", points, "--batches", batches)
        check_positive("--workers", workers, "--deadline", deadline)
        if pool == "ray" and importlib.util.find_spec("ray") is None:
            raise ImportError("--pool ray needs Ray: pip install 'nercc-jax[ray]'")
        job_of_ray = RayJob(address, working_dir, tuple(py_modules or ()), runtime_env)
        if pool == "ray":
            leave_accelerators()
        # JAX takes a second or two: not for --help, nor for a word that is misspelt.
        from ..pools import leave_ray
        from ._run_pool import ChosenPool, make_faults

        chosen = ChosenPool(
            pool,
            workers,
            job_of_ray,
            actor_options(worker_cpus, worker_gpus, worker_resources) if pool == "ray" else {},
            make_faults(straggler_rate, straggler_delay, death_rate, seed),
            deadline,
            worker_dtype,
        )
        try:
            if by_row:
                from ._run_rows import RowOptions, run_function

                beside = "--tolerance" if max_disagreement is None else "--max-disagreement"
                refuse(beside, code=code, batches=batches, worker_dtype=worker_dtype)
                run_function(
                    RowOptions(
                        model=model,
                        weights=weights,
                        inputs=inputs,
                        data_dir=data_dir,
                        split=split,
                        outputs=outputs,
                        tolerance=tolerance,
                        max_disagreement=max_disagreement,
                        coverage=coverage,
                        num_data=num_data,
                        num_workers=num_workers,
                        wait_for=wait_for,
                        groups=groups,
                        points=points,
                        seed=seed,
                    ),
                    chosen,
                    output,
                    resume,
                )
            else:
                from ._run_data import DataOptions, run_data

                run_data(
                    DataOptions(
                        model=model,
                        weights=weights,
                        inputs=inputs,
                        data_dir=data_dir,
                        split=split,
                        outputs=outputs,
                        code=code,
                        num_data=8 if num_data is None else num_data,
                        num_workers=num_workers,
                        wait_for=wait_for,
                        max_disagreement=max_disagreement,
                        groups=1 if groups is None else groups,
                        points=points,
                        batches=batches,
                        seed=seed,
                    ),
                    chosen,
                    output,
                    resume,
                )
        except typer.Exit as end:
            end_at_once(end.exit_code)
            raise
        if pool == "ray":
            leave_ray()


def refuse(beside: str, **options: Any) -> None:
    """Raises: ValueError for an option that was given and is not for what it stands beside."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"--{name.replace('_', '-')} does not go with {beside}")
