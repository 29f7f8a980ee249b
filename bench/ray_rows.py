"""Measure rows a second of `run_rows` and `map_rows` on Ray against plain Ray, in pairs.

    python bench/ray_rows.py [--only cheap data memory] [--rounds 5] [--output FILE]

- "cheap": 100,000 rows of a cheap function by `run_rows` on a `RayPool`, with a tolerance and
  without, against as many actors of plain Ray, to which all calls go at once and whose answers
  are put together; a call has as many rows as the engine's calls grow to.
- "data": a Ray Data dataset through a function of 10 ms a row, by `map_rows` and by `map_batches`,
  with default options on 4 CPUs, the start of workers included.
- "memory": the peak of the main process that `map_rows` takes for a million rows of 10 inputs.

Each part has a process of its own, and a Ray of its own, which counts 4 CPUs. All values are
checked against the function's own.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray
import ray.data
from _report import environment, write_json
from ray import cloudpickle

from nercc_jax import RayPool
from nercc_jax.pools import RowFunction, map_rows, run_rows

RESULTS = Path(__file__).parent / "results" / "ray_rows.json"
PACKAGES = ("jax", "jaxlib", "numpy", "ray", "pyarrow")
CPUS, WORKERS, TOLERANCE = 4, 2, 0.1
SECONDS = 0.01  # of a row of the slow function


def cheap(x):
    return np.sin(3 * x).cumsum(axis=1)


def slow(x):
    """Take as long for each row as a simulator elsewhere would."""
    time.sleep(SECONDS * len(x))
    return cheap(x)


def inputs(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (rows, columns))


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    found = run()
    return time.perf_counter() - begin, found


def peak_gb() -> float:
    """Return the largest memory that this process has had, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def tolerance_of(y: np.ndarray) -> float:
    return TOLERANCE * float(np.sqrt(np.mean(np.var(y, axis=0))))


def rates(rows: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return rows a second by system, and medians of the ratios to "plain", round by round."""
    found: dict[str, Any] = {"rows_per_second": {}, "ratio": {}, "seconds": seconds}
    for name, each in seconds.items():
        found["rows_per_second"][name] = rows / statistics.median(each)
        pairs = zip(seconds["plain"], each, strict=True)
        found["ratio"][name] = statistics.median(plain / one for plain, one in pairs)
    return found


class Plain:
    """An actor as Ray's users write it."""

    def run(self, x):
        return cheap(x)


def measure_cheap(rounds: int) -> dict[str, Any]:
    """Compare `run_rows` with plain actors on a cheap function."""
    x = inputs(100_000, 8)
    y = cheap(x)
    tolerance = tolerance_of(y)
    before = peak_gb()
    with RayPool(cast(Any, RowFunction(cheap)), WORKERS, compiled=False) as pool:
        systems: dict[str, Callable[[], np.ndarray | None]] = {
            "tolerance 0": lambda: run_rows(cheap, x, pool, tolerance=0.0).values,
            "tolerance 10 %": lambda: run_rows(cheap, x, pool, tolerance=tolerance).values,
        }
        for run in systems.values():
            run()
        peak, size = peak_gb(), max(call.size for call in pool.calls())
        actors = [cast(Any, ray.remote(Plain)).remote() for _ in range(WORKERS)]

        def plain() -> np.ndarray:
            chunks = (x[place : place + size] for place in range(0, len(x), size))
            answers = [actors[i % WORKERS].run.remote(chunk) for i, chunk in enumerate(chunks)]
            return np.concatenate(ray.get(answers))

        plain()
        seconds = rounds_of({"plain": plain, **systems}, y, rounds)
    about = {"rows": len(x), "workers": WORKERS, "rows_per_call": size}
    return about | rates(len(x), seconds) | {"peak_gb": peak, "peak_before_gb": before}


def rounds_of(
    systems: dict[str, Callable[[], np.ndarray | None]], y: np.ndarray, rounds: int
) -> dict[str, list[float]]:
    """Time systems in turn, forwards and backwards, and check what they give."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(rounds):
        for name in list(systems)[:: 1 if number % 2 == 0 else -1]:
            taken, values = timed(systems[name])
            assert values is not None
            np.testing.assert_array_equal(values, y)
            seconds[name].append(taken)
            print(name, f"{taken:.3f} s, {len(y) / taken:,.0f} rows/s", flush=True)
    return seconds


def measure_data(rounds: int, rows: int = 6000) -> dict[str, Any]:
    """Compare `map_rows` with `map_batches` on a function that takes its time."""
    x = inputs(rows, 3)
    y = cheap(x)
    dataset = ray.data.from_numpy(np.array_split(x, 60)).materialize()

    def batch(columns):
        return columns | {"value": slow(columns["data"])}

    def plain():
        return dataset.map_batches(batch, batch_format="numpy").materialize()

    def ours(tolerance):
        return map_rows(dataset, slow, "data", tolerance=tolerance).materialize()

    systems = {
        "plain": plain,
        "tolerance 0": lambda: ours(0.0),
        "tolerance 10 %": lambda: ours(tolerance_of(y)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    computed = []
    dataset.map_batches(lambda columns: columns).materialize()  # its workers have started
    for number in range(rounds):
        for name in list(systems)[:: 1 if number % 2 == 0 else -1]:
            taken, found = timed(systems[name])
            table = found.to_pandas()
            order = np.lexsort(np.stack(table["data"].to_list()).T)
            values = np.stack(table["value"].to_list())[order]
            exact = np.ones(rows, bool)
            if "status" in table:
                exact = (table["status"] == "computed").to_numpy()[order]
            if name == "tolerance 10 %":
                computed.append(float(exact.mean()))
            own = y[np.lexsort(x.T)]
            np.testing.assert_array_equal(values[exact], own[exact])
            assert np.isfinite(values).all()
            seconds[name].append(taken)
            print(name, f"{taken:.1f} s, {rows / taken:,.0f} rows/s", flush=True)
    about = {"rows": rows, "cpus": CPUS, "seconds_a_row": SECONDS, "computed": computed}
    return about | rates(rows, seconds)


def measure_memory(rounds: int) -> dict[str, Any]:
    """Return the peak of the main process for a million rows."""
    del rounds
    rows = 1_000_000
    x = inputs(rows, 10)
    dataset = ray.data.from_numpy(np.array_split(x, 40)).materialize()
    tolerance = tolerance_of(cheap(x[:1000]))
    del x
    before = peak_gb()
    seconds, found = timed(
        lambda: map_rows(dataset, cheap, "data", tolerance=tolerance).materialize()
    )
    assert found.count() == rows
    return {"rows": rows, "seconds": seconds, "peak_gb": peak_gb(), "peak_before_gb": before}


PARTS = {"cheap": measure_cheap, "data": measure_data, "memory": measure_memory}


def measure(part: str, rounds: int) -> dict[str, Any]:
    """Return a part's results. A function of its own process, with a Ray of its own."""
    warnings.simplefilter("ignore")
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it
    ray.init("local", num_cpus=CPUS, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return PARTS[part](rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = json.loads(options.output.read_text()) if options.output.exists() else {}
    for part in options.only:
        with multiprocessing.get_context("spawn").Pool(1) as process:
            found[part] = process.apply(measure, (part, options.rounds))
        print(json.dumps({part: found[part]}), flush=True)
        write_json(options.output, found | {"environment": environment(PACKAGES)})


if __name__ == "__main__":
    main()
