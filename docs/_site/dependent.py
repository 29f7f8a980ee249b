"""Tables of docs/dependent.md: late rows, and what a server gives out for slow queries."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .results import load, mean_and_half_width, percent

Cell = Mapping[str, Any]


def late_groups() -> dict[tuple[str, str], list[Cell]]:
    """Return the runs with late rows by law and function."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in load("late_rows")["cells"]:
        groups.setdefault((cell["law"], cell["function"]), []).append(cell)
    return groups


def late_settings() -> str:
    """Return how many rows are late, by how much, and before how many workers."""
    found = load("late_rows")
    return (
        f"{found['rows']:,} rows of {found['seconds']:g} s on {found['workers']} sleeping "
        f"workers; a tenth takes {found['delay']:g} s more in the mean (`bench/run.py late_rows`). "
        f"{draws(late_groups().values())} draws of each; ± is half of the 95 % interval."
    )


def late_statistics() -> Iterator[dict[str, str]]:
    """Yield the biases of statistics without the late rows, and with predicted ones."""
    for (law, function), cells in late_groups().items():
        mean, tail = ([cell[name] for cell in cells] for name in ("bias", "tail"))
        yield {
            "late rows": law,
            "function": function,
            "bias of the mean peak: dropping": _signed(_of(mean, "dropping")),
            "predicting": _signed(_of(mean, "ours")),
            "of the share above the 95 % point, in points: dropping": _signed(
                100 * _of(tail, "dropping"), 1
            ),
            "predicting, in points": _signed(100 * _of(tail, "ours"), 1),
        }


def late_bars() -> Iterator[dict[str, str]]:
    """Yield how many error bars of late rows held, and how long each way took."""
    ways = ("dropping", "waiting", "hedging", "ours")
    for (law, function), cells in late_groups().items():
        held, barred = (_of(cells, name) for name in ("held", "barred"))
        share = held.sum() / barred.sum()
        _, half = mean_and_half_width((held - share * barred) / barred.mean())
        seconds = [cell["seconds"] for cell in cells]
        yield {
            "late rows": law,
            "function": function,
            "errors within their 90 % bars, %": f"{percent(share, half, 0)} of {barred.sum()}",
            "late rows without a bar": str(sum(_of(cells, "nothing"))),
            **{
                f"{'predicting' if way == 'ours' else way}, s": f"{np.mean(_of(seconds, way)):.0f}"
                for way in ways
            },
        }


def simulated() -> Iterator[dict[str, str]]:
    """Yield what was given out before simulated workers."""
    for case, cells in load("dependent")["after"].items():
        wrong, given, beyond = _given(cells)
        yield {
            "which queries are slow": case,
            "wrong": wrong,
            "given out": given,
            "wrong beyond the allowance at worst": beyond,
        }


def beyond_allowance() -> str:
    """Return the cases in which more was wrong than allowed."""
    wrong = {
        case: sum(_of(cells, "wrong")) / sum(_of(cells, "approximate"))
        for case, cells in load("dependent")["after"].items()
    }
    more = [f"{case} ({100 * wrong[case]:.1f} %)" for case in wrong if wrong[case] > allowed(case)]
    return (
        f"More answers were wrong than allowed in {len(more)} of {len(wrong)} cases: "
        f"{'; '.join(more)}."
    )


def allowed(case: str) -> float:
    """Return the share of approximate answers that may be wrong."""
    return 0.05 if case.startswith(("digits", "MNIST")) else 0.1


def served() -> Iterator[dict[str, str]]:
    """Yield what the server's process gave out to clients of HTTP."""
    for case, cells in load("dependent_server")["after"].items():
        share, number, worst = _given(cells)
        part = sum(_of(cells, "approximate")) / sum(_of(cells, "stragglers_met"))
        slow = np.sum([cell["of_slow"] for cell in cells], axis=0).tolist()
        yield {
            "which queries are slow": case,
            "wrong": share,
            "allowed": f"{100 * allowed(case):g} %",
            "given out a run": number,
            "of late calls": "" if "inverted" in case else f"{100 * part:.0f} %",
            "beyond the allowance at worst": worst,
            "wrong of the slow": f"{slow[1]} of {slow[0]}" if cells[0]["slow"] else "",
            "drifts": str(sum(map(_drifts, cells))),
            "p99, ms": f"{1000 * np.mean([cell['latency'][2] for cell in cells]):.0f}",
        }


def statistics() -> Iterator[dict[str, str]]:
    """Yield the biases of statistics over all of a server's answers, and their times."""
    for case, cells in load("dependent")["after"].items():
        if "bias" not in cells[0]:
            continue
        mean, tail = (
            {way: np.mean([cell["bias"][way][place] for cell in cells]) for way in ways}
            for place, ways in enumerate([("dropping", "ours")] * 2)
        )
        yield {
            "which queries are slow": case,
            "bias of the mean: dropping": f"{mean['dropping']:+.3f}",
            "the server's answers": f"{mean['ours']:+.3f}",
            "of the largest 5 %, in points: dropping": f"{100 * tail['dropping']:+.1f}",
            "the server's answers, in points": f"{100 * tail['ours']:+.1f}",
            "p95, ms": f"{1000 * np.mean([cell['latency'][1] for cell in cells]):.0f}",
            "p99, ms": f"{1000 * np.mean([cell['latency'][2] for cell in cells]):.0f}",
        }


def monitor() -> Iterator[dict[str, str]]:
    """Yield the test's false alarms, and the answers until it finds a broken promise."""
    for each in load("dependent")["monitor"]:
        yield {
            "promised": f"{100 * each['promised']:g} %",
            "days with a false alarm": f"{each['false_alarms']} of {each['days']}",
            **{
                f"answers until found, {times} times as wrong": f"{each['delay_' + times][0]:.0f}"
                for times in ("1.5", "2", "4")
            },
        }


def runs() -> str:
    """Return how many runs there are."""
    return (
        f"Each row has {draws(load('dependent')['after'].values())} runs with seeds of their own."
    )


def draws(groups: Iterable[Sequence[Cell]]) -> str:
    """Return how many runs the rows of a table have."""
    numbers = sorted({len(cells) for cells in groups})
    return " to ".join(map(str, sorted({numbers[0], numbers[-1]})))


def _given(cells: Sequence[Cell]) -> tuple[str, str, str]:
    """Return the share that was wrong, the number given out in a run, and the worst excess."""
    given, wrong = (sum(_of(cells, name)) for name in ("approximate", "wrong"))
    share = f"{100 * wrong / given:.1f} % ({wrong} of {given})" if given else "nothing given out"
    return share, f"{given / len(cells):.0f}", f"{max(_of(cells, 'worst_beyond')):.1f}"


def _drifts(cell: Cell) -> int:
    """Return how often a server said that more was wrong than promised."""
    predictor, decoding = cell["predictor"], cell.get("stragglers") or {"drifts": 0}
    return decoding["drifts"] if predictor is None else predictor["drifts"]


def _of(cells: Sequence[Cell], name: str) -> np.ndarray:
    return np.array([cell[name] for cell in cells])


def _signed(values: np.ndarray, digits: int = 3) -> str:
    middle, half = mean_and_half_width(values)
    return f"{middle:+.{digits}f} ± {half:.{digits}f}"
