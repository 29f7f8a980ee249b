"""What becomes of late queries: a row for each sentence of the guide and of `core/decide.py`."""

import math

import numpy as np
import pytest
from batching import EXTRAS, INTERLEAVED, OWN

from nercc_jax import Uncoded
from nercc_jax.pools import Overdue
from nercc_jax.risk import Accuracy, Risk
from nercc_jax.serving import BatchingPolicy, Coder
from nercc_jax.serving.core.decide import (
    Answer,
    Copy,
    Decode,
    DispatchSetting,
    Fail,
    GiveOut,
    GroupView,
    LateEvidence,
    Predict,
    QueryView,
    Wait,
    decide,
)
from nercc_jax.stragglers import picking

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


def of(
    late=(0,), failed=(), open=(0,), extras=EXTRAS, estimates=(), copied=False, exact=False, **more
):
    """A full group whose queries in `open` are not answered: in time, or late, or failed.

    All others are, and the redundancy in `extras`, which is in time if it is not answered.
    """
    sent_at, answered = np.full(8, SOON), np.zeros(8, bool)
    answered[[OWN[each] for each in range(4) if each not in open]] = True
    answered[[*extras]] = True
    sent_at[[OWN[each] for each in late]] = 0.0
    failed_points = np.isin(np.arange(8), [OWN[each] for each in failed])
    queries = tuple(QueryView((each, 0), copied, exact, tuple(estimates)) for each in open)
    own = tuple(np.array([point]) for point in OWN)
    parts = sent_at, answered, failed_points, queries
    return GroupView(CODER, own, *parts, LIMIT, median=0.8, **more)


def alone(failed):
    each = np.array([SOON]), np.zeros(1, bool), np.array([failed])
    return GroupView(ALONE, (np.array([0]),), *each, (QueryView(FIRST),), LIMIT, 0.8, alone=True)


def known(risk=KNOWN, limit=0.1, copies=1, hedges=True, **more):
    setting = DispatchSetting(Overdue(copies=copies), "always", hedges)
    risks = {"decoded": risk, "predicted": risk}
    return LateEvidence(setting, **{"approximates": True, "limit": limit, "risk": risks} | more)


PROMISE, NOTHING = BatchingPolicy(max_disagreement=0.1), BatchingPolicy()
SOURCES, SOME = frozenset({"predicted", "decoded"}), EXTRAS[:2]
THEN = Wait(SOON + LIMIT)  # when what is in time would be late
NEVER = Wait(math.inf)
AGAIN = [Copy([FIRST], 1), NEVER]
LEAST = picking.PICKING.hung * 0.8  # seconds after which a worker may hang

TABLE = {
    "while its own worker is in time, a query waits": (of(late=()), known(), PROMISE, [THEN]),
    "what is late is predicted first": (of(), known(predicts=True), PROMISE, [Predict([FIRST])]),
    "without a surrogate it is decoded": (of(), known(), PROMISE, [Decode([FIRST])]),
    "and where the surrogate is not sure": (
        of(estimates=[UNSURE], looked=frozenset({"predicted"})),
        known(predicts=True),
        PROMISE,
        [Decode([FIRST])],
    ),
    "a prediction that is sure is given out": (
        of(estimates=[SURE], looked=frozenset({"predicted"})),
        known(predicts=True),
        PROMISE,
        [GiveOut(FIRST, "predicted"), NEVER],
    ),
    "but not once the surrogate has drifted": (
        of(estimates=[SURE], looked=SOURCES),
        known(),
        PROMISE,
        AGAIN,
    ),
    "a decoded answer that is good enough is given out": (
        of(estimates=[DECODED], looked=SOURCES),
        known(),
        PROMISE,
        [GiveOut(FIRST, "decoded"), NEVER],
    ),
    "else it waits for further answers": (
        of(estimates=[DOUBTED], looked=SOURCES, extras=SOME),
        known(),
        PROMISE,
        [THEN],
    ),
    "and is sent again if none can come": (
        of(estimates=[DOUBTED], looked=SOURCES),
        known(),
        PROMISE,
        AGAIN,
    ),
    "to several workers at once if the setting says so": (
        of(looked=SOURCES),
        known(copies=2),
        PROMISE,
        [Copy([FIRST], 2), NEVER],
    ),
    "what has no answer is sent again all the same": (of(looked=SOURCES), known(), PROMISE, AGAIN),
    "but once only": (of(looked=SOURCES, copied=True), known(), PROMISE, [NEVER]),
    "each query is judged by itself": (
        of(late=(0, 1), open=(0, 1), looked=SOURCES)._replace(
            queries=(QueryView(FIRST, answers=(DECODED,)), QueryView((1, 0), answers=(DOUBTED,)))
        ),
        known(),
        PROMISE,
        [GiveOut(FIRST, "decoded"), Copy([(1, 0)], 1), NEVER],
    ),
    "nothing is given out before stragglers have shown that it is right": (
        of(estimates=[SURE, DECODED], looked=SOURCES),
        known(UNKNOWN),
        PROMISE,
        AGAIN,
    ),
    "but decoded for comparison, when no further answer can come": (
        of(),
        known(UNKNOWN, limit=-1.0),
        PROMISE,
        [Decode([FIRST])],
    ),
    "and not before": (of(extras=SOME), known(UNKNOWN, limit=-1.0), PROMISE, [THEN]),
    "all answers are exact where outputs are values without a tolerance": (
        of(),
        known(approximates=False),
        BatchingPolicy(outputs="values"),
        AGAIN,
    ),
    "an exact query in a group waits for no others": (
        of(late=(0,), open=(0, 1), exact=True, estimates=[SURE, DECODED], looked=SOURCES),
        known(predicts=True),
        PROMISE,
        [Copy([FIRST], 1), THEN],
    ),
    "without a promise the number of answers decides": (
        of(extras=EXTRAS[:3]),
        known(ANY),
        NOTHING,
        [Decode([FIRST])],
    ),
    "and fewer wait": (of(extras=SOME), known(ANY), NOTHING, [THEN]),
    "what failed is decoded or sent again at once": (
        of(late=(), failed=(0,), looked=SOURCES),
        known(),
        PROMISE,
        AGAIN,
    ),
    "without hedging, stragglers are waited for": (
        of(looked=SOURCES),
        known(),
        BatchingPolicy(copies=1, max_disagreement=0.1),
        [NEVER],
    ),
    "but not what has failed": (
        of(late=(), failed=(0,), looked=SOURCES),
        known(),
        BatchingPolicy(copies=1, max_disagreement=0.1),
        AGAIN,
    ),
    "where copies are as slow as what they copy, none is sent": (
        of(looked=SOURCES)._replace(sent_at=np.full(8, NOW - 2 * LIMIT)),
        known(hedges=False),
        PROMISE,
        [Wait(NOW - 2 * LIMIT + LEAST)],
    ),
    "except for a trial": (
        of(looked=SOURCES, trial=True)._replace(sent_at=np.full(8, NOW - 2 * LIMIT)),
        known(hedges=False),
        PROMISE,
        [Copy([FIRST], 1), Wait(NOW - 2 * LIMIT + LEAST)],
    ),
    "and of what may hang": (of(looked=SOURCES), known(hedges=False), PROMISE, AGAIN),
    "an exact query waits for its worker": (alone(False), known(), PROMISE, [NEVER]),
    "and fails once no worker has an answer": (alone(True), known(), PROMISE, [Fail([FIRST])]),
}


@pytest.mark.parametrize("sentence", TABLE)
def test_decisions(sentence):
    group, evidence, policy, expected = TABLE[sentence]
    assert decide(group, NOW, evidence, policy) == expected
