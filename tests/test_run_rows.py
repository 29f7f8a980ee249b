"""Rows of a function on workers: what is computed, predicted, late, or unknown, and why.

`NERCC_INTERLEAVINGS=100 pytest -m slow tests/test_run_rows.py -k killed` kills a hundred runs.
"""

import collections
import dataclasses
import multiprocessing
import os
import threading
import time

import numpy as np
import pytest
from schedulers import ScriptedBackend, ScriptedPool, soon
from threadpoolctl import threadpool_info, threadpool_limits

from nercc_jax import DevicePool
from nercc_jax.cli import Options
from nercc_jax.pools import Fault, Faults
from nercc_jax.pools.backend import WorkerDied
from nercc_jax.risk import Accuracy
from nercc_jax.rows import RowSettings, run_rows
from nercc_jax.rows._evidence import fit_pairs
from nercc_jax.stragglers import TraceLatency
from nercc_jax.surrogates import LearnerTuning
from nercc_jax.testing import SimulatedPool


def test_rows_whose_workers_die_are_computed_by_others():
    """Float32 and integers as they come."""
    x = np.arange(40, dtype=np.float32)[:, None]
    faults = Faults.from_rates(death_rate=0.2, seed=3)

    def function(batch):
        return (2 * batch).astype(int)

    with DevicePool(function, 3, compiled=False, faults=faults, max_attempts=9) as pool:
        result = run_rows(function, x, pool, tolerance=0.0, rows_per_call=4)
        assert pool.report().deaths > 0
    assert set(result.status.tolist()) == {"computed"}
    np.testing.assert_array_equal(result.values, 2 * x)


def test_a_call_has_no_more_rows_than_there_are():
    """Calls are filled up to their size: one of a billion rows would need memory without end."""
    seen = []

    def function(batch):
        seen.append(len(batch))
        return 2 * batch

    x, options = np.ones((40, 2)), {"num_workers": 3, "tolerance": 0.0}
    run_rows(function, x, DevicePool, rows_per_call=10**9, **options)
    assert seen == [40]


def test_settings_come_as_one_object_by_name_or_both():
    x, settings = np.ones((30, 2)), RowSettings(tolerance=1.0, max_calls=7, rows_per_call=1)
    for asked in (
        {"settings": settings},
        {"settings": settings, "tolerance": 0.5},
        {"settings": settings, "accuracy": Accuracy(max_disagreement=0.1, coverage=0.8)},
        {"accuracy": Accuracy(tolerance=1.0), "max_calls": 7, "rows_per_call": 1},
    ):
        summary = run_rows(np.negative, x, DevicePool, num_workers=2, **asked).summary
        assert summary["computed"] == 7
    assert (summary["tolerance"], summary["coverage"]) == (1.0, 0.9)
    with pytest.raises(TypeError, match="tolerence"):
        run_rows(np.negative, x, DevicePool, tolerence=1.0)


# From Python.


def picky(batch):
    if (batch[:, 0] > 0.9).any():
        raise ArithmeticError("there is no solution here")
    return np.cumsum(batch, axis=1)


X = np.random.default_rng(2).uniform(-1, 1, (60, 2))


def test_progress_counts_what_has_and_what_will_have_no_value():
    odd, seen = X[:, 0] > 0.9, []
    options = {"tolerance": 0.0, "rows_per_call": 4, "on_progress": seen.append}
    with DevicePool(picky, 3, compiled=False) as pool:
        result = run_rows(picky, X, pool, **options)
        assert pool.report() == result.report
    assert (seen[0].done, seen[0].waiting) == (0, 60)
    assert (seen[-1].computed, seen[-1].unknown, seen[-1].waiting) == (60 - odd.sum(), odd.sum(), 0)
    assert list(result.reasons) == np.flatnonzero(odd).tolist()
    assert np.isnan(result.values[odd]).all()
    assert result.summary["rows_done"] == 60 - odd.sum()


def test_a_run_ends_by_itself_before_its_pool_ends_the_process():
    class Ending(DevicePool):
        """Its cluster's head is gone, say."""

        @property
        def ends_at(self):
            return time.monotonic() + 5.0

    rows = np.arange(400.0)[:, None]
    result = run_rows(np.negative, rows, Ending, num_workers=2, tolerance=0.0)
    assert "stopped before Ray ends this process" in result.stopped
    assert set(result.status.tolist()) == {"computed", "waiting"}


def test_a_computed_row_keeps_all_digits_whatever_the_type_of_earlier_rows():
    def mixed(rows):  # float32 for the first rows, float64 for others, whole numbers for some
        kind = np.float32 if rows[0, 0] < 200 else int if rows[0, 0] < 300 else np.float64
        return (rows / 3 if kind is np.float64 else rows).astype(kind)

    rows = np.arange(400.0)[:, None]
    result = run_rows(mixed, rows, DevicePool, num_workers=2, tolerance=0.0, rows_per_call=1)
    np.testing.assert_array_equal(result.values, np.where(rows < 300, rows, rows / 3))
    with pytest.raises(RuntimeError, match=r"int64 beyond 2\^53, which no float64 holds exactly"):
        run_rows(lambda x: (x + 2**60).astype(int), rows, DevicePool, num_workers=2, tolerance=0.0)
    with pytest.raises(RuntimeError, match=r"an array of shape \(\) in a list"):
        run_rows(lambda x: x.tolist(), rows, DevicePool, num_workers=2, tolerance=0.0)


def test_defaults_are_the_same_in_python_and_at_the_command_line():
    options = dataclasses.fields(Options)
    command = {option.name.removesuffix("_s"): option.default for option in options}
    for field in dataclasses.fields(RowSettings):
        assert command.get(field.name, field.default) == field.default


# In simulated time, in which a learner's work takes none.


def smooth(rows):
    return np.concatenate([np.sin(3 * rows), np.cos(2 * rows)], axis=1)


ROWS = np.random.default_rng(0).uniform(-1, 1, (600, 1))
NEVER = 1e6  # seconds


def run_timed(seconds, x=ROWS, *, function=smooth, workers=4, **options):
    """Run rows whose calls take `seconds(rows)`; return the result and the rows that were sent."""
    sent = []

    def delay(batch):
        sent.extend(np.asarray(batch)[:, 0].tolist())
        return float(np.sum(seconds(np.asarray(batch)[:, 0])))

    faults = Faults([Fault("delay", latency=delay)])
    options = {"rows_per_call": 1} | options
    with SimulatedPool(
        function, workers, seconds=lambda size: 1e-6, faults=faults, hang_timeout=1e9
    ) as pool:
        return run_rows(function, x, pool, **options), sent


def usual(rows):
    return np.full(len(rows), 0.1)


QUICK_WINDOW = 64


@pytest.fixture
def quick_fit(monkeypatch):
    """Learners that are fitted in a moment."""

    def fit(x, y, capacity, tuning, *, labels):
        return fit_pairs(x, y, QUICK_WINDOW, LearnerTuning(rows=32, steps=2), labels=labels)

    monkeypatch.setattr("nercc_jax.rows._evidence.fit_pairs", fit)


def errors_of(result):
    return np.sqrt(np.mean((result.values - smooth(ROWS)) ** 2, axis=1))


def test_rows_that_are_known_well_enough_are_not_computed(quick_fit):
    result, sent = run_timed(usual, tolerance=0.1)
    computed, predicted = result.status == "computed", result.status == "predicted"
    assert (computed | predicted).all()
    np.testing.assert_array_equal(result.values[computed], smooth(ROWS[computed]))
    assert len(sent) < 500
    assert predicted.sum() == 600 - len({*sent}) > 100
    assert (result.score <= 0.1).all()
    held = errors_of(result)[predicted] <= result.score[predicted]
    assert np.mean(held) > 0.8  # nine tenths are promised
    held, audited = result.summary["audited_held"], result.summary["audited"]
    assert audited > 5
    assert held / audited > 0.6


def test_few_rows_of_a_function_that_swings_often_are_computed():
    """No width of the kernel's grid was narrow enough to see the swings: 584 were computed."""
    x = np.random.default_rng(0).uniform(0, 10, (1500, 1))
    result, sent = run_timed(usual, x, function=lambda rows: np.sin(rows**2), tolerance=0.07)
    assert len(sent) < 400
    assert np.mean(np.abs(result.values - np.sin(x**2)) <= 0.07) > 0.95


@pytest.mark.parametrize("options", [{"tolerance": 0.1, "compute": "all"}, {"tolerance": 1e-9}])
def test_all_rows_are_computed_where_that_is_asked_or_nothing_is_known(quick_fit, options):
    result, _ = run_timed(usual, **options)
    assert set(result.status.tolist()) == {"computed"}
    np.testing.assert_array_equal(result.values, smooth(ROWS))


def test_at_the_jobs_deadline_every_row_has_a_value_a_bar_or_a_reason(quick_fit):
    result, _ = run_timed(usual, tolerance=1e-6, job_deadline=5.0)
    computed, unknown = result.status == "computed", result.status == "unknown"
    assert (computed | unknown).all()
    assert list(result.reasons) == np.flatnonzero(unknown).tolist()
    assert unknown.any()
    assert all("not computed before the job's deadline" in why for why in result.reasons.values())
    # A prediction that is worse than asked is there all the same, with its bar.
    assert np.isfinite(result.score[unknown]).mean() > 0.9
    assert np.mean(errors_of(result)[unknown] <= result.score[unknown]) > 0.7


def test_answers_within_the_time_of_grace_judge_bars_and_change_no_value(quick_fit, monkeypatch):
    """Some rows are answered once the run is over; others are late, and are evidence."""
    monkeypatch.setattr("test_run_rows.QUICK_WINDOW", 256)  # with enough late rows in it

    def seconds(rows):
        return 0.1 + 1.0 * (rows < -0.2) + 70.0 * (rows > 0.8)

    options = {"tolerance": 0.5, "job_deadline": 60.0, "grace": 30.0, "compute": "all"}
    result, _ = run_timed(seconds, workers=80, deadline=NEVER, **options)
    late = ROWS[:, 0] > 0.8
    assert set(result.status[late].tolist()) <= {"predicted", "unknown"}
    barred = late & np.isfinite(result.score)
    assert np.isfinite(result.values[barred]).all()
    assert (result.values[barred] != smooth(ROWS[barred])).all(), "predictions are kept"
    held = np.sum(errors_of(result)[barred] <= result.score[barred])
    # Added to those that had a bar when they came late in the run.
    assert result.summary["came_late"] >= barred.sum() > 0
    assert result.summary["came_late_held"] >= held
    at_once, _ = run_timed(seconds, workers=80, deadline=NEVER, **options | {"grace": 0.0})
    assert at_once.summary["came_late"] < result.summary["came_late"]
    np.testing.assert_array_equal(at_once.values, result.values)


def test_a_budget_of_calls_is_kept(quick_fit):
    result, sent = run_timed(usual, tolerance=1e-6, max_calls=150)
    assert len(sent) == 150
    assert np.sum(result.status == "computed") == 150
    assert {why.partition(";")[0] for why in result.reasons.values()} == {
        "not computed before the job's last call"
    }


def test_a_resumed_run_without_a_budget_learns_from_the_rows_that_are_there(quick_fit, tmp_path):
    options = {"folder": tmp_path / "rows", "tolerance": 0.1}
    run_timed(usual, max_calls=150, compute="all", **options)
    found, _ = run_timed(usual, max_calls=1, resume=True, **options)
    assert np.sum(found.status == "computed") <= 151
    assert np.isfinite(found.score).all(), "each row is computed, or has a prediction with a bar"


def odd(kind):
    """A function that does what is odd on the rows 3 and 700."""

    def function(batch):
        if {3, 700} & {*batch[:, 0].tolist()}:
            if kind == "raise":
                raise ArithmeticError("there is no solution here")
            return np.concatenate([batch, batch], axis=1) if kind == "shape" else batch
        return batch

    return function


@pytest.mark.parametrize(
    ("kind", "size", "reason", "most_calls"),
    [
        ("raise", 256, "ArithmeticError: there is no solution here", 4 + 2 * (8 + 8 + 4 + 4)),
        ("shape", 32, "a row came as (2,), others as (1,)", 32 + 2 * (8 + 4)),
        # Of 64 rows of a call, eight have the second attempt together, and each has its own last.
        ("hang", 64, "no answer within 0.3 s", 16 + 2 * (8 + 8)),
    ],
)
def test_odd_rows_are_unknown_for_a_reason_and_cost_no_others(kind, size, reason, most_calls):
    def seconds(rows):
        return np.where(np.isin(rows, [3, 700]) & (kind == "hang"), NEVER, 1e-4)

    rows, limit = np.arange(1024.0)[:, None], 0.3 if kind == "hang" else 30.0
    options = {"rows_per_call": size, "deadline": limit, "tolerance": 0.0}
    result, _ = run_timed(seconds, rows, function=odd(kind), workers=12, **options)
    assert result.reasons == dict.fromkeys((3, 700), reason)
    known = np.delete(np.arange(1024), [3, 700])
    np.testing.assert_array_equal(result.values[known], rows[known])
    assert result.report.sent <= most_calls


# Rows, workers, seconds that a row takes when it is sent for the nth time, and options; then why
# rows are unknown, and which are sent more than once, how often.
STUCK = {
    "a row that nobody answers in time is unknown after three attempts": (
        4, 6, lambda row, time: NEVER if row == 2 else 0.01, {"deadline": 0.3},
        {2: "no answer within 0.3 s"}, {2: 3},
    ),
    "an answer after its deadline is welcome": (
        5, 4, lambda row, time: 0.8 if row == 2 else 0.01, {"deadline": 0.3}, {}, {2: 3},
    ),
    "slow rows hold up no others, and go twice": (
        200, 4, lambda row, time: NEVER if row in (3, 4) and time == 1 else 0.01, {},
        {}, {3: 2, 4: 2},
    ),
    "a job that ends before anything is known says so": (
        2, 2, lambda row, time: NEVER, {"job_deadline": 0.3},
        dict.fromkeys(range(2), "not computed before the job's deadline"), {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STUCK)
def test_rows_whose_calls_do_not_come_back(case):
    count, workers, seconds, options, reasons, more = STUCK[case]
    times = collections.Counter()

    def delay(rows):
        times.update(rows.tolist())
        return [seconds(row, times[row]) for row in rows.tolist()]

    x = np.arange(float(count))[:, None]
    result, sent = run_timed(
        delay, x, function=np.negative, workers=workers, tolerance=0.0, **options
    )
    assert result.reasons == reasons
    known = np.delete(np.arange(count), [*reasons])
    assert set(result.status[known].tolist()) <= {"computed"}
    assert sorted(sent) == sorted(
        [*range(count), *(row for row in more for _ in range(more[row] - 1))]
    )
    if len(reasons) == count:
        assert result.values is None
        assert np.isinf(result.score).all()
    else:
        np.testing.assert_array_equal(result.values[known], -x[known])


# On threads.


def test_learning_takes_half_of_the_cores(monkeypatch):
    seen = []

    def slowly(rows):
        time.sleep(0.005 * len(rows))
        return smooth(rows)

    def fit(x, y, *_, **__):
        seen.extend(each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas")
        raise ValueError("nothing is learned here")

    def limit(threads):  # in a thread that ends: the one that sets them last keeps others from it
        thread = threading.Thread(target=threadpool_limits, args=(threads, "blas"))
        thread.start()
        thread.join()

    before = {each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"}
    monkeypatch.setattr("nercc_jax.rows._evidence.fit_pairs", fit)
    limit(4)
    try:
        options = {"rows_per_call": 1, "tolerance": 0.1}
        run_rows(slowly, ROWS, DevicePool, num_workers=4, **options)
    finally:
        limit(max(before))
    assert set(seen) == {2}


def test_a_row_is_not_late_because_its_worker_died_or_the_run_is_busy():
    """It may wait for another worker for long, or its answer may be in: that says nothing of it."""
    backend = ScriptedBackend()
    with ScriptedPool(backend, 1, min_workers=1) as pool:
        batch = pool.open(1, copies=1)
        pool.send(batch, [0], [np.ones((1, 1))])
        age = lambda: batch.age(0)[0]  # noqa: E731
        soon(lambda: 0 in backend.sent)
        assert age() < 10
        time.sleep(0.2)
        assert age() > 0.1
        backend.refuse = {0}
        backend.answer(0, WorkerDied("its node was taken"))
        assert age() == 0
        backend.refuse = ()
        soon(lambda: 0 in backend.sent)
        assert 0 < age() < 0.1
        backend.answer(0)
        soon(lambda: batch.available[0])
        found = age()
        time.sleep(0.2)
        assert age() == found


def test_rows_whose_workers_all_die_are_unknown_for_that_reason():
    faults = Faults.from_rates(death_rate=1.0, seed=3)
    with DevicePool(np.negative, 2, compiled=False, faults=faults) as pool:
        result = run_rows(np.negative, np.ones((3, 1)), pool, tolerance=0.0)
    assert set(result.reasons.values()) == {"its thread ended"}


def test_rows_come_as_soon_as_they_have_values_and_resumed_ones_first(tmp_path):
    rows, came = np.arange(300.0)[:, None], []

    def take(numbers, values, computed):
        came.append((numbers.tolist(), values, computed))
        if len(came) == 5 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt

    options = {"tolerance": 0.0, "num_workers": 2, "rows_per_call": 4, "folder": tmp_path / "parts"}
    begun = run_rows(np.square, rows, DevicePool, on_rows=take, **options)
    assert begun.stopped == "interrupted"
    first = [row for numbers, *_ in came for row in numbers]
    (tmp_path / "again").touch()
    came.clear()
    result = run_rows(np.square, rows, DevicePool, on_rows=take, resume=True, **options)
    assert set(first) <= set(came[0][0])
    assert sorted(row for numbers, *_ in came for row in numbers) == list(range(300))
    for numbers, values, computed in came:
        np.testing.assert_array_equal(values, result.values[numbers])
        assert computed


# Answers that are checked by other workers'.


def run_checked(*faults, num_workers=8, function=smooth, **options):
    options = {"tolerance": 0.0, "check_answers": 0.05, "rows_per_call": 4} | options
    with SimulatedPool(
        function, num_workers, seconds=lambda size: 0.01 * size,
        faults=Faults(faults, seed=3),
    ) as pool:  # fmt: skip
        return run_rows(function, ROWS, pool, **options)


def test_rows_of_wrong_workers_are_computed_by_others(quick_fit):
    """One swaps all answers; another those of one call in ten: nothing gives it away at first."""
    result = run_checked(Fault("swap", workers=(1,)), Fault("swap", 0.1, workers=(5,)))
    assert (result.status == "computed").all()
    # Two swapped answers that are alike look like nothing: 1 of 40 runs kept one, 3e-4 off.
    np.testing.assert_allclose(result.values, smooth(ROWS), atol=2e-3)
    assert result.summary["checked"] == 600
    assert "1" in result.summary["fenced"]
    # A quarter may be fenced, so both may be.
    assert set(result.summary["fenced"]) | set(result.summary["not_fenced"]) <= {"1", "5"}


def test_right_answers_are_trusted_at_the_price_of_few_calls(quick_fit):
    result = run_checked()
    np.testing.assert_array_equal(result.values, smooth(ROWS))
    assert result.summary["checked"] == 600
    assert result.summary["suspicious"] <= 8 + 4 * 0.05 * 600
    assert result.summary["fenced"] == {}


def test_two_workers_are_too_few():
    with pytest.raises(ValueError, match=r"check_answers needs three workers or more.* has 2"):
        run_checked(num_workers=2)


def test_at_the_jobs_deadline_a_row_in_doubt_is_unknown_for_that_reason():
    """The first row of each worker is computed by another, too, which takes too long here."""
    times = collections.Counter()

    def delay(rows):
        times.update(rows.tolist())
        return [0.01 if times[row] == 1 else NEVER for row in rows.tolist()]

    options = {"tolerance": 0.0, "check_answers": 0.05, "job_deadline": 1.5}
    result, _ = run_timed(delay, ROWS[:9], workers=3, **options)
    assert result.status.tolist().count("unknown") >= 3
    assert "its answers differ, or one looked wrong" in set(result.reasons.values())


# -- Runs that are killed and resumed, at random ---------------------------------------------------

NUMBER = int(os.environ.get("NERCC_INTERLEAVINGS", "5"))
KILLED_ROWS = 500


def rows_of(seed):
    return np.random.default_rng([seed, 0]).normal(size=(KILLED_ROWS, 3))


def waves(x):
    time.sleep(0.01 * len(x))
    return np.stack([np.sin(3 * x).sum(axis=1), x.prod(axis=1) / 3], axis=1)


def run_once(seed, life, folder, done):
    """One process of a run: its workers have faults of their own in each."""
    random = np.random.default_rng([seed, 1, life])
    faults = [
        Fault("death", random.uniform(0.0, 0.1)),
        Fault("error", random.uniform(0.0, 0.02)),
        Fault("delay", random.uniform(0.0, 0.2), latency=TraceLatency([0.05])),
        Fault("hang", random.uniform(0.0, 0.01)),
    ]
    workers, rows_per_call = int(random.integers(1, 6)), int(random.integers(1, 8))
    options = {"faults": Faults(faults, int(random.integers(2**31))), "compiled": False}
    options |= {"hang_timeout": 0.3, "max_attempts": 20}
    with DevicePool(waves, workers, **options) as pool:
        parts = {"folder": folder, "resume": folder.exists()}
        options = {"rows_per_call": rows_per_call, "tolerance": 0.0}
        result = run_rows(waves, rows_of(seed), pool, **parts, **options)
    np.savez(done, values=result.values, status=result.status)


def test_a_run_that_was_killed_before_its_manifest_is_begun_again(tmp_path):
    """Its first part was there already, and the folder was refused as nobody's."""
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "part-000000.npz").write_bytes(b"of the run that was killed")
    (folder / ".manifest.json.17").write_bytes(b"half of")
    rows = rows_of(0)[:10]
    result = run_rows(
        waves, rows, DevicePool, num_workers=2, tolerance=0.0, folder=folder, resume=True
    )
    np.testing.assert_array_equal(result.values, waves(rows))
    (folder / "manifest.json").unlink()
    (folder / "notes.txt").write_text("of somebody else")
    with pytest.raises(ValueError, match="holds no results of a run"):
        run_rows(waves, rows, DevicePool, num_workers=2, tolerance=0.0, folder=folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(NUMBER))
def test_a_run_that_is_killed_and_resumed_has_the_functions_own_values(seed, tmp_path):
    random = np.random.default_rng([seed, 2])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nercc_jax.rows"])
    folder, done = tmp_path / "rows", tmp_path / "done.npz"
    kills = int(random.integers(1, 5))
    for life in range(kills + 1):
        # Killed before or while it computes, but for the last.
        process = context.Process(target=run_once, args=(seed, life, folder, done))
        process.start()
        if random.random() < 0.8:  # otherwise it may be killed before it computes anything
            soon(lambda process=process: folder.exists() or not process.is_alive())
        process.join(random.uniform(0.0, 3.0) if life < kills else 120.0)
        process.kill()
        process.join()
        if done.exists():
            break
    with np.load(done) as found:
        assert set(found["status"].tolist()) == {"computed"}
        np.testing.assert_array_equal(found["values"], waves(rows_of(seed)))
