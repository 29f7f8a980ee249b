"""A tuning run as a picture."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from ..tuning import TuningStep


def tuning_plot(
    history: Sequence[TuningStep],
    lambdas: np.ndarray,
    landscape: np.ndarray,
    title: str,
    path: Path,
) -> None:
    """The objective and the lambdas along the run, and the objective over (lambda_enc, lambda_dec)
    on a grid of `lambdas` with the run's path on it."""
    figure, (first, second, third) = plt.subplots(1, 3, figsize=(15, 4.2))
    steps = [entry.step for entry in history if entry.objective is not None]
    values = [entry.objective for entry in history if entry.objective is not None]
    looks = [(entry.step, entry.held_out) for entry in history if entry.held_out is not None]
    first.plot(steps, values, color="#bbbbbb", lw=1, label="on each step's own groups")
    first.plot(*zip(*looks, strict=True), color="#0072b2", marker="o", ms=3, label="held out")
    first.axhline(1, color="#555555", lw=0.8, ls="--")
    first.set(xlabel="step", ylabel="objective / the untuned code's", title="objective")
    first.legend(fontsize=8)

    path_enc, path_dec, exponent = (
        np.array([entry.parameters[name] for entry in history])
        for name in ("lambda_enc", "lambda_dec", "gap_exponent")
    )
    places = [entry.step for entry in history]
    second.semilogy(places, path_enc, color="#009e73", label="lambda_enc")
    second.semilogy(places, path_dec, color="#d55e00", label="lambda_dec, all answering")
    second.set(xlabel="step", title="lambdas")
    twin = second.twinx()
    lines = twin.plot(places, exponent, color="#cc79a7", ls=":", label="gap exponent (right)")
    # Below: curves go through every corner.
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15), "ncols": 3, "frameon": False}
    second.legend(handles=[*second.lines, *lines], fontsize=8, **below)

    shown = np.clip(landscape, None, 10 * np.nanmin(landscape))
    colours = third.pcolormesh(
        lambdas, lambdas, np.log10(shown).T, cmap="viridis", shading="nearest"
    )
    bar = figure.colorbar(colours, ax=third)
    bar.set_label("log10 objective, cut at 10 times the least")
    walk = [np.clip(path, lambdas[0], lambdas[-1]) for path in (path_enc, path_dec)]
    third.plot(*walk, color="white", lw=1.2, marker=".", ms=2)
    third.plot(walk[0][-1], walk[1][-1], "r*", ms=11, label="end")
    third.set(xscale="log", yscale="log", xlabel="lambda_enc", ylabel="lambda_dec")
    third.set_title("held-out objective, other numbers as tuned", fontsize=10)
    third.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
