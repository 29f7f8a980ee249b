"""`nercc plan`: which code for a model and its workers, or none, measured on unlabelled data."""

import datetime
import math
from pathlib import Path
from typing import Annotated

import typer

from ._compiled import compile_quickly
from ._errors import of_option, told_plainly
from ._options import (
    LATENCIES,
    DataDir,
    Inputs,
    ModelName,
    OutputsOption,
    Weights,
    check_model,
    check_positive,
)

# Times the data points that the model runs on, about: on the coded ones of all codes, too.
_RUNS = 50


def plan_command(
    model: ModelName = "lenet5-digits",
    weights: Weights = None,
    inputs: Inputs = None,
    data_dir: DataDir = None,
    latency: Annotated[
        str,
        typer.Option(
            help=f"Seconds that a call takes: {LATENCIES} (one number a line). Of stragglers, this "
            "SHARE of calls takes FACTOR times as long, and all vary by 5 %."
        ),
    ] = "lognormal:0.05:0.6",
    budget: Annotated[
        float,
        typer.Option(help="Calls beyond one a query, at most, as a share: copies or coded ones."),
    ] = 1.5,
    workers: Annotated[
        int, typer.Option(help="Workers for the queries that come together, at most.")
    ] = 20,
    max_disagreement: Annotated[
        float, typer.Option(help="Labels that may differ from the model's own, as a share.")
    ] = 0.005,
    queries: Annotated[
        int, typer.Option(help="Queries that come together; the last one's time counts.")
    ] = 8,
    buffer: Annotated[
        int | None,
        typer.Option(help="Waiting queries that are ordered at a time; --queries unless given."),
    ] = None,
    overhead: Annotated[
        float,
        typer.Option(
            help="Seconds for encoding, sending and decoding, added to every system's time."
        ),
    ] = 0.02,
    layouts: Annotated[
        str, typer.Option(help="NeRCC's layouts, separated by commas, as in `nercc tune`.")
    ] = "chebyshev,interleaved,repeated",
    surrogate: Annotated[
        str | None,
        typer.Option(
            help="What codes may be ordered by, and stragglers' queries answered by: `student`, a "
            "file that `nercc distill` wrote, or module:function."
        ),
    ] = None,
    outputs: OutputsOption = "logits",
    images: Annotated[int, typer.Option(min=1, help="Data points to measure on, at most.")] = 2000,
    split: Annotated[
        str, typer.Option(help="Their split; on what a model was trained on, it promises too much.")
    ] = "train",
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    output: Annotated[
        Path,
        typer.Option("--output", "--output-dir", help="Folder to write plan.json and plan.png to."),
    ] = Path("nercc-plan"),
) -> None:
    """Plan how to serve a model: coded, replicated, hedged, or plainly.

    Measures all of them within a budget of workers, on data points without labels, and recommends
    the one whose last prediction is there soonest (p99) with few enough labels different from the
    model's own.
    """
    with told_plainly():
        check_model(model, weights, inputs)
        check_positive("--workers", workers, "--queries", queries, "--buffer", buffer)
        if not 0 <= max_disagreement <= 1:
            raise ValueError(f"--max-disagreement is a share from 0 to 1, not {max_disagreement}")
        for option, value in (("--budget", budget), ("--overhead", overhead)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{option} must be 0 or positive, not {value}")
        if outputs == "values":
            raise ValueError(
                "a plan keeps labels, and --outputs values have none: see `nercc run --tolerance`"
            )
        # JAX takes a second or two: not for --help, nor for a word that is misspelt.
        import jax
        from rich.console import Console

        from ..codes import regression_points
        from ..planning import plan
        from ._plan_report import latency_law, plan_plot, plan_table, plan_words
        from ._surrogates import find_surrogate
        from ._tables import print_whole
        from ._workload import find_workload

        with of_option(f"--layouts {layouts}"):
            for layout in layouts.split(","):
                regression_points(2, 4, layout)
        cheap = None
        if surrogate is not None:
            cheap = find_surrogate(surrogate, model, outputs)
        law = latency_law(latency)
        output.mkdir(parents=True, exist_ok=True)  # fails before the work, not after it
        workload = find_workload(
            model, weights=weights, inputs=inputs, data_dir=data_dir, outputs=outputs
        )
        x = workload.points(split, images, seed)
        compile_quickly(workload.model, x, _RUNS * len(x))
        console = Console()
        with console.status("planning ...") as status:
            found = plan(
                workload.model,
                x,
                law,
                key=jax.random.key(seed),
                num_queries=queries,
                max_workers=workers,
                max_extra_work=budget,
                max_disagreement=max_disagreement,
                layouts=tuple(layouts.split(",")),
                surrogate=cheap,
                buffer_size=buffer,
                overhead=overhead,
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
        told = plan_words(found, about["data"])
        console.print(told, soft_wrap=True, highlight=False, markup=False)
        plan_plot(found, f"{model}, {latency}, {queries} queries", picture)
        console.print(f"plan: {file.resolve()}\npicture: {picture.resolve()}", soft_wrap=True)
