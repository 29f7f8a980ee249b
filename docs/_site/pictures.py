"""The pictures of the concepts page, drawn from a code's own curves; and README's, by running this.

.venv/bin/python docs/_site/pictures.py
"""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nercc_jax import NeRCC
from nercc_jax.evaluation.pictures import CODED, DATA, FOUND, LOST, batch_figure
from nercc_jax.splines import smoothing_spline

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
