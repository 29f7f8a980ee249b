"""Schedulers whose workers are on paper: they do what a test says, and nothing else."""

import collections
import contextlib
import threading
import time

import numpy as np

from nercc_jax.pools import AbstractPool, Overdue
from nercc_jax.pools.backend import WorkerBackend

SOON = 60.0  # seconds that nothing here should need


def soon(condition, seconds=SOON, every=0.002):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(every)


class ScriptedBackend(WorkerBackend):
    """Workers on paper: `sent` is what each has in hand; the test answers for them."""

    def __init__(self, refuse=()):
        self.sent = {}
        self.lives = collections.Counter()
        self.refuse = refuse  # workers that never start
        self.starting = None  # called with a worker at its start, which it may spoil
        self.closed = False
        self.mistakes = []
        self._ready = set()

    def start(self, worker, life, on_outcome):
        self.on_outcome = on_outcome
        self.lives[worker] += 1
        if self.starting is not None:
            self.starting(worker)
        # From a thread of its own, as all backends do: the scheduler is busy with this call.
        threading.Thread(target=self._begin, args=(worker, life)).start()

    def _begin(self, worker, life):
        if worker in self.refuse:
            self.on_outcome(worker, life, OSError("no such host"))
            return
        self._ready.add((worker, life))
        self.on_outcome(worker, life, None)

    def send(self, worker, life, kind, batch):
        if self.sent.get(worker, (None, None))[0] == life:
            self.mistakes.append(f"worker {worker} was busy, and was given work")
        if (worker, life) not in self._ready:
            self.mistakes.append(f"worker {worker} was not there, and was given work")
        self.sent[worker] = (life, int(batch[0, 0]))

    def close(self):
        self.closed = True

    def answer(self, worker, outcome=None):
        life, point = self.sent.pop(worker)
        self.on_outcome(worker, life, np.full((1, 1), float(point)) if outcome is None else outcome)

    def answer_all(self):
        for worker in list(self.sent):
            self.answer(worker)

    @property
    def points(self):
        return {worker: point for worker, (_, point) in self.sent.items()}


class ScriptedPool(AbstractPool):
    """A pool at which nothing is overdue and nobody hangs, unless options say so."""

    def __init__(self, backend, num_workers, **options):
        options = {"overdue": Overdue(least=10**6), "start_timeout": 30.0} | options
        self._begin(backend, num_workers, 1, **options)
        self.state = self._schedule


@contextlib.contextmanager
def open_schedulers(backend):
    """Yield what opens pools on this backend; close them afterwards, and check their records."""
    pools = []

    def make(num_workers, **options):
        pools.append(ScriptedPool(backend, num_workers, **options))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()
        report = pool.report()
        assert report.deaths == sum(report.deaths_by_worker)
    assert not backend.mistakes


def dispatch(pool, count, needed=None, copies=2):
    points = np.arange(count, dtype=float)[:, None, None]
    return pool.dispatch(points, needed=needed, copies=copies)


def next_call(faults, batch=None):
    """Seconds by which a worker's next call is delayed, and the kinds of its other faults."""
    struck = faults.strike(batch)
    return struck.seconds, struck.kinds
