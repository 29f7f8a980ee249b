"""How far decoded queries are doubted: limits that keep their promise, learnt or calibrated."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from batching import EXTRAS, INTERLEAVED, OWN
from hypothesis import given
from hypothesis import strategies as st

from nercc_jax.risk._straggler_risk import risk_cap
from nercc_jax.serving import Coder
from nercc_jax.serving.adapt._error_estimator import ErrorEstimator, calibrate
from nercc_jax.serving.core._error_probability import DecodingErrorProbability, uncalibrated
from nercc_jax.serving.core._fallback import Budget

CODE = INTERLEAVED
WEIGHTS = np.random.default_rng(2).normal(size=(4, 3)).astype(np.float32)


def model(x):
    return jnp.tanh(3 * jnp.asarray(x) @ jnp.asarray(WEIGHTS))


def data(number, seed):
    return np.random.default_rng(seed).normal(size=(number, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def known():
    coder = Coder(CODE)
    estimator = ErrorEstimator(coder)
    estimator.calibrate(model, data(1024, 3))
    return coder, estimator


@pytest.mark.parametrize("queries", [2, 4])
def test_no_more_is_wrong_than_was_asked_for(known, queries):
    """On other data: every query whose own worker straggles, as the last answers come in."""
    coder, estimator = known
    x = data(400 * queries, 4).reshape(400, queries, 4)
    answers = np.asarray(model(coder.encode(x, np.arange(8))))
    own = np.asarray(model(x)).argmax(-1)
    random, redundancy = np.random.default_rng(5), queries
    sent = np.array([*OWN[:queries], *EXTRAS[:queries]])
    doubt = estimator.error_probability(queries)
    limits = {share: doubt.limit(share) for share in (0.3, 0.1, 0.03)}
    wrong, answered = ({share: [] for share in limits} for _ in range(2))
    doubts, errors = [], []
    sets = list(itertools.product(range(queries), range(redundancy), range(4)))
    for place, more, _ in sets:
        others = random.permutation(np.setdiff1d(sent, OWN[place]))
        responded = len(others) - more
        open_ = {share: np.ones(len(x), bool) for share in limits}
        for number in (responded - 2, responded - 1, responded):
            mask = np.isin(np.arange(8), others[: max(number, 1)])
            given = np.where(mask[:, None, None], answers, 0)
            predictions, _, seen = coder.decode(given, mask, len(x), doubt)
            differ = predictions[:, place].argmax(-1) != own[:, place]
            for share, limit in limits.items():
                now = open_[share] & (seen[:, place] <= limit)
                wrong[share] += (differ & now).astype(float).tolist()
                answered[share] += now.astype(float).tolist()
                open_[share] &= ~now
        doubts.append(seen[:, place].mean())
        errors.append(differ.mean())
    for share in limits:
        assert sum(wrong[share]) <= share * sum(answered[share])
    assert doubt.share_above(limits[0.3]) < 0.95, "something is answered at once"
    assert 1 >= limits[0.3] >= limits[0.1] >= limits[0.03]
    assert np.mean(doubts) == pytest.approx(np.mean(errors), rel=0.3)


def test_sure_ones_are_right_more_often_than_a_place_is(known):
    """What decides by query beats what decides by the mask alone, from the same workers."""
    coder, estimator = known
    x = data(1600, 6).reshape(400, 4, 4)
    mask = np.ones(8, bool)
    mask[OWN[0]] = False
    answers = np.asarray(model(coder.encode(x, np.arange(8))))
    given = np.where(mask[:, None, None], answers, 0)
    predictions, _, doubt = coder.decode(given, mask, len(x), estimator.error_probability(4))
    wrong = predictions[:, 0].argmax(-1) != np.asarray(model(x))[:, 0].argmax(-1)
    sure = doubt[:, 0] <= np.median(doubt[:, 0])
    assert wrong[sure].mean() < 0.5 * wrong.mean() < wrong[~sure].mean()


def test_a_doubt_is_learnt_from_traffic():
    coder = Coder(CODE)
    estimator = ErrorEstimator(coder)
    x = data(4 * 70, 7).reshape(70, 4, 4)
    answers = np.asarray(model(coder.encode(x, np.arange(8)))).swapaxes(0, 1)
    learnt = []
    for group, own in zip(answers, np.asarray(model(x)), strict=True):
        list(estimator.add_group(group, own))  # all steps
        if not learnt or estimator.error_probability(4) is not learnt[-1]:
            learnt.append(estimator.error_probability(4))
        assert estimator.needs_samples(4) or estimator.error_probability(4).num_queries > 0
    assert [doubt.num_queries for doubt in learnt] == [0, 4 * 32, 4 * 64]
    assert np.isnan(learnt[0].weights).all()
    assert learnt[0].limit(0.9) < 0, "nothing is answered before something is known"
    assert estimator.error_probability(3).num_queries == 0
    assert estimator.error_probability(1).num_queries == 0


@pytest.mark.parametrize("width", [8, 64])
def test_traffic_is_rehearsed_a_little_at_a_time(width, monkeypatch):
    """By what decodes, as many groups at once; all of them would keep every core busy for long."""
    coder = Coder(CODE)
    estimator = ErrorEstimator(coder)
    estimator.compile((3,), width)
    programs = coder.agree._cache_size()
    x = data(4 * 100, 7).reshape(100, 4, 4)
    answers = np.asarray(model(coder.encode(x, np.arange(8)))).swapaxes(0, 1)
    compare, seen = coder.compare, []

    def record(*arguments):
        seen.append(arguments[0].copy())
        return compare(*arguments)

    monkeypatch.setattr(coder, "compare", record)
    for group, own in zip(answers, np.asarray(model(x)), strict=True):
        before = len(seen)
        for step, _ in enumerate(estimator.add_group(group, own)):
            assert len(seen) == before + step + 1
    assert estimator.error_probability(4).num_queries
    mask = np.arange(8) != 3
    for step, _ in enumerate(estimator.update_expected(4, mask)):
        assert step < 100 / width
    assert estimator.expected_error(4, mask).current
    assert {len(groups) for groups in seen} == {min(width, 32), 100 % width or width, width}
    looked_at = {group.tobytes() for groups in seen for group in groups}
    assert len(looked_at) >= 64, "each in its turn"
    assert coder.agree._cache_size() == programs


@pytest.mark.parametrize("queries", [4, 3])
def test_a_doubt_is_learnt_where_calibration_was_too_short(queries):
    """Groups are wanted until it is known, so that it will be."""
    coder = Coder(CODE)
    estimator = ErrorEstimator(coder)
    estimator.calibrate(model, data(20 * queries, 8))
    x = data(40 * queries, 9).reshape(40, queries, 4)
    answers = np.asarray(model(coder.encode(x, np.arange(8)))).swapaxes(0, 1)
    for group, own in zip(answers, np.asarray(model(x)), strict=True):
        if not estimator.needs_samples(queries):
            break
        list(estimator.add_group(group, own))  # all steps
    assert estimator.error_probability(queries).num_queries >= 32 * queries


shares = st.floats(0, 1)


@given(
    samples=st.lists(st.tuples(shares, st.booleans()), min_size=1, max_size=60),
    share=shares,
    extra=st.integers(0, 1000),
)
def test_limits_by_counting(samples, share, extra):
    """The largest limit at which no more of the answers are wrong, by Clopper and Pearson."""
    doubts, wrong = (np.array(part) for part in zip(*samples, strict=True))
    doubts, number = doubts.astype(np.float32), len(samples) + extra
    doubt = DecodingErrorProbability(
        np.zeros(5, np.float32), np.sort(doubts[wrong]), np.sort(doubts), number
    )
    limit = doubt.limit(share)

    def holds(limit):
        """Whether the upper bound of the share, at three quarters, is within what was asked."""
        answered = doubts <= limit
        each, errors = (number * np.mean(which) for which in (answered, answered & wrong))
        each, errors = int(each + 1e-9), math.ceil(errors - 1e-9)
        if share == 1:
            return errors <= each
        return errors < each and scipy.stats.beta.ppf(0.75, errors + 1, each - errors) <= share

    most = np.float32(risk_cap(share))
    if limit >= 0:
        assert holds(limit)
        assert limit <= most
        assert doubt.share_above(limit) == np.mean(doubts > limit)
    # Of the larger limits that differ in what is answered, none would do.
    for larger in doubts[(doubts > limit) & (doubts <= most)]:
        assert not holds(larger)


def test_without_samples_nothing_may_be_answered():
    assert uncalibrated().limit(1.0) < 0
    assert uncalibrated().share_above(0.5) == 1


def test_what_was_wrong_at_any_look_counts():
    """Three samples, two looks each; the doubt is one half throughout, as nothing tells them
    apart: all that was ever wrong is wrong from there on."""
    features = np.zeros((4, 2, 5), np.float32)
    features[..., 0] = 1
    available = np.ones((4, 2), bool)
    wrong = np.array([[True, False], [False, True], [False, False], [True, True]])
    available[3] = False
    doubt = calibrate(features, available, wrong, 4)
    assert doubt.wrong_from.size == 3
    np.testing.assert_allclose(doubt.wrong_from[:2], 1 / (1 + np.exp(-doubt.weights[0])), rtol=1e-6)
    assert doubt.wrong_from[2] == 1, "an answer without a word is as uncertain as can be"
    np.testing.assert_allclose(doubt.weights[1:], 0, atol=1e-6)


@given(share=shares, events=st.lists(st.booleans(), max_size=300))
def test_no_more_is_sent_again_than_the_budget_has(share, events):
    budget, came, spent = Budget(share), 0, 0
    for asks in events:
        if not asks:
            budget.earn(1)
            came += 1
        elif budget.affords():
            budget.spend()
            spent += 1
    assert spent <= share * came + 1e-6


def test_budgets_have_no_bound_unless_given_and_save_no_more_than_they_may():
    free = Budget(None)
    for _ in range(10):
        assert free.affords()
        free.spend()
    little = Budget(0.0005)
    little.earn(1999)
    assert not little.affords()
    little.earn(2)
    assert little.affords(), "a small share is spent in the end"
    much = Budget(0.1)
    much.earn(10**6)
    for _ in range(100):
        assert much.affords()
        much.spend()
    assert not much.affords()
