"""Rows by a deadline on spot nodes that a public trace takes away and gives back.

`--folder` is `availability/16-node/aws-08-27-2023` of github.com/skypilot-org/spot-traces (Wu et
al., "Can't be late", NSDI 2024): how many of 16 nodes were there in three zones, every 300 s. That
is a tick, of 2 s here. Each zone has a third of the workers; worker k of n is there while more than
16 k/n nodes are. When it goes, so does the row that it has. A row takes so long (0.2 s with 12
workers) that workers that never go compute all rows in 25 ticks, which are the deadline. Stretches
of the trace are drawn by seeds: the first at which a quarter of the workers is there to begin with,
and as many are lost in the first 12 ticks. Compared are

- ours: `run_rows` in real time, one row a call, a tolerance of 10 % of the outputs' spread;
- executor: each row goes to the worker that is free first, and again if that is lost. It is
  simulated, so that nothing but rows takes time;
- blocks: the same with 15 rows a task (200 blocks of 3,000 rows, Ray Data's default); one that lost
  its worker begins again.

`--quick` draws nodes that come and go at random, in place of a trace.
"""

import collections
import heapq
import json
import queue
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from report import Report, environment, show
from rows import COVERAGE, TOLERANCE, Table, row_errors
from simulators import EXPENSIVE, rows_of

from nercc_jax.compilation import enable_compilation_cache
from nercc_jax.pools import AbstractPool
from nercc_jax.pools.backend import OnOutcome, WorkerBackend, WorkerDied
from nercc_jax.rows import run_rows

TICK = 2.0  # seconds
ROWS, TICKS, NODES, BLOCK = 3000, 25, 16, 15

Spells = list[list[tuple[float, float]]]  # of each worker, from when until when it is there


def run(
    report: Report,
    folder: Path | None = None,
    seeds: int = 3,
    workers: tuple[int, ...] = (12, 64),
    only: tuple[str, ...] = EXPENSIVE,
) -> None:
    """Count the rows within the tolerance at the deadline.

    Options:
        folder: The zones' traces.
        seeds: Stretches of the trace.
        workers: Numbers of workers.
        only: Functions.
    """
    enable_compilation_cache()  # as the `nercc` command does
    rows = ROWS
    if report.quick:
        seeds, workers, only, rows = 1, workers[:1], only[:1], 300
        random = np.random.default_rng(0)
        traces = np.clip(8 + np.cumsum(random.integers(-4, 5, (3, 400)), axis=1), 0, NODES)
    elif folder is not None:
        found = [json.loads(path.read_text())["data"] for path in sorted(folder.glob("*.json"))]
        traces = np.array([trace[: min(map(len, found))] for trace in found])
    else:
        raise ValueError("--folder is missing: give that of the zones' traces")
    cells = []
    for seed in range(seeds):
        for number, name in ((number, name) for number in workers for name in only):
            cells.append(measure(name, traces, number, seed, rows))
            report.log(cells[-1])
            about = {"rows": rows, "tick": TICK, "deadline": TICK * TICKS}
            about |= {"tolerance": TOLERANCE, "coverage": COVERAGE}
            report.write({"environment": environment(), **about, "cells": cells})
    columns = ("function", "workers", "seed", "within", "executor", "blocks")
    show({key: cell[key] for key in columns} for cell in cells)


def stretch(traces: np.ndarray, workers: int, seed: int) -> tuple[int, np.ndarray]:
    """Return a stretch's first tick, and which workers are there at each tick."""
    zones, ranks = np.arange(workers) % len(traces), np.arange(workers) // len(traces)
    there = NODES * ranks / -(-workers // len(traces)) < traces[zones].T
    random = np.random.default_rng(seed)
    while True:
        start = int(random.integers(len(there) - TICKS - 10))
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

    def __init__(self, function: Table, spells: Spells, seconds: float):
        self._begin(
            _SpotBackend(function, spells, seconds), len(spells), 1,
            start_timeout=1e6, min_workers=1,
        )  # fmt: skip


class _SpotBackend(WorkerBackend):
    def __init__(self, function: Table, spells: Spells, seconds: float):
        self._function, self._spells, self._seconds = function, spells, seconds
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
            on_outcome(worker, life, self._function(batch))
        on_outcome(worker, life, WorkerDied("its node was taken"))

    def _wait(self, until: float) -> bool:
        return self._over.wait(max(self._begin + until - time.monotonic(), 0))

    def send(self, worker: int, life: int, kind: int, batch: Any) -> None:
        self._inboxes[worker, life].put(batch)

    def close(self) -> None:
        self._over.set()


def executor(spells: Spells, seconds: float, rows: int, rows_per_task: int) -> np.ndarray:
    """Return when each row is done, where rows whose worker is lost are submitted again."""
    tasks, times = collections.deque(range(0, rows, rows_per_task)), np.full(rows, np.inf)
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
            some = slice(task, min(task + rows_per_task, rows))
            done = now + seconds * (some.stop - task)
            if done <= end:
                times[some] = done
            heapq.heappush(free, (min(done, end), worker, task if done > end else None))
        if not tasks and not any(each[2] is not None for each in free):
            break
    return times


def measure(name: str, traces: np.ndarray, workers: int, seed: int, rows: int) -> dict[str, Any]:
    """Return what each way has at the deadline."""
    x, y, spread = rows_of(name, seed, rows)
    tick, there = stretch(traces, workers, seed)
    spells, deadline, tolerance = spells_of(there), TICK * TICKS, TOLERANCE * spread
    seconds = deadline * workers / rows
    with SpotPool(Table(x, y), spells, seconds) as pool:
        result = run_rows(
            lambda batch: batch, x, pool, tolerance=tolerance, coverage=COVERAGE, rows_per_call=1,
            job_deadline=deadline, grace=2 * seconds, seed=seed,
        )  # fmt: skip
    status, values, score = result.status, result.values, result.score
    assert values is not None
    computed, predicted, unknown = (status == each for each in ("computed", "predicted", "unknown"))
    assert (computed | predicted | unknown).all()
    assert set(result.reasons) == set(np.flatnonzero(unknown).tolist())
    assert all(result.reasons.values())
    np.testing.assert_array_equal(values[computed], y[computed])
    error = row_errors(values, y)
    plain, blocks = (executor(spells, seconds, rows, each) for each in (1, BLOCK))
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
        "predicted_held": int(np.sum((error <= score)[predicted])),
        "within": int(np.sum((computed | predicted) & (error <= tolerance))),
        "executor": int(np.sum(plain <= deadline)),
        "blocks": int(np.sum(blocks <= deadline)),
    }
