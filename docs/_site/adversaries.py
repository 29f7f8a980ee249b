"""Tables and pictures of docs/adversaries.md: workers that lie."""

from collections.abc import Iterator, Mapping
from typing import Any

import matplotlib.pyplot as plt

from .looks import system_look
from .results import WIDTH, load, percent

PARTS = load("adversaries")["parts"]
ATTACKS = {
    "noise": "noise",
    "flip": "sign flip",
    "worst": "worst of three strengths",
    "coalition": "coalition of neighbours",
}
PLAIN, REJECT, REPEATED = "NeRCC", "NeRCC, reject", "repeated NeRCC, reject"
MEDIAN = "replication, median"
Row = Mapping[str, Any]


def _by_cell(part: Row) -> dict[tuple[str, str, int], Row]:
    return {(r["method"], r["attack"], r["adversaries"]): r for r in part["rows"]}


def where(name: str) -> str:
    """Return a part's model and sizes."""
    model, workers, data = name.split(":")
    return f"{model} (N = {workers}, K = {data})"


def picture() -> Any:
    """Return the labels that differ, by model, attack and number of adversaries."""
    figure, panels = plt.subplots(
        len(PARTS), 4, figsize=(WIDTH, 2.2 * len(PARTS) + 1), layout="constrained", sharey="row",
        squeeze=False,
    )  # fmt: skip
    for row, (name, part) in zip(panels, PARTS.items(), strict=True):
        for panel, (kind, words) in zip(row, ATTACKS.items(), strict=True):
            for method in dict.fromkeys(r["method"] for r in part["rows"]):
                some = [r for r in part["rows"] if r["method"] == method and r["attack"] == kind]
                panel.errorbar(
                    [r["adversaries"] for r in some],
                    [max(100 * r["disagreement"]["mean"], 0.01) for r in some],
                    yerr=[100 * r["disagreement"]["half_width"] for r in some],
                    markersize=3, lw=0.8, label=method, **system_look(method),
                )  # fmt: skip
            panel.set(yscale="log")
            panel.set_title(words.replace(" of ", "\nof "))
        row[0].set_ylabel(f"{name.split(':')[0]}\nlabels that differ, %")
    for panel in panels[-1]:
        panel.set_xlabel("adversaries of 100")
    figure.legend(*panels[0][0].get_legend_handles_labels(), ncols=3, loc="outside lower center")
    return figure


def gains() -> Iterator[dict[str, str]]:
    """Yield by how much rejection divides plain decoding's error, and labels that differ."""
    for name, part in PARTS.items():
        rows, most = _by_cell(part), max(part["size"]["adversaries"])
        for kind, words in ATTACKS.items():
            mse = {m: rows[m, kind, most]["mse"]["mean"] for m in (PLAIN, REJECT)}
            yield {
                "model": name.split(":")[0],
                f"attack by {most}": words,
                "MSE: plain / reject": f"{mse[PLAIN] / mse[REJECT]:.2g}",
                **{
                    f"{m}, %": percent(rows[m, kind, most]["disagreement"]["mean"], 0)
                    for m in (PLAIN, REJECT, REPEATED, MEDIAN)
                },
            }


def _cell(row: Row) -> str:
    mse, off = row["mse"], row["disagreement"]
    labels = percent(off["mean"], off["half_width"], 2)
    return f"{mse['mean']:.3g}\u00a0±\u00a0{mse['half_width']:.2g} ({labels})"


def cells(part: Row) -> Iterator[dict[str, str]]:
    """Yield error and labels that differ of every attack and method."""
    rows, counts = _by_cell(part), part["size"]["adversaries"]
    for kind, words in ATTACKS.items():
        for m in dict.fromkeys(r["method"] for r in part["rows"]):
            yield {"attack": words, "method": m} | {
                f"A = {a}": _cell(rows[m, kind, a]) for a in counts
            }


def without_liars(part: Row) -> Iterator[dict[str, str]]:
    """Yield what decoders that allow for liars cost where there is none."""
    rows = _by_cell(part)
    for m in dict.fromkeys(r["method"] for r in part["rows"]):
        row = rows[m, "none", 0]
        rejected = f"{row['falsely']['mean']:.2f}" if "falsely" in row else ""
        yield {
            "method": m,
            "MSE (labels that differ, %)": _cell(row),
            "honest workers rejected": rejected,
        }


def caught(part: Row) -> Iterator[dict[str, str]]:
    """Yield the share of liars that were caught, and the honest workers that were rejected."""
    rows = _by_cell(part)
    for kind, words in ATTACKS.items():
        for m in dict.fromkeys(r["method"] for r in part["rows"] if "reject" in r["method"]):
            some = {a: rows[m, kind, a] for a in part["size"]["adversaries"]}
            yield {"attack": words, "method": m} | {
                f"A = {a}": f"{100 * r['caught']['mean']:.0f}, {r['falsely']['mean']:.2f}"
                for a, r in some.items()
            }
