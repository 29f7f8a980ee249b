"""`nercc run`: coded batch inference over a data set, or a function row by row, on a pool."""

import importlib.util
import types
from pathlib import Path
from typing import Annotated, Literal

import typer

from ._errors import report_errors
from ._options import (
    CALIBRATION,
    CODE,
    DECODING,
    FAULTS,
    MODEL,
    RAY,
    RESULTS,
    ROWS,
    WORKERS,
    DataDir,
    Inputs,
    ModelName,
    NumWorkers,
    OutputsOption,
    Seed,
    Weights,
    check_files,
    check_folder,
    check_positive_options,
    option,
    refuse,
)
from ._own_models import is_shipped
from ._ray_job import RayJob, actor_options, end_at_once, leave_accelerators


def run_command(
    model: ModelName = "lenet5-digits",
    weights: Weights = None,
    inputs: Inputs = None,
    columns: Annotated[
        str | None,
        option(
            "Columns of --inputs (.csv, .parquet) that are inputs, by name, separated by commas "
            "(default: all but --id-column).",
            MODEL,
        ),
    ] = None,
    id_column: Annotated[
        str | None,
        option(
            "Column of --inputs that holds an id of each row, a text or a whole number, which "
            "results carry as `id` (default: none).",
            MODEL,
        ),
    ] = None,
    data_dir: DataDir = None,
    split: Annotated[str, option("Split of the data set.", MODEL)] = "test",
    max_inputs: Annotated[
        int | None, option("Data points to use, at most (default: the whole split).", MODEL)
    ] = None,
    batches: Annotated[
        int | None,
        option(
            "Batches to run, going over the data again and again (default: once over it).", MODEL
        ),
    ] = None,
    outputs: OutputsOption = "logits",
    num_data: Annotated[
        int | None,
        option(
            "K: data points that are coded together (default: 8).",
            CODE,
        ),
    ] = None,
    num_workers: NumWorkers = 20,
    code: Annotated[
        Path | None,
        option(
            "File of a code that `nercc tune` wrote, with its own K and N (default: NeRCC).", CODE
        ),
    ] = None,
    groups: Annotated[
        int | None,
        option(
            "Groups of K data points in a batch (default: 1); row by row, rows in one call "
            "(default: as many as take 0.05 to 0.25 s). At most as many as there are.",
            CODE,
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        option(
            "Run any function, such as a simulator, row by row: the largest error bar of a "
            "row that is not computed, in units of the outputs (root mean square over a row's "
            "outputs). 0 computes all rows.",
            ROWS,
        ),
    ] = None,
    coverage: Annotated[float, option("Share of errors that error bars cover.", ROWS)] = 0.9,
    compute: Annotated[
        Literal["needed", "all"],
        option(
            "Rows to compute: those that are not known well enough, or all that arrive in time.",
            ROWS,
        ),
    ] = "needed",
    job_deadline_s: Annotated[
        float | None,
        option(
            "Seconds after which a run row by row ends with what is known (default: none).", ROWS
        ),
    ] = None,
    grace_s: Annotated[
        float,
        option("Seconds to wait, after a run row by row, for late answers that judge bars.", ROWS),
    ] = 0.0,
    max_calls: Annotated[
        int | None, option("Rows to compute, at most (default: no limit).", ROWS)
    ] = None,
    check_answers: Annotated[
        float | None,
        option(
            "Check computed rows by the learner: the share of right answers that may look wrong; "
            "such rows are computed again by other workers (default: no checks).",
            ROWS,
        ),
    ] = None,
    max_fenced: Annotated[
        float, option("Share of workers that is fenced for wrong answers, at most.", ROWS)
    ] = 0.25,
    wait_for: Annotated[
        int | None,
        option(
            "Number of answers at which to decode (default: 85 % of N, but at least K).", DECODING
        ),
    ] = None,
    max_disagreement: Annotated[
        float | None,
        option(
            "Instead of a number: decode once at most this share of labels is expected to "
            f"differ from the model's own, by {CALIBRATION:,} training images; for your own model, "
            "row by row, by the rows that are computed.",
            DECODING,
        ),
    ] = None,
    deadline_s: Annotated[
        float,
        option("Seconds after which a batch is decoded from the answers that are in.", DECODING),
    ] = 30.0,
    pool: Annotated[
        Literal["devices", "ray"],
        option("Workers: threads on this process's devices, or Ray actors.", WORKERS),
    ] = "devices",
    workers: Annotated[
        int | None,
        option(
            "Workers in the pool: more than N are spare ones, fewer run several coded data "
            "points each (default: N).",
            WORKERS,
        ),
    ] = None,
    worker_dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        option(
            "Floating-point type that inputs and weights are cast to at workers (default: no "
            "cast).",
            WORKERS,
        ),
    ] = None,
    address: Annotated[
        str | None,
        option(
            "Ray's head: HOST:6379, ray://HOST:10001, auto or local (default: RAY_ADDRESS, or "
            "the Ray on this machine, or a new one).",
            RAY,
        ),
    ] = None,
    worker_cpus: Annotated[
        float | None, option("CPUs per Ray actor (default: at most 0.5).", RAY)
    ] = None,
    worker_gpus: Annotated[
        float | None,
        option("GPUs per Ray actor (default: one, or an equal part, where there are GPUs).", RAY),
    ] = None,
    worker_resources: Annotated[
        str | None, option("Further resources per Ray actor: '{TPU = 4}' (default: none).", RAY)
    ] = None,
    working_dir: Annotated[
        Path | None,
        option(
            "Folder to send to the nodes (default: that of a module:name which is not installed).",
            RAY,
        ),
    ] = None,
    py_modules: Annotated[
        list[Path] | None, option("Python module to send to the nodes; may be repeated.", RAY)
    ] = None,
    runtime_env: Annotated[
        Path | None, option("File with Ray's runtime environment: .yaml, .json or .toml.", RAY)
    ] = None,
    straggler_rate: Annotated[float, option("Share of calls that are delayed.", FAULTS)] = 0.0,
    straggler_delay_s: Annotated[
        float, option("Seconds that such a call is delayed by.", FAULTS)
    ] = 1.0,
    straggler_score: Annotated[
        str | None,
        option(
            "Score of a row, by which calls are delayed instead of at random, the largest first: "
            "`norm`, or module:function.",
            FAULTS,
        ),
    ] = None,
    straggler_leaning: Annotated[
        float,
        option("With a score, the share of delayed calls that have the largest scores.", FAULTS),
    ] = 1.0,
    death_rate: Annotated[float, option("Share of calls in which the worker dies.", FAULTS)] = 0.0,
    wrong_workers: Annotated[
        str | None,
        option(
            "Workers that answer wrongly, as a table of swap, repeat, bias, flip_answer, stale, "
            "flip_weight, flip_activation: '{stale = [0], swap = [1]}' (default: none).",
            FAULTS,
        ),
    ] = None,
    wrong_rate: Annotated[
        float, option("Share of these workers' calls that are answered wrongly.", FAULTS)
    ] = 1.0,
    seed: Seed = 0,
    output: Annotated[
        Path,
        option(
            "Result file, .npz, .csv or row by row .parquet; or a folder, for parts of it. "
            "The summary's numbers go next to it, to NAME.summary.json, or into the folder.",
            RESULTS,
        ),
    ] = Path("nercc-run.npz"),
    resume: Annotated[
        bool, option("Go on with a run that ended early.", RESULTS, "--resume")
    ] = False,
) -> None:
    """Run a model over a data set on a pool whose workers may straggle or die.

    Each batch is encoded, sent to the workers, and decoded once enough of them answered; a batch
    that cannot be recovered is sent again. With --tolerance, each row is computed, or predicted
    well enough. Results are written as they come, and --resume goes on after any end. Exit codes: 0
    everything is done, 1 nothing is, 2 an option does not fit, 3 a part is missing or lost, 130
    Ctrl-C.
    """
    options = types.SimpleNamespace(**locals())  # by their names
    with report_errors():
        check_folder("--output", output)
        check_files(model, weights, inputs)
        if inputs is None or inputs.suffix not in (".csv", ".parquet"):
            refuse("inputs other than a .csv or .parquet", columns=columns, id_column=id_column)
        if outputs == "values" and max_disagreement is not None:
            raise ValueError(
                "--max-disagreement is about labels, and --outputs values have none: give "
                "--tolerance"
            )
        own = inputs is not None or not is_shipped(model)
        by_row = tolerance is not None or (own and max_disagreement is not None)
        check_positive_options("--groups", groups, "--max-inputs", max_inputs, "--batches", batches)
        check_positive_options("--workers", workers, "--deadline-s", deadline_s)
        if pool == "ray" and importlib.util.find_spec("ray") is None:
            raise ImportError("--pool ray needs Ray: pip install '.[ray]' in a clone")
        job_of_ray = RayJob(address, working_dir, tuple(py_modules or ()), runtime_env)
        if pool == "ray":
            leave_accelerators()
        # JAX takes a second or two to import: not for --help, nor for a misspelt option.
        from ..pools import leave_ray
        from ._run_pool import ChosenPool, make_faults

        chosen = ChosenPool(
            pool,
            workers,
            job_of_ray,
            actor_options(worker_cpus, worker_gpus, worker_resources) if pool == "ray" else {},
            make_faults(options),
            deadline_s,
            worker_dtype,
        )
        try:
            if by_row:
                from ._run_rows import run_function as run

                other = "--tolerance" if max_disagreement is None else "--max-disagreement"
                refuse(other, code=code, batches=batches, worker_dtype=worker_dtype)
                refuse(other, num_data=num_data, wait_for=wait_for)
            else:
                rows_only = {"job_deadline_s": job_deadline_s, "max_calls": max_calls}
                rows_only["check_answers"] = check_answers
                refuse("a coded run", **rows_only, grace_s=grace_s or None)
                from ._run_data import run_data as run

            run(options, chosen, output, resume)
        except typer.Exit as end:
            end_at_once(end.exit_code)
            raise
        if pool == "ray":
            leave_ray()
