"""Other kernels than the cubic spline's, to decode what tuned NeRCC encodes.

    python bench/kernels.py [--quick] [--only lenet5-mnist:100:20] [--data-dir FOLDER]

A smoothing spline is the regression by one kernel of the path (arXiv 2608.28910 asks for others).
Here the answers are decoded by Matern's of smoothness 1/2, 3/2 and 5/2 and by the Gaussian, each
with the length and the noise that are best on training images, one choice for all numbers of
stragglers; beside the tuned spline and the learned decoder. On held-out images; gains are over the
tuned spline, paired, with 95 % intervals over straggler sets and groups of images. Writes
results/kernels.json, which docs/results.md shows.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import paper
from _report import environment, write_json
from _settings import PACKAGES, PAPER
from jaxtyping import Array, Bool, Float
from rich.console import Console

from nercc_jax import AbstractCode, NeRCC, evaluate, load_code
from nercc_jax.codes import LearnedDecoder
from nercc_jax.evaluation import Answers, record_answers
from nercc_jax.stragglers import straggler_sets
from nercc_jax.tuning._learn_decoder import places_of, root_of

KERNELS = {
    "Matern 1/2": lambda d: np.exp(-d),
    "Matern 3/2": lambda d: (1 + np.sqrt(3) * d) * np.exp(-np.sqrt(3) * d),
    "Matern 5/2": lambda d: (1 + np.sqrt(5) * d + 5 / 3 * d**2) * np.exp(-np.sqrt(5) * d),
    "Gaussian": lambda d: np.exp(-(d**2) / 2),
}
LENGTHS = tuple(np.geomspace(0.0125, 3.2, 9))  # data points lie from -1 to 1
NOISES = (1e-8, 1e-5, 1e-3, 1e-2)  # of the variance
NAMES = ("lenet5-mnist:100:20", "repvgg-cifar10:60:20", "vit-cifar10:20:8", "vit-cifar10:60:20")
OURS = "cubic spline"


def decoder_by_kernel(code: NeRCC, kernel: str, length: float, noise: float) -> LearnedDecoder:
    """Return a code's encoder with the regression by a kernel of its points."""
    places = places_of(code).astype(np.float64)
    moments = KERNELS[kernel](np.abs(places[:, None] - places) / length)
    answers = np.arange(len(places)) < code.num_workers
    root = np.linalg.qr(root_of(moments + noise * np.diag(answers)), mode="r")
    encoder = code.encoder_matrix()
    return LearnedDecoder(encoder, np.asarray(root, encoder.dtype))


def best_of(
    answers: Answers, code: NeRCC, kernel: str, masks: Sequence[Bool[Array, "sets num_workers"]]
) -> tuple[float, float]:
    """Return the length and the noise with the least geometric mean of the laws' errors."""
    ends = np.cumsum([len(sets) for sets in masks])[:-1]

    def height(length: float, noise: float) -> float:
        decoder = decoder_by_kernel(code, kernel, length, noise)
        tried = eqx.tree_at(lambda each: each.code, answers, decoder)
        losses = np.split(np.asarray(_losses(tried, jnp.concatenate(masks))), ends)
        return float(np.mean([np.log(each.mean()) for each in losses]))

    return min(((a, b) for a in LENGTHS for b in NOISES), key=lambda pair: height(*pair))


@eqx.filter_jit
def _losses(answers: Answers, masks: Bool[Array, "sets num_workers"]) -> Float[Array, " sets"]:
    return answers.losses(masks, "mse")


def measure(data: paper.Data) -> dict[str, Any]:
    """Return the gains of all decoders over the tuned spline, and what was chosen."""
    tuned, learned = (
        load_code(paper.code_file(data, paper.RESULTS, kind)) for kind in ("tuned", "learned")
    )
    assert isinstance(tuned, NeRCC)
    few = data.train[: max(200, 10 * data.setting.num_data)]
    answers = record_answers(data.network, tuned, few)
    masks = [
        jnp.asarray(straggler_sets(law, jax.random.key(5), data.setting.num_workers, 10))
        for law in data.laws.values()
    ]
    codes: dict[str, AbstractCode] = {OURS: tuned, "learned": learned}
    chosen = {}
    for kernel in KERNELS:
        chosen[kernel] = best_of(answers, tuned, kernel, masks)
        codes[kernel] = decoder_by_kernel(tuned, kernel, *chosen[kernel])
    rows = evaluate(
        data.network, codes, data.test, data.laws, key=jax.random.key(1), num_sets=data.size.sets
    )
    return {
        "chosen": {kernel: {"length": a, "noise": b} for kernel, (a, b) in chosen.items()},
        "gains": paper.gains(rows, [name for name in codes if name != OURS], OURS),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="few images, sets and cells")
    parser.add_argument("--only", choices=NAMES, help="one part")
    parser.add_argument("--data-dir", type=Path, default=paper.HERE.parent.parent / "shared/data")
    options = parser.parse_args()
    size = dataclasses.replace(paper.FULL, points=1000)
    if options.quick:
        size = dataclasses.replace(paper.FULL, points=240, sets=4, cells=3)
    path = paper.RESULTS / ("kernels-quick.json" if options.quick else "kernels.json")
    console, parts = Console(emoji=False), {}
    for setting in PAPER:
        if setting.name in NAMES and options.only in (None, setting.name):
            for outputs in ("probabilities", "logits"):
                data = paper.Data.load(setting, size, outputs, options.data_dir)
                part = measure(data)
                parts.setdefault(setting.name, {})[outputs] = part
                for name, each in part["gains"].items():
                    mean, half = (100 * each["mean"][end] for end in ("mean", "half_width"))
                    console.print(f"{setting.name} {outputs}: {name:11} {mean:6.1f} ± {half:.1f} %")
                jax.clear_caches()
    write_json(path, {"environment": environment(PACKAGES), "size": vars(size), "parts": parts})


if __name__ == "__main__":
    main()
