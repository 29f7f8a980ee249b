"""Checks of computed rows: rows of wrong workers are computed anew, right ones are trusted."""

import itertools
import time

import numpy as np
import pytest
from test_run_rows import quick_fit as quick_fit  # a fixture
from test_run_rows import smooth

from nercc_jax import DevicePool
from nercc_jax.pools import Fault, Faults
from nercc_jax.rows import RowSettings, run_rows
from nercc_jax.rows._checks import RowChecks
from nercc_jax.rows._evidence import Evidence
from nercc_jax.rows._queue import RowQueue
from nercc_jax.rows._table import AGAIN, COMPUTED, WAITING, RowTable
from nercc_jax.rows.files import Parts

ROWS = np.random.default_rng(0).uniform(-1, 1, (600, 1))
NONE, ALL, ALIKE = np.zeros(3, bool), np.ones(3, bool), np.zeros((3, 1))


def run_checked(*faults, num_workers=8, function=smooth, **options):
    def make(function, number, **others):
        return DevicePool(function, number, faults=Faults(faults, seed=3), **others)

    options = {"tolerance": 0.0, "check_answers": 0.05, "rows_per_call": 4} | options
    return run_rows(function, ROWS, make, num_workers=num_workers, **options)


@pytest.mark.slow
def test_rows_of_wrong_workers_are_computed_by_others(quick_fit):
    """One swaps all answers; another those of one call in ten: nothing gives it away at first."""
    result = run_checked(Fault("swap", workers=(1,)), Fault("swap", 0.1, workers=(5,)))
    assert (result.status == "computed").all()
    # Two swapped answers that are alike look like nothing: 1 of 40 runs kept one, 3e-4 off.
    np.testing.assert_allclose(result.values, smooth(ROWS), atol=2e-3)
    assert result.summary["checked"] == 600
    assert "1" in result.summary["fenced"]
    assert result.summary["corrected"] > 0
    # A quarter may be fenced, so both may be.
    assert set(result.summary["fenced"]) | set(result.summary["not_fenced"]) <= {"1", "5"}


@pytest.mark.parametrize("looks_wrong", [0, 1, None])
def test_what_came_in_one_call_with_an_outvoted_answer_is_computed_by_others(
    monkeypatch, looks_wrong
):
    """One call of one worker is wrong, and one of its two rows looks so, or only both together."""
    pair = np.random.default_rng(0).permutation(600)[400:402]  # rows that are sent together
    struck = []

    def wrong_once(rows):
        if np.array_equal(rows, ROWS[pair]) and not struck:
            struck.append(True)
            return smooth(rows) + 1
        return smooth(rows)

    def look_wrong(self, rows, values):
        off = values - smooth(ROWS[rows])
        alone = looks_wrong is not None and rows == pair[looks_wrong]
        return (np.abs(off).max(axis=1) > 0.1) & alone, np.ones(len(rows), bool), off

    monkeypatch.setattr(Evidence, "look_wrong", look_wrong)
    monkeypatch.setattr(Evidence, "task", lambda *_, **__: None)
    result = run_checked(function=wrong_once, rows_per_call=2, seed=0)
    assert struck
    np.testing.assert_allclose(result.values, smooth(ROWS), rtol=1e-12)
    assert result.summary["fenced"] == result.summary["not_fenced"] == {}, "two are too few"
    assert (result.summary["corrected"], result.summary["checked"]) == (2, 600)


@pytest.mark.slow
def test_right_answers_are_trusted_at_the_price_of_few_calls(quick_fit):
    result = run_checked()
    np.testing.assert_array_equal(result.values, smooth(ROWS))
    assert result.summary["checked"] == 600
    assert result.summary["suspicious"] <= 8 + 4 * 0.05 * 600
    assert (result.summary["corrected"], result.summary["fenced"]) == (0, {})


@pytest.mark.slow
def test_a_call_whose_answers_are_all_off_by_a_little_is_found(quick_fit):
    """By less than the function's own noise, so that no answer looks wrong by itself."""
    noise = np.random.default_rng(1).normal(scale=0.2, size=(600, 2))
    own = {row.tobytes(): each for row, each in zip(ROWS, smooth(ROWS) + noise, strict=True)}
    together = ROWS[np.random.default_rng(0).permutation(600)[304:320]]  # rows of one call
    struck = []

    def off_once(rows):
        right = np.stack([own[row.tobytes()] for row in rows])
        if np.array_equal(rows, together) and not struck:
            struck.append(True)
            return right + 0.15
        return right

    result = run_checked(function=off_once, rows_per_call=16, check_answers=0.01, seed=0)
    assert struck
    np.testing.assert_array_equal(result.values, [*own.values()])


def checks_of(num_workers=4, **options):
    return RowChecks(RowTable(10), num_workers, 0.05, options.get("max_fenced", 0.5))


CALLS = itertools.count()


def answers(checks, worker, rows, values, looks_wrong=NONE, known=ALL, off=ALIKE):
    looks = (part[: len(rows)] for part in (looks_wrong, known, off))
    return checks.take(next(CALLS), worker, np.asarray(rows), np.asarray(values, float), *looks)


def follow(checks, computed, values):
    checks._table["state"][:] = np.where(computed, COMPUTED, WAITING)
    checks._table.values = values
    return checks.follow_fences()


def recheck(checks, rows, values, looks_wrong, off=ALIKE):
    looks = looks_wrong[: len(rows)], off[: len(rows)]
    checks._table.values = values
    return checks.recheck(np.asarray(rows), *looks).tolist()


def test_a_row_in_doubt_has_the_value_that_two_workers_give():
    checks = checks_of()
    given, _ = answers(checks, 0, [0, 1, 2], [[1.0], [2.0], [3.0]])
    assert given.tolist() == [False, True, True], "the first row of a new worker"
    given, values = answers(checks, 1, [0], [[1.0]])
    assert given.all()
    assert values.tolist() == [[1.0]]
    # Two differ, and a third decides; whoever gave an answer does not get the row again.
    given, _ = answers(checks, 0, [3, 4], [[5.0], [6.0]], np.array([True, False]))
    assert given.tolist() == [False, True]
    assert checks.avoid(np.array([3, 4])) == {0}
    given, _ = answers(checks, 1, [3], [[7.0]])
    assert not given.any()
    assert checks.avoid(np.array([3])) == {0, 1}
    given, values = answers(checks, 2, [3], [[7.0]])
    assert given.all()
    assert values.tolist() == [[7.0]]
    assert checks.counts() == {
        "checked": 5, "suspicious": 2, "corrected": 1, "fenced": {}, "not_fenced": {}
    }  # fmt: skip


def test_what_only_a_fenced_worker_gave_is_taken_back():
    checks, values = checks_of(), np.arange(10.0)[:, None]
    computed = np.zeros(10, bool)
    for worker in (1, 2, 0):  # trusted after one right answer
        answers(checks, worker, [worker], [[9.0]])
        answers(checks, (worker + 1) % 3, [worker], [[9.0]])
    given, _ = answers(checks, 0, [3, 4], values[3:5])
    assert given.all()
    computed[3:5] = True
    for row in range(5, 9):
        answers(checks, 0, [row], [[-1.0]], ALL)
        answers(checks, 1, [row], values[[row]])
        given, right = answers(checks, 2, [row], values[[row]])
        assert given.all()
        assert right.tolist() == values[[row]].tolist()
    taken = follow(checks, computed, values)
    assert taken.tolist() == [3, 4]
    assert list(checks.counts()["fenced"]) == ["0"]
    assert follow(checks, computed, values) is None, "once"
    given, _ = answers(checks, 0, [4, 9], [[4.0], [9.0]])
    assert not given.any(), "it was sent before"
    given, found = answers(checks, 1, [3, 4, 9], [[3.5], [4.0], [8.0]])
    assert given.all(), "as if the other had given nothing"
    assert found.tolist() == [[3.5], [4.0], [8.0]]
    assert checks.counts()["corrected"] == 5, "rows 3 and 5 to 8"


def accuse(checks, worker, others, rows):
    """Have a worker's answers to some rows outvoted by two others'."""
    for row in rows:
        answers(checks, worker, [row], [[-1.0 - worker]], ALL)
        for other in others:
            answers(checks, other, [row], [[float(row)]])


def test_what_two_wrong_workers_gave_alike_is_taken_back_when_both_are_accused():
    """As where two confuse the rows of the same call in the same way."""
    checks, values, computed = checks_of(6), np.arange(10.0)[:, None], np.arange(10) < 2
    assert not answers(checks, 2, [0], [[7.0]], ALL)[0].any()
    assert not answers(checks, 0, [0], [[0.0]])[0].any()
    given, found = answers(checks, 5, [0], [[7.0]])
    assert given.all()
    assert found.tolist() == [[7.0]], "nothing tells this from two that are right"
    for worker in (2, 3):
        answers(checks, worker, [1], [[1.0]], ALL)
    assert checks._table["checked"][:2].all()
    accuse(checks, 2, (3, 4), range(2, 6))
    assert follow(checks, computed, values).tolist() == []
    assert not checks._table["checked"][:2].any(), "one is left that gave each: it is looked at"
    assert recheck(checks, [0, 1], values, NONE) == []
    accuse(checks, 5, (3, 4), 3 * [*range(6, 10)])
    assert follow(checks, computed, values).tolist() == [0]
    assert sorted(checks.counts()["fenced"]) == ["2", "5"]


def test_two_that_are_accused_do_not_confirm_each_other():
    checks, values, computed = checks_of(6, max_fenced=0.0), np.zeros((10, 1)), np.zeros(10, bool)
    for worker in (2, 5):
        accuse(checks, worker, (0, 1), 3 * [*range(4)])
    assert follow(checks, computed, values) is not None
    assert sorted(checks.counts()["not_fenced"]) == ["2", "5"], "none may be"
    for worker, given in ((2, False), (5, False), (0, False), (1, True)):
        value = [[3.0 if worker in (2, 5) else 4.0]]
        assert answers(checks, worker, [9], value)[0].all() == given


def test_values_of_an_earlier_run_are_compared_with_two_new_ones():
    checks = checks_of()
    rows, values = np.array([2, 3]), np.arange(10.0)[:, None]
    assert recheck(checks, [2, 3], values, np.array([True, False])) == [2]
    assert checks.avoid(rows) == set()
    assert checks._table["checked"][[2, 3]].tolist() == [False, True]
    assert not answers(checks, 0, [2], [[4.0]])[0].any()
    given, found = answers(checks, 1, [2], [[4.0]])
    assert given.all()
    assert found.tolist() == [[4.0]]
    assert checks.counts()["corrected"] == 1


def test_outputs_that_hardly_differ_between_rows_are_not_taken_for_the_same():
    """Temperatures of 300 K; rounding is no difference."""
    checks, values = checks_of(5), 300 + np.random.default_rng(0).normal(scale=0.1, size=(10, 2))
    for row in range(9):
        answers(checks, row % 3, [row], values[[row]], ALL)
        assert answers(checks, 3, [row], values[[row]] * (1 + 1e-6))[0].all()
    answers(checks, 0, [9], values[[2]], ALL)
    assert not answers(checks, 1, [9], values[[9]])[0].any()
    given, found = answers(checks, 2, [9], values[[9]])
    assert given.all()
    np.testing.assert_array_equal(found, values[[9]])
    assert checks.counts()["corrected"] == 1


@pytest.mark.parametrize(
    ("num_workers", "values", "taken", "corrected"),
    [
        (4, [np.nan, np.nan], np.nan, 0),
        (8, [1.0, 2.0, 3.0, 3.0], 3.0, 1),
        (3, [0.0, 1.0, 2.0], 0.0, 0),  # nobody is left
    ],
)
def test_the_first_value_that_two_gave_is_taken_or_one_where_all_workers_differ(
    num_workers, values, taken, corrected
):
    checks = checks_of(num_workers)
    for worker, value in enumerate(values):
        given, found = answers(checks, worker, [0], [[value, 1.0]], ALL)
        assert given.any() == (worker == len(values) - 1)
    np.testing.assert_array_equal(found, [[taken, 1.0]])
    assert checks.counts()["corrected"] == corrected


def test_somebody_must_compute_what_all_workers_gave_an_answer_to():
    checks = checks_of(3)
    for worker in range(3):
        answers(checks, worker, [worker], [[1.0]], ALL)
    assert checks.avoid(np.array([0, 1])) == {0, 1}
    assert checks.avoid(np.array([0, 1, 2])) == set()


def test_what_was_taken_back_after_it_was_written_is_not_taken_for_a_value(tmp_path):
    state = RowTable(3)
    parts = Parts(tmp_path / "run", {}, state)

    def write(rows, value, kind):
        state.put(np.array(rows), np.full((len(rows), 1), value), 0.0, 0.0, kind)
        parts.add(rows)
        parts.flush()

    write([0, 1, 2], 1.0, COMPUTED)
    write([0, 1], np.nan, AGAIN)
    write([0], 2.0, COMPUTED)
    resumed = RowTable(3)
    Parts(tmp_path / "run", {}, resumed)
    assert resumed.rows["state"].tolist() == [COMPUTED, WAITING, COMPUTED]
    np.testing.assert_array_equal(resumed.values, [[2.0], [np.nan], [1.0]])


def test_two_workers_are_too_few():
    with pytest.raises(ValueError, match=r"check_answers needs three workers or more.* has 2"):
        run_checked(num_workers=2)


def test_at_the_jobs_deadline_a_row_in_doubt_is_unknown_for_that_reason():
    """The first row of each worker is computed by another, too, which takes too long here."""
    seen = set()

    def once(batch):
        if (row := float(batch[0, 0])) in seen:
            time.sleep(5.0)
        seen.add(row)
        return smooth(batch)

    options = {"tolerance": 0.0, "check_answers": 0.05, "rows_per_call": 1, "job_deadline": 1.5}
    result = run_rows(once, ROWS[:9], DevicePool, num_workers=3, **options)
    assert result.status.tolist().count("unknown") >= 3
    assert "its answers differ, or one looked wrong" in set(result.reasons.values())


def test_wrong_rows_of_a_call_come_in_another_order():
    rows = RowQueue(np.arange(0), 2, RowSettings(tolerance=0.0, rows_per_call=8))
    orders = [np.arange(8)]
    for _ in range(3):
        rows.send_first(orders[-1])
        orders.append(rows.take(lambda rows: rows >= 0))
        assert sorted(orders[-1]) == [*range(8)]
    assert len({tuple(order) for order in orders}) == 4
