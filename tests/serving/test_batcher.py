"""The batcher, with workers that answer when the test says so."""

import concurrent.futures
import gc
import threading
import time
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
from batching import (
    BY_MARGIN,
    EXTRAS,
    INTERLEAVED,
    LONG,
    OUT,
    OWN,
    SERVICE,
    SHAPE,
    THRESHOLD,
    WEIGHTS,
    Gates,
    count,
    knowing,
    model,
    queries,
    serving,
    settled,
)

from nercc_jax import Berrut, DevicePool, NeRCC, Replication, Uncoded
from nercc_jax.pools import Fault, Faults
from nercc_jax.pools._clock import WALL
from nercc_jax.serving import (
    BatchingPolicy,
    CodedBatcher,
    Coder,
    DeadlineExceeded,
    InferenceFailed,
    QueueFull,
    ServerClosing,
)
from nercc_jax.serving.adapt._adaptation import BackgroundCalibrator
from nercc_jax.serving.adapt._error_estimator import ErrorEstimator
from nercc_jax.serving.core._health import Health
from nercc_jax.serving.core._queue import Lane, QueryQueue
from nercc_jax.serving.core._request import Request, ScaleMonitor
from nercc_jax.stragglers import TraceLatency

SYSTEMATIC = {
    "interleaved": INTERLEAVED,
    "few more": NeRCC(4, 5, points="interleaved", lambda_dec=0.0),
    "repeated": NeRCC(4, 8, points="repeated", lambda_dec=0.0),
    "replication": Replication(1, 2),
    "replication, groups": Replication(2, 5),
    "uncoded": Uncoded(1),
}


# One query alone goes to a worker as it is, whatever the spline code; of those one has full groups.
ONCE = {"few more": (3,), "repeated": (3,), "interleaved": (1, 100)}


@pytest.mark.parametrize(
    ("batch", "name"),
    [(batch, name) for name in SYSTEMATIC for batch in ONCE.get(name, (1, 3, 100))],
)
def test_answers_are_the_models_own_and_in_order(name, batch):
    # Patience: a thread that waits for its turn is no straggler.
    policy = {"max_batch_size": 4, "straggler_threshold": 1e6, "ordering": True}
    with serving(SYSTEMATIC[name], warm=False, **policy) as batcher:
        x = queries(batch)
        parts = [batcher.submit(x), batcher.submit(x[::-1].copy())]
        for part, wanted in zip(parts, (model(x), model(x)[::-1]), strict=True):
            reply = part.result(LONG)
            assert reply.exact.all()
            assert not reply.reexecuted.any()
            np.testing.assert_allclose(reply.values, wanted, atol=1e-6)
            assert (reply.responded >= 1).all()
            assert (reply.expected_disagreement == 0).all()


@pytest.mark.parametrize("code", [NeRCC(4, 8), Berrut(4, 7)], ids=["NeRCC", "BACC"])
def test_full_groups_are_what_the_code_makes_of_them(code):
    """All coded data points mix queries: the reply is the code's own encode and decode."""
    with serving(code, wait_for=code.num_workers, straggler_threshold=1e3) as batcher:
        x = queries(4)
        reply = batcher.submit(x).result(LONG)
        # The batcher puts queries at alphas of its own order; the code sees them there.
        order = batcher.test_coder._order
        placed = np.empty_like(x)
        placed[order] = x
        answers = model(np.asarray(code.encode(placed)))
        wanted = np.asarray(code.decode(answers, np.ones(code.num_workers, bool)))[order]
        np.testing.assert_allclose(reply.values, wanted, atol=1e-4)
        assert not reply.exact.any()
        assert (reply.responded == code.num_workers).all()
        assert (reply.asked == code.num_workers).all()
        # One by itself needs no code: it goes to one worker, and is exact.
        single = batcher.submit(x[:1]).result(LONG)
        assert single.exact.all()
        np.testing.assert_allclose(single.values, model(x[:1]), atol=1e-6)


def decoded_by_hand(x, missing):
    """What decoding `missing` from all others gives, by the code's own methods."""
    code, number, order = INTERLEAVED, len(x), np.array(OWN[: len(x)])
    smaller = NeRCC(len(x), code.num_workers, points=(code.alpha[order], code.beta))
    answers = model(np.asarray(smaller.encode(x)))
    mask = np.zeros(code.num_workers, bool)
    mask[[*np.delete(order, missing), *EXTRAS[:number]]] = True
    answers[~mask] = np.nan
    return np.asarray(code.decode(answers, mask))[order[missing]]


@pytest.mark.parametrize("number", [4, 3, 2])
def test_a_straggler_is_decoded_from_the_others(number):
    """Of full groups, and of short ones, which get a smaller code on the same workers' points."""
    gates = Gates(SERVICE)
    with serving(
        INTERLEAVED, gates, wait_for=1, straggler_threshold=THRESHOLD, estimator=knowing
    ) as batcher:
        x = queries(number)
        event = gates.hold(x[1])
        reply = batcher.submit(x).result(LONG)
        others = np.delete(np.arange(number), 1)
        assert reply.exact.tolist() == [place != 1 for place in range(number)]
        np.testing.assert_allclose(reply.values[others], model(x[others]), atol=1e-6)
        responded = int(reply.responded[1])
        event.set()
        settled(batcher)
        assert len(batcher.status()["audited"]) == 1
        assert count(batcher, "audit_same") + count(batcher, "audit_other") == 1
        assert count(batcher, "query_decoded") == 1
        assert reply.asked[1] == 2 * number
        # All that was sent but the straggler, unless decoding was earlier than some answers.
        if responded == 2 * number - 1:
            np.testing.assert_allclose(reply.values[1], decoded_by_hand(x, 1), atol=1e-4)


@pytest.mark.parametrize("factor", [1e4, 1e-4])
def test_queries_of_another_scale_are_coded_with_none(factor):
    """Before, they were part of the group, of which little else was left."""
    gates = Gates(SERVICE)
    with serving(
        INTERLEAVED, gates, wait_for=1, straggler_threshold=THRESHOLD, estimator=knowing
    ) as batcher:
        x = queries(3)
        event = gates.hold(x[1])
        odd = batcher.submit(factor * queries(1, seed=7))
        reply = batcher.submit(x).result(LONG)
        event.set()
        assert reply.exact.tolist() == [True, False, True]
        assert reply.asked[1] == 2 * 3  # and not of four queries
        assert odd.result(LONG).exact.all()


def test_of_a_request_only_the_query_of_another_scale_makes_it_odd():
    """Each query has its own scale, which is compared with the usual one of all."""
    monitor = ScaleMonitor()
    usual = queries(40)
    assert not any(monitor.is_odd(x[None]) for x in usual)
    assert not monitor.is_odd(usual[:2])
    assert monitor.is_odd(np.stack([usual[0], 1e4 * usual[1]]))
    assert monitor.is_odd(np.stack([usual[0], 1e-4 * usual[1]]))
    assert not monitor.is_odd(usual)


def test_all_answers_but_the_stragglers_are_waited_for():
    gates = Gates(SERVICE)
    with serving(INTERLEAVED, gates, wait_for=7, straggler_threshold=THRESHOLD) as batcher:
        x = queries(4)
        event = gates.hold(x[2])
        reply = batcher.submit(x).result(LONG)
        assert reply.responded[2] == 7
        np.testing.assert_allclose(reply.values[2], decoded_by_hand(x, 2), atol=1e-4)
        event.set()


@pytest.mark.parametrize("known", [False, True])
def test_what_is_expected_to_be_wrong_is_sent_again(known):
    """Nothing is known of the error, or it is known to be too large: the query is executed anew."""

    def estimator(coder):
        made = ErrorEstimator(coder)
        if known:
            made.calibrate(lambda x: jnp.tanh(20 * x @ WEIGHTS), queries(400))
        return made

    gates = Gates(SERVICE)
    with serving(
        INTERLEAVED,
        gates,
        estimator=estimator,
        max_disagreement=0.01,
        straggler_threshold=THRESHOLD,
    ) as batcher:
        x = queries(4)
        event = gates.hold(x[0], calls=1)
        reply = batcher.submit(x).result(LONG)
        assert reply.exact.all()
        assert reply.reexecuted.tolist() == [True, False, False, False]
        np.testing.assert_allclose(reply.values, model(x), atol=1e-6)
        assert count(batcher, "reexecution") == count(batcher, "query_reexecuted") == 1
        event.set()
        settled(batcher)


def test_what_is_expected_to_be_right_is_decoded():
    def estimator(coder):
        made = ErrorEstimator(coder)
        made.calibrate(lambda x: jnp.asarray(x) @ WEIGHTS + jnp.array([9.0, 0, 0]), queries(400))
        return made

    gates = Gates(SERVICE)
    with serving(
        INTERLEAVED,
        gates,
        estimator=estimator,
        max_disagreement=0.05,
        straggler_threshold=THRESHOLD,
    ) as batcher:
        x = queries(4)
        event = gates.hold(x[0])
        reply = batcher.submit(x).result(LONG)
        assert reply.exact.tolist() == [False, True, True, True]
        assert 0 < reply.expected_disagreement[0] <= 0.05
        assert reply.expected_error[0] > 0
        event.set()


def of_two_kinds(even, odd):
    """16 queries, much alike: the even ones with about this margin, the odd ones with the other."""
    some = queries(400, seed=7)
    first, second = np.sort(model(some), axis=1)[:, :-3:-1].T
    noise = 1e-3 * np.random.default_rng(8).normal(size=(16, *SHAPE))
    kinds = some[[np.argmin(np.abs(first - second - margin)) for margin in (even, odd)] * 8]
    return (kinds + noise).astype(np.float32)


@pytest.mark.parametrize("budget", [None, 0.5, 0.0])
def test_each_query_is_judged_by_itself(budget, monkeypatch):
    """Two of one batch, decoded from the same workers: the uncertain one is sent again."""
    monkeypatch.setattr(ErrorEstimator, "error_probability", lambda self, queries: BY_MARGIN)
    gates = Gates(SERVICE)
    policy = {"max_disagreement": 0.1, "max_reexecution": budget}
    with serving(
        INTERLEAVED, gates, workers=8, max_batch_size=2, straggler_threshold=THRESHOLD, **policy
    ) as batcher:
        x = of_two_kinds(2.0, 0.0)
        event = gates.hold(x[2], calls=1)
        reply = batcher.submit(x).result(LONG)
        others = np.delete(np.arange(16), [2, 3])
        assert reply.exact[others].all()
        assert not reply.exact[2], "what is sure is not sent again"
        assert 0 < reply.expected_disagreement[2] < 0.5
        assert reply.exact[3] == reply.reexecuted[3] == (budget != 0)
        assert (reply.expected_disagreement[3] > 0.5) == (budget == 0), "it says how uncertain"
        assert np.abs(reply.values - model(x)).max() < 0.1
        assert count(batcher, "reexecution") == (budget != 0)
        assert count(batcher, "over_budget") == (budget == 0)
        event.set()
        settled(batcher)
        audits = count(batcher, "audit_same") + count(batcher, "audit_other")
        assert audits == 1 + (budget == 0), "what was given out is compared with what comes late"


@pytest.mark.parametrize("uncertain", [2, 3])
def test_a_budget_for_one_is_spent_on_the_more_uncertain(uncertain, monkeypatch):
    monkeypatch.setattr(ErrorEstimator, "error_probability", lambda self, queries: BY_MARGIN)
    gates = Gates(SERVICE)
    # 24 queries have come before these 16: that is worth 1.2 of them.
    policy = {"max_disagreement": 0.1, "max_reexecution": 0.03, "max_batch_size": 2}
    with serving(INTERLEAVED, gates, workers=8, straggler_threshold=THRESHOLD, **policy) as batcher:
        x = of_two_kinds(*((0.0, 0.06) if uncertain == 2 else (0.06, 0.0)))
        event = gates.hold(x[2], calls=1)
        reply = batcher.submit(x).result(LONG)
        event.set()
        assert np.flatnonzero(reply.reexecuted).tolist() == [uncertain]
        other = 5 - uncertain
        assert not reply.exact[other]
        assert reply.expected_disagreement[other] > 0.5, "it is uncertain, too"
        assert count(batcher, "reexecution") == count(batcher, "over_budget") == 1


def test_what_cannot_be_decoded_is_sent_again_whatever_the_budget():
    gates = Gates(SERVICE)
    with serving(
        Uncoded(1), gates, straggler_threshold=THRESHOLD, max_reexecution=0.0, max_disagreement=0.1
    ) as batcher:
        x = queries(1)
        event = gates.hold(x[0], calls=1)
        assert batcher.submit(x).result(LONG).exact.all()
        event.set()
    # Nothing is known of the code's answers either, and nobody but the own workers answers.
    with serving(
        Replication(2, 4), gates, straggler_threshold=THRESHOLD, max_reexecution=0.0
    ) as batcher:
        x = queries(2)
        events = [gates.hold(x[0], calls=2)]
        assert batcher.submit(x).result(LONG).exact.all()
        for event in events:
            event.set()


def test_alike_queries_are_coded_together():
    """Of two kinds that come four by four, groups of one kind are decoded well, mixed ones badly.

    As they come, a group has one query of each four.
    """
    code, kinds = NeRCC(4, 8), np.repeat([[2.0], [-2.0]], 6, axis=1).astype(np.float32)
    x = np.tile(np.repeat(kinds, 4, axis=0), (2, 1)) + 1e-2 * queries(16)
    errors = {}
    for ordering in (False, True):
        policy = {"ordering": ordering, "wait_for": 8, "straggler_threshold": 1e3, "warm": False}
        with serving(code, workers=8, max_batch_size=4, **policy) as batcher:
            reply = batcher.submit(x).result(LONG)
            assert not reply.exact.any()
            errors[ordering] = np.abs(reply.values - model(x)).max()
            assert count(batcher, "order_seconds") == ordering
    assert errors[True] < 0.05 < errors[False]


def test_without_hedging_a_straggler_is_waited_for():
    gates = Gates()
    with serving(Uncoded(1), gates, copies=1, straggler_threshold=3.0) as batcher:
        x = queries(1)
        event = gates.hold(x[0])
        future = batcher.submit(x)
        with pytest.raises(TimeoutError):
            future.result(0.3)
        event.set()
        assert future.result(LONG).exact.all()
        assert sum((each == x[0]).all() for each in gates.calls) == 1


def test_exact_queries_are_hedged_and_never_decoded():
    gates = Gates()
    with serving(INTERLEAVED, gates, wait_for=1, straggler_threshold=3.0) as batcher:
        x = queries(4)
        event = gates.hold(x[0], calls=1)
        reply = batcher.submit(x, exact=True).result(LONG)
        assert reply.exact.all()
        np.testing.assert_allclose(reply.values, model(x), atol=1e-6)
        event.set()


def calls_of(gates, x):
    """Which of these queries workers were called with, in turn; other calls are left out."""
    found = [np.flatnonzero((np.abs(x - call[0]) < 1e-6).all(axis=1)) for call in [*gates.calls]]
    return [int(each[0]) for each in found if len(each)]


def test_exact_queries_take_their_turn():
    """Who came first goes first, exact or not: neither starves the other."""
    gates = Gates()
    code = NeRCC(1, 2, points="interleaved", lambda_dec=0.0)
    with serving(code, gates, workers=1, copies=1, straggler_threshold=1e6) as batcher:
        x = queries(10)
        gates.calls.clear()
        event = gates.hold(x[0])
        futures = [batcher.submit(x[:1])]
        while not gates.calls:
            time.sleep(0.001)
        exact = [False, True, True, False, True, True, True, False, True]
        for each, alone in zip(x[1:], exact, strict=True):
            futures.append(batcher.submit(each[None], exact=alone))
        event.set()
        for future in futures:
            future.result(LONG)
        assert list(dict.fromkeys(calls_of(gates, x))) == list(range(10))


@pytest.mark.parametrize(
    ("lead", "kinds", "expected"),
    [
        # o: ordinary, h: of high priority, H: and exact. All come within the lead.
        (LONG, "oohoHo", [2, 4, 0, 1, 3, 5]),
        # None does, since it is nothing; or the ordinary ones have waited for longer.
        (0.0, "oohoHo", [0, 1, 2, 3, 4, 5]),
        (0.3, "oo-hoHo", [0, 1, 2, 4, 3, 5]),
    ],
)
@pytest.mark.parametrize("code", [NeRCC(1, 2, points="interleaved", lambda_dec=0.0), Uncoded(1)])
def test_queries_of_high_priority_go_ahead_but_nobody_starves(lead, kinds, expected, code):
    gates = Gates()
    policy = {"priority_lead_s": lead, "copies": 1, "straggler_threshold": 1e6}
    with serving(code, gates, workers=1, **policy) as batcher:
        x = queries(7)
        event = gates.hold(x[6])
        futures = [batcher.submit(x[6:])]
        while 6 not in calls_of(gates, x):
            time.sleep(0.001)
        for kind in kinds:
            if kind == "-":
                time.sleep(2 * lead)
                continue
            each = x[len(futures) - 1 : len(futures)]
            futures.append(batcher.submit(each, high=kind in "hH", exact=kind == "H"))
        event.set()
        for future in futures:
            future.result(LONG)
        assert list(dict.fromkeys(calls_of(gates, x))) == [6, *expected]
        highest = [number for what, number in batcher.test_seen if what == "high_priority"]
        assert highest == [1, 1]


def test_what_is_sent_again_goes_ahead_of_high_priority():
    first, high = (
        Request(queries(3), np.zeros((3, 3)), 0.0, 1.0, False, lead) for lead in (0.0, 1.0)
    )
    lanes = QueryQueue(6)
    assert lanes.reserve(6)
    lanes.add(first)
    again = lanes.pop(lanes.coded, 2)
    lanes.add(high)
    lanes.resend(again)
    order = []
    while lane := lanes.next_lane():
        order += lanes.pop(lane, 1)
    assert order == [*again, *high.queries, first.queries[2]]
    assert lanes.waiting == 0


def test_a_stream_of_high_priority_leaves_an_ordinary_query_its_turn():
    """However fast they come: it waits for those of the lead, and no others."""
    lane = Lane()
    ordinary = Request(queries(1), np.zeros((1, 3)), time.monotonic(), 1.0, False)
    lane.add(ordinary)
    taken = []
    for number in range(1, 100):
        high = Request(queries(1), np.zeros((1, 3)), time.monotonic(), 1.0, False, lead=1.0)
        high.arrived = ordinary.arrived + number / 10
        high.turn = high.arrived - 1.0
        lane.add(high)
        taken.append(lane.pop(1)[0].request)
    assert taken.index(ordinary) in (9, 10)  # rounding


def test_batches_grow_while_workers_are_busy():
    gates = Gates()
    with serving(Uncoded(1), gates, workers=1, max_batch_size=8, copies=1) as batcher:
        x = queries(16)
        gates.calls.clear()
        event = gates.hold(x[0])
        first = batcher.submit(x[:1])
        while not gates.calls:
            time.sleep(0.001)
        rest = [batcher.submit(each[None]) for each in x[1:]]
        event.set()
        for future, wanted in zip([first, *rest], model(x), strict=True):
            np.testing.assert_allclose(future.result(LONG).values[0], wanted, atol=1e-6)
        assert [len(call) for call in gates.calls] == [1, 8, 4, 2, 1]


# What is refused, and what ends without an answer.


@pytest.mark.parametrize(
    ("x", "what"),
    [
        (np.zeros((0, 6), np.float32), "B of 1 or more"),
        (np.zeros((2, 5), np.float32), r"shape \(B, 6\)"),
        (np.zeros(6, np.float32), r"shape \(B, 6\)"),
        (np.zeros((2, 6), int), "int64"),
        (np.array([[0.0] * 6, [np.nan] * 6]), r"queries \[1\] are not finite"),
        (np.full((1, 6), 1e39), r"queries \[0\] are not finite in float32"),
    ],
)
def test_bad_queries(x, what, untyped):
    with serving(Uncoded(1), warm=False) as batcher, pytest.raises(ValueError, match=what):
        batcher.submit(x)


def test_bad_deadlines_and_policies(untyped):
    with serving(Uncoded(1), warm=False) as batcher:
        for deadline in (0, -1, np.nan, np.inf, 3601.0, 9e11):
            with pytest.raises(ValueError, match="positive number of seconds"):
                batcher.submit(queries(1), deadline=deadline)
    for bad in (
        {"max_batch_size": 3},
        {"max_queue_size": 0},
        {"copies": 0},
        {"deadline_s": 0},
        {"deadline_s": 9e11},
        {"straggler_threshold": np.nan},
        {"batch_wait_timeout_s": -1},
        {"max_disagreement": 1.0},
        {"max_reexecution": 1.5},
        {"max_reexecution": float("nan")},
    ):
        with pytest.raises(ValueError, match=str(next(iter(bad)))):
            BatchingPolicy(**bad)
    with (
        pytest.raises(ValueError, match="from 1 to N = 8, not 9"),
        serving(INTERLEAVED, wait_for=9),
    ):
        pass


def test_a_full_queue_refuses_at_once_and_then_takes_again():
    gates = Gates()
    with serving(Uncoded(1), gates, workers=1, max_queue_size=4, copies=1) as batcher:
        x = queries(8)
        event = gates.hold(x[0])
        first = batcher.submit(x[:1])
        while batcher.waiting:
            time.sleep(0.001)
        waiting = batcher.submit(x[1:5])
        with pytest.raises(QueueFull, match="4 queries wait and 1 more came; the queue holds 4"):
            batcher.submit(x[5:6])
        with pytest.raises(QueueFull):
            batcher.submit(x[:5])
        event.set()
        first.result(LONG)
        waiting.result(LONG)
        batcher.submit(x[5:8]).result(LONG)
        assert count(batcher, "request_queue_full") == 2


def test_a_full_queue_has_room_for_high_priority():
    lanes = QueryQueue(4)
    assert lanes.reserve(4)
    assert not lanes.reserve(1)
    assert lanes.reserve(1, high=True), "a quarter more"
    assert not lanes.reserve(1, high=True)
    gates = Gates()
    with serving(Uncoded(1), gates, workers=1, max_queue_size=1, copies=1) as batcher:
        event = gates.hold(queries(1)[0])
        first = batcher.submit(queries(1))
        while batcher.waiting:
            time.sleep(0.001)
        waiting = batcher.submit(queries(2)[1:])
        with pytest.raises(QueueFull):
            batcher.submit(queries(2)[:1])
        high = batcher.submit(queries(2)[:1], high=True)
        event.set()
        for future in (first, waiting, high):
            future.result(LONG)


@pytest.mark.parametrize("spare", [8, 1, 0])
def test_redundancy_slows_nobody_down(spare, monkeypatch):
    """The first of what would be sent, while others have something in hand."""
    gates = Gates()
    policy = {"batch_wait_timeout_s": LONG, "straggler_threshold": 1e6}  # nothing is sent again
    with serving(INTERLEAVED, gates, estimator=knowing, **policy) as batcher:
        monkeypatch.setattr(
            batcher._scheduler._pool._scheduler._queue, "_capacity", lambda busy: float(spare)
        )
        x = queries(4)
        events = [gates.hold(each) for each in x]
        future = batcher.submit(x)
        while not any(group.cells[0].x is None for group in batcher._scheduler._dispatcher.groups):
            time.sleep(0.001)  # until all is sent
        (group,) = batcher._scheduler._dispatcher.groups
        sent = np.flatnonzero(group.sent).tolist()
        for event in events:
            event.set()
        future.result(LONG)
        assert sent == sorted([*OWN, *EXTRAS[:spare]])


def test_all_answers_are_wanted_only_while_there_is_time_to_learn():
    def do_nothing(*_):
        pass

    tutor = BackgroundCalibrator(ErrorEstimator(Coder(INTERLEAVED)), do_nothing, WALL)
    assert tutor.needs_samples(4)
    assert not tutor.needs_samples(1)
    tutor.add_group(np.zeros((8, 3)), np.zeros((4, 3)))  # it has not begun
    assert not tutor.needs_samples(4)


def test_deadlines_say_so_and_leave_nothing_behind():
    gates = Gates()
    with serving(Uncoded(1), gates, workers=1, copies=1) as batcher:
        x = queries(6)
        event = gates.hold(x[0])
        first = batcher.submit(x[:1])
        late = batcher.submit(x[1:4], deadline=0.1)
        with pytest.raises(DeadlineExceeded, match=r"within 0\.1 s: \d queries wait, 0 of 1"):
            late.result(LONG)
        assert batcher.waiting == 0
        event.set()
        first.result(LONG)
        batcher.submit(x[4:]).result(LONG)
        assert not any((call == x[1]).all() for call in gates.calls), "it was sent all the same"
        settled(batcher)


def test_cancelled_requests_are_not_sent():
    gates = Gates()
    with serving(Uncoded(1), gates, workers=1, copies=1) as batcher:
        x = queries(3)
        event = gates.hold(x[0])
        first = batcher.submit(x[:1])
        while batcher.waiting:
            time.sleep(0.001)
        second = batcher.submit(x[1:])
        assert second.cancel()
        while batcher.in_flight > 1:
            time.sleep(0.001)
        assert batcher.waiting == 0
        event.set()
        first.result(LONG)
        settled(batcher)
        assert count(batcher, "request_cancelled") == 1
        assert not any((call == x[1]).all() for call in gates.calls)


def test_a_model_that_fails_says_why():
    def fails(batch):
        if (batch[:, 0] > 1.5).any():
            raise RuntimeError("no such thing")
        return model(batch)

    with serving(INTERLEAVED, fails) as batcher:
        bad = queries(1)
        bad[0, 0] = 2.0
        with pytest.raises(InferenceFailed, match="no such thing"):
            batcher.submit(bad, exact=True).result(LONG)
        assert batcher.submit(queries(1)).result(LONG).exact.all()
        settled(batcher)


def test_closing_answers_what_was_accepted():
    gates = Gates()
    with DevicePool(gates, 2, compiled=False) as pool:
        batcher = CodedBatcher(pool, Coder(INTERLEAVED), SHAPE, OUT)
        x = queries(6)
        event = gates.hold(x[0])
        futures = [batcher.submit(each[None]) for each in x]
        threading.Timer(0.3, event.set).start()
        batcher.close(drain=LONG)
        for future, wanted in zip(futures, model(x), strict=True):
            np.testing.assert_allclose(future.result(0).values[0], wanted, atol=1e-6)
        with pytest.raises(ServerClosing, match="no more requests"):
            batcher.submit(x)


def test_closing_tells_those_that_waited_too_long():
    gates = Gates()
    with DevicePool(gates, 1, compiled=False) as pool:
        batcher = CodedBatcher(pool, Coder(Uncoded(1)), SHAPE, OUT)
        event = gates.hold(queries(1)[0])
        futures = [batcher.submit(queries(1)), batcher.submit(queries(2))]
        batcher.close()
        for future in futures:
            with pytest.raises(ServerClosing, match="shut down before"):
                future.result(0)
        event.set()


def test_all_workers_gone_and_back():
    """While all die of what they get requests fail, and say why; then all are answered again."""
    dying = threading.Event()
    dying.set()

    def deadly(batch):
        if dying.is_set():
            raise SystemExit  # the worker's thread ends
        return model(batch)

    with serving(INTERLEAVED, deadly, workers=2, warm=False) as batcher:
        replies = [batcher.submit(each[None]) for each in queries(12)]
        for future in replies:
            assert isinstance(future.exception(LONG), InferenceFailed)
            assert "thread ended" in str(future.exception())
        dying.clear()
        for each in queries(12):
            reply = batcher.submit(each[None]).result(LONG)
            np.testing.assert_allclose(reply.values[0], model(each), atol=1e-6)
        assert batcher.health() == Health(True, True)


def test_storm():
    """Stragglers, errors, NaN, deaths: each query gets its own answer, or the reason."""
    faults = Faults(
        [
            Fault("delay", 0.15, latency=TraceLatency(jnp.array([0.05]))),
            Fault("error", 0.02),
            Fault("nan", 0.02),
            Fault("death", 0.005),
        ],
        seed=3,
    )
    with serving(INTERLEAVED, faults=faults, max_batch_size=4, wait_for=1) as batcher:
        x = queries(1500)
        right, wrong, failed = [], [], []

        def client(numbers):
            for number in numbers:
                try:
                    reply = batcher.submit(x[number : number + 1]).result(LONG)
                except InferenceFailed:
                    failed.append(number)
                    continue
                error = np.abs(reply.values[0] - model(x[number : number + 1])[0]).max()
                if reply.exact[0]:
                    (right if error < 1e-5 else wrong).append(number)

        with concurrent.futures.ThreadPoolExecutor(16) as threads:
            list(threads.map(client, np.array_split(np.arange(len(x)), 16)))
        assert not wrong
        assert len(right) > 1000
        assert count(batcher, "query_decoded") > 10
        assert len(failed) < 10
        answered = count(batcher, "request_ok")
        assert answered + len(failed) == len(x)
        settled(batcher)


def test_nothing_of_a_request_outlives_it():
    """Inputs may be large: they must not live until a deadline, or as long as a group lingers."""
    with serving(INTERLEAVED, deadline_s=LONG * 100) as batcher:
        x = queries(4)
        alive = weakref.ref(x)
        batcher.submit(x).result(LONG)
        settled(batcher)
        del x
        gc.collect()
        assert alive() is None
