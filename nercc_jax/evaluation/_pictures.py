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
_BLUE, _SKY, _PINK, _WINE, _PURPLE = "#0072b2", "#56b4e9", "#cc79a7", "#882255", "#aa4499"
_RED, _BROWN, _ORANGE, _OLIVE = "#d55e00", "#a05000", "#e69f00", "#999933"
_GREEN, _TEAL, _INDIGO = "#009e73", "#44aa99", "#332288"
_GREY, _LIGHT, _BLACK = "#555555", "#999999", "#000000"

# Of one batch: data points, coded ones, those that are lost, and what is decoded.
DATA, CODED, LOST, FOUND = _BLUE, _GREEN, _RED, _PINK


_OPEN, _LOSSY = {"markerfacecolor": "white"}, {"linestyle": "--"}

# The look of each system: a colour, a marker, and further properties.
_LOOKS: dict[str, tuple[Any, ...]] = {
    # The method: untuned, as published, tuned; then what is added to it.
    "NeRCC": (_BLUE, "o"),
    "coded": (_BLUE, "o"),
    "NeRCC (8, 4)": (_BLUE, "h"),
    "NeRCC published": (_SKY, "o", _OPEN),
    "NeRCC, published": (_SKY, "o", _OPEN),
    "published, ordered": (_SKY, "o"),
    "tuned": (_PINK, "D"),
    "NeRCC tuned": (_PINK, "D"),
    "NeRCC learned": (_WINE, "*"),
    "searched layout": (_PURPLE, "D"),
    "scheme": (_WINE, "*"),
    "scheme, uncertain again": (_WINE, "X"),
    "known, else hedged": (_WINE, "*"),
    "known, uncertain twice": (_WINE, "X"),
    "picked, 1.1 calls": (_WINE, "*", _OPEN),
    "picked, 1.35 calls": (_WINE, "X", _OPEN),
    "NeRCC, reject": (_TEAL, "v"),
    "NeRCC, reject, groups together": (_GREEN, "^"),
    "NeRCC, smooth": (_INDIGO, "p"),
    "repeated NeRCC, reject": (_PURPLE, "D"),
    "chebyshev": (_BLUE, "o"),
    "interleaved": (_TEAL, "o"),
    "repeated": (_PURPLE, "o"),
    # Other codes.
    "BACC": (_RED, "s"),
    "BACC tuned": (_BROWN, "s", _OPEN),
    "BACC learned": (_RED, "d"),
    "BACC, median": (_BROWN, "d"),
    "SBACC": (_ORANGE, "^", _OPEN),
    "ApproxIFER": (_ORANGE, "v"),
    "BSCC": (_OLIVE, "h"),
    "BSCC tuned": (_OLIVE, "h", _OPEN),
    "LCC": (_GREEN, "^"),
    "ParM": (_BLACK, "P", _LOSSY),
    "ParM, k = 4": (_BLACK, "p", _LOSSY),
    # Copies, and copies on suspicion.
    "replication": (_GREY, "x", _LOSSY),
    "two copies": (_GREY, "x", _LOSSY),
    "replication, else surrogate": (_GREY, "+", _LOSSY),
    "copies by the student's doubt": (_TEAL, "x", _LOSSY),
    "copies, else the nearest": (_GREY, "x", _LOSSY),
    "copies, else a GP": (_GREY, "^", _LOSSY),
    "copies, else the cheap model": (_GREY, "+", _LOSSY),
    "hedg": (_OLIVE, "^"),
    "hedged, p95": (_OLIVE, "v"),
    "hedged, 1.35 x median": (_OLIVE, "s"),
    # What answers from past answers.
    "learner": (_TEAL, "d"),
    "learner, no redundancy": (_TEAL, "d", _OPEN),
    "surrogate alone": (_TEAL, "d", _OPEN),
    # Nothing, or no code.
    "uncoded": (_LIGHT, "."),
    "as it comes": (_LIGHT, "."),
    "Ray Serve": (_INDIGO, "h"),
}


def system_look(system: str) -> dict[str, Any]:
    """Return how a system is drawn: matplotlib's `color` and `marker`, and properties of its line.

    The longest known name that the system's name begins with decides: "ParM, k = 2" looks as "ParM"
    does. An unknown system is a black dot.
    """
    known = [name for name in _LOOKS if system.startswith(name)]
    color, marker, *further = _LOOKS[max(known, key=len)] if known else (_BLACK, ".")
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

    Laws whose names are no numbers stand side by side, in their order. Each curve has its name at
    its right end. A logarithmic metric is an error: a code without any is named and not drawn, and
    one that explodes leaves the panel by its upper edge, where its name stands. Any other metric is
    a share, whose intervals end at 0 and 1.
    """
    from matplotlib.ticker import MaxNLocator

    laws, codes = laws_and_codes(rows)
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
        axis.errorbar(dodged, mean, bars, capsize=2, lw=1.4, ms=4, **system_look(code))
        # Its name stands at its last point, or where it leaves by the top.
        known = np.flatnonzero(~np.isnan(mean))
        last = np.flatnonzero(over)[0] if over.any() else known[-1]
        ends[code] = (float(dodged[last]), min(float(mean[last]), top))
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
    _name_curves(axis, ends)


def _name_curves(axis: "Axes", ends: Mapping[str, tuple[float, float]]) -> None:
    """Write names next to the curves' ends, apart from each other, each joined to its own."""
    axis.autoscale_view()  # the limits are not known before
    to_panel = axis.transData + axis.transAxes.inverted()
    heights = {code: float(to_panel.transform(end)[1]) for code, end in ends.items()}
    order = sorted(heights, key=lambda code: heights[code])
    room = 1 / max(len(order), 14)  # a line of text
    placed: list[float] = []
    for code in order:
        placed.append(max(heights[code], placed[-1] + room if placed else 0.0))
    above = 1.0
    for place in reversed(range(len(placed))):  # what went over the edge pushes the others down
        placed[place] = min(placed[place], above)
        above = placed[place] - room
    for code, height in zip(order, placed, strict=True):
        x, y = ends[code]
        left = y >= axis.get_ylim()[1]  # it leaves by the top
        colour = system_look(code)["color"]
        axis.annotate(
            f"{code}, off the scale" if left else code,
            xy=(x, y),
            xytext=(1.03, height),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=colour,
            arrowprops={
                "arrowstyle": "-", "color": colour, "lw": 0.6, "alpha": 0.6,
                "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 3,
            },
            annotation_clip=False,
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
    size, left = 0.92 / columns, 0.04
    rows = {"data": 0.775, "first": 0.485, "second": 0.305, "labels": 0.06}

    def place(column: float, row: str) -> "Axes":
        box = (left + column * size, rows[row], 0.92 * size, 0.92 * size * wide)
        axis = figure.add_axes(box)
        axis.set(xticks=[], yticks=[])
        return axis

    offset = (columns - count) / 2
    for column, image in enumerate(images):
        _show(place(offset + column, "data"), image, images, DATA)
    half = (workers + 1) // 2
    for number, image in enumerate(coded):
        row, column = ("first", number) if number < half else ("second", number - half)
        axis = place((columns - half) / 2 + column, row)
        _show(axis, image, images, CODED if available[number] else LOST)
        if not available[number]:
            axis.plot([0, 1], [0, 1], color=LOST, lw=2.5, transform=axis.transAxes)
            axis.plot([0, 1], [1, 0], color=LOST, lw=2.5, transform=axis.transAxes)
    for column, (label, true) in enumerate(zip(decoded, own, strict=True)):
        axis = place(offset + column, "labels")
        same = label == true
        axis.text(
            0.5, 0.5, str(label), size=scale * min(22, 220 / columns), ha="center", va="center",
            color="black" if same else LOST, transform=axis.transAxes,
        )  # fmt: skip
        _frame(axis, FOUND if same else LOST)
        if not same:
            axis.set_xlabel(f"model: {true}", color=LOST, size=9 * scale)
    lost, kept = int(np.sum(~available)), sum(a == b for a, b in zip(decoded, own, strict=True))
    for text, height in (
        (f"{count} images", 0.94),
        (f"{workers} coded images, one a worker; {lost} workers straggle", 0.655),
        (
            f"{count} labels, from the {workers - lost} answers that came: "
            f"{'all' if kept == count else kept} as the model's own",
            0.235,
        ),
    ):
        figure.text(0.5, height, text, ha="center", va="center", size=max(12 * scale, 9))
    return figure


def _show(axis: "Axes", image: np.ndarray, scale: np.ndarray, colour: str) -> None:
    low, high = scale.min(), scale.max()
    shown = np.clip((image - low) / max(high - low, 1e-12), 0, 1)
    axis.imshow(shown, cmap="gray_r", vmin=0, vmax=1)
    _frame(axis, colour)


def _frame(axis: "Axes", colour: str) -> None:
    for spine in axis.spines.values():
        spine.set(edgecolor=colour, linewidth=2)


def laws_and_codes(rows: Sequence[Any]) -> tuple[list[str], list[str]]:
    """Return the names that evaluations have, each once, in their order."""
    return list(dict.fromkeys(r.stragglers for r in rows)), list(
        dict.fromkeys(r.code for r in rows)
    )
