"""The scheduler's rules of who gets what, with workers that only do what the test says."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
from schedulers import SOON, ScriptedPool, dispatch, soon

from nercc_jax.pools import Overdue
from nercc_jax.pools.backend import WorkerDied
from nercc_jax.pools.times import AnswerTimes


def test_workers_stand_in_order_whoever_was_ready_first(backend, open_scheduler):
    """So that faults on purpose strike the same data points in each run."""
    begin, begun = backend._begin, [threading.Event() for _ in range(4)]
    begun[3].set()

    def after_the_next(worker, life):
        assert begun[worker + 1].wait(SOON)
        begin(worker, life)
        begun[worker].set()

    backend._begin = after_the_next
    pool = open_scheduler(3)
    dispatch(pool, 3)
    assert backend.points == {0: 0, 1: 1, 2: 2}


def test_what_is_beyond_need_is_not_sent_to_one_that_becomes_free(backend, open_scheduler):
    pool = open_scheduler(3)
    dispatch(pool, 5, needed=3)
    assert sorted(backend.points.values()) == [0, 1, 2]
    backend.answer(0)
    assert len(backend.sent) == 2, "two are under way, one is in: that may do"
    backend.answer(1, OSError("lost"))
    assert len(backend.sent) == 2, "one failed, so another was sent"


def test_what_would_slow_down_others_is_reported(backend, open_scheduler, monkeypatch):
    """Of four workers on three cores; who is overdue slows down nobody."""
    cores = [3]
    monkeypatch.setattr(backend, "spare_capacity", lambda busy: cores[0] - busy)
    pool = open_scheduler(4, overdue=Overdue(least=1, floor=0.0))
    assert (pool.idle, pool.spare) == (4, 3)
    dispatch(pool, 1)
    backend.answer(*backend.sent)  # now it is known how long one takes, which is no time
    dispatch(pool, 2, copies=1)
    soon(lambda: [worker.state for worker in pool.report().workers].count("overdue") == 2)
    assert (pool.idle, pool.spare) == (2, 2)
    backend.answer_all()
    cores[0] = 1
    assert (pool.idle, pool.spare) == (4, 1)
    fresh = open_scheduler(3)
    dispatch(fresh, 2)
    assert (fresh.idle, fresh.spare) == (1, 0)
    backend.answer_all()


def test_older_batches_come_first(backend, open_scheduler):
    pool = open_scheduler(1)
    first, second = dispatch(pool, 2), dispatch(pool, 2)
    for number in range(4):
        assert (first.count, second.count) == (min(number, 2), max(number - 2, 0))
        backend.answer(0)
    assert first.over
    assert second.over


def test_a_batch_that_was_answered_whole_may_send_more(backend, open_scheduler):
    pool = open_scheduler(1)
    batch = pool.open(2, copies=1)
    pool.send(batch, [0], [np.zeros((1, 1))])
    backend.answer(0)
    other = dispatch(pool, 2)
    pool.send(batch, [1], [np.ones((1, 1))])
    for _ in range(3):
        backend.answer(0)
    assert other.over
    assert batch.available.all()


def test_a_dead_workers_task_goes_on_and_its_old_life_is_ignored(backend, open_scheduler):
    pool = open_scheduler(2)
    batch = dispatch(pool, 2)
    (worker, (life, point)), *_ = backend.sent.items()
    backend.answer(worker, WorkerDied("killed"))
    backend.on_outcome(worker, life, np.full((1, 1), 99.0))  # a ghost
    backend.on_outcome(worker, life, WorkerDied("killed"))
    assert batch.failures[0].reason == "killed"
    for _ in range(2):
        backend.answer(next(iter(backend.sent)))
    answers = batch.wait()
    assert answers.values[point, 0, 0] == point
    report = pool.report()
    assert (report.deaths, report.deaths_by_worker[worker]) == (1, 1)
    assert backend.lives[worker] == 2


def test_the_end_of_an_earlier_life_costs_the_next_one_nothing(backend, open_scheduler):
    """A worker that hung is replaced; its process ends later, while the new one is at work."""
    pool = open_scheduler(1, hang_timeout=0.05, max_attempts=10**6)
    batch = dispatch(pool, 1)
    soon(lambda: pool.report().hung)
    pool.state.hang_timeout = SOON
    soon(lambda: backend.sent[0][0] == backend.lives[0] - 1 and pool.report().busy)
    deaths, life = pool.report().deaths, backend.sent[0][0]
    for earlier in range(life):
        backend.on_outcome(0, earlier, WorkerDied("killed at last"))
    assert pool.report().deaths == deaths
    assert pool.report().busy == 1
    backend.answer(0)
    assert batch.available.all()


def test_an_idle_worker_that_dies_and_restarts_gets_one_task(backend, open_scheduler):
    """It is in the list of idle ones once, and not while it is away."""
    pool = open_scheduler(2)
    backend.refuse = {0}
    backend.on_outcome(0, 0, WorkerDied("killed"))
    assert pool.idle == 1
    batch = dispatch(pool, 4)
    assert set(backend.sent) == {1}
    backend.refuse = ()
    soon(lambda: set(backend.sent) == {0, 1})
    assert pool.idle == 0
    for worker in (0, 1, 0, 1):
        backend.answer(worker)
    assert batch.available.all()
    assert pool.idle == 2


def test_a_point_that_failed_goes_before_those_that_were_not_sent(backend, open_scheduler):
    """But not to the worker at which it failed."""
    pool = open_scheduler(3)
    dispatch(pool, 5)
    assert backend.points == {0: 0, 1: 1, 2: 2}
    backend.answer(0, OSError("lost"))
    assert backend.points == {0: 3, 1: 1, 2: 2}
    backend.answer(1)
    assert backend.points == {0: 3, 1: 0, 2: 2}


def open_hasty_scheduler(open_scheduler, backend):
    """Two workers, whose tasks are overdue after a few milliseconds."""
    pool = open_scheduler(2, overdue=Overdue(0.5, 1.0, least=4))
    for _ in range(2):
        with dispatch(pool, 2):
            backend.answer(0)
            backend.answer(1)
    return pool


def test_what_a_copy_may_bring_is_hoped_for_once(backend, open_scheduler):
    """The overdue original answers before its copy: that leaves nothing to hope for."""
    pool = open_hasty_scheduler(open_scheduler, backend)
    batch = pool.open(2, copies=2)
    pool.send(batch, [0], [np.zeros((1, 1))])
    original, *_ = backend.sent  # its copy may be on its way already
    soon(lambda: len(backend.sent) == 2)
    pool.send(batch, [1], [np.ones((1, 1))])
    backend.answer(original)
    assert backend.points == {original: 1, 1 - original: 0}, "two are needed, one is in"
    backend.answer(original)
    assert batch.available.all()


def test_a_copy_is_hoped_for_though_its_overdue_original_fails(backend, open_scheduler):
    pool = open_hasty_scheduler(open_scheduler, backend)
    batch, send = pool.open(2, needed=1, copies=2), backend.send

    def send_in_time(*task):
        send(*task)
        if len(backend.sent) == 2:
            batch.times._limits.clear()  # the copy is not overdue, however slow the machine is

    backend.send = send_in_time
    pool.send(batch, [0], [np.zeros((1, 1))])
    original, *_ = backend.sent  # its copy may be on its way already
    soon(lambda: len(backend.sent) == 2)
    pool.send(batch, [1], [np.ones((1, 1))])
    backend.answer(original, OSError("lost"))
    assert backend.points == {1 - original: 0}, "one is needed, and one is on its way"
    backend.answer(1 - original)
    assert batch.available.tolist() == [True, False]


def test_a_task_is_overdue_by_the_times_of_its_size(backend, open_scheduler):
    pool = open_scheduler(3, overdue=Overdue(0.5, 1.0, least=4))
    for _ in range(4):
        pool.state.times_of(None).add(1, 0.001)
        pool.state.times_of(None).add(8, 10.0)
    batch = pool.open(2, copies=2)
    pool.send(batch, [0, 1], [np.zeros((1, 1)), np.ones((8, 1))])
    soon(lambda: len(backend.sent) == 3)
    assert sorted(backend.points.values()) == [0, 0, 1]
    (larger,) = (worker for worker, point in backend.points.items() if point == 1)
    assert pool.report().workers[larger].state == "busy"


def test_a_size_that_is_new_is_overdue_by_the_times_of_others():
    """It takes no longer than a larger one, nor in proportion than a smaller one."""
    times = AnswerTimes(Overdue(0.5, 1.5, least=4))
    for number in range(4):
        assert times.limit(1) == math.inf, "nothing is late before enough is known"
        assert times.add(2, 0.1) == (number == 3)
        times.add(16, 0.4)
    assert [times.median(size) for size in (1, 3, 8, 32)] == pytest.approx([0.1, 0.15, 0.4, 0.8])
    assert times.limit(8) == pytest.approx(0.6)


def test_the_median_follows_the_last_answers_and_not_a_few_stragglers():
    times = AnswerTimes(Overdue(0.5, 1.5, least=4))
    for count, seconds, median in ((4, 1.0, 1.0), (400, 0.1, 0.1), (64, 5.0, 0.1), (256, 5.0, 5.0)):
        fell = [times.add(1, seconds) for _ in range(count)]
        assert times.median(1) == median
        assert any(fell) == (seconds < 5.0)


@pytest.mark.parametrize("numbers", [(1, 3), (3, 1)])
def test_two_threads_wait_for_different_numbers(backend, open_scheduler, numbers):
    """Each is notified when its own is reached, whoever asked first."""
    pool = open_scheduler(3)
    batch = dispatch(pool, 3)
    with ThreadPoolExecutor(2) as executor:
        waits = {}
        for number in numbers:
            waits[number] = executor.submit(batch.wait, number, SOON)
            soon(lambda: len(batch._changed._waiters) == len(waits))
        backend.answer(0)
        assert waits[1].result(SOON / 2).available.sum() == 1
        assert not waits[3].done()
        backend.answer(1)
        backend.answer(2)
        assert waits[3].result(SOON / 2).available.all()


def test_a_backend_that_does_not_start(backend):
    backend.refuse = {1}
    said = "1 of 2 workers started; worker 1 could not start: OSE"
    with pytest.raises(RuntimeError, match=said):
        ScriptedPool(backend, 2)
    assert backend.lives == {0: 1, 1: 3}
    assert backend.closed
    backend.starting = mock.Mock(side_effect=RuntimeError("can't start new thread"))
    with pytest.raises(RuntimeError, match="0 of 1 workers started; worker 0 could not start: Run"):
        ScriptedPool(backend, 1)


def test_a_task_does_not_go_to_the_same_worker_again(backend, open_scheduler):
    """Not even where no other is free: a worker that always fails must not use up its attempts."""
    pool = open_scheduler(2)
    busy, batch = dispatch(pool, 1), dispatch(pool, 1)
    other, failing = (next(w for w, p in backend.sent.items()), list(backend.sent)[1])
    backend.answer(failing, OSError("always"))
    assert failing not in backend.sent
    backend.answer(other)
    assert busy.available.all()
    assert list(backend.sent) == [other]
    backend.answer(other)
    assert batch.wait().available.all()


def test_a_batch_that_has_enough_sends_no_more_but_hears_what_is_under_way(backend, open_scheduler):
    pool = open_scheduler(2)
    batch = dispatch(pool, 4)
    batch.suffice()
    for worker in (0, 1):
        backend.answer(worker)
    assert not backend.sent
    assert batch.available.tolist() == [True, True, False, False]
    assert not any(batch.lost(point) or batch.abandoned(point) for point in range(4))


def test_a_point_that_failed_is_abandoned_once_nobody_needs_it_and_lost_without_attempts(
    backend, open_scheduler
):
    pool = open_scheduler(3, max_attempts=2)
    batch = dispatch(pool, 3, needed=2)
    backend.answer(0)
    backend.answer(1)
    assert not batch.abandoned(2), "a worker has it in hand"
    backend.answer(2, OSError("lost"))
    assert [batch.abandoned(point) for point in range(3)] == [False, False, True]
    assert not batch.lost(2), "it has an attempt left"
    assert not backend.sent
    other = dispatch(pool, 1)
    for _ in range(2):
        assert (other.lost(0), other.abandoned(0)) == (False, False), "it is sent"
        backend.answer(next(iter(backend.sent)), OSError("lost"))
    assert (other.lost(0), other.abandoned(0)) == (True, True)


def test_points_of_one_batch_may_hold_different_numbers_of_data_points(backend, open_scheduler):
    pool = open_scheduler(2)
    batch = pool.open(2, copies=1)
    pool.send(batch, [0, 1], [np.zeros((1, 1)), np.ones((3, 1))])
    backend.answer(0, np.zeros((1, 4)))
    backend.answer(1, np.zeros((3, 5)))  # another model's answers
    assert "each answer has shape (5,), others of this batch (4,)" in batch.failures[0].reason
    worker = next(iter(backend.sent))
    backend.answer(worker, np.zeros((3, 4)))
    assert batch.available.all()
    assert batch.answer(1).shape == (3, 4)


def test_a_wait_for_an_idle_worker_is_reported(backend, open_scheduler):
    pool = open_scheduler(2)
    seen = []
    pool.on_idle(lambda: seen.append(pool.idle))
    batch = dispatch(pool, 3)
    assert (pool.idle, seen) == (0, [])
    backend.answer(0)  # and is given the third
    assert (pool.idle, seen) == (0, [])
    backend.answer(1)
    assert (pool.idle, seen) == (1, [1])
    backend.answer(0)
    assert (pool.idle, seen) == (2, [1, 2])
    assert batch.over
    states = [worker.state for worker in pool.report().workers]
    assert states == ["idle", "idle"]
