"""Tables and the picture of docs/beyond.md: codes, copies, schemes and learners on images."""

from collections.abc import Iterator, Mapping
from typing import Any

import matplotlib.pyplot as plt

from .looks import system_look
from .results import WIDTH, load, percent

Row = Mapping[str, Any]
PARTS = ("cells", "promises", "learners", "copies")
UNORDERED, PIXELS, ORDERED = "no order", "pixels, buffer 1024", "surrogate, buffer 1024"
RESCUED = "replication, else surrogate"
LAYOUTS = ("published", "search", "repeated", "interleaved", "chebyshev")
SCHEME = "with surrogate"
# Mode, order, its name in the picture, and what it is drawn like.
SHOWN = (
    ("published", UNORDERED, "NeRCC as published", "NeRCC published"),
    ("published", ORDERED, "published, ordered", "published, ordered"),
    ("replication", UNORDERED, "replication", "replication"),
    (RESCUED, UNORDERED, RESCUED, RESCUED),
    ("search", ORDERED, "searched layout, ordered", "searched layout"),
    (SCHEME, ORDERED, "the same with student", "scheme"),
    (f"{SCHEME}, 5% again", ORDERED, "the same, 5 % by the model", "scheme, uncertain again"),
)


def _num_workers(cell: str) -> int:
    return int(cell.strip("()").split(",")[0])


def _read() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each model's results, cells with more workers first."""
    for model, recorded in sorted(load("beyond").items()):
        cells = {part: recorded.get(part, {}) for part in PARTS}
        largest_first = {
            part: {name: of[name] for name in sorted(of, key=_num_workers, reverse=True)}
            for part, of in cells.items()
        }
        yield model, {**recorded, **largest_first}


RESULTS = dict(_read())


def _find(cell: Row, mode: str, order: str) -> Row | None:
    some = (row for row in cell["rows"] if (row["mode"], row["order"]) == (mode, order))
    return next(some, None)


def picture() -> Any:
    """Return the labels that differ, by cell and mode, a panel for each model."""
    figure, axes = plt.subplots(
        1, len(RESULTS), figsize=(WIDTH, 3.8), sharey=True, layout="constrained"
    )
    for axis, (model, recorded) in zip(axes, RESULTS.items(), strict=True):
        for mode, order, label, alike in SHOWN:
            found = [_find(cell, mode, order) for cell in recorded["cells"].values()]
            height = [max(100 * row["disagreement"], 5e-3) if row else None for row in found]
            look = system_look(alike)
            axis.plot(list(recorded["cells"]), height, label=label, linewidth=1, **look)
        axis.set(title=model, yscale="log")
        axis.tick_params(axis="x", rotation=60)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("labels that differ, % (none: 0.005)")
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=3, loc="outside lower center")
    return figure


def summary() -> Iterator[dict[str, str]]:
    """Yield wrong labels of the scheme and its rivals, and the calls of the model a query.

    A student's work counts by its multiplications, and so does what the model answers again.
    """
    for model, recorded in RESULTS.items():
        student = recorded["student"]["multiplications"]
        share = student / recorded["student"]["base_multiplications"]
        for cell, found in recorded["cells"].items():
            n, k, _ = (int(part) for part in cell.strip("()").split(","))
            rescued, ours = _find(found, RESCUED, UNORDERED), _find(found, SCHEME, ORDERED)
            again = 0.0 if ours is None else ours.get("again", 0.0)
            yield {
                "model": model,
                "(N, K, S)": cell,
                "published": _percent(_find(found, "published", UNORDERED)),
                "replication": _percent(_find(found, "replication", UNORDERED)),
                RESCUED: _percent(rescued),
                "its calls": f"{n / k + share:.2f}",
                "scheme": _percent(ours),
                "calls": f"{n / k + again + share * (k + n) / k:.2f}",
                "scheme, 5 % by the model": _percent(_find(found, f"{SCHEME}, 5% again", ORDERED)),
            }


def setting() -> Iterator[str]:
    """Yield the images, straggler sets and student of each model, and the days."""
    for model, recorded in RESULTS.items():
        size, student = next(iter(recorded["cells"].values()))["size"], recorded["student"]
        share = student["multiplications"] / student["base_multiplications"]
        yield (
            f"**{model}**, {recorded['outputs']}: {size['points']} test images, {size['sets']} "
            f"straggler sets. The student has {share:.1%} of the model's multiplications, and its "
            f"label is the model's on {student['score']['agreement']:.2%} of "
            f"{student['score']['total']:,} test images."
        )
    each = (f"{part}: {_days(part)}" for part in ("promises", "learners", "copies"))
    yield f"{'; '.join(each)}; modes: {_days('cells')}."


def _environments(part: str) -> list[Row]:
    return [
        cell.get("environment", recorded["environment"])
        for recorded in RESULTS.values()
        for cell in recorded[part].values()
    ]


def earliest(part: str) -> Row:
    """Return where and when the oldest cell of a part was measured."""
    return min(_environments(part), key=lambda each: each["date"])


def _days(part: str) -> str:
    found = {each["date"][:10] for each in _environments(part)}
    return " to ".join(sorted({min(found), max(found)}))


def modes() -> Iterator[tuple[str, Iterator[dict[str, str]]]]:
    """Yield a heading, and the wrong labels of every mode in each cell, for each model."""
    for model, recorded in RESULTS.items():
        cells = recorded["cells"]
        keys = dict.fromkeys(
            (row["mode"], row["order"])
            for cell in cells.values()
            for row in cell["rows"]
            if "promised" not in row
        )
        rows = (
            {"mode": mode, "order": order}
            | {name: _percent(_find(cell, mode, order)) for name, cell in cells.items()}
            for mode, order in keys
        )
        yield f"{model}: {len(keys)} modes", rows


def promises() -> Iterator[dict[str, str]]:
    """Yield what was given out at each allowance, and how much of it was wrong."""
    for model, cell, row, bins in _promised():
        observed = row["wrong_of_given"]
        yield {
            "model": model,
            "(N, K, S)": cell,
            "mode": row["mode"].split(", at most")[0],
            "order": row["order"],
            "allowed": f"{row['promised']:.1%}",
            "given out": f"{row['given']:.1%}",
            "of these wrong": percent(*observed, 2) if observed else "",
            "answered by the model": f"{row['again']:.1%}",
            "bins": ", ".join(
                f"{100 * each['promised']:.2g} / {100 * each['observed']:.2g}" for each in bins
            ),
        }


def kept() -> str:
    """Return a sentence that says how often promises were kept."""
    rows = [(row, bins) for *_, row, bins in _promised()]
    held = [r["wrong_of_given"][0] <= r["promised"] for r, _ in rows if r["wrong_of_given"]]
    least = min(row["promised"] for row, _ in rows)  # a mode has the same bins at each allowance
    bins = [each for row, bins in rows if row["promised"] == least for each in bins]
    close = [abs(each["observed"] / each["promised"] - 1) < 0.3 for each in bins]
    return (
        f"The promise was kept in **{sum(held)} of {len(held)}** rows in which anything is given "
        f"out; promised and observed differ by less than 30 % in {sum(close)} of {len(close)} bins."
    )


def learners() -> Iterator[dict[str, str]]:
    """Yield wrong labels with a learner from past answers, with a student and without."""
    for model, recorded in RESULTS.items():
        for cell, measured in recorded["learners"].items():
            rows = {(row["mode"], row["order"]): row for row in measured["rows"]}
            plain = [
                row
                for row in recorded["cells"][cell]["rows"]
                if row["mode"] in LAYOUTS and row["order"] == PIXELS
            ]
            best, learner = min(plain, key=_wrong), rows["learner", PIXELS]
            copies = next(r for r in recorded["cells"][cell]["rows"] if r["mode"] == RESCUED)
            layout = learner["layout"].removesuffix(" of the most uncertain")
            yield {
                "model": model,
                "(N, K, S)": cell,
                "best layout": f"{_percent(best)} ({best['mode']})",
                "learner, no student": f"{_percent(learner)} ({layout})",
                "copies, else the student": _percent(copies),
                **{
                    f"{mode}, {name}": _percent(rows[mode, order])
                    for order, name in ((ORDERED, "ordered"), (UNORDERED, "no order"))
                    for mode in ("student", "student and learner")
                },
            }


def copies(intervals: bool = True) -> Iterator[dict[str, str]]:
    """Yield wrong labels with copies, decoded and placed in several ways, next to coding."""
    for model, recorded in RESULTS.items():
        for cell, measured in recorded["copies"].items():
            *_, doubt = measured["rows"]
            modes = {
                row["mode"]: _percent(row if intervals else row | {"half_width": 0.0})
                for row in measured["rows"]
            }
            ratio = f"{doubt['ratio']:.2f} ± {doubt['ratio_half_width']:.2f}"
            yield {"model": model, "(N, K, S)": cell} | modes | {"doubt / student": ratio}


def _promised() -> Iterator[tuple[str, str, Any, Any]]:
    """Yield each row whose answers given out were counted: model, cell, and its mode's bins."""
    for model, recorded in RESULTS.items():
        for cell, measured in recorded["promises"].items():
            bins = {(row["mode"], row["order"]): row.get("bins", []) for row in measured["rows"]}
            for row in measured["rows"]:
                if "given" in row:
                    mode = row["mode"].split(", at most")[0]
                    yield model, cell, row, bins[mode, row["order"]]


def _wrong(row: Row) -> float:
    return row["disagreement"]


def _percent(row: Row | None) -> str:
    return "" if row is None else percent(row["disagreement"], row["half_width"], 2)
