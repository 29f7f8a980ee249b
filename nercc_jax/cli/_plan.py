"""`nercc plan`: the code for a model and its workers, or none, measured on unlabelled data."""

import datetime
import math
from pathlib import Path
from typing import Annotated

from ._errors import of_option, report_errors
from ._options import (
    LATENCIES,
    MODEL,
    RESULTS,
    DataDir,
    Inputs,
    ModelName,
    OutputsOption,
    Seed,
    Weights,
    check_files,
    check_positive_options,
    option,
)
from ._process import compile_quickly

_LOAD = "Load and requirements"
_SYSTEMS = "Systems to compare"

# The model runs on about so many times the data points: on the coded ones of all codes, too.
_RUNS = 50


def plan_command(
    model: ModelName = "lenet5-digits",
    weights: Weights = None,
    inputs: Inputs = None,
    data_dir: DataDir = None,
    latency: Annotated[
        str,
        option(
            f"Law of the seconds that a call takes: {LATENCIES} (one number a line). "
            "stragglers: the SHARE of calls takes FACTOR times as long, and all vary by 5 %.",
            _LOAD,
        ),
    ] = "lognormal:0.05:0.6",
    budget: Annotated[
        float,
        option(
            "Calls beyond one for each query, at most, as a share of the queries: copies or "
            "coded ones.",
            _LOAD,
        ),
    ] = 1.5,
    max_workers: Annotated[
        int, option("Workers for queries that arrive together, at most.", _LOAD)
    ] = 20,
    max_disagreement: Annotated[
        float, option("Share of labels that may differ from the model's own.", _LOAD)
    ] = 0.005,
    queries: Annotated[
        int, option("Queries that arrive together; the time of the last answer counts.", _LOAD)
    ] = 8,
    buffer: Annotated[
        int | None,
        option(
            "Waiting queries that are ordered by similarity at a time (default: --queries).",
            _SYSTEMS,
        ),
    ] = None,
    overhead_s: Annotated[
        float,
        option("Seconds for encoding, sending and decoding, added to every system's time.", _LOAD),
    ] = 0.02,
    layouts: Annotated[
        str,
        option(
            "NeRCC's layouts of regression points, separated by commas, as in `nercc tune`.",
            _SYSTEMS,
        ),
    ] = "chebyshev,interleaved,repeated",
    surrogate: Annotated[
        str | None,
        option(
            "Cheap model that queries may be ordered by, and stragglers' queries answered by: "
            "`student`, a file that `nercc distill` wrote, or module:function (default: none).",
            _SYSTEMS,
        ),
    ] = None,
    outputs: OutputsOption = "logits",
    max_inputs: Annotated[int, option("Data points to measure on, at most.", MODEL, min=1)] = 2000,
    split: Annotated[
        str,
        option(
            "Split of the data set. On data that the model was trained on, the plan promises "
            "too much.",
            MODEL,
        ),
    ] = "train",
    seed: Seed = 0,
    output: Annotated[
        Path, option("Folder for plan.json and plan.png.", RESULTS, "--output", "--output-dir")
    ] = Path("nercc-plan"),
) -> None:
    """Plan how to serve a model: coded, replicated, hedged, or as it is.

    All of them are measured within a budget of workers, on data points without labels. The plan
    recommends the one whose last prediction is there soonest (p99), with few enough labels that
    differ from the model's own.
    """
    with report_errors():
        check_files(model, weights, inputs)
        check_positive_options(
            "--max-workers", max_workers, "--queries", queries, "--buffer", buffer
        )
        if not 0 <= max_disagreement <= 1:
            raise ValueError(f"--max-disagreement is a share from 0 to 1, not {max_disagreement}")
        for option, value in (("--budget", budget), ("--overhead-s", overhead_s)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{option} must be 0 or positive, not {value}")
        if outputs == "values":
            raise ValueError(
                "a plan keeps labels, and --outputs values have none: see `nercc run --tolerance`"
            )
        # JAX takes a second or two to import: not for --help, nor for a misspelt option.
        import jax
        from rich.console import Console

        from ..codes import regression_points
        from ..planning import plan
        from ._output import print_whole
        from ._own_models import find_surrogate
        from ._plan_report import latency_law, plan_plot, plan_table, plan_words
        from ._workload import find_workload

        with of_option(f"--layouts {layouts}"):
            for layout in layouts.split(","):
                regression_points(2, 4, layout)
        cheap = None
        if surrogate is not None:
            cheap = find_surrogate(surrogate, model, outputs)
        law = latency_law(latency)
        output.mkdir(parents=True, exist_ok=True)  # fails before the work, not after it
        workload = find_workload(model, weights, inputs, data_dir, outputs)
        x = workload.points(split, max_inputs, seed)
        compile_quickly(workload.model, x, _RUNS * len(x))
        console = Console()
        with console.status("planning ...") as status:
            found = plan(
                workload.model,
                x,
                law,
                key=jax.random.key(seed),
                num_queries=queries,
                max_workers=max_workers,
                max_extra_work=budget,
                max_disagreement=max_disagreement,
                layouts=tuple(layouts.split(",")),
                surrogate=cheap,
                buffer_size=buffer,
                overhead=overhead_s,
                on_stage=lambda stage: status.update(f"{stage} ..."),
            )
        file, picture = output / "plan.json", output / "plan.png"
        about = {
            "model": model,
            "outputs": outputs,
            "data": f"{workload.source}, {split}",
            "latency": latency,
            "surrogate": surrogate,
            "seed": seed,
            "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        found.save(file, about)
        print_whole(console, plan_table(found))
        console.print(
            plan_words(found, about["data"]), soft_wrap=True, highlight=False, markup=False
        )
        plan_plot(found, f"{model}, {latency}, {queries} queries", picture)
        console.print(f"plan: {file.resolve()}\npicture: {picture.resolve()}", soft_wrap=True)
