"""Faults that are made on purpose: how often, how long, whom and which calls they strike."""

import dataclasses

import jax
import numpy as np
import pytest
from schedulers import next_call

from nercc_jax.pools import Fault, Faults
from nercc_jax.stragglers import (
    AbstractLatency,
    ExponentialLatency,
    TraceLatency,
    WaitFor,
)
from nercc_jax.stragglers.draws import draw_latencies


def strikes(fault, calls=2000, seed=0, worker=0, life=0):
    law = Faults([fault], seed).at(worker, life)
    return [next_call(law) for _ in range(calls)]


def test_faults_strike_as_often_as_they_should_and_alike_for_a_seed():
    error = Fault("error", probability=0.1)
    drawn = strikes(error)
    assert 150 < sum("error" in kinds for _, kinds in drawn) < 250
    assert drawn == strikes(error)
    assert drawn != strikes(error, seed=1)
    assert drawn != strikes(error, worker=1)
    assert drawn != strikes(error, life=1)


def test_delays_follow_their_law():
    drawn = strikes(Fault("delay", latency=ExponentialLatency(0.5)))
    assert 0.45 < np.mean([seconds for seconds, _ in drawn]) < 0.55
    assert drawn == strikes(Fault("delay", latency=ExponentialLatency(0.5)))
    both = Faults([Fault("delay", latency=TraceLatency(jax.numpy.array([0.25])))] * 2).at(0, 0)
    assert next_call(both) == (0.5, set())


class WorkerLatency(AbstractLatency):
    """Each worker has a mean of its own."""

    means: jax.Array

    def sample(self, key, shape):
        return self.means * jax.random.exponential(key, shape)


class LaterLatency(AbstractLatency):
    def sample(self, key, shape):
        return 0.1 * jax.numpy.arange(shape[-1]) + jax.random.exponential(key, shape)


@pytest.mark.parametrize(
    "law", [*(WorkerLatency(jax.numpy.arange(1.0, n + 1)) for n in (3, 6, 20)), LaterLatency()]
)
def test_a_law_that_differs_between_workers_is_refused_with_a_way_out(law):
    """Of each worker's delays 4,096 are drawn at once, which were taken for so many workers."""
    with pytest.raises(ValueError, match=r'own, Fault\("delay", workers=\[0\], latency=...\)'):
        Fault("delay", latency=law)
    assert WaitFor(law, 2).latency is law


def test_a_law_for_other_numbers_of_workers_is_refused():
    law = WorkerLatency(jax.numpy.arange(1.0, 4.0))
    with pytest.raises(ValueError, match="must take any number of workers"):
        draw_latencies(law, jax.random.key(0), (9, 16))


def test_delays_differ_by_worker_life_and_fault():
    """A worker that comes back is not as slow as before, and two do not move as one."""
    fault = Fault("delay", latency=ExponentialLatency(0.5))
    first = strikes(fault, 50)
    for other in ({"life": 1}, {"worker": 1}):
        assert not {seconds for seconds, _ in first} & {
            seconds for seconds, _ in strikes(fault, 50, **other)
        }
    both = Faults([fault, fault]).at(0, 0)
    sums = np.array([next_call(both)[0] for _ in range(50)])
    others = sums - [seconds for seconds, _ in first]
    assert not np.isclose(others, [seconds for seconds, _ in first]).any()


def test_what_strikes_some_calls_shifts_no_other_faults_draws():
    error, nan = Fault("error", 0.5), Fault("nan", 0.5)
    rare = dataclasses.replace(error, calls=(0,))
    often, seldom = (Faults([first, nan]).at(0, 0) for first in (error, rare))
    drawn = [("nan" in next_call(often)[1], "nan" in next_call(seldom)[1]) for _ in range(100)]
    assert all(one == other for one, other in drawn)
    assert 20 < sum(one for one, _ in drawn) < 80


def test_faults_by_their_rates():
    options = {"straggler_rate": 0.25, "straggler_delay": 2.0, "death_rate": 0.125, "seed": 5}
    law = Faults.from_rates(service_delay=0.5, **options).at(0, 0)
    drawn = [next_call(law) for _ in range(2000)]
    assert {seconds for seconds, _ in drawn} == {0.5, 2.5}
    assert 0.2 < np.mean([seconds > 1 for seconds, _ in drawn]) < 0.3
    assert 0.1 < np.mean([kinds == {"death"} for _, kinds in drawn]) < 0.15
    assert Faults.from_rates(seed=5) == Faults([], 5), "nothing is asked for"
    with pytest.raises(ValueError, match=r"probability must be in \[0, 1\], not 1.5"):
        Faults.from_rates(death_rate=1.5)


def test_faults_by_scores_that_workers_have_seen():
    """Of the first rows none is known to be among the hardest."""
    random = np.random.default_rng(0)
    rates = {"straggler_rate": 0.1, "straggler_delay": 2.0}
    rates["straggler_score"] = lambda batch: np.linalg.norm(batch.reshape(len(batch), -1), axis=1)
    faults = Faults.from_rates(**rates).at(0, 0)
    rows = random.normal(size=(4000, 1, 3))
    struck = np.array([next_call(faults, row)[0] == 2.0 for row in rows])
    norms = np.linalg.norm(rows[:, 0], axis=1)
    hard = norms > np.quantile(norms, 0.9)
    assert np.mean(struck) == pytest.approx(0.1, abs=0.02)
    assert np.mean(struck[hard]) == pytest.approx(0.95, abs=0.08)
    assert np.mean(struck[~hard]) == pytest.approx(0.005, abs=0.02)
    alone = Faults.from_rates(**rates).at(0, 0)
    assert not any(next_call(alone, row)[0] for row in np.arange(10.0)[:, None, None])


def test_faults_of_some_workers_and_calls():
    fault = Fault("nan", workers=(1, 2), calls=(0, 3))
    assert strikes(fault, 5, worker=0) == [(0.0, set())] * 5
    struck = [bool(kinds) for _, kinds in strikes(fault, 5, worker=2)]
    assert struck == [True, False, False, True, False]


def test_a_rack_is_slow_together():
    fault = Fault(
        "delay",
        workers=(0, 1),
        latency=TraceLatency(jax.numpy.array([1.0])),
        when=lambda now: now % 10 < 5,
    )
    now = 0.0
    laws = [Faults([fault]).at(worker, 0, lambda: now) for worker in range(3)]
    slow = []
    for now in np.arange(0.0, 200.0, 0.5).tolist():  # noqa: B007
        slow.append([next_call(law)[0] > 0 for law in laws])
    slow = np.array(slow)
    np.testing.assert_array_equal(slow[:, 0], slow[:, 1])
    assert not slow[:, 2].any()
    assert 0.3 < slow[:, 0].mean() < 0.7


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fault("late"), "a fault is one of"),
        (lambda: Fault("nan", probability=1.5), r"in \[0, 1\]"),
        (lambda: Fault("delay"), "needs a latency law"),
        (lambda: Fault("nan", latency=ExponentialLatency(1.0)), "nothing else takes one"),
    ],
)
def test_errors_in_faults(make, message, untyped):
    with pytest.raises(ValueError, match=message):
        make()
