"""What becomes of statistics and error bars where rows are late because of what they are.

    python bench/late_rows.py [--draws 16] [--only NAME ...] [--laws LAW ...] [--resume]

Each row of a function sleeps for 4 s, as a simulator elsewhere would. A tenth of the rows takes
longer, by 32 s in the mean, exponentially distributed: independently of the row, half of them from
the 12 % with the largest peaks, or exactly the largest peaks (`RowLatency`). Where lateness is the
row's, a copy is late, too; where it is independent, a copy is late as often as any call. Compared
are four ways to get the mean peak and the share of peaks above their 95 % point:

- dropping: what is late is left out (its time is that of the others);
- waiting: every row is computed, each by the worker that is free first;
- hedging: every late row is sent again at twice the usual time, and the first answer counts;
- ours: `run_rows(compute="all")` with a deadline of 40 s for the job. Rows that have not come by
  then are predicted, or unknown where too few late rows came to know how far off they may be.

Biases are in units of the peaks' standard deviation, and in points of the share; of ours, all rows
count that have a value. Coverage is that of the 90 % bars of late rows that have one. Writes
results/late_rows.json, which docs/dependent.md shows.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _functions_cases import EXPENSIVE, rows_of
from _report import environment, read_json, write_json
from _settings import PACKAGES

from nercc_jax.compilation import enable_compilation_cache
from nercc_jax.pools import DevicePool
from nercc_jax.rows import run_rows
from nercc_jax.stragglers import ExponentialLatency, RowLatency, TraceLatency

RESULTS = Path(__file__).parent / "results" / "late_rows.json"
WORKERS, SECONDS, DELAY, RATE, TOLERANCE, COVERAGE = 200, 4.0, 32.0, 0.1, 0.1, 0.9
DEADLINE = 40.0  # seconds after which ours ends
_NONE, _LATE = TraceLatency([0.0]), ExponentialLatency(DELAY)
LAWS = {
    "independent": RowLatency.independent(_NONE, _LATE, RATE),
    "leaning": RowLatency.leaning_to(_NONE, _LATE, RATE),
    "extreme": RowLatency.extreme(_NONE, _LATE, RATE),
}


class Paced:
    """A table of a function's values, whose rows take their time."""

    def __init__(self, x: np.ndarray, y: np.ndarray, seconds: np.ndarray, again: np.ndarray):
        self.places = {row.tobytes(): place for place, row in enumerate(x)}
        self.y, self.seconds, self.again = y, seconds, again
        self.begun = np.zeros(len(x), bool)

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        places = [self.places[row.tobytes()] for row in batch]
        seconds = np.where(self.begun[places], self.again[places], self.seconds[places])
        self.begun[places] = True
        time.sleep(float(seconds.sum()))
        return self.y[places]


def statistics(peaks: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """Return the bias of the mean, in standard deviations, and of the share of large peaks."""
    large = np.quantile(true, 0.95)
    bias = (np.mean(peaks) - np.mean(true)) / np.std(true)
    return float(bias), float(np.mean(peaks > large) - np.mean(true > large))


def simulated_seconds(seconds: np.ndarray, again: np.ndarray | None = None) -> float:
    """Return the seconds until all rows are in, each sent to the worker that is free first.

    With `again`, the seconds of copies, a late row is sent again at twice the usual time.
    """
    free, copies, ends = np.zeros(WORKERS), [], []
    for row, each in enumerate(seconds.tolist()):
        worker = int(np.argmin(free))
        begin = free[worker]
        free[worker] = begin + each
        ends.append(free[worker])
        if again is not None and each > 2 * SECONDS:
            copies.append((begin + 2 * SECONDS, row))
    for due, row in copies:
        worker = int(np.argmin(free))
        begin = max(free[worker], due)
        if begin < ends[row]:
            free[worker] = begin + float(again[row]) if again is not None else begin
            ends[row] = min(ends[row], free[worker])
    return float(max(ends))


def measure(name: str, law: str, rows: int, seed: int) -> dict[str, Any]:
    """Return the biases and times of all ways on one draw."""
    x, y, spread = rows_of(name, seed, rows)
    peaks = np.abs(y).max(axis=1)
    which, delays, copied = jax.random.split(jax.random.key(seed), 3)
    late = np.asarray(LAWS[law].straggles(which, jnp.asarray(peaks)))
    more = np.asarray(_LATE.sample(delays, (2, rows)))
    times = SECONDS + late * more[0]
    again = times
    if law == "independent":  # a copy is late as any other call
        again = SECONDS + np.asarray(jax.random.bernoulli(copied, RATE, (rows,))) * more[1]

    begin = time.perf_counter()
    result = run_rows(
        Paced(x, y, times, again),
        x,
        DevicePool,
        num_workers=WORKERS,
        tolerance=TOLERANCE * spread,
        coverage=COVERAGE,
        compute="all",
        job_deadline=DEADLINE,
        rows_per_call=1,
        seed=seed,
    )
    seconds = time.perf_counter() - begin
    assert result.values is not None
    error = np.sqrt(np.mean((result.values - y) ** 2, axis=1))
    missing = late & (result.status != "computed")
    barred, nothing = missing & np.isfinite(result.score), missing & ~np.isfinite(result.score)
    known = np.abs(result.values).max(axis=1)[np.isfinite(result.values).all(axis=1)]
    dropped = statistics(peaks[~late], peaks)
    ours = statistics(known, peaks)
    return {
        "function": name,
        "law": law,
        "seed": seed,
        "late": int(late.sum()),
        "others": int(np.sum(~late & (result.status != "computed"))),
        "predicted": int(np.sum(missing & (result.status == "predicted"))),
        "barred": int(barred.sum()),
        "held": int(np.sum(error[barred] <= result.score[barred])),
        "nothing": int(nothing.sum()),
        "came_late": [result.summary["came_late_held"], result.summary["came_late"]],
        "bias": {"dropping": dropped[0], "ours": ours[0]},
        "tail": {"dropping": dropped[1], "ours": ours[1]},
        "seconds": {
            "dropping": simulated_seconds(times[~late]),
            "waiting": simulated_seconds(times),
            "hedging": simulated_seconds(times, again),
            "ours": seconds,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--only", nargs="+", default=EXPENSIVE, choices=EXPENSIVE)
    parser.add_argument("--laws", nargs="+", default=list(LAWS), choices=LAWS)
    parser.add_argument("--at-once", type=int, default=1, help="runs that share the machine")
    parser.add_argument("--resume", action="store_true", help="keep the draws that are there")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    enable_compilation_cache()  # as the `nercc` command does
    wanted = [
        (name, law, options.rows, seed)
        for seed in range(options.draws)
        for law in options.laws
        for name in options.only
    ]
    about = {"workers": WORKERS, "seconds": SECONDS, "delay": DELAY, "at_once": options.at_once}
    found = read_json(options.output).get("cells", []) if options.resume else []
    known = {(cell["function"], cell["law"], cell["seed"]) for cell in found}
    wanted = [each for each in wanted if (each[0], each[1], each[3]) not in known]
    with ThreadPoolExecutor(options.at_once) as runs:
        for cell in runs.map(lambda each: measure(*each), wanted):
            found.append(cell)
            print(cell, flush=True)
            facts = {"environment": environment(PACKAGES), "rows": options.rows, **about}
            write_json(options.output, facts | {"cells": found})


if __name__ == "__main__":
    main()
