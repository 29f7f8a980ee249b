"""The state of a run over rows, driven by events: each row ends once, nothing waits for ever."""

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

from nercc_jax.pools import PoolReport
from nercc_jax.pools.backend import WorkerReport
from nercc_jax.rows import RowSettings
from nercc_jax.rows._learner import FittedLearner, Learned, learn
from nercc_jax.rows._table import COMPUTED, FAILED, PREDICTED, SENT, WAITING, RowTable
from nercc_jax.rows.state import Answered, Failed, Fence, Give, Learn, RowState, Send, Tick
from nercc_jax.surrogates import init_learner

ROWS, WORKERS, BAD = 160, 5, {3, 77}
X = np.random.default_rng(0).permutation(np.linspace(-1, 1, ROWS))[:, None]


def function(rows):
    return np.concatenate([np.sin(3 * X[rows]), np.cos(2 * X[rows])], axis=1)


def report(idle=0, starting=0, deaths=0):
    workers = tuple(WorkerReport("idle", 0.0, deaths) for _ in range(WORKERS))
    zeros = dict.fromkeys(("sent", "answered", "late", "errors", "deaths", "hung", "copies"), 0)
    further = {"internal_errors": 0, "seconds": 0.0, "wasted_seconds": 0.0}
    busy = WORKERS - idle - starting
    numbers = {"num_workers": WORKERS, "idle": idle, "busy": busy, "starting": starting}
    return PoolReport(**numbers, **zeros, **further, workers=workers)


def estimates(rows, mean, deviation, *, left_out=0, late=()):
    """Return predictions of rows, the last few of which are known ones."""
    rows, mean = np.asarray(rows), np.asarray(mean, np.float32)
    deviation = np.broadcast_to(np.asarray(deviation, float), len(rows)).copy()
    known = np.arange(len(rows)) >= len(rows) - left_out
    like = np.isin(rows, np.asarray(late, int))
    learner: Any = mock.Mock(knows=lambda x: np.zeros(len(x), bool))  # no answers to any input
    return Learned(
        FittedLearner(learner, None, 200), rows, known, mean, deviation, deviation, like, None
    )


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
            elif isinstance(each, Give):
                given = self.state.table.values[each.rows]
                for row, value in zip(each.rows.tolist(), given, strict=True):
                    assert row not in self.values, "a row ends once"
                    self.values[row] = value
                if each.computed and not self.wrong:
                    np.testing.assert_array_equal(given, function(each.rows))
            elif isinstance(each, Fence):
                self.fenced = each.workers
            elif isinstance(each, Learn):
                assert self.task is None, "one at a time"
                self.task = each.work.keywords
            else:
                for row in each.rows.tolist():  # withdrawn
                    del self.values[row]

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
    @rule(off=st.sampled_from([1e-3, 0.5]), late=st.booleans())
    def learn(self, off, late):
        task, self.task = self.task, None
        rows = task["rows"]
        some = rows[:3] if late else ()
        off = np.where(rows % 2, off, -off)[:, None]
        known = len(task["known_y"])
        self.handle(
            estimates(rows, function(rows) + off, 0.05, left_out=known, late=some)
        )  # fmt: skip

    @invariant()
    def every_row_is_somewhere(self):
        table, held = self.state.table.rows, np.zeros(ROWS, int)
        for call in self.state.calls.values():
            if not call.copy and not call.given_up:
                held[call.rows] += 1
        np.testing.assert_array_equal(table["held"], held)
        if not self.state.over:
            assert (held[table["state"] == SENT] > 0).all()
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
                self.learn(1e-3, late=False)
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


def a_state(x, **options):
    return RowState(RowSettings(**options), x, RowTable(len(x)), report())


def come(state, rows, values, late):
    """Have rows computed, and compare them with what was predicted."""
    state.table.rows["late"][rows] = late
    state.evidence.compare(rows, values, late)
    state.table.put(rows, values, 0.0, 0.0, COMPUTED)


@pytest.mark.parametrize(
    ("harder", "compute", "with_audits"),
    [(1.0, "needed", True), (4.0, "needed", False), (1.5, "all", False)],
)
def test_bars_of_late_rows_go_by_late_rows_alone_where_these_are_much_harder_or_all_are_computed(
    harder, compute, with_audits
):
    """By quantiles that are counted by hand. Bars of other rows go by the audits."""
    random, nothing = np.random.default_rng(1), np.zeros((400, 1))
    state = a_state(np.linspace(0, 1, 400)[:, None], tolerance=10.0, compute=compute)
    state.table.rows["audit"] = np.arange(400) % 2 == 0
    state.table.put(np.array([399]), nothing[:1], 0.0, 0.0, COMPUTED)
    state.handle(estimates(np.arange(400), nothing, 0.1))
    usual, error = random.uniform(0, 0.1, (100, 1)), random.uniform(0, 0.1 * harder, (40, 1))
    come(state, np.arange(0, 200, 2), usual, late=False)
    come(state, np.arange(201, 241), error, late=True)
    both, alone = (np.sort(each, axis=None) for each in (np.append(usual, error), error))
    assert with_audits or alone[36] > both[126]
    rest = np.arange(300, 399)
    wanted = both[126] if with_audits else alone[36]  # the 127th of 140, the 37th of 40
    score = state.evidence.score
    np.testing.assert_allclose(score(rest, late=True), wanted, rtol=1e-4)
    np.testing.assert_allclose(score(rest), np.sort(usual[:, 0])[90], rtol=1e-4)


def test_a_run_does_not_end_by_bars_of_quick_rows_where_rows_nearby_came_late():
    """However old the latest estimate is, which knew of no late row."""
    x = np.linspace(0, 1, 200)[:, None]
    state = a_state(x, tolerance=0.5)
    known = np.arange(0, 200, 2)
    state.table.rows["audit"] = np.isin(np.arange(200), known)
    state.table.put(known[:1], x[:1], 0.0, 0.0, COMPUTED)
    state.handle(estimates(np.arange(200), x, 0.1))
    for call in state.calls.values():  # which the estimate has sent
        state.table.rows["held"][call.rows], state.table.rows["state"][call.rows] = 0, WAITING
    state.calls.clear()
    for late, error in ((False, 0.01), (True, 2.0)):
        rows = known[(known > 150) == late]
        come(state, rows, x[rows] + error, late)
    state.queue.waiting = np.zeros(0, int)
    sent = state.handle(Tick(1.0, report(WORKERS), {}, learning=True, fit_seconds=9.0))
    assert not state.over
    # Of the eight computed rows nearest to these, one or more came late.
    rows = [row for each in sent if isinstance(each, Send) for row in each.rows.tolist()]
    assert {*rows, *state.queue.waiting.tolist()} == {*range(145, 200, 2)}


def test_answers_after_the_end_judge_bars_and_change_nothing():
    """Two hold, one does not; a row without a bar does not count, nor one that was computed."""
    state = a_state(X[:5], tolerance=1.0, rows_per_call=5, job_deadline=1.0)
    state.handle(Tick(0.1, report(WORKERS), {}, learning=False, fit_seconds=0.1))
    ((call, _),) = state.calls.items()
    bars = np.array([1.0, 0.5, 0.1, np.inf, 0.0])
    state.table.put(np.arange(5), np.zeros((5, 2)), 1.0, bars, PREDICTED)
    state.table.rows["state"][[1, 3, 4]] = FAILED, FAILED, COMPUTED
    state.over = True
    order = state.calls[call].rows
    values = np.tile([0.4, -0.4], (5, 1))[order]
    assert state.handle(Answered(call, 0, values, late=True, usual=0.1)) == []
    assert sorted(state.evidence.late.held) == [False, True, True]
    assert not state.table.values.any()


# What is learned.


def smooth(x):
    return np.stack([np.sin(3 * x[:, 0]), x[:, 1] ** 2], axis=1)


def test_a_row_is_predicted_without_itself_and_as_far_off_as_its_neighbours_were():
    """By learners each of which knows all pairs but one, as far as these have the same mean."""
    x = np.random.default_rng(1).uniform(-1, 1, (24, 2)).astype(np.float32)
    y = np.asarray(smooth(x), np.float32)
    learner = init_learner(x, y, capacity=32, kernel="squared_exponential")
    wanted, plain = np.zeros_like(y), np.zeros(24)
    for place in range(24):
        others = np.arange(24) != place
        others = init_learner(x[others], y[others], capacity=32, kernel=learner.kernel)
        mean, deviation = others.predict(x[place : place + 1])
        wanted[place], plain[place] = np.asarray(mean)[0], float(deviation[0])
    ratios = np.sqrt(np.mean((wanted - y) ** 2, axis=1)) / plain

    def expected(row, own=-1):
        distance = np.linalg.norm((x - row) / x.std(axis=0), axis=1)
        distance[own] = np.inf if own >= 0 else distance[own]
        return np.sqrt(np.mean(ratios[np.argsort(distance)[:8]] ** 2))

    late, new = np.array([3, 7, 20]), x[:1] + 1
    features = np.concatenate([new, x[late], new])  # the first is not known
    nobody = x[:0], np.zeros(0, bool)
    found = learn(
        FittedLearner(learner, None, 24), x[:0], y[:0], rows=np.arange(5), features=features,
        known_y=np.asarray(smooth(features[1:]), np.float32), lateness=(nobody, nobody),
        settings=RowSettings(tolerance=0.1),
    )  # fmt: skip
    assert found.left_out.tolist() == [False, True, True, True, True]
    np.testing.assert_allclose(found.mean[1:4], wanted[late], atol=0.05)
    np.testing.assert_allclose(found.plain[1:4], plain[late], rtol=0.2)
    scales = [*(expected(x[place], place) for place in late), expected(new[0])]
    np.testing.assert_allclose((found.expected / found.plain)[1:], scales, rtol=0.3)
    mean, deviation = learner.predict(new)
    for place in (0, 4):
        np.testing.assert_allclose(found.mean[place], mean[0], atol=1e-2, err_msg="not a pair")
        np.testing.assert_allclose(found.plain[place], deviation[0], rtol=0.02)
