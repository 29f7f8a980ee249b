"""Many rows of expensive functions: time saved, rows needed, and rows that come late.

`rows` times `run_rows` against `concurrent.futures.ThreadPoolExecutor.map`. Each row sleeps for a
tenth of a second, as a simulator elsewhere would; workers are 20 threads. Laws of the time:
"constant"; "by row", where the twelfth of the rows with the largest outputs take 1 s more; "by
call", where 8 % of the calls take 0.5 s more, whatever the row. The tolerance is 10 % of the
outputs' spread. Every value is checked: computed ones must be the function's own, to the last bit.

`row_curves`: how many of 3,000 rows a tolerance needs. Time is nothing here: workers are simulated,
and the learner knows all that has come, as if the function took hours. Tolerances are shares of the
outputs' spread. Rows are computed until all others are known within the tolerance, by 90 % bars:
*chosen* in the order of `run_rows`; *random* rows, an eighth more each time, by a learner of
all that has come, whose bars are calibrated on its own errors, each left out. The GP is
scikit-learn's, of as many random rows as *chosen* computed: one kernel for all outputs, which are
standardised, with a width for each input and noise. Squared exponential or Matern 5/2, and all
numbers, are those of the largest marginal likelihood of 500 of its rows, from two starts. Its bar
is 1.645 times the root mean square of the outputs' posterior deviations: 90 % of the errors if a
row's outputs are off together.

`late_rows`: each row sleeps for 4 s on 200 workers. A tenth of the rows takes longer, by 32 s in
the mean, exponentially distributed: independently of the row, half of them from the 12 % with the
largest peaks, or exactly the largest peaks (`SlowRows`). Where lateness is the row's, a copy is
late, too; where it is independent, a copy is late as often as any call. Compared are four ways to
get the mean peak and the share of peaks above their 95 % point:

- dropping: what is late is left out (its time is that of the others);
- waiting: every row is computed, each by the worker that is free first;
- hedging: every late row is sent again at twice the usual time, and the first answer counts;
- ours: `run_rows(compute="all")` with a deadline of 40 s for the job. Rows that have not come by
  then are predicted, or unknown where too few late rows came to know how far off they may be.

Biases are in units of the peaks' standard deviation, and in points of the share; of ours, all rows
count that have a value. Coverage is that of the 90 % bars of late rows that have one.
"""

import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from report import Report, environment, show
from simulators import EXPENSIVE, SlowRows, rows_of

from nercc_jax.compilation import enable_compilation_cache
from nercc_jax.pools import DevicePool
from nercc_jax.risk import calibrate_learner_bars
from nercc_jax.rows import run_rows
from nercc_jax.stragglers import ExponentialLatency
from nercc_jax.surrogates import LearnerTuning, fit_learner
from nercc_jax.testing import SimulatedPool

TOLERANCE, COVERAGE = 0.1, 0.9
RATE, DELAY = 0.1, 32.0  # of late rows
LATE = ExponentialLatency(DELAY)
ROW_LAWS = {
    "independent": SlowRows(RATE),
    "leaning": SlowRows(RATE, leaning=0.5, hardest=0.12),
    "extreme": SlowRows(RATE, leaning=1.0, hardest=RATE),
}


def late_rows(
    law: str, scores: np.ndarray, seed: int, copies: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Return which rows are late, and how many seconds they and their copies take longer."""
    which, delays = jax.random.split(jax.random.key(seed))
    late = np.asarray(ROW_LAWS[law].straggles(which, jnp.asarray(scores)))
    return late, np.asarray(LATE.sample(delays, (copies, len(scores))))


def row_errors(mean: np.ndarray, y: np.ndarray) -> Float[np.ndarray, " rows"]:
    """Return each row's root mean square error."""
    return np.sqrt(np.mean((mean - y) ** 2, axis=1))


class Table:
    """A table of a function's values; `seconds` says how long some places take, if they sleep."""

    def __init__(
        self, x: np.ndarray, y: np.ndarray, seconds: Callable[[list[int]], float] | None = None
    ):
        self._places = {row.tobytes(): place for place, row in enumerate(x)}
        self._y, self._seconds = y, seconds

    def places(self, batch: Any) -> list[int]:
        return [self._places[row.tobytes()] for row in np.asarray(batch)]

    def __call__(self, batch: Any) -> np.ndarray:
        places = self.places(batch)
        if self._seconds is not None:
            time.sleep(self._seconds(places))
        return self._y[places]


# --- an executor

LAWS = ("constant", "by row", "by call")
WORKERS, SECONDS = 20, 0.1


def run(
    report: Report,
    rows: int = 3000,
    draws: int = 1,
    only: tuple[str, ...] = EXPENSIVE,
    laws: tuple[str, ...] = LAWS,
) -> None:
    """Time runs with a tolerance, and without one, against an executor.

    Options:
        rows: Of each run.
        draws: Of the inputs, for each cell.
        only: Functions.
        laws: Of the time that rows take.
    """
    enable_compilation_cache()  # as the `nercc` command does
    if report.quick:
        rows, only = min(rows, 200), only[:1]
    cells = [timed(name, law, rows, seed) for law in laws for name in only for seed in range(draws)]
    about = {"workers": WORKERS, "seconds": SECONDS, "tolerance": TOLERANCE, "coverage": COVERAGE}
    report.write({"environment": environment(), **about, "cells": cells})
    show(cells)


def timed(name: str, law: str, rows: int, seed: int) -> dict[str, Any]:
    """Return the times of the executor and of both runs, and what the runs gave."""
    x, y, spread = rows_of(name, seed, rows)
    size = np.abs(y - y.mean(axis=0)).sum(axis=1)
    slow = size >= np.quantile(size, 11 / 12)

    def of(execute: Callable[[Table], Any]) -> tuple[float, Any]:
        random = np.random.default_rng(seed)

        def seconds(places: list[int]) -> float:
            more = float(np.sum(slow[places])) if law == "by row" else 0.0
            if law == "by call":
                more = 0.5 * (random.random() < 0.08)
            return SECONDS * len(places) + more

        table = Table(x, y, seconds)
        begin = time.perf_counter()
        found = execute(table)
        return time.perf_counter() - begin, found

    def executor(table: Table) -> None:
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(lambda row: table(row[None]), x))

    def ours(tolerance: float) -> Callable[[Table], Any]:
        return lambda table: run_rows(
            table, x, DevicePool, num_workers=WORKERS, tolerance=tolerance, coverage=COVERAGE
        )

    plain, _ = of(executor)
    exact_s, exact = of(ours(0.0))
    seconds, result = of(ours(TOLERANCE * spread))
    np.testing.assert_array_equal(exact.values, y)
    computed, predicted = result.status == "computed", result.status == "predicted"
    np.testing.assert_array_equal(result.values[computed], y[computed])
    assert (computed | predicted).all()
    error = row_errors(result.values, y)
    held = error <= result.score

    def share(rows: np.ndarray) -> float | None:
        return float(np.mean(held[rows])) if rows.any() else None

    by_row = law == "by row"
    return {
        "function": name,
        "law": law,
        "seed": seed,
        "rows": rows,
        "executor_s": plain,
        "tolerance_0_s": exact_s,
        "seconds": seconds,
        "computed": float(computed.mean()),
        "coverage": share(predicted),
        "slow_predicted": int(np.sum(predicted & slow)) if by_row else None,
        "slow_coverage": share(predicted & slow) if by_row else None,
        "within": float(np.mean(error <= TOLERANCE * spread)),
    }


# --- rows that a tolerance needs

ROWS, KERNEL_ROWS = 3000, 500


def curves(
    report: Report,
    only: tuple[str, ...] = EXPENSIVE,
    tolerances: tuple[float, ...] = (0.1, 0.3, 0.03),
    draws: tuple[int, ...] = (3, 1, 1),
) -> None:
    """Count the rows that tolerances need.

    Options:
        only: Functions.
        tolerances: Shares of the outputs' spread.
        draws: Of each tolerance.
    """
    enable_compilation_cache()  # as the `nercc` command does
    rows = 400 if report.quick else ROWS
    if report.quick:
        only, tolerances, draws = only[:1], tolerances[:1], (1,)
    found: list[dict[str, Any]] = []
    for share, number in zip(tolerances, draws, strict=False):
        for seed, name in ((seed, name) for seed in range(number) for name in only):
            x, y, spread = rows_of(name, seed, rows)
            chosen = needed(x, y, share * spread, seed)
            cell = {"function": name, "share": share, "seed": seed, "spread": spread}
            cell |= {"chosen": chosen, "random": needed_at_random(x, y, share * spread, seed)}
            gp = None
            if chosen["computed"] < rows - 20:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of kernels at the edge of their bounds
                    gp = plain_gp(x, y, chosen["computed"], share * spread, seed)
            found.append(cell | {"gp": gp})
            report.log(f"{name} {share}: {chosen['computed']}, {cell['random']['computed']}")
            about = {"environment": environment(), "rows": rows, "coverage": COVERAGE}
            report.write(about | {"cells": found})
    show(
        {"function": cell["function"], "tolerance": cell["share"]}
        | {way: cell[way]["computed"] for way in ("chosen", "random")}
        for cell in found
    )


def judged(y: np.ndarray, mean: np.ndarray, bar: np.ndarray, tolerance: float) -> dict[str, Any]:
    """Return how good predictions and their bars are."""
    error = row_errors(mean, y)
    return {
        "predicted": len(y),
        "held": int(np.sum(error <= bar)),
        "within": int(np.sum(error <= tolerance)),
    }


def needed(x: np.ndarray, y: np.ndarray, tolerance: float, seed: int) -> dict[str, Any]:
    """Return what a run computed, and how good its predictions are."""
    function: Any = Table(x, y)
    with SimulatedPool(function, 4, seconds=lambda size: 0.02 * size) as pool:
        result = run_rows(
            function, x, pool, rows_per_call=1, deadline=1e6, tolerance=tolerance,
            coverage=COVERAGE, seed=seed,
        )  # fmt: skip
    computed, predicted = result.status == "computed", result.status == "predicted"
    assert result.values is not None
    assert (computed | predicted).all()
    np.testing.assert_array_equal(result.values[computed], y[computed])
    found = judged(y[predicted], result.values[predicted], result.score[predicted], tolerance)
    return {"computed": int(computed.sum())} | found


def needed_at_random(x: np.ndarray, y: np.ndarray, tolerance: float, seed: int) -> dict[str, Any]:
    """Return how many random rows are computed until a learner knows all others."""
    order, number = np.random.default_rng((seed, 2)).permutation(len(x)), 96
    while True:
        known, others = order[:number], order[number:]
        learner = fit_learner(
            x[known], y[known].astype(np.float32), capacity=1 << (number - 1).bit_length(),
            tuning=LearnerTuning(widths="each", rows=256),
        )  # fmt: skip
        mean, deviation = map(np.asarray, learner.predict(x[others]))
        bar = np.asarray(calibrate_learner_bars(learner)(deviation, COVERAGE))
        if (bar <= tolerance).all() or number >= len(x):
            return {"computed": number} | judged(y[others], mean, bar, tolerance)
        # What is computed next in random order are rows that it does not know.
        rest = np.concatenate([others[bar > tolerance], others[bar <= tolerance]])
        order = np.concatenate([known, rest])
        number = min(number + max(number // 8, 1), len(x))


def plain_gp(
    x: np.ndarray, y: np.ndarray, number: int, tolerance: float, seed: int
) -> dict[str, Any]:
    """Return how good a plain GP of so many random rows is on all others."""
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, Matern, WhiteKernel

    x = (x - x.mean(axis=0)) / x.std(axis=0)
    rows = np.random.default_rng((seed, 1)).permutation(len(x))
    known, others = rows[:number], rows[number:]
    tuned, widths = [], np.ones(x.shape[1])
    for shape in (RBF(widths), Matern(widths, nu=2.5)):  # pyright: ignore[reportArgumentType]
        kernel = ConstantKernel(1.0, (1e-3, 1e4)) * shape + WhiteKernel(1e-5, (1e-9, 1e-1))
        model = GaussianProcessRegressor(
            kernel, normalize_y=True, n_restarts_optimizer=1, random_state=seed
        )
        tuned.append(model.fit(x[known[:KERNEL_ROWS]], y[known[:KERNEL_ROWS]]))
    best = max(tuned, key=lambda model: model.log_marginal_likelihood_value_)
    fixed: Any = GaussianProcessRegressor(best.kernel_, normalize_y=True)
    fixed.optimizer = None
    mean, deviation = fixed.fit(x[known], y[known]).predict(x[others], return_std=True)
    bar = 1.645 * np.sqrt(np.mean(deviation**2, axis=1))
    sure, found = bar <= tolerance, judged(y[others], mean, bar, tolerance)
    return {
        "others": found.pop("predicted"),
        **found,
        "sure": int(sure.sum()),
    }


# --- rows that are late because of what they are

MANY, USUAL = 200, 4.0  # workers, and seconds of a row
DEADLINE = 40.0  # seconds after which ours ends


def late(
    report: Report,
    rows: int = 1000,
    draws: int = 16,
    only: tuple[str, ...] = EXPENSIVE,
    laws: tuple[str, ...] = (*ROW_LAWS,),
    at_once: int = 1,
) -> None:
    """Measure what dropping, waiting, hedging and a deadline make of late rows.

    Options:
        rows: Of each run.
        draws: Of inputs and lateness, for each cell.
        only: Functions.
        laws: Of lateness.
        at_once: Runs that share the machine.
    """
    enable_compilation_cache()  # as the `nercc` command does
    if report.quick:
        draws, only, laws, rows = 1, only[:1], laws[-1:], 400
    found: list[dict[str, Any]] = []
    wanted = [(name, law, seed, rows) for seed in range(draws) for law in laws for name in only]
    with ThreadPoolExecutor(at_once) as runs:
        for cell in runs.map(lambda each: one_late(*each), wanted):
            found.append(cell)
            report.log({key: cell[key] for key in ("function", "law", "late", "bias", "seconds")})
            about = {"workers": MANY, "seconds": USUAL, "delay": DELAY, "at_once": at_once}
            facts = {"environment": environment(), "rows": rows} | about
            report.write(facts | {"cells": found})


def simulated_seconds(seconds: np.ndarray, again: np.ndarray | None = None) -> float:
    """Return the seconds until all rows are in, each sent to the worker that is free first.

    With `again`, the seconds of copies, a late row is sent again at twice the usual time.
    """
    free, copies, ends = np.zeros(MANY), [], []
    for row, each in enumerate(seconds.tolist()):
        worker = int(np.argmin(free))
        if again is not None and each > 2 * USUAL:
            copies.append((free[worker] + 2 * USUAL, row, float(again[row])))
        free[worker] += each
        ends.append(free[worker])
    for due, row, each in copies:
        worker = int(np.argmin(free))
        begin = max(free[worker], due)
        if begin < ends[row]:
            free[worker] = begin + each
            ends[row] = min(ends[row], free[worker])
    return float(max(ends))


def one_late(name: str, law: str, seed: int, rows: int) -> dict[str, Any]:
    """Return the biases and times of all ways on one draw."""
    x, y, spread = rows_of(name, seed, rows)
    peaks = np.abs(y).max(axis=1)
    slow, more = late_rows(law, peaks, seed, copies=2)
    times = USUAL + slow * more[0]
    again = times
    if law == "independent":  # a copy is late as any other call
        struck = np.random.default_rng((seed, 3)).random(rows) < RATE
        again = USUAL + struck * more[1]
    begun = np.zeros(rows, bool)

    def seconds(places: list[int]) -> float:
        found = np.where(begun[places], again[places], times[places])
        begun[places] = True
        return float(found.sum())

    begin = time.perf_counter()
    result = run_rows(
        Table(x, y, seconds), x, DevicePool, num_workers=MANY, tolerance=TOLERANCE * spread,
        coverage=COVERAGE, compute="all", job_deadline=DEADLINE, rows_per_call=1, seed=seed,
    )  # fmt: skip
    spent = time.perf_counter() - begin
    assert result.values is not None
    error, computed = row_errors(result.values, y), result.status == "computed"
    missing, finite = slow & ~computed, np.isfinite(result.score)
    known = np.abs(result.values).max(axis=1)[np.isfinite(result.values).all(axis=1)]
    large = np.quantile(peaks, 0.95)
    ways = {"dropping": peaks[~slow], "ours": known}
    bias = {way: float((each.mean() - peaks.mean()) / peaks.std()) for way, each in ways.items()}
    tail = {
        way: float(np.mean(each > large) - np.mean(peaks > large)) for way, each in ways.items()
    }
    return {
        "function": name,
        "law": law,
        "seed": seed,
        "late": int(slow.sum()),
        "others": int(np.sum(~slow & ~computed)),
        "predicted": int(np.sum(missing & (result.status == "predicted"))),
        "barred": int(np.sum(missing & finite)),
        "held": int(np.sum((error <= result.score)[missing & finite])),
        "nothing": int(np.sum(missing & ~finite)),
        "came_late": [result.summary["came_late_held"], result.summary["came_late"]],
        "bias": bias,
        "tail": tail,
        "seconds": {
            "dropping": simulated_seconds(times[~slow]),
            "waiting": simulated_seconds(times),
            "hedging": simulated_seconds(times, again),
            "ours": spent,
        },
    }
