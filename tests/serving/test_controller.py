"""Settings that are picked by the tail: what is foreseen, what is picked, and what it costs."""

import itertools
import logging
import math

import jax.numpy as jnp
import numpy as np
import pytest
from batching import INTERLEAVED
from traffic import OUT, SERVICE, SHAPE, KnowsAll, Traffic, labels_right, model

from nercc_jax import Replication
from nercc_jax.pools import Fault, Faults
from nercc_jax.pools.times import Call
from nercc_jax.risk import Accuracy, Comparison, Risk
from nercc_jax.serving import BatchingPolicy, Coder
from nercc_jax.serving.adapt._setting_controller import SettingController
from nercc_jax.serving.core._setup import BatchSpec, Setup
from nercc_jax.stragglers import TraceLatency
from nercc_jax.testing import SimulatedPool

REPLICATION = Coder(Replication(1, 2))


class Sure(KnowsAll):
    """One that knows a share of all queries from the first."""

    share = 0.7

    def __init__(self):
        super().__init__(lambda x: x[:, 0] <= 0.5)  # seven of ten

    @property
    def state(self):
        return "answering" if self.share else "drifted"


class Looks:
    """A controller by itself, before calls that a law has made."""

    def __init__(self, most, predictor=None, code=REPLICATION, copies=3):
        policy = BatchingPolicy(straggler_threshold=1.5, copies=copies, max_calls=most)
        self.pool = SimulatedPool(model, 24, seconds=lambda size: SERVICE)
        self.pool.calls = lambda: self.calls
        self.replies, self.random = [], np.random.default_rng(0)
        shapes = BatchSpec(SHAPE), BatchSpec(OUT)
        setup = Setup(self.pool, code, policy, *shapes, lambda answer: None, self.hear)
        self.decoding = Risk(Accuracy(max_disagreement=0.1), needs_evidence=False)
        self.controller = SettingController(setup, predictor, self.decoding, lambda: None)

    def hear(self, what, number):
        self.replies.append(what)

    def look(self, share, times=1.0, copies=0.0, **ended):
        """Thousand queries: calls straggle by this share, and queries took so many times more."""
        clock = self.pool.clock
        base = self.random.normal(1, 0.01, 4000) + 10 * (self.random.random(4000) < share)
        begin = clock.now() - 3.0 + np.arange(4000) / 1000
        workers = self.random.integers(0, 24, 4000)
        rows = zip(begin, SERVICE * base, workers, strict=True)
        self.calls = [Call(float(s), float(t), 1, int(w)) for s, t, w in rows]
        clock.run(clock.now() + 1.0)
        for number in range(1100):
            late = number % 50 == 0
            self.controller.observe("request_ok", SERVICE * (times if late else 1.0))
        for what, number in ({"query_exact": 1100} | ended).items():
            self.controller.observe(what, number)
        while self.controller.turn() < math.inf:  # it has taken its share of the time
            clock.run(clock.now() + 1.0)
        return self.controller.setting


@pytest.mark.parametrize(
    ("most", "known", "redundancy"),
    [
        (1.05, 0.7, "none"),
        (1.4, 0.7, "uncertain"),
        (2.2, 0.7, "uncertain"),
        (1.2, 0.0, "none"),
        (2.2, 0.0, "always"),
    ],
)
def test_what_may_be_spent_buys_the_shortest_tail(most, known, redundancy, caplog):
    predictor = Sure()
    predictor.share = known
    looks = Looks(most, predictor)
    with caplog.at_level(logging.INFO):
        setting = looks.look(0.05)
    assert setting.redundancy == redundancy
    # As many straggle by 1.2 times the median as by the policy's threshold.
    assert setting.overdue.factor < 3
    assert looks.replies.count("policy_change") == 1
    assert "p99.9 of" in looks.controller.status()["reason"]
    assert [each.message[:20] for each in caplog.records] == ["policy: late after 1"]
    assert looks.look(0.05) == setting, "nothing has changed"


def test_when_nothing_is_known_any_more_it_hedges_again():
    predictor = Sure()
    looks = Looks(1.4, predictor)
    assert looks.look(0.05).redundancy == "uncertain"
    predictor.share = 0.0
    assert looks.look(0.05).redundancy == "none"


def test_no_more_may_straggle_than_by_the_threshold_where_answers_are_known():
    looks = Looks(1.4, Sure())
    looks.random = Noisy()
    assert looks.look(0.05).overdue.factor == 1.35
    without = Looks(1.4)
    without.random = Noisy()
    assert without.look(0.05).overdue.factor < 1.35, "hedging costs no labels"


class Noisy(np.random.Generator):
    """Every tenth call takes 1.3 times the usual."""

    def __init__(self):
        super().__init__(np.random.PCG64(0))

    def normal(self, loc, scale, size):
        return np.where(self.random(size) < 0.1, 1.3, 1.0) + super().normal(0, scale, size)


def test_what_was_foreseen_and_did_not_come_true_is_given_up_and_tried_again_later():
    looks = Looks(2.2)
    assert looks.look(0.05).redundancy == "always"
    # Workers are busy, hardly a copy is sent: p99 is many times what was foreseen.
    assert looks.look(0.05, times=8.0).redundancy == "none"
    seen = {looks.look(0.05, times=5.0).redundancy for _ in range(60)}
    assert seen == {"none", "always"}


def test_what_costs_more_than_was_foreseen_is_given_up():
    looks = Looks(2.01)
    looks.look(0.05)
    assert looks.controller.setting.redundancy == "always"
    looks.controller._measured.since -= 2.5  # more than three calls a query are counted since then
    assert looks.look(0.05).redundancy == "none"


def test_what_is_decoded_shows_when_it_is_tried():
    looks = Looks(2.2, code=Coder(INTERLEAVED))
    assert looks.look(0.05).redundancy == "always"
    for _ in range(100):  # nothing that is decoded is right
        looks.decoding.add(Comparison(0.01, 0.0, wrong=True, excess=0.0), given=False)
    assert looks.look(0.05, times=3.6).redundancy == "none"


def test_traffic_is_served_by_what_is_picked():
    policy = BatchingPolicy(straggler_threshold=1.5, copies=3, max_calls=1.4, max_disagreement=0.1)
    traffic = Traffic(Sure(), policy, code=Replication(1, 2), share=0.05)
    traffic.send(600)
    assert traffic.batcher._approximations.setting.redundancy == "uncertain"
    before, replies = traffic.calls(), traffic.send(300)
    assert 1.2 < (traffic.calls() - before) / 300 < 1.4  # three of ten twice
    assert np.quantile([seconds for seconds, *_ in replies], 0.99) < 1.5 * SERVICE
    assert labels_right(replies) == 1


def slow_queries():
    """Traffic in which nobody straggles, but one query in twenty takes long until it is stopped."""
    limits = [1.645]
    latency = TraceLatency(jnp.array([10 * SERVICE]))

    def score(batch):
        return np.asarray(batch)[:, 0] > limits[-1]

    faults = Faults([Fault("delay", latency=latency, score=score, least_score=1.0)])
    policy = BatchingPolicy(straggler_threshold=1.35, copies=3, max_calls=1.1)
    traffic = Traffic(None, policy, share=0.0, rate=130, num_workers=28, faults=faults)
    traffic.settle = 60 * SERVICE
    traffic.send(1500)
    return traffic, lambda: limits.append(np.inf)


def test_queries_that_are_slow_themselves_are_not_copied_unless_a_worker_hangs():
    traffic, _ = slow_queries()
    assert not traffic.batcher._approximations.setting.hedges
    assert "of hung calls only" in traffic.batcher.status()["policy"]["reason"]
    before, replies = traffic.calls(), traffic.send(500)
    assert 500 <= traffic.calls() - before <= 515  # but for trials
    assert max(seconds for seconds, *_ in replies) < 12 * SERVICE
    calls = itertools.count()
    traffic.pool_seconds = lambda size: SERVICE * (1000 if next(calls) == 100 else 1)
    seconds = sorted(seconds for seconds, *_ in traffic.send(400))
    assert seconds[-2] < 12 * SERVICE
    assert 30 * SERVICE < seconds[-1] < (30 + 12) * SERVICE


@pytest.mark.slow
def test_copies_are_tried_again():
    traffic, stop = slow_queries()
    stop()
    traffic.share, tried, learned = 0.05, 0, traffic.batcher._approximations
    assert not learned.setting.hedges
    while not learned.setting.hedges:
        traffic.send(500)
        tried += 1
    assert tried < 20
    traffic.send(1000)
    tail = np.quantile([seconds for seconds, *_ in traffic.send(1000)], 0.99)
    assert tail < 7 * SERVICE, "11 without copies"
