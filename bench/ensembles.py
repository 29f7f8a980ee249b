"""The mean, a quantile and a probability of an ensemble by a deadline: do their intervals hold?

An ensemble of 1,000 rows runs on 50 simulated workers. A row takes 4 s, a tenth of the rows longer,
by 32 s in the mean, exponentially distributed: independently of the row, half of them from the 12 %
with the largest values, or exactly the largest values (`SlowRows`). A copy of a late row is as
late. One call in 100 kills its worker. After 60 s the run ends, when 300 to 500 rows have come.
Asked for are the mean of a quantity of interest, its 0.9 quantile, and the probability that it
exceeds its 95 % point, each with a 90 % interval. The quantity is the largest absolute output
(Fisher: the mean output, since its largest one is 1 nearly everywhere). The functions are real, the
time is not: `run_rows` runs on a `SimulatedPool`. Compared are

- ours: a run of `run_rows(compute="needed")` for each statistic, with a tolerance of a tenth of the
  outputs' spread, that goes on until the deadline;
- together: all three from one run that is for no statistic (on the first `--processes` draws);
- random: the mean of as many rows, drawn at random, all of which came (nobody has such a sample
  where lateness depends on the row);
- came: what ours computed by the deadline, as if it was drawn at random;
- dropped: every row is computed, and what is late is left out, as if it was late at random;
- process: as many rows as ours, in a random order, with late ones missing, and a plain Gaussian
  process (scikit-learn, Matern 5/2, widths by likelihood) whose predictions are plugged in; it has
  no interval of its own (on the first `--processes` draws);
- worst: what came in that order, and each of the rest anywhere between the least and the largest
  value that came.

Settings were chosen on other draws.
"""

import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from report import Report, environment, show
from rows import COVERAGE, ROW_LAWS, TOLERANCE, Table, late_rows
from simulators import EXPENSIVE, rows_of

from nercc_jax.compilation import enable_compilation_cache
from nercc_jax.pools import Fault, Faults
from nercc_jax.risk import EnsembleEstimate
from nercc_jax.rows import RowResult, run_rows
from nercc_jax.testing import SimulatedPool

ROWS, WORKERS, SECONDS, DEATHS, DEADLINE = 1000, 50, 4.0, 0.01, 60.0
NORMAL = 1.645  # deviations of a 90 % interval
STATISTICS = ("mean", "quantile", "probability")
Found = dict[str, tuple[float, float, float]]  # value and interval by statistic


def run(
    report: Report,
    draws: int = 100,
    processes: int = 10,
    first: int = 0,
    only: tuple[str, ...] = EXPENSIVE,
    laws: tuple[str, ...] = (*ROW_LAWS,),
) -> None:
    """Measure how often intervals hold, and how wide they are.

    Options:
        draws: Of inputs and lateness, for each cell.
        processes: Draws with a Gaussian process, and with one run for all statistics.
        first: The first draw's seed.
        only: Functions.
        laws: Of lateness.
    """
    from threadpoolctl import threadpool_limits

    enable_compilation_cache()
    threadpool_limits(1)  # matrices are small: more threads take three times the CPU time
    if report.quick:
        draws, only, laws = 2, only[:1], laws[:1]
    found: list[dict[str, Any]] = []
    for name, law in ((name, law) for name in only for law in laws):
        seeds = range(first, first + draws)
        measured = [measure(name, law, each, each - first < processes) for each in seeds]
        found.append({"function": name, "law": law} | summary(measured))
        facts = {"environment": environment(), "rows": ROWS, "workers": WORKERS}
        facts |= {"deadline": DEADLINE, "coverage": COVERAGE, "first": first}
        report.write(facts | {"cells": found})
        report.log(f"{name} {law}")
        show({"way": way} | {s: each[s]["held"] for s in STATISTICS}
             for way, each in found[-1]["ways"].items())  # fmt: skip


def sampled(values: np.ndarray, point: float) -> Found:
    """Return statistics and intervals of values that were drawn at random from all rows."""
    root: float = NORMAL * np.sqrt(max(1 - len(values) / ROWS, 0) / len(values))
    mean, share = float(values.mean()), float(np.mean(values > point))
    half, about = root * values.std(), root * max(np.sqrt(share * (1 - share)), 0.5 / len(values))
    ends = np.clip([0.9 - 0.3 * root, 0.9, 0.9 + 0.3 * root], 0, 1)
    low, middle, high = np.quantile(values, ends, method="inverted_cdf").tolist()
    return {
        "mean": (mean, mean - half, mean + half),
        "quantile": (middle, low, high),
        "probability": (share, share - about, share + about),
    }


def plugged(values: np.ndarray, point: float) -> Found:
    """Return statistics without intervals."""
    middle, share = np.quantile(values, 0.9, method="inverted_cdf"), np.mean(values > point)
    found = {"mean": values.mean(), "quantile": middle, "probability": share}
    return {name: (float(each), float(each), float(each)) for name, each in found.items()}


def measure(name: str, law: str, seed: int, more_ways: bool) -> dict[str, Any]:
    """Return what each way finds on one draw."""
    x, y, spread = rows_of(name, seed, ROWS)
    random, table = np.random.default_rng(seed), Table(x, y)

    def f(y: Any) -> Any:
        return y.mean(axis=1) if name == "Fisher" else np.abs(y).max(axis=1)

    true = f(y)
    late, delays = late_rows(law, true, seed)
    more, function = late * delays[0], table
    point = float(np.quantile(true, 0.95))
    delay = Fault("delay", latency=lambda batch: float(more[table.places(batch)].sum()))  # pyright: ignore[reportArgumentType]
    estimates: dict[str, Callable[[RowResult], EnsembleEstimate]] = {
        "mean": lambda result: result.mean(f, coverage=COVERAGE),
        "quantile": lambda result: result.quantile(0.9, f, coverage=COVERAGE),
        "probability": lambda result: result.probability(lambda v: v > point, f, coverage=COVERAGE),
    }

    def result_of(**aim: Any) -> RowResult:
        with SimulatedPool(
            function,  # pyright: ignore[reportArgumentType]
            WORKERS,
            seconds=lambda size: SECONDS * size,
            faults=Faults([delay, Fault("death", DEATHS)], seed=seed),
            hang_timeout=3 * DEADLINE,
        ) as pool:
            return run_rows(
                function, x, pool, tolerance=TOLERANCE * spread, deadline=2 * DEADLINE,
                job_deadline=DEADLINE, rows_per_call=1, seed=seed, **aim,
            )  # fmt: skip

    asked = random.permutation(ROWS)
    came = more[asked] < DEADLINE * random.random(ROWS)  # sent evenly until the deadline
    ways: dict[str, Found] = {"dropped": sampled(true[~late], point)}
    computed, seconds, notes, left = {}, 0.0, 0, {}
    for statistic, estimate in estimates.items():
        begin = time.process_time()
        result = result_of(statistic=estimate, stop_when=lambda estimate: False)
        found = estimate(result)
        seconds, notes = seconds + time.process_time() - begin, notes + bool(found.note)
        known = result.status == "computed"
        computed[statistic], left[statistic] = int(known.sum()), int(np.sum(late & ~known))
        some = asked[: computed[statistic]]
        in_time = true[some[came[: len(some)]]]
        worst = [
            plugged(np.append(in_time, np.full(ROWS - len(in_time), end)), point)[statistic][0]
            for end in (in_time.min(), in_time.max())
        ]
        for way, each in {
            "ours": (found.value, *found.interval),
            "random": sampled(true[some], point)[statistic],
            "came": sampled(true[known], point)[statistic],
            "worst": (sum(worst) / 2, *worst),
        }.items():
            ways.setdefault(way, {})[statistic] = each
    if more_ways:
        some = asked[: computed["mean"]]
        ways["process"] = plugged(predicted(x, true, some[came[: len(some)]]), point)
        together = result_of()
        ways["together"] = {
            statistic: (found.value, *found.interval)
            for statistic, estimate in estimates.items()
            for found in (estimate(together),)
        }
    return {
        "computed": computed,
        "late_at_the_end": left,
        "notes": notes,
        "seconds": seconds / len(estimates),
        "true": {key: each[0] for key, each in plugged(true, point).items()},
        "ways": ways,
    }


def predicted(x: np.ndarray, true: np.ndarray, came: np.ndarray) -> np.ndarray:
    """Return all values as a plain Gaussian process has them by those that came."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    kernel = ConstantKernel() * Matern([1.0] * x.shape[1], nu=2.5) + WhiteKernel(1e-4)
    model, x = GaussianProcessRegressor(kernel, normalize_y=True), x / x.std(axis=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        few = came[:256]  # widths by these, in a tenth of the time
        tuned: Any = model.fit(x[few], true[few]).kernel_
    plain: Any = GaussianProcessRegressor(tuned, normalize_y=True)
    plain.optimizer = None
    known = np.asarray(plain.fit(x[came], true[came]).predict(x))
    known[came] = true[came]
    return known


def summary(draws: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how often each way's intervals held, and how wide they and their errors were."""
    found: dict[str, Any] = {}

    def spread(values: list[float]) -> dict[str, Any]:
        return {"median": float(np.median(values)), "range": [min(values), max(values)]}

    for name in ("computed", "late_at_the_end"):
        found[name] = {s: spread([each[name][s] for each in draws]) for s in STATISTICS}
    found["seconds"] = spread([each["seconds"] for each in draws])
    found |= {"draws": len(draws), "notes": sum(each["notes"] for each in draws), "ways": {}}
    for statistic in STATISTICS:
        true = np.array([each["true"][statistic] for each in draws])
        of = {
            way: np.array([each["ways"][way][statistic] for each in draws if way in each["ways"]])
            for way in draws[0]["ways"]
        }
        unit = np.median(of["random"][:, 2] - of["random"][:, 1])
        for way, each in of.items():
            value, low, high = each.T
            some = true[: len(value)]
            held = (low <= some + 1e-12) & (some <= high + 1e-12)
            unsure = high - low > 1e-12
            found["ways"].setdefault(way, {})[statistic] = {
                "draws": len(value),
                "held": float(np.mean(held)),
                # Draws whose answer was not known exactly, and how many of their intervals held.
                "unsure": int(unsure.sum()),
                "held_unsure": int(np.sum(held & unsure)),
                "width": np.quantile((high - low) / unit, [0.5, 0.1, 0.9]).tolist(),
                "error": float(np.sqrt(np.mean((value - some) ** 2)) / unit),
                "bias": float(np.mean(value - some) / unit),
            }
    return found
