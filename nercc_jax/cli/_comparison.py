"""Codes compared at each number of stragglers, as `nercc demo` and `nercc tune` do."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

from ..codes import AbstractCode
from ..evaluation import Estimate, Evaluation, Evaluations, evaluate
from ..stragglers import AbstractStragglers, ExactStragglers
from ._options import Options
from ._output import print_table


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
    _print_errors(console, rows, f"MSE of decoded {options.outputs}", labels=False)
    if options.outputs != "values":
        title = (
            "RelAcc: % of predictions with the label that the uncoded model gives; those not "
            "recovered count as wrong"
        )
        _print_errors(console, rows, title, labels=True)
    return rows


def _print_errors(console: Console, rows: Evaluations, title: str, *, labels: bool) -> None:
    """Print a table of MSEs, or of labels kept: codes in columns, numbers of stragglers in rows.

    The best of a row has a star. Replication recovers exact predictions or none: it has no error to
    compare. A code that lost predictions cannot win on an error that leaves them out.
    """
    found = {(row.stragglers, row.code): row for row in rows if labels or row.code != "replication"}
    laws, codes = ([*dict.fromkeys(names)] for names in zip(*found, strict=True))

    def value(row: Evaluation) -> float:
        """Return what is compared, the larger the better; NaN if it is not."""
        return row.rel_acc.mean if labels else np.nan if row.lost.mean > 0 else -row.mse.mean

    def cells(law: str) -> list[str]:
        values, texts = [value(found[law, code]) for code in codes], []
        for code, this in zip(codes, values, strict=True):
            text, row = "-", found[law, code]
            if labels and not np.isnan(row.rel_acc.mean):
                text = share_text(row.rel_acc)
            elif not labels and not np.isnan(row.mse.mean):
                text = f"{_number(row.mse.mean)} ±{_number(row.mse.half_width)}"
            best = this == np.nanmax([-np.inf, *values])
            texts.append(f"[bold green]{text}*[/bold green]" if best else text)
        return [law, *texts]

    print_table(console, title, ("S", *codes), map(cells, laws), left=0)


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
    if not 1e-3 <= abs(value) < 1e4:
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-")
    digits = max(0, 2 - int(np.floor(np.log10(abs(value)))))
    return f"{value:.{min(digits, 4)}f}"
