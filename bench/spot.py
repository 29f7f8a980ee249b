"""Rows by a deadline on spot nodes that a public trace takes away and gives back.

    python bench/spot.py FOLDER [--seeds 3] [--workers 12 64] [--only NAME ...] [--output FILE]

FOLDER is `availability/16-node/aws-08-27-2023` of github.com/skypilot-org/spot-traces (Wu et al.,
"Can't be late", NSDI 2024): how many of 16 nodes were there in three zones, every 300 s. A tick
takes 2 s here. Each zone has a third of the workers; worker k of n is there while more than 16 k/n
nodes are. When it goes, so does the row that it has. A row takes so long (0.2 s with 12 workers)
that workers that never go compute all rows in 25 ticks, which are the deadline. Stretches of the
trace are drawn by seeds: the first at which a quarter of the workers is there to begin with, and as
many are lost in the first 12 ticks. Compared are

- ours: `run_rows` in real time, one row a call, a tolerance of 10 % of the outputs' spread;
- executor: each row goes to the worker that is free first, and again if that is lost. It is
  simulated, so that nothing but rows takes time;
- blocks: the same with 15 rows a task (200 blocks of 3,000 rows, Ray Data's default); one that lost
  its worker begins again.

Writes results/spot.json, which docs/functions.md shows.
"""

import argparse
import collections
import heapq
import json
import queue
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from _functions_cases import EXPENSIVE, rows_of
from _report import environment, write_json
from _settings import PACKAGES

from nercc_jax.compilation import enable_compilation_cache
from nercc_jax.pools import AbstractPool, Overdue
from nercc_jax.pools.backend import OnOutcome, WorkerBackend, WorkerDied
from nercc_jax.pools.scheduler import Scheduler
from nercc_jax.rows import RowProgress, run_rows

RESULTS = Path(__file__).parent / "results" / "spot.json"
TICK = 2.0  # seconds
ROWS, TICKS, NODES, TOLERANCE, COVERAGE, BLOCK = 3000, 25, 16, 0.1, 0.9, 15

Spells = list[list[tuple[float, float]]]  # of each worker, from when until when it is there


def stretch(folder: Path, workers: int, seed: int) -> tuple[int, np.ndarray]:
    """Return a stretch's first tick, and which workers are there at each tick."""
    traces = [json.loads(path.read_text())["data"] for path in sorted(folder.glob("*.json"))]
    number, each = min(map(len, traces)), -(-workers // len(traces))
    zones, ranks = np.arange(workers) % len(traces), np.arange(workers) // len(traces)
    nodes = np.array([trace[:number] for trace in traces])[zones].T
    there = nodes > NODES * ranks / each
    random = np.random.default_rng(seed)
    while True:
        start = int(random.integers(number - TICKS - 10))
        part = there[start : start + TICKS + 10]
        lost = np.sum(part[:12] & ~part[1:13])
        if part[0].sum() >= workers / 4 and lost >= workers / 4:
            return start, part


def spells_of(there: np.ndarray) -> Spells:
    """Return when each worker is there, in seconds."""
    edges = np.diff(np.pad(there.astype(int), ((1, 1), (0, 0))), axis=0)
    return [
        [(TICK * a, TICK * b) for a, b in zip(*map(np.flatnonzero, (e > 0, e < 0)), strict=True)]
        for e in edges.T
    ]


class SpotPool(AbstractPool):
    """Threads that are there in their spells, and take their row with them when they go."""

    def __init__(self, y: dict[bytes, np.ndarray], spells: Spells, seconds: float):
        backend = _SpotBackend(y, spells, seconds)
        self._scheduler = Scheduler(
            backend,
            len(spells),
            1,
            overdue=Overdue(),
            max_attempts=3,
            hang_timeout=60.0,
            start_timeout=1e6,
            min_workers=1,
        )


class _SpotBackend(WorkerBackend):
    def __init__(self, y: dict[bytes, np.ndarray], spells: Spells, seconds: float):
        self._y, self._spells, self._seconds = y, spells, seconds
        self._begin, self._over = time.monotonic(), threading.Event()
        self._inboxes: dict[tuple[int, int], queue.SimpleQueue[np.ndarray]] = {}

    def start(self, worker: int, life: int, on_outcome: OnOutcome) -> None:
        self._inboxes[worker, life] = queue.SimpleQueue()
        threading.Thread(target=self._live, args=(worker, life, on_outcome), daemon=True).start()

    def _live(self, worker: int, life: int, on_outcome: OnOutcome) -> None:
        now = time.monotonic() - self._begin
        start, end = next((each for each in self._spells[worker] if each[1] > now), (1e6, 2e6))
        if self._wait(start):
            return
        on_outcome(worker, life, None)
        while not self._over.is_set():
            try:
                left = self._begin + end - time.monotonic()
                batch = self._inboxes[worker, life].get(timeout=max(left, 1e-3))
            except queue.Empty:
                break
            done = time.monotonic() - self._begin + self._seconds * len(batch)
            if self._wait(min(done, end)):
                return
            if done > end:
                break
            answer = np.stack([self._y[row.tobytes()] for row in batch])
            on_outcome(worker, life, answer)
        on_outcome(worker, life, WorkerDied("its node was taken"))

    def _wait(self, until: float) -> bool:
        return self._over.wait(max(self._begin + until - time.monotonic(), 0))

    def prepare(self, batch: Any) -> Any:
        return batch

    def send(self, worker: int, life: int, kind: int, batch: Any) -> None:
        self._inboxes[worker, life].put(batch)

    def missing(self) -> None:
        return None

    def close(self) -> None:
        self._over.set()


def executor(spells: Spells, seconds: float, rows_per_task: int) -> np.ndarray:
    """Return when each row is done, where rows whose worker is lost are submitted again."""
    tasks = collections.deque(range(0, ROWS, rows_per_task))
    times = np.full(ROWS, np.inf)
    free: list[tuple[float, int, int | None]] = [(0.0, w, None) for w in range(len(spells))]
    while free:
        now, worker, lost = heapq.heappop(free)
        if lost is not None:
            tasks.append(lost)
        start, end = next((each for each in spells[worker] if each[1] > now), (np.inf, np.inf))
        if start > now:
            if start < np.inf:
                heapq.heappush(free, (start, worker, None))
        elif not tasks:
            if free:  # until another one's row may have been lost
                heapq.heappush(free, (max(free[0][0], now + 1e-3), worker, None))
        else:
            task = tasks.popleft()
            rows = slice(task, min(task + rows_per_task, ROWS))
            done = now + seconds * (rows.stop - task)
            if done <= end:
                times[rows] = done
            heapq.heappush(free, (min(done, end), worker, task if done > end else None))
        if not tasks and not any(each[2] is not None for each in free):
            break
    return times


def measure(name: str, folder: Path, workers: int, seed: int) -> dict[str, Any]:
    """Return what each way has at the deadline."""
    x, y, spread = rows_of(name, seed, ROWS)
    tolerance = TOLERANCE * spread
    tick, there = stretch(folder, workers, seed)
    spells, deadline = spells_of(there), TICK * TICKS
    seconds = deadline * workers / ROWS
    looks = np.linspace(0.1, 1.0, 10) * deadline
    seen: list[RowProgress] = []
    table = {row.tobytes(): value for row, value in zip(x, y, strict=True)}
    with SpotPool(table, spells, seconds) as pool:
        result = run_rows(
            lambda batch: batch,
            x,
            pool,
            tolerance=tolerance,
            coverage=COVERAGE,
            rows_per_call=1,
            job_deadline=deadline,
            grace=2 * seconds,
            seed=seed,
            on_progress=seen.append,
        )
    status, values, score = result.status, result.values, result.score
    assert values is not None
    computed, predicted, unknown = (status == each for each in ("computed", "predicted", "unknown"))
    assert (computed | predicted | unknown).all()
    assert set(result.reasons) == set(np.flatnonzero(unknown).tolist())
    assert all(result.reasons.values())
    np.testing.assert_array_equal(values[computed], y[computed])
    error = np.sqrt(np.mean((values - y) ** 2, axis=1))
    barred = unknown & np.isfinite(score)
    within = (computed | predicted) & (error <= tolerance)
    plain, blocks = (executor(spells, seconds, each) for each in (1, BLOCK))
    progress = [max((p for p in seen if p.seconds <= t), key=lambda p: p.seconds) for t in looks]
    return {
        "function": name,
        "workers": workers,
        "seed": seed,
        "tick": tick,
        "there": float(there[:TICKS].mean()),
        "seconds": result.summary["seconds"],
        "deaths": result.summary["deaths"],
        "calls": result.report.sent,
        "computed": int(computed.sum()),
        "predicted": int(predicted.sum()),
        "predicted_held": int(np.sum(error[predicted] <= score[predicted])),
        "predicted_within": int(np.sum(error[predicted] <= tolerance)),
        "barred": int(barred.sum()),
        "barred_held": int(np.sum(error[barred] <= score[barred])),
        "barred_within": int(np.sum(error[barred] <= tolerance)),
        "no_bar": int(np.sum(unknown & ~np.isfinite(score))),
        "came_late": [result.summary["came_late_held"], result.summary["came_late"]],
        "within": int(within.sum()),
        "executor": int(np.sum(plain <= deadline)),
        "blocks": int(np.sum(blocks <= deadline)),
        "by_time": {
            "seconds": looks.tolist(),
            "computed": [each.computed for each in progress],
            "done": [each.done for each in progress],
            "executor": [int(np.sum(plain <= t)) for t in looks],
            "blocks": [int(np.sum(blocks <= t)) for t in looks],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path, help="with the zones' traces")
    parser.add_argument("--seeds", type=int, default=3, help="stretches of the trace")
    parser.add_argument("--workers", type=int, nargs="+", default=[12, 64])
    parser.add_argument("--only", nargs="+", default=EXPENSIVE, choices=EXPENSIVE)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    enable_compilation_cache()  # as the `nercc` command does
    found = []
    for seed in range(options.seeds):
        for workers in options.workers:
            for name in options.only:
                found.append(measure(name, options.folder, workers, seed))
                shown = {k: v for k, v in found[-1].items() if k != "by_time"}
                print(shown, flush=True)
                about = {"rows": ROWS, "tick": TICK, "deadline": TICK * TICKS}
                about |= {"tolerance": TOLERANCE, "coverage": COVERAGE}
                write_json(
                    options.output, {"environment": environment(PACKAGES), **about, "cells": found}
                )


if __name__ == "__main__":
    main()
