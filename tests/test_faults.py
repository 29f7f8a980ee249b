"""Faults that are made on purpose: how often, how long, whom and which calls they strike.

And what a pool makes of them in simulated time, where nobody waits.
"""

import dataclasses
import threading

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import require
from schedulers import SOON, next_call

from nercc_jax import DevicePool, RayPool
from nercc_jax.pools import Fault, Faults, Overdue
from nercc_jax.risk.votes import fit_answer_check
from nercc_jax.stragglers import (
    AbstractLatency,
    ExponentialLatency,
    Hedge,
    TraceLatency,
    WaitFor,
)
from nercc_jax.stragglers.draws import draw_latencies
from nercc_jax.testing import SimulatedClock, SimulatedPool


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
    faults = Faults.from_rates(wrong_workers=[1], wrong_rate=0.25, seed=1)
    assert not any(next_call(faults.at(0, 0))[1] for _ in range(100))
    worker = faults.at(1, 0)
    struck = np.mean([next_call(worker)[1] == {"swap"} for _ in range(2000)])
    assert struck == pytest.approx(0.25, abs=0.04)


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


# -- Workers that answer wrongly, and what notices it ----------------------------------------------


WEIGHTS = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
CALLS = np.random.default_rng(1).normal(size=(6, 5, 4)).astype(np.float32)
RIGHT = CALLS @ WEIGHTS


class Linear(eqx.Module):
    """Its answers are known by hand."""

    w: jax.Array

    def __call__(self, x):
        return x @ self.w


MODEL = Linear(jnp.asarray(WEIGHTS))


def answers(*faults, calls=CALLS):
    """The answers to calls, one after the other."""
    found = []
    with DevicePool(MODEL, 1, example=calls[0], faults=Faults(faults)) as pool:
        for call in calls:
            with pool.dispatch(call[None]) as batch:
                found.append(batch.wait(deadline=SOON).values[0])
    return found


def close(one, other):
    return np.allclose(one, other, atol=1e-5)


def test_swapped_rows_are_all_there_and_none_is_in_its_place():
    for given, right in zip(answers(Fault("swap")), RIGHT, strict=True):
        assert not any(map(close, given, right))
        np.testing.assert_allclose(np.sort(given, axis=0), np.sort(right, axis=0), atol=1e-5)


def test_a_swapped_single_row_is_the_previous_calls():
    given = answers(Fault("swap"), calls=CALLS[:, :1])
    assert close(given[0], RIGHT[0, :1]), "there was none before"
    assert all(map(close, given[1:], RIGHT[:-1, :1]))


def check_same(*pools):
    """Each pool gives the same answers of two workers, the first of which swaps rows."""
    found = []
    for pool in pools:
        with pool, pool.dispatch(CALLS[:1].repeat(2, axis=0)) as batch:
            values = batch.wait(deadline=SOON).values
            order = sorted((worker, point) for point, worker in batch.workers.items())
            found.append([values[point] for _, point in order])
    np.testing.assert_allclose(*found, atol=1e-5)
    assert not close(found[0][0], RIGHT[0])
    assert close(found[0][1], RIGHT[0])


SWAP = Faults([Fault("swap", workers=(0,))], seed=5)


def test_simulated_workers_are_wrong_as_others_are():
    check_same(
        DevicePool(MODEL, 2, example=CALLS[0], faults=SWAP),
        SimulatedPool(MODEL, 2, seconds=lambda size: 1.0, faults=SWAP),
    )


@pytest.mark.slow
def test_workers_of_ray_are_wrong_as_threads_are():
    require("ray", "ray")
    options = {"faults": SWAP, "compiled": False}
    model = lambda x: np.asarray(x) @ WEIGHTS  # noqa: E731 (by value: actors need not import it)
    check_same(DevicePool(model, 2, **options), RayPool(model, 2, address="local", **options))


# -- The check of an answer: right ones that look wrong, and wrong ones that do --------------------

ROWS, OUTPUTS = 4000, 5


def predicted(random, rows=ROWS, error=0.4, outputs=OUTPUTS):
    """Right answers, and a surrogate's predictions of them whose deviations are known."""
    right = random.normal(size=(rows, outputs)) * np.linspace(1, 2, outputs)
    deviation = error * random.uniform(0.5, 1.5, rows)
    mean = right + deviation[:, None] * random.normal(size=right.shape)
    return tuple(each.astype(np.float32) for each in (mean, deviation, right))


def unknown(random, rows=ROWS):
    """The same without a surrogate that knows anything."""
    mean, deviation, right = predicted(random, rows)
    return np.zeros_like(mean), np.full_like(deviation, 1.5), right


def placed(random, rows=ROWS, turn=0.0):
    """On a circle, at four places: no prediction, size or correlation tells those between them."""
    angle = (random.integers(4, size=rows) + turn) * np.pi / 2
    answers = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    answers += 0.05 * random.normal(size=answers.shape)
    return np.zeros((rows, 2), np.float32), np.full(rows, 0.7, np.float32), np.float32(answers)


def swapped(mean, deviation, right):
    """Answers of other queries that have another label."""
    other = np.roll(right, 1, axis=0)
    differs = other.argmax(axis=1) != right.argmax(axis=1)
    return mean[differs], deviation[differs], other[differs]


def beyond(size):
    """Answers far beyond all that the check was fitted to."""

    def change(mean, deviation, right):
        right = right.copy()
        right[np.arange(len(right)), np.arange(len(right)) % OUTPUTS] = size
        return mean, deviation, right

    return change


def as_it_is(*answers):
    return answers


# What is known, what is judged and how its answers are changed; the least and largest share found.
CASES = {
    "other queries'": (lambda r, n=ROWS: predicted(r, n, 0.2), None, swapped, 0.99, 1),
    "all off": (predicted, None, lambda m, d, y: (m, d, y + 5), 0.99, 1),
    "between those that there are": (placed, lambda r: placed(r, turn=0.5), as_it_is, 0.99, 1),
    "at those that there are": (placed, None, as_it_is, 0.005, 0.03),
    "right ones of the unknown": (unknown, None, as_it_is, 0.01, 0.03),
    "eightfold ones of the unknown": (unknown, None, lambda m, d, y: (m, d, 8 * y), 0.9, 1),
    **{f"of size {n:g}": (predicted, None, beyond(n), 1, 1) for n in (30, 1e3, 1e19, 1e38)},
    "no numbers": (predicted, None, beyond(np.nan), 1, 1),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_wrong_answers_look_wrong(case):
    known, judged, change, least, most = CASES[case]
    random = np.random.default_rng(1)
    check = fit_answer_check(
        *known(random, 1000), 0.02, labels=change is swapped or case.startswith("of size")
    )
    found = np.mean(check.suspicious(*change(*(judged or known)(random))))
    assert least <= found <= most


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_as_many_right_answers_look_wrong_as_is_stated(rate, labels):
    random, found = np.random.default_rng(0), []
    for seed in range(6):
        check = fit_answer_check(*predicted(random, 600), rate, labels=labels, seed=seed)
        found.append(np.mean(check.suspicious(*predicted(random))))
    assert np.mean(found) == pytest.approx(rate, abs=0.35 * rate)


def test_it_finds_the_same_in_other_units():
    random = np.random.default_rng(7)
    known, fresh = predicted(random, 1000), predicted(random)
    noise = random.normal(size=fresh[2].shape).astype(np.float32)
    found = []
    for unit in map(np.float32, (0.01, 1, 100)):
        check = fit_answer_check(*(unit * each for each in known), 0.02, labels=False)
        mean, deviation, right = (unit * each for each in fresh)
        found.append(np.mean(check.suspicious(mean, deviation, right + unit * noise)))
    assert 0.1 < found[1] < 0.9
    np.testing.assert_allclose(found, found[1], atol=0.01)
    # The surrogate's bias is corrected, whatever its size.
    check = fit_answer_check(known[0] + 20, *known[1:], 0.02, labels=False)
    biased = np.mean(check.suspicious(fresh[0] + 20, fresh[1], fresh[2] + noise))
    assert biased == pytest.approx(found[1], abs=0.03)


@pytest.mark.parametrize("outputs", [1, 2, 300])
def test_any_number_of_outputs(outputs):
    data = predicted(np.random.default_rng(4), 400, 0.01, outputs)
    check = fit_answer_check(*data, 0.02, labels=outputs > 2)
    assert np.mean(check.suspicious(*data)) <= 0.05
    assert np.mean(check.suspicious(*data[:2], np.roll(data[2], 1, axis=0))) > 0.8
    few = fit_answer_check(*(each[:60] for each in data), 0.01, labels=outputs > 2)
    assert not few.suspicious(*data).any(), "too few answers accuse nothing"


# -- Rules of time, by a clock that jumps: `test_pools.py` has what all pools do -------------------


POINTS = np.arange(5.0)[:, None, None]


def double(x):
    return 2 * x


def paper(num_workers=5, model=double, seconds=lambda size: 1.0, **options):
    return SimulatedPool(model, num_workers, seconds=seconds, **options)


def delay(seconds, **where):
    return Fault("delay", latency=TraceLatency(jnp.array([seconds])), **where)


def test_time_goes_on_while_somebody_waits_and_only_then():
    with paper() as pool, pool.dispatch(POINTS) as batch:
        assert pool.clock.now() == 0
        got = batch.wait(deadline=10.0)
        assert got.available.all()
        assert got.waited == pool.clock.now() == 1.0
        np.testing.assert_array_equal(got.values, 2 * POINTS)


STRIKES = st.lists(
    st.tuples(
        st.sampled_from(["delay", "error", "nan", "hang", "death"]), st.sampled_from([0.1, 0.4])
    ),
    max_size=3,
)


@hypothesis.given(
    STRIKES, st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.booleans(),
    st.integers(0, 10**6),
)  # fmt: skip
@hypothesis.settings(max_examples=25)
def test_no_answer_is_lost_or_swapped_whatever_strikes(
    strikes, workers, count, copies, hasty, seed
):
    """Each point of each batch has its own answer, or its attempts are used up, and says so.

    Whether late ones are copied or not; and a run is the same each time.
    """
    three = TraceLatency(jnp.array([3.0]))
    faults = Faults(
        [Fault(kind, often, latency=three if kind == "delay" else None) for kind, often in strikes],
        seed=seed,
    )
    overdue = Overdue(0.5, 2.0, least=4) if hasty else Overdue(least=10**6)

    def run():
        found = []
        with paper(workers, faults=faults, overdue=overdue, hang_timeout=10.0) as pool:
            for number in range(4):
                points = np.arange(float(count))[:, None, None] + 100 * number
                with pool.dispatch(points, copies=copies) as batch:
                    answers = batch.wait(deadline=1e4)
                    there = np.flatnonzero(answers.available).tolist()
                    for point in there:
                        assert answers.values is not None
                        np.testing.assert_array_equal(answers.values[point], 2 * points[point])
                    failed = {failure.point for failure in answers.failures}
                    for point in {*range(count)} - {*there}:
                        assert batch.lost(point)
                        assert point in failed
                    found.append((answers.waited, *there))
            return found, pool.report()

    assert run() == run()


def test_what_nobody_will_end_is_reported():
    with paper(1) as pool:
        pool.dispatch(POINTS[:1]).wait(deadline=2.0)
    clock = SimulatedClock()
    with pytest.raises(RuntimeError, match="nothing is planned"):
        clock.wait(threading.Condition(), float("inf"))


def test_events_come_in_time_and_those_of_a_moment_in_order():
    clock, seen = SimulatedClock(), []
    clock.at(2.0, lambda: seen.append("c"))
    clock.at(1.0, lambda: seen.append("a"))
    clock.at(1.0, lambda: clock.at(0.0, lambda: seen.append("b")))
    clock.run(1.5)
    assert seen == ["a", "b"]
    assert clock.now() == 1.5
    clock.run(5.0)
    assert seen == ["a", "b", "c"]
    assert clock.next == float("inf")


def warm(pool, rounds):
    """Every worker answers so many times, in a second each."""
    for _ in range(rounds):
        assert (
            pool.dispatch(np.arange(float(pool.num_workers))[:, None, None]).wait().failures == ()
        )


def test_of_two_overdue_points_the_one_that_waits_longer_gets_the_idle_worker():
    faults = Faults([delay(59.0, workers=[0, 1], calls=[7]), delay(4.0, workers=[2], calls=[7])])
    with paper(3, faults=faults, overdue=Overdue(0.5, 2.0, least=20)) as pool:
        warm(pool, 7)
        batch = pool.open(2)
        other = pool.open(1, overdue=Overdue(least=10**6))  # keeps the third worker for 5 s
        pool.send(batch, [0], POINTS[:1])
        pool.clock.run(pool.clock.now() + 0.5)
        pool.send(batch, [1], POINTS[1:2])
        pool.send(other, [0], POINTS[2:3])
        answers = batch.wait(deadline=30.0)
    assert answers.seconds.tolist() == [6.5, 7.0]


@pytest.mark.parametrize(
    ("together", "copies", "sent", "seconds"), [(1, 3, 3, 5.0), (2, 3, 3, 3.0), (2, 2, 2, 60.0)]
)
def test_copies_of_an_overdue_point_go_out_together(together, copies, sent, seconds):
    """At 2 s; of the two copies one straggles, too. Not more than the batch allows."""
    faults = Faults([delay(59.0, workers=[0, 1], calls=[7])])
    overdue = Overdue(0.5, 2.0, least=20, copies=together)
    with paper(4, faults=faults, overdue=overdue) as pool:
        warm(pool, 7)
        before = pool.report().sent
        with pool.open(1, copies=copies) as batch:
            pool.send(batch, [0], POINTS[:1])
            answers = batch.wait(deadline=100.0)
        assert (answers.seconds.tolist(), pool.report().sent - before) == ([seconds], sent)


def test_copies_from_the_start_go_to_idle_workers():
    faults = Faults([delay(59.0, workers=[0], calls=[0])])
    with paper(3, faults=faults) as pool:
        with pool.open(2, copies=2, at_once=2) as batch:
            pool.send(batch, [0, 1], POINTS[:2])
            assert pool.idle == 0, "every point has a worker, and the first a copy"
            assert batch.wait(deadline=10.0).seconds.tolist() == [1.0, 1.0]
        with pytest.raises(ValueError, match="of 2 copies, 1 to all go out at once, not 3"):
            pool.open(1, copies=2, at_once=3)


def test_answers_that_are_none_say_nothing_about_service_times():
    def refuses(x):
        if (x < 0).any():
            raise ValueError("negative")
        return x

    faults = Faults([delay(59.0, calls=range(12, 99))])
    with paper(2, refuses, faults=faults, overdue=Overdue(0.5, 2.0, least=4)) as pool:
        for _ in range(4):
            assert pool.dispatch(-np.ones((2, 1, 1))).wait().values is None
        assert pool.report().errors == 24  # four times two points, three attempts each
        assert pool.calls() == []
        answers = pool.dispatch(POINTS[:1]).wait(deadline=100.0)
        assert answers.available.all()
        assert pool.report().copies == 0, "nothing is known, so nothing is overdue"


def test_a_forgotten_batch_sends_nothing_more_and_its_answers_are_wasted_time():
    with paper(2) as pool:
        pool.dispatch(POINTS).forget()
        answers = pool.dispatch(POINTS[:2]).wait(deadline=10.0)
        report = pool.report()
    np.testing.assert_array_equal(answers.values, 2 * POINTS[:2], err_msg="not the other's")
    assert (report.sent, report.late, report.answered) == (4, 2, 2)
    assert (report.seconds, report.wasted_seconds) == (4.0, 2.0)


def test_dropping_taken_answers_keeps_one_that_has_just_come():
    """A server lost it: it was there, by the mask, and was none."""
    with paper(3) as pool, pool.dispatch(np.ones((3, 1, 2))) as batch:
        batch.wait(deadline=10.0)
        batch.drop_answers(np.array([True, False, True]))
        assert batch.answer(0) is None
        np.testing.assert_array_equal(batch.answer(1), 2 * np.ones((1, 2)))


# -- The simulator of policies, beside the real scheduler on the same latencies -------------------


@pytest.mark.parametrize(("copies", "at_once"), [(2, 1), (3, 1), (3, 2)])
def test_the_simulator_and_the_scheduler_agree(copies, at_once):
    """Stragglers take ten times as long; more workers than calls, so nothing waits for one."""
    law = TraceLatency(jnp.concatenate([jnp.linspace(0.9, 1.1, 900), jnp.linspace(9, 11, 100)]))
    queries, limit = 1500, 1.5
    calls = draw_latencies(law, jax.random.key(0), (2 * queries,)).tolist()
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
    drawn = draw_latencies(law, jax.random.key(1), (copies, 100_000))
    found = Hedge(limit, at_once).outcome(drawn[:1], drawn[1:])
    taken = taken[100:]  # the median of service times is known
    # One in a hundred is slow twice: p99 would be one or the other.
    for quantile in (0.5, 0.85, 0.95, 0.98):
        there, own = np.quantile(taken, quantile), np.quantile(found.seconds, quantile)
        assert there == pytest.approx(own, rel=0.05), quantile
    assert np.mean(np.array(taken) > 5) == pytest.approx(np.mean(found.seconds > 5), abs=0.01)
    assert sent == pytest.approx(np.mean(found.calls), abs=0.03)
