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
from nercc_jax.splines import smoothing_spline

# Okabe and Ito's colours, told apart by colour-blind readers too.
DATA, CODED, LOST, FOUND, CURVE = "#0072b2", "#009e73", "#d55e00", "#cc79a7", "#999999"
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
    curve = smoothing_spline(code.beta, answers, **code._decoding(jnp.asarray(available)))
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


def coded_batch(
    images: np.ndarray,
    coded: np.ndarray,
    available: np.ndarray,
    decoded: Sequence[Any],
    own: Sequence[Any],
) -> Figure:
    """K images, the N mixtures that workers get, lost ones crossed out, and K decoded labels."""
    count, workers = len(images), len(coded)
    columns = max(workers // 2, count)
    figure = plt.figure(figsize=(8.2, 5.6))
    size, left = 0.92 / columns, 0.04
    rows = {"data": 0.775, "first": 0.485, "second": 0.305, "labels": 0.06}

    def place(column: float, row: str) -> Axes:
        box = (left + column * size, rows[row], 0.92 * size, 0.92 * size * 8.2 / 5.6)
        axis = figure.add_axes(box)
        axis.set(xticks=[], yticks=[])
        return axis

    offset = (columns - count) / 2
    for column, image in enumerate(images):
        _show(place(offset + column, "data"), image, images, DATA)
    half = (workers + 1) // 2
    for number, image in enumerate(coded):
        row, column = ("first", number) if number < half else ("second", number - half)
        axis = place((columns - half) / 2 + column, row)
        _show(axis, image, images, CODED if available[number] else LOST)
        if not available[number]:
            axis.plot([0, 1], [0, 1], color=LOST, lw=2.5, transform=axis.transAxes)
            axis.plot([0, 1], [1, 0], color=LOST, lw=2.5, transform=axis.transAxes)
    for column, (label, true) in enumerate(zip(decoded, own, strict=True)):
        axis = place(offset + column, "labels")
        same = label == true
        axis.text(
            0.5, 0.5, str(label), size=22, ha="center", va="center", transform=axis.transAxes,
            color="black" if same else LOST,
        )  # fmt: skip
        _frame(axis, FOUND if same else LOST)
        if not same:
            axis.set_xlabel(f"model: {true}", color=LOST, size=9)
    lost, kept = int(np.sum(~available)), sum(a == b for a, b in zip(decoded, own, strict=True))
    for text, height in (
        (f"{count} images", 0.94),
        (f"{workers} coded images, one a worker; {lost} workers straggle", 0.655),
        (
            f"{count} labels, from the {workers - lost} answers that came: "
            f"{'all' if kept == count else kept} as the model's own",
            0.235,
        ),
    ):
        figure.text(0.5, height, text, ha="center", va="center", size=12)
    return figure


def _show(axis: Axes, image: np.ndarray, scale: np.ndarray, colour: str) -> None:
    axis.imshow(image, cmap="gray_r", vmin=scale.min(), vmax=scale.max())
    _frame(axis, colour)


def _frame(axis: Axes, colour: str) -> None:
    for spine in axis.spines.values():
        spine.set(edgecolor=colour, linewidth=2)


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


def main() -> None:
    """Writes README's picture."""
    code = NeRCC(8, 20)
    available = ~np.isin(np.arange(20), [3, 8, 13, 17])
    found = digits(code, available)
    figure = coded_batch(
        found["x"][..., 0], found["coded"][..., 0], available,
        found["decoded"].argmax(-1), found["own"].argmax(-1),
    )  # fmt: skip
    figure.savefig(Path(__file__).parents[1] / "how-it-works.png", dpi=130)


if __name__ == "__main__":
    main()
