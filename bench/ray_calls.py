"""Measure a RayPool's call against Ray's own futures, with small inputs and large images.

    python bench/ray_calls.py [--workers 20] [--output bench/results/ray_calls.json]

The same actors answer both: through the pool, and by `actor.method.remote(...).future()`, turn by
turn in one process. All answers of a batch are waited for, so that both do the same calls.
"""

import argparse
import functools
import json
import statistics
import threading
import time
import warnings
from pathlib import Path

import numpy as np
from _report import environment, write_json

from nercc_jax import RayPool

SHAPES = {"small": (8,), "image": (224, 224, 3)}
PACKAGES = ("jax", "jaxlib", "numpy", "ray")


def answer(batch):
    """Next to no work, and a small answer."""
    return batch.reshape(len(batch), -1)[:, :8] * 2.0


def bare(actors, points):
    """Call actors as Ray's users do: arguments as they are, answers by futures."""
    done, left, answers = threading.Event(), [len(points)], list(points)

    def responded(place, future):
        answers[place] = future.result()
        left[0] -= 1
        if not left[0]:
            done.set()

    for place, (actor, x) in enumerate(zip(actors, points, strict=True)):
        future = actor.run.remote(0, x).future()
        future.add_done_callback(functools.partial(responded, place))
    done.wait()
    return np.stack(answers)


def pooled(pool, points):
    with pool.dispatch(points) as batch:
        return batch.wait().values


def seconds_of(function, seconds):
    """Return the seconds of each call, for this long."""
    found, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        function()
        found.append(time.perf_counter() - begin)
    return found


def main():
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--workers", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    summary = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    with RayPool(answer, summary.workers, compiled=False, address="local") as pool:
        actors = [actor for _, actor in sorted(pool._backend._actors.items())]
        for name, shape in SHAPES.items():
            points = np.random.default_rng(0).normal(size=(summary.workers, 1, *shape))
            points = points.astype(np.float32)
            calls = functools.partial(bare, actors, points), functools.partial(pooled, pool, points)
            for call in calls:
                seconds_of(call, 1.0)
            plain, ours = [], []
            for _ in range(summary.rounds):
                plain += seconds_of(calls[0], summary.seconds)
                ours += seconds_of(calls[1], summary.seconds)
            each = [statistics.median(times) / summary.workers for times in (plain, ours)]
            rate = [summary.workers * len(times) / sum(times) for times in (plain, ours)]
            rows.append(
                {
                    "inputs": name,
                    "futures_us": 1e6 * each[0],
                    "pool_us": 1e6 * each[1],
                    "own_us": 1e6 * (each[1] - each[0]),
                    "futures_calls_per_s": rate[0],
                    "pool_calls_per_s": rate[1],
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    if summary.output is not None:
        about = {"workers": summary.workers, "environment": environment(PACKAGES), "rows": rows}
        write_json(summary.output, about)


if __name__ == "__main__":
    main()
