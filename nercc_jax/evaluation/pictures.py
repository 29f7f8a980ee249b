"""Pictures of evaluations, codes and plans; each system has the same colour and marker everywhere.

Each is one column of panels, to be read on a telephone (390 pixels wide) and in black and white:
curves differ in markers and line styles, too, and are named beside the panel, where they end.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:  # which takes a second to import, and only pictures need it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, and of Tol's muted ones where those are spent: colour-blind readers tell
# apart what stands in one picture. What loses predictions is dashed.
BLUE, SKY, PINK, WINE, PURPLE = "#0072b2", "#56b4e9", "#cc79a7", "#882255", "#aa4499"
RED, BROWN, ORANGE, OLIVE = "#d55e00", "#a05000", "#e69f00", "#999933"
GREEN, TEAL, INDIGO = "#009e73", "#44aa99", "#332288"
GREY, LIGHT, BLACK = "#555555", "#999999", "#000000"
OPEN, LOSSY = {"markerfacecolor": "white"}, {"linestyle": "--"}
DOTS, MIXED = {"linestyle": ":"}, {"linestyle": "-."}
WIDTH, FONT = 6.2, 11  # inches, and points: ten pixels where a picture is 390 wide

# Of one batch: data points, coded ones, those that are lost, and what is decoded.
DATA, CODED, LOST, FOUND = BLUE, GREEN, RED, PINK

# The look of each system: a colour, a marker, and further properties. Pages add their own.
LOOKS: dict[str, tuple[Any, ...]] = {
    "NeRCC": (BLUE, "o"),
    "NeRCC published": (SKY, "o", OPEN | MIXED),
    "NeRCC tuned": (PINK, "D"),
    "tuned": (PINK, "D"),
    "NeRCC learned": (WINE, "*"),
    "learned": (WINE, "*"),
    "BACC": (RED, "s", DOTS),
    "BACC tuned": (BROWN, "s", OPEN | DOTS),
    "BACC learned": (RED, "d", DOTS),
    "SBACC": (ORANGE, "^", OPEN | MIXED),
    "ApproxIFER": (ORANGE, "v", MIXED),
    "BSCC": (OLIVE, "h", MIXED),
    "BSCC tuned": (OLIVE, "h", OPEN | MIXED),
    "LCC": (GREEN, "^", DOTS),
    "ParM": (BLACK, "P", LOSSY),
    "ParM, k = 4": (BLACK, "p", LOSSY),
    "replication": (GREY, "x", LOSSY),
    "replication, else surrogate": (GREY, "+", LOSSY),
    "copies by the student's doubt": (TEAL, "x", LOSSY),
    "copies of the uncertain": (TEAL, "x", LOSSY),
    "scheme": (WINE, "*"),
    "scheme, uncertain again": (WINE, "X"),
    "known, else hedged": (WINE, "*", MIXED),
    "hedg": (OLIVE, "^", MIXED),
    "uncoded": (LIGHT, ".", DOTS),
}


def system_look(system: str) -> dict[str, Any]:
    """Return how a system is drawn: matplotlib's `color` and `marker`, and properties of its line.

    The longest known name that the system's name begins with decides: "ParM, k = 2" looks as "ParM"
    does. An unknown system is a black dot.
    """
    known = [name for name in LOOKS if system.startswith(name)]
    color, marker, *further = LOOKS[max(known, key=len)] if known else (BLACK, ".")
    return {"color": color, "marker": marker} | dict(*further)


class Curve(NamedTuple):
    """A line or a point of a panel, with intervals where `low` and `high` are given."""

    x: Any
    y: Any
    look: Mapping[str, Any]
    low: Any = None
    high: Any = None


def panel(
    axis: "Axes",
    curves: Mapping[str, Curve],
    xlabel: str,
    ylabel: str,
    title: str = "",
    *,
    scale: str = "linear",
    top: float = np.inf,
) -> None:
    """Draw curves by name, with their intervals; each is named at the height of its right end.

    What is NaN is left out, and on a logarithmic scale what is not positive. `top` is the panel's
    upper edge.
    """
    ends: dict[str, tuple[float, float]] = {}
    for name, curve in curves.items():
        x, y = np.asarray(curve.x, float), np.asarray(curve.y, float)
        y = np.where(y > 0, y, np.nan) if scale == "log" else y
        if np.isnan(y).all():
            continue
        low, high = (y if end is None else np.asarray(end, float) for end in curve[3:])
        bars = np.nan_to_num(np.maximum([y - low, high - y], 0))
        axis.errorbar(x, y, bars, capsize=2, lw=1.4, ms=6, label=name, **curve.look)
        last = int(np.flatnonzero(~np.isnan(y))[-1])
        ends[name] = float(x[last]), float(y[last])
    axis.set_yscale(scale, **({"linthresh": 0.1} if scale == "symlog" else {}))
    axis.set_xlabel(xlabel, fontsize=FONT)
    axis.set_ylabel(ylabel, fontsize=FONT)
    if title:
        axis.set_title(title, fontsize=FONT)
    axis.tick_params(labelsize=FONT)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.04)
    if np.isfinite(top):
        axis.set_ylim(top=top)

    # Names from the top down, next to each other where their ends are too near.
    axis.autoscale_view()
    to_axes = axis.transData + axis.transAxes.inverted()
    gap = 1.6 * FONT / 72 / max(axis.get_window_extent().height / axis.figure.dpi, 1.0)
    order = sorted(ends, key=lambda name: -ends[name][1])
    places = [float(np.clip(to_axes.transform(ends[name])[1], 0, 1)) for name in order]
    for number in range(1, len(places)):  # downwards, and up again from the bottom
        places[number] = min(places[number], places[number - 1] - gap)
    for number in reversed(range(len(places))):
        least = places[number + 1] + gap if number + 1 < len(places) else 0.0
        places[number] = max(places[number], least)
    for name, place in zip(order, places, strict=True):
        color = curves[name].look.get("color", BLACK)
        line = {"arrowstyle": "-", "color": color, "lw": 0.6, "relpos": (0.0, 0.5)}
        axis.annotate(
            name, ends[name], (1.05, place), textcoords="axes fraction", va="center",
            fontsize=FONT, annotation_clip=False, arrowprops=line,
        )  # fmt: skip


def straggler_figure(
    rows: Sequence[Any],
    panels: Mapping[str, tuple[str, bool]],
    title: str,
    above: Callable[[Any], Any] | None = None,
) -> "Figure":
    """Return a figure with a panel for each metric, with intervals, and for every seven codes.

    A metric has its label, and whether it is an error, on a logarithmic axis: a code without any is
    named in the title, and one that explodes leaves the panel by its upper edge. Any other is a
    share, whose intervals end at 0 and 1. Laws whose names are no numbers stand side by side. What
    `above` draws stands above the panels.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    every, laws = (
        [*dict.fromkeys(r.code for r in rows)],
        [*dict.fromkeys(r.stragglers for r in rows)],
    )
    parts = [every[start : start + 7] for start in range(0, len(every), 7)]
    drawn = [(metric, part) for metric in panels for part in parts]
    heights = [*([4.6] * (above is not None)), *(3.6 for _ in drawn)]
    figure = plt.figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    subfigures = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    if above is not None:
        above(subfigures[0])
    numbers = [float(law) for law in laws if re.fullmatch(r"\d+(\.\d*)?", law)]
    numbered = len({*numbers}) == len(laws)
    at = np.array(numbers) if numbered else np.arange(len(laws), dtype=float)
    apart = np.diff(np.sort(at)).min() if len(at) > 1 else 1.0
    for number, ((metric, codes), place) in enumerate(
        zip(drawn, subfigures[-len(drawn) :], strict=True)
    ):
        (label, is_error), axis, curves = panels[metric], place.subplots(), {}
        found = {c: [getattr(row, metric) for row in rows if row.code == c] for c in codes}
        means = {code: np.array([each.mean for each in found[code]]) for code in codes}
        tops = [most for each in means.values() if (most := np.nanmax([0, *each])) > 0]
        several = is_error and len(tops) > 1
        top = min(max(tops), 100 * float(np.median(tops))) * 2 if several else np.inf
        for shift, code in enumerate(codes):
            mean = means[code]
            low, high = np.array([each.interval(share=not is_error) for each in found[code]]).T
            low = np.maximum(low, 0.1 * mean) if is_error else low
            over = mean > top  # the line goes on to the first such place
            low, high = np.where(over, mean, low), np.where(over, mean, high)
            mean = np.where(np.cumsum(over) > 1, np.nan, mean)
            # Side by side: intervals would hide each other.
            x = at + 0.4 * apart * ((shift + 0.5) / len(codes) - 0.5)
            name = f"{code}, off the scale" if over.any() else code
            curves[name] = Curve(x, mean, system_look(code), low, high)
        without = [
            c for c in codes if not np.any(means[c] > 0 if is_error else ~np.isnan(means[c]))
        ]
        panel(axis, curves, "stragglers", label, scale="log" if is_error else "linear", top=top)
        if numbered:
            whole = MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10])
            axis.xaxis.set_major_locator(whole)  # no half stragglers
        else:
            axis.set_xticks(at, laws, rotation=20 if sum(map(len, laws)) > 40 else 0)
        if without:
            lost = f"no errors, or all lost: {', '.join(without)}"
            axis.set_title(lost, fontsize=FONT - 1, loc="left", color=GREY)
        if title and not number:
            place.suptitle(title, fontsize=FONT)
    return figure


def costs_figure(rows: Sequence[Any], title: str, into: Any) -> None:
    """Draw the labels that systems keep against their calls a query, each with its name.

    A row has `system`, `calls`, and `kept`, an `Estimate`.
    """
    curves = {}
    for row in rows:
        ends = [[100 * end] for end in row.kept.interval(share=True)]
        look = system_look(row.system) | {"linestyle": "none"}
        curves[row.system] = Curve([row.calls], [100 * row.kept.mean], look, *ends)
    panel(into.subplots(), curves, "calls of the model a query", "labels kept, %", title)


def tuning_figure(history: Sequence[Any], title: str) -> "Figure":
    """Return a picture of a tuning run: its objective, and its numbers, at each step."""
    from matplotlib.figure import Figure

    figure = Figure((WIDTH, 7.4), layout="constrained")
    first, second = figure.subplots(2, 1)
    looks = {
        "own groups": {"color": LIGHT},
        "held out": {"color": BLUE, "marker": "o"},
        "lambda_enc": {"color": GREEN},
        "lambda_dec": {"color": RED, "linestyle": "--"},
        "gap_exponent": {"color": PINK, "linestyle": ":"},
    }
    curves = {}
    for name, look in looks.items():
        values = {"own groups": "objective", "held out": "held_out"}.get(name)
        known = [
            (each.step, getattr(each, values) if values else each.parameters[name])
            for each in history
            if not values or getattr(each, values) is not None
        ]
        curves[name] = Curve(*np.array(known, float).reshape(-1, 2).T[:2], look=look)
    heights = {name: curves.pop(name) for name in ("own groups", "held out")}
    panel(first, heights, "step", "objective / the untuned code's", title)
    first.axhline(1, color=GREY, lw=0.8, ls="--")
    panel(second, curves, "step", "numbers (lambda_dec: all answer)", scale="log")
    return figure


def plan_figure(plan: Any, title: str, alike: float) -> "Figure":
    """Return the disagreement of a plan's candidates against their extra work.

    Of each system, candidates whose p99 exceeds the recommended one's by at most the share `alike`
    are drawn, also those that were only screened; codes of all layouts are one system.
    """
    from matplotlib.figure import Figure

    figure, best = Figure((WIDTH, 4.6), layout="constrained"), plan.recommended
    axis, limit = figure.subplots(), (1 + alike) * best.p99
    fronts: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(plan.candidates, key=lambda row: (row.extra_work, row.disagreement.mean)):
        system = "NeRCC" if row.points and "NeRCC" in row.system else row.system
        share, front = 100 * row.disagreement.mean, fronts.setdefault(system, [])
        # The least disagreement at each amount of extra work or less.
        if row.p99 <= limit and (not front or share < front[-1][1]):
            front.append((row.extra_work, share))
    curves = {
        system: Curve(*zip(*front, strict=True), look=system_look(system))
        for system, front in fronts.items()
        if front
    }
    axis.plot(best.extra_work, 100 * best.disagreement.mean, "k*", ms=15, mfc="none")
    bounds: dict[str, Any] = {"color": GREY, "lw": 0.8, "ls": "--"}
    axis.axhline(100 * plan.asked["max_disagreement"], **bounds)
    axis.axvline(plan.asked["max_extra_work"], **bounds)
    words = f"{title}: p99 of {1e3 * limit:.3g} ms or less\nstar: recommended; dashed: as asked"
    along = "extra work: calls beyond one a query, as a share"
    panel(axis, curves, along, "labels that differ, in %", words, scale="symlog")
    axis.set_ylim(bottom=-0.01)
    return figure
