"""Pictures of evaluations, codes and plans; each system has the same colour and marker everywhere.

Colours are never alone: lines have markers and styles, too, and are named.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

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

# Of one batch: data points, coded ones, those that are lost, and what is decoded.
DATA, CODED, LOST, FOUND = BLUE, GREEN, RED, PINK

# The look of each system: a colour, a marker, and further properties. Pages add their own.
LOOKS: dict[str, tuple[Any, ...]] = {
    "NeRCC": (BLUE, "o"),
    "NeRCC published": (SKY, "o", OPEN),
    "NeRCC tuned": (PINK, "D"),
    "tuned": (PINK, "D"),
    "NeRCC learned": (WINE, "*"),
    "BACC": (RED, "s"),
    "BACC tuned": (BROWN, "s", OPEN),
    "BACC learned": (RED, "d"),
    "SBACC": (ORANGE, "^", OPEN),
    "ApproxIFER": (ORANGE, "v"),
    "BSCC": (OLIVE, "h"),
    "BSCC tuned": (OLIVE, "h", OPEN),
    "LCC": (GREEN, "^"),
    "ParM": (BLACK, "P", LOSSY),
    "ParM, k = 4": (BLACK, "p", LOSSY),
    "replication": (GREY, "x", LOSSY),
    "replication, else surrogate": (GREY, "+", LOSSY),
    "copies by the student's doubt": (TEAL, "x", LOSSY),
    "copies of the uncertain": (TEAL, "x", LOSSY),
    "scheme": (WINE, "*"),
    "scheme, uncertain again": (WINE, "X"),
    "known, else hedged": (WINE, "*"),
    "hedg": (OLIVE, "^"),
    "uncoded": (LIGHT, "."),
}


def system_look(system: str) -> dict[str, Any]:
    """Return how a system is drawn: matplotlib's `color` and `marker`, and properties of its line.

    The longest known name that the system's name begins with decides: "ParM, k = 2" looks as "ParM"
    does. An unknown system is a black dot.
    """
    known = [name for name in LOOKS if system.startswith(name)]
    color, marker, *further = LOOKS[max(known, key=len)] if known else (BLACK, ".")
    return {"color": color, "marker": marker} | dict(*further)


def straggler_figure(
    rows: Sequence[Any],
    panels: Mapping[str, tuple[str, bool]],
    title: str,
    above: Sequence[Callable[[Any], Any]] = (),
) -> "Figure":
    """Return a figure with a panel for each metric, with intervals.

    A metric has its label, and whether its axis is logarithmic. Each function of `above` draws into
    a part of the figure above the panels; these stand side by side.
    """
    import matplotlib.pyplot as plt

    lines, width = 1 + bool(above), 6.2 * max(len(panels), len(above))
    figure = plt.figure(figsize=(width, 4.4 * lines), layout="constrained")
    parts = figure.subfigures(lines, 1, squeeze=False)[:, 0]
    if above:
        tops = parts[0].subfigures(1, len(above), squeeze=False)[0]
        for part, draw in zip(tops, above, strict=True):
            draw(part)
    axes = parts[-1].subplots(1, len(panels), squeeze=False)[0]
    for axis, (metric, (label, logarithmic)) in zip(axes, panels.items(), strict=True):
        straggler_curves(axis, rows, metric, label, logarithmic=logarithmic)
    parts[-1].suptitle(title, fontsize=10)
    return figure


def straggler_curves(
    axis: "Axes", rows: Sequence[Any], metric: str, label: str, *, logarithmic: bool
) -> None:
    """Draw one metric of each code against the number of stragglers, with intervals.

    Laws whose names are no numbers stand side by side, in their order. The legend has the curves in
    the order of their right ends. A logarithmic metric is an error: a code without any is named in
    the title and not drawn, and one that explodes leaves the panel by its upper edge. Any other
    metric is a share, whose intervals end at 0 and 1.
    """
    from matplotlib.ticker import MaxNLocator

    laws = [*dict.fromkeys(row.stragglers for row in rows)]
    codes = [*dict.fromkeys(row.code for row in rows)]
    places = np.arange(len(laws), dtype=float)
    numbers = [float(law) for law in laws if re.fullmatch(r"\d+(\.\d*)?", law)]
    numbered = len({*numbers}) == len(laws)
    if numbered:
        places = np.array(numbers)
    apart = np.diff(np.sort(places)).min() if len(places) > 1 else 1.0
    top = np.inf  # the panel's upper edge: a code that explodes leaves others room
    if logarithmic:
        each = ([getattr(row, metric).mean for row in rows if row.code == code] for code in codes)
        tops = [most for means in each if (most := np.nanmax([0, *means])) > 0]
        top = min(max(tops), 100 * float(np.median(tops))) * 2 if len(tops) > 1 else np.inf
    ends: dict[str, float] = {}
    for number, code in enumerate(codes):
        estimates = [getattr(row, metric) for row in rows if row.code == code]
        mean = np.array([e.mean for e in estimates])
        half = np.nan_to_num([e.half_width for e in estimates])
        if logarithmic:
            mean = np.where(mean > 0, mean, np.nan)
            below, above = np.minimum(half, 0.9 * mean), half
        else:
            ends_of = np.array([e.interval(share=True) for e in estimates])
            below, above = mean - ends_of[:, 0], ends_of[:, 1] - mean  # NaN of a single set
        if np.isnan(mean).all():
            continue
        # Side by side: intervals would hide each other.
        dodged = places + 0.4 * apart * ((number + 0.5) / len(codes) - 0.5)
        bars = np.nan_to_num(np.maximum([below, above], 0))
        over = mean > top
        bars[:, over] = 0
        mean = np.where(np.cumsum(over) > 1, np.nan, mean)  # the line goes on to the first
        name = f"{code}, off the scale" if over.any() else code
        axis.errorbar(dodged, mean, bars, capsize=2, lw=1.4, ms=4, label=name, **system_look(code))
        ends[code] = float(mean[~np.isnan(mean)][-1])
    axis.set(xlabel="stragglers", ylabel=label, yscale="log" if logarithmic else "linear")
    if numbered:
        whole = MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10])
        axis.xaxis.set_major_locator(whole)  # no half stragglers
    else:
        axis.set_xticks(places, laws, rotation=20 if sum(map(len, laws)) > 40 else 0)
    if np.isfinite(top):
        axis.set_ylim(top=top)
    axis.margins(x=0.03)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if without := ", ".join(code for code in codes if code not in ends):
        axis.set_title(
            f"no errors, or all lost: {without}", fontsize=9, loc="left", color="#555555"
        )
    if ends:
        handles, names = axis.get_legend_handles_labels()
        down = sorted(range(len(names)), key=lambda i: [*ends.values()][i], reverse=True)
        axis.legend(
            [handles[i] for i in down], [names[i] for i in down],
            loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9,
        )  # fmt: skip


def batch_figure(
    images: np.ndarray,
    coded: np.ndarray,
    available: np.ndarray,
    decoded: Sequence[Any],
    own: Sequence[Any],
    into: Any = None,
) -> "Figure":
    """Draw K images, the N mixtures that workers get, with lost ones crossed out, and K labels.

    Images are (K, height, width) in grey, or (K, height, width, 3). Decoded labels are drawn as
    text, the model's own where they differ. It draws into a part of another figure if given.
    """
    import matplotlib.pyplot as plt

    count, workers = len(images), len(coded)
    columns = max((workers + 1) // 2, count, 10)
    figure = into or plt.figure(figsize=(8.2, 5.6))
    wide = figure.bbox.width / figure.bbox.height
    scale = figure.bbox.width / figure.dpi / 8.2  # of the letters
    size, low, high = 0.92 / columns, images.min(), images.max()

    def cell(number: int, of: int, height: float, colour: str) -> "Axes":
        """Return one of a row's cells, in the middle of the figure."""
        left = 0.04 + ((columns - of) / 2 + number) * size
        axis = figure.add_axes((left, height, 0.92 * size, 0.92 * size * wide))
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set(edgecolor=colour, linewidth=2)
        return axis

    half = (workers + 1) // 2
    cells = [cell(number, count, 0.775, DATA) for number in range(count)]
    for number, there in enumerate(available):
        row, column = divmod(number, half)
        axis = cell(column, half, (0.485, 0.305)[row], CODED if there else LOST)
        for ends in [] if there else [(0, 1), (1, 0)]:
            axis.plot([0, 1], ends, color=LOST, lw=2.5, transform=axis.transAxes)
        cells.append(axis)
    for axis, image in zip(cells, [*images, *coded], strict=True):
        shown = np.clip((image - low) / max(high - low, 1e-12), 0, 1)
        axis.imshow(shown, cmap="gray_r", vmin=0, vmax=1)
    same = [label == true for label, true in zip(decoded, own, strict=True)]
    for number, kept in enumerate(same):
        axis = cell(number, count, 0.06, FOUND if kept else LOST)
        axis.text(
            0.5, 0.5, str(decoded[number]), size=scale * min(22, 220 / columns), ha="center",
            va="center", color="black" if kept else LOST, transform=axis.transAxes,
        )  # fmt: skip
        if not kept:
            axis.set_xlabel(f"model: {own[number]}", color=LOST, size=9 * scale)
    lost = int(np.sum(~available))
    for text, height in (
        (f"{count} images", 0.94),
        (f"{workers} coded images, one a worker; {lost} workers straggle", 0.655),
        (
            f"{count} labels, from the {workers - lost} answers that came: "
            f"{'all' if all(same) else sum(same)} as the model's own",
            0.235,
        ),
    ):
        figure.text(0.5, height, text, ha="center", va="center", size=max(12 * scale, 9))
    return figure


def costs_figure(rows: Sequence[Any], title: str, into: Any) -> None:
    """Draw the labels that systems keep against their calls a query, each with its name.

    A row has `system`, `look`, `calls`, and `kept`, an `Estimate`.
    """
    axis = into.subplots()
    cheap = sorted((row for row in rows if row.calls < 1.75), key=lambda row: row.calls)
    dear = sorted((row for row in rows if row.calls >= 1.75), key=lambda row: row.kept.mean)
    for row in rows:
        low, high = (100 * end for end in row.kept.interval(share=True))
        here = row.calls, 100 * row.kept.mean
        ends = [[max(here[1] - low, 0)], [max(high - here[1], 0)]]
        look: dict[str, Any] = system_look(row.look) | {"linestyle": "none"}
        axis.errorbar(*here, ends, ms=8, capsize=2, **look)
        name: dict[str, Any] = {"xytext": (12, 0), "textcoords": "offset points"}
        if here[1] > 95:
            # Stepwise below, on the side with room: no name meets another's, nor its line.
            line = {"arrowstyle": "-", "color": look["color"], "lw": 0.6}
            side = cheap if row in cheap else dear
            place = here[0] + (0.02 if side is cheap else -0.06), 0.3 + 0.12 * side.index(row)
            name = {"xytext": place, "textcoords": axis.get_xaxis_transform()}
            name |= {"ha": "left" if side is cheap else "right"}
            name["arrowprops"] = line | {"relpos": (0 if side is cheap else 1, 0.5)}
        axis.annotate(row.system, here, va="center", color=look["color"], fontsize=9, **name)
    axis.set(xlabel="calls of the model a query", ylabel="labels kept, %")
    axis.margins(x=0.05, y=0.08)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(title, fontsize=10)


def layouts_figure(candidates: Sequence[Any], title: str) -> "Figure":
    """Return a bar for each layout's best code, its share of labels that differ."""
    from matplotlib.figure import Figure

    shown = candidates[::-1]
    figure = Figure((7, 1 + 0.35 * len(shown)), layout="constrained")
    axis = figure.subplots()
    colours = [system_look(f"NeRCC{' tuned' * each.tuned}")["color"] for each in shown]
    names = [each.layout + ", tuned" * each.tuned for each in shown]
    axis.barh(names, [100 * each.disagreement for each in shown], color=colours)
    axis.set(xlabel="labels that differ from the model's own, in %, held-out groups", title=title)
    return figure


def tuning_figure(
    history: Sequence[Any], lambdas: np.ndarray, landscape: np.ndarray, title: str
) -> "Figure":
    """Return a picture of a tuning run: its objective, its lambdas, and its path.

    The path is drawn over the landscape, the objective over (lambda_enc, lambda_dec) on a grid of
    both lambdas.
    """
    from matplotlib.figure import Figure

    figure = Figure((15, 4.4), layout="constrained")
    first, second, third = figure.subplots(1, 3)
    steps = [(entry.step, entry.objective) for entry in history if entry.objective is not None]
    looks = [(entry.step, entry.held_out) for entry in history if entry.held_out is not None]
    if steps:
        first.plot(*zip(*steps, strict=True), color=LIGHT, lw=1, label="on each step's own groups")
    first.plot(*zip(*looks, strict=True), color=BLUE, marker="o", ms=3, label="held out")
    first.axhline(1, color=GREY, lw=0.8, ls="--")
    first.set(xlabel="step", ylabel="objective / the untuned code's", title="objective")
    first.legend(fontsize=8)

    walk, places = {}, [entry.step for entry in history]
    for name in ("lambda_enc", "lambda_dec", "gap_exponent"):
        walk[name] = np.array([entry.parameters[name] for entry in history])
    second.semilogy(places, walk["lambda_enc"], color=GREEN, label="lambda_enc")
    label = "lambda_dec, all answering"
    second.semilogy(places, walk["lambda_dec"], color=RED, ls="--", label=label)
    second.set(xlabel="step", title="lambdas")
    further: dict[str, Any] = {"color": PINK, "ls": ":", "label": "gap exponent (right)"}
    lines = second.twinx().plot(places, walk["gap_exponent"], **further)
    # Below: curves go through every corner.
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15), "ncols": 3, "frameon": False}
    second.legend(handles=[*second.lines, *lines], fontsize=8, **below)

    shown = np.log10(np.clip(landscape, None, 10 * np.nanmin(landscape))).T
    colours = third.pcolormesh(lambdas, lambdas, shown, cmap="viridis", shading="nearest")
    figure.colorbar(colours, ax=third, label="log10 objective, cut at 10 times the least")
    path = [np.clip(walk[name], lambdas[0], lambdas[-1]) for name in ("lambda_enc", "lambda_dec")]
    third.plot(*path, color="white", lw=1.2, marker=".", ms=2)
    third.plot(path[0][-1], path[1][-1], "r*", ms=11, label="end")
    third.set(xscale="log", yscale="log", xlabel="lambda_enc", ylabel="lambda_dec")
    third.set_title("held-out objective, other numbers as tuned", fontsize=10)
    third.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def plan_figure(plan: Any, title: str, alike: float) -> "Figure":
    """Return the disagreement of a plan's candidates against their extra work.

    Of each system, candidates whose p99 exceeds the recommended one's by at most the share `alike`
    are drawn, also those that were only screened.
    """
    from matplotlib.figure import Figure

    figure, best = Figure((7.5, 4.6), layout="constrained"), plan.recommended
    axis, limit = figure.subplots(), (1 + alike) * plan.recommended.p99
    for system in dict.fromkeys(row.system for row in plan.candidates):
        rows = [row for row in plan.candidates if row.system == system and row.p99 <= limit]
        work, share = [], []  # the least disagreement at each amount of extra work or less
        for row in sorted(rows, key=lambda row: (row.extra_work, row.disagreement.mean)):
            if not share or 100 * row.disagreement.mean < share[-1]:
                work.append(row.extra_work)
                share.append(100 * row.disagreement.mean)
        if rows:
            axis.plot(work, share, ms=4, lw=1.3, label=system, **system_look(system))
    here = best.extra_work, 100 * best.disagreement.mean
    axis.plot(*here, "k*", ms=13, mfc="none", label="recommended")
    bounds: dict[str, Any] = {"color": GREY, "lw": 0.8, "ls": "--"}
    axis.axhline(100 * plan.asked["max_disagreement"], label="at most, as asked", **bounds)
    axis.axvline(plan.asked["max_extra_work"], **bounds)
    axis.set_yscale("symlog", linthresh=0.1)  # logarithmic, with a place for none
    axis.set(
        xlabel="extra work: calls beyond one a query, as a share",
        ylabel="labels that differ, in %",
        ylim=(-0.01, 1.5 * axis.get_ylim()[1]),
        title=f"{title}: p99 of {1e3 * limit:.3g} ms or less",
    )
    axis.legend(fontsize=8, loc="lower left")
    axis.grid(alpha=0.3)
    return figure
