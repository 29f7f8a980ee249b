"""The state of a run over rows, driven by events: each row ends once, nothing waits for ever.

Then its parts, one by one: what may be given out, what is learned, how large calls are, and which
answers are doubted.
"""

import itertools
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from nercc_jax.pools import Overdue, PoolReport
from nercc_jax.pools.backend import WorkerReport
from nercc_jax.pools.times import AnswerTimes
from nercc_jax.rows import RowSettings
from nercc_jax.rows._evidence import FittedLearner, learn  # what the learner's thread does
from nercc_jax.rows.files import Parts
from nercc_jax.rows.state import (
    AGAIN,
    COMPUTED,
    FAILED,
    PREDICTED,
    SENT,
    WAITING,
    Answered,
    Failed,
    Fence,
    Give,
    Learn,
    Learned,
    RowState,
    RowTable,
    Send,
    Tick,
)
from nercc_jax.surrogates import fit_learner

ROWS, WORKERS, BAD = 160, 5, {3, 77}
X = np.random.default_rng(0).permutation(np.linspace(-1, 1, ROWS))[:, None]


def function(rows):
    return np.concatenate([np.sin(3 * X[rows]), np.cos(2 * X[rows])], axis=1)


def report(idle=0, workers=WORKERS):
    reports = tuple(WorkerReport("idle", 0.0, 0) for _ in range(workers))
    zeros = dict.fromkeys(("sent", "answered", "late", "errors", "deaths", "hung", "copies"), 0)
    further = {"internal_errors": 0, "seconds": 0.0, "wasted_seconds": 0.0}
    numbers = {"num_workers": workers, "idle": idle, "busy": workers - idle, "starting": 0}
    return PoolReport(**numbers, **zeros, **further, workers=reports)


def estimates(rows, mean, deviation):
    """Return predictions of rows."""
    rows, mean = np.asarray(rows), np.asarray(mean, np.float32)
    deviation = np.broadcast_to(np.asarray(deviation, float), len(rows)).copy()
    learner: Any = mock.Mock()
    return Learned(FittedLearner(learner, None, 200), rows, mean, deviation, deviation, None)


class Run(RuleBasedStateMachine):
    """A pool, a learner and a clock of which each step is drawn."""

    @initialize(
        tolerance=st.sampled_from([0.0, 0.3]),
        compute=st.sampled_from(["needed", "all"]),
        most=st.sampled_from([None, 30]),
        rate=st.sampled_from([None, 0.05]),
        deadline=st.sampled_from([None, 40.0]),
        size=st.sampled_from([None, 1, 8]),
        wrong=st.booleans(),
    )
    def begin(self, tolerance, compute, most, rate, deadline, size, wrong):
        self.state = a_state(
            X, tolerance=tolerance, compute=compute, max_calls=most, check_answers=rate,
            job_deadline=deadline, rows_per_call=size, deadline=5.0,
        )  # fmt: skip
        self.wrong = {0} if wrong and rate is not None else set()
        self.calls, self.values, self.task, self.now = {}, {}, None, 0.0
        self.fenced = frozenset()
        self.tick(idle=WORKERS, aged=0.01, late=False, passed=0.1)

    def handle(self, event):
        if isinstance(event, Answered | Failed):
            del self.calls[event.call]
        over = self.state.over
        for each in self.state.handle(event):
            assert not over, "nothing is done once the run is over"
            if isinstance(each, Send):
                assert (self.state.table["state"][each.rows] == SENT).all()
                assert 0 < len(each.rows) <= each.size
                assert len(each.avoid | self.fenced) < WORKERS, "somebody must compute them"
                self.calls[each.call] = each
            elif isinstance(each, Give) and each.computed is None:  # withdrawn
                for row in each.rows.tolist():
                    del self.values[row]
            elif isinstance(each, Give):
                given = self.state.table.values[each.rows]
                for row, value in zip(each.rows.tolist(), given, strict=True):
                    assert row not in self.values, "a row ends once"
                    self.values[row] = value
                if each.computed and not self.wrong:
                    np.testing.assert_array_equal(given, function(each.rows))
            elif isinstance(each, Fence):
                self.fenced = each.workers
            else:
                assert isinstance(each, Learn)
                assert self.task is None, "one at a time"
                self.task = each.work

    @rule(idle=st.integers(0, 2), aged=st.sampled_from([0.0, 0.01, 9.0]), late=st.booleans(),
          passed=st.sampled_from([0.05, 3.0]))  # fmt: skip
    def tick(self, idle, aged, late, passed):
        self.now += passed
        ages = {call: (aged, late and aged > 0) for call in self.calls}
        learning = self.task is not None
        self.handle(Tick(self.now, report(idle), ages, learning, fit_seconds=0.01))

    @precondition(lambda self: self.calls)
    @rule(data=st.data(), late=st.booleans())
    def answer(self, data, late):
        call = self.calls[data.draw(st.sampled_from(sorted(self.calls)))]
        worker = data.draw(st.sampled_from(sorted({*range(WORKERS)} - call.avoid)))
        self.give_answer(call, worker, late)

    def give_answer(self, call, worker, late=False):
        if BAD & {*call.rows.tolist()}:
            self.handle(Failed(call.call, "ArithmeticError: no solution", raised=True))
            return
        values = function(np.resize(call.rows, call.size)) + (worker in self.wrong)
        self.handle(Answered(call.call, worker, values, late, usual=0.1))

    @precondition(lambda self: self.calls)
    @rule(data=st.data())
    def die(self, data):
        call = data.draw(st.sampled_from(sorted(self.calls)))
        self.handle(Failed(call, "its node was taken", raised=False))

    @precondition(lambda self: self.task is not None)
    @rule(off=st.sampled_from([1e-3, 0.5]))
    def learn(self, off):
        rows, self.task = self.task.args[3], None
        self.handle(estimates(rows, function(rows) + np.where(rows % 2, off, -off)[:, None], 0.05))

    @invariant()
    def every_row_is_somewhere(self):
        table = self.state.table.rows
        if not self.state.over:
            assert {*table["main"][table["state"] == SENT].tolist()} <= self.calls.keys()
        assert self.state.calls.keys() == self.calls.keys()
        done = np.flatnonzero(table["state"] >= PREDICTED).tolist()
        assert sorted(self.values) == done
        assert {*np.flatnonzero(table["state"] == FAILED).tolist()} == {*self.state.table.reasons}

    def teardown(self):
        """Nothing waits for ever: when all calls are answered, the run ends."""
        for step in range(2000):
            if self.state.over:
                break
            for number in sorted(self.calls):
                if number in self.calls:
                    call = self.calls[number]
                    others = sorted({*range(WORKERS)} - call.avoid - self.fenced)
                    self.give_answer(call, others[step % len(others)])
            if self.task is not None:
                self.learn(1e-3)
            self.tick(idle=1, aged=0.0, late=False, passed=0.05)
            self.every_row_is_somewhere()
        assert self.state.over
        state = self.state.table.rows["state"]
        assert {*state.tolist()} <= {FAILED, PREDICTED, COMPUTED}
        assert not (state[[*BAD]] == COMPUTED).any()
        computed = np.flatnonzero(state == COMPUTED)
        if len(computed) and not self.wrong:
            np.testing.assert_array_equal(self.state.table.values[computed], function(computed))


# To shrink a failure takes minutes, and tells little.
Run.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, phases=(Phase.reuse, Phase.generate)
)
TestRun = Run.TestCase


# What may be given out.


def a_state(x, workers=WORKERS, **options):
    return RowState(RowSettings(**options), x, RowTable(len(x)), report(workers=workers))


def come(state, rows, values, late):
    """Have rows computed, and compare them with what was predicted."""
    state.table.rows["late"][rows] = late
    state.evidence.compare(rows, values, late)
    state.table.put(rows, values, 0.0, COMPUTED)


@pytest.mark.parametrize("harder", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("compute", ["needed", "all"])
def test_bars_go_by_audits_and_those_of_late_rows_by_late_rows_where_these_are_harder(
    harder, compute
):
    """By quantiles that are counted by hand. Late audits count as both."""
    random, nothing = np.random.default_rng(1), np.zeros((400, 1))
    state = a_state(np.linspace(0, 1, 400)[:, None], tolerance=10.0, compute=compute)
    state.table.rows["audit"] = np.arange(400) % 2 == 0
    state.table.put(np.array([399]), nothing[:1], 0.0, COMPUTED)
    state.handle(estimates(np.arange(400), nothing, 0.1))
    usual, error = random.uniform(0, 0.1, (100, 1)), random.uniform(0, 0.1 * harder, (40, 1))
    rest, score = np.arange(300, 399), state.evidence.score
    come(state, np.arange(0, 200, 2), usual, late=False)
    come(state, np.arange(201, 219), error[:18], late=True)
    assert np.isinf(score(rest, late=True)).all(), "there are too few late rows"
    come(state, np.arange(219, 241), error[18:], late=True)
    audits = np.sort(np.append(usual, error[1::2]))  # half of the late ones
    np.testing.assert_allclose(score(rest), audits[108], rtol=1e-4)  # the 109th of 120
    late = max(np.sort(error, axis=None)[36], audits[108])  # the 37th of 40
    np.testing.assert_allclose(score(rest, late=True), late, rtol=1e-4)


def test_late_calls_are_copied_once_the_oldest_first_to_workers_that_would_be_idle():
    state = a_state(X[:3], tolerance=0.0, rows_per_call=1, deadline=60.0)
    calls = {}

    def sent(ages, idle):
        todo = state.handle(Tick(1.0, report(idle), ages, learning=False, fit_seconds=0.01))
        calls.update({each.call: each for each in todo})
        return [each.rows.tolist() for each in todo if isinstance(each, Send)]

    assert len(sent({}, idle=5)) == 3
    ages = {number: (age, True) for number, age in zip(calls, (1.0, 9.0, 5.0), strict=True)}
    first, second, third = (each.rows.tolist() for each in list(calls.values()))
    assert sent(ages, idle=1) == [second]
    assert sent(ages, idle=3) == [third, first]
    assert sent(ages, idle=5) == [], "each once"
    # The first value counts, whoever gives it.
    copy = next(each for each in calls.values() if each.copy and each.rows.tolist() == second)
    state.handle(Answered(copy.call, 4, function(copy.rows), late=False, usual=0.1))
    assert state.table.rows["state"][copy.rows] == COMPUTED


# What is learned.


def smooth(x):
    return np.stack([np.sin(3 * x[:, 0]), x[:, 1] ** 2], axis=1)


def test_a_row_is_predicted_without_itself_and_as_far_off_as_its_neighbours_were():
    """By learners each of which knows all pairs but one, as far as these have the same mean."""
    x = np.random.default_rng(1).uniform(-1, 1, (24, 2)).astype(np.float32)
    y = np.asarray(smooth(x), np.float32)
    learner = fit_learner(x, y, capacity=32, kernel="squared_exponential", tuning=None)
    wanted, plain = np.zeros_like(y), np.zeros(24)
    for place in range(24):
        others = np.arange(24) != place
        others = fit_learner(x[others], y[others], capacity=32, kernel=learner.kernel, tuning=None)
        mean, deviation = others.predict(x[place : place + 1])
        wanted[place], plain[place] = np.asarray(mean)[0], float(deviation[0])
    ratios = np.sqrt(np.mean((wanted - y) ** 2, axis=1)) / plain

    def expected(row, own=-1):
        distance = np.linalg.norm((x - row) / x.std(axis=0), axis=1)
        distance[own] = np.inf if own >= 0 else distance[own]
        return np.sqrt(np.mean(ratios[np.argsort(distance)[:8]] ** 2))

    late, new = np.array([3, 7, 20]), x[:1] + 1
    features = np.concatenate([new, x[late], new])  # the first is not known
    found = learn(
        FittedLearner(learner, None, 24), x[:0], y[:0], rows=np.arange(5), features=features,
        known_y=np.asarray(smooth(features[1:]), np.float32), settings=RowSettings(tolerance=0.1),
    )  # fmt: skip
    np.testing.assert_allclose(found.mean[1:4], wanted[late], atol=0.05)
    np.testing.assert_allclose(found.plain[1:4], plain[late], rtol=0.2)
    scales = [*(expected(x[place], place) for place in late), expected(new[0])]
    np.testing.assert_allclose((found.expected / found.plain)[1:], scales, rtol=0.3)
    mean, deviation = learner.predict(new)
    for place in (0, 4):
        np.testing.assert_allclose(found.mean[place], mean[0], atol=1e-2, err_msg="not a pair")
        np.testing.assert_allclose(found.plain[place], deviation[0], rtol=0.02)


# How large calls are.


@pytest.mark.parametrize(
    ("transport", "each", "row_bytes", "most_calls"),
    [
        (1e-3, 1e-6, 100, 120),
        (0.0, 0.01, 100, 2700),
        (0.06, 0.01, 100, 1400),
        (0.0, 0.1, 100, 20_000),
        (1e-3, 0.0, 224 * 224 * 3 * 8, 3000),
    ],
)
def test_calls_grow_to_a_quarter_of_a_second_or_16_mib_and_leave_no_worker_idle(
    transport, each, row_bytes, most_calls
):
    """A law of the calls' time, and two workers: each takes the next call when it is free."""
    count, times, sizes, free = 20_000, AnswerTimes(Overdue(least=1)), [], [0.0, 0.0]
    state = a_state(np.zeros((count, 1)), 2, tolerance=0.0)
    rows, done = state.queue, state.table.rows["state"]
    while len(taken := rows.take()):
        assert not done[taken].any()
        done[taken] = COMPUTED
        seconds = transport + each * len(taken)
        free[free.index(min(free))] += seconds
        times.add(len(taken), seconds)
        rows.observe(len(taken), times.median(len(taken)), row_bytes)
        sizes.append(len(taken))
    assert done.all()
    assert len(sizes) <= most_calls
    assert max(sizes) == 1 or max(sizes) * each <= 0.25
    assert max(sizes) * row_bytes <= 2**24
    assert max(free) <= 1.1 * (count * each + len(sizes) * transport) / 2 + 0.02


# Which answers are doubted.

NONE, ALL = np.zeros(3, bool), np.ones(3, bool)
CALLS = itertools.count()


def checks_of(workers=4):
    x, options = np.zeros((10, 1)), {"check_answers": 0.05, "max_fenced": 0.5}
    checks = a_state(x, workers, tolerance=0.0, **options).checks
    assert checks is not None
    return checks


def answers(checks, worker, rows, values, looks_wrong=NONE, known=ALL):
    looks = looks_wrong[: len(rows)], known[: len(rows)]
    return checks.take(next(CALLS), worker, np.asarray(rows), np.asarray(values, float), *looks)


@pytest.mark.parametrize(
    ("one", "other", "value"),
    [
        ([np.inf, 1.0], [5.0, 1.0], None),  # it used to be right
        ([np.inf], [-np.inf], None),
        ([np.nan, 1.0], [2.0, 1.0], None),
        ([np.inf, 1.0], [np.inf, 2.0], None),
        ([np.inf, 1.0], [np.inf, 1.0 + 1e-6], [np.inf, 1.0]),
        ([np.nan, 1.0], [np.nan, 1.0 + 1e-6], [np.nan, 1.0]),
        ([1.0, 2.0], [1.0, 2.0 + 1e-6], [1.0, 2.0]),
    ],
)
def test_answers_agree_where_they_are_infinite_or_nan_in_the_same_outputs(one, other, value):
    checks = checks_of()
    given, _ = answers(checks, 0, [4], [one], ALL)
    assert not given.any()
    given, values = answers(checks, 1, [4], [other], ALL)
    assert given.all() == (value is not None)
    np.testing.assert_array_equal(values, [other if value is None else value])


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("lies", [(1.0,), (0.2,), (1.0, 0.2), (0.0,)])
@pytest.mark.parametrize("seed", range(3))
def test_in_a_stream_of_calls_liars_are_accused_and_no_row_is_wrong_in_the_end(lies, alike, seed):
    """Of eight workers some lie, each in its own way or both alike; nine in ten lies look wrong.

    Those that do not look so come in a call with another, or their worker is accused later.
    """
    random, rows, size = np.random.default_rng(seed), 400, 4
    state = a_state(np.zeros((rows, 1)), 8, tolerance=0.0, check_answers=0.05)
    table, checks = state.table, state.checks
    assert checks is not None
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
            table.put(some[done], found[done], 0.0, COMPUTED)
        back, _ = checks.review(report(workers=8))
        if len(back):
            table.put(back, np.nan, np.inf, AGAIN)
        values += found[done].tolist()
        again = np.concatenate([some[~done], back])
        waiting += [again[place : place + size] for place in range(0, len(again), size)]
        if not waiting:  # values of which nothing was known are looked at in the end
            rest = np.flatnonzero((table["state"] == COMPUTED) & ~table["checked"])
            off = np.abs(table.values[rest, 0] - right[rest, 0]) > 0.1
            table["checked"][rest[~off]] = True
            back = checks.doubt(rest[off])
            table.put(back, np.nan, np.inf, AGAIN)
            waiting += [back] * (len(back) > 0)
    assert np.sum(np.abs(table.values - right) > 1e-9) <= (1 if lies != (0.0,) else 0)
    accused = {*checks.counts()["fenced"]} | {*checks.counts()["not_fenced"]}
    assert accused == {str(worker) for worker, rate in enumerate(lies) if rate}
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
    counts = {"checked": 5, "suspicious": 2, "fenced": {}, "not_fenced": {}}
    assert checks.counts() == counts
    for worker in range(4):
        answers(checks, worker, [worker + 5], [[1.0]], ALL)
    assert checks.avoid(np.arange(5, 9)) == set(), "somebody must compute them"


# Temperatures of 300 K: rounding is no difference, and 0.1 K is one.
WARM, ELSEWHERE = [300.0, 300.1], [300.1, 300.0]


@pytest.mark.parametrize(
    ("num_workers", "values", "taken"),
    [
        (4, [[np.nan, 1.0], [np.nan, 1.0]], [np.nan, 1.0]),
        (8, [[each, 1.0] for each in (1.0, 2.0, 3.0, 3.0)], [3.0, 1.0]),
        (3, [[each, 1.0] for each in (0.0, 1.0, 2.0)], [0.0, 1.0]),  # nobody is left
        (5, [WARM, np.multiply(WARM, 1 + 1e-6)], WARM),
        (5, [ELSEWHERE, WARM, WARM], WARM),
    ],
    ids=["no numbers", "two of four", "all differ", "rounding", "hardly another's"],
)
def test_the_first_value_that_two_gave_is_taken_or_one_where_all_workers_differ(
    num_workers, values, taken
):
    checks = checks_of(num_workers)
    for row in range(1, 9):  # it has seen by how much rows differ
        others = 300 + np.random.default_rng(row).normal(scale=0.1, size=2)
        for worker in range(2 * (num_workers == 5)):
            answers(checks, worker, [row], [others], ALL)
    for worker, value in enumerate(values):
        given, found = answers(checks, worker, [0], [value], ALL)
        assert given.any() == (worker == len(values) - 1)
    np.testing.assert_allclose(found, [taken], rtol=1e-6)


def test_what_was_taken_back_after_it_was_written_is_not_taken_for_a_value(tmp_path):
    state = RowTable(3)
    parts = Parts(tmp_path / "run", {})

    def write(rows, value, kind):
        state.put(np.array(rows), np.full((len(rows), 1), value), 0.0, kind)
        parts.add(state.arrays(np.array(rows)))
        parts.flush()

    write([0, 1, 2], 1.0, COMPUTED)
    write([0, 1], np.nan, AGAIN)
    write([0], 2.0, COMPUTED)
    resumed = RowTable(3)
    for each in Parts(tmp_path / "run", {}, resume=True).read():
        resumed.take(each)
    assert resumed.rows["state"].tolist() == [COMPUTED, WAITING, COMPUTED]
    np.testing.assert_array_equal(resumed.values, [[2.0], [np.nan], [1.0]])
