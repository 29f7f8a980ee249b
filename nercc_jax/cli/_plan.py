"""`nercc plan`: find the best way to serve a model, with or without a code."""

import dataclasses
from typing import Any

import jax
from rich.console import Console

from ..codes import regression_points
from ..planning import plan
from ..stragglers import latency_law
from ._command import of_option
from ._options import Options
from ._output import show, write_json
from ._workload import find_workload, surrogate_of


def plan_service(options: Options) -> None:
    """Plan how to serve a model: coded, replicated, hedged, or without redundancy.

    These are compared within a budget of workers and calls, on data points without labels. The plan
    recommends the one with the shortest time to the last prediction (p99) whose labels differ
    rarely enough. On the model's training data, it is too optimistic.
    """
    if options.outputs == "values":
        raise ValueError(
            "a plan keeps labels, and --outputs values have none: see `nercc run --tolerance`"
        )
    layouts, split = options.layouts.split(","), options.split or "train"
    with of_option(f"--layouts {options.layouts}"):
        for layout in layouts:
            regression_points(2, 4, layout)
    asked: dict[str, Any] = {}
    if options.surrogate is not None:
        asked["surrogate"] = surrogate_of(options.surrogate, options.model, options.outputs)
    if options.max_disagreement is not None:
        asked["max_disagreement"] = options.max_disagreement
    with of_option(f"--latency {options.latency}"):
        law = latency_law(options.latency)
    options.output.mkdir(parents=True, exist_ok=True)  # fails before the work, not after it
    (model, data), console = find_workload(options), Console()
    x = data.shuffled(split, options.max_inputs or 2000, options.seed)
    with console.status("planning ..."):
        found = plan(
            model,
            x,
            law,
            key=jax.random.key(options.seed),
            num_queries=options.queries,
            max_workers=options.max_workers,
            max_extra_work=options.budget,
            layouts=tuple(layouts),
            buffer_size=options.buffer,
            overhead=options.overhead_s,
            **asked,
        )
    file = options.output / "plan.json"
    about = {name: getattr(options, name) for name in ("model", "outputs", "latency", "surrogate")}
    about |= {"data": f"{data.source}, {split}", "seed": options.seed}
    write_json(console, file, about | dataclasses.asdict(found))
    show(console, found)
