"""The latency benchmark's client: every code's queries are answered, exactly where they can be."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import bench_modules

from nercc_jax import Berrut, DevicePool, NeRCC, Parity, Replication, Uncoded
from nercc_jax.planning import Plan, make_candidate
from nercc_jax.pools import Episodes, Fault, Faults, Overdue
from nercc_jax.stragglers import TraceLatency

IMAGES = np.random.default_rng(0).normal(size=(40, 3, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def bench():
    """bench/_latency_stream.py and its neighbours, which import each other."""
    names = ("stream", "systems", "plan")
    with bench_modules(**{name: f"_latency_{name}" for name in names}) as found:
        yield vars(found)


def _linear(batch):
    """A linear model is its own parity model: every code's answers are exact but for rounding."""
    return batch.reshape(len(batch), -1)


def _labels(count):
    return np.argmax(IMAGES.reshape(len(IMAGES), -1), axis=1)[np.arange(count) % len(IMAGES)]


SYSTEMS = {
    "uncoded": (Uncoded(4), {"whole": True}),
    "alone": (Uncoded(1), {}),
    "replicated": (Replication(1, 2), {"needed": 1}),
    "hedged": (Uncoded(1), {"copies": 2, "overdue": Overdue(0.5, 1.5)}),
    "ParM": (Parity(2, 3), {"models": (0, 1)}),
    "BACC": (Berrut(4, 6), {"needed": 6}),
    "NeRCC": (NeRCC(4, 6, lambda_dec=0.0), {"needed": 6}),
    "interleaved": (NeRCC(4, 6, points="interleaved", lambda_dec=0.0), {}),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_query_is_answered(bench, name):
    code, options = SYSTEMS[name]
    stream = bench["stream"]
    rule = stream.Rule(enough=code.num_workers if name in ("BACC", "NeRCC") else code.num_data)
    system = stream.System(name, code, rule, **options)
    with DevicePool([_linear, _linear], 8, example=IMAGES[:1]) as pool:
        client = stream.CodedStream(pool, system, IMAGES, 6)
        # 50 queries fill no whole number of groups of 4.
        outcomes = client.run(np.arange(1, 51) * 2e-3, 3, 30.0)
    assert np.isfinite(outcomes.latency).all()
    assert (outcomes.latency > 0).all()
    exact = ~outcomes.decoded | (name == "ParM")
    np.testing.assert_array_equal(outcomes.label[exact], _labels(53)[3:][exact])
    if name in ("BACC", "NeRCC"):
        assert outcomes.decoded.all()
    elif name not in ("ParM", "interleaved"):
        assert not outcomes.decoded.any()


def test_a_worker_that_straggles_is_decoded(bench):
    """One of eight workers never answers in time; its queries come from the others' answers."""
    stream = bench["stream"]
    system = stream.System("ParM", Parity(2, 3), stream.Rule(3.0, 2, 1), models=(0, 1))
    slow = Fault("delay", workers=(0,), calls=range(5, 6), latency=TraceLatency(jnp.array([20.0])))
    with DevicePool([_linear, _linear], 8, example=IMAGES[:1], faults=Faults((slow,))) as pool:
        client = stream.CodedStream(pool, system, IMAGES, 6)
        outcomes = client.run(np.arange(1, 201) * 4e-3, 0, 10.0)
    assert np.isfinite(outcomes.latency).all()
    np.testing.assert_array_equal(outcomes.label, _labels(200))


def test_queries_that_nobody_answers_are_lost(bench):
    stream = bench["stream"]
    system = stream.System("alone", Uncoded(1))
    slow = Fault("delay", latency=TraceLatency(jnp.array([20.0])))
    with DevicePool(_linear, 2, example=IMAGES[:1], faults=Faults((slow,))) as pool:
        client = stream.CodedStream(pool, system, IMAGES, 6)
        outcomes = client.run(np.array([0.01, 0.02]), 0, 0.2)
    assert np.isnan(outcomes.latency).all()
    assert (outcomes.label == -1).all()


def test_laws_take_turns(bench):
    """Every block of a law's turn meets the same spells; the next turn's meet the next ones."""
    within = Episodes(3.0, 1.0, seed=1, origin=0.0)
    turns = bench["systems"].Turns(50.0, 21.0, origin=100.0, within=within, lead=1.0, slot=5.0)
    times = np.arange(0, 5, 0.01)
    for turn in range(3):
        expected = _during(within, times + 5 * turn)
        assert expected.any()
        for block in range(4):
            found = _during(turns, 100 + 50 * turn + 1 + 5 * block + times)
            # The same numbers, shifted: only the borders may differ, by rounding.
            assert np.mean(found != expected) < 0.01
    assert not _during(turns, np.arange(121.1, 151, 0.01)).any()


def _during(episodes, times):
    inside = np.zeros(len(times), bool)
    for start, end in episodes.spells():
        if start > times[-1]:
            return inside
        inside |= (start <= times) & (times < end)
    return inside


PLANS = {
    "uncoded": make_candidate("uncoded", 4, 4, 4, 0.0, times=np.ones(1)),
    "hedged": make_candidate(
        "hedged", 4, 4, 4, 0.0, times=np.ones(1), copies=2, hedge_after=0.1, resent=0.1
    ),
    "lost again": make_candidate("replication", 4, 6, 3, 0.05, times=np.ones(1), limit=0.0),
    "lost": make_candidate("replication", 4, 6, 3, 0.05, times=np.ones(1), exact=False),
    "coded": make_candidate("NeRCC", 2, 4, 3, 0.1, times=np.ones(1), points="chebyshev"),
    "own": make_candidate("NeRCC", 4, 6, 5, 0.1, times=np.ones(1), points="interleaved"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_a_plan_is_carried_out(bench, name):
    """Three of ten calls straggle: hedging and re-execution make up for them, and decoding."""
    plan = Plan((), PLANS[name], "", None, {"num_queries": 4, "buffer_size": 4}, {})
    again = name in ("hedged", "lost again")
    # Those do not wait for stragglers, on a busy machine neither; patience grows with what it sees.
    slow = Fault("delay", 0.3, latency=TraceLatency(jnp.array([2.0 if again else 0.6])))
    with DevicePool(_linear, 40, example=IMAGES[:1], faults=Faults((slow,))) as pool:
        server = bench["plan"].PlanServer(pool, plan)
        served = [server.serve(IMAGES[first : first + 4]) for first in range(0, 24, 4)]
    labels = np.concatenate([one.labels for one in served])
    right = labels == _labels(24)
    least = PLANS[name].num_workers * 4 // PLANS[name].num_data
    sent = [one.sent for one in served]
    assert all(one.seconds > 0 for one in served)
    if again:
        assert min(sent) >= least
        assert max(sent) > least
    else:
        assert sent == [least] * 6
    if name in ("uncoded", "hedged", "lost again"):
        assert right.all()
    elif name == "lost":
        assert set(labels[~right]) == {-1}
    else:
        assert (labels >= 0).all()
        assert right.mean() > 0.3
