"""Time `run_rows` against a plain executor on functions whose rows take their time.

    python bench/rows.py [--rows 3000] [--draws N] [--only NAME ...] [--output FILE]

Each row sleeps, as a simulator elsewhere would, for a tenth of a second; workers are 20 threads.
Laws of the time: "constant"; "by row", where the twelfth of the rows with the largest outputs take
1 s more; "by call", where 8 % of the calls take 0.5 s more, whatever the row. The tolerance is 10 %
of the outputs' spread. The executor is `concurrent.futures.ThreadPoolExecutor.map`.

Every value is checked: computed ones must be the function's own, to the last bit.
"""

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from _functions_cases import EXPENSIVE, rows_of
from _report import environment, write_json
from _settings import PACKAGES

from nercc_jax.compilation import enable_compilation_cache
from nercc_jax.pools import DevicePool
from nercc_jax.rows import run_rows

RESULTS = Path(__file__).parent / "results" / "rows.json"
LAWS = ("constant", "by row", "by call")
WORKERS, SECONDS, TOLERANCE, COVERAGE = 20, 0.1, 0.1, 0.9


class Paced:
    """A table of a function's values, each of which takes its time."""

    def __init__(self, x: np.ndarray, y: np.ndarray, law: str, seed: int):
        self.places = {row.tobytes(): place for place, row in enumerate(x)}
        self.y, self.law = y, law
        size = np.abs(y - y.mean(axis=0)).sum(axis=1)
        self.slow = size >= np.quantile(size, 11 / 12)
        self.random = np.random.default_rng(seed)
        self.rows = 0

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        places = [self.places[row.tobytes()] for row in batch]
        seconds = SECONDS * len(batch)
        if self.law == "by row":
            seconds += float(np.sum(self.slow[places]))
        elif self.law == "by call" and self.random.random() < 0.08:
            seconds += 0.5
        self.rows += len(batch)
        time.sleep(seconds)
        return self.y[places]


def measure(name: str, law: str, rows: int, seed: int) -> dict[str, Any]:
    """Return the times of the executor and of both runs, and what the runs gave."""
    x, y, spread = rows_of(name, seed, rows)

    def timed(run: Callable[[Paced], Any]) -> tuple[float, Any, Paced]:
        function = Paced(x, y, law, seed)
        begin = time.perf_counter()
        found = run(function)
        return time.perf_counter() - begin, found, function

    def executor(function: Paced) -> None:
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(lambda row: function(row[None]), x))

    def ours(tolerance: float) -> Callable[[Paced], Any]:
        return lambda function: run_rows(
            function, x, DevicePool, num_workers=WORKERS, tolerance=tolerance, coverage=COVERAGE
        )

    plain, _, _ = timed(executor)
    exact_s, exact, _ = timed(ours(0.0))
    seconds, result, function = timed(ours(TOLERANCE * spread))
    np.testing.assert_array_equal(exact.values, y)
    computed, predicted = result.status == "computed", result.status == "predicted"
    np.testing.assert_array_equal(result.values[computed], y[computed])
    assert (computed | predicted).all()
    error = np.sqrt(np.mean((result.values - y) ** 2, axis=1))
    held = error <= result.score

    def share(rows: np.ndarray) -> float | None:
        return float(np.mean(held[rows])) if rows.any() else None

    return {
        "function": name,
        "law": law,
        "seed": seed,
        "rows": rows,
        "executor_s": plain,
        "tolerance_0_s": exact_s,
        "seconds": seconds,
        "calls": function.rows / rows,
        "computed": float(computed.mean()),
        "coverage": share(predicted),
        "slow_predicted": int(np.sum(predicted & function.slow)) if law == "by row" else None,
        "slow_coverage": share(predicted & function.slow) if law == "by row" else None,
        "within": float(np.mean(error <= TOLERANCE * spread)),
        "audits": [result.summary["audited_held"], result.summary["audited"]],
        "came_late": [result.summary["came_late_held"], result.summary["came_late"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--draws", type=int, default=1, help="of the inputs, for each cell")
    parser.add_argument("--only", nargs="+", default=EXPENSIVE, choices=EXPENSIVE)
    parser.add_argument("--laws", nargs="+", default=LAWS, choices=LAWS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    enable_compilation_cache()  # as the `nercc` command does
    found = []
    for law in options.laws:
        for name in options.only:
            for seed in range(options.draws):
                row = measure(name, law, options.rows, seed)
                found.append(row)
                shown = {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()}
                print(shown, flush=True)
    about = {"workers": WORKERS, "seconds": SECONDS, "tolerance": TOLERANCE, "coverage": COVERAGE}
    write_json(options.output, {"environment": environment(PACKAGES), **about, "cells": found})


if __name__ == "__main__":
    main()
