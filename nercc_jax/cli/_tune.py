"""`nercc tune`: the numbers of a code, by gradient descent on unlabelled data."""

import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console

from ..codes import AbstractCode, Berrut, NeRCC, Replication, coincident, save_code
from ..evaluation import evaluate, landscape, make_trial
from ..tuning import Tuned, TuningStep, tune
from ._errors import told_plainly
from ._layout_search import found_layout
from ._progress import steps_bar
from ._report import straggler_table
from ._tuning_plot import tuning_plot
from ._workload import (
    Answering,
    DataDir,
    ModelName,
    NumData,
    NumWorkers,
    OutputsOption,
    answering,
    check_folder,
    straggler_laws,
)

# The picture's grid of both lambdas.
_GRID = np.logspace(-12, 0, 13)


def tune_command(
    model: ModelName = "lenet5-digits",
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
    loss: Annotated[
        Literal["mse", "cross_entropy"] | None,
        typer.Option(
            help="Error of the values, or of the labels' distribution (logits only). Unless given, "
            "the values'; for a search on logits the labels'."
        ),
    ] = None,
    outputs: OutputsOption = "logits",
    steps: Annotated[int, typer.Option(help="Gradient steps, at most.")] = 150,
    sets: Annotated[
        int, typer.Option(help="Straggler sets for each number of them, to compare on.")
    ] = 20,
    images: Annotated[int, typer.Option(help="Images to tune on, and to compare on.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
    output: Annotated[Path, typer.Option(help="Where to write the tuned code.")] = Path(
        "nercc-tuned.json"
    ),
    plot: Annotated[Path, typer.Option(help="Where to write the picture.")] = Path(
        "nercc-tune.png"
    ),
) -> None:
    """Tune a code for a model by gradient descent through encoder, model and decoder.

    Uses training images, without their labels. Prints the errors before and after on test images,
    and writes the tuned code for `nercc demo --code`.
    """
    with told_plainly():
        check_folder("--output", output)
        check_folder("--plot", plot)
        if loss == "cross_entropy" and outputs != "logits":
            raise ValueError("--loss cross_entropy needs --outputs logits")
        laws = straggler_laws(num_data, num_workers, max_stragglers)
        searching = layout == "search"
        start = _start(num_data, num_workers, "chebyshev" if searching else layout)
        if start.exact:
            laws.pop("0")  # without stragglers there is nothing to tune
        network = answering(model, outputs)
        x, _ = network.images("train", data_dir, images, seed)
        held, _ = network.images("test", data_dir, images, seed)
        console = Console()
        labels = searching and outputs == "logits"
        options = {"points": points, "loss": loss or ("cross_entropy" if labels else "mse")}
        options |= {"steps": steps, "key": jax.random.key(seed)}
        about = {
            "model": model,
            "outputs": outputs,
            "data": network.network.data,
            "data_points": len(x),
            "layout": layout,
            "stragglers": f"{', '.join(laws)} of {num_workers} workers, each number alike",
            "loss": options["loss"],
            "seed": seed,
            "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": "nercc tune",
        }
        if searching:
            code, found = _search(console, network, x, num_data, num_workers, laws, plot, options)
        else:
            tuned = _tune(console, network, start, x, laws, **options)
            code, found = tuned.code, _told(tuned)
            _draw(network, start, tuned, held, laws, model, seed, plot)
        save_code(output, code, about | found)
        _compare(console, network, start, code, held, laws, sets, seed, outputs)
        for name, value in found.items():
            console.print(f"{name}: {value}", soft_wrap=True)
        console.print(f"tuned code: {output.resolve()}\npicture: {plot.resolve()}", soft_wrap=True)


def _start(num_data: int, num_workers: int, layout: str) -> NeRCC:
    """The untuned code; exact where every data point has a worker of its own."""
    code = NeRCC(num_data, num_workers, points=layout)
    own = jnp.all(coincident(code.alpha, code.beta))
    return NeRCC(num_data, num_workers, points=layout, exact=True) if own else code


def _tune(console, network, start: NeRCC, x, laws, steps: int, **options: Any) -> Tuned[NeRCC]:
    with steps_bar(console) as progress:
        task = progress.add_task("compiling ...", total=steps)

        def on_step(step: TuningStep) -> None:
            progress.update(task, completed=step.step)
            if step.held_out is not None:
                told = f"error {step.held_out:.3f} of the untuned code's"
                progress.update(task, description=told)

        return tune(network, start, x, laws, steps=steps, on_step=on_step, **options)


def _search(
    console, network: Answering, x, num_data: int, num_workers: int, laws, plot: Path, options
) -> tuple[NeRCC, dict[str, Any]]:
    """The code of the best layout, and what is to be said of it."""
    search = found_layout(console, network, x, num_data, num_workers, laws, plot, **options)
    best = search.candidates[0]
    return best.code, {
        "layout": f"search: {best.layout}{', tuned' if best.tuned else ''}",
        "objective": f"{100 * best.disagreement:.2f} % of labels differ, on held-out groups",
    }


def _compare(console, network, start: NeRCC, code: NeRCC, held, laws, sets, seed, outputs) -> None:
    codes: dict[str, AbstractCode] = {
        "untuned": start,
        "tuned": code,
        "BACC": Berrut(start.num_data, start.num_workers),
        "ApproxIFER": Berrut(start.num_data, start.num_workers, points="approxifer"),
    }
    if start.num_workers >= start.num_data:
        codes["replication"] = Replication(start.num_data, start.num_workers)
    rows = evaluate(network, codes, held, laws, key=jax.random.key(seed), num_sets=sets)
    console.print(
        f"\nOn {rows[0].num_data_points} test images that it was not tuned on, {sets} straggler "
        "sets for each number S of stragglers; mean ± 95 % interval; * marks a row's best."
    )
    console.print(straggler_table(rows, "mse", f"MSE of decoded {outputs}", best="min"))
    title = "RelAcc in %: same label as the model's own"
    console.print(straggler_table(rows, "rel_acc", title, best="max", scale=100))


def _told(tuned: Tuned[NeRCC]) -> dict[str, Any]:
    """What is to be said of a tuned code."""
    numbers = ", ".join(
        f"{name} {float(getattr(tuned.code, name)):.3g}"
        for name in ("lambda_enc", "lambda_dec", "gap_exponent")
    )
    return {
        "tuned": f"{len(tuned.history) - 1} steps in {tuned.seconds:.0f} s: {numbers}",
        "objective": f"{tuned.objective:.4f} of the untuned code's, on held-out groups",
    }


def _draw(
    network: Answering, start: NeRCC, tuned: Tuned, held, laws, model: str, seed: int, plot: Path
) -> None:
    groups = held[: len(held) // start.num_data * start.num_data][: 16 * start.num_data]
    groups = groups.reshape(-1, start.num_data, *held.shape[1:])
    view = make_trial(network, start, groups, laws, key=jax.random.key(seed), num_sets=8)
    grid = landscape(network, tuned.code, view, _GRID, _GRID)
    what = f"{model}, K={start.num_data}, N={start.num_workers}"
    tuning_plot(tuned.history, _GRID, np.asarray(grid), what, plot)
