"""A failure within the batcher is reported at once, and its health is the truth."""

import math
import threading
import time
import types

import numpy as np
import pytest
from batching import INTERLEAVED, LONG, Held, count, model, queries, serving, settled, until

from nercc_jax import Uncoded
from nercc_jax.pools.clock import WALL
from nercc_jax.serving import Health, InferenceFailed, Predictor
from nercc_jax.serving.core._requests import HealthMonitor

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


def becomes(batcher, live, ready):
    """Waits until health is that; returns what troubles it."""
    until(lambda: (batcher.health().live, batcher.health().ready) == (live, ready), 5.0)
    return batcher.health().trouble


@pytest.mark.parametrize("step", ["dispatch", "complete"])
def test_a_step_that_fails_is_reported_at_once_and_the_next_works(step, monkeypatch):
    with serving(INTERLEAVED, straggler_threshold=1e6) as batcher:  # nobody straggles
        whole, left = getattr(batcher._dispatcher, step), [1]

        def fails(*args, **options):
            result = whole(*args, **options) if step == "dispatch" else None
            if batcher._requests.taken and left[0]:
                left[0] -= 1
                raise RuntimeError("a bug of ours")
            return result if step == "dispatch" else whole(*args, **options)

        monkeypatch.setattr(batcher._dispatcher, step, fails)
        with pytest.raises(InferenceFailed, match="internal error: a bug of ours"):
            batcher.submit(queries(4)).result(5.0)
        assert count(batcher, "internal_error") == count(batcher, "request_failed") == 1
        np.testing.assert_allclose(
            batcher.submit(queries(4)).result(LONG).values, model(queries(4)), atol=1e-6
        )
        settled(batcher)
        assert batcher.health() == FINE


def test_a_group_that_cannot_be_decided_is_reported_at_once(monkeypatch):
    def fails(*_):
        raise RuntimeError("a bug of ours")

    held = Held()
    with serving(INTERLEAVED, held, warm=False) as batcher:
        with monkeypatch.context() as patched:
            patched.setattr("nercc_jax.serving._batcher.decide", fails)
            future = batcher.submit(queries(3))
            with pytest.raises(InferenceFailed, match="a bug of ours"):
                future.result(5.0)
        held.release.set()
        assert batcher.submit(queries(3)).result(LONG).exact.all()


def test_a_thread_that_dies_fails_what_is_open_and_what_comes(monkeypatch):
    held = Held()
    with serving(Uncoded(1), held, warm=False) as batcher:
        future = batcher.submit(queries(2))

        def dies(now):
            raise SystemExit("no memory, say")

        monkeypatch.setattr(batcher, "_handle_due", dies)
        with pytest.raises(InferenceFailed, match="the batcher has failed: no memory, say"):
            future.result(5.0)
        with pytest.raises(InferenceFailed, match="has failed"):
            batcher.submit(queries(1))
        assert batcher.health() == Health(False, False, "the batcher has failed: no memory, say")
        assert count(batcher, "internal_error") == 1
        held.release.set()


def test_a_stuck_thread_is_not_alive(monkeypatch):
    monkeypatch.setattr("nercc_jax.serving.core._requests.STUCK", 0.2)
    monkeypatch.setattr("nercc_jax.pools.clock.BEAT", 0.05)
    release = threading.Event()
    with serving(Uncoded(1), warm=False) as batcher:
        becomes(batcher, True, True)
        monkeypatch.setattr(batcher, "_handle_due", lambda now: release.wait(LONG))
        assert "is stuck" in becomes(batcher, False, False)
        release.set()
        becomes(batcher, True, True)


def test_who_answers_nobody_is_not_ready_until_it_does():
    broken = threading.Event()

    def sometimes(batch):
        if broken.is_set():
            raise RuntimeError("out of order")
        return model(batch)

    with serving(INTERLEAVED, sometimes) as batcher:
        assert batcher.health() == FINE
        broken.set()
        for each in queries(4):
            with pytest.raises(InferenceFailed):
                batcher.submit(each[None], exact=True).result(LONG)
        assert "3 workers failed" in becomes(batcher, True, False)
        failed = count(batcher, "request_failed")
        broken.clear()
        becomes(batcher, True, True)  # nobody asks but itself
        assert count(batcher, "request_failed") == failed == 4
        assert count(batcher, "request_ok") == 0, "questions of its own are not counted"


# Learning goes on beside.


LEARNS = {"code": Uncoded(1), "warm": False, "max_disagreement": 0.1, "predictor": None}


def test_nobody_waits_for_learning(monkeypatch):
    learning, release = threading.Event(), threading.Event()

    def slow(self, x, own):
        learning.set()
        assert release.wait(LONG)

    monkeypatch.setattr(Predictor, "learn", slow)
    with serving(**LEARNS | {"predictor": Predictor()}) as batcher:
        while not learning.is_set():
            batcher.submit(queries(4)).result(LONG)
        for _ in range(20):
            batcher.submit(queries(4)).result(LONG)
        assert not release.is_set()
        release.set()


def test_learning_that_fails_is_counted_and_nothing_else(monkeypatch):
    def fails(self, x, own):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(Predictor, "learn", fails)
    with serving(**LEARNS | {"predictor": Predictor()}) as batcher:
        end = time.monotonic() + LONG
        while not count(batcher, "internal_error"):
            assert time.monotonic() < end
            batcher.submit(queries(4)).result(LONG)
        assert batcher.submit(queries(4)).result(LONG).exact.all()
        assert batcher.health() == FINE
