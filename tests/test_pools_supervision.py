"""What goes wrong within a pool: it goes on where it can, and says so at once where it cannot."""

import threading
import time

import numpy as np
import pytest
from desks import SOON, dispatch, make_desk, soon

from nercc_jax import DevicePool
from nercc_jax.pools import Fault, Faults
from nercc_jax.pools._crew import WorkerDied
from nercc_jax.pools._supervision import pause_after
from nercc_jax.stragglers import AbstractLatency


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr("nercc_jax.pools._supervision._PAUSE", 0.001)
    monkeypatch.setattr("nercc_jax.pools._supervision._LONGEST", 0.01)


def refuse(worker):
    raise RuntimeError("can't start new thread")


def test_a_start_that_raises_is_tried_again(crew, open_desk):
    """The watcher's thread died of it, and hung workers were never replaced again."""
    desk = open_desk(2, hang_timeout=0.1, max_attempts=10**6)
    crew.starting = refuse
    batch = dispatch(desk, 2)
    soon(lambda: min(worker.failed_starts for worker in desk.report().workers) >= 3)
    report = desk.report()
    assert {worker.state for worker in report.workers} == {"starting"}
    assert report.hung == 2
    assert report.internal_errors >= 6
    assert desk.trouble is None
    crew.starting = None
    soon(lambda: crew.answer_all() or batch.available.all())
    soon(lambda: desk.idle == 2)
    assert [worker.failed_starts for worker in desk.report().workers] == [0, 0]


def test_a_crew_whose_starts_raise_is_no_pool(crew):
    crew.starting = refuse
    with pytest.raises(RuntimeError, match="0 of 1 workers started; worker 0 could not start: Run"):
        make_desk(crew, 1)


def test_a_worker_that_never_gets_ready_is_started_again(crew, open_desk):
    desk = open_desk(1)
    desk._start_timeout = 0.05
    crew._begin = lambda worker, life: None
    batch = dispatch(desk, 1)
    crew.answer(0, WorkerDied("killed"))
    soon(lambda: crew.lives[0] >= 4)
    assert desk.report().workers[0].failed_starts >= 2
    del crew._begin
    soon(lambda: crew.answer_all() or batch.available.all())


def test_a_worker_that_cannot_be_sent_to_is_dead(crew, open_desk):
    desk, send = open_desk(2), crew.send
    spoilt = []

    def fail_once(worker, *task):
        if not spoilt:
            spoilt.append(worker)
            raise ConnectionError("no route to host")
        send(worker, *task)

    crew.send = fail_once
    batch = dispatch(desk, 1)
    assert batch.failures[0].worker == spoilt[0]
    assert batch.failures[0].reason == "it cannot be reached: ConnectionError: no route to host"
    crew.answer(1 - spoilt[0])
    assert batch.available.all()
    report = desk.report()
    assert (report.deaths_by_worker[spoilt[0]], report.internal_errors) == (1, 1)


def test_an_answer_that_cannot_be_read_is_that_workers_error(crew, open_desk):
    """Text is a pytree; the worker's thread died of it, and its task was lost for good."""
    desk = open_desk(2)
    batch = dispatch(desk, 1)
    (worker,) = crew.sent
    crew.answer(worker, "not an array")
    assert "the answer cannot be read" in batch.failures[0].reason
    assert desk.trouble is None
    crew.answer(1 - worker)
    assert batch.available.all()


def test_a_turn_of_the_watcher_that_fails_is_not_its_last(crew, open_desk, monkeypatch, caplog):
    desk = open_desk(1, hang_timeout=0.05)
    attend, failing = desk._attend, [True]

    def fail_once(worker, now):
        if failing:
            failing.pop()
            raise ZeroDivisionError("a mistake in the books")
        return attend(worker, now)

    monkeypatch.setattr(desk, "_attend", fail_once)
    dispatch(desk, 1)
    soon(lambda: desk.report().hung)
    assert desk.report().internal_errors == 1
    assert "a turn of nercc-desk failed" in caplog.text
    assert desk.trouble is None


# Python takes that for a thread's way to end, pytest for an error.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_pool_whose_watcher_is_gone_fails_at_once_and_says_so(crew, open_desk):
    def end_thread(worker):
        raise SystemExit

    desk = open_desk(2, hang_timeout=0.2)
    told = threading.Event()
    watched = desk.open(1, None, 1, lambda batch: told.set(), None)
    desk.add(watched, [0], [np.zeros((1, 1))], [0])
    batch = dispatch(desk, 3)
    crew.starting = end_thread
    answers = batch.wait(deadline=SOON)
    assert answers.waited < SOON / 2
    assert answers.values is None
    assert "the pool's watcher ended" in answers.failures[-1].reason
    assert told.wait(SOON)
    assert watched.lost(0)
    assert "the pool's watcher ended" in desk.trouble
    with pytest.raises(RuntimeError, match=r"this pool is broken: .*: make a new one"):
        dispatch(desk, 1)


def test_books_that_fail_while_a_worker_is_heard_break_the_pool(crew, open_desk, monkeypatch):
    def fail(worker, outcome):
        raise KeyError("no such batch")

    desk = open_desk(2)
    batch = dispatch(desk, 4)
    crew.answer(0)
    monkeypatch.setattr(desk, "_settle", fail)
    crew.answer(0)
    answers = batch.wait(deadline=SOON)
    assert answers.available.sum() == 1, "what was in is not lost"
    assert "hearing of worker 0 failed: KeyError" in desk.trouble
    assert desk.report().internal_errors == 1
    crew.answer(1)
    assert desk.report().internal_errors == 1, "nobody is listened to any more"


def test_who_is_lost_by_hanging_is_told_at_once(crew, open_desk):
    desk = open_desk(1, hang_timeout=0.05, max_attempts=1)
    told = threading.Event()
    batch = desk.open(1, None, 1, lambda batch: told.set(), None)
    desk.add(batch, [0], [np.zeros((1, 1))], [0])
    assert told.wait(SOON)
    assert batch.lost(0)


def test_the_heart_beats_while_there_is_nothing_to_do(crew, open_desk, monkeypatch):
    monkeypatch.setattr("nercc_jax.pools._clock.BEAT", 0.01)
    desk = open_desk(1)
    soon(lambda: desk.idle == 1)
    for _ in range(2):
        before = desk.heartbeat
        soon(lambda before=before: desk.heartbeat > before)


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
