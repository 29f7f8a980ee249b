"""The steps of `nercc tune`: tuning or a search for a layout, comparison, pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from ..codes import AbstractCode, Berrut, BerrutSpline, LearnedDecoder, NeRCC, Replication
from ..codes._points import coincident
from ..evaluation import Evaluations, evaluate
from ..evaluation._objective import Trial, landscape, make_trial
from ..evaluation._pictures import system_look
from ..inference.models import Model
from ..stragglers import AbstractStragglers
from ..tuning import Descent, Tuned, learn_decoder, search_layout, tune
from ..tuning._layouts import LayoutCandidate, LayoutSearch
from ..tuning._tune import TuningStep
from ._output import evaluating, print_whole, steps_bar
from ._pictures import straggler_table, tuning_plot

# The picture's grid of both lambdas.
_GRID = np.logspace(-12, 0, 13)


def start_code(num_data: int, num_workers: int, layout: str) -> NeRCC:
    """Return the untuned code; exact where every data point has a worker of its own."""
    code = NeRCC(num_data, num_workers, points=layout)
    own = jnp.all(coincident(code.alpha, code.beta))
    return NeRCC(num_data, num_workers, points=layout, exact=True) if own else code


def tune_with_bar(
    console: Console, network: Model, start: NeRCC, x, laws, descent: Descent, **options: Any
) -> Tuned[NeRCC]:
    with steps_bar(console) as progress:
        task = progress.add_task("compiling ...", total=descent.steps)

        def on_step(step: TuningStep, code: NeRCC) -> None:
            progress.update(task, completed=step.step)
            if step.held_out is not None:
                text = f"error {step.held_out:.3f} of the untuned code's"
                progress.update(task, description=text)

        return tune(network, start, x, laws, descent=descent, on_step=on_step, **options)


def search_with_status(
    console: Console,
    network: Model,
    x,
    num_data: int,
    num_workers: int,
    laws,
    plot: Path,
    **options: Any,
) -> tuple[NeRCC, dict[str, Any]]:
    """Search for a layout, and show the candidates as a table and as a picture.

    Return the code of the best layout, and its description by name.
    """
    with console.status("searching ...") as status:
        search = search_layout(
            network,
            x,
            num_data,
            num_workers,
            laws,
            on_stage=lambda stage: status.update(f"{stage} ..."),
            **options,
        )
    console.print(_layout_table(search))
    _draw_layouts(search, f"{num_data} data points, {num_workers} workers", plot)
    best = search.candidates[0]
    return best.code, {
        "layout": f"search: {best.layout}{', tuned' if best.tuned else ''}",
        "objective": f"{100 * best.disagreement:.2f} % of labels differ, on held-out groups",
    }


class Comparison(NamedTuple):
    """The codes and laws that a tuned code is compared with, on data that it is not tuned on.

    Nothing here depends on the tuned code, so that the `rows` of the other codes, and the `trial`
    of the picture, may be made while that is being tuned.
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
            "BSCC": BerrutSpline(*size),
        }
        return codes | ({"replication": Replication(*size)} if size[1] >= size[0] else {})

    def trial(self) -> Trial:
        """Return the trial of the picture, for which `landscape` is compiled, too."""
        count = self.start.num_data
        groups = self.held[: min(len(self.held) // count, 16) * count]
        groups = groups.reshape(-1, count, *self.held.shape[1:])
        key = jax.random.key(self.seed)
        trial = make_trial(self.network, self.start, groups, self.laws, key=key, num_sets=8)
        landscape(self.network, self.start, trial, _GRID[:1], _GRID)
        return trial


def learned_decoder(network: Model, code: NeRCC, x, key) -> LearnedDecoder:
    """Learn a code's decoder with a key of its own."""
    return learn_decoder(network, code, x, key=jax.random.fold_in(key, 1))


def compare(
    console: Console,
    comparison: Comparison,
    others: Evaluations,
    made: Mapping[str, AbstractCode],
    outputs,
) -> Evaluations:
    """Print the tables; `others` are the rows of the codes that were not `made`, or none yet."""
    codes, sets = comparison.others(), comparison.sets
    with evaluating(console) as progress:
        new = {**made} | ({} if others else codes)
        rows = [*others, *comparison.rows(new, progress=progress)]
    laws, names = [*comparison.laws], ["untuned", *made, *codes]
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


def _layout_name(candidate: LayoutCandidate) -> str:
    return f"{candidate.layout}, tuned" if candidate.tuned else candidate.layout


def _layout_table(search: LayoutSearch) -> Table:
    table = Table(
        title="Layouts, each with its best decoder, on held-out groups",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    table.add_column("layout")
    for column in ("disagreement", "lambda_dec", "exact where answered"):
        table.add_column(column, justify="right")
    for candidate in search.best_of_layouts:
        code = candidate.code
        kept = "yes" if code.exact or not code.lambda_dec > 0 else "no"
        table.add_row(
            _layout_name(candidate),
            f"{100 * candidate.disagreement:.2f} %",
            f"{float(code.lambda_dec):.1e}",
            "" if candidate.layout == "chebyshev" else kept,
        )
    return table


def _draw_layouts(search: LayoutSearch, title: str, path: Path) -> None:
    """Draw the disagreement of every layout's best code as bars."""
    shown = search.best_of_layouts[::-1]
    figure, axis = plt.subplots(figsize=(7, 1 + 0.35 * len(shown)))
    shares = [100 * candidate.disagreement for candidate in shown]
    names = ("NeRCC tuned" if candidate.tuned else "NeRCC" for candidate in shown)
    colours = [system_look(name)["color"] for name in names]
    axis.barh([_layout_name(candidate) for candidate in shown], shares, color=colours)
    axis.set(xlabel="labels that differ from the model's own, in %, held-out groups", title=title)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
