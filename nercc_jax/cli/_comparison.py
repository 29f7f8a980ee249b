"""Comparison of codes at each number of stragglers, for `nercc demo` and `nercc tune`."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

from nercc_models import DataPoints

from ..codes import AbstractCode
from ..evaluation import Evaluations, evaluate
from ..stragglers import AbstractStragglers, ExactStragglers
from ._options import Options
from ._output import show


def straggler_laws(
    num_data: int, num_workers: int, max_stragglers: int | None
) -> dict[str, AbstractStragglers]:
    """Return laws for each number of stragglers from 0 to `max_stragglers` (default: N - K).

    Raises ValueError if `max_stragglers` is negative, or not smaller than N.
    """
    most = max(num_workers - num_data, 0) if max_stragglers is None else max_stragglers
    if not 0 <= most < num_workers:
        raise ValueError(
            f"--max-stragglers {most}: it must be from 0 to {num_workers - 1}, for "
            f"{num_workers} workers"
        )
    return {str(s): ExactStragglers(s) for s in range(most + 1)}


def points_for(
    options: Options, data: DataPoints, split: str, num_data: int, least: int = 1
) -> np.ndarray:
    """Return data points of a split; raise ValueError if they fill fewer than `least` groups."""
    count = options.max_inputs or 1000
    x = data.shuffled(split, count, options.seed)
    if len(x) < least * num_data:
        what = "a group" if least == 1 else f"{least} groups"
        raise ValueError(
            f"--max-inputs {count} gives {len(x)} data points of {data.source}, too few for {what} "
            f"of {num_data}; ask for more data points or a smaller --num-data"
        )
    return x


def compare(
    console: Console,
    options: Options,
    model: Any,
    codes: Mapping[str, AbstractCode],
    x: np.ndarray,
    laws: Mapping[str, AbstractStragglers],
    what: str,
) -> Evaluations:
    """Evaluate codes at each number of stragglers, and print their errors and the labels kept.

    Replication is left out of the errors: its predictions are exact or lost.
    """
    key, status = jax.random.key(options.seed), console.status("the model's calls ...")

    def progress(pairs: Iterable) -> Iterable:
        status.stop()
        return track(pairs, description="straggler sets", console=console)

    with status:
        rows = evaluate(model, codes, x, laws, key=key, num_sets=options.sets, progress=progress)
    with_error = [name for name in codes if name != "replication"]
    show(
        console,
        f"\n{what}, {rows[0].num_data_points} data points x {options.sets} straggler sets; means "
        "over the sets with 95 % intervals; * is the best in a row.",
        f"\nMSE of decoded {options.outputs}\n{rows.table('mse', with_error)}",
    )
    if options.outputs != "values":
        kept = "% of predictions with the label that the uncoded model gives; those not recovered"
        show(console, f"\nRelAcc: {kept} count as wrong\n{rows.table('rel_acc')}")
    return rows
