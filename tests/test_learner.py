"""The learner from past answers, against a Gaussian process in float64 by NumPy.

And what it claims: of copies of pairs, in any unit of outputs, and without any evidence.
"""

import functools
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import norm

from nercc_jax import NeRCC, Scheme, Uncoded, coded_inference
from nercc_jax.risk import calibrate_learner_bars
from nercc_jax.rows import run_rows
from nercc_jax.serving import BatchingPolicy, CodedBatcher, Coder, Predictor
from nercc_jax.surrogates import (
    Kernel,
    LearnerTuning,
    fit_learner,
    principal_components,
    tune_learner,
)

from nercc_jax.surrogates import _factor, tuning  # isort: skip
from nercc_jax.surrogates.nearest import nearest_predictions
from nercc_jax.testing import SimulatedPool

CAPACITY, B = 48, 6
RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 3))
FEW = LearnerTuning(steps=2)
EPS = {"float32": 1e-3, "float64": 1e-8}
untuned = functools.partial(fit_learner, tuning=None)


def model(x):
    return jnp.stack([jnp.sin(2 * x[:, 0]) * x[:, 1], jnp.cos(x.sum(1))], axis=1)


def rough(x):
    return 0.5 * model(x)


@eqx.filter_jit
def predict(learner, x):
    return learner.predict(x)


SHAPES = {
    "squared_exponential": lambda r: np.exp(-(r**2) / 2),
    "matern52": lambda r: (1 + np.sqrt(5) * r + 5 * r**2 / 3) * np.exp(-np.sqrt(5) * r),
}


def exact(kernel, x, y, at, prior=lambda x: 0 * np.asarray(model(x))):
    """Mean and deviation of the posterior, dense and in float64."""
    unit, centre, widths = (
        np.float64(each) for each in (kernel.unit, kernel.centre, kernel.widths)
    )
    scaled = [(np.float64(z) - centre) / (unit * widths[kernel.groups]) for z in (x, at)]

    def covariance(a, b):
        return SHAPES[kernel.shape](cdist(a, b)) + float(kernel.linear) * a @ b.T

    residual = np.float64(y) - np.float64(prior(x))
    mean = residual.mean(axis=0)
    noise = float(kernel.noise)
    own = covariance(scaled[0], scaled[0]) + noise * np.eye(len(x))
    cross = covariance(*scaled)
    weights = np.linalg.solve(own, cross)
    variance = np.diag(covariance(scaled[1], scaled[1])) - np.sum(weights * cross, axis=0) + noise
    spread = np.mean((residual - mean) ** 2)
    predicted = np.float64(prior(at)) + mean + weights.T @ (residual - mean)
    return predicted, np.sqrt(variance * spread)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_posterior_of_the_last_that_were_observed(shape, dtype):
    x = jnp.asarray(X, dtype)
    kernel = Kernel(
        shape, centre=x.mean(0), unit=x.std(0), widths=[1.0, 2.0], groups=[0, 1, 1],
        linear=0.3 if shape == "matern52" else 0.0, noise=1e-3,
    )  # fmt: skip
    learner = untuned(x[:B], model(x[:B]), capacity=CAPACITY, kernel=kernel)
    seen = list(range(B))
    for place in range(B, len(X) - B, B):  # more than the window holds
        here = np.arange(place, place + B)
        whole = RNG.uniform(size=B) < 0.8  # the others are left out
        y = model(x[here]).at[~whole].set(jnp.nan)
        learner = learner.update(x[here].at[~whole].set(jnp.inf), y)
        seen += here[whole].tolist()
    assert len(seen) > CAPACITY == learner.size
    last, at = np.array(seen[-CAPACITY:]), x[-B:]
    mean, deviation = predict(learner, at)
    assert mean.dtype == deviation.dtype == dtype
    wanted, wanted_deviation = exact(kernel, x[last], model(x[last]), at)
    np.testing.assert_allclose(mean, wanted, atol=EPS[dtype])
    np.testing.assert_allclose(deviation, wanted_deviation, rtol=EPS[dtype])
    assert learner.factor.jitter == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("projected", [False, True])
def test_a_few_queries_have_the_same_means_and_the_deviation_given_the_nearest_pair(
    shape, projected
):
    x, y = X[:30].astype(np.float32), np.asarray(model(X[:30]), np.float32)
    features = principal_components(X, 2) if projected else None
    z = np.asarray(features(jnp.asarray(X, jnp.float32))) if features is not None else X
    kernel = Kernel(shape, centre=z.mean(0), unit=z.std(0), widths=[1.5], linear=0.3, noise=1e-3)
    learner = untuned(x, y, capacity=CAPACITY, kernel=kernel, features=features)
    mean, deviation = nearest_predictions(learner)(X[-B:].astype(np.float32))
    wanted, _ = exact(kernel, z[:30], y, z[-B:])
    np.testing.assert_allclose(mean, wanted, atol=1e-3)
    scaled = z / np.float64(kernel.unit) / 1.5
    nearest = SHAPES[shape](cdist(scaled[-B:], scaled[:30]).min(axis=1))
    variance = (1.001 - nearest**2 / 1.001) * np.mean((y - y.mean(axis=0)) ** 2)
    np.testing.assert_allclose(deviation, np.sqrt(variance), rtol=1e-3)


def test_a_prior_carries_what_it_can_and_features_are_what_tells():
    x = jnp.asarray(X, float)
    learner = untuned(x[:40], model(x[:40]), capacity=64, prior=rough, features=jnp.sin)
    mean, _ = learner.predict(x[40:50])
    kernel = learner.kernel
    wanted, _ = exact(kernel, jnp.sin(x[:40]), model(x[:40]) - rough(x[:40]), jnp.sin(x[40:50]))
    np.testing.assert_allclose(mean, wanted + rough(x[40:50]), atol=1e-3)
    # A few rows more, which are written into the factor.
    more = learner.update(x[40:43], model(x[40:43])).predict(x[50:60])[0]
    anew = untuned(x[:43], model(x[:43]), capacity=64, prior=rough, features=jnp.sin, kernel=kernel)
    np.testing.assert_allclose(more, anew.predict(x[50:60])[0], atol=1e-3)
    far = 1e4 * jnp.ones((1, 3))
    alone = untuned(x[:40], model(x[:40]), prior=rough, capacity=64).predict(far)[0]
    rest = jnp.mean(model(x[:40]) - rough(x[:40]), axis=0)
    np.testing.assert_allclose(alone, rough(far) + rest, atol=1e-4)


def test_outputs_may_be_any_tree():
    x = jnp.asarray(X[:20], float)
    y = {"a": model(x), "b": jnp.sin(x[:, 0])}
    learner = untuned({"image": x, "id": jnp.arange(20)}, y, capacity=32)
    mean, deviation = learner.predict({"image": x[:5] + 0.1, "id": jnp.arange(5)})
    assert mean["a"].shape == (5, 2)
    assert mean["b"].shape == deviation.shape == (5,)
    both = untuned(x, jnp.column_stack([model(x), jnp.sin(x[:, 0])]), capacity=32)
    joined, same = both.predict(x[:5] + 0.1)
    np.testing.assert_allclose(jnp.column_stack([mean["a"], mean["b"]]), joined, atol=1e-6)
    np.testing.assert_allclose(deviation, same, rtol=1e-5)


def test_pairs_that_hardly_differ_and_no_noise():
    """Float32 cannot factorise this; the answer stays finite and right."""
    x = jnp.tile(jnp.asarray(X[:4], jnp.float32), (8, 1)) + 3e-4 * jnp.arange(32)[:, None]
    kernel = Kernel("squared_exponential", centre=jnp.zeros(3), widths=[3.0], noise=1e-12)
    learner = untuned(x, model(x), capacity=32, kernel=kernel)
    assert learner.factor.jitter < 1e-12, "float64 can"
    again = learner.update(x[:B], model(x[:B]))
    for run in (learner.predict, again.predict):
        mean, deviation = run(x[:4])
        np.testing.assert_allclose(mean, model(x[:4]), atol=1e-2)
        assert np.all(deviation < 0.05)
    assert learner.size == again.size == 32
    with pytest.raises(ValueError, match="call update outside of"):
        jax.jit(lambda x: learner.update(x, model(x)).predict(x)[0])(x)


def test_derivatives_are_those_of_the_posterior():
    """In float64, by finite differences; batches of gradients, and curvature."""
    with jax.enable_x64(True):
        x = jnp.asarray(X, jnp.float64)
        learner = untuned(x[:40], model(x[:40]), capacity=CAPACITY)

        def height(query):
            mean, deviation = learner.predict(query[None])
            return mean[0, 0] + 3 * deviation[0]

        queries, step = x[60:63], 1e-5
        one, value = jax.jit(jax.grad(height)), jax.jit(height)
        slopes = jax.jit(jax.vmap(jax.grad(height)))(queries)
        for query, slope in zip(queries, slopes, strict=True):
            wanted = [(value(query + e) - value(query - e)) / (2 * step) for e in step * np.eye(3)]
            np.testing.assert_allclose(slope, wanted, rtol=1e-5, atol=1e-8)
            np.testing.assert_allclose(slope, one(query), rtol=1e-6, atol=1e-9)
        along = jnp.asarray([1.0, -1.0, 0.5])
        _, curvature = jax.jvp(one, (queries[0],), (along,))
        difference = one(queries[0] + step * along) - one(queries[0] - step * along)
        np.testing.assert_allclose(curvature, difference / (2 * step), rtol=1e-4, atol=1e-6)


def test_pairs_that_come_and_go_leave_the_factor_that_a_new_one_is():
    """With repeated inputs among them; in the same float64, so that nothing but the way differs."""
    rng, x = np.random.default_rng(2), X.astype(np.float32)
    learner = untuned(x[:40], np.asarray(model(x[:40])), capacity=CAPACITY)
    appended, made = 0, learner.factor.replaced
    for _ in range(30):
        rows = rng.integers(0, len(x), B)
        learner = learner.update(x[rows], np.asarray(model(x[rows])))
        appended, made = appended + (learner.factor.replaced > made), learner.factor.replaced
        fresh = learner.refactorized()
        for one, other in zip(learner.predict(x), fresh.predict(x), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert learner.size == CAPACITY
    assert 20 < appended < 30, "made again now and then"


def test_left_out_is_left_out():
    x = jnp.asarray(X[:12], float)
    y = model(x)
    learner = untuned(x, y, capacity=16)
    errors, deviation = learner.left_out()
    centred = y - y.mean(axis=0)  # the mean stays that of all
    for row in range(12):
        others = np.arange(12) != row
        a, b = learner.kernel(x[others], x[others]), learner.kernel(x[others], x[row : row + 1])
        weights = np.linalg.solve(np.float64(a) + float(learner.kernel.noise) * np.eye(11), b)
        error = weights.T @ np.float64(centred[others]) - centred[row]
        variance = 1 + float(learner.kernel.noise) - np.sum(weights * b)
        np.testing.assert_allclose(errors[row], error[0], atol=1e-3)
        expected = np.std(centred) * np.sqrt(variance)
        np.testing.assert_allclose(deviation[row], expected, rtol=1e-2)
    np.testing.assert_array_equal(errors[12:], 0)


def test_tuning_does_better_on_others_and_deviations_say_how_well():
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.uniform(-1, 1, size=(96 + 60, 4)), float)

    def wave(x):  # the last two coordinates tell nothing
        return jnp.stack([jnp.sin(4 * x[:, 0]), jnp.cos(3 * x[:, 1]), x[:, 0] * x[:, 1]], axis=1)

    before = untuned(x[:96], wave(x[:96]), capacity=96)
    after = tune_learner(before, LearnerTuning(steps=40))

    def judge(learner):
        mean, deviation = learner.predict(x[96:])
        error = jnp.sqrt(jnp.mean((mean - wave(x[96:])) ** 2, axis=1))
        labels = jnp.mean(jnp.argmax(mean, axis=1) != jnp.argmax(wave(x[96:]), axis=1))
        return (
            float(jnp.sqrt(jnp.mean(error**2))),
            float(labels),
            float(jnp.mean(error / deviation)),
        )

    rmse, wrong, ratio = judge(after)
    assert rmse < 0.4 * judge(before)[0]
    assert wrong <= judge(before)[1]
    assert 0.3 < ratio < 1.5
    assert after.kernel.widths[2] > 2 * after.kernel.widths[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_slopes_of_the_left_out_loss_are_central_differences(shape):
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(14, 4)), rng.normal(size=(14, 3))
    known = tuning._Pairs(y - y.mean(axis=0), 3, rng.uniform(0, 0.1, 14), rng.integers(1, 4, 14))
    groups = np.array([0, 1, 1, 2])
    free = np.array([0.3, -0.2, 0.5, -2.0, -1.0])  # logarithms of widths, noise and linear
    loss = functools.partial(tuning._left_out_loss, known, shape, x, groups, 1e-6)
    steps = 1e-5 * np.eye(len(free))
    wanted = [(loss(free + step)[0] - loss(free - step)[0]) / 2e-5 for step in steps]
    np.testing.assert_allclose(loss(free)[1], wanted, rtol=1e-6, atol=1e-8)


def test_the_jitter_of_a_singular_covariance_is_a_few_roundings():
    """On the host and in a program, and no more for a matrix of another size."""
    x = np.random.default_rng(1).normal(size=(30, 2)).astype("float32")
    covariance = x @ x.T
    covariance -= 4e-6 * np.eye(30, dtype="float32")  # slightly indefinite
    for unit in (np.float32(1e-3), np.float32(1), np.float32(1e3)):
        for whiten in (_factor.whiten, jax.jit(_factor.whiten)):
            whitening, jitter = whiten(unit * covariance, unit * np.float32(1))
            assert np.isfinite(whitening).all()
            assert 0 < jitter <= 100 * unit * np.finfo("float32").eps * covariance.max()


@pytest.mark.parametrize("function", [np.sin, np.tanh, np.sign], ids=["sine", "tanh", "sign"])
def test_far_from_all_pairs_outputs_are_off_by_their_spread(function):
    """A factor that left-out errors ask for made deviations there up to 20 times too small."""
    x, at = (np.random.default_rng(seed).normal(size=(200, 3)) for seed in (0, 1))
    answer = lambda x: np.stack([function(x[:, 0]), function(x[:, 0] - x[:, 1])], axis=1)  # noqa: E731
    learner = fit_learner(x, answer(x), capacity=200)
    errors, deviation = learner.left_out()
    ratio = np.mean(errors**2, axis=1) / deviation**2
    assert 0.98 < np.mean(ratio) < 1.02

    def held(reach):
        mean, deviation = learner.predict(reach * at)
        error = np.sqrt(np.mean((mean - answer(reach * at)) ** 2, axis=1))
        return np.mean(error <= 1.64 * deviation)

    assert held(1) > 0.85
    assert held(5) > 0.5  # 0.16 to 0.36 by a factor alone


def test_a_straight_line_is_learned_to_rounding_and_goes_on():
    """Beside a line a narrow kernel is noise; a wide one added 0.001 among the pairs."""
    x, at = (np.random.default_rng(seed).normal(size=(200, 3)) for seed in (0, 1))
    mean, _ = fit_learner(x, x[:, :2]).predict(5 * at)
    np.testing.assert_allclose(mean, 5 * at[:, :2], atol=1e-5)


def test_features_of_one_width_have_one_unit_where_that_tells_more():
    tuning = LearnerTuning(shapes=("squared_exponential",), widths="one", steps=2)
    rng = np.random.default_rng(4)
    relevant, idle = rng.uniform(-1, 1, size=(2, 48, 2))
    y = jnp.asarray(np.sin(3 * relevant), float)

    def ratio(x):  # of the largest and the least unit
        unit = fit_learner(jnp.asarray(x, float), y, capacity=48, tuning=tuning).kernel.unit
        return float(jnp.max(unit) / jnp.min(unit))

    assert ratio(np.hstack([relevant, 0.05 * idle])) == pytest.approx(
        1
    )  # what hardly varies is idle
    assert ratio(relevant * [1, 100]) > 50  # of different kinds, both tell


def test_bars_are_of_pairs_that_the_kernel_was_not_tuned_on():
    """Of outputs that are noise alone, what has a width for each input finds much in its pairs."""
    rng = np.random.default_rng(0)
    tuning = LearnerTuning(shapes=("squared_exponential",), steps=10)
    covered = []
    for _ in range(6):
        x, y = rng.normal(size=(32, 8)), rng.normal(size=(32, 1))
        x, y = jnp.asarray(x, float), jnp.asarray(y, float)
        learner = fit_learner(x, y, capacity=32, tuning=tuning)
        mean, deviation = learner.predict(jnp.asarray(rng.normal(size=(500, 8)), float))
        for bars in (
            calibrate_learner_bars(learner, tuning),
            calibrate_learner_bars(learner, None),
        ):
            bar = np.asarray(bars(deviation, 0.9))
            # A fresh output is standard normal: its error's share within the bar is known.
            low, high = norm.cdf(mean[:, 0] - bar), norm.cdf(mean[:, 0] + bar)
            covered.append(np.mean(high - low))
    fresh, tuned = np.mean(np.reshape(covered, (6, 2)), axis=0)
    assert 0.87 <= fresh <= 0.95
    assert tuned < fresh - 0.01
    with pytest.raises(ValueError, match="folds must be an integer from 2 on, not 1"):
        calibrate_learner_bars(learner, folds=1)
    with pytest.raises(ValueError, match="this learner's window is empty"):
        calibrate_learner_bars(untuned(x[:0], y[:0], capacity=32))


def test_a_kernel_is_tuned_on_three_pairs_at_least():
    learner = untuned(jnp.asarray(X[:4], float), model(X[:4]), capacity=8)
    assert np.isfinite(tune_learner(learner, FEW).predict(X[4:5])[1])
    few = untuned(jnp.asarray(X[:2], float), model(X[:2]), capacity=8)
    with pytest.raises(ValueError, match="2 pairs tell nothing of a kernel: three at least"):
        tune_learner(few, FEW)


# -- Evidence: copies of pairs, units of outputs, and none at all ---------------------------------

PAIRS, AT = (
    part.astype(np.float32)
    for part in np.split(np.random.default_rng(7).uniform(-1, 1, (240, 2)), [40])
)
QUICK = LearnerTuning(shapes=("squared_exponential",), steps=20)
TIMES = (1, 2, 6)


def traced(on_host):
    """Return how functions run: as they are, or as a program."""
    return (lambda function: function) if on_host else eqx.filter_jit


def smooth(x):
    return np.stack([np.sin(3 * x[:, 0]), x[:, 1] ** 2], axis=1).astype(np.float32)


def errors_of(learner):
    mean, deviation = map(np.asarray, learner.predict(AT))
    return np.sqrt(np.mean((mean - smooth(AT)) ** 2, axis=1)), deviation


def repeated(times, seed=0):
    """Each pair so many times, in any order."""
    return np.random.default_rng(seed).permutation(np.repeat(PAIRS, times, axis=0))


def test_copies_of_pairs_change_neither_errors_nor_deviations():
    found = []
    for times in TIMES:
        x = repeated(times)
        error, deviation = errors_of(fit_learner(x, smooth(x), capacity=256, tuning=QUICK))
        within = np.mean(error < 2 * deviation)
        found.append([np.sqrt(np.mean(each**2)) for each in (error, deviation)] + [within])
    once, *more = np.array(found)
    assert once[0] < 0.02
    assert once[2] > 0.8
    for each in more:
        assert each[0] < 1.1 * once[0]
        assert 0.5 < each[1] / once[1] < 1.5
        assert each[2] > once[2] - 0.05


@pytest.mark.parametrize("tuning", [None, QUICK])
def test_bars_by_pairs_that_came_twice_cover_as_many(tuning):
    learners = [untuned(x, smooth(x), capacity=128) for x in (repeated(1), repeated(2))]
    covered = []
    for learner in learners:
        bars = calibrate_learner_bars(learner, tuning)
        error, deviation = errors_of(learner)
        covered.append(np.mean(error <= np.asarray(bars(jnp.asarray(deviation), 0.9))))
    assert covered[0] > 0.85
    assert covered[1] > covered[0] - 0.05


@pytest.mark.parametrize("jump", [0.0, 1e-7])  # the second is a rounding of float32
def test_what_comes_again_is_the_same_pair(jump):
    """In a batch, in the window, and where the ring comes round: one pair, and no older answer."""
    x, y = PAIRS[:8], smooth(PAIRS[:8])
    learner = untuned(x, y, capacity=12)
    again = learner.update(x + np.float32(jump), y)
    assert again.size == 8
    np.testing.assert_array_equal(again.window.counts, 2 * (np.arange(12) < 8))
    np.testing.assert_array_equal(again.window.residuals, learner.window.residuals)
    np.testing.assert_array_equal(again.window.inputs, learner.window.inputs)
    np.testing.assert_array_equal(again.window.scatter, 0)
    # Six that are new and two that are not: the oldest that did not come again make room.
    both = np.concatenate([PAIRS[8:14], x[:2]])
    later = again.update(both, smooth(both))
    assert later.size == 12
    for row in (*PAIRS[:2], *PAIRS[8:14]):
        assert np.abs(np.asarray(later.window.inputs) - row).sum(axis=1).min() == 0
    assert np.abs(np.asarray(later.window.inputs) - PAIRS[2]).sum(axis=1).min() > 0
    # What the factor says is what it would say made anew.
    mean, deviation = later.predict(AT)
    fresh = later.refactorized().predict(AT)
    np.testing.assert_allclose(mean, fresh[0], atol=1e-3)
    np.testing.assert_allclose(deviation, fresh[1], rtol=1e-2)


def test_answers_that_differ_are_noise_and_their_mean_is_learned():
    """With 30 answers each the mean is known better than a single answer, which bars are for."""
    x = np.repeat(PAIRS, 30, axis=0)
    noise = 0.3 * np.random.default_rng(3).normal(size=(len(x), 2)).astype(np.float32)
    learner = fit_learner(x, smooth(x) + noise, capacity=64, tuning=QUICK)
    assert learner.size == 40
    error, deviation = errors_of(learner)
    assert np.sqrt(np.mean(error**2)) < 0.12
    np.testing.assert_allclose(np.median(deviation), 0.3, rtol=0.25)
    fresh = smooth(AT) + 0.3 * np.random.default_rng(4).normal(size=(len(AT), 2))
    off = np.sqrt(np.mean((np.asarray(learner.predict(AT)[0]) - fresh) ** 2, axis=1))
    bar = np.asarray(calibrate_learner_bars(learner, QUICK)(jnp.asarray(deviation), 0.9))
    assert 0.8 < np.mean(off <= bar) < 0.99


@pytest.mark.parametrize("exponent", [-30, -23, -19, 0, 19, 30])
@pytest.mark.parametrize("on_host", [False, True])
def test_the_unit_of_outputs_changes_nothing(exponent, on_host):
    unit, y = 10.0**exponent, smooth(PAIRS)
    predict = traced(on_host)(lambda one: one.predict(AT))
    sizes = ((y * size).astype(np.float32) for size in (1.0, unit))
    learners = [untuned(PAIRS, each, capacity=64) for each in sizes]
    learners = [one.with_kernel(learners[0].kernel) for one in learners]
    (mean, deviation), (other, scaled) = map(predict, learners)
    # 1e-30 squared, and products with numbers below 1e-38, have no float32.
    np.testing.assert_allclose(np.float64(other) / unit, mean, atol=1e-4)
    np.testing.assert_allclose(np.float64(scaled) / unit, deviation, rtol=1e-3)
    after = learners[1].update(AT[:5], (smooth(AT[:5]) * unit).astype(np.float32))
    assert np.isfinite(np.asarray(predict(after)[1])).all()
    tuned = fit_learner(PAIRS, (y * unit).astype(np.float32), capacity=64, tuning=QUICK)
    error, deviation = (np.float64(each) / unit for each in errors_of_scaled(tuned, unit))
    assert np.sqrt(np.mean(error**2)) < 0.05
    assert np.mean(error < 3 * deviation) > 0.8


def errors_of_scaled(learner, unit):
    mean, deviation = (np.float64(each) for each in learner.predict(AT))
    return np.sqrt(np.mean((mean - smooth(AT) * unit) ** 2, axis=1)), deviation


def test_outputs_of_very_different_size_have_the_deviation_of_the_largest():
    y = smooth(PAIRS) * np.array([1e-20, 1e10], np.float32)
    mean, deviation = untuned(PAIRS, y, capacity=64).predict(AT)
    alone = untuned(PAIRS, y[:, 1:], capacity=64).predict(AT)[1]
    np.testing.assert_allclose(deviation, np.asarray(alone) / np.sqrt(2), rtol=1e-3)
    assert np.isfinite(np.asarray(mean)).all()


def test_decoded_deviations_do_not_leave_float32_either():
    """Of a scheme with a learner, which sends copies of the points with the largest ones."""
    code, found = NeRCC(4, 6), []
    mask = np.array([False, True, False, False, False, True])
    for unit in (1.0, 1e-25, 1e25):
        learner = untuned(PAIRS, smooth(PAIRS) * np.float32(unit), capacity=64)
        function = lambda x, unit=unit: jnp.asarray(smooth_jnp(x) * unit)  # noqa: E731
        result = coded_inference(function, Scheme(code, learner), with_status=True)(AT[:4], mask)
        found.append(np.float64(result.deviation) / unit)
    assert (found[0] > 0).any()
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-2, atol=1e-6)


def smooth_jnp(x):
    return jnp.stack([jnp.sin(3 * x[:, 0]), x[:, 1] ** 2], axis=1)


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("answers", [[], [0.7], [0.7, 0.7, 0.7], [0.1] * 40])
def test_before_two_answers_differ_nothing_is_known_of_errors(answers, on_host):
    predict = traced(on_host)(lambda one: one.predict(AT))
    y = np.array(answers, np.float32).reshape(-1, 1)
    learner = untuned(PAIRS[: len(y)], y, capacity=64)
    mean, deviation = predict(learner)
    np.testing.assert_array_equal(deviation, np.inf)
    np.testing.assert_allclose(mean, answers[0] if answers else 0, rtol=1e-6)
    # The same input with another answer is evidence, too.
    for x in (PAIRS[:1], PAIRS[50:51] if len(PAIRS) > 50 else AT[:1]):
        after = learner.update(x, np.array([[0.9]], np.float32))
        if not answers:
            np.testing.assert_allclose(predict(after)[0], 0.9, rtol=1e-5)
        known = np.isfinite(np.asarray(predict(after)[1]))
        assert known.all() == bool(answers)


def test_a_scheme_gives_nothing_out_by_a_learner_without_evidence():
    learner = untuned(PAIRS[:3], 0 * smooth(PAIRS[:3]), capacity=16)
    scheme, mask = Scheme(NeRCC(2, 2), learner), np.array([False, False])
    result = coded_inference(smooth_jnp, scheme, with_status=True)(AT[:2], mask)
    assert not result.recovered.any()
    np.testing.assert_array_equal(result.deviation, np.inf)
    bars = calibrate_learner_bars(untuned(PAIRS, smooth(PAIRS), capacity=64), None)
    np.testing.assert_array_equal(bars(jnp.full(2, jnp.inf), 0.9), np.inf)
    with pytest.raises(ValueError, match="there is nothing to calibrate"):
        calibrate_learner_bars(learner, None)


def test_rows_that_come_again_have_bars_that_hold():
    base = np.random.default_rng(1).uniform(-1, 1, (100, 2))
    x = np.random.default_rng(2).permutation(np.repeat(base, 6, axis=0))
    with SimulatedPool(smooth, 4, seconds=lambda size: 0.02 * size) as pool:
        result = run_rows(smooth, x, pool, tolerance=0.05, rows_per_call=4)
    predicted = result.status == "predicted"
    assert result.values is not None
    error = np.sqrt(np.mean((result.values - smooth(x)) ** 2, axis=1))
    assert predicted.sum() > 100
    assert np.mean(error[predicted] <= result.score[predicted]) > 0.85
    assert np.mean(error[predicted] > 0.05) < 0.02


def test_queries_that_come_again_calibrate_no_server():
    """Nine in ten are old ones, predicted by their own answers: the bars are those of new ones."""
    random, batches = np.random.default_rng(5), 0
    predictor, policy = Predictor(), BatchingPolicy(tolerance=0.5, coverage=0.9)
    pool = SimulatedPool(smooth, 1, seconds=lambda size: 0.05)
    with CodedBatcher(pool, Coder(Uncoded(1)), (2,), (2,), policy=policy, predictor=predictor):
        while predictor.state == "learning":
            new = random.uniform(-1, 1, (4, 2)).astype(np.float32)
            x = np.concatenate([new, PAIRS[random.integers(0, len(PAIRS), 28)]])
            predictor.learn(x, smooth(x))
            batches += 1
    assert batches >= 8 + 128 / 32 + 1, "the first 256 answers, and 128 to new queries"
    at = random.uniform(-1, 1, (400, 2)).astype(np.float32)
    found = predictor.predict(at)
    error = np.sqrt(np.mean((found.predictions - smooth(at)) ** 2, axis=1))
    assert np.mean(error <= found.deviation) > 0.8


def test_rows_are_learned_in_a_fresh_process_without_a_program():
    """A first fit must not wait for a compiler: rows would be computed meanwhile."""
    code = """
import jax, jax.monitoring, numpy as np
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None
)
import time
from nercc_jax import DevicePool
from nercc_jax.risk import Accuracy
from nercc_jax.rows import run_rows
x = np.random.default_rng(0).uniform(-1, 1, (400, 2)).astype(np.float32)
def slow(x):
    time.sleep(0.02 * len(x))
    return np.stack([np.sin(3 * x[:, 0]), x[:, 1] ** 2], axis=1)
for target in ({"tolerance": 0.02}, {"max_disagreement": 0.05}):
    found = run_rows(slow, x, DevicePool, num_workers=4, rows_per_call=1, **target)
    assert found.summary["learned_from"] > 50, found.summary
print(len(compiled))
from nercc_jax import Uncoded
from nercc_jax.serving import BatchingPolicy, CodedBatcher, Coder, Predictor
from nercc_jax.testing import SimulatedPool
policy, predictor = BatchingPolicy(max_disagreement=0.1, check_answers=0.01), Predictor()
pool = SimulatedPool(np.tanh, 3, seconds=lambda size: 0.05)
with CodedBatcher(pool, Coder(Uncoded(1)), (2,), (2,), policy=policy, predictor=predictor):
    compiled.clear()  # a server compiles before it answers
    random = np.random.default_rng(0)
    while predictor.state == "learning":
        draw = random.uniform(-1, 1, (32, 2)).astype(np.float32)
        predictor.learn(draw, np.stack([np.sin(3 * draw[:, 0]), draw[:, 1] ** 2], axis=1))
    predictor.predict(draw)
print(len(compiled))
jax.jit(lambda x: x + 1)(1.0)
print(len(compiled))
"""
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert found.stdout.split() == ["0", "0", "1"], found.stdout + found.stderr
