"""The scheduler without anything that adapts: it answers, hedges, and decodes by numbers alone."""

import ast
import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from batching import INTERLEAVED
from traffic import OUT, SERVICE, SHAPE, model

import nercc_jax.serving
from nercc_jax import Uncoded
from nercc_jax.pools._batch import refuse_odd
from nercc_jax.serving import BatchingPolicy, Coder
from nercc_jax.serving.core._adaptation import (
    AbstractAdaptation,
    DispatchSetting,
    ExpectedError,
    overdue_rule,
)
from nercc_jax.serving.core._error_probability import uncalibrated
from nercc_jax.serving.core._group import Cell, Group, LateGroups
from nercc_jax.serving.core._request import Answer, ApproximateAnswer, BatchSpec, Request
from nercc_jax.serving.core._scheduler import QueryScheduler
from nercc_jax.testing import SimulatedClock, SimulatedPool


class NoAdaptation(AbstractAdaptation):
    """A policy's own setting for good; nothing is estimated or predicted."""

    predicts = can_predict = accepts_samples = False
    approximates = True
    setting = checks = None

    def __init__(self, policy):
        self.setting = DispatchSetting(overdue_rule(policy), policy.redundancy)
        self.given = self.audited = 0

    def expect(self, x):
        return []

    def observe(self, what, number):
        assert what != "internal_error"

    def needs_samples(self, queries):
        return False

    def add_group(self, answers, originals):
        raise AssertionError("nobody wants it")

    def add_answer(self, x, own):
        pass

    def risk(self, source):
        return SimpleNamespace(
            epoch=0, waits=False, give=self._give, expected=lambda *errors: errors
        )

    def _give(self):
        self.given += 1

    def admits(self, answer, *, calibrated=True):
        return calibrated

    def audit(self, given, own):
        self.audited += given.given
        return True

    def error_probability(self, queries):
        return uncalibrated()

    def expected_error(self, queries, mask):
        return ExpectedError(np.full(queries, np.nan), np.full(queries, np.nan), True)

    def predict(self, x):
        return None


@pytest.mark.parametrize("code", [Uncoded(1), INTERLEAVED], ids=["hedged", "decoded"])
def test_it_serves_by_itself(code):
    clock, random = SimulatedClock(), np.random.default_rng(0)
    slow = lambda size: SERVICE * (10 if random.random() < 0.1 else 1)  # noqa: E731
    pool = SimulatedPool(model, 16, seconds=slow, clock=clock)
    policy = BatchingPolicy(ordering=False, max_batch_size=1, straggler_threshold=2.0)
    spec = BatchSpec(SHAPE), BatchSpec(OUT)
    scheduler = QueryScheduler(pool, Coder(code), *spec, policy, NoAdaptation(policy), refuse_odd)
    scheduler.start()
    x, futures = random.normal(size=(200, *SHAPE)).astype(np.float32), []
    for number, each in enumerate(x):
        clock.at(number / 100, lambda each=each: futures.append(scheduler.submit(each[None])))
    clock.run(5.0)
    replies = [future.result(0) for future in futures]
    exact = np.array([reply.exact[0] for reply in replies])
    assert exact.all() == (code.num_data == 1)
    values = np.concatenate([reply.values for reply in replies])
    np.testing.assert_allclose(values[exact], model(x[exact]), atol=1e-6)
    late = np.array([reply.seconds for reply in replies])[50:]
    assert np.quantile(late, 0.95) < 5 * SERVICE
    scheduler.close()
    pool.close()


def test_what_was_given_out_is_compared_however_few_late_groups_are_kept():
    clock, calls, x = SimulatedClock(), itertools.count(), np.ones((1, *SHAPE), np.float32)
    slow = lambda size: 5.0 if next(calls) in range(80, 104, 8) else SERVICE  # noqa: E731
    pool = SimulatedPool(model, 16, seconds=slow, clock=clock)
    policy = BatchingPolicy(ordering=False, max_batch_size=4, straggler_threshold=2.0)
    spec, adaptation = (BatchSpec(SHAPE), BatchSpec(OUT)), NoAdaptation(policy)
    scheduler = QueryScheduler(pool, Coder(INTERLEAVED), *spec, policy, adaptation, refuse_odd)
    scheduler._late_groups = LateGroups(groups=1)
    scheduler.start()
    for number in range(20):
        clock.at(number / 5, lambda: scheduler.submit(x.repeat(4, axis=0)))
    clock.run(20.0)
    assert adaptation.audited == adaptation.given > 2
    scheduler.close()
    pool.close()


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("core", {"_policy", "_tracing"}),
        ("adapt", {"core", "_policy"}),
        ("protocol", {"core", "_policy"}),
    ],
)
def test_packages_know_only_what_is_below_them(package, allowed):
    """So that the core can be read, and used, without the rest."""
    for path in (Path(nercc_jax.serving.__file__).parent / package).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                assert str(node.module).partition(".")[0] in allowed, (
                    f"{path} imports {node.module}"
                )


def group_given(value):
    """A group whose only query was given an answer of so many numbers."""
    coder = Coder(Uncoded(1))
    group = Group(coder, 0.0)
    group.batch = SimpleNamespace(drop_answers=lambda: None)
    query = Request(np.zeros((1, 3), np.float32), np.zeros((1, value)), 0.0, 1.0, False).queries[0]
    answer = Answer(np.zeros(value, np.float32), "predicted", 1, 0)
    query.approximate["predicted"] = ApproximateAnswer(answer, query.x, 0, given=True)
    query.done = True
    group.cells.append(Cell([query], query.x[None]))
    return group


def test_what_is_kept_for_late_answers_is_small():
    late = LateGroups(groups=3, size=1000)
    groups = [group_given(50) for _ in range(5)]
    assert [late.add(group) for group in groups] == [[], [], [], [groups[0]], [groups[1]]]
    for group in groups:
        (query,) = group.cells[0].queries
        assert group.cells[0].x is None
        assert query.x is None
        kept = query.approximate["predicted"]
        assert kept.answer.value.base is None
        np.testing.assert_array_equal(kept.x, np.zeros(3))
    large = group_given(1000)
    assert late.add(large) == [*groups[2:], large], "by bytes, too"
    assert len(late) == 0
