"""What goes wrong within a pool: it goes on where it can, and says so at once where it cannot."""

import threading
import time
from unittest import mock

import numpy as np
import pytest
from schedulers import SOON, dispatch, soon

from nercc_jax import DevicePool
from nercc_jax.pools import Fault, Faults
from nercc_jax.pools.backend import WorkerDied
from nercc_jax.pools.clock import pause_after
from nercc_jax.stragglers import AbstractLatency


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr("nercc_jax.pools.clock._PAUSE", 0.001)
    monkeypatch.setattr("nercc_jax.pools.clock._LONGEST", 0.01)


def test_a_start_that_raises_is_tried_again(backend, open_scheduler):
    """The watcher's thread died of it, and hung workers were never replaced again."""
    pool = open_scheduler(2, hang_timeout=0.1, max_attempts=10**6)
    backend.starting = mock.Mock(side_effect=RuntimeError("can't start new thread"))
    batch = dispatch(pool, 2)
    soon(lambda: min(worker.failed_starts for worker in pool.report().workers) >= 3)
    report = pool.report()
    assert {worker.state for worker in report.workers} == {"starting"}
    assert report.hung == 2
    assert report.internal_errors >= 6
    assert pool.trouble is None
    backend.starting = None
    soon(lambda: backend.answer_all() or batch.available.all())
    soon(lambda: pool.idle == 2)
    assert [worker.failed_starts for worker in pool.report().workers] == [0, 0]


def test_a_worker_that_never_gets_ready_is_started_again(backend, open_scheduler):
    pool = open_scheduler(1)
    pool.state.start_timeout = 0.05
    backend._begin = lambda worker, life: None
    batch = dispatch(pool, 1)
    backend.answer(0, WorkerDied("killed"))
    soon(lambda: backend.lives[0] >= 4)
    assert pool.report().workers[0].failed_starts >= 2
    del backend._begin
    soon(lambda: backend.answer_all() or batch.available.all())


def test_a_worker_that_cannot_be_sent_to_is_dead(backend, open_scheduler):
    pool, send = open_scheduler(2), backend.send
    spoilt = []

    def fail_once(worker, *task):
        if not spoilt:
            spoilt.append(worker)
            raise ConnectionError("no route to host")
        send(worker, *task)

    backend.send = fail_once
    batch = dispatch(pool, 1)
    assert batch.failures[0].worker == spoilt[0]
    assert batch.failures[0].reason == "it cannot be reached: ConnectionError: no route to host"
    backend.answer(1 - spoilt[0])
    assert batch.available.all()
    report = pool.report()
    assert (report.deaths_by_worker[spoilt[0]], report.internal_errors) == (1, 1)


def test_an_answer_that_cannot_be_read_is_that_workers_error(backend, open_scheduler):
    """Text is a pytree; the worker's thread died of it, and its task was lost for good."""
    pool = open_scheduler(2)
    batch = dispatch(pool, 1)
    (worker,) = backend.sent
    backend.answer(worker, "not an array")
    assert "the answer cannot be read" in batch.failures[0].reason
    assert pool.trouble is None
    backend.answer(1 - worker)
    assert batch.available.all()


def test_a_turn_of_the_watcher_that_fails_is_not_its_last(
    backend, open_scheduler, monkeypatch, caplog
):
    pool = open_scheduler(1, hang_timeout=0.05)
    tick, failing = pool.state.tick, [True]

    def fail_once(now):
        if failing:
            failing.pop()
            raise ZeroDivisionError("a mistake in the records")
        tick(now)

    monkeypatch.setattr(pool.state, "tick", fail_once)
    dispatch(pool, 1)
    soon(lambda: pool.report().hung)
    assert pool.report().internal_errors == 1
    assert "a turn of nercc-scheduler failed" in caplog.text
    assert pool.trouble is None


# Python takes that for a thread's way to end, pytest for an error.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_pool_whose_watcher_is_gone_fails_at_once_and_says_so(backend, open_scheduler):
    def end_thread(worker):
        raise SystemExit

    pool = open_scheduler(2, hang_timeout=0.2)
    changed = threading.Event()
    watched = pool.open(1, copies=1, on_change=lambda batch: changed.set())
    pool.send(watched, [0], [np.zeros((1, 1))])
    batch = dispatch(pool, 3)
    backend.starting = end_thread
    answers = batch.wait(deadline=SOON)
    assert answers.waited < SOON / 2
    assert answers.values is None
    assert "the pool's watcher ended" in answers.failures[-1].reason
    assert changed.wait(SOON)
    assert watched.lost(0)
    assert "the pool's watcher ended" in pool.trouble
    with pytest.raises(RuntimeError, match=r"this pool is broken: .*: make a new one"):
        dispatch(pool, 1)


def test_books_that_fail_while_a_worker_responds_break_the_pool(
    backend, open_scheduler, monkeypatch
):
    def fail(worker, outcome, now):
        raise KeyError("no such batch")

    pool = open_scheduler(2)
    batch = dispatch(pool, 4)
    backend.answer(0)
    monkeypatch.setattr(pool.state, "handle", fail)
    backend.answer(0)
    answers = batch.wait(deadline=SOON)
    assert answers.available.sum() == 1, "what was in is not lost"
    assert "handling an outcome of worker 0 failed: KeyError" in pool.trouble
    assert pool.report().internal_errors == 1
    backend.answer(1)
    assert pool.report().internal_errors == 1, "nobody is listened to any more"


def test_who_is_lost_by_hanging_is_reported_at_once(backend, open_scheduler):
    pool = open_scheduler(1, hang_timeout=0.05, max_attempts=1)
    changed = threading.Event()
    batch = pool.open(1, copies=1, on_change=lambda batch: changed.set())
    pool.send(batch, [0], [np.zeros((1, 1))])
    assert changed.wait(SOON)
    assert batch.lost(0)


def test_the_heart_beats_while_there_is_nothing_to_do(backend, open_scheduler, monkeypatch):
    monkeypatch.setattr("nercc_jax.pools.clock.BEAT", 0.01)
    pool = open_scheduler(1)
    soon(lambda: pool.idle == 1)
    for _ in range(2):
        before = pool.heartbeat
        soon(lambda before=before: pool.heartbeat > before)


def test_pauses_grow_and_end():
    """Doubled 1,024 times they were an OverflowError, after three hours of failing starts."""
    pauses = [pause_after(failures) for failures in (1, 2, 3, 10**6)]
    assert pauses == sorted(pauses)
    assert pauses[-1] == 0.01


# Threads.


def test_a_model_that_ends_its_thread_costs_a_worker_and_no_answer():
    """Nobody noticed until it had hung for a minute."""
    left = [1]

    def model(batch):
        if left:
            left.pop()
            raise SystemExit(3)
        return 2 * batch

    x = np.ones((1, 1, 2), np.float32)
    with DevicePool(model, 2, compiled=False) as pool:
        with pool.dispatch(x) as batch:
            answers = batch.wait(deadline=SOON / 2)
        np.testing.assert_array_equal(answers.values, 2 * x)
        assert answers.failures[0].reason == "its thread ended: SystemExit: 3"
        assert pool.report().deaths == 1


class Unreadable(AbstractLatency):
    def sample(self, key, shape):
        if np.prod(shape) > 5000:  # to see that it is one law for all
            return np.zeros(shape)
        raise OSError("there is no such trace")


def test_a_thread_that_fails_before_it_is_ready_says_why():
    """The pool waited for it until its time was up, and knew nothing."""
    faults = Faults([Fault("delay", latency=Unreadable())])
    with pytest.raises(RuntimeError, match="could not start: its thread ended: OSError: there is"):
        DevicePool(lambda batch: batch, 1, compiled=False, faults=faults)


def test_a_pool_tells_how_it_is():
    with DevicePool(lambda batch: batch, 1, compiled=False) as pool:
        assert pool.trouble is None
        assert time.monotonic() - pool.heartbeat < SOON
    assert pool.trouble == "this pool is closed"
