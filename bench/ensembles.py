"""The mean, a quantile and a probability of an ensemble by a deadline: do their intervals hold?

    python bench/ensembles.py [--draws 100] [--only NAME ...] [--laws LAW ...] [--resume]

An ensemble of 1,000 rows runs on 50 simulated workers. A row takes 4 s, a tenth of the rows longer,
by 32 s in the mean, exponentially distributed: independently of the row, half of them from the 12 %
with the largest values, or exactly the largest values (`RowLatency`). A copy of a late row is as
late. One call in 100 kills its worker. After 60 s the run ends, when 300 to 500 rows have come.
Asked for are the mean of a quantity of interest, its 0.9 quantile, and the probability that it
exceeds its 95 % point, each with a 90 % interval. The quantity is the largest absolute output
(Fisher: the mean output, since its largest one is 1 nearly everywhere). The functions are real, the
time is not: `run_rows` runs on a `SimulatedPool`. Compared are

- ours: `run_rows(compute="needed")` with a tolerance of a tenth of the outputs' spread;
- random: the mean of as many rows, drawn at random, all of which came (nobody has such a sample
  where lateness depends on the row);
- came: what ours computed by the deadline, as if it was drawn at random;
- dropped: every row is computed, and what is late is left out, as if it was late at random;
- process: as many rows as ours, in a random order, with late ones missing, and a plain Gaussian
  process (scikit-learn, Matern 5/2, widths by likelihood) whose predictions are plugged in; it has
  no interval of its own (on the first --processes draws);
- worst: what came in that order, and each of the rest anywhere between the least and the largest
  value that came.

Writes results/ensembles.json, which docs/ensembles.md shows. Settings were chosen on other draws.
"""

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _functions_cases import EXPENSIVE, rows_of
from _report import environment, read_json, write_json
from _settings import PACKAGES
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
from threadpoolctl import threadpool_limits

from nercc_jax.compilation import enable_compilation_cache
from nercc_jax.pools import Fault, Faults
from nercc_jax.rows import RowFunction, run_rows
from nercc_jax.stragglers import ExponentialLatency, RowLatency, TraceLatency
from nercc_jax.testing import SimulatedPool

RESULTS = Path(__file__).parent / "results" / "ensembles.json"
ROWS, WORKERS, SECONDS, DELAY, RATE, DEATHS = 1000, 50, 4.0, 32.0, 0.1, 0.01
DEADLINE, TOLERANCE, COVERAGE, NORMAL = 60.0, 0.1, 0.9, 1.645
_NONE, _LATE = TraceLatency([0.0]), ExponentialLatency(DELAY)
LAWS = {
    "independent": RowLatency.independent(_NONE, _LATE, RATE),
    "leaning": RowLatency.leaning_to(_NONE, _LATE, RATE),
    "extreme": RowLatency.extreme(_NONE, _LATE, RATE),
}
STATISTICS = ("mean", "quantile", "probability")
Found = dict[str, tuple[float, float, float]]  # value and interval by statistic


def interest(name: str) -> Any:
    """Return the quantity of interest of a function's outputs."""
    if name == "Fisher":
        return lambda y: y.mean(axis=1)
    return lambda y: np.abs(y).max(axis=1)


def sampled(values: np.ndarray, number: int, point: float) -> Found:
    """Return statistics and intervals of values that were drawn from so many rows at random."""
    root: float = NORMAL * np.sqrt(max(1 - len(values) / number, 0) / len(values))
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


def worst(came: np.ndarray, missing: int, point: float) -> Found:
    """Return statistics with each missing row anywhere between the values that came."""
    least, most = (
        plugged(np.append(came, np.full(missing, end)), point) for end in (came.min(), came.max())
    )
    return {
        name: ((least[name][0] + most[name][0]) / 2, least[name][0], most[name][0])
        for name in STATISTICS
    }


def measure(name: str, law: str, seed: int, process: bool) -> dict[str, Any]:
    """Return what each way finds on one draw."""
    x, y, spread = rows_of(name, seed, ROWS)
    f, random = interest(name), np.random.default_rng(seed)
    true = f(y)
    which, delays = jax.random.split(jax.random.key(seed))
    late = np.asarray(LAWS[law].straggles(which, jnp.asarray(true)))
    more = late * np.asarray(_LATE.sample(delays, (ROWS,)))
    place = {row.tobytes(): number for number, row in enumerate(x)}

    def places(batch: Any) -> list[int]:
        return [place[row.tobytes()] for row in np.asarray(batch)]

    function: Any = RowFunction(lambda batch: y[places(batch)])
    begin, point = time.process_time(), float(np.quantile(true, 0.95))
    delay = Fault("delay", latency=lambda batch: float(more[places(batch)].sum()))
    with SimulatedPool(
        function,
        WORKERS,
        seconds=lambda size: SECONDS * size,
        faults=Faults([delay, Fault("death", DEATHS)], seed=seed),
        hang_timeout=3 * DEADLINE,
    ) as pool:
        result = run_rows(
            function,
            x,
            pool,
            tolerance=TOLERANCE * spread,
            deadline=2 * DEADLINE,
            job_deadline=DEADLINE,
            rows_per_call=1,
            seed=seed,
        )
    estimates = {
        "mean": result.mean(f, coverage=COVERAGE),
        "quantile": result.quantile(0.9, f, coverage=COVERAGE),
        "probability": result.probability(lambda v: v > point, f, coverage=COVERAGE),
    }
    seconds = time.process_time() - begin
    computed = result.status == "computed"
    number = int(computed.sum())
    order = random.permutation(ROWS)
    asked = order[:number]
    came = asked[more[asked] < DEADLINE * random.random(number)]  # sent evenly until the deadline
    ways: dict[str, Found] = {
        "ours": {key: (each.value, *each.interval) for key, each in estimates.items()},
        "random": sampled(true[order[:number]], ROWS, point),
        "came": sampled(true[computed], ROWS, point),
        "dropped": sampled(true[~late], ROWS, point),
        "worst": worst(true[came], ROWS - len(came), point),
    }
    if process:
        model = GaussianProcessRegressor(
            ConstantKernel() * Matern([1.0] * x.shape[1], nu=2.5) + WhiteKernel(1e-4),
            normalize_y=True,
        )
        scale = x.std(axis=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            few = came[:256]  # widths by these, in a tenth of the time
            kernel: Any = model.fit(x[few] / scale, true[few]).kernel_
        plain: Any = GaussianProcessRegressor(kernel, normalize_y=True)
        plain.optimizer = None
        known = np.asarray(plain.fit(x[came] / scale, true[came]).predict(x / scale))
        known[came] = true[came]
        ways["process"] = plugged(known, point)
    exact = plugged(true, point)
    return {
        "computed": number,
        "late_at_the_end": int(np.sum(late & ~computed)),
        "notes": sum(bool(each.note) for each in estimates.values()),
        "seconds": seconds,
        "true": {key: each[0] for key, each in exact.items()},
        "ways": ways,
    }


def summary(draws: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how often each way's intervals held, and how wide they and their errors were."""
    found: dict[str, Any] = {
        name: {
            "median": float(np.median([each[name] for each in draws])),
            "range": [min(each[name] for each in draws), max(each[name] for each in draws)],
        }
        for name in ("computed", "late_at_the_end", "seconds")
    }
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
            width = (high - low) / unit
            found["ways"].setdefault(way, {})[statistic] = {
                "draws": len(value),
                "held": float(np.mean((low <= some + 1e-12) & (some <= high + 1e-12))),
                "width": np.quantile(width, [0.5, 0.1, 0.9]).tolist(),
                "error": float(np.sqrt(np.mean((value - some) ** 2)) / unit),
                "bias": float(np.mean(value - some) / unit),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--processes", type=int, default=10, help="draws with a Gaussian process")
    parser.add_argument("--first", type=int, default=0, help="the first draw's seed")
    parser.add_argument("--only", nargs="+", default=EXPENSIVE, choices=EXPENSIVE)
    parser.add_argument("--laws", nargs="+", default=list(LAWS), choices=LAWS)
    parser.add_argument("--resume", action="store_true", help="keep the cells that are there")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    enable_compilation_cache()
    threadpool_limits(1)  # matrices are small: more threads take three times the CPU time
    found = read_json(options.output).get("cells", []) if options.resume else []
    known = {(cell["function"], cell["law"]) for cell in found}
    for name in options.only:
        for law in options.laws:
            if (name, law) in known:
                continue
            seeds = range(options.first, options.first + options.draws)
            draws = [
                measure(name, law, each, each - seeds[0] < options.processes) for each in seeds
            ]
            cell = {"function": name, "law": law} | summary(draws)
            found.append(cell)
            held = {
                way: [each[s]["held"] for s in STATISTICS] for way, each in cell["ways"].items()
            }
            print(name, law, held, cell["ways"]["ours"], flush=True)
            facts = {"environment": environment(PACKAGES), "rows": ROWS, "workers": WORKERS}
            facts |= {"deadline": DEADLINE, "coverage": COVERAGE, "first": options.first}
            write_json(options.output, facts | {"cells": found})


if __name__ == "__main__":
    main()
