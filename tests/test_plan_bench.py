"""bench/plan.py carries plans out as they say."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import bench_modules

from nercc_jax import DevicePool
from nercc_jax.planning import Candidate, Plan
from nercc_jax.pools import Fault, Faults
from nercc_jax.stragglers import TraceLatency

IMAGES = np.random.default_rng(0).normal(size=(40, 3, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def bench():
    with bench_modules(plan="plan") as found:
        yield found.plan


def _linear(batch):
    return batch.reshape(len(batch), -1)


def _labels(count):
    return np.argmax(IMAGES.reshape(len(IMAGES), -1), axis=1)[np.arange(count) % len(IMAGES)]


PLANS = {
    "uncoded": Candidate("uncoded", 4, 4, 4, 0.0),
    "hedged": Candidate("hedged", 4, 4, 4, 0.0, copies=2, hedge_after=0.1, resent=0.1),
    "lost again": Candidate("replication", 4, 6, 3, 0.05, limit=0.0),
    "lost": Candidate("replication", 4, 6, 3, 0.05, exact=False),
    "coded": Candidate("NeRCC", 2, 4, 3, 0.1, points="chebyshev"),
    "own": Candidate("NeRCC", 4, 6, 5, 0.1, points="interleaved"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_a_plan_is_carried_out(bench, name):
    """Three of ten calls straggle: hedging and re-execution make up for them, and decoding."""
    plan = Plan((), PLANS[name], "", None, {"num_queries": 4, "buffer_size": 4}, {})
    again = name in ("hedged", "lost again")
    # Those do not wait for stragglers, on a busy machine neither; waiting grows with what it sees.
    slow = Fault("delay", 0.3, latency=TraceLatency(jnp.array([2.0 if again else 0.6])))
    with DevicePool(_linear, 40, example=IMAGES[:1], faults=Faults((slow,))) as pool:
        server = bench.PlanServer(pool, plan)
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
