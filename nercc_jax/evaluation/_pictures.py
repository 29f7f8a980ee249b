"""Pictures of evaluations, in which each system has the same colour and marker everywhere."""

import re
from collections.abc import Mapping, Sequence
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
    into: Any = None,
) -> "Figure":
    """Return a figure, or a part of one, with a panel for each metric, with intervals.

    A metric has its label, and whether its axis is logarithmic.
    """
    import matplotlib.pyplot as plt

    figure = into or plt.figure(figsize=(6.2 * len(panels), 4.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (metric, (label, logarithmic)) in zip(axes, panels.items(), strict=True):
        straggler_curves(axis, rows, metric, label, logarithmic=logarithmic)
    figure.suptitle(title, fontsize=10)
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
