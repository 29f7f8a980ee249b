"""How likely a label is wrong: the regression, its promises, and which outputs have labels."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from scipy.special import expit

from nercc_jax import (
    Berrut,
    ExactStragglers,
    NeRCC,
    Scheme,
    calibrate_error_probability,
    coded_inference,
)
from nercc_jax.risk import logistic_regression
from nercc_jax.risk._error_probability import fit_error_probability
from nercc_jax.surrogates import Surrogate

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


def seen(scheme, x):
    """Promised probabilities, sure and wrong ones of data points under all sets."""
    own = np.asarray(model(x)).argmax(-1)
    infer, found = coded_inference(model, scheme, with_status=True), []
    for mask in LAWS["three"].every_set(N, 100):
        result = infer(x, mask)
        labels = np.asarray(result.predictions).argmax(-1)
        wrong = (labels != own) | ~np.asarray(result.recovered)
        found.append((result.error_probability, result.deviation == 0, wrong))
    return [np.asarray(each) for each in zip(*found, strict=True)]


@pytest.mark.parametrize(
    ("code", "surrogate"),
    [("chebyshev", None), ("repeated", Surrogate(rough, theta=0.8, kappa=2.0))],
)
def test_it_keeps_its_promises_on_other_data(code, surrogate, key):
    code = CODES[code]()
    scheme = Scheme(code, surrogate=surrogate)
    error_probability = calibrate_error_probability(
        model, scheme, points(0, 400), LAWS, key=key, num_sets=100
    )
    scheme = Scheme(code, surrogate=surrogate, error_probability=error_probability)
    promised, sure, wrong = seen(scheme, points(1, 800))
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


def ranked(wrong, sure=None, **options):
    """An error probability of samples in the order of their feature, the surest first."""
    features = np.stack([np.ones(len(wrong)), np.linspace(3, -3, len(wrong))], axis=-1)
    found = fit_error_probability(
        features[:, None], np.asarray(wrong)[:, None], sure=sure, falling=(1,), **options
    )
    return found, np.asarray(found.of_features(features))


@pytest.mark.parametrize("failure", [None, 0.025, 0.25])
def test_the_bound_is_that_of_clopper_and_pearson(failure, dtype):
    """18 data points of which four are wrong, and two that are exact; or two standard errors."""
    wrong = np.isin(np.arange(20), [9, 14, 16, 17])
    found, value = ranked(wrong, np.arange(20) >= 18, failure=failure)
    assert found.weights[1] < 0
    assert found.levels[0] == found.bounds[0] == 0
    assert found.shares[0] == pytest.approx(0.9)
    np.testing.assert_allclose(value[:18].sum(), 4, rtol=0.1)
    for given in (9, 14, 18):
        errors = int(wrong[:given].sum())
        bound = (errors + 1) / (given + 1) + 2 * np.sqrt(errors * (given - errors) / given**3)
        if failure is not None:
            bound = scipy.stats.beta.ppf(1 - failure, errors + 1, given - errors)
        # No answer may be wrong with five times the share, nor with one half.
        caps = [max(min(5 * share, 0.5), share) for share in (bound + 1e-4, bound - 1e-4)]
        cap = min(value[given - 1] * (1 + 1e-5), caps[0])
        assert found.limit(bound + 1e-4) == pytest.approx(cap, rel=1e-4)
        assert found.limit(bound - 1e-4) < min(value[given - 1], caps[1] + 1e-9)
    assert found.limit(0.0) == 0
    assert found.share(float(value[8]) + 1e-4) == pytest.approx(9 / 20)
    assert [found.share(limit) for limit in (0.0, 1.0)] == pytest.approx([0.9, 0.0])


def test_samples_of_the_same_point_and_of_one_group_count_once():
    """Of 400 points each is seen ten times; wrong ones come alone, or a whole group at a time."""
    random, points = np.random.default_rng(0), np.repeat(np.arange(400), 10)
    alone = random.random(400) < 0.1
    together = np.repeat(random.random(20) < 0.1, 20)
    once, seen = ranked(alone), ranked(alone[points], points=400, owners=[points])
    assert float(seen[0].bounds[-1]) == pytest.approx(float(once[0].bounds[-1]), rel=0.1)
    independent, grouped = (
        ranked(together, owners=owners)[0].bounds[-1] for owners in ((), [np.arange(400) // 20])
    )
    assert grouped > 1.3 * independent


def test_a_sample_counts_as_wrong_from_its_first_wrong_look_on():
    """At the second look all are right, but half of them were given out before, wrongly."""
    random = np.random.default_rng(1)
    features = np.stack([np.ones((400, 2)), random.normal(size=(400, 2))], axis=-1)
    wrong = np.stack([random.random(400) < 0.5, np.zeros(400, bool)], axis=1)
    found = fit_error_probability(features, wrong, falling=(1,))
    unusable = fit_error_probability(features, wrong, usable=~wrong, falling=(1,))
    assert found.bounds[-1] > 0.4
    assert unusable.limit(0.05) > 0


def test_the_correction_is_for_what_is_no_logistic_curve(dtype):
    """A step in the probability, which no line of log-odds can follow; one set of 20,000 groups."""
    rng = np.random.default_rng(0)
    feature = rng.uniform(-1, 1, 20_000)
    true = np.where(feature > 0, 0.01, 0.4)
    wrong = (rng.uniform(size=feature.shape) < true)[:, None]
    features = np.stack([np.ones_like(feature), feature], axis=-1)[:, None]
    error_probability = fit_error_probability(features, wrong)
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
    shape = (24_000,)
    feature = rng.normal(size=shape)
    wrong = rng.uniform(size=shape) < expit(slope * feature)
    sure = rng.uniform(size=shape) < 0.5
    features = np.stack([np.ones(shape), -feature], axis=-1)
    error_probability = fit_error_probability(
        features[:, None], (wrong & ~sure)[:, None], sure=sure, points=1200
    )
    value = np.asarray(eqx.filter_jit(error_probability.of_features)(jnp.asarray(features, float)))
    value = np.where(sure, 0, value)
    for limit in np.asarray(error_probability.levels)[
        [0, 1, len(error_probability.levels) // 2, -1]
    ]:
        share = error_probability.share(float(limit))
        assert np.mean(value > limit) == pytest.approx(share, abs=5e-3)
        kept = ~sure & (value <= limit)
        place = np.searchsorted(np.asarray(error_probability.levels), limit)
        assert np.mean(wrong[kept]) <= error_probability.bounds[place] if kept.any() else True


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
        ({"scheme": Berrut(K, N)}, "Berrut is no regression"),
        ({"x": np.full((8, 5), np.inf, "float32")}, "are not finite: take them out"),
        ({"x": points(0, 1)[:3]}, "3 data points fill no group of 4"),
    ],
)
def test_input_errors(change, message, key, untyped):
    arguments = {"scheme": NeRCC(K, N), "x": points(0, 3), "stragglers": LAWS} | change
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


# -- Outputs with one number a row ----------------------------------------------------------------


def single(x):
    return jnp.tanh(x[:, :1])


@pytest.mark.parametrize("scheme", [NeRCC(2, 4), Scheme(NeRCC(2, 4))])
def test_no_label_is_promised_of_a_single_number(scheme):
    x = points(0, 2)
    laws = {"1": ExactStragglers(1)}
    with pytest.raises(ValueError, match="which is no label"):
        calibrate_error_probability(single, scheme, x, laws, key=jax.random.key(0), num_sets=1)
