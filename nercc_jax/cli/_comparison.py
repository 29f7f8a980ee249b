"""Codes compared at each number of stragglers, as `nercc demo` and `nercc tune` do."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..evaluation import Estimate, Evaluation
from ..evaluation._evaluation import SHARES
from ..stragglers import AbstractStragglers, ExactStragglers
from ._output import make_table


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


@contextlib.contextmanager
def evaluating(console: Console) -> Iterator[Callable[[Iterable], Iterable]]:
    """Show the progress of `evaluate`: the models' calls, which compile, then straggler sets."""
    begin = time.monotonic()
    status: Any = console.status("the model's calls: compiling, then data points ...")
    status.start()

    def bar(pairs: Iterable) -> Iterable:
        status.stop()
        seconds = time.monotonic() - begin
        console.print(f"compiled the model's calls and made them: {seconds:.1f} s", style="dim")
        return track(pairs, description="straggler sets", console=console)

    try:
        yield bar
    finally:
        status.stop()


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
