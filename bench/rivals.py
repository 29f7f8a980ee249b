"""NeRCC beside its strongest rivals, and its decoder beside regressions by other kernels.

`rivals`: LeNet5's probabilities at (N, K) = (100, 20), on held-out test images: the RMSE and the
labels kept (RelAcc) of BACC, BSCC (Berrut's encoding, spline decoding: arXiv 2601.10616) and NeRCC,
untuned and tuned on training images as in `paper`, each with several seeds; and of BACC's and tuned
NeRCC's encoders with learned decoders, on images unlike those that they were learned from, too. A
95 % interval is a bootstrap over tuning seeds, straggler sets and groups of images. Gains are
paired: both codes meet the same of each.

`kernels`: a smoothing spline is the regression by one kernel of the path (arXiv 2608.28910 asks for
others). Here the answers are decoded by Matern's of smoothness 1/2, 3/2 and 5/2 and by the
Gaussian, each with the length and the noise that are best on training images, one choice for all
numbers of stragglers; beside the tuned spline and the learned decoder, by the codes of `paper`.
"""

import dataclasses
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import paper
from jaxtyping import Array, Bool, Float
from report import Report, environment, show
from workloads import OUTPUTS, PAPER, Setting, coded_answers, groups_of, own_answers

from nercc_jax import AbstractCode, Berrut, NeRCC, evaluate, load_code
from nercc_jax.codes import BerrutSpline, LearnedDecoder
from nercc_jax.evaluation import Answers, record_answers
from nercc_jax.stragglers import straggler_sets
from nercc_jax.tuning import learn_decoder

SETTING = Setting("lenet5-mnist", 100, 20)
STRAGGLERS = ("0", "10", "20", "40")
OURS = "NeRCC tuned"
Scores = tuple[np.ndarray, np.ndarray]  # squared errors, labels kept: (seeds, sets, groups)


def codes_of(data: paper.Data, seeds: int) -> dict[str, list[AbstractCode]]:
    """Return the codes by name, one for each tuning seed."""

    def tuned(code: AbstractCode) -> list[AbstractCode]:
        return [data.tune(code, seed).code for seed in range(seeds)]

    def learned(codes: Sequence[AbstractCode]) -> list[AbstractCode]:
        return [
            learn_decoder(data.network, code, data.train, key=jax.random.key(seed))
            for seed, code in enumerate(codes)
        ]

    shape = data.setting.shape
    nercc, bacc, natural = NeRCC(*shape), Berrut(*shape), BerrutSpline(*shape, ends="natural")
    ours = tuned(nercc)
    return {
        "BACC": [bacc],
        "BSCC": [BerrutSpline(*shape)],
        "BSCC, natural ends": [natural],
        "NeRCC untuned": [nercc],
        "BACC tuned": tuned(bacc),
        "BSCC tuned": tuned(natural),
        OURS: ours,
        "BACC learned": learned([bacc] * seeds),
        "NeRCC learned": learned(ours),
    }


def score(
    network: Any,
    codes: Sequence[AbstractCode],
    x: Float[np.ndarray, "groups num_data ..."],
    own: Float[np.ndarray, "groups num_data outputs"],
    masks: Mapping[str, Bool[np.ndarray, "sets num_workers"]],
) -> dict[str, Scores]:
    """Return error and labels kept of each code, set and group, by law."""
    found: dict[str, list[Scores]] = {law: [] for law in masks}
    for code in codes:
        y = jnp.asarray(coded_answers(network, code, x))
        for law, sets in masks.items():
            answers = Answers(code, y, jnp.asarray(own))
            decoded = np.asarray(answers.decode_sets(jnp.asarray(sets)).predictions)
            same = decoded.argmax(axis=-1) == own.argmax(axis=-1)
            found[law].append((np.mean((decoded - own) ** 2, axis=(2, 3)), same.mean(axis=2)))
    stacked = {law: [np.stack(each) for each in zip(*of, strict=True)] for law, of in found.items()}
    return {law: (squared, kept) for law, (squared, kept) in stacked.items()}


def summary_of(scores: Mapping[str, Scores], rounds: int = 2000) -> dict[str, dict[str, Any]]:
    """Return RMSE, RelAcc and our gain over each code, each with its 95 % interval."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in scores}
    rng, (_, sets, groups) = np.random.default_rng(0), scores[OURS][0].shape
    for number in range(rounds + 1):
        chosen, some = rng.integers(sets, size=sets), rng.integers(groups, size=groups)
        for name, (squared, kept) in scores.items():
            seeds = rng.integers(len(squared), size=len(squared))
            again = np.ix_(seeds, chosen, some) if number else ...  # the first are all of them
            found[name].append((np.sqrt(squared[again].mean()), kept[again].mean()))
    ours, summary = np.array(found[OURS]), {}
    for name, each in found.items():
        rmse, kept = np.array(each).T
        summary[name] = {}
        for what, values in (("rmse", rmse), ("rel_acc", kept), ("gain", 1 - ours[:, 0] / rmse)):
            low, high = np.quantile(values[1:], (0.025, 0.975)).tolist()
            summary[name][what] = {"mean": float(values[0]), "low": low, "high": high}
        of_seeds = np.sqrt(scores[name][0].mean(axis=(1, 2)))
        summary[name]["rmse_of_seeds"] = of_seeds.tolist()
    return summary


def run(report: Report) -> None:
    """Compare the rivals at four numbers of stragglers, with several tuning seeds."""
    start, busy = time.perf_counter(), time.process_time()
    size = {"seeds": 3, "sets": 40, "images": 5000, "steps": paper.Size().steps}
    if report.quick:
        size = {"seeds": 1, "sets": 5, "images": 200, "steps": 10}
    tuning = paper.Size(points=1000, steps=size["steps"])
    data = paper.Data.load(SETTING, tuning, "probabilities", report.data_dir)
    codes = codes_of(data, size["seeds"])
    images, _ = data.network.images("test", report.data_dir, size["images"])
    x = groups_of(images, 20)
    masks = {
        law: np.asarray(straggler_sets(data.laws[law], jax.random.key(7), 100, size["sets"]))
        for law in STRAGGLERS
    }
    some, shifted = images[: len(images) // 100 * 20], {}
    low, high = some.min(), some.max()
    noise = np.random.default_rng(0).uniform(low, high, some.shape).astype(some.dtype)
    turned = np.rot90(some, axes=(1, 2)).copy()
    unlike = {"inverted": low + high - some, "turned by 90 degrees": turned, "noise": noise}
    for name, changed in unlike.items():  # what codes were tuned and learned on is unlike these
        report.log(f"judging on {name}")
        changed = groups_of(changed, 20)
        own = own_answers(data.network, changed)
        shifted[name] = {law: {} for law in masks}
        for code in ("BACC", OURS, "NeRCC learned"):
            for law, (squared, _) in score(data.network, codes[code], changed, own, masks).items():
                shifted[name][law][code] = float(np.sqrt(np.mean(squared)))
    scores, own = {}, own_answers(data.network, x)
    for name, seeds in codes.items():
        report.log(f"judging {name}")
        scores[name] = score(data.network, seeds, x, own, masks)
    laws = {law: summary_of({name: each[law] for name, each in scores.items()}) for law in masks}
    content = {
        "environment": environment(),
        "setting": dataclasses.asdict(SETTING),
        "size": size | {"groups": len(x)},
        "laws": laws,
        "unlike": {"images": len(some), "rmse": shifted},
        "lambda_dec": {
            name: [float(code.lambda_dec) for code in codes[name]]  # pyright: ignore[reportAttributeAccessIssue]
            for name in ("BSCC tuned", OURS)
        },
        "seconds": round(time.perf_counter() - start),
        "cpu_seconds": round(time.process_time() - busy),
    }
    report.write(content)
    show({"S": law, "code": name, **row["rmse"]}
         for law, rows in laws.items() for name, row in rows.items())  # fmt: skip


# --- other kernels

KERNELS = {
    "Matern 1/2": lambda d: np.exp(-d),
    "Matern 3/2": lambda d: (1 + np.sqrt(3) * d) * np.exp(-np.sqrt(3) * d),
    "Matern 5/2": lambda d: (1 + np.sqrt(5) * d + 5 / 3 * d**2) * np.exp(-np.sqrt(5) * d),
    "Gaussian": lambda d: np.exp(-(d**2) / 2),
}
LENGTHS = tuple(np.geomspace(0.0125, 3.2, 9))  # data points lie from -1 to 1
DEVIATIONS = (1e-8, 1e-5, 1e-3, 1e-2)  # of the noise, by the variance
NAMES = ("lenet5-mnist:100:20", "repvgg-cifar10:60:20", "vit-cifar10:20:8", "vit-cifar10:60:20")
SPLINE = "cubic spline"


def decoder_by_kernel(code: NeRCC, kernel: str, length: float, noise: float) -> LearnedDecoder:
    """Return a code's encoder with the regression by a kernel of its points."""
    places = np.concatenate([np.asarray(code.beta), np.asarray(code.alpha)]).astype(np.float64)
    moments = KERNELS[kernel](np.abs(places[:, None] - places) / length)
    moments += noise * np.diag(np.arange(len(places)) < code.num_workers)
    values, vectors = np.linalg.eigh(moments)  # rounding may have left some slightly negative
    root = np.linalg.qr(np.sqrt(np.clip(values, 0, None))[:, None] * vectors.T, mode="r")
    encoder = code.encoder_matrix()
    return LearnedDecoder(encoder, np.asarray(root, encoder.dtype))


def best_of(
    answers: Answers, code: NeRCC, kernel: str, masks: Sequence[Bool[Array, "sets num_workers"]]
) -> tuple[float, float]:
    """Return the length and the noise with the least geometric mean of the laws' errors."""
    ends = np.cumsum([len(sets) for sets in masks])[:-1]

    def height(pair: tuple[float, float]) -> float:
        tried = eqx.tree_at(lambda each: each.code, answers, decoder_by_kernel(code, kernel, *pair))
        losses = np.split(np.asarray(_losses(tried, jnp.concatenate(masks))), ends)
        return float(np.mean([np.log(each.mean()) for each in losses]))

    return min(((a, b) for a in LENGTHS for b in DEVIATIONS), key=height)


@eqx.filter_jit
def _losses(answers: Answers, masks: Bool[Array, "sets num_workers"]) -> Float[Array, " sets"]:
    return answers.losses(masks, "mse")


def kernels(report: Report, only: tuple[str, ...] = NAMES) -> None:
    """Measure the gains of all kernels over the tuned spline, paired, and what was chosen.

    Options:
        only: Parts to run.
    """
    size, parts = paper.Size(points=1000), {}
    if report.quick:
        size = paper.Size(points=240, sets=4, cells=3)
    for setting, outputs in itertools.product(PAPER, OUTPUTS):
        if setting.name not in only:
            continue
        data = paper.Data.load(setting, size, outputs, report.data_dir)
        tuned, learned = (load_code(paper.code_file(data, kind)) for kind in ("tuned", "learned"))
        assert isinstance(tuned, NeRCC)
        few = data.train[: max(200, 10 * setting.num_data)]
        answers = record_answers(data.network, tuned, few)
        masks = [
            jnp.asarray(straggler_sets(law, jax.random.key(5), setting.num_workers, 10))
            for law in data.laws.values()
        ]
        codes: dict[str, AbstractCode] = {SPLINE: tuned, "learned": learned}
        chosen = {kernel: best_of(answers, tuned, kernel, masks) for kernel in KERNELS}
        codes |= {kernel: decoder_by_kernel(tuned, kernel, *chosen[kernel]) for kernel in KERNELS}
        rows = evaluate(
            data.network, codes, data.test, data.laws, key=jax.random.key(1), num_sets=size.sets
        )
        found = paper.gains(rows, [name for name in codes if name != SPLINE], SPLINE)
        part = {"chosen": {name: {"length": a, "noise": b} for name, (a, b) in chosen.items()}}
        parts.setdefault(setting.name, {})[outputs] = part | {"gains": found}
        report.log(f"{setting.name} {outputs}")
        show({"decoder": name, **each["mean"]} for name, each in found.items())
        jax.clear_caches()
    report.write({"environment": environment(), "size": vars(size), "parts": parts})
