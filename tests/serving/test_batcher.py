"""The batcher before simulated workers: which queries go where, when, and what comes back."""

import itertools
import math
import sys
import threading
import types

import jax.numpy as jnp
import numpy as np
import pytest
from traffic import (
    EXTRAS,
    HELD,
    INTERLEAVED,
    LONG,
    OUT,
    OWN,
    SERVICE,
    SHAPE,
    THRESHOLD,
    WEIGHTS,
    Simulated,
    by_margin,
    model,
    queries,
    serving,
    until,
)

from nercc_jax import DevicePool, NeRCC, Replication, Uncoded
from nercc_jax.pools.clock import WALL
from nercc_jax.risk import Accuracy
from nercc_jax.serving import (
    CodedBatcher,
    Coder,
    Health,
    InferenceFailed,
    Predictor,
    ServerClosing,
    calibrate_decoding,
)
from nercc_jax.serving.core._requests import HealthMonitor

SYSTEMATIC = {
    "interleaved": INTERLEAVED,
    "few more": NeRCC(4, 5, points="interleaved", lambda_dec=0.0),
    "repeated": NeRCC(4, 8, points="repeated", lambda_dec=0.0),
    "replication": Replication(1, 2),
    "replication, groups": Replication(2, 5),
    "uncoded": Uncoded(1),
}
ONE = NeRCC(1, 2, points="interleaved", lambda_dec=0.0)


@pytest.mark.parametrize("name", SYSTEMATIC)
def test_answers_are_the_models_own_and_in_order(name):
    sim = Simulated(SYSTEMATIC[name], warm=False, max_batch_size=4)
    for batch in (1, 3, 100):
        x = queries(batch)
        futures = [sim.submit(x), sim.submit(x[::-1].copy())]
        for future, wanted in zip(futures, (model(x), model(x)[::-1]), strict=True):
            reply = sim.result(future)
            assert reply.exact.all()
            assert not reply.reexecuted.any()
            np.testing.assert_allclose(reply.values, wanted, atol=1e-6)
            assert (reply.responded >= 1).all()
            assert (reply.expected_disagreement == 0).all()


def decoded_by_hand(x, missing):
    """What decoding `missing` from all others gives, by the code's own methods.

    There is a row for each order in which the batcher may put queries into a group.
    """
    code, number, order = INTERLEAVED, len(x), np.array(OWN[: len(x)])
    smaller, found = NeRCC(number, code.num_workers, points=(code.alpha[order], code.beta)), []
    for placed in itertools.permutations(range(number)):
        at = placed.index(missing)
        answers = model(np.asarray(smaller.encode(x[list(placed)])))
        mask = np.zeros(code.num_workers, bool)
        mask[[*np.delete(order, at), *EXTRAS[:number]]] = True
        answers[~mask] = np.nan
        found.append(np.asarray(code.decode(answers, mask))[order[at]])
    return np.stack(found)


@pytest.mark.parametrize("number", [4, 3, 2])
def test_a_straggler_is_decoded_from_the_others(number):
    """Of full groups, and of short ones, which get a smaller code on the same workers' points."""
    sim = Simulated(INTERLEAVED, straggler_threshold=THRESHOLD)
    x = queries(number)
    sim.hold(x[1])
    reply = sim.answer(x)
    others = np.delete(np.arange(number), 1)
    assert reply.exact.tolist() == [place != 1 for place in range(number)]
    np.testing.assert_allclose(reply.values[others], model(x[others]), atol=1e-6)
    assert np.abs(decoded_by_hand(x, 1) - reply.values[1]).max(axis=1).min() < 1e-4
    assert (reply.asked[1], reply.responded[1]) == (2 * number, 2 * number - 1)
    sim.run(2 * HELD)
    assert (
        sim.observed["audit_same"] + sim.observed["audit_other"]
        == sim.observed["query_decoded"]
        == 1
    )


@pytest.mark.parametrize("factor", [1e4, 1e-4])
def test_queries_of_another_scale_are_coded_with_none(factor):
    """Before, they were part of the group, of which little else was left."""
    sim = Simulated(INTERLEAVED, straggler_threshold=THRESHOLD)
    x = queries(4)
    sim.hold(x[1], calls=1)
    assert sim.answer(x).exact.tolist() == [True, False, True, True]
    sim.hold(x[1], calls=1)
    x[0] *= factor
    reply = sim.answer(x)
    assert reply.exact.all()
    assert reply.asked[1] == 1


@pytest.mark.parametrize(
    ("outputs", "limit", "decoded"),
    [
        (None, 0.01, False),  # nothing is known of the error ...
        (lambda x: jnp.tanh(20 * x @ WEIGHTS), 0.01, False),  # ... or it is known to be too large
        (lambda x: jnp.asarray(x) @ WEIGHTS + jnp.array([9.0, 0, 0]), 0.05, True),
    ],
    ids=["unknown", "wrong", "right"],
)
def test_only_what_is_expected_to_be_right_is_decoded(outputs, limit, decoded):
    def decoding(coder):
        return outputs and calibrate_decoding(
            coder, outputs, queries(400), Accuracy(max_disagreement=limit)
        )

    sim = Simulated(
        INTERLEAVED, decoding=decoding, max_disagreement=limit, straggler_threshold=THRESHOLD
    )
    x = queries(4)
    sim.hold(x[0], calls=1)
    reply = sim.answer(x)
    first = [True, False, False, False]
    assert reply.exact.tolist() == np.logical_not(first).tolist() if decoded else reply.exact.all()
    assert reply.reexecuted.tolist() == ([False] * 4 if decoded else first)
    assert sim.observed["reexecution"] == sim.observed["query_reexecuted"] == (not decoded)
    assert (0 < reply.expected_disagreement[0] <= limit) == decoded
    assert np.isnan(reply.expected_error[0]) == decoded, "that is for values"
    exact = reply.exact
    np.testing.assert_allclose(reply.values[exact], model(x)[exact], atol=1e-6)


def of_two_kinds(even, odd):
    """8 queries, much alike: the even ones with about this margin, the odd ones with the other."""
    some = queries(400, seed=7)
    first, second = np.sort(model(some), axis=1)[:, :-3:-1].T
    noise = 1e-3 * np.random.default_rng(8).normal(size=(8, *SHAPE))
    kinds = some[[np.argmin(np.abs(first - second - margin)) for margin in (even, odd)] * 4]
    return (kinds + noise).astype(np.float32)


def test_each_query_is_judged_by_itself():
    """Two of one batch, decoded from the same workers: the uncertain one is sent again."""
    x = of_two_kinds(2.0, 0.0)
    policy = {"max_disagreement": 0.1, "max_batch_size": 2}
    sim = Simulated(
        INTERLEAVED, workers=4, straggler_threshold=THRESHOLD, decoding=by_margin, **policy
    )
    sim.hold(x[2], calls=1)
    reply = sim.answer(x)
    assert reply.exact[np.arange(8) != 2].all()
    assert not reply.exact[2], "what is sure is not sent again"
    assert 0 < reply.expected_disagreement[2] < 0.5
    (again,) = np.flatnonzero(reply.reexecuted)
    assert again % 2 == 1, "of the other kind"
    assert np.abs(reply.values - model(x)).max() < 0.1
    assert sim.observed["reexecution"] == 1
    sim.run(2 * HELD)
    audits = sim.observed["audit_same"] + sim.observed["audit_other"]
    assert audits == 1, "what was given out is compared with what comes late"
    assert any(np.array_equal(batch, x[[2, again]]) or np.array_equal(batch, x[[again, 2]])
               for batch in sim.answered), "both were in one batch"  # fmt: skip


# Whose turn it is.


@pytest.mark.parametrize("code", [ONE, Uncoded(1)])
def test_who_came_first_goes_first_whether_exact_or_not(code):
    sim = Simulated(code, workers=1, copies=1)
    x = queries(10)
    sim.hold(x[9])
    futures = [sim.submit(x[9:])]
    sim.run()
    for place, exact in enumerate((False, True, True, False, True, True, True, False, True)):
        futures.append(sim.submit(x[place : place + 1], exact=exact))
        sim.run(1e-6)
    for future in futures:
        sim.result(future)
    assert list(dict.fromkeys(sim.order(x))) == [9, *range(9)]


def test_what_is_sent_again_goes_ahead_of_what_waits():
    sim = Simulated(Uncoded(1), workers=2, straggler_threshold=THRESHOLD)
    x = queries(12)
    sim.hold(x[0], calls=1)
    futures = [sim.submit(x[:1])]
    sim.run(SERVICE / 100)
    futures += [sim.submit(each[None]) for each in x[1:]]
    for future in futures:
        sim.result(future)
    place = sim.order(x).index(0)
    assert THRESHOLD <= place < len(x) - 1, "before the last of those that waited"


def test_batches_grow_while_workers_are_busy():
    sim = Simulated(Uncoded(1), workers=1, max_batch_size=8, copies=1)
    x = queries(16)
    futures = [sim.submit(x[:1])]
    sim.run()
    futures += [sim.submit(each[None]) for each in x[1:]]
    for future, wanted in zip(futures, model(x), strict=True):
        np.testing.assert_allclose(sim.result(future).values[0], wanted, atol=1e-6)
    assert [len(call) for call in sim.answered] == [1, 8, 4, 2, 1]


@pytest.mark.parametrize(
    ("workers", "spare", "calls"), [(4, 8, 4), (5, 8, 5), (8, 8, 8), (8, 1, 5), (8, 0, 4)]
)
def test_redundancy_slows_nobody_down(workers, spare, calls, monkeypatch):
    """Coded data points go to workers that are free, while there are cores to spare."""
    sim = Simulated(INTERLEAVED, workers=workers, straggler_threshold=1e6)
    monkeypatch.setattr(sim.pool._schedule, "_capacity", lambda busy: float(spare))
    assert sim.answer(queries(4)).exact.all()
    sim.run(10 * SERVICE)
    assert len(sim.answered) == calls


# What is refused, and what ends without an answer.


@pytest.mark.parametrize(
    ("x", "deadline", "what"),
    [
        (np.zeros((0, 4), np.float32), None, "B of 1 or more"),
        (np.zeros((2, 5), np.float32), None, r"shape \(B, 4\)"),
        (np.zeros(4, np.float32), None, r"shape \(B, 4\)"),
        (np.zeros((2, 4), int), None, "int64"),
        (np.array([[0.0] * 4, [np.nan] * 4]), None, r"queries \[1\] are not finite"),
        (np.full((1, 4), 1e39), None, r"queries \[0\] are not finite in float32"),
        *(
            (queries(1), deadline, "positive number of seconds")
            for deadline in (0, -1, np.nan, np.inf, 3601.0)
        ),
    ],
)
def test_bad_queries_and_deadlines_are_refused(x, deadline, what, untyped):
    with pytest.raises(ValueError, match=what):
        Simulated(Uncoded(1), warm=False).submit(x, deadline=deadline)


@pytest.mark.parametrize("drain", [30.0, 0.0])
def test_closing_answers_what_was_accepted_or_says_that_it_was_too_late(drain):
    seen = []
    observe = lambda what, number: seen.append(what)  # noqa: E731
    with DevicePool(model, 2, compiled=False) as pool:
        batcher = CodedBatcher(pool, Coder(INTERLEAVED), SHAPE, OUT, observe=observe)
        x = queries(1000)
        futures = [batcher.submit(each[None]) for each in x]
        batcher.close(drain)
        errors = [future.exception(0) for future in futures]
        if drain:
            values = [future.result(0).values[0] for future in futures]
            np.testing.assert_allclose(values, model(x), atol=1e-6)
        else:
            assert {type(error) for error in errors} - {type(None)} == {ServerClosing}
            assert "shut down before" in str(errors[-1])
        with pytest.raises(ServerClosing, match="no more requests"):
            batcher.submit(x)
        assert seen.count("request_draining") == 1


# -- A failure within the batcher is reported at once, and its health is the truth -----------------


FINE = Health(True, True)


@pytest.mark.parametrize(
    ("workers", "starting", "alarm", "ready", "message"),
    [
        (8, 0, None, True, None),
        (8, 7, None, True, None),
        (8, 8, None, False, "none of 8 workers is ready"),
        (8, 0, "the head is gone", False, "the head is gone"),
    ],
)
def test_it_is_ready_while_a_query_can_be_answered(
    workers, starting, alarm, ready, message, untyped
):
    pool = types.SimpleNamespace(
        trouble=None,
        clock=WALL,
        heartbeat=WALL.now(),
        alarm=alarm,
        report=lambda: types.SimpleNamespace(num_workers=workers, starting=starting),
    )
    health = HealthMonitor(WALL).health(pool, math.inf)
    assert health == Health(True, ready, message)


@pytest.mark.parametrize("step", ["dispatch", "complete", "decide"])
def test_a_step_that_fails_is_reported_at_once_and_the_next_works(step, monkeypatch):
    sim = Simulated(INTERLEAVED, straggler_threshold=1e6)  # nobody straggles
    sim.faultless = False
    sim.hold(queries(4)[0], calls=int(step == "decide"))  # so that something is to be decided
    batcher, left = sim.batcher, [1]
    owner = sys.modules[CodedBatcher.__module__] if step == "decide" else batcher._dispatcher
    whole = getattr(owner, step)

    def fails(*args, **options):
        result = whole(*args, **options) if step == "dispatch" else None
        if left and (step == "decide" or batcher._requests.taken):
            left.pop()
            raise RuntimeError("a bug of ours")
        return result if step == "dispatch" else whole(*args, **options)

    monkeypatch.setattr(owner, step, fails)
    with pytest.raises(InferenceFailed, match="internal error: a bug of ours"):
        sim.answer(queries(4))
    assert sim.observed["internal_error"] == sim.observed["request_failed"] == 1
    np.testing.assert_allclose(sim.answer(queries(4)).values, model(queries(4)), atol=1e-6)
    assert batcher.health() == FINE


def test_a_thread_that_dies_fails_what_is_open_and_what_comes(monkeypatch):
    sim = Simulated(Uncoded(1), warm=False)
    sim.faultless = False
    sim.hold(queries(2)[0])
    future = sim.submit(queries(2))
    sim.run()

    def dies(now):
        raise SystemExit("no memory, say")

    monkeypatch.setattr(sim.batcher, "_handle_due", dies)
    sim.submit(queries(1))
    sim.run()
    with pytest.raises(InferenceFailed, match="the batcher has failed: no memory, say"):
        future.result(0)
    with pytest.raises(InferenceFailed, match="has failed"):
        sim.submit(queries(1))
    assert sim.batcher.health() == Health(False, False, "the batcher has failed: no memory, say")
    assert sim.observed["internal_error"] == 1


def test_a_stuck_thread_is_not_alive(monkeypatch):
    monkeypatch.setattr("nercc_jax.serving.core._requests.STUCK", 0.2)
    monkeypatch.setattr("nercc_jax.pools.clock.BEAT", 0.05)
    release = threading.Event()
    with serving() as batcher:
        until(lambda: batcher.health() == FINE)
        monkeypatch.setattr(batcher, "_handle_due", lambda now: release.wait(LONG))
        until(lambda: not batcher.health().live and not batcher.health().ready)
        assert "is stuck" in str(batcher.health().trouble)
        release.set()
        until(lambda: batcher.health() == FINE)


def test_who_answers_nobody_is_not_ready_until_it_does():
    broken = [False]

    def sometimes(batch):
        if broken[0]:
            raise RuntimeError("out of order")
        return model(batch)

    sim = Simulated(INTERLEAVED, run=sometimes)
    assert sim.batcher.health() == FINE
    broken[0] = True
    for each in queries(4):
        with pytest.raises(InferenceFailed, match="out of order"):
            sim.answer(each[None], exact=True)
    sim.run(2.0)
    health = sim.batcher.health()
    assert (health.live, health.ready) == (True, False)
    assert "3 workers failed" in health.trouble
    broken[0] = False
    sim.run(2.0)  # nobody asks but itself
    assert sim.batcher.health() == FINE
    assert sim.observed["request_failed"] == 4
    assert sim.observed["request_ok"] == 0, "questions of its own are not counted"


# Learning goes on beside.


@pytest.mark.parametrize("learns", ["slowly", "fails"])
def test_nobody_waits_for_learning_and_no_request_fails_for_it(learns, monkeypatch):
    learning, release, seen = threading.Event(), threading.Event(), []

    def learn(self, x, own):
        learning.set()
        if learns == "fails":
            raise RuntimeError("a bug of ours")
        assert release.wait(LONG)

    monkeypatch.setattr(Predictor, "learn", learn)
    observe = lambda what, number: seen.append(what)  # noqa: E731
    with serving(Predictor(), observe, max_disagreement=0.1) as batcher:
        until(lambda: batcher.submit(queries(4)).result(LONG) and learning.is_set())
        for _ in range(20):
            assert batcher.submit(queries(4)).result(LONG).exact.all()
        if learns == "fails":
            until(lambda: "internal_error" in seen)
            assert batcher.health() == FINE
        assert not release.is_set()
        release.set()
