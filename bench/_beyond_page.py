"""Writes docs/beyond.md and the picture from what beyond.py measured."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from _beyond_learners_page import learners
from _report import answer_first, share, write_markdown

from nercc_jax.evaluation import system_look

_RESCUED = "replication, else surrogate"
RIVALS = ("replication", _RESCUED, "surrogate alone", "ParM")
_UNORDERED, _ORDERED = "no order", "surrogate, buffer 1024"
_OURS = ("with surrogate", _ORDERED)
_AGAIN = ("with surrogate, 5% again", _ORDERED)

# What the picture shows: (mode, order, label, what it looks like).
_SHOWN = (
    ("published", _UNORDERED, "NeRCC as published", "NeRCC published"),
    ("published", _ORDERED, "published, ordered", "published, ordered"),
    ("replication", _UNORDERED, "replication", "replication"),
    (_RESCUED, _UNORDERED, _RESCUED, _RESCUED),
    ("search", _ORDERED, "searched layout, ordered", "searched layout"),
    ("with surrogate", _ORDERED, "searched, ordered, surrogate", "scheme"),
    (_AGAIN[0], _ORDERED, "the same, 5 % executed again", "scheme, doubtful again"),
)


def write(results: Mapping[str, Any], page: Path, picture: Path) -> None:
    results = _in_order(results)
    _draw(results, picture)
    best = ["## The best mode beside the published method and replication", ""]
    best += [*_summary(results), "", f"![disagreement]({_relative(picture, page)})"]
    lines = ["\n\n".join(answer_first(_HEAD, "\n".join(best)))]
    lines += ["", "## What the doubt promises", "", _DOUBT, ""]
    lines += _promises(results)
    lines += learners(results)
    lines += _coding_friendly(picture.parent / "finetuning.json")
    lines += _cost_of_ordering(picture.parent / "ordering.json")
    for model, told in results.items():
        lines += ["", f"## {model}: every mode", "", *_about(told), ""]
        lines += _table(told["cells"])
    write_markdown(page, "\n".join(lines))


def _in_order(results: Mapping[str, Any]) -> dict[str, Any]:
    """Models by name and cells by the number of workers, whatever was measured first."""
    ordered = {model: dict(results[model]) for model in sorted(results)}
    for told in ordered.values():
        for part in ("cells", "promises", "learners"):
            cells = told.get(part, {})
            told[part] = {name: cells[name] for name in sorted(cells, key=_workers, reverse=True)}
    return ordered


def _workers(cell: str) -> int:
    return int(cell.strip("()").split(",")[0])


_HEAD = """# Past the paper

Written by `bench/beyond.py` from [its results](../bench/results/beyond.json); do not edit.

Disagreement (1 - RelAcc) in per cent: the share of data points whose decoded label is not the
model's own, mean over straggler sets with the ends of its 95 % interval. A lost prediction
counts as wrong. Columns are (N, K, S): workers, data points of a group, stragglers, any S of the N
alike likely. All modes met the same sets. Lambdas, layouts, shrinkage and doubts were chosen on
other test images than those judged, without labels: what is chosen on images that a model or its
student was trained on promises too much.

- *published*: the paper's points, interpolating encoder, lambda_dec the best of thirteen by MSE.
- *interleaved*, *repeated*, *chebyshev*: the layout with the best of its decoders; *search*: what
  `search_layout` picks among these and mixtures of them, the best one tuned by gradient descent.
- orders: by a projection of the pixels, or by the surrogate's outputs, over a buffer of so many
  waiting queries.
- *with surrogate*: the layout of these with the least disagreement where it was chosen, with the
  distilled student as control variate (`fit_surrogate`). The student runs on all data points and
  coded data points: its share of the model's multiplications stands above each table.
- *5% again*: the most doubtful 5 % of the data points are answered by the model itself. *at most
  0.5%*: as many as the calibrated doubt asks for; the share is in the table of promises.
- *replication, else surrogate*: a lost copy is answered by the student, as ours would.
- *coding-friendly*: the model fine-tuned through the nested objective, against its own labels.
"""

_DOUBT = """Repeated points, untuned. Asked for 0.5 % disagreement: what was seen, and the share
that the model had to answer itself. And the doubt in five bins of as many expected wrong labels
each, promised / seen, in per cent; in brackets how many wrong labels each bin expects."""


def _about(told: Mapping[str, Any]) -> list[str]:
    size, student = next(iter(told["cells"].values()))["size"], told["student"]
    share = student["multiplications"] / student["base_multiplications"]
    env = told["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    return [
        f"{told['outputs']}; {size['points']} test images in whole groups, {size['sets']} "
        f"straggler sets.",
        f"The student has {share:.1%} of the model's multiplications, and its label is the model's",
        f"on {student['score']['agreement']:.2%} of {student['score']['total']:,} test images.",
        f"{env['cpu']}, {env['cores']} cores, {versions}; {env['date'][:10]}.",
    ]


def _work(row: Mapping[str, Any], cell: str, told: Mapping[str, Any]) -> float:
    """Calls of the model a query, the student's and what is executed again counted in."""
    num_workers, num_data, _ = (int(part) for part in cell.strip("()").split(","))
    student = told["student"]["multiplications"] / told["student"]["base_multiplications"]
    work = num_workers / num_data + row.get("again", 0.0)
    if row["mode"].startswith("with surrogate"):
        return work + student * (num_data + num_workers) / num_data
    return work + student * ("surrogate" in row["order"] or row["mode"].endswith("else surrogate"))


def _find(rows: Iterable[Mapping[str, Any]], mode: str, order: str) -> Mapping[str, Any] | None:
    return next((row for row in rows if row["mode"] == mode and row["order"] == order), None)


def _percent(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    return share(row["disagreement"], row["half_width"], 2)


def _ratio(a: float, b: float) -> str:
    return "none wrong" if b == 0 else f"{a / b:.1f}"


_OURS_TOLD = """*Ours* is one mode everywhere: ordered by the surrogate over 1,024 queries, the
layout that did best where it was chosen, the surrogate as control variate. *Calls* are those of a
query: N/K and the student's share. Last stands the least of the tables below, picked after
measuring.

Ours has at most a fifth of the published method's disagreement in {fifth} of {cells} cells, and at
most half of replication's in {half}. Most of that is the student's: plain copies whose lost ones it
answers come as near, and have less than ours in {less} cells; in {apart} cells the intervals of the
two are apart.
"""


def _summary(results: Mapping[str, Any]) -> list[str]:
    lines = []
    fifth, half, less, apart, cells = 0, 0, 0, 0, 0
    for model, told in results.items():
        for cell, measured in told["cells"].items():
            names = ("published", "replication", "replication, else surrogate")
            wanted = [*((name, _UNORDERED) for name in names), _OURS, _AGAIN]
            rows = [_find(measured["rows"], *name) for name in wanted]
            published, copies, backed, ours, again = (row for row in rows if row is not None)
            best = min(
                (row for row in measured["rows"] if _is_ours(row)), key=lambda r: r["disagreement"]
            )
            theirs, lost, wrong = (row["disagreement"] for row in (published, copies, ours))
            cells += 1
            fifth += wrong <= theirs / 5
            half += wrong <= lost / 2
            less += backed["disagreement"] < wrong
            apart += abs(backed["disagreement"] - wrong) > backed["half_width"] + ours["half_width"]
            values = [
                *(model, cell, *map(_percent, (published, copies, backed, ours))),
                *(f"{_work(ours, cell, told):.2f}", _ratio(theirs, wrong), _ratio(lost, wrong)),
                *(_percent(again), f"{_percent(best)}: {best['mode']}, {best['order']}"),
            ]
            lines.append("| " + " | ".join(values) + " |")
    return [
        _OURS_TOLD.format(fifth=fifth, half=half, less=less, apart=apart, cells=cells),
        "| model | (N, K, S) | published | replication | replication, else surrogate | ours | "
        "calls | published / ours | replication / ours | ours, 5 % again | the least |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *lines,
    ]


def _is_ours(row: Mapping[str, Any]) -> bool:
    return row["mode"] not in RIVALS and "again" not in row


def _promises(results: Mapping[str, Any]) -> list[str]:
    lines, kept, close = [], [], []
    for model, told in results.items():
        for cell, measured in told.get("promises", {}).items():
            for row in measured["rows"]:
                if "promised" not in row:
                    continue
                mode = row["mode"].split(", at most")[0]
                bins = (_find(measured["rows"], mode, row["order"]) or {}).get("bins", [])
                shown = ", ".join(
                    f"{100 * b['promised']:.2g} / {100 * b['observed']:.2g}" for b in bins
                )
                expected = sum(b["promised"] * b["number"] for b in bins) / max(len(bins), 1)
                lines.append(
                    f"| {model} | {cell} | {mode}, {row['order']} | {_percent(row)} | "
                    f"{row['again']:.1%} | {shown} ({expected:.0f}) |"
                )
                kept.append(row["disagreement"] <= row["promised"])
                close += [abs(b["observed"] / b["promised"] - 1) < 0.3 for b in bins]
    if not lines:
        return []
    sizes = {
        model: next(iter(told["promises"].values()))["size"]
        for model, told in results.items()
        if told.get("promises")
    }
    halves = ", ".join(f"{s['points']:,} {s['split']} images of {m}" for m, s in sizes.items())
    return [
        f"Two halves of {halves}, each judged by the doubt that was calibrated on the other; "
        f"{next(iter(sizes.values()))['sets']} straggler sets.",
        f"The promise of 0.5 % was kept in {sum(kept)} of {len(kept)} rows; promised and seen "
        f"differ by less than 30 % of what was promised in {sum(close)} of {len(close)} bins.",
        "",
        "| model | (N, K, S) | mode | seen at 0.5 % | answered by the model | promised / seen |",
        "|---|---|---|---|---|---|",
        *lines,
    ]


_FRIENDLY = """Models fine-tuned through the nested objective (`fine_tune`; their forms `NAME-coded`
are shipped), before / after, untuned codes, disagreement with each form's own labels in per cent.
*Ordered*: by pixels for LeNet5, for RepVGG by the original's outputs, which know the fine-tuned
form less well. Written by `bench/finetuning.py`, which has the intervals."""


def _coding_friendly(path: Path) -> list[str]:
    """What fine-tuning buys, as finetuning.py measured it."""
    if not path.exists():
        return []
    lines = ["", "## Coding-friendly models", "", _FRIENDLY, ""]
    for model, part in json.loads(path.read_text())["parts"].items():
        before, after = (part["clean"][form]["accuracy"] for form in ("original", "fine-tuned"))
        total = part["clean"]["original"]["total"]
        rows = part[part["card"]["plan"]["outputs"]]
        cells = list(dict.fromkeys(tuple(row["cell"]) for row in rows))
        lines += [
            f"{model}: clean accuracy {before:.2%} / {after:.2%} on {total} test images; "
            f"{part['agreement']:.2%} of labels stayed.",
            "",
            "| layout | order | " + " | ".join(map(str, cells)) + " |",
            "|---|---|" + "---|" * len(cells),
        ]
        found: dict[tuple[str, str], dict[tuple, list[str]]] = {}
        for row in rows:
            of_cells = found.setdefault((row["layout"], row["order"]), {})
            wrong = f"{100 * (1 - row['rel_acc']['mean']):.2f}"
            of_cells.setdefault(tuple(row["cell"]), []).append(wrong)
        for (layout, order), of_cells in found.items():
            values = [" / ".join(of_cells[cell]) for cell in cells]
            lines.append(f"| {layout} | {order} | " + " | ".join(values) + " |")
        lines.append("")
    return lines[:-1]


def _cost_of_ordering(path: Path) -> list[str]:
    """What ordering costs, as ordering.py measured it."""
    if not path.exists():
        return []
    lines = [
        "",
        "## What ordering costs",
        "",
        "Seconds for 1,000 images beside the model's own, median of repeats by turns, by",
        "`bench/ordering.py`, which also has what other paths and features buy.",
        "",
        "| model | model | pixels, buffer 20 | 256 | 1024 | share of the model's time at 1024 |",
        "|---|---|---|---|---|---|",
    ]
    for model, part in json.loads(path.read_text())["models"].items():
        rows = {row["what"]: row for row in part["cost"]["rows"]}
        orders = [rows[f"order, buffer {size}"] for size in (20, 256, 1024)]
        times = [1e3 * row["median_s"] for row in (rows["model"], *orders)]
        lines.append(
            f"| {model} | "
            + " | ".join(f"{time:.1f} ms" for time in times)
            + f" | {orders[-1]['share_of_model']:.1%} |"
        )
    return lines


def _table(cells: Mapping[str, Any]) -> list[str]:
    names = list(cells)
    keys = {(row["mode"], row["order"]): None for cell in cells.values() for row in cell["rows"]}
    lines = ["| mode | order | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for mode, order in keys:
        values = [_percent(_find(cells[name]["rows"], mode, order)) for name in names]
        lines.append(f"| {mode} | {order} | " + " | ".join(values) + " |")
    return lines


def _draw(results: Mapping[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(
        1, len(results), figsize=(5 * len(results), 4.6), sharey=True, squeeze=False
    )
    for axis, (model, told) in zip(axes[0], results.items(), strict=True):
        names = list(told["cells"])
        for mode, order, label, alike in _SHOWN:
            found = [_find(told["cells"][name]["rows"], mode, order) for name in names]
            # None wrong has no place on a logarithmic axis: it is drawn at its floor.
            height = [max(100 * row["disagreement"], 5e-3) if row else None for row in found]
            axis.plot(names, height, label=label, linewidth=1, **system_look(alike))
        axis.set_title(model)
        axis.set_yscale("log")
        axis.tick_params(axis="x", rotation=30)
        axis.grid(alpha=0.3)
        axis.set_xlabel("(N, K, S): workers, data points, stragglers")
    axes[0, 0].set_ylabel("labels that are not the model's own, %\n(none of them: 0.005)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.legend(handles, labels, fontsize=8, ncol=4, loc="lower center")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _relative(picture: Path, page: Path) -> str:
    return f"../{picture.relative_to(page.parent.parent)}"
