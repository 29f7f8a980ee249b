"""`nercc tune`: the parameters of a code, by gradient descent on unlabelled data."""

import datetime
from pathlib import Path
from typing import Annotated, Literal

from ._errors import of_option, report_errors
from ._options import (
    CODE,
    MODEL,
    RESULTS,
    DataDir,
    Inputs,
    MaxStragglers,
    ModelName,
    Numbers,
    NumData,
    NumWorkers,
    OutputsOption,
    Seed,
    Sets,
    Weights,
    check_files,
    check_folder,
    option,
)
from ._process import compile_quickly, start_parallel

_DESCENT = "Descent"


def tune_command(
    model: ModelName = "lenet5-digits",
    weights: Weights = None,
    inputs: Inputs = None,
    data_dir: DataDir = None,
    num_data: NumData = 8,
    num_workers: NumWorkers = 20,
    max_stragglers: MaxStragglers = None,
    layout: Annotated[
        str,
        option(
            "Regression points to start from. chebyshev; interleaved, repeated or mixed:0.5 "
            "(that share of the further workers are repeats): predictions are exact if the data "
            "point's own worker answers; systematic:0.5: that share of data points have an own "
            "worker; search: the layout that keeps most labels.",
            CODE,
        ),
    ] = "chebyshev",
    points: Annotated[
        bool,
        option(
            "Tune the regression points, too, or the lambdas only.",
            _DESCENT,
            "--points/--lambdas-only",
        ),
    ] = True,
    learn_decoder: Annotated[
        bool,
        option(
            "In the end, learn the decoder from the model's answers to coded data points, in "
            "place of the spline's: less error, for 8 (N + K) N further calls of the model.",
            _DESCENT,
            "--learn-decoder/--spline",
        ),
    ] = False,
    criterion: Annotated[
        Literal["mse", "cross_entropy"] | None,
        option(
            "Error to reduce: of the values, or of the labels' distribution, for logits only "
            "(default: mse; cross_entropy for a search on logits).",
            _DESCENT,
        ),
    ] = None,
    outputs: OutputsOption = "logits",
    steps: Annotated[int, option("Gradient steps, at most.", _DESCENT, min=1)] = 150,
    sets: Sets = 20,
    max_inputs: Annotated[
        int, option("Data points to tune on, at most, and as many to compare on.", MODEL, min=1)
    ] = 1000,
    seed: Seed = 0,
    output: Annotated[Path, option("File for the tuned code.", RESULTS)] = Path("nercc-tuned.json"),
    numbers: Numbers = None,
    plot: Annotated[Path, option("File for the picture.", RESULTS)] = Path("nercc-tune.png"),
) -> None:
    """Tune a code for a model by gradient descent through encoder, model and decoder.

    No labels are needed. The errors before and after are printed, on other data points, and the
    tuned code is written, for `nercc demo --code`, `nercc run --code` and `nercc serve --code`.
    """
    with report_errors():
        check_folder("--output", output)
        check_folder("--plot", plot)
        check_folder("--numbers", numbers)
        if criterion == "cross_entropy" and outputs != "logits":
            raise ValueError("--criterion cross_entropy needs --outputs logits")
        if layout == "search" and outputs == "values":
            raise ValueError("--layout search goes by labels, and --outputs values have none")
        check_files(model, weights, inputs)
        # JAX takes a second or two to import: not for --help, nor for a misspelt option.
        import jax
        from rich.console import Console

        from ..codes import AbstractCode, save_code
        from ..evaluation import Evaluations
        from ..evaluation._objective import Trial
        from ..tuning import Descent, LayoutTuning
        from ._output import write_json
        from ._tune_job import (
            Comparison,
            compare,
            draw,
            learned_decoder,
            search_with_status,
            start_code,
            tune_with_bar,
            tuned_words,
        )
        from ._workload import find_workload, require_groups, straggler_laws

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
        workload = find_workload(model, weights, inputs, data_dir, outputs)
        network = workload.model
        kept, option = (workload.source, num_data), f"--max-inputs {max_inputs}"
        x = require_groups(workload.points("train", max_inputs, seed), *kept, 2, option)
        held = require_groups(workload.points("test", max_inputs, seed), *kept, 1, option)
        quick = compile_quickly(network, x, (6 * steps + max_inputs) * num_workers)
        console = Console()
        comparison = Comparison(network, start, held, laws, sets, seed)

        def prepare() -> tuple[Trial | None, Evaluations]:
            trial = None if searching else comparison.trial()
            return trial, comparison.rows(comparison.others()) if quick else Evaluations()

        # Compiling keeps one core busy, so the little that there is to compute runs next to it.
        prepared = start_parallel(prepare) if quick else prepare
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
        codes: dict[str, AbstractCode] = {"tuned": code}
        if learn_decoder:
            with console.status("learning the decoder ..."):
                codes["learned"] = learned_decoder(network, code, x, key)
            found["decoder"] = "learned from the model's answers"
        save_code(output, codes["learned" if learn_decoder else "tuned"], about | found)
        with console.status("the objective's landscape, for the picture ..."):
            trial, others = prepared()
            if tuned is not None and trial is not None:
                draw(comparison, trial, tuned, model, plot)
        rows = compare(console, comparison, others, codes, outputs)
        write_json(console, numbers, about, rows.records())
        for name, value in found.items():
            console.print(f"{name}: {value}", soft_wrap=True)
        console.print(f"tuned code: {output.resolve()}\npicture: {plot.resolve()}", soft_wrap=True)
