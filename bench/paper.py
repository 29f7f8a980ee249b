"""The paper's experiments on this machine: NeRCC beside every rival, each at its best.

`python bench/paper.py` runs everything (about three hours on two cores), `--quick` a small version
of it, `--only lenet5-mnist:100:20` one part, whose results replace those in the file, and
`--evaluate` evaluates NeRCC's codes in results/codes instead of tuning anew (rivals are tuned
again); `--again noise`, or `--again bacc`, measures nothing else. Writes results/paper.json, which
docs/results.md shows, and a picture of each part. Needs MNIST and CIFAR-10 as parquet files
(`models/data.py` says where). `--figure FOLDER` puts picture, numbers and tuned codes into a folder
of one's own, on probabilities and without noise and seeds.

Intervals are over straggler sets and groups of images. At the paper's settings NeRCC is tuned, and
its decoder learned, with two more seeds.
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
from _report import add_json, environment
from _settings import GRID, NUMBERS, PACKAGES, PAPER, PARM, Setting
from jaxtyping import Array, PRNGKeyArray
from rich.console import Console
from rich.progress import Progress

from nercc_jax import (
    AbstractCode,
    Berrut,
    ExactStragglers,
    Lagrange,
    NeRCC,
    Parity,
    Replication,
    evaluate,
    load_code,
    save_code,
    tune,
)
from nercc_jax.cli._options import Outputs
from nercc_jax.cli._workload import WorkerModel, load_worker_model
from nercc_jax.codes import BerrutSpline
from nercc_jax.evaluation import Estimate, Evaluation, Evaluations
from nercc_jax.evaluation._answers import Recorder, batched, cut_groups
from nercc_jax.evaluation._evaluation import evaluate_answers
from nercc_jax.evaluation._objective import landscape, make_trial
from nercc_jax.evaluation.pictures import straggler_figure
from nercc_jax.tuning import Descent, Tuned, learn_decoder
from nercc_jax.tuning._parameters import Code
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
    steps: int = 400
    grid_groups: int = 16


FULL = Size()
QUICK = Size(points=240, sets=5, cells=3, steps=20, grid_groups=4)
BACC = ("BACC", "ApproxIFER")  # the rival: the better of two point sets, law by law
NOISES = ("bfloat16", "0.01", "0.1", "0.3")


def main() -> None:
    options = _parse()
    path = RESULTS / ("paper-quick.json" if options.quick else "paper.json")
    console = Console(emoji=False)
    size = QUICK if options.quick else FULL
    pictures, kinds = path.with_suffix(""), _OUTPUTS
    if options.figure is not None:
        pictures, path, kinds = options.figure, options.figure / "numbers.json", _OUTPUTS[:1]
    for setting in SETTINGS:
        if options.only in (None, setting.name):
            known = None
            if options.evaluate or options.again:
                known = json.loads(path.read_text())["parts"][setting.name]
            part = run_setting(
                setting, size, options.data_dir, console, path.parent,
                kinds=kinds, known=known, further=options.figure is None, again=options.again,
            )  # fmt: skip
            add_json(path, {"parts": {setting.name: part}})
            console.print(f"picture: {draw(part, pictures, setting)}")
    if options.only in (None, "convergence") and not (
        options.evaluate or options.again or options.figure
    ):
        measured = _convergence.measure(options.quick, options.data_dir, console.log)
        add_json(path, {"convergence": measured})
    console.print(f"results: {path}")


def draw(part: Mapping[str, Any], folder: Path, setting: Setting) -> Path:
    """Draw error and RelAcc of all codes against the number of stragglers."""
    folder.mkdir(exist_ok=True)
    path = folder
    for outputs in [outputs for outputs in _OUTPUTS if outputs in part]:
        rows = [_evaluation(row) for row in part[outputs]["rows"]]
        panels = {"mse": (f"MSE of {outputs}", True), "rel_acc": (f"labels kept, {outputs}", False)}
        figure = straggler_figure(rows, panels, setting.words)
        path = folder / f"{setting.name.replace(':', '-')}-{outputs}.png"
        figure.savefig(path, dpi=90)
        plt.close(figure)
    return path


def _evaluation(row: Mapping[str, Any]) -> Evaluation:
    values: Any = {k: Estimate(**v) if isinstance(v, Mapping) else v for k, v in row.items()}
    return Evaluation(**values)


def run_setting(
    setting: Setting,
    size: Size,
    data_dir: Path | None,
    console: Console,
    folder: Path,
    *,
    kinds: Sequence[Outputs] = ("probabilities", "logits"),
    known: Mapping[str, Any] | None = None,
    further: bool = True,
    again: str | None = None,
) -> dict[str, Any]:
    """Measure everything about one model at one (N, K), for these kinds of output.

    Tuned codes are written into `folder`; of a `known` part, NeRCC's are read from there. Of all
    that is known, only what `again` names is measured, if it names something. Without `further`,
    noise and seeds are left out.
    """
    size = Size(**known["size"]) if known else size
    part: dict[str, Any] = {"setting": dataclasses.asdict(setting), "size": vars(size).copy()}
    part["environment"] = known["environment"] if again and known else environment(PACKAGES)
    for outputs in kinds:
        start = time.perf_counter()
        with Progress(console=console) as bar:
            bar.add_task(f"{outputs}: the model and its images", total=None)
            data = Data.load(setting, size, outputs, data_dir)
            old = known[outputs] if known else None
            if again and old:
                part[outputs] = old | _AGAIN[again](data, folder, bar, old)
                part[f"{again}, environment"] = environment(PACKAGES)
            else:
                part[outputs] = _run_outputs(data, folder, bar, old, further=further)
                part[outputs]["seconds"] = round(time.perf_counter() - start, 1)
        console.log(f"{setting.name} {outputs}: {time.perf_counter() - start:.1f} s")
        jax.clear_caches()  # XLA maps memory for every program, and a process has a limit
    return part


@dataclasses.dataclass(frozen=True)
class Data:
    """A model with its outputs, the images to tune on and those to judge on, and laws."""

    setting: Setting
    size: Size
    outputs: Outputs
    network: WorkerModel
    train: np.ndarray
    test: np.ndarray
    labels: np.ndarray
    laws: Mapping[str, ExactStragglers]

    @classmethod
    def load(cls, setting: Setting, size: Size, outputs: Outputs, data_dir: Path | None) -> "Data":
        network = load_worker_model(setting.model, outputs)
        train, _ = network.images("train", data_dir, size.points, 0)
        test, labels = network.images("test", data_dir, size.points, 0)
        laws = setting.laws(size.cells)
        return cls(setting, size, outputs, network, train, test, labels, laws)

    @property
    def shape(self) -> tuple[int, int]:
        return self.setting.num_data, self.setting.num_workers


def _run_outputs(
    data: Data, folder: Path, bar: Progress, known: Mapping[str, Any] | None, *, further: bool
) -> dict[str, Any]:
    codes, tuning = _codes(data, bar, None if known is None else folder)
    parity_models = _add_parm(data.setting, data.outputs, codes)
    rows = _evaluate(data, codes, bar, further_models=parity_models)
    ours = [name for name in codes if name.startswith("NeRCC")]
    found: dict[str, Any] = _gains(rows, ours)
    found["rows"] = [dataclasses.asdict(row) for row in rows]
    if further:
        found["noise"] = _noise(data, codes)
    if further and data.setting in PAPER:
        found["seeds"] = _seeds(data, codes, bar)
    if known is None:
        save_codes(data, folder, codes)
    else:
        tuning = known["tuning"] | tuning
    return found | {"tuning": tuning}


def _noise_again(data: Data, folder: Path, bar: Progress, known: Mapping[str, Any]) -> Any:
    """Measure noise again, with the code that is in the folder."""
    bar.add_task("noise", total=None)
    codes: dict[str, AbstractCode] = {"NeRCC tuned": load_code(code_file(data, folder, "tuned"))}
    return {"noise": _noise(data, codes | _bacc(data))}


def _bacc_again(data: Data, folder: Path, bar: Progress, known: Mapping[str, Any]) -> Any:
    """Measure gains again, those of the published form left out, beside BACC that is tuned."""
    ours = {f"NeRCC {k}": load_code(code_file(data, folder, k)) for k in ("tuned", "learned")}
    ours["NeRCC untuned"] = NeRCC(*data.shape)
    tuned = {"BACC tuned": tune_code(data, Berrut(*data.shape), "BACC", bar).code}
    found = _gains(_evaluate(data, ours | _bacc(data) | tuned, bar), list(ours))
    return found | {"gains": known["gains"] | found["gains"]}


_AGAIN = {"noise": _noise_again, "bacc": _bacc_again}


def _bacc(data: Data) -> dict[str, AbstractCode]:
    return {
        "BACC": Berrut(*data.shape),
        "ApproxIFER": Berrut(*data.shape, points="approxifer"),
    }


def _gains(rows: Evaluations, ours: Sequence[str]) -> dict[str, Any]:
    """Return what our codes and tuned BACC save of BACC's RMSE, and ours of tuned BACC's."""
    return {
        "gains": gains(rows, [*ours, "BACC tuned"], BACC),
        "gains over BACC tuned": gains(rows, ours, "BACC tuned"),
    }


def gains(
    rows: Evaluations, names: Sequence[str], rival: str | Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return what each of these codes saves of a rival's RMSE, on average and by law."""
    laws = (None, *dict.fromkeys(row.stragglers for row in rows))
    return {
        name: {law or "mean": dataclasses.asdict(rows.gain(name, rival, law)) for law in laws}
        for name in names
    }


def _seeds(data: Data, codes: Mapping[str, AbstractCode], bar: Progress) -> dict[str, list[Any]]:
    """Return the mean gains of what is tuned, and learned, with each of three seeds."""
    found = {kind: [codes[f"NeRCC {kind}"]] for kind in ("tuned", "learned")}
    for seed in (1, 2):
        code = tune_code(data, NeRCC(*data.shape), f"NeRCC, seed {seed}", bar, seed).code
        found["tuned"].append(code)
        found["learned"].append(_learn(data, code, bar, seed))
    named = {f"{k} {i}": code for k, each in found.items() for i, code in enumerate(each)}
    rows = _evaluate(data, named | {name: codes[name] for name in BACC}, bar)
    return {
        kind: [dataclasses.asdict(rows.gain(f"{kind} {i}", BACC)) for i in range(len(each))]
        for kind, each in found.items()
    }


def save_codes(data: Data, folder: Path, codes: Mapping[str, AbstractCode]) -> None:
    """Write what was tuned and learned, each with a card, where `code_file` says."""
    card = {"model": data.setting.model, "outputs": data.outputs, "laws": list(data.laws)}
    for kind in ("tuned", "learned"):
        path = code_file(data, folder, kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_code(path, codes[f"NeRCC {kind}"], card | {"by": "bench/paper.py"})


def code_file(data: Data, folder: Path, kind: str) -> Path:
    codes = folder / ("codes-quick" if data.size == QUICK else "codes")
    end = "" if kind == "tuned" else f"-{kind}"
    return codes / f"{data.setting.name.replace(':', '-')}-{data.outputs}{end}.json"


def _evaluate(
    data: Data, codes: Mapping[str, AbstractCode], bar: Progress, **options: Any
) -> Evaluations:
    """Return the rows of these codes on the test images; straggler sets depend on the laws only."""
    return evaluate(
        data.network, codes, data.test, data.laws,
        labels=data.labels, key=jax.random.key(1), num_sets=data.size.sets,
        progress=lambda pairs: bar.track(list(pairs), description="straggler sets"), **options,
    )  # fmt: skip


def _codes(
    data: Data, bar: Progress, folder: Path | None
) -> tuple[dict[str, AbstractCode], dict[str, Any]]:
    """Return all codes at this (N, K), tuned on training images without labels where possible.

    NeRCC's tuned and learned codes are read from a folder where one is given.
    """
    nercc, both = NeRCC(*data.shape), _bacc(data)
    rival = tune_code(data, Berrut(*data.shape), "BACC", bar)
    bscc = tune_code(data, BerrutSpline(*data.shape, ends="natural"), "BSCC", bar)
    summary: dict[str, Any] = {
        "BACC": {"objective": rival.objective, "seconds": rival.seconds},
        "BSCC": {"objective": bscc.objective, "seconds": bscc.seconds,
                 "lambda_dec": float(bscc.code.lambda_dec)},
    }  # fmt: skip
    if folder is None:
        ours = tune_code(data, nercc, "NeRCC", bar)
        tuned, learned = ours.code, _learn(data, ours.code, bar)
        summary["NeRCC"] = {"objective": ours.objective, "steps": len(ours.history) - 1,
                            "seconds": ours.seconds, "rejected": ours.rejected,
                            **{n: float(getattr(tuned, n)) for n in NUMBERS}}  # fmt: skip
    else:
        tuned, learned = (load_code(code_file(data, folder, k)) for k in ("tuned", "learned"))
    bar.add_task("the published form: a grid", total=None)
    published = _best_of_grid(data)
    summary["NeRCC published"] = {n: float(getattr(published, n)) for n in NUMBERS[:2]}
    codes: dict[str, AbstractCode] = {
        "NeRCC tuned": tuned,
        "NeRCC untuned": nercc,
        "NeRCC published": published,
        **both,
        "BACC tuned": rival.code,
        "BSCC": BerrutSpline(*data.shape),
        "BSCC tuned": bscc.code,
        "SBACC": Berrut(*data.shape, points="sbacc"),
        **{f"FH, d = {d}": Berrut(*data.shape, degree=d) for d in (1, 2, 3)},
        "NeRCC learned": learned,
        "BACC learned": _learn(data, both["BACC"], bar),
        "LCC": Lagrange(*data.shape),
        "replication": Replication(*data.shape),
    }
    return codes, summary


def _learn(data: Data, code: AbstractCode, bar: Progress, seed: int = 0) -> AbstractCode:
    """Return a code's encoder with the decoder that is learned for it from training images."""
    # Groups of LeNet5 are cheap; RepVGG at (30, 20) was 0.3 points better with 500 than with 200.
    groups = None if data.setting.model.startswith("lenet5") else 200
    bar.add_task("learning a decoder", total=None)
    key = jax.random.key(4 + seed)
    return learn_decoder(data.network, code, data.train, key=key, num_groups=groups)


def tune_code(data: Data, code: Code, name: str, bar: Progress, seed: int = 0) -> Tuned[Code]:
    """Tune a code on training images."""
    task = bar.add_task(f"{name}: tuning", total=data.size.steps)
    tuned = tune(
        data.network, code, data.train, data.laws,
        key=jax.random.key(seed), descent=Descent(data.size.steps),
        on_step=lambda step, _: bar.update(task, completed=step.step),
    )  # fmt: skip
    bar.update(task, completed=data.size.steps)
    return tuned


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


def _best_of_grid(data: Data) -> NeRCC:
    """Return the published method: two constants, the best of a grid on training images."""
    train, count = data.train, data.setting.num_data
    groups = train[: min(len(train) // count, data.size.grid_groups) * count]
    groups = groups.reshape(-1, count, *train.shape[1:])
    key = jax.random.key(2)
    trial = make_trial(data.network, NeRCC(*data.shape), groups, data.laws, key=key)
    plain = NeRCC(*data.shape, lambda_dec=0.0)
    heights = np.asarray(landscape(data.network, plain, trial, GRID, GRID))
    enc, dec = np.unravel_index(np.nanargmin(heights), heights.shape)
    return NeRCC(*data.shape, lambda_enc=float(GRID[enc]), lambda_dec=float(GRID[dec]))


def _noise(data: Data, codes: Mapping[str, AbstractCode]) -> dict[str, dict[str, Any]]:
    """Measure codes when answers come in bfloat16 or with noise, at three numbers of stragglers.

    Noise has a deviation of so many times the root mean square of the network's outputs. NeRCC's
    lambda_dec for it is the best of seven on training images; beside it stands the same code with
    lambda_dec = 0, and as tuned without noise. Gains of both are over lambda_dec = 0, and of the
    first over the better BACC, in RMSE.
    """
    laws, network, test = data.laws, data.network, data.test
    names = [list(laws)[round(q * (len(laws) - 1))] for q in (0, 0.25, 0.5)]
    some = {name: laws[name] for name in dict.fromkeys(names)}
    tuned = codes["NeRCC tuned"]
    assert isinstance(tuned, NeRCC)
    scale = float(jnp.sqrt(jnp.mean(network(jnp.asarray(test[:100])) ** 2)))
    few = data.train[: max(len(data.train) // 5, data.setting.num_data)]
    # Most codes have one encoder, and no answer depends on the noise.
    ask_few, ask = (
        Recorder(batched(network, 256), cut_groups(x, data.setting.num_data), 256).of
        for x in (few, test)
    )
    summary = {}
    for noise in NOISES:
        channel = _Bfloat16() if noise == "bfloat16" else _Noise(jnp.asarray(float(noise) * scale))
        candidates = {str(p): _scaled(tuned, 10.0**p) for p in range(-1, 6)}
        tried = evaluate_answers(
            {name: ask_few(code) for name, code in candidates.items()}, some,
            key=jax.random.key(3), num_sets=5, channel=channel,
        )  # fmt: skip
        chosen = min(candidates, key=lambda name: _relative(tried, name))
        ours, zero = "NeRCC, lambda_dec for this noise", "NeRCC, lambda_dec = 0"
        compared = {
            ours: candidates[chosen],
            zero: _scaled(tuned, 0.0),
            "NeRCC tuned": tuned,
            **{name: codes[name] for name in BACC},
        }
        rows = evaluate_answers(
            {name: ask(code) for name, code in compared.items()}, some,
            key=jax.random.key(1), num_sets=data.size.sets, channel=channel,
        )  # fmt: skip
        summary[noise] = {
            "lambda_factor": 10.0 ** int(chosen),
            "gains": gains(rows, [ours, "NeRCC tuned"], zero),
            "gains over BACC": gains(rows, [ours], BACC)[ours],
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


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small version of everything")
    parser.add_argument(
        "--only",
        choices=[*(setting.name for setting in SETTINGS), "convergence"],
        help="run one part",
    )
    parser.add_argument("--evaluate", action="store_true", help="NeRCC as in results/codes")
    parser.add_argument("--again", choices=list(_AGAIN), help="measure only this, the same codes")
    parser.add_argument("--figure", type=Path, metavar="FOLDER", help="a figure, and no results")
    data = HERE.parent.parent / "shared" / "data"
    help_ = "of parquet files (default: shared/data, or where there is none the hub)"
    default = data if data.is_dir() else None
    parser.add_argument("--data-dir", type=Path, default=default, help=help_)
    return parser.parse_args()


if __name__ == "__main__":
    main()
