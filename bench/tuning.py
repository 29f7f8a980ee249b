"""Gradient tuning against the grid of both lambdas that it replaces: objective, evaluations, time.

For every (model, N, K):

- All codes meet one yardstick: the relative objective on test images, with straggler sets of its
  own. 1 is the untuned NeRCC(K, N).
- The grid: both lambdas from 0 and twelve values from 1e-12 to 1, in the published form (constant
  lambda_dec, no end_penalty) and in ours. Its best cell is picked on the yardstick itself, by the
  test images, which flatters the grid: gradient tuning has not seen them.
- The gradient: `tune` from NeRCC(K, N), on unlabelled training images, with the lambdas (and the
  other two numbers) alone, and with the points too. It takes as many steps as a tenth of the grid's
  model evaluations pays for, at most `--steps`.
- An evaluation is one run of the model on one data point or coded data point. Its gradient counts
  as two more. The plain grid has a cell's coded data points answered for each cell; the frugal
  grid, which is timed, only once for each lambda_enc, as answers do not depend on lambda_dec.
- Times are the first seed's: the later ones may find its programs in a cache made for this run.

`--only digits` shows instead how far `tune` goes as it is: LeNet5's probabilities on scikit-learn's
digits at (20, 8), three seeds, judged on images and straggler sets that tuning never saw.
"""

import dataclasses
import math
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from measure import CompileCounter
from report import Report, environment, show
from workloads import GRID, PAPER, Network, Setting, Yardstick, groups_of

from nercc_jax import ExactStragglers, NeRCC, evaluate, tune
from nercc_jax.tuning import Descent, Sampling

SETS = 20  # straggler sets a law on the yardstick
SEED = 1000  # of the yardstick, far from the seeds of tuning
KINDS = ("lambdas", "points")  # of gradient tuning
BACKWARD = 2  # evaluations that a gradient counts as, beside the one it differentiates
SHARE = 0.1  # of the plain grid's evaluations that a gradient run may take


class Clock:
    """Seconds since the last look, and how many of them went into compilation."""

    def __init__(self, counter: CompileCounter):
        self._counter = counter
        self.look()

    def look(self) -> dict[str, float]:
        before = getattr(self, "_last", (0.0, 0.0))
        self._last = time.perf_counter(), self._counter.seconds
        seconds, compiled = np.subtract(self._last, before).tolist()
        return {"seconds": seconds, "compile_seconds": compiled}


def run(
    report: Report,
    only: tuple[str, ...] = ("digits", *(each.name for each in PAPER)),
    seeds: int = 3,
    steps: int = 100,
    outputs: str = "logits",
) -> None:
    """Tune each setting by grid and by gradient, and digits as a user would.

    Options:
        only: Parts to run; the others stay as they are in the file.
        seeds: Of gradient tuning.
        steps: Of gradient descent, at most.
        outputs: "logits" or "probabilities".
    """
    size = {"images": 1000, "laws": 9, "steps": steps, "seeds": seeds}
    chosen = [each for each in PAPER if each.name in only]
    if report.quick:
        size, chosen = {"images": 320, "laws": 5, "steps": 30, "seeds": 1}, chosen[:1]
    results: dict[str, Any] = {"parts": {}} | report.read()
    if "digits" in only:
        descent = Descent(30) if report.quick else Descent()
        results["digits"] = run_digits(report, size["seeds"], descent)
        report.write(results)
    counter, lines = CompileCounter(), []
    with tempfile.TemporaryDirectory() as cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        for setting in chosen:
            part = run_setting(report, setting, size, outputs, counter)
            parts = results["parts"] | {setting.name: part}
            results["parts"] = {each.name: parts[each.name] for each in PAPER if each.name in parts}
            missing = [dataclasses.asdict(each) for each in PAPER if each.name not in parts]
            report.write(results | {"not_measured": missing})
            lines.append({"setting": setting.name, **line_of(part)})
            jax.clear_caches()  # XLA maps memory for every program, and a process has a limit
    show(lines)


def line_of(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return objectives, shares of the grid's evaluations, and seconds, of one setting."""
    found = {f"grid, {form}": grid["objective"] for form, grid in part["grids"].items()}
    for kind, runs in part["gradient"].items():
        counted = max(each["counted"] for each in runs) / part["evaluations"]["plain grid"]
        found |= {kind: [each["objective"] for each in runs], f"{kind}: evaluations": counted}
        found[f"{kind}: seconds"] = runs[0]["seconds"]
    return found | {"grid: seconds": part["grids"]["published"]["seconds"]}


def run_setting(
    report: Report,
    setting: Setting,
    size: Mapping[str, int],
    outputs: Any,
    counter: CompileCounter,
) -> dict[str, Any]:
    """Return both grids and all gradient runs of one setting, on one yardstick."""
    network, start = Network.load(setting.model, outputs), NeRCC(*setting.shape)
    train, test = (
        network.images(split, report.data_dir, size["images"])[0] for split in ("train", "test")
    )
    groups, laws = groups_of(test, setting.num_data), setting.laws(size["laws"])
    yardstick = Yardstick(
        network, start, groups, laws, key=jax.random.key(SEED), num_sets=SETS, power=2.0
    )
    clock, grids = Clock(counter), {}
    for form, code in {"published": NeRCC(*setting.shape, lambda_dec=0.0), "ours": start}.items():
        clock.look()
        heights = yardstick.landscape(code)
        enc, dec = np.unravel_index(np.nanargmin(heights), heights.shape)
        grids[form] = clock.look() | {
            "objective": float(heights[enc, dec]),
            "lambda_enc": float(GRID[enc]),
            "lambda_dec": float(GRID[dec]),
            "heights": heights.tolist(),
        }
    report.log(f"{setting.name}: grids")
    plain = GRID.size**2 * len(groups) * setting.num_workers
    fits = lambda steps: evaluations(setting, len(train), steps) <= SHARE * plain  # noqa: E731
    steps = max(filter(fits, range(1, size["steps"] + 1)), default=1)
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for kind in KINDS:
        for seed in range(size["seeds"]):
            clock.look()
            tuned = jax.block_until_ready(
                tune(
                    network, start, train, laws,
                    key=jax.random.key(seed), points=kind == "points", descent=Descent(steps),
                )
            )  # fmt: skip
            spent = clock.look()
            taken = sum(each.start == tuned.start for each in tuned.history) - 1
            runs[kind].append(
                {
                    **spent,
                    "objective": yardstick.objective(tuned.code),
                    "counted": evaluations(setting, len(train), taken),
                    "steps": taken,
                }
            )
            report.log(f"{setting.name}: {kind}, seed {seed}: {runs[kind][-1]['objective']:.4f}")
    return {
        "setting": dataclasses.asdict(setting),
        "size": dict(size),
        "outputs": outputs,
        "stragglers": [int(name) for name in laws],
        "straggler_sets": SETS,
        "test_groups": len(groups),
        "steps": steps,
        "lambdas": GRID.tolist(),
        "evaluations": {"plain grid": plain, "frugal grid": plain // GRID.size},
        "grids": grids,
        "gradient": runs,
        "environment": environment(),
    }


def evaluations(setting: Setting, images: int, steps: int) -> int:
    """Return the data points and coded data points that the model of `tune` runs on.

    Those that it is differentiated on count `BACKWARD` times in addition.
    """
    k, n = setting.shape
    held = min(max(round(0.25 * (images // k)), 1), images // k - 1)
    groups = min(Sampling().groups_per_step, (images - held * k) // k)
    looks = -(-steps // 10) + 1
    return held * (k + (looks + 1) * n) + steps * groups * (k + (1 + BACKWARD) * n)


def run_digits(report: Report, seeds: int, descent: Descent) -> dict[str, Any]:
    """Return held-out root mean square errors by number of stragglers, of `tune` by default.

    Over five deals of the test images into groups, and 2,000 straggler sets of each law: where few
    sets lose neighbours, 500 give another tenth of the error.
    """
    network, start = Network.load("lenet5-digits", "probabilities"), NeRCC(8, 20)
    train, test = (network.images(split, None, 10_000)[0] for split in ("train", "test"))
    laws = {str(count): ExactStragglers(count) for count in (0, 2, 4, 6, 8, 12)}
    random, whole = np.random.default_rng(SEED), len(test) // 8 * 8
    judged = np.concatenate([random.permutation(test)[:whole] for _ in range(5)])

    def errors(code: NeRCC) -> list[float]:
        rows = evaluate(
            network, {"code": code}, judged, laws,
            key=jax.random.key(SEED), num_sets=100 if report.quick else 2000,
        )  # fmt: skip
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
            report.log(f"digits, {kind}, seed {seed}: {spent:.0f} CPU s, {found[kind][-1]['rmse']}")
    return found | {"steps": descent.steps, "environment": environment()}
