"""A learner with a kernel for each principal component, against NumPy in float64."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import relative_rmse
from scipy.spatial.distance import cdist

from nercc_jax import NeRCC, Scheme, coded_inference
from nercc_jax.risk._straggler_risk import AccuracyTarget
from nercc_jax.serving.adapt._online_calibration import BATCH, LEAST, OnlineCalibration, _tuned
from nercc_jax.surrogates import (
    LearnerTuning,
    fit_learner,
    load_learner,
    save_learner,
    tune_learner,
)
from nercc_jax.surrogates._components import ComponentLearner

K, N = 6, 9
TUNING = LearnerTuning(shapes=("squared_exponential",), steps=20)
RNG = np.random.default_rng(0)
X = RNG.uniform(-1, 1, size=(80 + 2 * K, 2)).astype("float32")
PAST, NEW = X[:80], X[80:]
SCALES = np.array([3.0, 1.0, 0.3, 0.1])
MIXED = np.linalg.qr(RNG.normal(size=(4, 4)))[0]


def model(x):
    """Four waves of different length in orthogonal directions."""
    waves = [jnp.sin(scale * x[:, 0] + x[:, 1]) for scale in (1.0, 5.0, 2.0, 8.0)]
    return jnp.stack(waves, axis=1) * SCALES @ MIXED


def offset(x):
    return 2.0 + 0 * model(x)


@pytest.fixture(scope="module")
def learner():
    known = PAST[:-K]
    return fit_learner(known, model(known), components=3, capacity=80, prior=offset, tuning=TUNING)


@eqx.filter_jit
def predict(learner, x):
    return learner.predict(x)


def exact(learner, x, y, at, centred):
    """Mean and deviation of the posterior, each component by itself; `centred` says which rows the
    means and spreads are of."""
    v = np.float64(learner.directions)
    residual = np.float64(y) - 2.0
    rest = residual - residual @ v @ v.T
    mean, square = 2.0, 0.0
    parts = [(residual[:, None] @ v[:, i : i + 1], learner.own, i) for i in range(v.shape[1])]
    for targets, one, i in [*((t[:, 0], one, i) for t, one, i in parts), (rest, learner.rest, ...)]:
        kernel, scale = one.kernel, float(one.scale[i])
        widths = np.float64(kernel.unit[i] * kernel.widths[i][kernel.groups[i]])
        a, b = ((z - np.float64(kernel.centre[i])) / widths for z in (np.float64(x), at))

        def covariance(p, q, linear=float(kernel.linear[i])):
            return np.exp(-(cdist(p, q) ** 2) / 2) + linear * p @ q.T

        noise, centre = float(kernel.noise[i]), targets[centred].mean(0)
        spread = np.mean((targets[centred] - centre) ** 2)
        cross = covariance(a, b)
        weights = np.linalg.solve(covariance(a, a) + noise * np.eye(len(a)), cross)
        mean_given = centre + weights.T @ (targets - centre)
        variance = np.diag(covariance(b, b)) - np.sum(weights * cross, axis=0) + noise
        along, share = (mean_given, 1) if i is ... else (mean_given @ v[:, i : i + 1].T, 1 / len(v))
        mean, square = mean + along, square + share * scale**2 * spread * variance
    return mean, np.sqrt(square)


def test_it_is_each_components_posterior(learner):
    after = eqx.filter_jit(lambda one, x, y: one.update(x, y))(
        learner, jnp.asarray(PAST[-K:]), model(PAST[-K:])
    )
    assert after.size == 80 == after.capacity
    mean, deviation = after.predict(NEW)
    wanted, wanted_deviation = exact(after, PAST, model(PAST), NEW, slice(None))
    np.testing.assert_allclose(mean, wanted, atol=2e-3)
    np.testing.assert_allclose(deviation, wanted_deviation, rtol=0.02)
    # Of a group, the answers that came are pairs, too.
    coded = jnp.asarray(NEW[:N][None])
    responded = np.arange(N) != 2
    expected = after.group_prior(jnp.asarray(NEW[None, -K:]), coded)
    result = expected.condition_on_available(model(coded[0])[None], jnp.asarray(responded[None]))
    both = np.concatenate([PAST, NEW[:N][responded]])
    wanted, wanted_deviation = exact(after, both, model(both), NEW[-K:], slice(80))
    np.testing.assert_allclose(result.own[0], wanted, atol=2e-3)
    np.testing.assert_allclose(result.deviation[0], wanted_deviation, rtol=0.05)


def test_waves_of_different_length_want_different_kernels(learner):
    known = PAST[:-K]
    one = fit_learner(known, model(known), capacity=80, prior=offset, tuning=TUNING)
    own = model(jnp.asarray(NEW))
    apart = relative_rmse(learner.outputs(jnp.asarray(NEW)), own)
    assert apart < 0.7 * relative_rmse(one.outputs(jnp.asarray(NEW)), own)
    # It is a surrogate like any other: redundancy goes where it doubts most.
    scheme = Scheme(NeRCC(K, N, points="interleaved"), learner)
    assert scheme.places_copies
    available = np.ones((2, N), bool)
    available[:, :2] = False
    decoded = coded_inference(model, scheme)(NEW, available)
    assert relative_rmse(decoded, own) < apart


def test_what_it_cannot_be_made_of():
    x = PAST[:20]
    with pytest.raises(ValueError, match="no components"):
        fit_learner(x, model(x)[:, :1], components=12)
    with pytest.raises(ValueError, match="has no labels"):
        fit_learner(x, model(x), components=12, tuning=LearnerTuning("labels"))
    with pytest.raises(ValueError, match="components must be"):
        fit_learner(x, model(x), components=0)


def test_files(learner, tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "learner.safetensors"
    mixed = eqx.tree_at(lambda one: one.kappa, learner, jnp.asarray(3.0))
    save_learner(path, mixed)
    loaded = load_learner(path, prior=offset)
    assert isinstance(loaded, ComponentLearner)
    assert float(loaded.kappa) == 3.0
    for mine, theirs in zip(predict(learner, NEW), predict(loaded, NEW), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-4)
    with pytest.raises(ValueError, match="was made with `prior`: load it so"):
        load_learner(path)


def test_tuning_what_is_tuned_changes_nothing_and_what_is_not_a_lot(learner):
    again = tune_learner(learner, TUNING)
    for mine, theirs in zip(predict(learner, NEW), predict(again, NEW), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-2)
    wide = eqx.tree_at(lambda one: one.own.kernel.widths, learner, learner.own.kernel.widths * 30)
    wide = eqx.tree_at(
        lambda one: one.own, wide, eqx.filter_vmap(lambda o: o.refactorized())(wide.own)
    )
    errors = [relative_rmse(predict(one, NEW)[0], model(NEW)) for one in (wide, again)]
    assert float(errors[1]) < 0.5 * float(errors[0])
    with pytest.raises(ValueError, match="has no labels"):
        tune_learner(learner, LearnerTuning("labels"))


def test_a_server_keeps_what_was_tuned_of_each_component(learner):
    again = _tuned(learner, LearnerTuning(widths="kept", rows=256, steps=0))
    assert isinstance(again, ComponentLearner)
    errors = [relative_rmse(predict(one, NEW)[0], model(NEW)) for one in (learner, again)]
    assert float(errors[1]) < 1.05 * float(errors[0])


def test_a_server_keeps_a_kernel_that_another_is_worse_than():
    """What is best for an eighth of the pairs, which are farther apart, need not be for all."""
    x = np.random.default_rng(0).uniform(-1, 1, (320, 2)).astype("float32")
    y = np.stack(
        [np.exp(2 * x[:, 0]) * np.sin(8 * x.sum(axis=1)), np.cos(8 * x[:, 0]) * x[:, 1]], axis=1
    )
    learner = fit_learner(
        x[:256], y[:256], capacity=256, tuning=LearnerTuning(widths="one", steps=0)
    )
    few = LearnerTuning(widths="kept", rows=32, steps=0)
    both = _tuned(learner, few), tune_learner(learner, few)
    errors = [relative_rmse(predict(one, x[256:])[0], y[256:]) for one in both]
    assert float(errors[0]) < 0.05
    assert float(errors[1]) > 0.2


def test_a_server_learns_by_it_and_goes_by_its_deviations(learner):
    study = OnlineCalibration(learner, AccuracyTarget(tolerance=1.0))
    x = np.random.default_rng(1).uniform(-1, 1, (LEAST, 2)).astype("float32")
    own = np.asarray(model(x), "float32")
    for start in range(0, LEAST, BATCH):
        study.add(x[start : start + BATCH], own[start : start + BATCH])
    assert study.calibrated is not None
    # A bar is a factor of its deviation, and of all that it was examined by it has learned.
    np.testing.assert_allclose(study.calibrated.factor, 1.645, atol=0.8)
    learned = study.calibrated.surrogate.rest.window.place - learner.rest.window.place
    assert int(learned) % learner.capacity == LEAST % learner.capacity
