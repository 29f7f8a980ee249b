"""NeRCC beside its strongest rivals at a few numbers of stragglers, with intervals of everything.

    python bench/rivals.py [--quick] [--data-dir FOLDER] [--output FOLDER]

LeNet5's probabilities at (N, K) = (100, 20), on held-out test images: the RMSE and the labels kept
(RelAcc) of BACC, BSCC (Berrut's encoding, spline decoding: arXiv 2601.10616) and NeRCC, untuned and
tuned on training images as in `paper.py`, each with several seeds; and of BACC's and tuned NeRCC's
encoders with learned decoders, on images unlike those that they were learned from, too. Writes
rivals.json, which docs/results.md shows.

A 95 % interval is a bootstrap over tuning seeds, straggler sets and groups of images. Gains are
paired: both codes meet the same of each.
"""

import argparse
import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import paper
from _report import environment, write_json
from _settings import PACKAGES, Setting
from jaxtyping import Bool, Float
from rich.console import Console
from rich.progress import Progress

from nercc_jax import AbstractCode, Berrut, NeRCC
from nercc_jax.codes import BerrutSpline, encode_groups
from nercc_jax.codes._groups import decode_sets
from nercc_jax.stragglers import straggler_sets
from nercc_jax.tuning import learn_decoder

_SETTING = Setting("lenet5-mnist", 100, 20)
_STRAGGLERS = ("0", "10", "20", "40")
_OURS = "NeRCC tuned"
_ROUNDS = 2000
_BATCH = 500


@dataclasses.dataclass(frozen=True)
class Size:
    """The amount that is measured: tuning seeds, straggler sets, test images."""

    seeds: int = 3
    sets: int = 40
    images: int = 5000


@dataclasses.dataclass(frozen=True)
class Scores:
    """Mean squared error and share of labels kept, by tuning seed, straggler set and group."""

    squared: Float[np.ndarray, "seeds sets groups"]
    kept: Float[np.ndarray, "seeds sets groups"]


def codes_of(data: paper.Data, seeds: int, console: Console) -> dict[str, list[AbstractCode]]:
    """Return the codes by name, one for each tuning seed."""
    with Progress(console=console) as bar:

        def tuned(code: Any, name: str) -> list[AbstractCode]:
            return [
                paper.tune_code(data, code, f"{name}, seed {seed}", bar, seed).code
                for seed in range(seeds)
            ]

        def learned(codes: list[AbstractCode]) -> list[AbstractCode]:
            bar.add_task("learning decoders", total=None)
            return [
                learn_decoder(data.network, code, data.train, key=jax.random.key(seed))
                for seed, code in enumerate(codes)
            ]

        nercc, bacc = NeRCC(*data.shape), Berrut(*data.shape)
        ours = tuned(nercc, "NeRCC")
        natural = BerrutSpline(*data.shape, ends="natural")
        return {
            "BACC": [bacc],
            "BSCC": [BerrutSpline(*data.shape)],
            "BSCC, natural ends": [natural],
            "NeRCC untuned": [nercc],
            "BACC tuned": tuned(bacc, "BACC"),
            "BSCC tuned": tuned(natural, "BSCC"),
            _OURS: ours,
            "BACC learned": learned([bacc] * seeds),
            "NeRCC learned": learned(ours),
        }


def score(
    network: Any,
    code: AbstractCode,
    x: Float[np.ndarray, "groups num_data ..."],
    own: Float[np.ndarray, "groups num_data outputs"],
    masks: Mapping[str, Bool[np.ndarray, "sets num_workers"]],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return error and labels kept of each set and group, by law."""
    coded = np.asarray(jax.jit(encode_groups)(code, jnp.asarray(x)))
    y = outputs_of(network, coded.reshape(-1, *coded.shape[2:])).reshape(*coded.shape[:2], -1)
    found = {}
    for law, sets in masks.items():
        decoded = np.asarray(decode_sets(code, jnp.asarray(y), sets).predictions)
        same = decoded.argmax(axis=-1) == own.argmax(axis=-1)
        found[law] = (np.mean((decoded - own) ** 2, axis=(2, 3)), same.mean(axis=2))
    return found


def unlike(images: Float[np.ndarray, "images ..."]) -> dict[str, np.ndarray]:
    """Return images unlike those that codes were tuned and decoders were learned on."""
    low, high = images.min(), images.max()
    noise = np.random.default_rng(0).uniform(low, high, images.shape)
    return {
        "inverted": low + high - images,
        "turned by 90 degrees": np.rot90(images, axes=(1, 2)).copy(),
        "noise": noise.astype(images.dtype),
    }


def _shifted(
    network: Any,
    codes: Mapping[str, list[AbstractCode]],
    x: Float[np.ndarray, "groups num_data ..."],
    masks: Mapping[str, Bool[np.ndarray, "sets num_workers"]],
) -> dict[str, dict[str, float]]:
    """Return the RMSE by law and code, over all tuning seeds."""
    own = outputs_of(network, x.reshape(-1, *x.shape[2:])).reshape(*x.shape[:2], -1)
    found: dict[str, dict[str, float]] = {law: {} for law in masks}
    for name in ("BACC", _OURS, "NeRCC learned"):
        each = [score(network, code, x, own, masks) for code in codes[name]]
        for law in masks:
            found[law][name] = float(np.sqrt(np.mean([one[law][0] for one in each])))
    return found


def outputs_of(network: Any, batch: np.ndarray) -> np.ndarray:
    """Return the model's outputs, in batches of one shape."""
    run = jax.jit(lambda images: network(images))
    padded = np.concatenate([batch, batch[: -len(batch) % _BATCH]])
    parts = [np.asarray(run(padded[i : i + _BATCH])) for i in range(0, len(padded), _BATCH)]
    return np.concatenate(parts)[: len(batch)]


def summary_of(scores: Mapping[str, Scores], rounds: int = _ROUNDS) -> dict[str, dict[str, Any]]:
    """Return RMSE, RelAcc and our gain over each code, each with its 95 % interval."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in scores}
    rng = np.random.default_rng(0)
    _, sets, groups = scores[_OURS].squared.shape
    for number in range(rounds + 1):
        chosen, some = rng.integers(sets, size=sets), rng.integers(groups, size=groups)
        for name, each in scores.items():
            seeds = rng.integers(len(each.squared), size=len(each.squared))
            again = np.ix_(seeds, chosen, some) if number else ...  # the first are all of them
            found[name].append((np.sqrt(each.squared[again].mean()), each.kept[again].mean()))
    ours = np.array(found[_OURS])
    return {
        name: {
            "rmse": estimate(np.array(each)[:, 0]),
            "rel_acc": estimate(np.array(each)[:, 1]),
            "gain": estimate(1 - ours[:, 0] / np.array(each)[:, 0]),
            "rmse_of_seeds": np.sqrt(scores[name].squared.mean(axis=(1, 2))).tolist(),
        }
        for name, each in found.items()
    }


def estimate(values: Float[np.ndarray, " rounds"]) -> dict[str, float]:
    """Return the first value, and the 95 % interval of the others."""
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return {"mean": float(values[0]), "low": float(low), "high": float(high)}


def measure(size: Size, steps: int, data_dir: Path, console: Console) -> dict[str, Any]:
    """Return the results, ready for JSON."""
    tuning = dataclasses.replace(paper.FULL, points=1000, steps=steps)
    data = paper.Data.load(_SETTING, tuning, "probabilities", data_dir)
    codes = codes_of(data, size.seeds, console)
    images, _ = data.network.images("test", data_dir, size.images, 0)
    x = images[: len(images) // 20 * 20].reshape(-1, 20, *images.shape[1:])
    own = outputs_of(data.network, x.reshape(-1, *x.shape[2:])).reshape(*x.shape[:2], -1)
    masks = {
        law: np.asarray(straggler_sets(data.laws[law], jax.random.key(7), 100, size.sets))
        for law in _STRAGGLERS
    }
    some, shifted = images[: len(images) // 100 * 20], {}
    for name, changed in unlike(some).items():
        console.log(f"judging on {name}")
        shifted[name] = _shifted(data.network, codes, changed.reshape(-1, *x.shape[1:]), masks)
    scores: dict[str, dict[str, Scores]] = {law: {} for law in _STRAGGLERS}
    for name, seeds in codes.items():
        console.log(f"judging {name}")
        each = [score(data.network, code, x, own, masks) for code in seeds]
        for law in _STRAGGLERS:
            squared, kept = (np.stack([one[law][part] for one in each]) for part in (0, 1))
            scores[law][name] = Scores(squared, kept)
    return {
        "setting": dataclasses.asdict(_SETTING),
        "size": dataclasses.asdict(size) | {"steps": steps, "groups": len(x)},
        "laws": {law: summary_of(scores[law]) for law in _STRAGGLERS},
        "unlike": {"images": len(some), "rmse": shifted},
        "lambda_dec": {
            name: [float(code.lambda_dec) for code in each]  # pyright: ignore[reportAttributeAccessIssue]
            for name, each in codes.items()
            if name in (_OURS, "BSCC tuned")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one seed, few steps and images")
    parser.add_argument("--data-dir", type=Path, default=paper.HERE.parent.parent / "shared/data")
    parser.add_argument("--output", type=Path, help="folder for rivals.json")
    options = parser.parse_args()
    console, start, busy = Console(emoji=False), time.perf_counter(), time.process_time()
    size = Size(1, 5, 200) if options.quick else Size()
    steps = 10 if options.quick else paper.FULL.steps
    content: dict[str, Any] = {"environment": environment(PACKAGES)}
    content |= measure(size, steps, options.data_dir, console)
    content |= {"seconds": round(time.perf_counter() - start)}
    content |= {"cpu_seconds": round(time.process_time() - busy)}
    own = Path("rivals-quick") if options.quick else paper.RESULTS
    write_json((options.output or own) / "rivals.json", content)
    for law, rows in content["laws"].items():
        for name, row in rows.items():
            low, high = row["rmse"]["low"], row["rmse"]["high"]
            console.print(
                f"S = {law}: {name:20} {row['rmse']['mean']:.4f} ({low:.4f} to {high:.4f})"
            )


if __name__ == "__main__":
    main()
