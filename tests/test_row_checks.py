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
from nercc_jax.rows._table import AGAIN, COMPUTED, WAITING, RowTable
from nercc_jax.rows.files import Parts

ROWS = np.random.default_rng(0).uniform(-1, 1, (600, 1))
NONE, ALL = np.zeros(3, bool), np.ones(3, bool)


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


@pytest.mark.parametrize("looks_wrong", [0, 1])
def test_what_came_in_one_call_with_an_outvoted_answer_is_computed_by_others(
    monkeypatch, looks_wrong
):
    """One call of one worker is wrong, and one of its two rows looks so."""
    pair = np.random.default_rng(0).permutation(600)[400:402]  # rows that are sent together
    struck = []

    def wrong_once(rows):
        if np.array_equal(rows, ROWS[pair]) and not struck:
            struck.append(True)
            return smooth(rows) + 1
        return smooth(rows)

    def look_wrong(self, rows, values):
        off = np.abs(values - smooth(ROWS[rows])).max(axis=1) > 0.1
        return off & (rows == pair[looks_wrong]), np.ones(len(rows), bool)

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


def checks_of(num_workers=4, **options):
    options = {"tolerance": 0.0, "check_answers": 0.05, "max_fenced": 0.5} | options
    return RowChecks(RowTable(10), num_workers, RowSettings(**options))


CALLS = itertools.count()


def answers(checks, worker, rows, values, looks_wrong=NONE, known=ALL):
    looks = looks_wrong[: len(rows)], known[: len(rows)]
    return checks.take(next(CALLS), worker, np.asarray(rows), np.asarray(values, float), *looks)


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("lies", [(1.0,), (0.2,), (1.0, 0.2), (0.0,)])
@pytest.mark.parametrize("seed", range(3))
def test_in_a_stream_of_calls_liars_are_accused_and_no_row_is_wrong_in_the_end(lies, alike, seed):
    """Of eight workers some lie, each in its own way or both alike; nine in ten lies look wrong.

    Those that do not look so come in a call with another, or their worker is accused later.
    """
    random, rows, size = np.random.default_rng(seed), 400, 4
    table = RowTable(rows)
    checks = RowChecks(table, 8, RowSettings(tolerance=0.0, check_answers=0.05))
    right, waiting = random.normal(size=(rows, 1)), [*np.arange(rows).reshape(-1, size)]
    values = []
    while waiting:
        some = waiting.pop(0)
        others = sorted({*range(8)} - checks.avoid(some) - checks.fenced)
        worker = int(random.choice(others))
        lying = worker < len(lies) and random.random() < lies[worker]
        given = right[some] + lying * (1.0 if alike else 1.0 + worker)
        wrong = np.full(len(some), lying) & (random.random(len(some)) < 0.9)
        looks = wrong | (random.random(len(some)) < 0.01), random.random(len(some)) < 0.7
        done, found = checks.take(next(CALLS), worker, some, given, *looks)
        if done.any():
            table.put(some[done], found[done], 0.0, 0.0, COMPUTED)
        back, _ = checks.review()
        if table.values is not None and len(back):
            table.put(back, np.nan, np.inf, np.inf, AGAIN)
        values += found[done].tolist()
        again = np.concatenate([some[~done], back])
        waiting += [again[place : place + size] for place in range(0, len(again), size)]
        if not waiting:  # values of which nothing was known are looked at in the end
            rest = table.unchecked
            off = np.abs(table.values[rest, 0] - right[rest, 0]) > 0.1
            back = checks.recheck(rest, off)
            table.put(back, np.nan, np.inf, np.inf, AGAIN)
            waiting += [back] * (len(back) > 0)
    assert np.sum(np.abs(table.values - right) > 1e-9) <= (1 if lies != (0.0,) else 0)
    accused = {*checks.counts()["fenced"]} | {*checks.counts()["not_fenced"]}
    assert accused == {str(worker) for worker, rate in enumerate(lies) if rate}
    assert (checks.corrected > 0) == (lies != (0.0,))
    assert len(values) < 1.6 * rows, "most rows are computed once"


def test_a_row_in_doubt_has_the_value_that_two_workers_give():
    checks = checks_of()
    given, _ = answers(checks, 0, [0, 1, 2], [[1.0], [2.0], [3.0]])
    assert given.tolist() == [False, True, True], "the first row of a new worker"
    given, values = answers(checks, 1, [0], [[1.0]])
    assert (given.all(), values.tolist()) == (True, [[1.0]])
    # Two differ, and a third decides; whoever gave an answer does not get the row again.
    given, _ = answers(checks, 0, [3, 4], [[5.0], [6.0]], np.array([True, False]))
    assert given.tolist() == [False, True]
    assert checks.avoid(np.array([3, 4])) == {0}
    assert not answers(checks, 1, [3], [[7.0]])[0].any()
    assert checks.avoid(np.array([3])) == {0, 1}
    given, values = answers(checks, 2, [3], [[7.0]])
    assert (given.all(), values.tolist()) == (True, [[7.0]])
    counts = {"checked": 5, "suspicious": 2, "corrected": 1, "fenced": {}, "not_fenced": {}}
    assert checks.counts() == counts
    for worker in range(4):
        answers(checks, worker, [worker + 5], [[1.0]], ALL)
    assert checks.avoid(np.arange(5, 9)) == set(), "somebody must compute them"


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
