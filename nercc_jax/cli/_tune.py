"""`nercc tune`: the parameters of a code, by gradient descent on unlabelled data."""

import datetime
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from ..codes import AbstractCode, Berrut, BerrutSpline, NeRCC, Replication, save_code
from ..codes._points import coincident
from ..evaluation import pictures
from ..evaluation._objective import landscape, make_trial
from ..tuning import Descent, LayoutTuning, learn_decoder, search_layout, tune
from ..tuning._layouts import LayoutSearch
from ..tuning._tune import TuningStep
from ._command import of_option
from ._comparison import compare, straggler_laws
from ._options import Options
from ._output import print_table, progress_bar, write_json
from ._process import compile_quickly
from ._workload import find_workload

# The picture's grid of both lambdas.
_GRID = np.logspace(-12, 0, 13)


def tune_code(options: Options) -> None:
    """Tune a code, write it, and compare it with others on other data points."""
    num_data, num_workers, seed = options.num_data, options.num_workers, options.seed
    searching, outputs = options.layout == "search", options.outputs
    if options.criterion == "cross_entropy" and outputs != "logits":
        raise ValueError("--criterion cross_entropy needs --outputs logits")
    if searching and outputs == "values":
        raise ValueError("--layout search goes by labels, and --outputs values have none")
    laws = straggler_laws(num_data, num_workers, options.max_stragglers)
    with of_option(f"--layout {options.layout}"):
        start = start_code(num_data, num_workers, "chebyshev" if searching else options.layout)
    if start.exact:
        laws.pop("0")  # without stragglers there is nothing to tune
    if not laws:
        raise ValueError(
            f"--num-workers {num_workers}: without stragglers, and with a worker for each data "
            "point, there is nothing to tune; say --max-stragglers"
        )
    workload = find_workload(options)
    network = workload.model
    x = workload.groups("train", options, num_data, least=2)
    held = workload.groups("test", options, num_data)
    rounds = 6 * options.steps + (options.max_inputs or 1000)
    compile_quickly(network, x, rounds * num_workers)
    console, key = Console(), jax.random.key(seed)
    size = num_data, num_workers
    others: dict[str, AbstractCode] = {
        "untuned": start,
        "BACC": Berrut(*size),
        "ApproxIFER": Berrut(*size, points="approxifer"),
        "BSCC": BerrutSpline(*size),
    }
    if num_workers >= num_data:
        others["replication"] = Replication(*size)

    labels = searching and outputs == "logits"
    criterion = options.criterion or ("cross_entropy" if labels else "mse")
    about = {
        "model": options.model,
        "outputs": outputs,
        "data": workload.source,
        "data_points": len(x),
        "layout": options.layout,
        "stragglers": f"{', '.join(laws)} of {num_workers} workers, each number alike",
        "criterion": criterion,
        "seed": seed,
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "nercc tune",
    }
    descent: dict[str, Any] = {"criterion": criterion, "points": options.points}
    descent["descent"] = Descent(options.steps)
    tuned = None
    if searching:
        with console.status("searching ...") as status:
            search = search_layout(
                network,
                x,
                *size,
                laws,
                key=key,
                tuning=LayoutTuning(**descent),
                on_stage=lambda stage: status.update(f"{stage} ..."),
            )
        _print_layouts(console, search)
        title = f"{num_data} data points, {num_workers} workers"
        pictures.layouts_figure(search.best_of_layouts, title).savefig(options.plot, dpi=130)
        best = search.candidates[0]
        code, found = best.code, {
            "layout": f"search: {best.layout}{', tuned' if best.tuned else ''}",
            "objective": f"{100 * best.disagreement:.2f} % of labels differ, on held-out groups",
        }  # fmt: skip
    else:
        with progress_bar(console) as bar:
            task = bar.add_task("compiling ...", total=options.steps)

            def on_step(step: TuningStep, code: NeRCC) -> None:
                bar.update(task, completed=step.step)
                if step.held_out is not None:
                    text = f"error {step.held_out:.3f} of the untuned code's"
                    bar.update(task, description=text)

            tuned = tune(network, start, x, laws, key=key, on_step=on_step, **descent)
        code = tuned.code
        numbers = ", ".join(
            f"{name} {float(getattr(code, name)):.3g}"
            for name in ("lambda_enc", "lambda_dec", "gap_exponent")
        )
        taken = sum(step.objective is not None for step in tuned.history)
        found = {
            "tuned": f"{taken} steps in {tuned.seconds:.0f} s: {numbers}",
            "objective": f"{tuned.objective:.4f} of the untuned code's, on held-out groups",
        }
    made: dict[str, AbstractCode] = {"tuned": code}
    if options.learn_decoder:
        with console.status("learning the decoder ..."):
            made["learned"] = learn_decoder(network, code, x, key=jax.random.fold_in(key, 1))
        found["decoder"] = "learned from the model's answers"
    save_code(options.output, made["learned" if options.learn_decoder else "tuned"], about | found)
    if tuned is not None:
        with console.status("the objective's landscape, for the picture ..."):
            count = min(len(held) // num_data, 16)
            groups = held[: count * num_data].reshape(count, num_data, *held.shape[1:])
            trial = make_trial(network, start, groups, laws, key=key, num_sets=8)
            grid = np.asarray(landscape(network, code, trial, _GRID, _GRID))
        title = f"{options.model}, K={num_data}, N={num_workers}"
        pictures.tuning_figure(tuned.path, _GRID, grid, title).savefig(options.plot, dpi=130)

    codes = {"untuned": others.pop("untuned")} | made | others
    what = f"{options.model}, K={num_data}, N={num_workers}, data that it was not tuned on"
    compared = compare(console, options, network, codes, held, laws, what)
    write_json(console, options.numbers, about, compared.records())
    for name, value in found.items():
        console.print(f"{name}: {value}", soft_wrap=True)
    written, picture = options.output.resolve(), options.plot.resolve()
    console.print(f"tuned code: {written}\npicture: {picture}", soft_wrap=True)


def start_code(num_data: int, num_workers: int, layout: str) -> NeRCC:
    """Return the untuned code; exact where every data point has a worker of its own."""
    code = NeRCC(num_data, num_workers, points=layout)
    own = jnp.all(coincident(code.alpha, code.beta))
    return NeRCC(num_data, num_workers, points=layout, exact=True) if own else code


def _print_layouts(console: Console, search: LayoutSearch) -> None:
    def cells(candidate: Any) -> tuple[str, ...]:
        code = candidate.code
        kept = "yes" if code.exact or not code.lambda_dec > 0 else "no"
        return (
            candidate.layout + (", tuned" if candidate.tuned else ""),
            f"{100 * candidate.disagreement:.2f} %",
            f"{float(code.lambda_dec):.1e}",
            "" if candidate.layout == "chebyshev" else kept,
        )

    columns = ("layout", "disagreement", "lambda_dec", "exact where answered")
    title = "Layouts, each with its best decoder, on held-out groups"
    print_table(console, title, columns, map(cells, search.best_of_layouts))
