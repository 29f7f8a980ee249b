"""The desk's rules of who gets what, with workers that only do what the test says."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from desks import SOON, Script, dispatch, make_desk, soon

from nercc_jax.pools import Overdue
from nercc_jax.pools._crew import WorkerDied


def test_one_task_a_worker_and_the_rest_as_they_become_free(crew, open_desk):
    desk = open_desk(2)
    batch = dispatch(desk, 5)
    assert sorted(crew.points.values()) == [0, 1]
    order = []
    while crew.sent:
        worker = next(iter(crew.sent))
        order.append(crew.points[worker])
        crew.answer(worker)
    assert sorted(order) == list(range(5))
    np.testing.assert_array_equal(batch.wait().values[:, 0, 0], np.arange(5))


def test_workers_stand_in_order_whoever_was_ready_first(crew, open_desk):
    """So that faults on purpose strike the same data points in each run."""
    begin, begun = crew._begin, [threading.Event() for _ in range(4)]
    begun[3].set()

    def after_the_next(worker, life):
        assert begun[worker + 1].wait(SOON)
        begin(worker, life)
        begun[worker].set()

    crew._begin = after_the_next
    desk = open_desk(3)
    dispatch(desk, 3)
    assert crew.points == {0: 0, 1: 1, 2: 2}


def test_what_is_beyond_need_is_not_sent_to_one_that_becomes_free(crew, open_desk):
    desk = open_desk(3)
    dispatch(desk, 5, needed=3)
    assert sorted(crew.points.values()) == [0, 1, 2]
    crew.answer(0)
    assert len(crew.sent) == 2, "two are under way, one is in: that may do"
    crew.answer(1, OSError("lost"))
    assert len(crew.sent) == 2, "one failed, so another was sent"


def test_what_would_slow_down_others_is_told(crew, open_desk, monkeypatch):
    """Of four workers on three cores; who is overdue slows down nobody."""
    cores = [3]
    monkeypatch.setattr(crew, "room", lambda busy: cores[0] - busy)
    desk = open_desk(4, overdue=Overdue(least=1, floor=0.0))
    assert (desk.idle, desk.spare) == (4, 3)
    dispatch(desk, 1)
    crew.answer(*crew.sent)  # now it is known how long one takes, which is no time
    dispatch(desk, 2, copies=1)
    soon(lambda: [worker.state for worker in desk.report().workers].count("overdue") == 2)
    assert (desk.idle, desk.spare) == (2, 2)
    crew.answer_all()
    cores[0] = 1
    assert (desk.idle, desk.spare) == (4, 1)
    fresh = open_desk(3)
    dispatch(fresh, 2)
    assert (fresh.idle, fresh.spare) == (1, 0)
    crew.answer_all()


def test_older_batches_come_first(crew, open_desk):
    desk = open_desk(1)
    first, second = dispatch(desk, 2), dispatch(desk, 2)
    for number in range(4):
        assert (first.count, second.count) == (min(number, 2), max(number - 2, 0))
        crew.answer(0)
    assert first.over
    assert second.over


def test_a_batch_that_was_answered_whole_may_send_more(crew, open_desk):
    desk = open_desk(1)
    batch = desk.open(2, None, 1, None, None)
    desk.add(batch, [0], [np.zeros((1, 1))], [0])
    crew.answer(0)
    other = dispatch(desk, 2)
    desk.add(batch, [1], [np.ones((1, 1))], [0])
    for _ in range(3):
        crew.answer(0)
    assert other.over
    assert batch.available.all()


def test_a_forgotten_batch_sends_nothing_more_and_its_answers_are_late(crew, open_desk):
    desk = open_desk(1)
    batch = dispatch(desk, 3)
    batch.forget()
    batch.forget()
    other = dispatch(desk, 1)
    assert len(crew.sent) == 1
    crew.answer(0, np.full((1, 1), 99.0))
    assert desk.report().late == 1
    assert not other.available.any(), "it was not its answer"
    crew.answer(0)
    assert other.answer(0) == 0.0
    assert batch.count == 0


def test_a_dead_workers_task_goes_on_and_its_old_life_is_not_heard(crew, open_desk):
    desk = open_desk(2)
    batch = dispatch(desk, 2)
    (worker, (life, point)), *_ = crew.sent.items()
    crew.answer(worker, WorkerDied("killed"))
    crew.hear(worker, life, np.full((1, 1), 99.0))  # a ghost
    crew.hear(worker, life, WorkerDied("killed"))
    assert batch.failures[0].reason == "killed"
    for _ in range(2):
        crew.answer(next(iter(crew.sent)))
    answers = batch.wait()
    assert answers.values[point, 0, 0] == point
    report = desk.report()
    assert (report.deaths, report.deaths_by_worker[worker]) == (1, 1)
    assert crew.lives[worker] == 2


def test_the_end_of_an_earlier_life_costs_the_next_one_nothing(crew, open_desk):
    """A worker that hung is replaced; its process ends later, while the new one is at work."""
    desk = open_desk(1, hang_timeout=0.05, max_attempts=10**6)
    batch = dispatch(desk, 1)
    soon(lambda: desk.report().hung)
    desk._hang_timeout = SOON
    soon(lambda: crew.sent[0][0] == crew.lives[0] - 1 and desk.report().busy)
    deaths, life = desk.report().deaths, crew.sent[0][0]
    for earlier in range(life):
        crew.hear(0, earlier, WorkerDied("killed at last"))
    assert desk.report().deaths == deaths
    assert desk.report().busy == 1
    crew.answer(0)
    assert batch.available.all()


def test_an_idle_worker_that_dies_and_restarts_gets_one_task(crew, open_desk):
    """It is in the list of idle ones once, and not while it is away."""
    desk = open_desk(2)
    crew.refuse = {0}
    crew.hear(0, 0, WorkerDied("killed"))
    assert desk.idle == 1
    batch = dispatch(desk, 4)
    assert set(crew.sent) == {1}
    crew.refuse = ()
    soon(lambda: set(crew.sent) == {0, 1})
    assert desk.idle == 0
    for worker in (0, 1, 0, 1):
        crew.answer(worker)
    assert batch.available.all()
    assert desk.idle == 2


def test_attempts_are_counted(crew, open_desk):
    desk = open_desk(2, max_attempts=2)
    batch = dispatch(desk, 1)
    for _ in range(2):
        crew.answer(next(iter(crew.sent)), ValueError("cannot"))
    answers = batch.wait()
    assert answers.values is None
    assert [failure.reason for failure in answers.failures] == ["ValueError: cannot"] * 2
    assert {failure.worker for failure in answers.failures} == {0, 1}, "not the same one again"


def test_a_second_copy_that_comes_first_wins(crew, open_desk):
    desk = open_desk(2, overdue=Overdue(0.5, 1.0, least=4))
    for _ in range(2):
        warm = dispatch(desk, 2)
        crew.answer(0)
        crew.answer(1)
        warm.forget()
    batch = dispatch(desk, 1)
    while len(crew.sent) < 2:
        assert batch.wait(deadline=0.01).values is None
    assert set(crew.points.values()) == {0}
    second = list(crew.sent)[1]
    crew.answer(second)
    assert batch.wait().available.all()
    crew.answer(next(iter(crew.sent)), np.full((1, 1), 99.0))
    assert batch.answer(0) == 0.0
    report = desk.report()
    assert (report.copies, report.late, report.errors) == (1, 1, 0)


def open_hasty_desk(open_desk, crew):
    """Two workers, whose tasks are overdue after a few milliseconds."""
    desk = open_desk(2, overdue=Overdue(0.5, 1.0, least=4))
    for _ in range(2):
        with dispatch(desk, 2):
            crew.answer(0)
            crew.answer(1)
    return desk


def test_what_a_copy_may_bring_is_hoped_for_once(crew, open_desk):
    """The overdue original answers before its copy: that leaves nothing to hope for."""
    desk = open_hasty_desk(open_desk, crew)
    batch = desk.open(2, None, 2, None, None)
    desk.add(batch, [0], [np.zeros((1, 1))], [0])
    original, *_ = crew.sent  # its copy may be on its way already
    soon(lambda: len(crew.sent) == 2)
    desk.add(batch, [1], [np.ones((1, 1))], [0])
    crew.answer(original)
    assert crew.points == {original: 1, 1 - original: 0}, "two are needed, one is in"
    crew.answer(original)
    assert batch.available.all()


def test_a_copy_is_hoped_for_though_its_overdue_original_fails(crew, open_desk):
    desk = open_hasty_desk(open_desk, crew)
    batch, send = desk.open(2, 1, 2, None, None), crew.send

    def send_in_time(*task):
        send(*task)
        if len(crew.sent) == 2:
            batch.times._limits.clear()  # the copy is not overdue, however slow the machine is

    crew.send = send_in_time
    desk.add(batch, [0], [np.zeros((1, 1))], [0])
    original, *_ = crew.sent  # its copy may be on its way already
    soon(lambda: len(crew.sent) == 2)
    desk.add(batch, [1], [np.ones((1, 1))], [0])
    crew.answer(original, OSError("lost"))
    assert crew.points == {1 - original: 0}, "one is needed, and one is on its way"
    crew.answer(1 - original)
    assert batch.available.tolist() == [True, False]


def test_a_task_is_overdue_by_the_times_of_its_size(crew, open_desk):
    desk = open_desk(3, overdue=Overdue(0.5, 1.0, least=4))
    for _ in range(4):
        desk._times.add(1, 0.001)
        desk._times.add(8, 10.0)
    batch = desk.open(2, None, 2, None, None)
    desk.add(batch, [0, 1], [np.zeros((1, 1)), np.ones((8, 1))], [0, 0])
    soon(lambda: len(crew.sent) == 3)
    assert sorted(crew.points.values()) == [0, 0, 1]
    (larger,) = (worker for worker, point in crew.points.items() if point == 1)
    assert desk.report().workers[larger].state == "busy"


@pytest.mark.parametrize("numbers", [(1, 3), (3, 1)])
def test_two_threads_wait_for_different_numbers(crew, open_desk, numbers):
    """Each is told when its own is reached, whoever asked first."""
    desk = open_desk(3)
    batch = dispatch(desk, 3)
    with ThreadPoolExecutor(2) as executor:
        waits = {}
        for number in numbers:
            waits[number] = executor.submit(batch.wait, number, SOON)
            soon(lambda: len(batch._changed._waiters) == len(waits))
        crew.answer(0)
        assert waits[1].result(SOON / 2).available.sum() == 1
        assert not waits[3].done()
        crew.answer(1)
        crew.answer(2)
        assert waits[3].result(SOON / 2).available.all()


def test_workers_that_do_not_start_again_are_tried_until_they_do(crew, open_desk, monkeypatch):
    monkeypatch.setattr("nercc_jax.pools._supervision._PAUSE", 0.001)
    desk = open_desk(2)
    crew.refuse = {0, 1}
    batch = dispatch(desk, 3)
    for worker in list(crew.sent):
        crew.answer(worker, WorkerDied("killed"))
    while min(crew.lives.values()) < 5:
        assert batch.wait(deadline=0.01).values is None
    report = desk.report()
    assert (report.starting, report.idle) == (2, 0)
    assert report.deaths >= 8
    crew.refuse = set()
    for _ in range(3):
        while not crew.sent:
            batch.wait(deadline=0.01)
        crew.answer(next(iter(crew.sent)))
    assert batch.wait().available.all()


def test_a_crew_that_does_not_start():
    crew = Script(refuse={1})
    with pytest.raises(
        RuntimeError, match=r"1 of 2 workers started; worker 1 could not start: OSE"
    ):
        make_desk(crew, 2)
    assert crew.lives == {0: 1, 1: 3}
    assert crew.closed


def test_a_task_does_not_go_to_the_same_worker_again(crew, open_desk):
    """Not even where no other is free: a worker that always fails must not use up its attempts."""
    desk = open_desk(2)
    busy, batch = dispatch(desk, 1), dispatch(desk, 1)
    other, failing = (next(w for w, p in crew.sent.items()), list(crew.sent)[1])
    crew.answer(failing, OSError("always"))
    assert failing not in crew.sent
    crew.answer(other)
    assert busy.available.all()
    assert list(crew.sent) == [other]
    crew.answer(other)
    assert batch.wait().available.all()


def test_a_batch_that_has_enough_sends_no_more_but_hears_what_is_under_way(crew, open_desk):
    desk = open_desk(2)
    batch = dispatch(desk, 4)
    batch.suffice()
    for worker in (0, 1):
        crew.answer(worker)
    assert not crew.sent
    assert batch.available.tolist() == [True, True, False, False]
    assert not any(batch.lost(point) or batch.abandoned(point) for point in range(4))


def test_a_point_that_failed_is_abandoned_when_its_batch_needs_it_no_more(crew, open_desk):
    desk = open_desk(3)
    batch = dispatch(desk, 3, needed=2)
    crew.answer(0)
    crew.answer(1)
    assert not batch.abandoned(2), "a worker has it in hand"
    crew.answer(2, OSError("lost"))
    assert batch.abandoned(2)
    assert not batch.lost(2), "it has attempts left"
    assert not crew.sent
    assert not batch.abandoned(0)


def test_a_point_without_attempts_left_is_lost(crew, open_desk):
    desk = open_desk(1, max_attempts=2)
    batch = dispatch(desk, 1)
    crew.answer(0, OSError("lost"))
    assert not batch.lost(0), "it was sent again"
    assert not batch.abandoned(0)
    crew.answer(0, OSError("lost again"))
    assert batch.lost(0)
    assert batch.abandoned(0)


def test_points_of_one_batch_may_hold_different_numbers_of_data_points(crew, open_desk):
    desk = open_desk(2)
    batch = desk.open(2, None, 1, None, None)
    desk.add(batch, [0, 1], [np.zeros((1, 1)), np.ones((3, 1))], [0, 0])
    crew.answer(0, np.zeros((1, 4)))
    crew.answer(1, np.zeros((3, 5)))  # another model's answers
    assert "each answer has shape (5,), others of this batch (4,)" in batch.failures[0].reason
    worker = next(iter(crew.sent))
    crew.answer(worker, np.zeros((3, 4)))
    assert batch.available.all()
    assert batch.answer(1).shape == (3, 4)


def test_who_waits_for_an_idle_worker_is_told(crew, open_desk):
    desk = open_desk(2)
    told = []
    desk.on_idle(lambda: told.append(desk.idle))
    batch = dispatch(desk, 3)
    assert (desk.idle, told) == (0, [])
    crew.answer(0)  # and is given the third
    assert (desk.idle, told) == (0, [])
    crew.answer(1)
    assert (desk.idle, told) == (1, [1])
    crew.answer(0)
    assert (desk.idle, told) == (2, [1, 2])
    assert batch.over
    states = [worker.state for worker in desk.report().workers]
    assert states == ["idle", "idle"]


def test_the_report_tells_of_each_worker(crew, open_desk):
    desk = open_desk(3)
    dispatch(desk, 2)
    busy = [worker for worker in desk.report().workers if worker.state == "busy"]
    assert len(busy) == 2
    assert all(worker.busy_seconds >= 0 for worker in busy)
    crew.refuse = range(3)  # whoever dies now does not come back
    victim = next(iter(crew.sent))
    crew.answer(victim, WorkerDied("gone"))
    report = desk.report()
    assert report.workers[victim].deaths == report.deaths_by_worker[victim] >= 1
    assert report.workers[victim].state == "starting"
