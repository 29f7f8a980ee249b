"""The paper's experiments on this machine: NeRCC beside every rival, each at its best.

`python bench/paper.py` runs everything (about an hour on two cores), `--quick` a small version of
it, and `--only lenet5-mnist:100:20` one part, whose results replace those in the file. Writes
results/paper.json, which docs/results.md shows, and a picture of each part. Needs MNIST and
CIFAR-10 as parquet files (`models/data.py` says where).
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _convergence
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from _report import environment, write_json
from _settings import GRID, NUMBERS, PACKAGES, PAPER, PARM, Setting
from jaxtyping import Array, PRNGKeyArray
from rich.console import Console

from nercc_jax import (
    AbstractCode,
    Berrut,
    Lagrange,
    NeRCC,
    Parity,
    Replication,
    evaluate,
    save_code,
    tune,
)
from nercc_jax.cli._options import Outputs
from nercc_jax.cli._workload import WorkerModel, load_worker_model
from nercc_jax.evaluation import Estimate, Evaluation, straggler_curves
from nercc_jax.evaluation._trial import landscape, make_trial
from nercc_jax.tuning import Descent
from nercc_models import list_parity_models, load_parity_model

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
RESULTS = HERE / "results"

SETTINGS = PAPER + PARM


@dataclasses.dataclass(frozen=True)
class Size:
    """The amount that is run: data points, straggler sets, numbers of stragglers, steps."""

    points: int = 1020  # 1,000 or more in whole groups of 8, 12, 20 and 60
    sets: int = 20
    cells: int = 9
    steps: int = 150
    grid_groups: int = 16


FULL = Size()
QUICK = Size(points=240, sets=5, cells=3, steps=20, grid_groups=4)
NOISES = ("bfloat16", "0.01", "0.1", "0.3")


def main() -> None:
    options = _parse()
    path = RESULTS / ("paper-quick.json" if options.quick else "paper.json")
    console = Console(emoji=False)
    size = QUICK if options.quick else FULL
    for setting in SETTINGS:
        if options.only in (None, setting.name):
            part = run_setting(setting, size, options.data_dir, console)
            _merge(path, {"parts": {setting.name: part}})
            console.print(f"picture: {_draw(part, path.with_suffix(''), setting)}")
    if options.only in (None, "convergence"):
        measured = _convergence.measure(options.quick, options.data_dir, console.log)
        _merge(path, {"convergence": measured})
    console.print(f"results: {path}")


def _draw(part: Mapping[str, Any], folder: Path, setting: Setting) -> Path:
    """Draw error and RelAcc of all codes against the number of stragglers."""
    figure, axes = plt.subplots(len(_OUTPUTS), 2, figsize=(11.5, 8), layout="constrained")
    for (left, right), outputs in zip(axes, _OUTPUTS, strict=True):
        rows = [_evaluation(row) for row in part[outputs]["rows"]]
        approximate = [row for row in rows if row.code != "replication"]
        straggler_curves(left, approximate, "mse", f"MSE of {outputs}", logarithmic=True)
        straggler_curves(right, rows, "rel_acc", f"labels kept, {outputs}", logarithmic=False)
    figure.suptitle(setting.words)
    folder.mkdir(exist_ok=True)
    path = folder / f"{setting.name.replace(':', '-')}.png"
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return path


def _evaluation(row: Mapping[str, Any]) -> Evaluation:
    values: Any = {k: Estimate(**v) if isinstance(v, Mapping) else v for k, v in row.items()}
    return Evaluation(**values)


def run_setting(setting: Setting, size: Size, data_dir: Path, console: Console) -> dict[str, Any]:
    """Measure everything about one model at one (N, K), for both kinds of output."""
    part: dict[str, Any] = {"setting": dataclasses.asdict(setting), "size": vars(size).copy()}
    part["environment"] = environment(PACKAGES)
    for outputs in _OUTPUTS:
        start = time.perf_counter()
        part[outputs] = _run_outputs(setting, size, outputs, data_dir, console)
        part[outputs]["seconds"] = round(time.perf_counter() - start, 1)
        console.log(f"{setting.name} {outputs}: {part[outputs]['seconds']} s")
        jax.clear_caches()  # XLA maps memory for every program, and a process has a limit
    return part


def _run_outputs(
    setting: Setting, size: Size, outputs: Outputs, data_dir: Path, console: Console
) -> dict[str, Any]:
    network = load_worker_model(setting.model, outputs)
    train, _ = network.images("train", data_dir, size.points, 0)
    test, labels = network.images("test", data_dir, size.points, 0)
    laws = setting.laws(size.cells)
    codes, tuning = _codes(setting, size, network, train, laws)
    further = _add_parm(setting, outputs, codes)
    console.log(f"{setting.name} {outputs}: tuned")
    options = {"key": jax.random.key(1), "num_sets": size.sets}
    rows = evaluate(network, codes, test, laws, labels=labels, further_models=further, **options)
    folder = RESULTS / ("codes-quick" if size is QUICK else "codes")
    folder.mkdir(parents=True, exist_ok=True)
    save_code(
        folder / f"{setting.name.replace(':', '-')}-{outputs}.json",
        codes["NeRCC tuned"],
        {"model": setting.model, "outputs": outputs, "laws": list(laws), "by": "bench/paper.py"},
    )
    return {
        "rows": [dataclasses.asdict(row) for row in rows],
        "tuning": tuning,
        "noise": _noise(setting, size, network, train, test, laws, codes),
    }


def _codes(
    setting: Setting, size: Size, network: WorkerModel, train: np.ndarray, laws: Mapping
) -> tuple[dict[str, AbstractCode], dict[str, Any]]:
    """Return all codes at this (N, K), tuned on training images without labels where possible."""
    shape = (setting.num_data, setting.num_workers)
    nercc, bacc = NeRCC(*shape), Berrut(*shape)
    # Power 4: with tune's own 2, LeNet5's logits at (100, 20) lost 5 % at S = 80 to win at S = 0.
    options: Any = {"key": jax.random.key(0), "points": True, "power": 4.0}
    options["descent"] = Descent(size.steps)
    tuned = tune(network, nercc, train, laws, **options)
    rival = tune(network, bacc, train, laws, **options)
    published = _best_of_grid(size, network, NeRCC(*shape, lambda_dec=0.0), train, laws)
    codes: dict[str, AbstractCode] = {
        "NeRCC tuned": tuned.code,
        "NeRCC untuned": nercc,
        "NeRCC published": published,
        "BACC": bacc,
        "ApproxIFER": Berrut(*shape, points="approxifer"),
        "BACC tuned": rival.code,
        "LCC": Lagrange(*shape),
        "replication": Replication(*shape),
    }
    summary = {
        "NeRCC": {"objective": tuned.objective, "steps": len(tuned.history) - 1,
                  "seconds": tuned.seconds, "rejected": tuned.rejected,
                  **{n: float(getattr(tuned.code, n)) for n in NUMBERS}},
        "NeRCC published": {n: float(getattr(published, n)) for n in NUMBERS[:2]},
        "BACC": {"objective": rival.objective, "seconds": rival.seconds},
    }  # fmt: skip
    return codes, summary


def _add_parm(
    setting: Setting, outputs: Outputs, codes: dict[str, AbstractCode]
) -> dict[str, Sequence[Any]]:
    """Add ParM where there is a k and a parity model for it; return its further models."""
    parities = setting.num_workers - setting.num_data
    if setting.num_data % parities:
        return {}
    code = Parity(setting.num_data, setting.num_workers)
    if (setting.model, code.k, outputs) not in list_parity_models():
        return {}
    codes["ParM"] = code
    return {"ParM": (load_parity_model(setting.model, code.k, outputs),)}


_OUTPUTS: tuple[Outputs, ...] = ("probabilities", "logits")


def _best_of_grid(
    size: Size, network: WorkerModel, code: NeRCC, train: np.ndarray, laws: Mapping
) -> NeRCC:
    """Return the published method: two constants, the best of a grid on training images."""
    groups = train[: min(len(train) // code.num_data, size.grid_groups) * code.num_data]
    groups = groups.reshape(-1, code.num_data, *train.shape[1:])
    trial = make_trial(
        network, NeRCC(code.num_data, code.num_workers), groups, laws, key=jax.random.key(2)
    )
    heights = np.asarray(landscape(network, code, trial, GRID, GRID))
    enc, dec = np.unravel_index(np.nanargmin(heights), heights.shape)
    return NeRCC(
        code.num_data, code.num_workers, lambda_enc=float(GRID[enc]), lambda_dec=float(GRID[dec])
    )


def _noise(
    setting: Setting,
    size: Size,
    network: WorkerModel,
    train: np.ndarray,
    test: np.ndarray,
    laws: Mapping,
    codes: Mapping[str, AbstractCode],
) -> dict[str, dict[str, Any]]:
    """Measure codes when answers come in bfloat16 or with noise, at three numbers of stragglers.

    Noise has a deviation of so many times the root mean square of the network's outputs. NeRCC's
    lambda_dec for it is the best of seven on training images; beside it stands the same code with
    lambda_dec = 0, and as tuned without noise.
    """
    names = [list(laws)[round(q * (len(laws) - 1))] for q in (0, 0.25, 0.5)]
    some = {name: laws[name] for name in dict.fromkeys(names)}
    tuned = codes["NeRCC tuned"]
    assert isinstance(tuned, NeRCC)
    scale = float(jnp.sqrt(jnp.mean(network(jnp.asarray(test[:100])) ** 2)))
    summary = {}
    for noise in NOISES:
        channel = _Bfloat16() if noise == "bfloat16" else _Noise(jnp.asarray(float(noise) * scale))
        candidates = {str(p): _scaled(tuned, 10.0**p) for p in range(-1, 6)}
        few = train[: max(len(train) // 5, setting.num_data)]
        tried = evaluate(
            network, candidates, few, some, key=jax.random.key(3), num_sets=5, channel=channel
        )
        chosen = min(candidates, key=lambda name: _relative(tried, name))
        compared = {
            "NeRCC, lambda_dec for this noise": candidates[chosen],
            "NeRCC, lambda_dec = 0": _scaled(tuned, 0.0),
            "NeRCC tuned": tuned,
            **{name: codes[name] for name in ("BACC", "ApproxIFER")},
        }
        rows = evaluate(
            network, compared, test, some, key=jax.random.key(1), num_sets=size.sets,
            channel=channel,
        )  # fmt: skip
        summary[noise] = {
            "lambda_factor": 10.0 ** int(chosen),
            "rows": [dataclasses.asdict(row) for row in rows],
        }
    return summary


def _relative(rows: Sequence[Any], name: str) -> float:
    """Return the geometric mean over numbers of stragglers of a code's error."""
    return float(np.mean([np.log(row.mse.mean) for row in rows if row.code == name]))


def _scaled(code: NeRCC, factor: float) -> NeRCC:
    return eqx.tree_at(lambda c: c.lambda_dec, code, code.lambda_dec * factor)


class _Bfloat16(eqx.Module):
    """Answers sent in half the bits."""

    def __call__(self, answers: Array, key: PRNGKeyArray) -> Array:
        return answers.astype(jnp.bfloat16).astype(answers.dtype)


class _Noise(eqx.Module):
    """Answers with Gaussian noise of deviation `sigma`."""

    sigma: Array

    def __call__(self, answers: Array, key: PRNGKeyArray) -> Array:
        return answers + self.sigma * jax.random.normal(key, answers.shape, answers.dtype)


def _merge(path: Path, news: Mapping[str, Any]) -> dict[str, Any]:
    """Add to what the file has by now, as other parts may run at the same time."""
    results = json.loads(path.read_text()) if path.exists() else {"parts": {}}
    results["parts"] |= news.get("parts", {})
    write_json(path, {**results, **{k: v for k, v in news.items() if k != "parts"}})
    return json.loads(path.read_text())


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small version of everything")
    parser.add_argument(
        "--only",
        choices=[*(setting.name for setting in SETTINGS), "convergence"],
        help="run one part",
    )
    parser.add_argument("--data-dir", type=Path, default=HERE.parent.parent / "shared" / "data")
    return parser.parse_args()


if __name__ == "__main__":
    main()
