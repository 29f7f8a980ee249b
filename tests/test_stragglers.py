"""Straggler sets, latencies, and the choice of how to hedge.

Counts, laws against their closed forms, rules, errors; forecasts by replay of recorded calls.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import nercc_jax as nj
from nercc_jax import stragglers as room
from nercc_jax.pools.times import Call
from nercc_jax.stragglers.picking import CopyTrials, Play, choose, forecast, hedged_times
from nercc_jax.stragglers.simulate import Hedge, RecordedCalls, completed

DRAWS = 4000


def draws(law, key, num_workers=12):
    keys = jax.random.split(key, DRAWS)
    return np.asarray(jax.vmap(lambda k: law.available(k, num_workers))(keys))


@pytest.mark.parametrize(
    ("law", "share", "variance"),
    [
        (nj.ExactStragglers(5), 5 / 12, 0.0),
        (nj.IndependentStragglers(0.3), 0.3, 12 * 0.3 * 0.7),
        (nj.IndependentStragglers(0.0), 0.0, 0.0),
        (nj.IndependentStragglers(1.0), 1.0, 0.0),
        (room.WaitFor(room.ParetoLatency(1.0, 1.1), 7), 5 / 12, 0.0),
    ],
)
def test_workers_straggle_as_often_as_the_law_says(law, share, variance, key):
    """Each alike; and how much their number varies."""
    masks = draws(law, key)
    np.testing.assert_allclose((~masks).mean(axis=0), share, atol=0.04)
    np.testing.assert_allclose((~masks).sum(axis=1).var(), variance, rtol=0.1)
    jitted = jax.jit(law.available, static_argnums=1)(key, 9)
    np.testing.assert_array_equal(law.available(key, 9), jitted)


@pytest.mark.parametrize(
    ("law", "reference"),
    [
        (room.ExponentialLatency(0.2), scipy.stats.expon(scale=0.2)),
        (room.ExponentialLatency(0.2, shift=1.0), scipy.stats.expon(loc=1.0, scale=0.2)),
        (room.LogNormalLatency(0.1, sigma=0.5), scipy.stats.lognorm(0.5, scale=0.1)),
        (room.ParetoLatency(0.1, shape=1.5), scipy.stats.pareto(1.5, scale=0.1)),
    ],
)
def test_latency_laws(law, reference, key):
    sample = np.asarray(law.sample(key, (DRAWS,)))
    assert scipy.stats.kstest(sample, reference.cdf).pvalue > 1e-3


def test_traces(tmp_path, key):
    path = tmp_path / "trace.txt"
    path.write_text("# seconds\n0.1\n0.2\n0.7\n")
    sample = np.asarray(room.TraceLatency.from_file(path).sample(key, (1000,)))
    values, counts = np.unique(sample, return_counts=True)
    np.testing.assert_allclose(values, [0.1, 0.2, 0.7], rtol=1e-6)
    assert counts.min() > 250


def test_trace_errors(tmp_path, untyped):
    path = tmp_path / "trace.txt"
    path.write_text("0.1\nslow\n")
    with pytest.raises(ValueError, match=r"trace\.txt: a latency trace has one number a line"):
        room.TraceLatency.from_file(path)


def test_rules(key):
    latencies = jnp.array([0.3, 0.1, 0.9, 0.2])
    mask, waited = room.WaitFor(room.ExponentialLatency(1.0), 3).outcome(latencies)
    np.testing.assert_array_equal(mask, [True, True, False, True])
    np.testing.assert_allclose(waited, 0.3)


def as_sets(masks):
    return [frozenset(np.flatnonzero(~mask)) for mask in np.asarray(masks)]


EVERY = {
    nj.ExactStragglers: lambda s: itertools.combinations(range(7), s),
    room.ContiguousStragglers: lambda s: (range(begin, begin + s) for begin in range(8 - s)),
}


@pytest.mark.parametrize("law", EVERY)
@pytest.mark.parametrize("number", [0, 1, 3, 7])
def test_every_set_of_stragglers_is_listed_or_drawn(law, number, key):
    law, expected = law(number), [frozenset(gone) for gone in EVERY[law](number)]
    assert {*as_sets(draws(law, key, 7))} == {*expected}
    for masks in (law.every_set(7, len(expected)), room.straggler_sets(law, key, 7, 99)):
        assert masks.dtype == bool
        assert len(as_sets(masks)) == len(expected)
        assert {*as_sets(masks)} == {*expected}
    if len(expected) > 1:
        assert law.every_set(7, len(expected) - 1) is None
        few = len(expected) - 1
        drawn, again = (room.straggler_sets(law, key, 7, few) for _ in range(2))
        np.testing.assert_array_equal(drawn, again)
        assert drawn.shape == (few, 7)
        assert {*as_sets(drawn)} <= {*expected}


def test_a_law_that_cannot_be_listed_is_drawn(key):
    law = nj.IndependentStragglers(0.3)
    for each in (law, room.WaitFor(room.ExponentialLatency(1.0), 5)):
        assert each.every_set(3, 10**9) is None
    assert room.straggler_sets(law, key, 12, DRAWS).shape == (DRAWS, 12)


# -- The choice of how to hedge: forecasts by replay, what copies show, and what a budget buys -----


def foresee(replay, redundancy, known, limit=1.5, at_once=1, extra=1):
    sure = replay.draws < known
    doubled = {"none": np.zeros_like(sure), "uncertain": ~sure, "always": np.ones_like(sure)}
    play = Play(Hedge(limit, at_once), extra, doubled[redundancy], sure, 1.0 - extra)
    return forecast(replay, play)


def test_a_tail_is_that_of_calls_played_again():
    own = np.ones(10_000)
    own[:30] = 11.0  # of which the 20 and more that tails look at are some
    copies = np.full((2, 10_000), 2.0)
    replay = RecordedCalls(own, copies, np.full(10_000, 0.5), 0.05)
    hedged = foresee(replay, "none", 0.0)
    assert hedged.tail == pytest.approx(1.5 + 2.0)
    assert hedged.calls == pytest.approx(1 + 30 / 10_000)
    assert hedged.late == pytest.approx(30 / 10_000)
    known = foresee(replay, "none", 0.6)
    assert (known.tail, known.calls) == (pytest.approx(1.5), 1.0)
    # Half of the queries are drawn as known or not: here all alike.
    assert foresee(replay, "uncertain", 0.6).calls == 1.0
    doubted = foresee(replay, "uncertain", 0.4)
    assert (doubted.tail, doubted.calls) == (pytest.approx(2.0), pytest.approx(2 + 30 / 10_000))
    assert foresee(replay, "always", 0.6) == foresee(replay, "always", 0.6)
    assert foresee(replay, "always", 0.6).tail == pytest.approx(1.5)
    late = foresee(replay, "none", 0.0, limit=20.0)
    assert (late.tail, late.calls) == (pytest.approx(11.0), 1.0)


def test_copies_are_other_workers_calls_of_the_same_time():
    calls = [Call(float(i), 0.1 if i % 4 else 1.0, 1, i % 4) for i in range(400)]
    calls += [Call(i + 0.5, 0.4, 8, i % 4) for i in range(40)]  # larger ones take longer
    calls += [Call(0.1, 7.0, 2, 0)]  # of its size nothing is known
    replay = RecordedCalls.replay(calls, 2, workers=4, seed=0)
    assert replay.median == pytest.approx(0.1)
    assert set(np.round(replay.own, 6)) == {1.0, 10.0}
    slow = replay.own > 5
    assert (replay.copies[:, slow] == 1).all(), "worker 0 is not its own copy"
    assert (replay.copies[:, ~slow] > 5).any()
    assert RecordedCalls.replay(calls[:10], 2, workers=4, seed=0) is None
    # The first copy is one of the next calls, as many as there are workers; the second one of those
    # that follow.
    rising = [Call(float(i), 1.0 + i, 1, i % 4) for i in range(400)]
    replay = RecordedCalls.replay(rising, 2, workers=4, seed=0)
    later = np.rint((replay.copies - replay.own) * replay.median)[
        :, replay.own < replay.own.max() / 2
    ]
    assert set(later[0]) == {1, 2, 3}, "the fourth is the worker's own"
    assert set(later[1]) == {5, 6, 7}
    # What is slow together stays together: a copy is as slow as its query.
    together = [Call(float(i), 1.0 if 200 <= i < 400 else 0.1, 1, i % 4) for i in range(600)]
    replay = RecordedCalls.replay(together, 1, workers=4, seed=0)
    assert np.mean(replay.own == replay.copies[0]) > 0.97


def test_copies_of_slow_queries_are_as_slow_where_that_was_seen():
    own, quick = np.ones(10_000), np.ones((2, 10_000))
    own[:500], own[500:1500] = 11.0, 4.0  # by their worker, and by themselves
    replay = RecordedCalls(own, quick, np.random.default_rng(0).random(10_000), 0.05)
    fours = own == 4.0
    alike = replay.as_slow(1.0 * fours)
    assert (alike.copies[:, :500] == 1).all()
    assert (alike.copies[:, 500:1500] == 4).all()
    assert foresee(alike, "none", 0.0, extra=0).tail == pytest.approx(4.0)
    never = Play(Hedge(1.5, hedges=False))
    found = forecast(alike, never)
    assert (found.tail, found.calls) == (11.0, 1.0)
    half = replay.as_slow(0.5 * fours).copies[0, 500:1500]
    assert 0.4 < np.mean(half == 4) < 0.6
    # There are trials without hedging, too.
    slow, copies = hedged_times(alike, never)
    assert (np.sort(slow) == np.repeat([4.0, 11.0], [1000, 500])).all()
    assert np.sort(copies) == pytest.approx(np.repeat([1.0, 4.0], [500, 1000]))
    # A second copy goes out after the first was late, or with it.
    quick[0] = 11.0
    for at_once, time in ((1, 2.5), (2, 1.0)):
        slow, copies = hedged_times(replay, Play(Hedge(1.5, at_once)))
        assert copies == pytest.approx(np.full(1500, time))
        # Where the loser is cancelled, the time until the first answer is seen.
        _, raced = hedged_times(replay, Play(Hedge(1.5, at_once)), raced=True)
        assert raced == pytest.approx(np.minimum(slow, 1.5 + time))


def test_trials_show_that_copies_are_as_slow_only_beyond_chance():
    random, fours = np.random.default_rng(0), 3

    def trials(share, number=500):
        found = CopyTrials()
        for _ in range(number // 50):
            times = np.where(random.random(50) < share, 4.0, 1.0)
            apart, alike = np.array([4.0, 1.0, 1.0, 1.0, 1.0]), np.array([4.0])
            found.add(times, apart=apart, alike=alike, decay=0.97)
        return found.shares

    assert max(trials(0.2)[fours] for _ in range(20)) < 0.05
    assert trials(1.0)[fours] > 0.9
    assert trials(1.0).sum() == trials(1.0)[fours]
    assert 0.3 < trials(0.6)[fours] < 0.5  # (0.6 - 0.2) / (1 - 0.2), less what chance does
    few = CopyTrials()
    few.add(np.full(19, 9.0), apart=np.ones(1), alike=np.full(1, 9.0), decay=0.97)
    assert not few.shares.any()


def test_the_shortest_tail_that_the_budget_allows_is_chosen():
    random = np.random.default_rng(0)
    own, *copies = 1 + 10.0 * (random.random((3, 20_000)) < 0.05)
    replay = RecordedCalls(own, np.array(copies), random.random(20_000), 0.05)
    hedges = [Hedge(limit, at_once) for limit in (1.2, 2.0, 20.0) for at_once in (1, 2)]
    found = {hedge: forecast(replay, Play(hedge)) for hedge in hedges}
    assert choose(found, hedges[0], 1.2) == Hedge(1.2, 2), "two at once, as both may straggle"
    assert choose(found, hedges[0], 1.06) == Hedge(1.2, 1)
    assert choose(found, hedges[0], 1.0).limit == 20.0, "the cheapest, where all cost too much"
    # A setting stays where another is hardly better.
    found[Hedge(1.19)] = found[Hedge(1.2)]._replace(tail=found[Hedge(1.2)].tail - 0.01)
    assert choose(found, Hedge(1.2), 1.06) == Hedge(1.2)


def test_calls_that_were_cancelled_take_as_long_as_others_that_took_longer():
    seconds = np.array([1.0, 1.0, 2.35, 2.35, 11.0, 12.0, 20.0])
    ended = np.array([True, True, False, False, True, True, False])
    found = completed(seconds, ended, np.random.default_rng(0))
    assert (found[ended] == seconds[ended]).all()
    assert set(found[2:4]) <= {11.0, 12.0}
    assert found[6] == 40.0, "twice as long, where none took longer"
