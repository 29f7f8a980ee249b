"""What `nercc tune` does: descends with a bar, compares, draws, tells."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..codes import AbstractCode, Berrut, NeRCC, Replication, coincident
from ..evaluation import Evaluations, Trial, evaluate, landscape, make_trial
from ..inference import Model
from ..stragglers import AbstractStragglers
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


class Comparison(NamedTuple):
    """What a tuned code is held against: codes under laws, on data points that it is not tuned on.

    None of it depends on the tuned code, so that `rows` of the others, and the `trial` of the
    picture, may be made while that is being tuned.
    """

    network: Model
    start: NeRCC
    held: np.ndarray
    laws: Mapping[str, AbstractStragglers]
    sets: int
    seed: int

    def rows(self, codes: Mapping[str, AbstractCode], **options: Any) -> Evaluations:
        key = jax.random.key(self.seed)
        return evaluate(
            self.network, codes, self.held, self.laws, key=key, num_sets=self.sets, **options
        )

    def others(self) -> dict[str, AbstractCode]:
        size = self.start.num_data, self.start.num_workers
        codes: dict[str, AbstractCode] = {
            "untuned": self.start,
            "BACC": Berrut(*size),
            "ApproxIFER": Berrut(*size, points="approxifer"),
        }
        return codes | ({"replication": Replication(*size)} if size[1] >= size[0] else {})

    def trial(self) -> Trial:
        """Of the picture; `landscape` is compiled for it, too."""
        count = self.start.num_data
        groups = self.held[: min(len(self.held) // count, 16) * count]
        groups = groups.reshape(-1, count, *self.held.shape[1:])
        key = jax.random.key(self.seed)
        trial = make_trial(self.network, self.start, groups, self.laws, key=key, num_sets=8)
        landscape(self.network, self.start, trial, _GRID[:1], _GRID)
        return trial


def compare(
    console, comparison: Comparison, others: Evaluations, code: NeRCC, outputs
) -> Evaluations:
    """Prints the tables. `others` are the rows of the codes beside the tuned one, or none yet."""
    codes, sets = comparison.others(), comparison.sets
    with evaluating(console) as progress:
        new = {"tuned": code} | ({} if others else codes)
        rows = [*others, *comparison.rows(new, progress=progress)]
    laws, names = [*comparison.laws], ["untuned", "tuned", *codes]
    rows.sort(key=lambda row: (laws.index(row.stragglers), names.index(row.code)))
    rows = Evaluations(rows)
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


def draw(comparison: Comparison, trial: Trial, tuned: Tuned, model: str, plot: Path) -> None:
    grid = landscape(comparison.network, tuned.code, trial, _GRID, _GRID)
    start = comparison.start
    what = f"{model}, K={start.num_data}, N={start.num_workers}"
    tuning_plot(tuned.history, _GRID, np.asarray(grid), what, plot)
