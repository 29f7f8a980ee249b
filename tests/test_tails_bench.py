"""The rivals of docs/tails.md: which worker's queue a query joins, and when copies go out."""

import numpy as np
import pytest
from conftest import bench_modules

from nercc_jax.stragglers.simulate import Hedge
from nercc_jax.testing import SimulatedPool


@pytest.fixture(scope="module")
def bench():
    with bench_modules(balancers="_balancers", tails="tails") as found:
        yield found


class _InTurn:
    """A rule that names workers in a given order."""

    def __init__(self, *workers):
        self._workers = iter(workers)

    def pick(self, workers, barred, now):
        return next(self._workers)


def _ends(bench, rule, arrivals, seconds, num_workers=1, limit=1e9):
    """Return when each query is answered, and the calls that were sent."""
    times = iter(seconds)
    ends = [np.nan] * len(arrivals)
    with SimulatedPool(np.negative, num_workers, seconds=lambda size: next(times)) as pool:
        balancer = bench.balancers.Balancer(pool, rule, Hedge(limit))

        def send(number):
            def hear(future):
                assert future.result().values == [[-number]]
                ends[number] = pool.clock.now()

            balancer.submit(np.full((1, 1), float(number))).add_done_callback(hear)

        for number, when in enumerate(arrivals):
            pool.clock.at(when, lambda number=number: send(number))
        pool.clock.run(until=1e4)
        return ends, pool.report().sent


def test_a_worker_computes_its_queue_in_order_of_arrival(bench):
    """Worker 0 has queries 0, 1 and 3 while worker 1 is idle after query 2."""
    rule = _InTurn(0, 0, 1, 0)
    ends, sent = _ends(bench, rule, [0.0, 1.0, 1.5, 2.0], [5.0, 1.0, 2.0, 3.0], 2)
    # In the order in which calls begin: query 0, 2 (1 s), 1 (2 s), 3 (3 s).
    assert ends == [5.0, 7.0, 2.5, 10.0]
    assert sent == 4


def test_the_first_answer_counts_and_a_copy_that_waits_is_cancelled(bench):
    """After 20 answers of 1 s, copies go out after 2 s: one wins, one is never sent."""
    warm = [10.0 * number for number in range(20)]
    # Query 20 takes 9 s at worker 0; its copy 1 s at worker 1, from 202 s on. Query 21 waits
    # behind it at worker 0, query 22 is at worker 1 until 216.5 s. Query 21's copy would wait
    # for that, and is dropped when worker 0 has answered at 210 s.
    rule = _InTurn(*[0] * 20, 0, 1, 0, 1, 1, 0)
    arrivals = [*warm, 200.0, 206.0, 206.5]
    seconds = [1.0] * 20 + [9.0, 1.0, 10.0, 1.0, 1.0, 1.0]
    ends, sent = _ends(bench, rule, arrivals, seconds, 2, limit=2.0)
    assert ends[20:] == [203.0, 210.0, 211.0]
    assert sent == 20 + 2 + 1 + 2


@pytest.mark.parametrize("number", [1, 5])
def test_rules_choose_as_they_say(bench, number):
    """With one worker, all rules are one queue (Lindley's recursion); with five, they are not."""
    random = np.random.default_rng(0)
    arrivals = np.cumsum(random.exponential(1.0, 400))
    services = random.exponential(0.8 * number, 400)
    rules = (bench.balancers.LeastLoaded(5), bench.balancers.LeastLoaded(2))
    rules += (bench.balancers.LeastLoaded(1), bench.balancers.Prequal(3, 0.5, size=3))
    found = [np.array(_ends(bench, rule, arrivals, services, number)[0]) for rule in rules]
    if number == 1:
        free, ends = 0.0, []
        for arrived, service in zip(arrivals, services, strict=True):
            free = max(free, arrived) + service
            ends.append(free)
        np.testing.assert_allclose(found, np.tile(ends, (len(rules), 1)))
    else:
        best, two, blind, prequal = (float(np.mean(ends - arrivals)) for ends in found)
        assert best < two < blind
        assert prequal < blind


def test_prequal_prefers_the_fast_among_workers_that_are_not_hot(bench):
    """The slow one is avoided, and so is the fast one once its queue is long."""
    workers = [bench.balancers.Worker() for _ in range(3)]
    for worker, latency in zip(workers, (5.0, 1.0, 2.0), strict=True):
        worker.remember(0.0, 0, latency)
    rule = bench.balancers.Prequal(probes=3, quantile=0.0, size=3)
    assert rule.pick(workers, (), 0.0) == 1
    workers[1].queue.extend([None] * 4)
    assert rule.pick(workers, (), 0.5) == 2
    assert rule.pick(workers, (2,), 0.5) == 0
    assert workers[0].latency(6.0) == 0.0, "that is long ago"


def test_seeds_are_summed_up(bench):
    cells = {
        str(seed): {"p99_ms": p99, "calls": 1.0 + seed, "queries": 10, "predicted": 0.1}
        for seed, p99 in enumerate((3.0, 1.0, 2.0))
    }
    whole = bench.tails.over_seeds(cells)
    assert (whole["p99_ms"], whole["calls"], whole["queries"]) == ([2.0, 1.0, 3.0], 2.0, 30)
    assert whole["predicted"] == pytest.approx(0.1)
