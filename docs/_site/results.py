"""Tables and pictures of the results pages, made from the benchmarks' JSON as the site is built."""

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import HTML, Markdown
from scipy.special import stdtrit

from nercc_jax.evaluation import Estimate

RESULTS = Path(__file__).parents[2] / "bench" / "results"
WIDTH = 7.36  # inches: pictures are shown at 736 pixels
plt.rcParams.update({"figure.dpi": 100, "font.size": 9, "legend.fontsize": 8, "axes.titlesize": 9})


def load(name: str) -> Any:
    """Return a benchmark's results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def machine(environment: Mapping[str, Any]) -> Markdown:
    """Return a line that names the machine, the versions, and the day."""
    versions = ", ".join(f"{name} {each}" for name, each in environment["versions"].items())
    day, cores = environment["date"][:10], environment["cores"]
    cpu, python = environment["cpu"], environment["python"]
    return Markdown(f"Measured on {cpu}, {cores} cores, Python {python}, {versions}; {day}.")


def mean_and_half_width(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Return a mean over draws and half of its 95 % interval (Student's t)."""
    values = np.asarray(values, float)
    if len(values) == 0:
        return float("nan"), float("nan")
    if len(values) < 2:
        return float(values.mean()), float("nan")
    error = values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(stdtrit(len(values) - 1, 0.975) * error)


def ratio(ours: Iterable[float], theirs: Iterable[float]) -> tuple[float, float, float]:
    """Return the ratio of two systems' errors over the draws of both, and its 95 % interval.

    It is of the logarithms, draw by draw, since both met the same draws.
    """
    both = zip(ours, theirs, strict=False)  # some systems were measured on more draws
    middle, half = mean_and_half_width([np.log(one / other) for one, other in both])
    return float(np.exp(middle)), float(np.exp(middle - half)), float(np.exp(middle + half))


def plus_minus(mean: float, half: float, digits: str = ".3f") -> str:
    """Return a mean with the half width of its interval; nothing where there is no mean."""
    if not np.isfinite(mean):
        return ""
    return f"{mean:{digits}}\u00a0±\u00a0{half:{digits}}" if half > 0 else f"{mean:{digits}}"


def percent(mean: float, half: float, digits: int = 1) -> str:
    """Return a share in per cent with the ends of its 95 % interval (Wilson's)."""
    if not np.isfinite(mean):
        return ""
    low, high = Estimate(mean, half).interval(share=True)
    text = f"{100 * mean:.{digits}f}"
    return f"{text} [{100 * low:.{digits}f},\u00a0{100 * high:.{digits}f}]" if half > 0 else text


def table(rows: Iterable[Mapping[str, Any]]) -> HTML:
    """Return a table of these rows, which scrolls sideways where it is wide."""
    return HTML(_html(rows))


def folded(summary: str, rows: Iterable[Mapping[str, Any]]) -> HTML:
    """Return a table behind a line that opens it."""
    return HTML(f"<details><summary>{html.escape(summary)}</summary>{_html(rows)}</details>")


def strong(text: str) -> str:
    """Return a cell that stands out."""
    return f"<b>{text}</b>"


def _html(rows: Iterable[Mapping[str, Any]]) -> str:
    frame = pd.DataFrame(list(rows)).fillna("")
    # A size such as (24, 20, 2) stays on its line.
    frame = frame.map(lambda cell: re.sub(r"(?<=\d), (?=\d)", ",\u00a0", str(cell)))
    made = frame.to_html(index=False, escape=False, border=0, classes="docutils align-default")
    made = made.replace(' style="text-align: right;"', "")
    return f'<div class="table-wrapper docutils" style="overflow-x: auto">{made}</div>'
