"""Gradient tuning against the grid of both lambdas that it replaces: objective, evaluations, time.

    python bench/tuning.py [--quick] [--only NAMES] [--seeds 3] [--data-dir FOLDER]

Writes results/tuning.json (--quick: tuning-quick.json), which docs/results.md shows. For every
(model, N, K):

- All codes meet one yardstick: the relative objective of `make_trial` on test images, with
  straggler sets of its own. 1 is the untuned NeRCC(K, N).
- The grid: both lambdas from 0 and twelve values from 1e-12 to 1, in the published form (constant
  lambda_dec, no end_penalty) and in ours. Its best cell is picked on the yardstick itself, by the
  test images, which flatters the grid: gradient tuning has not seen them.
- The gradient: `tune` from NeRCC(K, N), on unlabelled training images, with the lambdas (and the
  other two numbers) alone, and with the points too. It takes as many steps as a tenth of the grid's
  model evaluations pays for, at most `--steps`.
- An evaluation is one run of the model on one data point or coded data point. Its gradient counts
  as two more. The plain grid has a cell's coded data points answered for each cell; the frugal
  grid, which `landscape` is, only once for each lambda_enc, as answers do not depend on lambda_dec.
- Times are the first seed's: the later ones may find its programs in a cache made for this run.

`--only digits` shows instead how far `tune` goes as it is: LeNet5's probabilities on scikit-learn's
digits at (20, 8), three seeds, judged on images and straggler sets that tuning never saw.
"""

import argparse
import dataclasses
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

try:
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as error:
    sys.exit(f"bench/tuning.py needs {error.name}, missing: pip install '.[demo]' in a clone")

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from _report import CompileCounter, environment, read_json, write_json
from _settings import GRID, NUMBERS, PACKAGES, PAPER, Setting

from nercc_jax import ExactStragglers, NeRCC, evaluate, tune
from nercc_jax.cli._options import Outputs
from nercc_jax.cli._workload import WorkerModel, load_worker_model
from nercc_jax.codes import encode_groups
from nercc_jax.evaluation._objective import Trial, landscape, make_trial
from nercc_jax.tuning import Descent, Sampling, Tuned

_RESULTS = Path(__file__).parent / "results"
_SETS = 20  # straggler sets a law on the yardstick
_YARDSTICK_SEED = 1000  # far from the seeds of tuning

FORMS = ("published", "ours")  # of the code that the grid is over
KINDS = ("lambdas", "points")  # of gradient tuning
BACKWARD = 2  # evaluations that a gradient counts as, beside the one it differentiates
SHARE = 0.1  # of the plain grid's evaluations that a gradient run may take


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A setting's numbers as the criterion asks for them, by form of the grid and kind of tuning.

    `objectives` are the best and worst seed's, `shares` the evaluations by those of the plain and
    the frugal grid, `seconds` with and without compilation.
    """

    name: str
    grids: dict[str, float]
    objectives: dict[str, tuple[float, float]]
    shares: dict[str, tuple[float, float]]
    seconds: dict[str, tuple[float, float]]

    def ratio(self, kind: str, form: str) -> float:
        """Return the worst seed's objective over the grid's best."""
        return self.objectives[kind][1] / self.grids[form]

    def slower(self, kind: str, compiled: bool) -> float:
        """Return the gradient's time over the frugal grid's."""
        return self.seconds[kind][compiled] / self.seconds["grid"][compiled]


def outcome_of(part: Mapping[str, Any]) -> Outcome:
    """Return the outcome of one setting's results."""
    runs, evaluations = part["gradient"], part["evaluations"]
    found = {kind: [run["objective"] for run in runs[kind]] for kind in KINDS}
    counted = {kind: max(run["counted"] for run in runs[kind]) for kind in KINDS}
    # The first grid compiled what the second one, of the same program, found compiled.
    timed = {"grid": part["grids"][FORMS[0]]} | {kind: runs[kind][0] for kind in KINDS}
    return Outcome(
        name=Setting(**part["setting"]).words,
        grids={form: part["grids"][form]["objective"] for form in FORMS},
        objectives={kind: (min(found[kind]), max(found[kind])) for kind in KINDS},
        shares={
            kind: (n / evaluations["plain grid"], n / evaluations["frugal grid"])
            for kind, n in counted.items()
        },
        seconds={k: (t["seconds"], t["seconds"] - t["compile_seconds"]) for k, t in timed.items()},
    )


HEAD = ("model (N, K)", "grid, published", "grid, ours", "gradient", "by the grids")
HEAD += ("with points", "by the grids", "evaluations, % of the plain / frugal grid")
HEAD += ("seconds: grid, gradient, with points",)


def row(outcome: Outcome) -> tuple[str, ...]:
    """Return a setting's line of the table under `HEAD`."""
    grids = [f"{outcome.grids[form]:.4f}" for form in FORMS]
    gradient = []
    for kind in KINDS:
        # One number where there is one seed.
        ends = dict.fromkeys(f"{value:.4f}" for value in outcome.objectives[kind])
        ratios = (f"{outcome.ratio(kind, form):.3f}" for form in FORMS)
        gradient += [" to ".join(ends), " / ".join(ratios)]
    shares = (f"{100 * a:.1f} / {100 * b:.0f}" for a, b in outcome.shares.values())
    seconds = (f"{cold:.0f} ({warm:.0f})" for cold, warm in outcome.seconds.values())
    return (outcome.name, *grids, *gradient, "; ".join(shares), ", ".join(seconds))


T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Size:
    """The amount that is run: images to tune on and to compare on, laws, steps, seeds."""

    images: int
    laws: int
    steps: int
    seeds: int


def run_setting(
    setting: Setting,
    size: Size,
    outputs: Outputs,
    data_dir: Path,
    counter: CompileCounter,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Both grids and all gradient runs of one setting, on one yardstick."""
    network = load_worker_model(setting.model, outputs)
    start = NeRCC(setting.num_data, setting.num_workers)
    train, _ = network.images("train", data_dir, size.images, seed=0)
    test, _ = network.images("test", data_dir, size.images, seed=0)
    count = len(test) // setting.num_data
    groups = test[: count * setting.num_data].reshape(count, setting.num_data, *test.shape[1:])
    laws = setting.laws(size.laws)
    key = jax.random.key(_YARDSTICK_SEED)
    yardstick = make_trial(network, start, groups, laws, key=key, num_sets=_SETS, power=2.0)
    published = NeRCC(setting.num_data, setting.num_workers, lambda_dec=0.0)
    grids = _grids(network, {"published": published, "ours": start}, yardstick, counter)
    log(", ".join(f"grid, {form}: {grids[form]['objective']:.4f}" for form in FORMS))
    plain = GRID.size**2 * count * setting.num_workers
    steps = _affordable_steps(setting, len(train), size.steps, SHARE * plain)
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for kind in KINDS:
        for seed in range(size.seeds):
            options = {"key": jax.random.key(seed), "points": kind == "points"}
            options["descent"] = Descent(steps)
            tuned, summary = _timed(counter, tune, network, start, train, laws, **options)
            runs[kind].append(_run(network, yardstick, tuned, summary))
            log(f"gradient, {kind}, seed {seed}: {runs[kind][-1]['objective']:.4f}")
    return {
        "setting": dataclasses.asdict(setting),
        "size": dataclasses.asdict(size),
        "outputs": outputs,
        "stragglers": [int(name) for name in laws],
        "straggler_sets": _SETS,
        "test_groups": count,
        "steps": steps,
        "lambdas": GRID.tolist(),
        "evaluations": {"plain grid": plain, "frugal grid": plain // GRID.size},
        "grids": grids,
        "gradient": runs,
        "environment": environment(PACKAGES),
    }


def run_digits(seeds: int, descent: Descent, log: Callable[[str], None]) -> dict[str, Any]:
    """Return held-out root mean square errors by number of stragglers, of `tune` by default.

    Over five deals of the test images into groups, and 2,000 straggler sets of each law: where few
    sets lose neighbours, 500 give another tenth of the error.
    """
    network = load_worker_model("lenet5-digits", "probabilities")
    train, test = (network.images(split, None, 10_000, 0)[0] for split in ("train", "test"))
    start = NeRCC(8, 20)
    laws = {str(count): ExactStragglers(count) for count in (0, 2, 4, 6, 8, 12)}

    random, whole = np.random.default_rng(_YARDSTICK_SEED), len(test) // 8 * 8
    judged = np.concatenate([random.permutation(test)[:whole] for _ in range(5)])

    def errors(code: NeRCC) -> list[float]:
        rows = evaluate(
            network,
            {"code": code},
            judged,
            laws,
            key=jax.random.key(_YARDSTICK_SEED),
            num_sets=2000,
        )
        return [math.sqrt(row.mse.mean) for row in rows]

    found: dict[str, Any] = {"stragglers": [int(name) for name in laws], "untuned": errors(start)}
    for kind in KINDS:
        found[kind] = []
        for seed in range(seeds):
            begun = time.process_time()
            tuned = tune(
                network, start, train, laws,
                key=jax.random.key(seed), points=kind == "points", descent=descent,
            )  # fmt: skip
            spent = time.process_time() - begun
            found[kind].append(
                {"rmse": errors(tuned.code), "cpu_seconds": spent, "converged": tuned.converged}
            )
            log(f"digits, {kind}, seed {seed}: {spent:.0f} CPU s, {found[kind][-1]['rmse']}")
    return found | {"steps": descent.steps, "environment": environment(PACKAGES)}


def _timed(
    counter: CompileCounter, call: Callable[..., T], *arguments: Any, **options: Any
) -> tuple[T, dict[str, float]]:
    """Return a call's result; its seconds, and how many of them went into compilation."""
    start, compiled = time.perf_counter(), counter.seconds
    result = jax.block_until_ready(call(*arguments, **options))
    seconds = time.perf_counter() - start
    return result, {"seconds": seconds, "compile_seconds": counter.seconds - compiled}


def _grids(
    network: WorkerModel, codes: Mapping[str, NeRCC], yardstick: Trial, counter: CompileCounter
) -> dict[str, dict[str, Any]]:
    """Return `landscape` for several codes that encode alike.

    Answers are computed once for all, and each code is charged their seconds, too.
    """
    rows: dict[str, list[Any]] = {name: [] for name in codes}
    summary = {
        name: {"seconds": 0.0, "compile_seconds": 0.0, "answer_seconds": 0.0} for name in codes
    }
    first = next(iter(codes.values()))
    for enc in GRID:
        encoder = eqx.tree_at(
            lambda c: c.lambda_enc, first, jnp.asarray(enc, first.lambda_enc.dtype)
        )
        answers, asked = _timed(counter, _answers, network, encoder, yardstick.x)
        known = _Answered(answers)
        for name, code in codes.items():
            heights, decoded = _timed(counter, landscape, known, code, yardstick, [enc], GRID)
            rows[name].append(np.asarray(heights[0]))
            for what in asked:
                summary[name][what] += asked[what] + decoded[what]
            summary[name]["answer_seconds"] += asked["seconds"] - asked["compile_seconds"]
    return {name: summary[name] | _best(np.stack(rows[name])) for name in codes}


class _Answered(eqx.Module):
    """The model on coded data points that it has run on."""

    answers: jax.Array

    def __call__(self, batch: jax.Array) -> jax.Array:
        return self.answers


@eqx.filter_jit
def _answers(network: WorkerModel, code: NeRCC, x: jax.Array) -> jax.Array:
    coded = encode_groups(code, x)
    return network(coded.reshape(-1, *coded.shape[2:]))


def _best(heights: np.ndarray) -> dict[str, Any]:
    enc, dec = np.unravel_index(np.nanargmin(heights), heights.shape)
    return {
        "objective": float(heights[enc, dec]),
        "lambda_enc": float(GRID[enc]),
        "lambda_dec": float(GRID[dec]),
        "heights": heights.tolist(),
    }


def _affordable_steps(setting: Setting, images: int, most: int, budget: float) -> int:
    """Return the most steps of `tune` whose evaluations stay within a budget.

    What `tune` counted is checked in the results; this is its count foretold.
    """
    k, n = setting.num_data, setting.num_workers
    held = min(max(round(0.25 * (images // k)), 1), images // k - 1)
    groups = min(Sampling().groups_per_step, (images - held * k) // k)

    def counted(steps: int) -> int:
        looks = -(-steps // 10) + 1
        return held * (k + (looks + 1) * n) + steps * groups * (k + (1 + BACKWARD) * n)

    return max((steps for steps in range(1, most + 1) if counted(steps) <= budget), default=1)


def _run(
    network: WorkerModel, yardstick: Trial, tuned: Tuned[NeRCC], summary: Mapping[str, float]
) -> dict[str, Any]:
    code = tuned.code
    return {
        **summary,
        "objective": float(yardstick.objective(network, code)),
        "own_held_out": tuned.objective,
        "evaluations": tuned.evaluations,
        "differentiated": tuned.differentiated,
        "counted": tuned.evaluations + BACKWARD * tuned.differentiated,
        "steps": len(tuned.path) - 1,
        "rejected": tuned.rejected,
        **{name: float(getattr(code, name)) for name in NUMBERS},
        "path": [[step.parameters[name] for name in NUMBERS[:2]] for step in tuned.path],
        "held_out": [[s.step, s.held_out] for s in tuned.path if s.held_out is not None],
    }


def main() -> None:
    options = _parse()
    size = (
        Size(images=320, laws=5, steps=30, seeds=1)
        if options.quick
        else Size(images=1000, laws=9, steps=options.steps, seeds=options.seeds)
    )
    chosen = (PAPER[0], PAPER[4]) if options.quick else PAPER
    chosen = [s for s in chosen if not options.only or s.name in options.only]
    path = _RESULTS / ("tuning-quick.json" if options.quick else "tuning.json")
    results: dict[str, Any] = (read_json(path) if options.only else {}) or {"parts": {}}
    counter, start = CompileCounter(), time.perf_counter()
    if not options.only or "digits" in options.only:
        descent = Descent(30) if options.quick else Descent()
        results["digits"] = run_digits(size.seeds, descent, lambda step: print(step, flush=True))
        write_json(path, results)
    with tempfile.TemporaryDirectory() as cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        for setting in chosen:

            def log(step: str, setting: Setting = setting) -> None:
                print(f"{time.perf_counter() - start:5.0f} s  {setting.name}: {step}", flush=True)

            part = run_setting(setting, size, options.outputs, options.data_dir, counter, log)
            parts = results["parts"] | {setting.name: part}
            results["parts"] = {s.name: parts[s.name] for s in PAPER if s.name in parts}
            missing = [dataclasses.asdict(s) for s in PAPER if s.name not in parts]
            results["not_measured"] = missing
            write_json(path, results)
            jax.clear_caches()  # XLA maps memory for every program, and a process has a limit
    table = Table(*HEAD, title="objective on test images; the untuned code's is 1")
    for part in results["parts"].values():
        table.add_row(*row(outcome_of(part)))
    Console().print(table)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="two settings, few images and steps")
    parser.add_argument(
        "--only", choices=[*(s.name for s in PAPER), "digits"], nargs="+", help="settings"
    )
    parser.add_argument("--seeds", type=int, default=3, help="of gradient tuning")
    parser.add_argument("--steps", type=int, default=100, help="of gradient descent, at most")
    parser.add_argument("--outputs", choices=("logits", "probabilities"), default="logits")
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
