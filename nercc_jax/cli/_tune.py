"""`nercc tune`: the numbers of a code, by gradient descent on unlabelled data."""

import datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

from ._background import beside
from ._compiled import compile_quickly
from ._errors import of_option, told_plainly
from ._options import (
    DataDir,
    Inputs,
    ModelName,
    NumData,
    NumWorkers,
    OutputsOption,
    Weights,
    check_folder,
    check_model,
)


def tune_command(
    model: ModelName = "lenet5-digits",
    weights: Weights = None,
    inputs: Inputs = None,
    data_dir: DataDir = None,
    num_data: NumData = 8,
    num_workers: NumWorkers = 20,
    max_stragglers: Annotated[
        int | None,
        typer.Option(help="One code for all numbers of stragglers from 0 to this; N - K if unset."),
    ] = None,
    layout: Annotated[
        str,
        typer.Option(
            help="Where the points start: chebyshev; interleaved, repeated or mixed:0.5 (that "
            "share of the further workers are repeats), which make data points exact if a worker "
            "of their own answers; systematic:0.5 (that share of data points have such a worker). "
            "Or search: whichever keeps most labels."
        ),
    ] = "chebyshev",
    points: Annotated[
        bool,
        typer.Option("--points/--lambdas-only", help="Tune the regression points too, or not."),
    ] = True,
    criterion: Annotated[
        Literal["mse", "cross_entropy"] | None,
        typer.Option(
            help="Error of the values, or of the labels' distribution (logits only). Unless given, "
            "the values'; for a search on logits the labels'."
        ),
    ] = None,
    outputs: OutputsOption = "logits",
    steps: Annotated[int, typer.Option(min=1, help="Gradient steps, at most.")] = 150,
    sets: Annotated[
        int, typer.Option(min=1, help="Straggler sets for each number of them, to compare on.")
    ] = 20,
    images: Annotated[
        int, typer.Option(min=1, help="Data points to tune on, and to compare on.")
    ] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    output: Annotated[Path, typer.Option(help="Where to write the tuned code.")] = Path(
        "nercc-tuned.json"
    ),
    numbers: Annotated[
        Path | None, typer.Option(help="Where to write the table's numbers, as JSON.")
    ] = None,
    plot: Annotated[Path, typer.Option(help="Where to write the picture.")] = Path(
        "nercc-tune.png"
    ),
) -> None:
    """Tune a code for a model by gradient descent through encoder, model and decoder.

    Uses data points without their labels. Prints the errors before and after on others, and
    writes the tuned code for `nercc demo --code`.
    """
    with told_plainly():
        check_folder("--output", output)
        check_folder("--plot", plot)
        check_folder("--numbers", numbers)
        if criterion == "cross_entropy" and outputs != "logits":
            raise ValueError("--criterion cross_entropy needs --outputs logits")
        if layout == "search" and outputs == "values":
            raise ValueError("--layout search goes by labels, and --outputs values have none")
        check_model(model, weights, inputs)
        # JAX takes a second or two: not for --help, nor for a word that is misspelt.
        import jax
        from rich.console import Console

        from ..codes import save_code
        from ..evaluation import Evaluations, Trial
        from ..tuning import Descent, LayoutTuning
        from ._tables import write_json
        from ._tune_job import (
            Comparison,
            compare,
            draw,
            search_with_status,
            start_code,
            tune_with_bar,
            tuned_words,
        )
        from ._workload import enough, find_workload, straggler_laws

        laws = straggler_laws(num_data, num_workers, max_stragglers)
        searching = layout == "search"
        with of_option(f"--layout {layout}"):
            start = start_code(num_data, num_workers, "chebyshev" if searching else layout)
        if start.exact:
            laws.pop("0")  # without stragglers there is nothing to tune
        if not laws:
            raise ValueError(
                f"--num-workers {num_workers}: without stragglers, and with a worker for each data "
                "point, there is nothing to tune; say --max-stragglers"
            )
        workload = find_workload(
            model, weights=weights, inputs=inputs, data_dir=data_dir, outputs=outputs
        )
        network = workload.model
        kept = workload.source, num_data
        x = enough(workload.points("train", images, seed), *kept, 2, f"--images {images}")
        held = enough(workload.points("test", images, seed), *kept, 1, f"--images {images}")
        quick = compile_quickly(network, x, (6 * steps + images) * num_workers)
        console = Console()
        comparison = Comparison(network, start, held, laws, sets, seed)

        def prepare() -> tuple[Trial | None, Evaluations]:
            trial = None if searching else comparison.trial()
            return trial, comparison.rows(comparison.others()) if quick else Evaluations()

        # Compiling keeps one core busy: what little there is to compute goes beside the tuning.
        prepared = beside(prepare) if quick else prepare
        tuned = None
        labels = searching and outputs == "logits"
        chosen = criterion or ("cross_entropy" if labels else "mse")
        key, descent = jax.random.key(seed), Descent(steps)
        about = {
            "model": model,
            "outputs": outputs,
            "data": workload.source,
            "data_points": len(x),
            "layout": layout,
            "stragglers": f"{', '.join(laws)} of {num_workers} workers, each number alike",
            "criterion": chosen,
            "seed": seed,
            "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": "nercc tune",
        }
        if searching:
            tuning = LayoutTuning(criterion=chosen, points=points, descent=descent)
            code, found = search_with_status(
                console, network, x, num_data, num_workers, laws, plot, key=key, tuning=tuning
            )
        else:
            tuned = tune_with_bar(
                console, network, start, x, laws, descent,
                key=key, points=points, criterion=chosen,
            )  # fmt: skip
            code, found = tuned.code, tuned_words(tuned)
        save_code(output, code, about | found)
        with console.status("the objective's landscape, for the picture ..."):
            trial, others = prepared()
            if tuned is not None and trial is not None:
                draw(comparison, trial, tuned, model, plot)
        rows = compare(console, comparison, others, code, outputs)
        write_json(console, numbers, about, rows.records())
        for name, value in found.items():
            console.print(f"{name}: {value}", soft_wrap=True)
        console.print(f"tuned code: {output.resolve()}\npicture: {plot.resolve()}", soft_wrap=True)
