"""Tables and pictures of the results, made from the benchmarks' JSON by blocks of the pages.

A block is Python in a comment, and what it makes stands below it as Markdown, so that any Git host
shows it. `.ci/measured` makes all blocks again by [cog](https://cog.readthedocs.io); with `--check`
it compares, and with `--pictures` it draws pictures, too.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from report import room_hashes  # of bench/
from scipy.special import stdtrit

from nercc_jax.evaluation import Estimate

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
WIDTH = 7.36  # inches: pictures are shown at 736 pixels
plt.rcParams.update({"figure.dpi": 100, "font.size": 9, "legend.fontsize": 8, "axes.titlesize": 9})


def load(name: str) -> Any:
    """Return a benchmark's results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def show(*parts: str) -> None:
    """Write parts of a page below the block that runs."""
    import cog  # pyright: ignore[reportMissingImports], there while blocks run

    for part in parts:
        cog.outl(f"\n{part.strip()}")


def measured(environment: Mapping[str, Any], rooms: str) -> str:
    """Return a line that names commit, day and machine, and which rooms changed since.

    Args:
        environment: Of `bench/report.py`; its `rooms` are hashes of the rooms' sources.
        rooms: The rooms of `nercc_jax` whose code was measured.
    """
    own, now = environment["rooms"], room_hashes()
    changed = [room for room in rooms.split() if own.get(room) != now.get(room)]
    # Of results from before commits were noted, it is the last one before that day and hour.
    dirty = {None: " or soon after", True: " with changes", False: ""}[environment["dirty"]]
    cores = f"{environment['cores']} core{'s' * (environment['cores'] != 1)}"
    line = (
        f"Measured at {environment['commit'][:9]}{dirty}, {environment['date'][:10]}, "
        f"{environment['cpu']}, {cores}"
    )
    return f"{line}. **Changed since: {', '.join(changed)}.**" if changed else f"{line}; unchanged."


def picture(
    name: str, draw: Callable[[], Any], about: str, *, folder: str = "../bench/results/"
) -> str:
    """Return a picture in Markdown; draw it where pictures are made (`.ci/measured --pictures`).

    Args:
        name: Of the file, in `bench/results`.
        draw: Returns the figure, or leaves it as the current one.
        about: A sentence for those who do not see it.
        folder: The page's way to `bench/results`.
    """
    if os.environ.get("DRAW") or not (RESULTS / f"{name}.png").exists():
        figure = draw() or plt.gcf()
        figure.savefig(RESULTS / f"{name}.png", dpi=150)
        plt.close(figure)
    return f"![{about}]({folder}{name}.png)"


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


def table(rows: Iterable[Mapping[str, Any]], without: Sequence[str] = ()) -> str:
    """Return a table of these rows in Markdown; where a row lacks a column, its cell is empty.

    Columns that begin with one of the words `without` are left to the page of every figure.
    """
    rows = [{column: _cell(value) for column, value in row.items()} for row in rows]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    columns = [column for column in columns if not column.startswith(tuple(without))]
    lines = [[column or "&nbsp;" for column in columns], ["---"] * len(columns)]
    lines += [[row.get(column, "") for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def strong(text: str) -> str:
    """Return a cell that stands out."""
    return f"**{text}**"


def _cell(value: Any) -> str:
    # A size such as (24, 20, 2) stays on its line.
    text = re.sub(r"(?<=\d), (?=\d)", ",\u00a0", "" if value is None else str(value))
    return text.replace("|", "\\|").replace("\n", " ")
