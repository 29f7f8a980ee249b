"""What becomes of late queries: a row for each sentence of the guide and of `core/decide.py`."""

import itertools
import logging
import math
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from traffic import EXTRAS, INTERLEAVED, OUT, OWN, SERVICE, SHAPE, KnowsAll, Traffic, model

from nercc_jax import Replication, Uncoded
from nercc_jax.pools import Fault, Faults, Overdue
from nercc_jax.pools.times import Call
from nercc_jax.risk import Accuracy, Comparison, Risk
from nercc_jax.serving import BatchingPolicy, Coder
from nercc_jax.serving.adapt._setting_controller import SettingController
from nercc_jax.serving.core._group import Group
from nercc_jax.serving.core._request import Answer, Request
from nercc_jax.serving.core._setup import BatchSpec, Setup
from nercc_jax.serving.core.decide import (
    Copy,
    Decode,
    DispatchSetting,
    Fail,
    GiveOut,
    LateEvidence,
    Predict,
    Wait,
    decide,
)
from nercc_jax.stragglers import TraceLatency, picking
from nercc_jax.testing import SimulatedPool

NOW, LIMIT = 100.0, 1.0
SOON = NOW - LIMIT / 2  # when what is in time was sent: it is late half a limit from now
CODER, ALONE = Coder(INTERLEAVED), Coder(Uncoded(1))
KNOWN = Risk(Accuracy(max_disagreement=0.1), needs_evidence=False)
UNKNOWN = Risk(Accuracy(max_disagreement=0.1), needs_evidence=True)
ANY = Risk(Accuracy(), needs_evidence=False)
BOTH = "predicted", "decoded"
SURE, DECODED, UNSURE, DOUBTED = (
    Answer(np.zeros(1), source, 8, 7, probability, math.nan, within=probability < 0.1)
    for probability in (0.01, 0.9)
    for source in BOTH
)
FIRST = (0, 0)


def group_of(coder, kind, queries, failed, trial, sent):
    """A group of one query in each cell; these coded data points fail."""
    group = Group(coder, kind, 0.0, trial=trial)
    group.layout = coder.layout(len(queries))
    for query in queries:
        group.add([query])
    times = SimpleNamespace(limit=lambda rows: LIMIT, median=lambda rows: 0.8)
    fails = failed.__contains__
    group.batch = SimpleNamespace(times=times, lost=fails, abandoned=fails)  # pyright: ignore
    group.sent_at[:] = sent or SOON
    return group


def query_of(exact=False, estimates=(), **state):
    (query,) = Request(np.zeros((1, *SHAPE), np.float32), np.zeros(1), 0.0, 1.0, exact).queries
    query.approximate = {answer.source: answer for answer in estimates}
    for name, each in state.items():
        setattr(query, name, each)
    return query


PROMISE, NOTHING = BatchingPolicy(max_disagreement=0.1), BatchingPolicy()
WAITS = BatchingPolicy(copies=1, max_disagreement=0.1)
PREDICTED, SOURCES, SOME = frozenset({"predicted"}), frozenset(BOTH), EXTRAS[:2]


def becomes(
    *expected, policy=PROMISE, risk=KNOWN, limit=0.1, copies=1, hedges=True, predicts=False,
    approximates=True, late=(0,), failed=(), open=(0,), extras=EXTRAS, estimates=(), copied=False,
    exact=False, looked=(), alone=False, trial=False, sent=None,
):  # fmt: skip
    """What is decided on a full group, what was looked at, what is known, and the policy.

    Its queries in `open` are not answered: in time, or late, or failed. All others are, and the
    redundancy in `extras`, which is in time if it is not answered. Estimates are those of all
    queries, or of each, and `looked` the sources that were asked. Or a query is alone in its group.
    """
    setting = DispatchSetting(Overdue(copies=copies), "always", hedges)
    risks = {"decoded": risk, "predicted": risk}
    evidence = LateEvidence(setting, approximates, predicts, limit, risks)
    if alone:
        group = group_of(ALONE, "alone", [query_of()], failed, trial, sent)
        return group, looked, evidence, policy, [*expected]
    of_each = estimates if isinstance(estimates, dict) else dict.fromkeys(range(4), estimates)
    queries = [
        query_of(exact, of_each[each], reexecuted=copied, done=each not in open)
        for each in range(4)
    ]
    group = group_of(CODER, "coded", queries, [OWN[each] for each in failed], trial, sent)
    group.mask[[OWN[each] for each in range(4) if each not in open]] = True
    group.mask[[*extras]] = True
    if sent is None:
        group.sent_at[[OWN[each] for each in late]] = 0.0
    return group, looked, evidence, policy, [*expected]


THEN = Wait(SOON + LIMIT)  # when what is in time would be late
NEVER = Wait(math.inf)
AGAIN = Copy([FIRST], 1), NEVER
# All sources were asked, and the query goes out again if it may.
ASKED = {"looked": SOURCES}
LONG_AGO = NOW - 2 * LIMIT
HUNG = Wait(LONG_AGO + picking.PICKING.hung * 0.8)  # when a worker may hang

TABLE = {
    "while its own worker is in time, a query waits": becomes(THEN, late=()),
    "what is late is predicted first": becomes(Predict([FIRST]), predicts=True),
    "without a surrogate it is decoded": becomes(Decode([FIRST])),
    "and where the surrogate is not sure": becomes(
        Decode([FIRST]), predicts=True, estimates=[UNSURE], looked=PREDICTED
    ),
    "a prediction that is sure is given out": becomes(
        GiveOut(FIRST, "predicted"), NEVER, predicts=True, estimates=[SURE], looked=PREDICTED
    ),
    "but not once the surrogate has drifted": becomes(*AGAIN, estimates=[SURE], **ASKED),
    "a decoded answer that is good enough is given out": becomes(
        GiveOut(FIRST, "decoded"), NEVER, estimates=[DECODED], **ASKED
    ),
    "else it waits for further answers": becomes(THEN, estimates=[DOUBTED], extras=SOME, **ASKED),
    "and is sent again if none can come": becomes(*AGAIN, estimates=[DOUBTED], **ASKED),
    "to several workers at once if the setting says so": becomes(
        Copy([FIRST], 2), NEVER, copies=2, **ASKED
    ),
    "what has no answer is sent again all the same": becomes(*AGAIN, **ASKED),
    "but once only": becomes(NEVER, copied=True, **ASKED),
    "each query is judged by itself": becomes(
        *(GiveOut(FIRST, "decoded"), Copy([(1, 0)], 1), NEVER),
        late=(0, 1),
        open=(0, 1),
        estimates={0: [DECODED], 1: [DOUBTED], 2: (), 3: ()},
        **ASKED,
    ),
    "nothing is given out before stragglers have shown that it is right": becomes(
        *AGAIN, risk=UNKNOWN, estimates=[SURE, DECODED], **ASKED
    ),
    "but decoded for comparison, when no further answer can come": becomes(
        Decode([FIRST]), risk=UNKNOWN, limit=-1.0
    ),
    "and not before": becomes(THEN, risk=UNKNOWN, limit=-1.0, extras=SOME),
    "all answers are exact where outputs are values without a tolerance": becomes(
        *AGAIN, approximates=False, policy=BatchingPolicy(outputs="values")
    ),
    "an exact query in a group waits for no others": becomes(
        *(Copy([FIRST], 1), THEN),
        open=(0, 1),
        exact=True,
        predicts=True,
        estimates=[SURE, DECODED],
        **ASKED,
    ),
    "without a promise the number of answers decides": becomes(
        Decode([FIRST]), risk=ANY, policy=NOTHING, extras=EXTRAS[:3]
    ),
    "and fewer wait": becomes(THEN, risk=ANY, policy=NOTHING, extras=SOME),
    "what failed is decoded or sent again at once": becomes(*AGAIN, late=(), failed=(0,), **ASKED),
    "without hedging, stragglers are waited for": becomes(NEVER, policy=WAITS, **ASKED),
    "but not what has failed": becomes(*AGAIN, late=(), failed=(0,), policy=WAITS, **ASKED),
    "where copies are as slow as what they copy, none is sent": becomes(
        HUNG, hedges=False, sent=LONG_AGO, **ASKED
    ),
    "except for a trial": becomes(
        *(Copy([FIRST], 1), HUNG), hedges=False, sent=LONG_AGO, trial=True, **ASKED
    ),
    "and of what may hang": becomes(*AGAIN, hedges=False, **ASKED),
    "an exact query waits for its worker": becomes(NEVER, alone=True),
    "and fails once no worker has an answer": becomes(Fail([FIRST]), alone=True, failed=(0,)),
}


@pytest.mark.parametrize("sentence", TABLE)
def test_decisions(sentence):
    group, looked, evidence, policy, expected = TABLE[sentence]
    assert decide(group, NOW, evidence, policy, looked) == expected


# -- Settings that are picked by the tail ----------------------------------------------------------


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


def test_what_was_foreseen_and_did_not_come_true_is_given_up_and_tried_again_later():
    looks = Looks(2.2)
    assert looks.look(0.05).redundancy == "always"
    # Workers are busy, hardly a copy is sent: p99 is many times what was foreseen.
    assert looks.look(0.05, times=8.0).redundancy == "none"
    seen = {looks.look(0.05, times=5.0).redundancy for _ in range(60)}
    assert seen == {"none", "always"}


def test_what_is_decoded_shows_when_it_is_tried():
    looks = Looks(2.2, code=Coder(INTERLEAVED))
    assert looks.look(0.05).redundancy == "always"
    for _ in range(100):  # nothing that is decoded is right
        looks.decoding.add(Comparison(0.01, 0.0, wrong=True, excess=0.0), given=False)
    assert looks.look(0.05, times=3.6).redundancy == "none"


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


@pytest.mark.slow
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
