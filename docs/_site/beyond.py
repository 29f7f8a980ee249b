"""Parts of docs/beyond.md: what error probabilities promised, and on which days it was measured."""

from collections.abc import Iterator, Mapping
from typing import Any

from .results import percent

Results = Mapping[str, Mapping[str, Any]]
UNORDERED, PIXELS, ORDERED = "no order", "pixels, buffer 1024", "surrogate, buffer 1024"
RESCUED = "replication, else surrogate"
LAYOUTS = ("published", "search", "repeated", "interleaved", "chebyshev")


def promises(results: Results) -> Iterator[dict[str, str]]:
    """Yield what was given out at each allowance, and how much of it was wrong."""
    for model, cell, row, bins in _promised(results):
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


def kept(results: Results) -> str:
    """Return a sentence that says how often promises were kept."""
    rows = [(row, bins) for *_, row, bins in _promised(results)]
    held = [r["wrong_of_given"][0] <= r["promised"] for r, _ in rows if r["wrong_of_given"]]
    least = min(row["promised"] for row, _ in rows)  # a mode has the same bins at each allowance
    bins = [each for row, bins in rows if row["promised"] == least for each in bins]
    close = [abs(each["observed"] / each["promised"] - 1) < 0.3 for each in bins]
    return (
        f"The promise was kept in **{sum(held)} of {len(held)}** rows in which anything is given "
        f"out; promised and observed differ by less than 30 % in {sum(close)} of {len(close)} bins."
    )


def learners(results: Results) -> Iterator[dict[str, str]]:
    """Yield wrong labels with a learner from past answers, with a student and without."""
    for model, recorded in results.items():
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


def copies(results: Results) -> Iterator[dict[str, str]]:
    """Yield wrong labels with copies, decoded and placed in several ways, next to coding."""
    for model, recorded in results.items():
        for cell, measured in recorded["copies"].items():
            *_, doubt = measured["rows"]
            modes = {row["mode"]: _percent(row) for row in measured["rows"]}
            ratio = f"{doubt['ratio']:.2f} ± {doubt['ratio_half_width']:.2f}"
            yield {"model": model, "(N, K, S)": cell} | modes | {"doubt / student": ratio}


def days(results: Results, part: str) -> str:
    """Return the days on which the cells of a part were measured."""
    found = {
        cell.get("environment", recorded["environment"])["date"][:10]
        for recorded in results.values()
        for cell in recorded[part].values()
        if part == "cells" or "environment" in cell
    }
    return " to ".join(sorted({min(found), max(found)}))


def _promised(results: Results) -> Iterator[tuple[str, str, Any, Any]]:
    """Yield each row whose answers given out were counted: model, cell, and its mode's bins."""
    for model, recorded in results.items():
        for cell, measured in recorded["promises"].items():
            bins = {(row["mode"], row["order"]): row.get("bins", []) for row in measured["rows"]}
            for row in measured["rows"]:
                if "given" in row:
                    mode = row["mode"].split(", at most")[0]
                    yield model, cell, row, bins[mode, row["order"]]


def _wrong(row: Mapping[str, Any]) -> float:
    return row["disagreement"]


def _percent(row: Mapping[str, Any]) -> str:
    return percent(row["disagreement"], row["half_width"], 2)
