"""The scheduler: who gets what, and what goes wrong within a pool.

Its workers do what the test says, and nothing else. A pool goes on where it can, and says so at
once where it cannot.
"""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
from schedulers import SOON, ScriptedPool, dispatch, soon

from nercc_jax import DevicePool
from nercc_jax.pools import Fault, Faults, Overdue
from nercc_jax.pools.backend import WorkerDied
from nercc_jax.pools.clock import pause_after
from nercc_jax.pools.times import AnswerTimes
from nercc_jax.stragglers import AbstractLatency


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """Workers that do not start are started again in milliseconds."""
    monkeypatch.setattr("nercc_jax.pools.clock._PAUSE", 0.001)
    monkeypatch.setattr("nercc_jax.pools.clock._LONGEST", 0.01)


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


# Steps, each with what workers then have in hand: points of the first batch are 0, 1, ..., of the
# second 10, 11, ... A batch is sent with its number of points and how many it needs; "+" opens the
# first batch's point of that number, "=" says that it has enough.
RULES = {
    "what is beyond need is not sent to one that becomes free": (3, [
        (("send", 5, 3), {0: 0, 1: 1, 2: 2}),
        (("answer", 0), {1: 1, 2: 2}),  # two are under way, one is in: that may do
        (("fail", 1), {0: 1, 2: 2}),  # one failed, so it was sent again
    ]),
    "older batches come first": (1, [
        (("send", 2, 2), {0: 0}), (("send", 2, 2), {0: 0}),
        (("answer", 0), {0: 1}), (("answer", 0), {0: 10}), (("answer", 0), {0: 11}),
        (("answer", 0), {}),
    ]),
    "a batch that was answered whole may send more": (1, [
        (("open", 2), {}), (("+", 0), {0: 0}), (("answer", 0), {}),
        (("send", 2, 2), {0: 10}), (("+", 1), {0: 10}),
        (("answer", 0), {0: 11}), (("answer", 0), {0: 1}), (("answer", 0), {}),
    ]),
    "a point that failed goes before those that were not sent, but not to where it failed": (3, [
        (("send", 5, 5), {0: 0, 1: 1, 2: 2}),
        (("fail", 0), {0: 3, 1: 1, 2: 2}), (("answer", 1), {0: 3, 1: 0, 2: 2}),
    ]),
    # A worker that always fails must not use up a task's attempts.
    "a task does not go to the same worker again, even where no other is free": (2, [
        (("send", 1, 1), {0: 0}), (("send", 1, 1), {0: 0, 1: 10}),
        (("fail", 1), {0: 0}), (("answer", 0), {0: 10}), (("answer", 0), {}),
    ]),
    "a batch that has enough sends no more but hears what is under way": (2, [
        (("send", 4, 4), {0: 0, 1: 1}), (("=",), {0: 0, 1: 1}),
        (("answer", 0), {1: 1}), (("answer", 1), {}),
    ]),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_who_gets_what(backend, open_scheduler, rule):
    workers, steps = RULES[rule]
    pool, batches = open_scheduler(workers), []
    for (action, *numbers), wanted in steps:
        if action == "send":
            points = np.arange(float(numbers[0]))[:, None, None] + 10 * len(batches)
            batches.append(pool.dispatch(points, needed=numbers[1], copies=2))
        elif action == "open":
            batches.append(pool.open(*numbers, copies=1))
        elif action == "+":
            pool.send(batches[0], numbers, [np.full((1, 1), float(numbers[0]))])
        elif action == "=":
            batches[0].suffice()
        else:
            backend.answer(*numbers, *[OSError("lost")] * (action == "fail"))
        assert backend.points == wanted, (action, numbers)
    if (
        not backend.points
    ):  # at the end: each has its own answers, of all points unless it had enough
        for place, batch in enumerate(batches):
            answered = np.flatnonzero(batch.available).tolist()
            found = [float(batch.answer(point)[0, 0]) - 10 * place for point in answered]
            assert found == answered
            assert batch.over == batch.available.all() != rule.startswith("a batch that has enough")
            assert not any(batch.lost(p) or batch.abandoned(p) for p in range(len(batch.available)))


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


def unreachable(backend):
    """Have the next call fail on its way."""
    send = backend.send

    def fail(*task):
        backend.send = send
        raise ConnectionError("no route to host")

    backend.send = fail


# What a worker does, before it has a call or with it; why the call failed, deaths and errors.
WRONG = {
    "it fails": (None, OSError("lost"), "OSError: lost", 0, 0),
    "it dies": (None, WorkerDied("killed"), "killed", 1, 0),
    # The watcher's thread died of such an answer, and its task was lost for good: text is a pytree.
    "its answer cannot be read": (None, "not an array", "the answer cannot be read", 0, 0),
    "it cannot be reached": (
        unreachable, None, "it cannot be reached: ConnectionError: no route to host", 1, 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_goes_wrong_at_a_worker_costs_no_answer(backend, open_scheduler, case):
    """Nor does what is heard of a life that is over."""
    before, outcome, reason, deaths, errors = WRONG[case]
    pool = open_scheduler(2)
    if before is not None:
        before(backend)
    batch = dispatch(pool, 1)
    worker = batch.failures[0].worker if batch.failures else next(iter(backend.sent))
    if outcome is not None:
        backend.answer(worker, outcome)
    assert reason in batch.failures[0].reason
    if deaths:
        for ghost in (np.full((1, 1), 99.0), WorkerDied("killed")):
            backend.on_outcome(worker, 0, ghost)
    backend.answer(1 - worker)
    assert batch.answer(0)[0, 0] == 0
    assert pool.trouble is None
    report = pool.report()
    assert (report.deaths, report.deaths_by_worker[worker]) == (deaths, deaths)
    assert (report.internal_errors, backend.lives[worker]) == (errors, 1 + deaths)


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


def open_hasty_scheduler(open_scheduler, backend):
    """Two workers, whose tasks are overdue after a few milliseconds."""
    pool = open_scheduler(2, overdue=Overdue(0.5, 1.0, least=4))
    for _ in range(2):
        with dispatch(pool, 2):
            backend.answer(0)
            backend.answer(1)
    return pool


def test_a_copy_is_hoped_for_though_its_overdue_original_fails(backend, open_scheduler):
    pool = open_hasty_scheduler(open_scheduler, backend)
    batch, send = pool.open(2, needed=1, copies=2), backend.send

    def send_in_time(*task):
        send(*task)
        if len(backend.sent) == 2:
            # The copy is not overdue, however slow the machine is.
            batch.times = batch.times.under(Overdue(least=10**6))

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
        pool.state.times.add(1, 0.001)
        pool.state.times.add(8, 10.0)
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
        times.add(2, 0.1)
        assert (times.limit(2) < math.inf) == (number == 3)
        times.add(16, 0.4)
    assert [times.median(size) for size in (1, 3, 8, 32)] == pytest.approx([0.1, 0.15, 0.4, 0.8])
    assert times.limit(8) == pytest.approx(0.6)


def test_the_median_follows_the_last_answers_and_not_a_few_stragglers():
    times = AnswerTimes(Overdue(0.5, 1.5, least=4))
    for count, seconds, median in ((4, 1.0, 1.0), (400, 0.1, 0.1), (64, 5.0, 0.1), (256, 5.0, 5.0)):
        for _ in range(count):
            times.add(1, seconds)
        assert times.median(1) == median
        assert times.under(Overdue(0.5, 2.0, least=4)).limit(1) == 2 * median


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
    said = "[01] of 2 workers started; worker 1 could not start: OSE"  # worker 0 may be slower
    with pytest.raises(RuntimeError, match=said):
        ScriptedPool(backend, 2)
    assert backend.lives == {0: 1, 1: 3}
    assert backend.closed
    backend.starting = mock.Mock(side_effect=RuntimeError("can't start new thread"))
    with pytest.raises(RuntimeError, match="0 of 1 workers started; worker 0 could not start: Run"):
        ScriptedPool(backend, 1)


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


# -- What goes wrong within a pool ----------------------------------------------------------------


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
