"""The paper's experiments on this machine: NeRCC beside every rival, each at its best.

Half a working day on two cores; `--only lenet5-mnist:100:20` runs one part, whose results replace
those in the file. Tuned codes go to results/codes. `--figure FOLDER` puts picture, numbers and
tuned codes into a folder of one's own, on probabilities and without noise and seeds. Needs MNIST
and CIFAR-10 (`models/data.py` says where).

Intervals are over straggler sets and groups of images. At the paper's settings NeRCC is tuned, and
its decoder learned, with two more seeds.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import rates
from jaxtyping import Array
from report import RESULTS, Report, environment, show
from workloads import GRID, NUMBERS, OUTPUTS, PAPER, PARM, Network, Outputs, Setting, Yardstick
from workloads import groups_of as in_groups

from nercc_jax import (
    AbstractCode,
    Berrut,
    ExactStragglers,
    Lagrange,
    NeRCC,
    Parity,
    Replication,
    evaluate,
    save_code,
    tune,
)
from nercc_jax.codes import BerrutSpline
from nercc_jax.evaluation import Evaluations
from nercc_jax.evaluation.pictures import straggler_figure
from nercc_jax.tuning import Descent, Tuned, learn_decoder
from nercc_models import list_parity_models, load_parity_model

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BACC = ("BACC", "ApproxIFER")  # the rival: the better of two point sets, law by law
NOISES = ("bfloat16", "0.01", "0.1", "0.3")


@dataclasses.dataclass(frozen=True)
class Size:
    """The amount that is run: data points, straggler sets, numbers of stragglers, steps."""

    points: int = 1020  # 1,000 or more in whole groups of 8, 12, 20 and 60
    sets: int = 20
    cells: int = 9
    steps: int = 400
    grid_groups: int = 16


QUICK = Size(points=240, sets=5, cells=3, steps=20, grid_groups=4)


@dataclasses.dataclass(frozen=True)
class Data:
    """A model with its outputs, the images to tune on and those to judge on, and laws."""

    setting: Setting
    size: Size
    outputs: Outputs
    network: Network
    train: np.ndarray
    test: np.ndarray
    labels: np.ndarray
    laws: Mapping[str, ExactStragglers]

    @classmethod
    def load(cls, setting: Setting, size: Size, outputs: Outputs, data_dir: Path | None) -> "Data":
        network = Network.load(setting.model, outputs)
        train, _ = network.images("train", data_dir, size.points)
        test, labels = network.images("test", data_dir, size.points)
        return cls(setting, size, outputs, network, train, test, labels, setting.laws(size.cells))

    def tune(self, code: Any, seed: int = 0) -> Tuned:
        """Tune a code on training images."""
        return tune(
            self.network, code, self.train, self.laws,
            key=jax.random.key(seed), descent=Descent(self.size.steps),
        )  # fmt: skip

    def learn(self, code: AbstractCode, seed: int = 0) -> AbstractCode:
        """Return a code's encoder with the decoder that is learned for it from training images."""
        # Groups of LeNet5 are cheap; RepVGG at (30, 20) was 0.3 points better with 500 than 200.
        groups = None if self.setting.model.startswith("lenet5") else 200
        key = jax.random.key(4 + seed)
        return learn_decoder(self.network, code, self.train, key=key, num_groups=groups)

    def evaluate(self, codes: Mapping[str, AbstractCode], **options: Any) -> Evaluations:
        """Return the rows of these codes on the test images; straggler sets depend on laws only."""
        return evaluate(
            self.network, codes, self.test, self.laws,
            labels=self.labels, key=jax.random.key(1), num_sets=self.size.sets, **options,
        )  # fmt: skip


def run(
    report: Report,
    only: tuple[str, ...] = (*(each.name for each in PAPER + PARM), "convergence"),
    figure: Path | None = None,
) -> None:
    """Measure everything about each model at each (N, K).

    Options:
        only: Parts to run.
        figure: A folder for a figure, and no results.
    """
    size, kinds, pictures = QUICK if report.quick else Size(), OUTPUTS, report.path.with_suffix("")
    if figure is not None:
        kinds, pictures, report.path = OUTPUTS[:1], figure, figure / "numbers.json"
    for setting in PAPER + PARM:
        if setting.name not in only:
            continue
        part: dict[str, Any] = {"setting": dataclasses.asdict(setting), "size": vars(size).copy()}
        part["environment"] = environment()
        for outputs in kinds:
            begin = time.perf_counter()
            data = Data.load(setting, size, outputs, report.data_dir)
            report.log(f"{setting.name} {outputs}: tuning")
            rows, found = run_outputs(data, report, further=figure is None)
            part[outputs] = found | {"seconds": round(time.perf_counter() - begin, 1)}
            show(row for row in rows.records() if row["code"] in ("NeRCC tuned", *BACC))
            path = pictures / f"{setting.name.replace(':', '-')}-{outputs}.png"
            path.parent.mkdir(exist_ok=True, parents=True)
            panels = {"mse": (f"MSE of {outputs}", True)}
            panels |= {"rel_acc": (f"labels kept, {outputs}", False)}
            title = f"{setting.model} ({setting.num_workers}, {setting.num_data})"
            picture = straggler_figure(rows, panels, title)
            picture.savefig(path, dpi=90)
            plt.close(picture)
            report.log(f"picture: {path}")
            jax.clear_caches()  # XLA maps memory for every program, and a process has a limit
        report.add(parts={setting.name: part})
    if "convergence" in only and figure is None:
        report.add(convergence=rates.converge(report))


def run_outputs(data: Data, report: Report, *, further: bool) -> tuple[Evaluations, dict[str, Any]]:
    """Return the rows of all codes for one kind of output, and all that is found of it."""
    codes, tuning = codes_of(data)
    report.log("evaluating")
    setting, workers = data.setting, {}
    parities = setting.num_workers - setting.num_data
    if setting.num_data % parities == 0:
        parity = Parity(*setting.shape)
        if (setting.model, parity.k, data.outputs) in list_parity_models():
            codes["ParM"] = parity
            trained = load_parity_model(setting.model, parity.k, data.outputs)
            workers["ParM"] = (data.network, trained)
    rows = data.evaluate(codes, workers=workers)
    ours = [name for name in codes if name.startswith("NeRCC")]
    # Tuned codes may be exact where nobody straggles: then there is no share to save.
    tuned = {row.stragglers: row.mse.mean for row in rows if row.code == "BACC tuned"}
    shares, inexact = rows, {law: data.laws[law] for law, error in tuned.items() if error > 0}
    if len(inexact) < len(tuned):
        some = {name: codes[name] for name in (*ours, "BACC tuned")}
        shares = dataclasses.replace(data, laws=inexact).evaluate(some)
    found: dict[str, Any] = {
        "gains": gains(rows, [*ours, "BACC tuned"], BACC),
        "gains over BACC tuned": gains(shares, ours, "BACC tuned"),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    if further:
        report.log("noise")
        found["noise"] = with_noise(data, codes)
    if further and setting in PAPER:
        report.log("seeds")
        found["seeds"] = with_seeds(data, codes)
    card = {"model": setting.model, "outputs": data.outputs, "laws": list(data.laws)}
    for kind in ("tuned", "learned"):
        path = code_file(data, kind, report.path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_code(path, codes[f"NeRCC {kind}"], card | {"by": "bench/run.py paper"})
    return rows, found | {"tuning": tuning}


def gains(
    rows: Evaluations, names: Sequence[str], rival: str | Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return what each of these codes saves of a rival's RMSE, on average and by law."""
    laws = (None, *dict.fromkeys(row.stragglers for row in rows))
    return {
        name: {law or "mean": dataclasses.asdict(rows.gain(name, rival, law)) for law in laws}
        for name in names
    }


def code_file(data: Data, kind: str, folder: Path = RESULTS) -> Path:
    """Return where a tuned or learned code is written."""
    end = "" if kind == "tuned" else f"-{kind}"
    name = f"{data.setting.name.replace(':', '-')}-{data.outputs}{end}.json"
    return folder / ("codes-quick" if data.size == QUICK else "codes") / name


def codes_of(data: Data) -> tuple[dict[str, AbstractCode], dict[str, Any]]:
    """Return all codes at this (N, K), tuned on training images without labels where possible."""
    shape = data.setting.shape
    nercc, bacc = NeRCC(*shape), Berrut(*shape)
    rival, bscc = data.tune(bacc), data.tune(BerrutSpline(*shape, ends="natural"))
    ours, published = data.tune(nercc), best_of_grid(data)
    summary = {
        "BACC": {"objective": rival.objective, "seconds": rival.seconds},
        "BSCC": {"objective": bscc.objective, "seconds": bscc.seconds,
                 "lambda_dec": float(bscc.code.lambda_dec)},
        "NeRCC": {"objective": ours.objective, "steps": len(ours.history) - 1,
                  "seconds": ours.seconds, "rejected": ours.rejected,
                  **{name: float(getattr(ours.code, name)) for name in NUMBERS}},
        "NeRCC published": {name: float(getattr(published, name)) for name in NUMBERS[:2]},
    }  # fmt: skip
    codes: dict[str, AbstractCode] = {
        "NeRCC tuned": ours.code,
        "NeRCC untuned": nercc,
        "NeRCC published": published,
        "BACC": bacc,
        "ApproxIFER": Berrut(*shape, points="approxifer"),
        "BACC tuned": rival.code,
        "BSCC": BerrutSpline(*shape),
        "BSCC tuned": bscc.code,
        "SBACC": Berrut(*shape, points="sbacc"),
        "NeRCC learned": data.learn(ours.code),
        "BACC learned": data.learn(bacc),
        "LCC": Lagrange(*shape),
        "replication": Replication(*shape),
    }
    return codes, summary


def best_of_grid(data: Data) -> NeRCC:
    """Return the published method: two constants, the best of a grid on training images."""
    shape = data.setting.shape
    groups = in_groups(data.train, shape[0])[: data.size.grid_groups]
    key, first = jax.random.key(2), NeRCC(*shape)
    yardstick = Yardstick(data.network, first, groups, data.laws, key=key)
    heights = yardstick.landscape(NeRCC(*shape, lambda_dec=0.0))
    enc, dec = np.unravel_index(np.nanargmin(heights), heights.shape)
    return NeRCC(*shape, lambda_enc=float(GRID[enc]), lambda_dec=float(GRID[dec]))


def with_seeds(data: Data, codes: Mapping[str, AbstractCode]) -> dict[str, list[Any]]:
    """Return the mean gains of what is tuned, and learned, with each of three seeds."""
    found = {kind: [codes[f"NeRCC {kind}"]] for kind in ("tuned", "learned")}
    for seed in (1, 2):
        code = data.tune(NeRCC(*data.setting.shape), seed).code
        found["tuned"].append(code)
        found["learned"].append(data.learn(code, seed))
    named = {f"{kind} {i}": code for kind, each in found.items() for i, code in enumerate(each)}
    rows = data.evaluate(named | {name: codes[name] for name in BACC})
    return {
        kind: [dataclasses.asdict(rows.gain(f"{kind} {i}", BACC)) for i in range(len(each))]
        for kind, each in found.items()
    }


def in_half_the_bits(network: Any, x: Array) -> Array:
    """Return a network's answers as they are when they are sent in bfloat16."""
    answers = network(x)
    return answers.astype(jnp.bfloat16).astype(answers.dtype)


def noisy(network: Any, sigma: Array, x: Array) -> Array:
    """Return a network's answers with Gaussian noise of deviation `sigma`, drawn by the batch."""
    answers = network(x)
    drawn_by = jax.lax.bitcast_convert_type(jnp.sum(x, dtype=jnp.float32), jnp.uint32)
    key = jax.random.fold_in(jax.random.key(5), drawn_by)
    return answers + sigma * jax.random.normal(key, answers.shape, answers.dtype)


def with_noise(data: Data, codes: Mapping[str, AbstractCode]) -> dict[str, dict[str, Any]]:
    """Measure codes when answers come in bfloat16 or with noise, at three numbers of stragglers.

    Noise has a deviation of so many times the root mean square of the network's outputs. NeRCC's
    lambda_dec for it is the best of seven on training images; beside it stands the same code with
    lambda_dec = 0, and as tuned without noise. Gains of both are over lambda_dec = 0, and of the
    first over the better BACC, in RMSE.
    """
    laws, network, tuned = data.laws, data.network, codes["NeRCC tuned"]
    names = [list(laws)[round(q * (len(laws) - 1))] for q in (0, 0.25, 0.5)]
    some = {name: laws[name] for name in dict.fromkeys(names)}
    scale = float(jnp.sqrt(jnp.mean(network(jnp.asarray(data.test[:100])) ** 2)))
    few = data.train[: max(len(data.train) // 5, data.setting.num_data)]

    def scaled(factor: float) -> AbstractCode:
        return eqx.tree_at(lambda c: c.lambda_dec, tuned, replace_fn=lambda each: each * factor)

    summary = {}
    for noise in NOISES:
        worker = jax.tree_util.Partial(in_half_the_bits, network)
        if noise != "bfloat16":
            worker = jax.tree_util.Partial(noisy, network, jnp.asarray(float(noise) * scale))
        candidates = {power: scaled(10.0**power) for power in range(-1, 6)}
        named = {str(power): code for power, code in candidates.items()}
        tried = evaluate(
            network, named, few, some, key=jax.random.key(3), num_sets=5,
            workers=dict.fromkeys(named, worker),
        )  # fmt: skip
        heights = {
            power: np.mean([np.log(row.mse.mean) for row in tried if row.code == str(power)])
            for power in candidates
        }
        chosen = min(heights, key=lambda power: heights[power])
        ours, zero = "NeRCC, lambda_dec for this noise", "NeRCC, lambda_dec = 0"
        compared = {ours: candidates[chosen], zero: scaled(0.0), "NeRCC tuned": tuned}
        compared |= {name: codes[name] for name in BACC}
        rows = evaluate(
            network, compared, data.test, some, key=jax.random.key(1), num_sets=data.size.sets,
            workers=dict.fromkeys(compared, worker),
        )  # fmt: skip
        summary[noise] = {
            "lambda_factor": 10.0**chosen,
            "gains": gains(rows, [ours, "NeRCC tuned"], zero),
            "gains over BACC": gains(rows, [ours], BACC)[ours],
            "rows": [dataclasses.asdict(row) for row in rows],
        }
    return summary
