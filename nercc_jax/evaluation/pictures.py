"""Pictures of evaluations.

Each is one column of panels that can be read on a telephone (390 pixels wide) and in black and
white: curves also differ in markers, and the legend is next to the panel.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # which takes a second to import, and only pictures need it
    from matplotlib.figure import Figure

WIDTH, FONT = 6.2, 11  # inches, and points: ten pixels where a picture is 390 wide


def straggler_figure(
    rows: Sequence[Any],
    panels: Mapping[str, tuple[str, bool]],
    title: str,
    look: Callable[[str], Mapping[str, Any]] | None = None,
) -> "Figure":
    """Return a figure with a panel for each metric, with intervals, and for every seven codes.

    `panels` gives a metric's label, and whether it is an error. Errors have a logarithmic axis: a
    code without errors is named in the title, and a very large error leaves the panel at its upper
    edge. Other metrics are shares, whose intervals end at 0 and 1. Laws whose names are not numbers
    are placed side by side. A code's `look` are matplotlib's properties of its line.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    names, laws = ([*dict.fromkeys(getattr(r, of) for r in rows)] for of in ("code", "stragglers"))
    parts = [names[start : start + 7] for start in range(0, len(names), 7)]
    drawn = [(metric, part) for metric in panels for part in parts]
    figure = plt.figure(figsize=(WIDTH, 3.6 * len(drawn)), layout="constrained")
    places = figure.subplots(len(drawn), 1, squeeze=False)[:, 0]
    figure.suptitle(title, fontsize=FONT)
    numbers = [float(law) for law in laws if re.fullmatch(r"\d+(\.\d*)?", law)]
    numbered = len({*numbers}) == len(laws)
    at = np.array(numbers) if numbered else np.arange(len(laws), dtype=float)
    apart = np.diff(np.sort(at)).min() if len(at) > 1 else 1.0
    for (metric, codes), axis in zip(drawn, places, strict=True):
        (label, is_error), tops = panels[metric], []
        for shift, code in enumerate(codes):
            found = [getattr(row, metric) for row in rows if row.code == code]
            mean = np.array([each.mean for each in found], float)
            low, high = np.array([each.interval(share=not is_error) for each in found]).T
            low = np.maximum(low, 0.1 * mean) if is_error else low
            y = np.where(mean > 0, mean, np.nan) if is_error else mean
            tops.append(np.nanmax([0, *mean]))
            if np.isnan(y).all():
                continue
            bars = np.nan_to_num(np.maximum([y - low, high - y], 0))
            # Side by side: intervals would hide each other.
            x = at + 0.4 * apart * ((shift + 0.5) / len(codes) - 0.5)
            own = {"color": f"C{shift}", "marker": "osD^vP*"[shift]} if look is None else look(code)
            axis.errorbar(x, y, bars, capsize=2, lw=1.4, ms=6, label=code, **own)
        axis.set_yscale("log" if is_error else "linear")
        axis.set_xlabel("stragglers", fontsize=FONT)
        axis.set_ylabel(label, fontsize=FONT)
        axis.tick_params(labelsize=FONT)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.04)
        shown = axis.get_legend_handles_labels()[1]
        if shown:
            axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=FONT)
        if is_error and any(tops):
            most = 100 * float(np.median([top for top in tops if top > 0]))
            axis.set_ylim(top=2 * min(max(tops), most))
        if numbered:
            whole = MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10])
            axis.xaxis.set_major_locator(whole)  # no half stragglers
        else:
            axis.set_xticks(at, laws, rotation=20 if sum(map(len, laws)) > 40 else 0)
        if without := [code for code in codes if code not in shown]:
            lost = f"no errors, or all lost: {', '.join(without)}"
            axis.set_title(lost, fontsize=FONT - 1, loc="left", color="#555555")
    return figure
