"""The simulator, beside the real scheduler on the same latencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nercc_jax.pools import Overdue
from nercc_jax.stragglers import TraceLatency
from nercc_jax.stragglers.groups import Latencies
from nercc_jax.stragglers.simulate import Hedge
from nercc_jax.testing import SimulatedPool


@pytest.mark.parametrize(("copies", "at_once"), [(2, 1), (3, 1), (3, 2)])
def test_the_simulator_and_the_scheduler_agree(copies, at_once):
    """Stragglers take ten times as long; more workers than calls, so nothing waits for one."""
    law = TraceLatency(jnp.concatenate([jnp.linspace(0.9, 1.1, 900), jnp.linspace(9, 11, 100)]))
    latencies = Latencies(law, jax.random.key(0), draws=1 << 16)
    queries, limit = 1500, 1.5
    calls = latencies.draw(0, (2 * queries,)).tolist()
    overdue = Overdue(0.5, limit, floor=0.0, copies=at_once)
    taken = []
    with SimulatedPool(
        lambda x: x, 64, seconds=lambda _: calls.pop(), overdue=overdue, max_attempts=copies
    ) as pool:
        for _ in range(queries):
            begin = pool.clock.now()
            with pool.dispatch(np.ones((1, 1, 1)), copies=copies) as batch:
                batch.wait(deadline=60.0)
                taken.append(pool.clock.now() - begin)
            pool.clock.run(begin + 20.0)  # what straggles comes to its end
    sent = (2 * queries - len(calls)) / queries
    drawn = latencies.draw(1, (copies, 100_000))
    found = Hedge(limit, at_once).outcome(drawn[:1], drawn[1:])
    taken = taken[100:]  # the median of service times is known
    # One in a hundred is slow twice: p99 would be one or the other.
    for quantile in (0.5, 0.85, 0.95, 0.98):
        there, own = np.quantile(taken, quantile), np.quantile(found.seconds, quantile)
        assert there == pytest.approx(own, rel=0.05), quantile
    assert np.mean(np.array(taken) > 5) == pytest.approx(np.mean(found.seconds > 5), abs=0.01)
    assert sent == pytest.approx(np.mean(found.calls), abs=0.03)
