"""Tables of docs/wrong-answers.md: what checks of answers find, and what they cost."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Row = Mapping[str, Any]

_MODELS = {"lenet5-digits": "LeNet5 on digits", "repvgg-cifar10": "RepVGG"}


def cells(rows: Sequence[Row], found: str = "found", of: str = "matter") -> Iterator[Row]:
    """Yield the calls of each check of a model, and the share found of each kind of faults."""
    keys = [(row["work"], row["check"], row["rate"]) for row in rows]
    kinds = dict.fromkeys(kind.partition("/")[0] for row in rows for kind in row["found"])
    for key in dict.fromkeys(keys):
        some = [row for row, own in zip(rows, keys, strict=True) if own == key]
        calls = 1 + np.mean([row["false_alarms"] for row in some])
        shares = {f"{kind}, %": _share(some, kind, found, of) for kind in kinds}
        yield {"model": key[0], "check": key[1], "calls": f"{calls:.3f}"} | shares


def _share(rows: Sequence[Row], kind: str, found: str, of: str) -> str:
    each = [
        row["found"][name] for row in rows for name in row["found"] if name.split("/")[0] == kind
    ]
    number = sum(one[of] for one in each)
    return f"{100 * sum(one[found] for one in each) / number:.1f}" if number else ""


def runs(rows: Sequence[Row]) -> Iterator[Row]:
    """Yield what became of the rows of functions, without checks and with them."""
    for place in dict.fromkeys((row["work"], row["faults"]) for row in rows):
        some = [row for row in rows if (row["work"], row["faults"]) == place]
        without = [row for row in some if row["rate"] is None]
        checked = [row for row in some if row["rate"] is not None]
        calls = np.mean([row["computed_rows"] / row["rows"] for row in checked])
        yield {
            "function": place[0],
            "wrong workers of 8": place[1],
            "wrong rows": f"{np.mean([row['wrong_rows'] for row in without]):.0f}",
            "with checks": f"{np.mean([row['wrong_rows'] for row in checked]):.0f}",
            "calls a row": f"{calls:.3f}",
            "fenced": f"{np.mean([len(row['fenced']) for row in checked]):.1f}",
        }


def prices(rows: Sequence[Row]) -> Iterator[Row]:
    """Yield what a server with checks makes of the requests, or the latency, of one without."""
    for model, surrogate in itertools.product(_MODELS, ("learner", "student")):
        some = [row for row in rows if row["model"] == model and surrogate in row["servers"]]
        if some:
            about = {"model": _MODELS[model], "surrogate": surrogate}
            yield about | dict(_price(row, surrogate) for row in some)


def _price(row: Row, surrogate: str) -> tuple[str, str]:
    """Return the name of a load, and what checks make of it."""
    closed, clients = row["loop"] == "closed", row["clients"]
    what = "per_second" if closed else "p50_ms"
    without, checked = (
        np.array([each[what] for each in row["servers"][name]])
        for name in (surrogate, f"{surrogate}, checks")
    )
    if not closed:
        medians = np.median(without), np.median(checked)
        return "p50 at 80 a second, ms", "{:.1f} to {:.1f}".format(*medians)
    ratios = checked / without
    found = f"{np.median(ratios):.2f} [{ratios.min():.2f},\u00a0{ratios.max():.2f}]"
    return f"requests a second, {clients} client{'s' * (clients > 1)}", found
