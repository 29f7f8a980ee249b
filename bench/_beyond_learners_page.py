"""What a learner adds, on docs/beyond.md: from the rows of _beyond_learners.py."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from _report import share

Row = Mapping[str, Any]

_PIXELS, _ORDERED, _UNORDERED = "pixels, buffer 1024", "surrogate, buffer 1024", "no order"
_PLAIN = ("published", "search", "repeated", "interleaved", "chebyshev")
_TOLD = """A learner (`fit_learner`) knows the model's answers to 1,000 images, in place of a
student, and goes by 64 principal components of their pixels; or it learns what the student leaves
over, and goes by its logits, too. Layout, mixture, and whether redundant workers get copies of what
it doubts most, are chosen on images that it does not know and that nothing is judged on. *Best
layout* is the least of the table of all modes, in the same order by pixels, picked after measuring.
*With surrogate* is that of the table of all modes; *student* and *student and learner* are chosen
on those same further images. Per cent of labels that are not the model's own; same images, same
stragglers."""


def learners(results: Mapping[str, Any]) -> list[str]:
    """The section, none where there is nothing to tell."""
    alone: list[tuple[str, bool]] = []
    lines: list[list[str]] = []
    held, cells = 0, 0
    for model, told in results.items():
        for cell, measured in told.get("learners", {}).items():
            plain, rows = told["cells"][cell]["rows"], measured["rows"]
            best = min(_of(plain, _PLAIN, _PIXELS), key=_wrong)
            learner = _one(rows, "learner", _PIXELS)
            half = _wrong(learner) <= _wrong(best) / 2
            alone.append((model, half))
            orders: list[str] = []
            worse = False
            for order in (_UNORDERED, _ORDERED):
                without = _of(plain, ["with surrogate"], order)[0]
                student, both = (
                    _of(rows, [mode], order) for mode in ("student", "student and learner")
                )
                orders.append(_percent(without))
                if student and both:
                    worse |= _apart(both[0], without) or _apart(both[0], student[0])
                orders += [
                    _percent(each[0]) if each else "not measured" for each in (student, both)
                ]
            measured_both = "not measured" not in orders
            held, cells = held + (measured_both and not worse), cells + measured_both
            values = [model, cell, f"{_percent(best)} ({best['mode']})", _percent(learner)]
            lines.append([*values, learner["layout"], *orders])
    if not alone:
        return []
    named = list(dict.fromkeys(model for model, _ in alone))
    counts = {name: [half for model, half in alone if model == name] for name in named}
    told = "; ".join(f"{name} {sum(each)} of {len(each)}" for name, each in counts.items())
    header = ["model", "(N, K, S)", "best layout, by pixels", "learner, by pixels", "its layout"]
    for order in ("no order", "by the student"):
        header += [f"{order}: with surrogate", "student", "student and learner"]
    grid = [header, ["---"] * len(header), *lines]
    return [
        "",
        "## A learner from past answers",
        "",
        _TOLD,
        "",
        f"Without a student the learner leaves at most half of the best layout's wrong labels in "
        f"so many cells: {told}.",
        f"With the student it is not worse than without, beyond the intervals, in {held} of the "
        f"{cells} cells where that was measured.",
        "",
        *("| " + " | ".join(line) + " |" for line in grid),
    ]


def _of(rows: Iterable[Row], modes: Sequence[str], order: str) -> list[Row]:
    return [row for row in rows if row["mode"] in modes and row["order"] == order]


def _one(rows: Iterable[Row], mode: str, order: str) -> Row:
    return _of(rows, [mode], order)[0]


def _wrong(row: Row) -> float:
    return row["disagreement"]


def _apart(ours: Row, theirs: Row) -> bool:
    """Whether ours is worse by more than both half widths."""
    return _wrong(ours) - _wrong(theirs) > ours["half_width"] + theirs["half_width"]


def _percent(row: Row) -> str:
    return share(row["disagreement"], row["half_width"], 2)
