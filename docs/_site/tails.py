"""Tables of docs/tails.md: the tails of what the server picks, and of rivals in their best form."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .results import strong

Cell = Mapping[str, Any]

BUDGETS = (1.1, 1.35)  # calls a query
OURS = {"lenet5": "LeNet5", "repvgg": "RepVGG", "lotka-volterra": "Lotka-Volterra"}
_ANY, _TWICE = "any model", "two at once, 1.2 x median"
_RIVALS = {
    "hedging, tuned": "least loaded, hedged",
    "power of two, hedged": "power of two, hedged",
    "Prequal, hedged": "Prequal, hedged",
}
_LAWS = ("5 %", "slow workers", "slow rack", "hard queries")
_SERVICE_MS = 50.0  # the median of a service time
_ROUNDING = 0.005  # calls beyond a budget that do not count


def places(cells: Mapping[str, Cell]) -> Iterable[str]:
    """Return the laws of straggling and service times for which there are rivals."""
    found = {name.split("/")[1] for name in cells if name.startswith(_ANY)}
    return sorted(found, key=lambda place: (_LAWS.index(place.rsplit(", ", 1)[0]), place))


def tail(cell: Cell, key: str = "p999_ms") -> float:
    """Return the median p99.9 over seeds, or p99.99, in medians of a service time."""
    return cell[key][0] / _SERVICE_MS


def _exact(cells: Mapping[str, Cell], place: str, budget: float) -> dict[str, Cell]:
    names = {shown: f"{name}, {budget:g} calls" for shown, name in _RIVALS.items()}
    names = {"two at once": _TWICE} | names
    found = {shown: cells.get(f"{_ANY}/{place}/{name}") for shown, name in names.items()}
    return {shown: cell for shown, cell in found.items() if cell is not None}


def _ours(cells: Mapping[str, Cell], place: str, budget: float) -> dict[str, Cell]:
    found = {w: cells.get(f"{work}/{place}/picked, {budget:g} calls") for work, w in OURS.items()}
    return {work: cell for work, cell in found.items() if cell is not None}


def comparison(
    cells: Mapping[str, Cell], budget: float, key: str = "p999_ms"
) -> Iterator[dict[str, str]]:
    """Yield each law's p99.9 and calls, or p99.99 where it was measured.

    The shortest tail of exact answers in the budget stands out, and each of ours that is shorter.
    """
    cells = {name: cell for name, cell in cells.items() if key in cell}
    for place in places(cells):
        exact, ours = _exact(cells, place, budget), _ours(cells, place, budget)
        if not ours:
            continue
        law, service = place.rsplit(", ", 1)
        best = _best(exact, budget, key)
        shortest = {name for name in ours if tail(ours[name], key) < tail(best, key)}
        yield {"straggling": law, "service times": service} | {
            name: _shown(cell, key, stands_out=cell is best or name in shortest)
            for name, cell in (exact | ours).items()
        }


def _best(exact: Mapping[str, Cell], budget: float, key: str = "p999_ms") -> Cell:
    allowed = [cell for cell in exact.values() if cell["calls"] <= budget + _ROUNDING]
    return min(allowed, key=lambda cell: tail(cell, key))


def _shown(cell: Cell, key: str, *, stands_out: bool) -> str:
    labels = f", {100 * cell['right']:.1f} %" if cell["right"] < 1 else ""
    text = f"{tail(cell, key):.2f} at {cell['calls']:.2f}{labels}"
    return strong(text) if stands_out else text


def sentences(cells: Mapping[str, Cell]) -> str:
    """Return who wins where, as a list in Markdown."""
    found = [each for budget in BUDGETS for each in _verdicts(cells, budget)]
    found += [_own_hedging(cells, BUDGETS[0]), _silent(cells, BUDGETS[0])]
    return "\n".join(f"- {each}" for each in found)


def _silent(cells: Mapping[str, Cell], budget: float) -> str:
    """Return how often a surrogate was never sure enough to answer."""
    runs = [
        (work, run["predicted"] == 0)
        for place in places(cells)
        for work, cell in _ours(cells, place, budget).items()
        for run in cell["seeds"].values()
    ]
    counts = (
        f"{sum(silent for each, silent in runs if each == work)} of "
        f"{sum(each == work for each, _ in runs)} for {work}"
        for work in OURS.values()
    )
    return (
        f"Runs in which the surrogate was sure of nothing, and all was hedged: {', '.join(counts)}."
    )


def _own_hedging(cells: Mapping[str, Cell], budget: float) -> str:
    """Return how much longer the tail is where the server picks how to hedge."""
    pairs = {
        place: (cells[f"{_ANY}/{place}/hedging picked, {budget:g} calls"], exact["hedging, tuned"])
        for place in places(cells)
        if (exact := _exact(cells, place, budget))
    }
    place, (own, tuned) = max(pairs.items(), key=lambda each: tail(each[1][0]) / tail(each[1][1]))
    worse = sum(tail(own) > 1.05 * tail(tuned) for own, tuned in pairs.values())
    return (
        f"Where nothing is known, `--max-calls {budget:g}` hedges worse than tuned hedging in "
        f"{worse} of {len(pairs)} laws; at most {tail(own):.2f} against {tail(tuned):.2f}, {place}."
    )


def _verdicts(cells: Mapping[str, Cell], budget: float) -> Iterator[str]:
    pairs = [
        (f"{work} ({place})", ours, _best(exact, budget), exact["two at once"])
        for place in places(cells)
        if (exact := _exact(cells, place, budget))
        for work, ours in _ours(cells, place, budget).items()
    ]
    longer = [name for name, ours, best, _ in pairs if tail(ours) >= tail(best)]
    several = [(ours, best) for _, ours, best, _ in pairs if len(ours["seeds"]) > 1]
    clear = sum(ours["p999_ms"][2] < best["p999_ms"][1] for ours, best in several)
    third = sum(tail(ours) <= tail(best) * 2 / 3 for _, ours, best, _ in pairs)
    yield (
        f"Within {budget:g} calls, ours is the shortest in {len(pairs) - len(longer)} of "
        f"{len(pairs)} cells, in {third} by a third or more; beyond the spread over seeds in "
        f"{clear} of the {len(several)} with several. A rival is shorter {_named(longer)}"
    )
    if budget == min(BUDGETS):
        twice = [name for name, ours, _, two in pairs if tail(two) < tail(ours)]
        yield f"Two copies at once, whatever they cost, are shorter {_named(twice)}"


def _named(where: list[str]) -> str:
    return f"for {'; '.join(where)}." if where else "nowhere."


def longest(cells: Mapping[str, Cell]) -> str:
    """Return p99.99 over p50, and calls, where it was measured with constant service times."""
    found: dict[str, list[str]] = {}
    for name, cell in cells.items():
        if "p9999_ms" in cell:
            place, system = name.rsplit("/", 1)
            number = cell["p9999_ms"] / cell["p50_ms"][0]
            where = f"{place.replace('/', ', ')}, {int(cell['queries']):,} queries"
            found.setdefault(where, []).append(f"{system} {number:.2f} at {cell['calls']:.2f}")
    return "\n".join(f"- p99.99 for {where}: {'; '.join(each)}." for where, each in found.items())


def every(cells: Mapping[str, Cell]) -> Iterator[dict[str, str]]:
    """Yield all that was measured."""
    for name, cell in cells.items():
        yield (
            {"cell": name, "seeds": str(len(cell["seeds"]))}
            | {
                f"{words}, ms": f"{cell[key][0]:.0f} [{cell[key][1]:.0f}, {cell[key][2]:.0f}]"
                for words, key in (("p50", "p50_ms"), ("p99", "p99_ms"), ("p99.9", "p999_ms"))
            }
            | {
                "p99.99, ms": f"{cell['p9999_ms'][0]:.0f}" if "p9999_ms" in cell else "",
                "calls": f"{cell['calls']:.3f}",
                "right, %": f"{100 * cell['right']:.2f}",
            }
        )


def described(cells: Mapping[str, Cell]) -> str:
    """Return how many seeds and queries there are."""
    seeds = sorted({len(cell["seeds"]) for cell in cells.values()})
    judged = sorted({each["queries"] for c in cells.values() for each in c["seeds"].values()})
    return (
        f"Medians over {' or '.join(map(str, seeds))} seeds of arrivals, service times and faults, "
        f"{' or '.join(f'{number:,}' for number in judged)} judged queries each."
    )


def minutes(found: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Yield what each system made of an open loop of minutes."""
    for row in found["rows"]:
        yield {
            "system": row["system"],
            "p50, ms": f"{row['p50_ms']:.0f}",
            "p99, ms": f"{row['p99_ms']:.0f}",
            "p99.9, ms": f"{row['p999_ms']:.0f}",
            "p99 / p50": f"{row['p99_by_p50']:.2f}",
            "p99 of the worst second, ms": f"{1e3 * row['worst_second_p99_s']:.0f}",
            "labels right": f"{100 * row['right']:.2f} %",
            "failed": str(sum(row["errors"].values())),
        }
