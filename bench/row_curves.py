"""How many rows a tolerance needs: in the order of `run_rows`, in random order, and by a plain GP.

    python bench/row_curves.py [--tolerances 0.1 0.3 0.03] [--draws 3 1 1] [--resume]

3,000 rows of each function. Time is nothing here: a row waits while the learner is at work, which
knows all that has come, as if the function took hours. Tolerances are shares of the outputs'
spread. Rows are computed until all others are known within the tolerance, by 90 % bars:

- chosen: in the order of `run_rows`;
- random: by the same learner, the rows that it does not know in random order.

The GP is scikit-learn's, of as many random rows as *chosen* computed: one kernel for all outputs,
which are standardised, with a width for each input and noise. Squared exponential or Matern 5/2,
and all numbers, are those of the largest marginal likelihood of 500 of its rows, from two starts.
Its bar is 1.645 times the root mean square of the outputs' posterior deviations: 90 % of the errors
if a row's outputs are off together. Writes results/row_curves.json, which docs/functions.md shows.
"""

import argparse
import contextlib
import threading
import time
import warnings
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
from _functions_cases import EXPENSIVE, rows_of
from _report import environment, read_json, write_json
from _settings import PACKAGES
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, Matern, WhiteKernel

from nercc_jax.compilation import enable_compilation_cache
from nercc_jax.pools import DevicePool, Overdue
from nercc_jax.rows import RowFunction, run_rows
from nercc_jax.rows._evidence import Evidence
from nercc_jax.rows._learner import LEARNER_THREAD

RESULTS = Path(__file__).parent / "results" / "row_curves.json"
ROWS, WORKERS, SECONDS, COVERAGE, TUNED = 3000, 4, 0.02, 0.9, 500


class Unhurried:
    """A table of a function's values; a row waits while the learner is at work."""

    def __init__(self, x: np.ndarray, y: np.ndarray):
        self.values = {row.tobytes(): value for row, value in zip(x, y, strict=True)}

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        time.sleep(SECONDS * len(batch))
        while any(each.name == LEARNER_THREAD for each in threading.enumerate()):
            time.sleep(0.002)
        return np.stack([self.values[row.tobytes()] for row in batch])


def order(which: str, seed: int) -> contextlib.AbstractContextManager:
    """Let rows go in the learner's order, or at random."""
    random = np.random.default_rng(seed)
    if which != "random":
        return contextlib.nullcontext()
    return mock.patch.object(Evidence, "order", lambda _, rows: random.permutation(rows))


def row_errors(mean: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean((mean - y) ** 2, axis=1))


def ours(x: np.ndarray, y: np.ndarray, tolerance: float, which: str, seed: int) -> dict[str, Any]:
    """Return what a run computed, and how good its predictions are."""
    function = Unhurried(x, y)
    never: dict[str, Any] = {
        "overdue": Overdue(factor=1e6),
        "hang_timeout": 1e6,
    }  # a row that waits is not late
    with (
        order(which, seed),
        DevicePool(cast(Any, RowFunction(function)), WORKERS, compiled=False, **never) as pool,
    ):
        result = run_rows(
            function,
            x,
            pool,
            rows_per_call=1,
            deadline=1e6,
            tolerance=tolerance,
            coverage=COVERAGE,
            seed=seed,
            learner_share=1.0,  # as often as it likes
        )
    computed, predicted = result.status == "computed", result.status == "predicted"
    assert result.values is not None
    assert (computed | predicted).all()
    np.testing.assert_array_equal(result.values[computed], y[computed])
    error = row_errors(result.values, y)[predicted]
    return {
        "computed": int(computed.sum()),
        "predicted": int(predicted.sum()),
        "held": int(np.sum(error <= result.score[predicted])),
        "within": int(np.sum(error <= tolerance)),
        "rmse": float(np.sqrt(np.mean(error**2))) if len(error) else None,
        "audits": [result.summary["audited_held"], result.summary["audited"]],
    }


def plain_gp(
    x: np.ndarray, y: np.ndarray, number: int, tolerance: float, seed: int
) -> dict[str, Any]:
    """Return how good a plain GP of so many random rows is on all others."""
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    rows = np.random.default_rng((seed, 1)).permutation(len(x))
    known, others = rows[:number], rows[number:]
    tuned = []
    widths: Any = np.ones(x.shape[1])
    for shape in (RBF(widths), Matern(widths, nu=2.5)):
        kernel = ConstantKernel(1.0, (1e-3, 1e4)) * shape + WhiteKernel(1e-5, (1e-9, 1e-1))
        model = GaussianProcessRegressor(
            kernel, normalize_y=True, n_restarts_optimizer=1, random_state=seed
        )
        tuned.append(model.fit(x[known[:TUNED]], y[known[:TUNED]]))
    best = max(tuned, key=lambda model: model.log_marginal_likelihood_value_)
    fixed: Any = GaussianProcessRegressor(best.kernel_, normalize_y=True)
    fixed.optimizer = None
    mean, deviation = fixed.fit(x[known], y[known]).predict(x[others], return_std=True)
    error, bar = row_errors(mean, y[others]), 1.645 * np.sqrt(np.mean(deviation**2, axis=1))
    sure = bar <= tolerance
    return {
        "kernel": str(best.kernel_),
        "others": len(others),
        "held": int(np.sum(error <= bar)),
        "within": int(np.sum(error <= tolerance)),
        "sure": int(sure.sum()),
        "sure_held": int(np.sum(error[sure] <= bar[sure])),
        "rmse": float(np.sqrt(np.mean(error**2))),
    }


def measure(name: str, share: float, seed: int, with_gp: bool) -> dict[str, Any]:
    """Return both orders' runs and the GP, if it is wanted, on one draw of the inputs."""
    x, y, spread = rows_of(name, seed, ROWS)
    runs = {which: ours(x, y, share * spread, which, seed) for which in ("chosen", "random")}
    number = runs["chosen"]["computed"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of kernels at the edge of their bounds
        gp = (
            plain_gp(x, y, number, share * spread, seed) if with_gp and number < ROWS - 20 else None
        )
    about = {"function": name, "share": share, "seed": seed, "spread": spread}
    return about | runs | {"gp": gp}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="+", default=EXPENSIVE, choices=EXPENSIVE)
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.1, 0.3, 0.03])
    parser.add_argument("--draws", type=int, nargs="+", default=[3, 1, 1], help="of each tolerance")
    parser.add_argument("--gp-draws", type=int, default=3, help="draws for which a GP is fitted")
    parser.add_argument("--resume", action="store_true", help="keep the cells that are there")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    enable_compilation_cache()  # as the `nercc` command does
    found = read_json(options.output).get("cells", []) if options.resume else []
    known = {(cell["function"], cell["share"], cell["seed"]) for cell in found}
    for share, draws in zip(options.tolerances, options.draws, strict=True):
        for seed in range(draws):
            for name in options.only:
                if (name, share, seed) in known:
                    continue
                found.append(measure(name, share, seed, seed < options.gp_draws))
                print(found[-1], flush=True)
                about = {"rows": ROWS, "coverage": COVERAGE}
                facts = {"environment": environment(PACKAGES), **about, "cells": found}
                write_json(options.output, facts)


if __name__ == "__main__":
    main()
