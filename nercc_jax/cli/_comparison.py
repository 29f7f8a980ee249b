"""Codes compared at each number of stragglers, as `nercc demo` and `nercc tune` do."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..codes import AbstractCode
from ..evaluation import Estimate, Evaluation, Evaluations, evaluate
from ..evaluation._evaluation import SHARES
from ..stragglers import AbstractStragglers, ExactStragglers
from ._options import Options
from ._output import make_table, print_whole


def straggler_laws(
    num_data: int, num_workers: int, max_stragglers: int | None
) -> dict[str, AbstractStragglers]:
    """Return laws for each number of stragglers from 0 to `max_stragglers` (default: N - K).

    Raises:
        ValueError: If `max_stragglers` is negative, or leaves no worker to answer.
    """
    if max_stragglers is None:
        max_stragglers = max(num_workers - num_data, 0)
    if not 0 <= max_stragglers < num_workers:
        raise ValueError(
            f"--max-stragglers {max_stragglers}: it must be from 0 to {num_workers - 1}, for "
            f"{num_workers} workers"
        )
    return {str(s): ExactStragglers(s) for s in range(max_stragglers + 1)}


def compare(
    console: Console,
    options: Options,
    model: Any,
    codes: Mapping[str, AbstractCode],
    x: np.ndarray,
    laws: Mapping[str, AbstractStragglers],
    what: str,
) -> Evaluations:
    """Evaluate codes at each number of stragglers, and print their errors and the labels kept."""
    begin, key = time.monotonic(), jax.random.key(options.seed)
    status: Any = console.status("the model's calls: compiling, then data points ...")

    def progress(pairs: Iterable) -> Iterable:
        status.stop()
        seconds = time.monotonic() - begin
        console.print(f"compiled the model's calls and made them: {seconds:.1f} s", style="dim")
        return track(pairs, description="straggler sets", console=console)

    with status:
        rows = evaluate(model, codes, x, laws, key=key, num_sets=options.sets, progress=progress)
    console.print(
        f"\n{what}, {rows[0].num_data_points} data points x {options.sets} straggler sets; means "
        "over the sets with 95 % intervals; * is the best in a row."
    )
    # Replication recovers exact predictions or none: it has no error to compare.
    approximate = [row for row in rows if row.code != "replication"]
    title = f"MSE of decoded {options.outputs}"
    print_whole(console, straggler_table(approximate, "mse", title, best="min"))
    if options.outputs != "values":
        title = (
            "RelAcc: % of predictions with the label that the uncoded model gives; those not "
            "recovered count as wrong"
        )
        print_whole(console, straggler_table(rows, "rel_acc", title, best="max"))
    return rows


def straggler_table(rows: Sequence[Evaluation], metric: str, title: str, *, best: str) -> Table:
    """Return a table of one metric: codes in columns, laws in rows, the best of a row with *.

    The best is the "min" or the "max". Shares are in %, with the ends of their intervals. A code
    that lost predictions cannot win on an error that leaves them out; the last columns have the
    share, in %, that such codes lost.
    """
    laws = [*dict.fromkeys(row.stragglers for row in rows)]
    codes = [*dict.fromkeys(row.code for row in rows)]
    by_pair = {(row.stragglers, row.code): row for row in rows}
    losers = [code for code in codes if any(by_pair[law, code].lost.mean > 0 for law in laws)]

    def cells(law: str) -> list[str]:
        found = {code: by_pair[law, code] for code in codes}
        estimates: dict[str, Estimate] = {c: getattr(row, metric) for c, row in found.items()}
        means = {
            code: each.mean
            for code, each in estimates.items()
            if best == "max" or not found[code].lost.mean > 0
        }
        top = (max if best == "max" else min)(means.values(), default=np.nan)
        texts = []
        for code, estimate in estimates.items():
            text = "-"
            if metric in SHARES and not np.isnan(estimate.mean):
                text = share_text(estimate)
            elif not np.isnan(estimate.mean):
                text = f"{_number(estimate.mean)} ±{_number(estimate.half_width)}"
            wins = means.get(code) == top
            texts.append(f"[bold green]{text}*[/bold green]" if wins else text)
        return [law, *texts, *(f"{100 * found[code].lost.mean:.1f}" for code in losers)]

    columns = ("S", *codes, *(f"lost by\n{code}" for code in losers))
    return make_table(title, columns, map(cells, laws), left=0)


def share_text(estimate: Estimate) -> str:
    """Return a share in %, with the ends of its interval."""
    low, high = (100 * end for end in estimate.interval(share=True))
    mean = f"{100 * estimate.mean:.1f}"
    if not high - low >= 0.1:
        return mean
    digits = 0 if high - low >= 3 else 1
    return f"{mean} {low:.{digits}f}–{high:.{digits}f}"


def _number(value: float) -> str:
    """Return a number in three digits, without an exponent where none is needed."""
    if value == 0 or np.isnan(value):
        return "0" if value == 0 else "?"
    if abs(value) >= 1e4:
        return f"{value:.0e}".replace("e+0", "e")
    digits = max(0, 2 - int(np.floor(np.log10(abs(value)))))
    return f"{value:.{min(digits, 4)}f}"
