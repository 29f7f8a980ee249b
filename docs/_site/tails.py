"""Tables of docs/tails.md: the tails of what the server picks, and of rivals in their best form."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter, ScalarFormatter

from .looks import system_look
from .results import WIDTH, strong

Cell = Mapping[str, Any]
Cells = Mapping[tuple[str, ...], Mapping[str, Cell]]

BUDGETS = (1.1, 1.35)  # calls a query
OURS = {"lenet5": "LeNet5", "repvgg": "RepVGG", "vit": "ViT", "lotka-volterra": "Lotka-Volterra"}
_ANY, _TWICE = "any model", "two at once, 1.2 x median"
_RIVALS = {
    "hedging, tuned": "least loaded, hedged",
    "power of two, hedged": "power of two, hedged",
    "Prequal, hedged": "Prequal, hedged",
}
_LAWS = ("5 %", "slow workers", "slow rack", "hard queries")
_SERVICE_MS = 50.0  # the median of a service time
_ROUNDING = 0.005  # calls beyond a budget that do not count

# With constant service times: the systems in order, and what is served.
_HEDGED = ("hedged, p95", "hedged, p90", "hedged, 1.35 x median")
_PICKED, _MORE = "picked, 1.1 calls", "picked, 1.35 calls"
_BY_HAND = ("known, else hedged", "known, uncertain twice")
_SYSTEMS = (
    "no copies", *_HEDGED, "two copies", "ParM, k = 2", "ParM, k = 4", "BACC (12, 8)",
    "NeRCC (6, 4)", "NeRCC (8, 4)", "surrogate alone", *_BY_HAND, _PICKED, _MORE,
)  # fmt: skip
WORKS = {
    "lenet5": "LeNet5 on MNIST, with a learner of the traffic",
    "repvgg": "RepVGG on CIFAR-10, with its student",
    "vit": "Vision Transformer on CIFAR-10, with its student",
    "lotka-volterra": "Lotka-Volterra's equations within 5 % of the spread, with a learner",
}


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
    cells: Mapping[str, Cell], budget: float, key: str = "p999_ms", services: str = ""
) -> Iterator[dict[str, str]]:
    """Yield each law's p99.9 and calls, or p99.99 where it was measured, of all or some services.

    The shortest tail of exact answers in the budget stands out, and each of ours that is shorter.
    """
    cells = {name: cell for name, cell in cells.items() if key in cell}
    for place in places(cells):
        exact, ours = _exact(cells, place, budget), _ours(cells, place, budget)
        law, service = place.rsplit(", ", 1)
        if not ours or (services and service not in services.split(", ")):
            continue
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


def sentences(cells: Mapping[str, Cell], all_budgets: bool = False) -> Iterator[str]:
    """Yield who wins where within the least budget; with `all_budgets`, also within others."""
    first, *rest = _verdicts(cells, BUDGETS[0], names=all_budgets)
    yield first
    yield _own_hedging(cells, BUDGETS[0])
    if all_budgets:
        yield from rest
        yield from _verdicts(cells, BUDGETS[1], names=True)
        yield _silent(cells, BUDGETS[0])


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
        "Runs in which the surrogate answered nothing, and all late queries were hedged: "
        f"{', '.join(counts)}."
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
        f"Without a surrogate, `--max-calls {budget:g}` hedges worse than tuned hedging in {worse} "
        f"of {len(pairs)} laws: at worst p99.9 is {tail(own):.2f} instead of {tail(tuned):.2f} "
        f"({place})."
    )


def _verdicts(cells: Mapping[str, Cell], budget: float, *, names: bool) -> Iterator[str]:
    def named(where: list[str]) -> str:
        return (
            f"for {'; '.join(where) or 'none'}."
            if names
            else f"in {len(where)} of the {len(pairs)} cells."
        )

    pairs = [
        (f"{work} ({place})", ours, _best(exact, budget), exact["two at once"])
        for place in places(cells)
        if (exact := _exact(cells, place, budget))
        for work, ours in _ours(cells, place, budget).items()
    ]
    longer = [name for name, ours, best, _ in pairs if tail(ours) >= tail(best)]
    dearer = [name for name, ours, *_ in pairs if ours["calls"] > budget + _ROUNDING]
    shortest = len(pairs) - len({*longer, *dearer})
    more = f" Ours sends more calls {named(dearer)}" if dearer else ""
    several = [(ours, best) for _, ours, best, _ in pairs if len(ours["seeds"]) > 1]
    clear = sum(ours["p999_ms"][2] < best["p999_ms"][1] for ours, best in several)
    third = sum(tail(ours) <= tail(best) * 2 / 3 for _, ours, best, _ in pairs)
    yield (
        f"Within {budget:g} calls a query, ours has the shortest tail in {shortest} of "
        f"{len(pairs)} cells, by a third or more in {third}. A rival's tail is shorter "
        f"{named(longer)}{more} Of {len(several)} cells with several seeds, the gap exceeds the "
        f"spread over seeds in {clear}."
    )
    if budget == min(BUDGETS):
        twice = [name for name, ours, _, two in pairs if tail(two) < tail(ours)]
        yield f"Two copies at once, at any number of calls, have a shorter tail {named(twice)}"


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
        f"Figures are medians over {min(seeds)} to {max(seeds)} seeds of arrivals, service times "
        f"and faults, with {' or '.join(f'{number:,}' for number in judged)} queries each."
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


def constant(found: Mapping[str, Cell]) -> Cells:
    """Return the cells with constant service times, by work and law, then by system."""
    cells: dict[tuple[str, ...], dict[str, Cell]] = {}
    for name, cell in found.items():
        *where, system = name.split("/")
        cells.setdefault(tuple(where), {})[system] = cell
    places = sorted(cells, key=lambda where: list(WORKS).index(where[0]))
    return {w: {s: cells[w][s] for s in _SYSTEMS if s in cells[w]} for w in places}


def best_of_each(cells: Cells) -> Iterator[dict[str, str]]:
    """Yield the tail of what is picked, and of the best rival of each kind."""
    for (work, law), found in cells.items():
        if _PICKED in found:
            yield {
                "work and law": f"{work}, {law}",
                "hedged, best of three": _shortest(found, _HEDGED),
                "two copies": _shortest(found, ["two copies"]),
                _PICKED: _shortest(found, [_PICKED]),
                "labels right": f"{100 * found[_PICKED]['right']:.2f} %",
                _MORE: _shortest(found, [_MORE]),
                "by hand": _shortest(found, _BY_HAND),
            }


def _shortest(found: Mapping[str, Cell], names: Iterable[str]) -> str:
    some = [found[name] for name in names if name in found]
    return _tail_and_calls(min(some, key=lambda c: c["p999_by_p50"][0])) if some else ""


def _tail_and_calls(cell: Cell) -> str:
    return f"{cell['p999_by_p50'][0]:.2f} at {cell['calls']:.2f}"


def shorter_rivals(cells: Cells) -> str:
    """Return the exact rivals whose tail is shorter than that of what is picked."""
    shorter = [
        f"{name} for {'/'.join(where)} (p99.9 of {_tail_and_calls(found[name])})"
        for where, found in cells.items()
        if _PICKED in found
        for name in (*_HEDGED, "two copies")
        if name in found and found[name]["p999_by_p50"][2] < found[_PICKED]["p999_by_p50"][1]
    ]
    return (
        f"Exact rivals with a p99.9 below that of *{_PICKED}*, beyond the intervals: "
        f"{'; '.join(shorter) or 'none'}."
    )


def picture(cells: Cells) -> None:
    """Draw p99.9 against calls, a panel for each work and law."""
    columns = 3
    lines = -(-len(cells) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(WIDTH, 2.3 * lines + 1.2), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(cells) :]:
        axis.axis("off")
    shown: dict[str, Any] = {}
    for axis, ((work, law), found) in zip(axes.flat, cells.items(), strict=False):
        for name, cell in found.items():
            look: dict[str, Any] = system_look(name) | {"linestyle": "none"}
            now, low, high = cell["p999_by_p50"]
            axis.plot([cell["calls"]] * 2, [low, high], color=look["color"], lw=1, alpha=0.6)
            size = 8 if name in (_PICKED, _MORE, *_BY_HAND) else 5
            (shown[name],) = axis.plot(cell["calls"], now, markersize=size, **look)
        axis.set_title(f"{work}: {law}")
        axis.set_yscale("log")
        axis.set_yticks([1, 2, 4, 8, 16, 32])
        axis.set_ylim(0.95, 1.2 * max(cell["p999_by_p50"][0] for cell in found.values()))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_xlim(min(0.95, *(cell["calls"] - 0.05 for cell in found.values())), 2.1)
        axis.grid(alpha=0.25)
    for axis in axes[-1]:
        axis.set_xlabel("calls for each query")
    figure.supylabel("p99.9 / p50")
    names = [name for name in _SYSTEMS if name in shown]
    figure.legend([shown[n] for n in names], names, ncols=4, loc="outside lower center")


def setting(about: Mapping[str, Any], cells: Cells) -> str:
    """Return the workers, the load, and how many queries are judged."""
    load = about["load"]
    judged = sorted({cell["queries"] for found in cells.values() for cell in found.values()})
    return (
        f"{load['workers']} workers; a call takes {1000 * load['base']:.0f} ms; single queries "
        f"arrive as a Poisson stream of {load['rate']:.0f} a second "
        f"({100 * load['rate'] * load['base'] / load['workers']:.0f} % of capacity); "
        f"{' or '.join(f'{number:,}' for number in judged)} queries count, after "
        f"{about['warm_up']:,} to learn from."
    )


def row(name: str, cell: Cell) -> dict[str, str]:
    """Return all that was measured of a cell with constant service times."""

    def of(key: str) -> str:
        now, low, high = cell[key]
        return f"{now:.2f} [{low:.2f},\u00a0{high:.2f}]"

    return {
        "": name,
        "p50, ms": f"{cell['p50_ms'][0]:.1f}",
        "p99 / p50": of("p99_by_p50"),
        "p99.9 / p50": of("p999_by_p50"),
        "calls": f"{cell['calls']:.3f}",
        "right, %": f"{100 * cell['right']:.2f}",
        "predicted, %": f"{100 * cell['predicted']:.1f}",
        "decoded, %": f"{100 * cell['decoded']:.1f}",
        "audited: wrong": f"{cell['audited']}: {cell['audited_other']}",
        "drifts": str(cell["drifts"]),
        "lost": str(cell["lost"]),
    }


_QUANTILES = ("p50_ms", "p99_ms", "p999_ms")


def _ratios(found: Mapping[str, Mapping[str, Cell]]) -> Iterator[tuple[str, str, dict[str, float]]]:
    for workers in ("threads", "ray"):
        for name, cell in found.get(workers, {}).items():
            simulated = found["paper"][name]
            yield workers, name, {key: cell[key][0] / simulated[key][0] for key in _QUANTILES}


def agreement(found: Mapping[str, Mapping[str, Cell]]) -> str:
    """Return how near the tails before real workers are to the simulated ones."""
    ratios = list(_ratios(found))
    close = {k: sum(abs(each[k] - 1) <= 0.15 for *_, each in ratios) for k in _QUANTILES}
    threads, ray = (
        max(each["p999_ms"] for workers, name, each in ratios if workers == w and _PICKED in name)
        for w in ("threads", "ray")
    )
    return (
        "Real and simulated differ by at most 15 % in "
        f"{close['p99_ms']} (p99) and {close['p999_ms']} (p99.9) of {len(ratios)} cells. "
        f"The p99.9 of *picked* is up to {threads:.2f} times the simulated one with threads, "
        f"and {ray:.2f} times with Ray actors."
    )


def real_workers(found: Mapping[str, Mapping[str, Cell]]) -> Iterator[dict[str, str]]:
    """Yield latencies before real workers, and before simulated ones."""
    for workers, name, ratios in _ratios(found):
        real, simulated = found[workers][name], found["paper"][name]
        yield {"workers": workers, "cell": name, "queries": str(real["queries"])} | {
            key.removesuffix("_ms"): f"{real[key][0]:.0f} / {simulated[key][0]:.0f} ({ratio:.2f})"
            for key, ratio in ratios.items()
        }
