"""The test of workers: how many clean ones it accuses, and how soon it finds the others."""

import math

import numpy as np
import pytest

from nercc_jax.risk._monitor import WorkerMonitor

RATE, USUAL = 1e-6, 5e-4  # by default
POOL = 8


def serve(monitor, wrong, random):
    """Have a pool's workers answer in turn; return those that are accused.

    `wrong` are places in the stream at which an answer is wrong; the answers before each are shared
    out to all workers.
    """
    accused, before = set(), 0
    for place in wrong.tolist():
        right = random.multinomial(place - before, np.full(POOL, 1 / POOL))
        worker = int(random.integers(POOL))
        for each, number in enumerate(right.tolist()):
            if number and monitor.add(each, right=number):
                accused.add(each)
        if monitor.add(worker, wrong=1):
            accused.add(worker)
        before = place + 1
    return accused


@pytest.mark.parametrize("share", [1e-4, USUAL])
def test_clean_workers_are_accused_no_more_often_than_stated(share):
    """1,000 workers in pools of 8, 10,000 answers each, as many wrong as is usual."""
    random, accused = np.random.default_rng(0), 0
    for _ in range(1000 // POOL):
        wrong = np.flatnonzero(random.random(POOL * 10_000) < share)
        accused += len(serve(WorkerMonitor(POOL), wrong, random))
    most = 1000 * 10_000 * RATE
    assert accused <= most


@pytest.mark.parametrize("later", [2e-3, 1e-2])
def test_a_change_at_all_workers_accuses_nobody(later):
    """As where a model draws random numbers, and more so for other queries."""
    random, accused = np.random.default_rng(1), 0
    for _ in range(25):
        share = np.where(np.arange(POOL * 4000) < POOL * 2000, 1e-4, later)
        wrong = np.flatnonzero(random.random(len(share)) < share)
        accused += len(serve(WorkerMonitor(POOL), wrong, random))
    assert accused <= 1, "of 200 workers"


def answers_until_accused(share, random, others=1000):
    """How many answers a worker gives that is wrong so often, after a long time without."""
    monitor = WorkerMonitor(POOL)
    for worker in range(POOL):
        monitor.add(worker, right=others)
    for number in range(1, 10_000):
        if monitor.add(0, **{"wrong" if random.random() < share else "right": 1}):
            return number
    return math.inf


@pytest.mark.parametrize(("share", "most"), [(1.0, 3), (0.2, 40), (0.05, 160)])
def test_workers_that_are_wrong_are_found_soon(share, most):
    random = np.random.default_rng(2)
    found = [answers_until_accused(share, random) for _ in range(200)]
    assert np.quantile(found, 0.9) <= most


def test_one_wrong_worker_does_not_shield_another():
    random = np.random.default_rng(3)
    monitor, accused = WorkerMonitor(POOL), set()
    for _ in range(200):
        for worker in range(POOL):
            wrong = worker < 2 and random.random() < 0.5
            if monitor.add(worker, **{"wrong" if wrong else "right": 1}):
                accused.add(worker)
    assert accused == {0, 1}


def test_runs_of_right_answers_count_as_they_would_one_by_one():
    """And against the sum of products from all starting times, by hand."""
    share, ratios = USUAL, np.array([4.0, 16.0, 64.0, 256.0, 1024.0])
    best = ratios * share / (1 - share + ratios * share)
    losses = [0] * 30 + [1] + [0] * 7 + [1]
    factors = np.array([np.where(loss, best / share, (1 - best) / (1 - share)) for loss in losses])
    products = sum(np.prod(factors[start:], axis=0) for start in range(len(losses)))
    at_once = WorkerMonitor(2, false_alarms=1 / (1.001 * products.mean()))
    for right in (30, 7):
        assert not at_once.add(0, right=right, wrong=1)
    once_more = WorkerMonitor(2, false_alarms=1 / (0.999 * products.mean()))
    assert not once_more.add(0, right=30, wrong=1)
    assert once_more.add(0, right=7, wrong=1)


def test_a_restart_forgets():
    monitor = WorkerMonitor(2)
    assert monitor.add(1, wrong=3)
    monitor.restart(1)
    assert (monitor.number, monitor.wrong) == ([0, 0], [0, 0])
    assert not monitor.add(1, wrong=2)
    assert monitor.allowed(0) == 2 / 128, "of the least number of answers"
    assert monitor.allowed(1) == USUAL
    with pytest.raises(ValueError, match="must be between 0 and 1"):
        WorkerMonitor(2, usual=0.0)
