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
from ..stragglers import AbstractStragglers
from ..tuning import Descent, LayoutTuning, learn_decoder, search_layout, tune
from ..tuning._tune import TuningStep
from ._command import of_option
from ._comparison import compare, straggler_laws
from ._options import Options
from ._output import print_table, progress_bar, write_json
from ._process import compile_quickly
from ._workload import find_workload


def tune_code(options: Options) -> None:
    """Tune a code, write it, and compare it with others on other data points."""
    size, outputs = (options.num_data, options.num_workers), options.outputs
    (num_data, num_workers), searching = size, options.layout == "search"
    start, laws = _checked_start(options)
    workload = find_workload(options)
    network = workload.model
    x = workload.groups("train", options, num_data, least=2)
    held = workload.groups("test", options, num_data)
    rounds = 6 * options.steps + (options.max_inputs or 1000)
    compile_quickly(network, x, rounds * num_workers)
    console, key = Console(), jax.random.key(options.seed)
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
        "seed": options.seed,
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "nercc tune",
    }
    descent: dict[str, Any] = {"criterion": criterion, "points": options.points}
    descent["descent"] = Descent(options.steps)
    title = f"{options.model}, K={num_data}, N={num_workers}"
    if searching:
        tuning = LayoutTuning(**descent)
        with console.status("searching ...") as status:
            show: Any = lambda stage: status.update(f"{stage} ...")  # noqa: E731
            found = search_layout(network, x, *size, laws, key=key, tuning=tuning, on_stage=show)
        _print_layouts(console, found.best_of_layouts)
        picture, best = pictures.layouts_figure(found.best_of_layouts, title), found.candidates[0]
        code, results = best.code, {
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
        code, names = tuned.code, ("lambda_enc", "lambda_dec", "gap_exponent")
        numbers = ", ".join(f"{name} {float(getattr(code, name)):.3g}" for name in names)
        taken = sum(step.objective is not None for step in tuned.history)
        results = {
            "tuned": f"{taken} steps in {tuned.seconds:.0f} s: {numbers}",
            "objective": f"{tuned.objective:.4f} of the untuned code's, on held-out groups",
        }
        with console.status("the objective's landscape, for the picture ..."):
            count, grid = min(len(held) // num_data, 16), np.logspace(-12, 0, 13)
            groups = held[: count * num_data].reshape(count, num_data, *held.shape[1:])
            trial = make_trial(network, start, groups, laws, key=key, num_sets=8)
            heights = np.asarray(landscape(network, code, trial, grid, grid))
        picture = pictures.tuning_figure(tuned.path, grid, heights, title)
    picture.savefig(options.plot, dpi=130)
    codes: dict[str, AbstractCode] = {"untuned": start, "tuned": code}
    if options.learn_decoder:
        with console.status("learning the decoder ..."):
            codes["learned"] = learn_decoder(network, code, x, key=jax.random.fold_in(key, 1))
        results["decoder"] = "learned from the model's answers"
    save_code(options.output, codes.get("learned", code), about | results)

    codes |= {"BACC": Berrut(*size), "ApproxIFER": Berrut(*size, points="approxifer")}
    codes["BSCC"] = BerrutSpline(*size)
    if num_workers >= num_data:
        codes["replication"] = Replication(*size)
    what = f"{title}, data that it was not tuned on"
    compared = compare(console, options, network, codes, held, laws, what)
    write_json(console, options.numbers, about, compared.records())
    for name, value in results.items():
        console.print(f"{name}: {value}", soft_wrap=True)
    written, drawn = options.output.resolve(), options.plot.resolve()
    console.print(f"tuned code: {written}\npicture: {drawn}", soft_wrap=True)


def _checked_start(options: Options) -> tuple[NeRCC, dict[str, AbstractStragglers]]:
    """Return the untuned code and the laws to tune it under; raise ValueError if options clash."""
    size, searching = (options.num_data, options.num_workers), options.layout == "search"
    if options.criterion == "cross_entropy" and options.outputs != "logits":
        raise ValueError("--criterion cross_entropy needs --outputs logits")
    if searching and options.outputs == "values":
        raise ValueError("--layout search goes by labels, and --outputs values have none")
    laws = straggler_laws(*size, options.max_stragglers)
    with of_option(f"--layout {options.layout}"):
        start = start_code(*size, "chebyshev" if searching else options.layout)
    if start.exact:
        laws.pop("0")  # without stragglers there is nothing to tune
    if not laws:
        raise ValueError(
            f"--num-workers {size[1]}: without stragglers, and with a worker for each data point, "
            "there is nothing to tune; say --max-stragglers"
        )
    return start, laws


def start_code(num_data: int, num_workers: int, layout: str) -> NeRCC:
    """Return the untuned code; exact where every data point has a worker of its own."""
    code = NeRCC(num_data, num_workers, points=layout)
    own = jnp.all(coincident(code.alpha, code.beta))
    return NeRCC(num_data, num_workers, points=layout, exact=True) if own else code


def _print_layouts(console: Console, found: Any) -> None:
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
    print_table(console, title, columns, map(cells, found))
