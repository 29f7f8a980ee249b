"""A scheme whose surrogate learns: the posterior of window and group, and its error bars."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import relative_rmse
from scipy.spatial.distance import cdist

from nercc_jax import (
    DevicePool,
    ExactStragglers,
    NeRCC,
    Replication,
    Scheme,
    Uncoded,
    calibrate_error_probability,
    coded_inference,
    fit_surrogate,
    pool_inference,
    reexecute,
)
from nercc_jax.risk import calibrate_learner_bars
from nercc_jax.schemes import calibrate_error_bars
from nercc_jax.surrogates import Kernel, LearnerTuning, Surrogate, fit_learner

K, N, GROUPS = 6, 9, 5
TUNING = LearnerTuning(steps=20)
_WEIGHTS = np.random.default_rng(0).normal(size=(2, 3, 4))
LAWS = {"three": ExactStragglers(3)}
CODE = NeRCC(K, N, lambda_dec=0.0, points="repeated")
MASKS = np.random.default_rng(5).permuted(np.tile(np.arange(N) > 2, (GROUPS, 1)), axis=1)


def model(x):
    return jnp.sin(x @ jnp.asarray(_WEIGHTS[0], x.dtype))


def points(seed, groups=GROUPS):
    return np.random.default_rng(seed).normal(size=(groups * K, 3)).astype("float32")


@pytest.fixture(scope="module")
def learner():
    x = points(10, 20)
    return fit_learner(x, model(x), capacity=128, tuning=TUNING)


def coverage(decoded, own, bar):
    """The share of errors within their bars, of what is not exact."""
    error, bar = np.sqrt(np.mean((np.asarray(decoded) - own) ** 2, axis=1)), np.asarray(bar)
    return np.mean(error[bar > 0] <= bar[bar > 0])


def infer(scheme, **options):
    return coded_inference(model, scheme, with_status=True, **options)


@pytest.mark.parametrize("code", [Uncoded(2), Replication(2, 4)])
def test_without_a_regression_the_surrogate_answers_for_what_is_lost(code, learner):
    stragglers = {"one": ExactStragglers(1)}
    fitted = fit_surrogate(model, learner, code, points(11), stragglers, key=jax.random.key(0))
    x, mask = jnp.asarray(points(12, 1)), np.arange(code.num_workers) % 2 != 1
    lost = np.arange(K) % 2 == 1
    for surrogate in (fitted, Surrogate(lambda x: model(x) + 0.5)):
        result = infer(Scheme(code, surrogate=surrogate))(x, mask)
        assert result.recovered.all()
        predictions, cheap = result.predictions, surrogate.theta * surrogate.outputs(x)
        np.testing.assert_allclose(predictions[~lost], model(x)[~lost], atol=1e-6)
        # A learner has learned from the group's answers, too.
        exactly = 0.1 if surrogate is fitted else 1e-5
        np.testing.assert_allclose(predictions[lost], cheap[lost], atol=exactly)
        deviation = np.asarray(result.deviation)
        assert (deviation[~lost] == 0).all()
        assert (np.isfinite(deviation[lost]) == surrogate.has_deviation).all()


def test_decoding_is_the_posterior_of_window_and_group():
    """Coded data points are observations, too: by NumPy in float64, all in one system."""
    past, x = points(1, 4), points(2)
    kernel = Kernel("squared_exponential", centre=jnp.zeros(3), widths=[2.0], noise=1e-3)
    learner = fit_learner(past, model(past), capacity=32, kernel=kernel, tuning=None)
    code = NeRCC(K, N)
    assessed = infer(Scheme(code, learner, redundancy="code"))(x, MASKS)
    encoder = np.asarray(code.encoder_matrix(), np.float64)
    centre = np.asarray(model(past)).mean(0)
    spread = np.sqrt(np.mean((np.asarray(model(past)) - centre) ** 2))
    for group in range(GROUPS):
        own = x[group * K : (group + 1) * K]
        sent = (encoder @ own)[MASKS[group]]
        seen = np.concatenate([past, sent])
        answers = np.float64(model(jnp.asarray(seen, jnp.float32))) - centre

        def covariance(a, b):
            return np.exp(-(cdist(a, b) ** 2) / 8)

        cross = covariance(seen, own)
        weights = np.linalg.solve(covariance(seen, seen) + 1e-3 * np.eye(len(seen)), cross)
        rows = slice(group * K, (group + 1) * K)
        np.testing.assert_allclose(
            assessed.predictions[rows], centre + weights.T @ answers, atol=2e-3
        )
        variance = 1 + 1e-3 - np.sum(weights * cross, axis=0)
        np.testing.assert_allclose(
            assessed.deviation[rows], spread * np.sqrt(variance), rtol=0.02, atol=1e-3
        )


def test_copies_of_the_uncertain_are_the_default_and_what_is_answered_is_exact(learner):
    x = points(3)
    scheme = Scheme(CODE, learner)
    prepared = scheme.prepare(jnp.asarray(x))
    deviation = np.asarray(learner.predict(x)[1]).reshape(GROUPS, K)
    best = np.argmax(deviation, axis=1)
    np.testing.assert_array_equal(prepared.beta[:, K], np.asarray(CODE.alpha)[best])
    assessed = infer(scheme)(x, MASKS)
    own = np.asarray(model(x))
    known = np.asarray(assessed.deviation) == 0
    holds = np.argmax(np.asarray(scheme.encoders(prepared)), axis=2)
    answered = [np.isin(np.arange(K), holds[g][MASKS[g]]) for g in range(GROUPS)]
    np.testing.assert_array_equal(known, np.concatenate(answered))
    assert 0 < known.sum() < len(x)
    np.testing.assert_allclose(assessed.predictions[known], own[known], atol=1e-5)
    assert relative_rmse(assessed.predictions, own) < 0.2
    without = infer(Scheme(CODE))(x, MASKS)
    assert relative_rmse(assessed.predictions, own) < 0.3 * relative_rmse(without.predictions, own)
    fixed = Scheme(CODE, learner, redundancy="code")
    assert fixed.prepare(jnp.asarray(x)).beta is None


def test_what_straggles_reaches_nothing(learner):
    scheme = Scheme(NeRCC(K, N, points="interleaved"), learner)
    x = jnp.asarray(points(4))
    others, everyone = np.tile(np.arange(N) > 0, (GROUPS, 1)), np.ones((GROUPS, N), bool)

    @jax.jit  # one program for all values
    def decoded(x, w, value, masks):
        def broken(batch):  # worker 0 of each group
            y = jnp.sin(batch @ w)
            return jnp.where(jnp.arange(len(batch))[:, None] % N == 0, value, y)

        return coded_inference(broken, scheme)(x, masks)

    w = jnp.asarray(_WEIGHTS[0], x.dtype)
    clean = decoded(x, w, 0.0, others)
    for value in (jnp.nan, jnp.inf, 1e30):
        np.testing.assert_array_equal(decoded(x, w, value, others), clean)
    slope = jax.grad(lambda x, w: decoded(x, w, jnp.nan, others).sum(), argnums=(0, 1))(x, w)
    assert all(np.isfinite(leaf).all() for leaf in slope)
    step = 1e-2 * jnp.ones_like(w)
    above, below = (decoded(x, w + shift, 0.0, others).sum() for shift in (step, -step))
    np.testing.assert_allclose(slope[1].sum(), (above - below) / 2e-2, rtol=0.05)

    # A broken answer that is not known to be late makes its worker a straggler.
    np.testing.assert_allclose(decoded(x, w, jnp.nan, everyone), clean, atol=1e-5)


def test_bars_cover_what_they_say_and_a_tolerance_is_kept(learner, key):
    scheme = Scheme(CODE, learner)
    bars = calibrate_error_bars(model, scheme, points(20, 30), LAWS, key=key, num_sets=20)
    x = points(21, 40)
    masks = np.random.default_rng(1).permuted(np.tile(np.arange(N) > 2, (40, 1)), axis=1)
    assessed = infer(scheme)(x, masks)
    own = model(jnp.asarray(x))
    # Bars of the window are for what is predicted by it alone. With a kernel's noise below what
    # float32 solves, those that should cover half of this function's errors covered 98 %.
    by_window, (alone, deviation) = calibrate_learner_bars(learner, TUNING), learner.predict(x)
    for share in (0.5, 0.9):
        bar = bars(assessed.deviation, share)
        assert abs(coverage(assessed.predictions, own, bar) - share) < 0.12
        assert abs(coverage(alone, own, by_window(deviation, share)) - share) < 0.15
    assert np.all(np.asarray(bars(assessed.deviation, 0.9999)[assessed.deviation > 0]) == np.inf)
    bar = np.asarray(bars(assessed.deviation, 0.9))
    tolerance = float(np.median(bar[bar > 0]))
    fixed = reexecute(model, x, assessed, score=bars(assessed.deviation), limit=tolerance)
    again = bar > tolerance
    assert 0 < again.sum() < np.sum(bar > 0)
    np.testing.assert_allclose(fixed.predictions[again], own[again], atol=1e-5)
    np.testing.assert_array_equal(fixed.deviation, np.where(again, 0, assessed.deviation))
    error = np.sqrt(np.mean((np.asarray(fixed.predictions) - own) ** 2, axis=1))
    assert np.mean(error[bar > 0] <= tolerance) > 0.85
    with pytest.raises(ValueError, match="coverage must be a share between 0 and 1, not 1"):
        bars(assessed.deviation, 1.0)


def test_bars_of_a_mixture_cover_what_they_say(learner, key):
    mixed = eqx.tree_at(lambda found: found.kappa, learner, jnp.asarray(3.0))
    scheme = Scheme(NeRCC(K, N, points="interleaved"), mixed, redundancy="code")
    bars = calibrate_error_bars(model, scheme, points(30, 30), LAWS, key=key, num_sets=20)
    x = points(31, 40)
    masks = np.random.default_rng(2).permuted(np.tile(np.arange(N) > 2, (40, 1)), axis=1)
    assessed = infer(scheme)(x, masks)
    bar = bars(assessed.deviation, 0.9)
    covered = coverage(assessed.predictions, model(jnp.asarray(x)), bar)
    assert abs(covered - 0.9) < 0.06


def test_doubt_order_and_a_mesh_go_with_it(learner, key):
    x = points(22)
    mesh = jax.make_mesh((3,), ("workers",), axis_types=(jax.sharding.AxisType.Auto,))
    plain = Scheme(CODE, learner, order="surrogate")
    error_probability = calibrate_error_probability(model, plain, points(23, 20), LAWS, key=key)
    scheme = Scheme(CODE, learner, error_probability, "surrogate")
    assessed = infer(scheme)(x, MASKS)
    assert np.isfinite(assessed.error_probability).all()
    assert (np.asarray(assessed.error_probability)[np.asarray(assessed.deviation) == 0] == 0).all()
    on_mesh = infer(scheme, mesh=mesh)(x, MASKS)
    # Float32 rounds otherwise there: who gets a copy may change where two are as
    # uncertain, and what is hardly known differs by about its deviation.
    deviations = np.stack([assessed.deviation, on_mesh.deviation])
    assert np.mean((deviations[0] == 0) == (deviations[1] == 0)) >= 0.9
    apart = np.abs(assessed.predictions - on_mesh.predictions).max(axis=1)
    assert (apart <= 5 * deviations.sum(axis=0) + 1e-4).all()


def test_a_pool_carries_it_out(learner):
    x = points(24).reshape(GROUPS, K, 3)
    scheme = Scheme(CODE, learner, order="pixels", bars=calibrate_learner_bars(learner, TUNING))
    with DevicePool(model, N, example=x[0, :1]) as pool:
        pooled = pool_inference(pool, scheme, with_status=True)(x)
        own = np.asarray(model(x.reshape(-1, 3))).reshape(GROUPS, K, -1)
        np.testing.assert_allclose(pooled.decoded.predictions, own, atol=1e-5)
        assert (pooled.decoded.deviation == 0).all()
        assert pooled.decoded.error_probability is None
        few = pool_inference(pool, scheme, with_status=True)(x, N - 3)
        mask = few.answers.available
        expected = infer(scheme)(x.reshape(-1, 3), mask)
        np.testing.assert_allclose(
            few.decoded.predictions.reshape(-1, 4), expected.predictions, atol=1e-2
        )
        np.testing.assert_allclose(few.decoded.deviation.ravel(), expected.deviation, atol=1e-2)


def test_doubt_is_of_the_scheme_as_it_runs(learner, key):
    """With its order and copies: who is sure under each straggler, the doubt has counted."""
    x, scheme = points(29, 4), Scheme(CODE, learner, order="pixels")
    law = {"1": ExactStragglers(1)}
    error_probability = calibrate_error_probability(model, scheme, x, law, key=key, num_sets=N)
    run = infer(scheme)
    result = [run(x, mask) for mask in ~np.eye(N, dtype=bool)]
    unsure = np.mean([np.asarray(each.deviation) != 0 for each in result])
    assert 0 < unsure < 1
    assert error_probability.share(0.0) == pytest.approx(unsure, abs=1e-6)
