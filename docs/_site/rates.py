"""Tables and pictures of docs/results.md about slopes of the error in the number of workers."""

from collections.abc import Iterator, Mapping
from typing import Any

import matplotlib.pyplot as plt

from .looks import system_look
from .paper import PAPER
from .results import WIDTH, load, strong

_CONVERGENCE, _INDEPENDENT = PAPER["convergence"], load("independent")
CURVES = _CONVERGENCE["curves"]


def setting() -> str:
    """Return the sizes, and the size of the noise."""
    found = _CONVERGENCE["settings"]
    workers, noise = found["num_workers"], max(found["noise_by_output_rms"])
    return (
        f"K = {found['num_data']}, N from {workers[0]} to {workers[-1]:,} at {len(workers)} "
        f"values, {found['straggler_sets']} straggler sets each. Noise has a standard deviation of "
        f"{100 * noise:g} % of the outputs' root mean square."
    )


def convergence() -> Iterator[dict[str, str]]:
    """Yield the slope of each curve, and the bounds that it is held against."""
    for curve in CURVES:
        last, fit, bounds = curve["points"][-1], curve["large"], curve["bounds"]
        yield {
            "function": curve["function"],
            "stragglers": curve["law"],
            "noise": f"{100 * curve['noise']:g} %",
            "code": curve["code"],
            "slope": f"{fit['slope']:+.2f}\u00a0±\u00a0{fit['standard_error']:.2f}" if fit else "",
            "bound": "<br>".join(f"`{b['formula']}`" for b in bounds),
            "its slope": "<br>".join(f"{b['slope']:+.2f}" for b in bounds),
            "verdict": "<br>".join(map(_verdict, bounds)),
            "error at the largest N": f"{last['mean']:.2g}\u00a0±\u00a0{last['half_width']:.1g}",
        }


def _verdict(bound: Mapping[str, Any]) -> str:
    if not bound["confirmed"]:
        return strong("violated")
    return "confirmed" if bound["slope"] < -0.1 else "confirmed (it does not fall)"


def picture() -> Any:
    """Return the errors without noise against N, by function and law."""
    panels = dict.fromkeys((c["function"], c["law"]) for c in CURVES if not c["noise"])
    figure, axes = plt.subplots(2, -(-len(panels) // 2), figsize=(WIDTH, 5), layout="constrained")
    for axis, (function, law) in zip(axes.flat, panels, strict=False):
        for curve in CURVES:
            if (curve["function"], curve["law"], curve["noise"]) == (function, law, 0):
                points = [(p["num_workers"], p["mean"]) for p in curve["points"]]
                look = system_look(curve["code"])
                axis.plot(*zip(*points, strict=True), markersize=3, label=curve["code"], **look)
        axis.set(xscale="log", yscale="log", title=f"{function}\n{law}")
    for axis in axes[-1]:
        axis.set_xlabel("workers N")
    figure.supylabel("mean squared error, no noise")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), ncols=4, loc="outside lower center")
    return figure


def independent() -> Iterator[dict[str, str]]:
    """Yield the slopes where each worker straggles with probability p, and the claimed forms'."""
    found = {(c["share"], c["function"], c["code"]): c for c in _INDEPENDENT["curves"]}
    for share, function in dict.fromkeys((p, f) for p, f, _ in found):
        own = {code: c for (p, f, code), c in found.items() if (p, f) == (share, function)}
        slopes = {
            code: f"{c['slope']:.2f} [{c['interval'][0]:.2f},\u00a0{c['interval'][1]:.2f}]"
            for code, c in own.items()
        }
        forms = {rate: f"{value:.2f}" for rate, value in own["BACC"]["rates"].items()}
        yield {"p": share, "function": function, **slopes, **forms}
