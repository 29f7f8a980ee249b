"""What `nercc tune` does: descends with a bar, compares, draws, tells."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..codes import AbstractCode, Berrut, NeRCC, Replication, coincident
from ..evaluation import Evaluations, evaluate, landscape, make_trial
from ..inference import Model
from ..tuning import Descent, Tuned, TuningStep, tune
from ._layout_search import found_layout
from ._progress import evaluating, steps_bar
from ._report import straggler_table
from ._tables import print_whole
from ._tuning_plot import tuning_plot

# The picture's grid of both lambdas.
_GRID = np.logspace(-12, 0, 13)


def start_code(num_data: int, num_workers: int, layout: str) -> NeRCC:
    """The untuned code; exact where every data point has a worker of its own."""
    code = NeRCC(num_data, num_workers, points=layout)
    own = jnp.all(coincident(code.alpha, code.beta))
    return NeRCC(num_data, num_workers, points=layout, exact=True) if own else code


def tune_with_bar(
    console, network, start: NeRCC, x, laws, descent: Descent, **options: Any
) -> Tuned[NeRCC]:
    with steps_bar(console) as progress:
        task = progress.add_task("compiling ...", total=descent.steps)

        def on_step(step: TuningStep, code: NeRCC) -> None:
            progress.update(task, completed=step.step)
            if step.held_out is not None:
                told = f"error {step.held_out:.3f} of the untuned code's"
                progress.update(task, description=told)

        return tune(network, start, x, laws, descent=descent, on_step=on_step, **options)


def search_with_status(
    console,
    network: Model,
    x,
    num_data: int,
    num_workers: int,
    laws,
    plot: Path,
    **options: Any,
) -> tuple[NeRCC, dict[str, Any]]:
    """The code of the best layout, and what is to be said of it."""
    search = found_layout(console, network, x, num_data, num_workers, laws, plot, **options)
    best = search.candidates[0]
    return best.code, {
        "layout": f"search: {best.layout}{', tuned' if best.tuned else ''}",
        "objective": f"{100 * best.disagreement:.2f} % of labels differ, on held-out groups",
    }


def compare(
    console, network, start: NeRCC, code: NeRCC, held, laws, sets, seed, outputs
) -> Evaluations:
    codes: dict[str, AbstractCode] = {
        "untuned": start,
        "tuned": code,
        "BACC": Berrut(start.num_data, start.num_workers),
        "ApproxIFER": Berrut(start.num_data, start.num_workers, points="approxifer"),
    }
    if start.num_workers >= start.num_data:
        codes["replication"] = Replication(start.num_data, start.num_workers)
    with evaluating(console) as progress:
        key = jax.random.key(seed)
        rows = evaluate(network, codes, held, laws, key=key, num_sets=sets, progress=progress)
    console.print(
        f"\nOn {rows[0].num_data_points} data points that it was not tuned on, {sets} straggler "
        "sets for each number S of stragglers; means and 95 % intervals; * marks a row's best."
    )
    print_whole(console, straggler_table(rows, "mse", f"MSE of decoded {outputs}", best="min"))
    if outputs == "values":
        return rows
    title = "RelAcc in %: same label as the model's own"
    print_whole(console, straggler_table(rows, "rel_acc", title, best="max"))
    return rows


def tuned_words(tuned: Tuned[NeRCC]) -> dict[str, Any]:
    """What is to be said of a tuned code."""
    numbers = ", ".join(
        f"{name} {float(getattr(tuned.code, name)):.3g}"
        for name in ("lambda_enc", "lambda_dec", "gap_exponent")
    )
    return {
        "tuned": f"{len(tuned.history) - 1} steps in {tuned.seconds:.0f} s: {numbers}",
        "objective": f"{tuned.objective:.4f} of the untuned code's, on held-out groups",
    }


def draw(
    network: Model, start: NeRCC, tuned: Tuned, held, laws, model: str, seed: int, plot: Path
) -> None:
    groups = held[: len(held) // start.num_data * start.num_data][: 16 * start.num_data]
    groups = groups.reshape(-1, start.num_data, *held.shape[1:])
    view = make_trial(network, start, groups, laws, key=jax.random.key(seed), num_sets=8)
    grid = landscape(network, tuned.code, view, _GRID, _GRID)
    what = f"{model}, K={start.num_data}, N={start.num_workers}"
    tuning_plot(tuned.history, _GRID, np.asarray(grid), what, plot)
