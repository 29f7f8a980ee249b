"""Straggler sets and latencies: counts, laws against their closed forms, rules, errors."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import nercc_jax as nj
from nercc_jax import stragglers as room

DRAWS = 4000


def draws(law, key, num_workers=12):
    keys = jax.random.split(key, DRAWS)
    return np.asarray(jax.vmap(lambda k: law.available(k, num_workers))(keys))


def test_exactly_s(key):
    masks = draws(nj.ExactStragglers(5), key)
    np.testing.assert_array_equal((~masks).sum(axis=1), 5)
    np.testing.assert_allclose((~masks).mean(axis=0), 5 / 12, atol=0.04)


def test_independent(key):
    masks = draws(nj.IndependentStragglers(0.3), key)
    np.testing.assert_allclose((~masks).mean(axis=0), 0.3, atol=0.04)
    np.testing.assert_allclose((~masks).sum(axis=1).var(), 12 * 0.3 * 0.7, rtol=0.1)
    assert draws(nj.IndependentStragglers(0.0), key).all()
    assert not draws(nj.IndependentStragglers(1.0), key).any()


def test_contiguous(key):
    masks = draws(room.ContiguousStragglers(4), key)
    np.testing.assert_array_equal((~masks).sum(axis=1), 4)
    starts = (~masks).argmax(axis=1)
    np.testing.assert_array_equal(masks[np.arange(DRAWS), starts + 3], False)
    assert set(starts) == set(range(9))


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


@pytest.mark.parametrize(
    ("law", "hard", "others"),
    [
        (room.RowLatency.independent, 0.05, 0.05),
        (room.RowLatency.leaning_to, 0.025 + 0.025 / 0.12, 0.025),
        (room.RowLatency.extreme, 1.0, 0.0),
    ],
)
def test_rows_straggle_by_their_scores(law, hard, others, key):
    """Shares against the definition, and delays of those rows alone."""
    law = law(room.TraceLatency([1.0]), room.TraceLatency([10.0]), 0.05)
    scores = jax.random.normal(key, (20_000,))
    late = np.asarray(law.sample(key, scores)) > 5
    order = np.argsort(-np.asarray(scores))
    number = round(law.hardest * len(order)) if law.leaning else len(order) // 2
    assert late[order[:number]].mean() == pytest.approx(hard, abs=0.02)
    assert late[order[number:]].mean() == pytest.approx(others, abs=0.01)
    assert late.mean() == pytest.approx(0.05, abs=0.01)


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
    for bad in ([], [[0.1]], [-1.0], [np.nan]):
        with pytest.raises(ValueError, match="finite, non-negative seconds"):
            room.TraceLatency(np.array(bad))


def test_rules(key):
    latencies = jnp.array([0.3, 0.1, 0.9, 0.2])
    mask, waited = room.WaitFor(room.ExponentialLatency(1.0), 3).outcome(latencies)
    np.testing.assert_array_equal(mask, [True, True, False, True])
    np.testing.assert_allclose(waited, 0.3)
    rule = room.WaitUntil(room.ExponentialLatency(1.0), 0.25)
    mask, waited = rule.outcome(latencies)
    np.testing.assert_array_equal(mask, [False, True, False, True])
    np.testing.assert_allclose(waited, 0.25)
    np.testing.assert_allclose(rule.outcome(latencies / 10)[1], 0.09, rtol=1e-5)
    masks = draws(room.WaitFor(room.ParetoLatency(1.0, 1.1), 7), key)
    np.testing.assert_array_equal(masks.sum(axis=1), 7)
    share = draws(room.WaitUntil(room.ExponentialLatency(1.0), 1.0), key).mean()
    np.testing.assert_allclose(share, 1 - np.exp(-1), atol=0.01)


def test_the_same_key_gives_the_same_set(key):
    law = nj.ExactStragglers(3)
    np.testing.assert_array_equal(
        law.available(key, 9), jax.jit(law.available, static_argnums=1)(key, 9)
    )


def as_sets(masks):
    return [frozenset(np.flatnonzero(~mask)) for mask in np.asarray(masks)]


@pytest.mark.parametrize("number", [0, 1, 3, 7])
def test_every_set_of_exactly_s(number, key):
    law, count = nj.ExactStragglers(number), math.comb(7, number)
    expected = {frozenset(gone) for gone in itertools.combinations(range(7), number)}
    for masks in (law.every_set(7, count), room.straggler_sets(law, key, 7, count)):
        assert masks.shape == (count, 7)
        assert masks.dtype == bool
        assert len(set(as_sets(masks))) == count
        assert set(as_sets(masks)) == expected


@pytest.mark.parametrize("number", [0, 2, 7])
def test_every_contiguous_set(number, key):
    law = room.ContiguousStragglers(number)
    expected = [frozenset(range(start, start + number)) for start in range(8 - number)]
    for masks in (law.every_set(7, 8 - number), room.straggler_sets(law, key, 7, 8)):
        assert as_sets(masks) == expected


@pytest.mark.parametrize(
    ("law", "count"), [(nj.ExactStragglers(2), 21), (room.ContiguousStragglers(2), 6)]
)
def test_more_sets_than_wanted_are_drawn(law, count, key):
    assert law.every_set(7, count - 1) is None
    assert law.every_set(7, count) is not None
    drawn = room.straggler_sets(law, key, 7, count - 1)
    assert drawn.shape == (count - 1, 7)
    np.testing.assert_array_equal((~drawn).sum(axis=1), 2)
    assert len(set(as_sets(drawn))) > 1
    np.testing.assert_array_equal(drawn, room.straggler_sets(law, key, 7, count - 1))
    other = room.straggler_sets(law, jax.random.fold_in(key, 1), 7, count - 1)
    assert as_sets(other) != as_sets(drawn)


def test_a_law_that_cannot_be_listed_is_drawn(key):
    for law in (
        nj.IndependentStragglers(0.3),
        room.WaitFor(room.ExponentialLatency(1.0), 5),
        room.WaitUntil(room.ExponentialLatency(1.0), 1.0),
    ):
        assert law.every_set(3, 10**9) is None
    masks = room.straggler_sets(nj.IndependentStragglers(0.3), key, 12, DRAWS)
    assert masks.shape == (DRAWS, 12)
    np.testing.assert_allclose((~masks).mean(axis=0), 0.3, atol=0.04)


def test_sets_of_more_stragglers_than_workers():
    for law in (nj.ExactStragglers(5), room.ContiguousStragglers(5)):
        with pytest.raises(ValueError, match="5 of 4 workers"):
            law.every_set(4, 100)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda key: nj.ExactStragglers(-1), "an integer from 0 on, not -1"),
        (lambda key: nj.ExactStragglers(1.5), "an integer from 0 on, not 1.5"),
        (lambda key: nj.ExactStragglers(5).available(key, 4), "5 of 4 workers"),
        (lambda key: room.ContiguousStragglers(5).available(key, 4), "5 of 4 workers"),
        (
            lambda key: room.WaitFor(room.ExponentialLatency(1.0), 5).available(key, 4),
            "5 of 4 workers",
        ),
        (lambda key: nj.IndependentStragglers(1.5), r"probability must be in \[0, 1\]"),
        (lambda key: room.ExponentialLatency(0.0), "scale must be positive"),
        (lambda key: room.ExponentialLatency(1.0, shift=-1.0), "shift must be 0 or positive"),
        (lambda key: room.LogNormalLatency(1.0, np.nan), "sigma must be positive"),
        (lambda key: room.ParetoLatency(1.0, -2.0), "shape must be positive"),
        (lambda key: room.RowLatency.independent(None, None, 1.5), r"rate must be in \[0, 1\]"),
        (
            lambda key: room.RowLatency.leaning_to(None, None, 0.5, leaning=0.9, hardest=0.1),
            "the hardest 0.1 of the rows are too few",
        ),
        (
            lambda key: room.WaitUntil(room.ExponentialLatency(1.0), 0.0),
            "deadline must be positive",
        ),
    ],
)
def test_errors(build, message, key, untyped):
    with pytest.raises(ValueError, match=message):
        build(key)
