"""Pictures of evaluations, codes and plans; each system has the same colour and marker everywhere.

Each is one column of panels, to be read on a telephone (390 pixels wide) and in black and white:
curves differ in markers and line styles, too, and are named where they end; a panel has at most
seven.
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


def straggler_figure(
    rows: Sequence[Any],
    panels: Mapping[str, tuple[str, bool]],
    title: str,
    above: Sequence[tuple[float, Callable[[Any], Any]]] = (),
) -> "Figure":
    """Return a figure with a panel for each metric, with intervals, and for every seven codes.

    A metric has its label, and whether its axis is logarithmic. Each function of `above` draws into
    a part of the figure above the panels, which has a height in inches.
    """
    import matplotlib.pyplot as plt

    codes = [*dict.fromkeys(row.code for row in rows)]
    parts = [codes[start : start + 7] for start in range(0, len(codes), 7)]
    drawn = [(metric, part) for metric in panels for part in parts]
    heights = [*(height for height, _ in above), *(3.6 for _ in drawn)]
    figure = plt.figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    places = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for (_, draw), place in zip(above, places, strict=False):
        draw(place)
    for number, ((metric, part), place) in enumerate(zip(drawn, places[len(above) :], strict=True)):
        label, logarithmic = panels[metric]
        some = [row for row in rows if row.code in part]
        straggler_curves(place.subplots(), some, metric, label, logarithmic=logarithmic)
        if title and not number:
            place.suptitle(title, fontsize=FONT)
    return figure


def straggler_curves(
    axis: "Axes", rows: Sequence[Any], metric: str, label: str, *, logarithmic: bool
) -> None:
    """Draw one metric of each code against the number of stragglers, with intervals.

    Laws whose names are no numbers stand side by side, in their order. Curves are named at their
    right ends. A logarithmic metric is an error: a code without any is named in the title and not
    drawn, and one that explodes leaves the panel by its upper edge. Any other metric is a share,
    whose intervals end at 0 and 1.
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
    ends: dict[str, tuple[float, float]] = {}
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
        axis.errorbar(dodged, mean, bars, capsize=2, lw=1.4, ms=5, label=name, **system_look(code))
        last = int(np.flatnonzero(~np.isnan(mean))[-1])
        ends[name] = float(dodged[last]), float(mean[last])
    axis.set(yscale="log" if logarithmic else "linear")
    _finish(axis, "stragglers", label)
    if numbered:
        whole = MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10])
        axis.xaxis.set_major_locator(whole)  # no half stragglers
    else:
        axis.set_xticks(places, laws, rotation=20 if sum(map(len, laws)) > 40 else 0)
    if np.isfinite(top):
        axis.set_ylim(top=top)
    axis.margins(x=0.03)
    drawn = {name.removesuffix(", off the scale") for name in ends}
    if without := ", ".join(code for code in codes if code not in drawn):
        title = f"no errors, or all lost: {without}"
        axis.set_title(title, fontsize=FONT - 1, loc="left", color=GREY)
    _name_ends(axis, ends)


def _finish(axis: "Axes", xlabel: str, ylabel: str) -> None:
    """Label the axes of a panel, in letters that can be read."""
    axis.set_xlabel(xlabel, fontsize=FONT)
    axis.set_ylabel(ylabel, fontsize=FONT)
    axis.tick_params(labelsize=FONT)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _name_ends(axis: "Axes", ends: Mapping[str, tuple[float, float]]) -> None:
    """Name curves beside the panel, at the height of their right ends or next to each other."""
    axis.autoscale_view()
    to_axes = axis.transData + axis.transAxes.inverted()
    height = axis.get_window_extent().height / axis.figure.dpi
    gap = 1.6 * FONT / 72 / max(height, 1.0)
    order = sorted(ends, key=lambda name: -ends[name][1])
    places = [float(np.clip(to_axes.transform(ends[name])[1], 0, 1)) for name in order]
    for number in range(1, len(places)):  # downwards, and up again from the bottom
        places[number] = min(places[number], places[number - 1] - gap)
    for number in reversed(range(len(places))):
        least = places[number + 1] + gap if number + 1 < len(places) else 0.0
        places[number] = max(places[number], least)
    for name, place in zip(order, places, strict=True):
        color, (x, y) = system_look(name)["color"], ends[name]
        axis.annotate(
            name, (x, float(np.clip(y, *axis.get_ylim()))), (1.05, place),
            textcoords="axes fraction", va="center", fontsize=FONT, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.6},
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
    figure = into or plt.figure(figsize=(WIDTH, 4.3))
    wide = figure.bbox.width / figure.bbox.height
    scale = figure.bbox.width / figure.dpi / WIDTH  # of the letters
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
            0.5, 0.5, str(decoded[number]), size=scale * min(18, 180 / columns), ha="center",
            va="center", color="black" if kept else LOST, transform=axis.transAxes,
        )  # fmt: skip
        if not kept:
            axis.set_xlabel(f"model: {own[number]}", color=LOST, size=FONT * scale)
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
        figure.text(0.5, height, text, ha="center", va="center", size=FONT * scale)
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
            aside, up = (0.02, 0.3) if side is cheap else (-0.06, 0.24)
            place = here[0] + aside, up + 0.12 * side.index(row)
            name = {"xytext": place, "textcoords": axis.get_xaxis_transform()}
            name |= {"ha": "left" if side is cheap else "right"}
            name["arrowprops"] = line | {"relpos": (0 if side is cheap else 1, 0.5)}
        axis.annotate(row.system, here, va="center", fontsize=FONT, **name)
    _finish(axis, "calls of the model a query", "labels kept, %")
    axis.margins(x=0.05, y=0.08)
    axis.set_title(title, fontsize=FONT)


def layouts_figure(candidates: Sequence[Any], title: str) -> "Figure":
    """Return a bar for each layout's best code, its share of labels that differ."""
    from matplotlib.figure import Figure

    shown = candidates[::-1]
    figure = Figure((WIDTH, 1 + 0.4 * len(shown)), layout="constrained")
    axis = figure.subplots()
    names = [each.layout + ", tuned" * each.tuned for each in shown]
    hatches = ["//" * each.tuned for each in shown]
    shares = [100 * each.disagreement for each in shown]
    axis.barh(names, shares, color=SKY, edgecolor=BLACK, hatch=hatches)
    _finish(axis, "labels that differ from the model's own, in %, held-out groups", "")
    axis.set_title(title, fontsize=FONT)
    return figure


def tuning_figure(
    history: Sequence[Any], lambdas: np.ndarray, landscape: np.ndarray, title: str
) -> "Figure":
    """Return a picture of a tuning run: its objective, its lambdas, and its path.

    The path is drawn over the landscape, the objective over (lambda_enc, lambda_dec) on a grid of
    both lambdas.
    """
    from matplotlib.figure import Figure

    figure = Figure((WIDTH, 11), layout="constrained")
    first, second, third = figure.subplots(3, 1)
    for name, look in (
        ("objective", {"color": LIGHT, "lw": 1, "label": "each step's own groups"}),
        ("held_out", {"color": BLUE, "marker": "o", "ms": 4, "label": "held out"}),
    ):
        steps = [(each.step, getattr(each, name)) for each in history]
        if steps := [pair for pair in steps if pair[1] is not None]:
            first.plot(*zip(*steps, strict=True), **look)
    first.axhline(1, color=GREY, lw=0.8, ls="--")
    _finish(first, "step", "objective / the untuned code's")
    first.legend(fontsize=FONT - 1)

    places, walk = [entry.step for entry in history], {}
    for name in ("lambda_enc", "lambda_dec", "gap_exponent"):
        walk[name] = np.array([entry.parameters[name] for entry in history])
    second.semilogy(places, walk["lambda_enc"], color=GREEN, label="lambda_enc")
    second.semilogy(places, walk["lambda_dec"], color=RED, ls="--", label="lambda_dec")
    _finish(second, "step", "lambdas (lambda_dec: all answering)")
    further: dict[str, Any] = {"color": PINK, "ls": ":", "label": "gap exponent (right)"}
    right = second.twinx()
    lines = right.plot(places, walk["gap_exponent"], **further)
    right.tick_params(labelsize=FONT)
    # Above: curves go through every corner.
    above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": 3, "frameon": False}
    second.legend(handles=[*second.lines, *lines], fontsize=FONT - 1, **above)

    shown = np.log10(np.clip(landscape, None, 10 * np.nanmin(landscape))).T
    colours = third.pcolormesh(lambdas, lambdas, shown, cmap="gray_r", shading="nearest")
    bar = figure.colorbar(colours, ax=third)
    bar.set_label("log10 objective, cut at 10 times the least", fontsize=FONT)
    path = [np.clip(walk[name], lambdas[0], lambdas[-1]) for name in ("lambda_enc", "lambda_dec")]
    third.plot(*path, color=ORANGE, lw=1.6, marker=".", ms=3)
    third.plot(path[0][-1], path[1][-1], "*", color=ORANGE, mec=BLACK, ms=14)
    third.set(xscale="log", yscale="log")
    _finish(third, "lambda_enc", "lambda_dec")
    third.set_title("held-out objective; the star is where tuning ended", fontsize=FONT)
    figure.suptitle(title, fontsize=FONT)
    return figure


def plan_figure(plan: Any, title: str, alike: float) -> "Figure":
    """Return the disagreement of a plan's candidates against their extra work.

    Of each system, candidates whose p99 exceeds the recommended one's by at most the share `alike`
    are drawn, also those that were only screened; codes of all layouts are one system.
    """
    from matplotlib.figure import Figure

    figure, best = Figure((WIDTH, 4.6), layout="constrained"), plan.recommended
    axis, limit, ends = figure.subplots(), (1 + alike) * plan.recommended.p99, {}
    of = {row: "NeRCC" if row.points and "NeRCC" in row.system else row.system
          for row in plan.candidates}  # fmt: skip
    for system in dict.fromkeys(of.values()):
        rows = [row for row in plan.candidates if of[row] == system and row.p99 <= limit]
        work, share = [], []  # the least disagreement at each amount of extra work or less
        for row in sorted(rows, key=lambda row: (row.extra_work, row.disagreement.mean)):
            if not share or 100 * row.disagreement.mean < share[-1]:
                work.append(row.extra_work)
                share.append(100 * row.disagreement.mean)
        if rows:
            axis.plot(work, share, ms=6, lw=1.3, **system_look(system))
            ends[system] = work[-1], share[-1]
    here = best.extra_work, 100 * best.disagreement.mean
    axis.plot(*here, "k*", ms=15, mfc="none")
    bounds: dict[str, Any] = {"color": GREY, "lw": 0.8, "ls": "--"}
    axis.axhline(100 * plan.asked["max_disagreement"], **bounds)
    axis.axvline(plan.asked["max_extra_work"], **bounds)
    axis.set_yscale("symlog", linthresh=0.1)  # logarithmic, with a place for none
    axis.set_ylim(-0.01, 1.5 * axis.get_ylim()[1])
    _finish(axis, "extra work: calls beyond one a query, as a share", "labels that differ, in %")
    words = f"{title}: p99 of {1e3 * limit:.3g} ms or less\nstar: recommended; dashed: as asked"
    axis.set_title(words, fontsize=FONT)
    _name_ends(axis, ends)
    return figure
