"""Rules of time, by a clock that jumps: `test_pools.py` has what all pools do."""

import threading

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nercc_jax.pools import Fault, Faults, Overdue
from nercc_jax.stragglers import Hedge, TraceLatency
from nercc_jax.stragglers.draws import draw_latencies
from nercc_jax.testing import SimulatedClock, SimulatedPool

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
