"""NeRCC beside its strongest rivals.

`rivals`: LeNet5's probabilities at (N, K) = (100, 20), on held-out test images: the RMSE and the
labels kept (RelAcc) of BACC, BSCC (Berrut's encoding, spline decoding: arXiv 2601.10616) and NeRCC,
untuned and tuned on training images as in `paper`, each with several seeds; and of BACC's and tuned
NeRCC's encoders with learned decoders, on images unlike those that they were learned from, too. A
95 % interval is a bootstrap over tuning seeds, straggler sets and groups of images. Gains are
paired: both codes meet the same of each.

"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import paper
from jaxtyping import Bool, Float
from report import Report, environment, show
from workloads import Setting, coded_answers, groups_of, own_answers

from nercc_jax import AbstractCode, Berrut, NeRCC
from nercc_jax.codes import BerrutSpline
from nercc_jax.evaluation import Answers
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
            ends = np.quantile(values[1:], (0.025, 0.975))
            # There is no gain over what is exact.
            summary[name][what] = {
                end: float(value) if np.isfinite(value) else None
                for end, value in zip(("mean", "low", "high"), (values[0], *ends), strict=True)
            }
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
