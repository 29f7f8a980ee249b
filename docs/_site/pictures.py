"""The pictures of the concepts page, drawn from a code's own curves; and README's, by running this.

.venv/bin/python docs/_site/pictures.py
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nercc_jax import NeRCC
from nercc_jax.evaluation.pictures import FONT, WIDTH
from nercc_jax.splines import smoothing_spline

# Of one batch: data points, coded ones, those that are lost, and what is decoded.
DATA, CODED, LOST, FOUND = "#0072b2", "#009e73", "#d55e00", "#cc79a7"
CURVE = "#999999"
_ALONG = np.linspace(-1, 1, 400)


def encoder_curve(code: NeRCC, x: np.ndarray, *, what: str) -> Figure:
    """One coordinate of K data points (K,), the encoder's curve, and what N workers get of it."""
    figure, axis = plt.subplots(figsize=(7.2, 3.0), layout="constrained")
    curve = smoothing_spline(code.alpha, x, code.lambda_enc)
    coded, count = np.asarray(code.encode(x)), code.num_workers
    axis.plot(_ALONG, np.asarray(curve.evaluate(_ALONG)), color=CURVE, zorder=1)
    axis.scatter(code.beta, coded, 26, color=CODED, zorder=2, label=f"{count} coded data points")
    axis.scatter(code.alpha, x, 60, color=DATA, marker="D", zorder=3, label=f"{len(x)} data points")
    _finish(axis, "place on the line: alpha of data points, beta of workers", what)
    return figure


def decoder_curve(
    code: NeRCC, answers: np.ndarray, available: np.ndarray, own: np.ndarray, *, what: str
) -> Figure:
    """One output of N workers (N,), the decoder's curve through those available, and what it says.

    `own` (K,) are the model's own outputs of the data points, which nobody has computed.
    """
    figure, axis = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
    curve = smoothing_spline(code.beta, answers, **code.decoding_options(jnp.asarray(available)))
    decoded = np.asarray(code.decode(answers, available))
    axis.plot(_ALONG, np.asarray(curve.evaluate(_ALONG)), color=CURVE, zorder=1)
    beta, alpha = np.asarray(code.beta), np.asarray(code.alpha)
    axis.scatter(beta[available], answers[available], 26, color=CODED, zorder=2, label="answers")
    axis.scatter(
        beta[~available], answers[~available], 34, color=LOST, marker="x", zorder=2,
        label="would be the stragglers' (never read)",
    )  # fmt: skip
    axis.scatter(alpha, decoded, 46, color=FOUND, zorder=3, label="decoded predictions")
    axis.scatter(
        alpha, own, 80, facecolors="none", edgecolors=DATA, marker="D", zorder=4,
        label="the model's own",
    )  # fmt: skip
    _finish(axis, "place on the line", what)
    return figure


def _finish(axis: Axes, along: str, what: str) -> None:
    axis.set(xlabel=along, ylabel=what)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def digits(code: NeRCC, available: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """K test digits, what workers get of them, and what is decoded from those available."""
    from nercc_models import load_data, load_model

    model, data = load_model("lenet5-digits"), load_data("digits", "test")
    chosen = np.random.default_rng(seed).permutation(len(data.labels))[: code.num_data]
    x = np.asarray(model.preprocess(data.images[chosen]))
    coded = np.asarray(code.encode(x))
    answers, own = np.asarray(model(coded)), np.asarray(model(x))
    decoded = np.asarray(code.decode(answers, available))
    return {"x": x, "coded": coded, "answers": answers, "own": own, "decoded": decoded}


def batch_figure(
    images: np.ndarray,
    coded: np.ndarray,
    available: np.ndarray,
    decoded: Sequence[Any],
    own: Sequence[Any],
) -> Any:
    """Draw K images, the N mixtures that workers get, with lost ones crossed out, and K labels.

    Images are (K, height, width) in grey, or (K, height, width, 3). Decoded labels are drawn as
    text, the model's own where they differ.
    """
    count, workers = len(images), len(coded)
    columns = max((workers + 1) // 2, count, 10)
    figure = plt.figure(figsize=(WIDTH, 4.3))
    wide = figure.bbox.width / figure.bbox.height
    size, low, high = 0.92 / columns, images.min(), images.max()

    def cell(number: int, of: int, height: float, colour: str) -> Any:
        """Return one of a row's cells, in the middle of the figure."""
        left = 0.04 + ((columns - of) / 2 + number) * size
        axis = figure.add_axes((left, height, 0.92 * size, 0.92 * size * wide))
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set(edgecolor=colour, linewidth=2)
        return axis

    half = (workers + 1) // 2
    cells = [cell(number, count, 0.775, DATA) for number in range(count)]
    for number, there in enumerate(available):
        row, column = divmod(number, half)
        axis = cell(column, half, (0.485, 0.305)[row], CODED if there else LOST)
        for ends in [] if there else [(0, 1), (1, 0)]:
            axis.plot([0, 1], ends, color=LOST, lw=2.5, transform=axis.transAxes)
        cells.append(axis)
    for axis, image in zip(cells, [*images, *coded], strict=True):
        shown = np.clip((image - low) / max(high - low, 1e-12), 0, 1)
        axis.imshow(shown, cmap="gray_r", vmin=0, vmax=1)
    same = [label == true for label, true in zip(decoded, own, strict=True)]
    for number, kept in enumerate(same):
        axis = cell(number, count, 0.06, FOUND if kept else LOST)
        axis.text(
            0.5, 0.5, str(decoded[number]), size=min(18, 180 / columns), ha="center",
            va="center", color="black" if kept else LOST, transform=axis.transAxes,
        )  # fmt: skip
        if not kept:
            axis.set_xlabel(f"model: {own[number]}", color=LOST, size=FONT)
    lost = int(np.sum(~available))
    for text, height in (
        (f"{count} images", 0.94),
        (f"{workers} coded images, one a worker; {lost} workers straggle", 0.655),
        (
            f"{count} labels, from the {workers - lost} answers that came: "
            f"{'all' if all(same) else sum(same)} as the model's own",
            0.235,
        ),
    ):
        figure.text(0.5, height, text, ha="center", va="center", size=FONT)
    return figure


def main() -> None:
    """Writes README's picture."""
    code = NeRCC(8, 20)
    available = ~np.isin(np.arange(20), [3, 8, 13, 17])
    found = digits(code, available)
    figure = batch_figure(
        found["x"][..., 0], found["coded"][..., 0], available,
        found["decoded"].argmax(-1), found["own"].argmax(-1),
    )  # fmt: skip
    figure.savefig(Path(__file__).parents[1] / "how-it-works.png", dpi=130)


if __name__ == "__main__":
    main()
