"""`nercc plan`: the code for a model and its workers, or none, measured on unlabelled data."""

import datetime
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from ..codes import regression_points
from ..evaluation import pictures
from ..planning import Candidate, Plan, PlanEffort, plan
from ..stragglers import (
    AbstractLatency,
    ExponentialLatency,
    LogNormalLatency,
    ParetoLatency,
    TraceLatency,
)
from ._command import of_option
from ._options import Options
from ._output import print_table
from ._own_models import find_surrogate
from ._process import compile_quickly
from ._workload import find_workload

# The model runs on about so many times the data points: on the coded ones of all codes, too.
_RUNS = 50
# The forms of a law of latency, in seconds.
_LATENCIES = (
    "lognormal:MEDIAN:SIGMA, exponential:MEAN[:SHIFT], pareto:MINIMUM:SHAPE, "
    "stragglers:SECONDS:SHARE:FACTOR or trace:FILE"
)


def plan_service(options: Options) -> None:
    """Plan how to serve a model: print and write the plan, and draw its picture."""
    if options.outputs == "values":
        raise ValueError(
            "a plan keeps labels, and --outputs values have none: see `nercc run --tolerance`"
        )
    layouts, split = options.layouts.split(","), options.split or "train"
    with of_option(f"--layouts {options.layouts}"):
        for layout in layouts:
            regression_points(2, 4, layout)
    cheap = None
    if options.surrogate is not None:
        cheap = find_surrogate(options.surrogate, options.model, options.outputs)
    law = latency_law(options.latency)
    options.output.mkdir(parents=True, exist_ok=True)  # fails before the work, not after it
    workload = find_workload(options)
    x = workload.points(split, options.max_inputs or 2000, options.seed)
    compile_quickly(workload.model, x, _RUNS * len(x))
    console = Console()
    asked: dict[str, Any] = {}
    if options.max_disagreement is not None:
        asked = {"max_disagreement": options.max_disagreement}
    with console.status("planning ...") as status:
        found = plan(
            workload.model,
            x,
            law,
            key=jax.random.key(options.seed),
            num_queries=options.queries,
            max_workers=options.max_workers,
            max_extra_work=options.budget,
            **asked,
            layouts=tuple(layouts),
            surrogate=cheap,
            buffer_size=options.buffer,
            overhead=options.overhead_s,
            on_stage=lambda stage: status.update(f"{stage} ..."),
        )
    file, picture = options.output / "plan.json", options.output / "plan.png"
    about = {
        "model": options.model,
        "outputs": options.outputs,
        "data": f"{workload.source}, {split}",
        "latency": options.latency,
        "surrogate": options.surrogate,
        "seed": options.seed,
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    found.save(file, about)
    print_plan(console, found)
    console.print(plan_words(found, about["data"]), soft_wrap=True, highlight=False, markup=False)
    title = f"{options.model}, {options.latency}, {options.queries} queries"
    pictures.plan_figure(found, title, PlanEffort.alike).savefig(picture, dpi=130)
    console.print(f"plan: {file.resolve()}\npicture: {picture.resolve()}", soft_wrap=True)


def latency_law(text: str) -> AbstractLatency:
    """Return the law that an option names.

    Raises ValueError if there is no such law, or as `TraceLatency.from_file`.
    """
    name, _, rest = text.partition(":")
    with of_option(f"--latency {text}"):
        if name == "trace" and rest:
            return TraceLatency.from_file(rest)
        try:
            numbers = [float(number) for number in rest.split(":")]
        except ValueError:
            numbers = []
        match name, numbers:
            case "lognormal", [median, sigma]:
                return LogNormalLatency(median, sigma)
            case "exponential", [_] | [_, _]:
                return ExponentialLatency(*numbers)
            case "pareto", [minimum, shape]:
                return ParetoLatency(minimum, shape)
            case "stragglers", [seconds, share, factor]:
                if not (seconds > 0 and 0 <= share <= 1 and factor > 0):
                    raise ValueError(
                        "seconds and factor must be positive, and the share between 0 and 1"
                    )
                # No two calls take the same time, and no rule may rely on equal times.
                usual = seconds * np.linspace(0.95, 1.05, 100)
                late = np.arange(100)[:, None] < round(100 * share)
                return TraceLatency(jnp.asarray(np.where(late, factor * usual, usual).ravel()))
    raise ValueError(f"--latency must be {_LATENCIES}, not {text!r}")


def print_plan(console: Console, found: Plan) -> None:
    """Print a table of the fastest of each system at each size: see `shown_rows`."""

    def ms(seconds: float) -> str:
        return f"{1e3 * seconds:.{0 if seconds >= 0.1 else 1}f}"

    def cells(row: Candidate) -> tuple[str, ...]:
        best = row == found.recommended
        differ = f"{100 * row.disagreement.mean:.2f}<{100 * row.most_disagreement:.2f}"
        return (
            row.system + (f", {row.order}" if row.order else "") + " *" * best,
            f"({row.num_workers}, {row.num_data})",
            str(row.wait_for) + (f", {ms(row.min_wait)}" if row.min_wait else ""),
            f"{100 * row.resent:.1f}" if row.resent > 0 else "",
            f"{100 * row.extra_work:.0f}",
            "0" if row.exact else differ,
            ms(row.p50),
            ms(row.p99),
            "bold green" if best else "" if found.feasible(row) else "dim",
        )

    columns = ("(N, K)", "wait\nms", "again\n%", "extra\n%", "differ\n%", "p50\nms", "p99\nms")
    print_table(
        console,
        "Each system at each size: the fastest within the budget, or the nearest to it",
        ("system", *columns),
        map(cells, shown_rows(found)),
        caption="* recommended; dim: over the budget, too many labels differ, or only screened\n"
        "wait: answers to wait for, and at least how long; again: calls sent a second time;\n"
        "extra: calls beyond one a query; differ: labels that differ, and an upper bound;\n"
        "p50, p99: time until the last of the queries is answered",
        caption_justify="left",
    )


def shown_rows(found: Plan) -> list[Candidate]:
    """Return one candidate for each system and size, with re-execution and without.

    It is the fastest within the budget. Where none is, it is the one with the fewest labels that
    differ, preferably measured on held-out data and not only screened. The recommended one is
    always there.
    """

    def rank(row: Candidate) -> tuple:
        if found.feasible(row):
            return 0, row.p99
        return 1 + (not row.held_out), row.most_disagreement, row.p99

    best: dict[tuple, Candidate] = {}
    for row in sorted(found.candidates, key=rank):
        again = row.limit is not None
        best.setdefault((row.system, row.num_workers, row.num_data, again), row)
    rows = dict.fromkeys((*best.values(), found.recommended))
    return sorted(rows, key=lambda row: (not found.feasible(row), row.p99))


def plan_words(found: Plan, data: str) -> str:
    """Return the recommendation, its reason, how to carry it out, and its basis: a line each."""
    row, about = found.recommended, found.about
    lines = [f"recommended: {found.reason}"]
    if row.num_workers > row.num_data or row.limit is not None:
        again = {None: "", 0.0: "; send again what has no answer"}
        lines.append(
            f"decode when {row.wait_for} of {row.num_workers} workers have answered, but not "
            f"before {1e3 * row.min_wait:.3g} ms unless all have"
            + again.get(row.limit, f"; send again what has an error probability above {row.limit}")
        )
    if row.hedge_after is not None:
        lines.append(
            f"send up to {row.copies} copies, {row.hedge_copies} further after every "
            f"{1e3 * row.hedge_after:.3g} ms of waiting"
        )
    lines.append(
        f"codes were measured on {about['held_out_points']} held-out data points of {data}, "
        f"{about['straggler_sets']} straggler sets a group; planned in {about['seconds']} s"
    )
    return "\n".join(lines)
