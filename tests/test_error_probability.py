"""How likely a label is wrong: the regression behind it, its promises, and how to keep them."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from scipy.special import expit

from nercc_jax import Berrut, ExactStragglers, NeRCC, calibrate_error_probability
from nercc_jax.evaluation import record_answers
from nercc_jax.risk import ErrorProbability, logistic_regression
from nercc_jax.risk._error_probability import (
    fit_error_probability,
    observe_errors,
    regression,
)
from nercc_jax.surrogates import Surrogate
from nercc_jax.surrogates.surrogate import group_prior_of_points

K, N, OUTPUTS = 4, 7, 4
LAWS = {"three": ExactStragglers(3)}
_WEIGHTS = np.random.default_rng(0).normal(size=(5, OUTPUTS))


def model(x):
    return jnp.sin(1.5 * x @ jnp.asarray(_WEIGHTS, x.dtype))


def rough(x):
    return model(x) + 0.3 * jnp.cos(3 * x @ jnp.asarray(_WEIGHTS, x.dtype))


def points(seed, groups):
    return np.random.default_rng(seed).normal(size=(groups * K, 5)).astype("float32")


CODES = {
    "chebyshev": lambda: NeRCC(K, N),
    "repeated": lambda: NeRCC(K, N, lambda_dec=0.0, points="repeated"),
}


def seen(code, x, surrogate=None):
    """Features, sure and wrong ones of data points under all sets, and their doubts' inputs."""
    masks = jnp.asarray(LAWS["three"].every_set(N, 100))
    own = record_answers(model, code, x)
    beside = None if surrogate is None else group_prior_of_points(surrogate, code, x)
    return [np.asarray(each) for each in observe_errors(own, surrogate, beside, masks)]


@pytest.mark.parametrize(("allowed", "limit"), [(0.0, 0.0), (0.03, 0.1), (0.0625, 0.2), (0.5, 0.2)])
def test_the_limit_is_the_largest_level_whose_risk_is_within_the_allowance(allowed, limit):
    """Of those that are given out: a quarter of all up to the second level, a half up to the third.

    At the third the risk is exactly what an allowance of 0.0625 allows; the last is too large.
    """
    risks = jnp.array([0.0, 0.0073, 0.03125, 0.5])
    shares = jnp.array([0.75, 0.5, 0.25, 0.125])
    none, levels = jnp.zeros(2), jnp.array([0.0, 0.1, 0.2, 0.3])
    found = ErrorProbability(none, none, none, levels, risks, shares)
    assert found.limit(allowed) == pytest.approx(limit)


def test_no_answer_may_be_wrong_with_five_times_the_allowance():
    none, levels = jnp.zeros(2), jnp.array([0.0, 0.2, 0.9])
    sure = ErrorProbability(none, none, none, levels, jnp.zeros(3), jnp.array([0.9, 0.5, 0.1]))
    assert [sure.limit(share) for share in (0.0, 0.01, 0.1, 0.3, 0.6)] == pytest.approx(
        [0.0, 0.05, 0.5, 0.5, 0.6]
    )


@pytest.mark.parametrize(
    ("code", "surrogate"),
    [("chebyshev", None), ("repeated", Surrogate(rough, theta=0.8, kappa=2.0))],
)
def test_it_keeps_its_promises_on_other_data(code, surrogate, key):
    code = CODES[code]()
    error_probability = calibrate_error_probability(
        model, code, points(0, 400), LAWS, key=key, surrogate=surrogate, num_sets=100
    )
    features, sure, wrong = seen(code, points(1, 800), surrogate)
    promised = np.where(sure, 0, error_probability.of_features(jnp.asarray(features)))
    assert not wrong[sure].any()
    assert sure.any() == (code.alpha[0] in code.beta)
    # Bins of as many expected wrong ones each.
    order = np.argsort(promised, axis=None)
    share = np.cumsum(promised.ravel()[order]) / promised.sum()
    for part in range(5):
        chosen = order[(share > part / 5) & (share <= (part + 1) / 5)]
        ratio = wrong.ravel()[chosen].mean() / promised.ravel()[chosen].mean()
        assert 0.7 < ratio < 1.3, (part, ratio)
    # And it tells more than the mean does, if there is anything to tell: the least uncertain half.
    least = order[promised.ravel()[order] > 0]
    least = least[: least.size // 2]
    if surrogate is not None or not sure.any():
        assert wrong.ravel()[least].mean() < 0.75 * wrong[~sure].mean()
    for wanted in (0.005, 0.02):
        kept = promised <= error_probability.limit(wanted)
        assert np.sum(wrong & kept) <= wanted * np.sum(kept & ~sure)
        np.testing.assert_allclose(
            np.mean(~kept), error_probability.share(error_probability.limit(wanted)), atol=0.05
        )
    assert error_probability.limit(1.0) == error_probability.levels[-1]


def test_sure_ones_and_lost_ones(key, dtype):
    x, code = points(0, 40), CODES["chebyshev"]()
    error_probability = calibrate_error_probability(model, code, x, LAWS, key=key, num_sets=10)
    predictions = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, OUTPUTS)), float)
    predictions = predictions.at[0, 0, 1].set(jnp.nan)
    deviation = jnp.full((2, 3), 0.5).at[1, 2].set(0).at[1, 1].set(jnp.inf)
    value = eqx.filter_jit(error_probability)(predictions, deviation)
    assert value.shape == (2, 3)
    assert value[0, 0] == 1
    assert value[1, 2] == 0
    assert 0 < value[0, 1] < 1
    assert 0 < value[1, 1] < 1
    nearer = error_probability(predictions, deviation / 100)
    assert nearer[0, 1] < value[0, 1], "the surer, the less doubt"


def test_the_risk_is_what_can_be_counted(dtype):
    """20 data points under one set: the last two are sure, and doubt falls with the feature."""
    feature = np.concatenate([np.linspace(3, -3, 18), [0, 0]])
    features = np.stack([np.ones(20), feature], axis=-1).reshape(1, 5, 4, 2)
    sure = (np.arange(20) >= 18).reshape(1, 5, 4)
    wrong = np.isin(np.arange(20), [9, 14, 16, 17]).reshape(1, 5, 4)
    error_probability = fit_error_probability(features, sure, wrong)
    assert error_probability.weights[1] < 0
    assert error_probability.levels[0] == error_probability.risks[0] == 0
    np.testing.assert_allclose(error_probability.shares[0], 0.9, atol=1e-6)
    value = np.asarray(error_probability.of_features(jnp.asarray(features.reshape(20, 2), float)))
    np.testing.assert_allclose(value[:18].sum(), 4, rtol=0.1)
    # One too many is counted among 21: nine of the unsure are without a wrong one, and the promise
    # is a share of these.
    bound = (1 / 21) / (9 / 20)
    assert error_probability.limit(0.0) == error_probability.limit(bound - 1e-6) == 0
    np.testing.assert_allclose(error_probability.limit(bound + 1e-6), value[8], rtol=1e-4)
    # And two standard errors of the mean of five groups: one of the third's four is wrong.
    bound = (2 / 21 + 2 * np.sqrt(np.var([0, 0, 1 / 4, 0, 0]) / 5)) / (14 / 20)
    np.testing.assert_allclose(error_probability.limit(bound - 1e-6), value[8], rtol=1e-4)
    np.testing.assert_allclose(error_probability.limit(bound + 1e-6), value[13], rtol=1e-4)
    np.testing.assert_allclose(error_probability.limit(1.0), value[17], rtol=1e-4)
    np.testing.assert_allclose(error_probability.share(float(value[8]) + 1e-4), 9 / 20, atol=1e-6)
    assert error_probability.share(0.0) == pytest.approx(0.9)
    assert error_probability.share(1.0) == pytest.approx(0.0)


def test_the_correction_is_for_what_is_no_logistic_curve(dtype):
    """A step in the probability, which no line of log-odds can follow; one set of 20,000 groups."""
    rng = np.random.default_rng(0)
    feature = rng.uniform(-1, 1, 20_000)
    true = np.where(feature > 0, 0.01, 0.4)
    wrong = (rng.uniform(size=feature.shape) < true).reshape(1, -1, 1)
    features = np.stack([np.ones_like(feature), feature], axis=-1).reshape(1, -1, 1, 2)
    error_probability = fit_error_probability(features, np.zeros(wrong.shape, bool), wrong)
    given = np.asarray([[1, -0.9], [1, -0.3], [1, 0.4], [1, 0.9]])
    line = expit(given @ np.asarray(error_probability.weights))
    assert line[0] > 0.5
    assert line[1] < 0.3, "or there is nothing to correct"
    assert line[2] > 0.04
    value = np.asarray(error_probability.of_features(jnp.asarray(given, float)))
    np.testing.assert_allclose(value, [0.4, 0.4, 0.01, 0.01], rtol=0.5)
    # What it joins stays in order.
    grid = np.column_stack([np.ones(101), np.linspace(-1, 1, 101)])
    assert np.all(
        np.diff(np.asarray(error_probability.of_features(jnp.asarray(grid, float)))) <= 1e-6
    )


@pytest.mark.parametrize("slope", [0.0, 1e-4, 0.3])
def test_where_hardly_anything_is_known_rounding_decides_nothing(slope, dtype):
    """All doubts are nearly the same: in a compiled program as many are kept as in calibration."""
    rng = np.random.default_rng(1)
    shape = (20, 300, 4)
    feature = rng.normal(size=shape)
    wrong = rng.uniform(size=shape) < expit(slope * feature)
    sure = rng.uniform(size=shape) < 0.5
    features = np.stack([np.ones(shape), -feature], axis=-1)
    error_probability = fit_error_probability(features, sure, wrong & ~sure)
    value = np.asarray(eqx.filter_jit(error_probability.of_features)(jnp.asarray(features, float)))
    value = np.where(sure, 0, value)
    for limit in np.asarray(error_probability.levels)[
        [0, 1, len(error_probability.levels) // 2, -1]
    ]:
        share = error_probability.share(float(limit))
        assert np.mean(value > limit) == pytest.approx(share, abs=5e-3)
        kept = np.mean(wrong & ~sure & (value <= limit))
        assert (
            kept
            <= error_probability.risks[np.searchsorted(np.asarray(error_probability.levels), limit)]
            + 5e-3
        )


def test_a_groups_calibration_does_not_come_from_itself():
    """Other labels in a group change its own log-odds by the common shift and scale only."""
    rng = np.random.default_rng(0)
    features = np.column_stack([np.ones(300), rng.normal(size=(300, 3))])
    group = np.repeat(np.arange(15), 20)
    wrong = rng.uniform(size=300) < expit(features @ [-1.0, 1.0, -0.5, 0.2])
    first, last = group == 0, group == 14
    changed = np.where(first, ~wrong, wrong)
    before, after = (regression(features, labels, group, 1.0, ())[1] for labels in (wrong, changed))

    def unexplained(part):
        line = np.polyfit(before[part], after[part], 1)
        return np.abs(np.polyval(line, before[part]) - after[part]).max()

    assert unexplained(first) < 1e-9
    assert unexplained(last) > 1e-3, "to others they tell something"


@pytest.mark.parametrize("slope", [-1.5, 1.5])
def test_the_regression_is_the_most_likely_one(slope):
    """Under the constraint that the second and third features do not raise the doubt."""
    rng = np.random.default_rng(0)
    columns = [rng.normal(size=500), 3 + 0.1 * rng.normal(size=500), rng.normal(size=500)]
    features = np.column_stack([np.ones(500), *columns])
    wrong = rng.uniform(size=500) < expit(features @ [20.0, slope, -7.0, 0.5])
    weights = logistic_regression(features, wrong, falling=(1, 2))
    mean, scale = features.mean(axis=0), features.std(axis=0)
    mean[0], scale[0] = 0, 1
    z = np.concatenate([(features - mean) / scale, np.eye(1, 4)])
    target = np.append(wrong.astype(float), 0.5)
    free = [0, 1, 2, 3] if slope < 0 else [0, 2, 3]

    def loss(w):
        logit = z[:, free] @ w
        return np.sum(np.logaddexp(0, logit) - target * logit) + np.sum(w[1:] ** 2) / 2

    best = scipy.optimize.minimize(loss, np.zeros(len(free)), tol=1e-12).x
    np.testing.assert_allclose(features @ weights, z[:-1][:, free] @ best, atol=1e-3)


@pytest.mark.parametrize("all_wrong", [False, True])
def test_the_regression_where_all_are_alike(all_wrong):
    features = np.column_stack([np.ones(50), np.linspace(-1, 1, 50)])
    weights = logistic_regression(features, np.full(50, all_wrong))
    probability = 1 / (1 + np.exp(-features @ weights))
    expected = (50.5 if all_wrong else 0.5) / 51
    np.testing.assert_allclose(probability, expected, atol=0.01)
    np.testing.assert_array_equal(logistic_regression(features[:0], np.zeros(0, bool)), [0, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stragglers": {}}, "there are no stragglers"),
        ({"code": Berrut(K, N)}, "Berrut is no regression"),
        ({"x": np.full((8, 5), np.inf, "float32")}, "are not finite: take them out"),
        ({"x": points(0, 1)[:3]}, "3 data points fill no group of 4"),
    ],
)
def test_input_errors(change, message, key, untyped):
    arguments = {"code": NeRCC(K, N), "x": points(0, 3), "stragglers": LAWS} | change
    with pytest.raises(ValueError, match=message):
        calibrate_error_probability(model, key=key, num_sets=2, **arguments)


def test_wrong_use(key, untyped):
    error_probability = calibrate_error_probability(
        model, NeRCC(K, N), points(0, 10), LAWS, key=key, num_sets=2
    )
    predictions = jnp.ones((2, OUTPUTS))
    with pytest.raises(ValueError, match="calibrated without a surrogate's outputs"):
        error_probability(predictions, jnp.ones(2), predictions)
    with pytest.raises(ValueError, match=r"max_disagreement must be in \[0, 1\], not 1.5"):
        error_probability.limit(1.5)
    with pytest.raises(ValueError, match="must be 0 or positive, not nan"):
        error_probability.share(float("nan"))
