"""What a learner claims: copies of pairs, units of outputs, and no evidence at all."""

import subprocess
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nercc_jax import NeRCC, Scheme, Uncoded, coded_inference
from nercc_jax.pools import DevicePool
from nercc_jax.risk import calibrate_learner_bars
from nercc_jax.rows import run_rows
from nercc_jax.schemes import cross_validate_error_bars, fit_scheme
from nercc_jax.serving import BatchingPolicy, CodedBatcher, Coder, Predictor
from nercc_jax.stragglers import ExactStragglers
from nercc_jax.surrogates import Learner, LearnerTuning, fit_learner, init_learner
from nercc_jax.testing import SimulatedPool

RNG = np.random.default_rng(7)
X = RNG.uniform(-1, 1, (40, 2)).astype(np.float32)
AT = RNG.uniform(-1, 1, (200, 2)).astype(np.float32)
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
    return np.random.default_rng(seed).permutation(np.repeat(X, times, axis=0))


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
    learners = [init_learner(x, smooth(x), capacity=128) for x in (repeated(1), repeated(2))]
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
    x, y = X[:8], smooth(X[:8])
    learner = init_learner(x, y, capacity=12)
    again = learner.update(x + np.float32(jump), y)
    assert again.size == 8
    np.testing.assert_array_equal(again.window.counts, 2 * (np.arange(12) < 8))
    np.testing.assert_array_equal(again.window.residuals, learner.window.residuals)
    np.testing.assert_array_equal(again.window.inputs, learner.window.inputs)
    np.testing.assert_array_equal(again.window.scatter, 0)
    # Six that are new and two that are not: the oldest that did not come again make room.
    both = np.concatenate([X[8:14], x[:2]])
    later = again.update(both, smooth(both))
    assert later.size == 12
    for row in (*X[:2], *X[8:14]):
        assert np.abs(np.asarray(later.window.inputs) - row).sum(axis=1).min() == 0
    assert np.abs(np.asarray(later.window.inputs) - X[2]).sum(axis=1).min() > 0
    # What the factor says is what it would say made anew.
    mean, deviation = later.predict(AT)
    fresh = later.refactorized().predict(AT)
    np.testing.assert_allclose(mean, fresh[0], atol=1e-3)
    np.testing.assert_allclose(deviation, fresh[1], rtol=1e-2)


def test_answers_that_differ_are_noise_and_their_mean_is_learned():
    """With 30 answers each the mean is known better than a single answer, which bars are for."""
    x = np.repeat(X, 30, axis=0)
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
    unit, y = 10.0**exponent, smooth(X)
    predict = traced(on_host)(lambda one: one.predict(AT))
    sizes = ((y * size).astype(np.float32) for size in (1.0, unit))
    learners = [init_learner(X, each, capacity=64) for each in sizes]
    learners = [one.with_kernel(learners[0].kernel) for one in learners]
    (mean, deviation), (other, scaled) = map(predict, learners)
    # 1e-30 squared, and products with numbers below 1e-38, have no float32.
    np.testing.assert_allclose(np.float64(other) / unit, mean, atol=1e-4)
    np.testing.assert_allclose(np.float64(scaled) / unit, deviation, rtol=1e-3)
    after = learners[1].update(AT[:5], (smooth(AT[:5]) * unit).astype(np.float32))
    assert np.isfinite(np.asarray(predict(after)[1])).all()
    tuned = fit_learner(X, (y * unit).astype(np.float32), capacity=64, tuning=QUICK)
    error, deviation = (np.float64(each) / unit for each in errors_of_scaled(tuned, unit))
    assert np.sqrt(np.mean(error**2)) < 0.05
    assert np.mean(error < 3 * deviation) > 0.8


def errors_of_scaled(learner, unit):
    mean, deviation = (np.float64(each) for each in learner.predict(AT))
    return np.sqrt(np.mean((mean - smooth(AT) * unit) ** 2, axis=1)), deviation


def test_outputs_of_very_different_size_have_the_deviation_of_the_largest():
    y = smooth(X) * np.array([1e-20, 1e10], np.float32)
    mean, deviation = init_learner(X, y, capacity=64).predict(AT)
    alone = init_learner(X, y[:, 1:], capacity=64).predict(AT)[1]
    np.testing.assert_allclose(deviation, np.asarray(alone) / np.sqrt(2), rtol=1e-3)
    assert np.isfinite(np.asarray(mean)).all()


def test_decoded_deviations_do_not_leave_float32_either():
    """Of a scheme with a learner, which sends copies of the points with the largest ones."""
    code, found = NeRCC(4, 6), []
    mask = np.array([False, True, False, False, False, True])
    for unit in (1.0, 1e-25, 1e25):
        learner = init_learner(X, smooth(X) * np.float32(unit), capacity=64)
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
    learner = init_learner(X[: len(y)], y, capacity=64)
    mean, deviation = predict(learner)
    np.testing.assert_array_equal(deviation, np.inf)
    np.testing.assert_allclose(mean, answers[0] if answers else 0, rtol=1e-6)
    # The same input with another answer is evidence, too.
    for x in (X[:1], X[50:51] if len(X) > 50 else AT[:1]):
        after = learner.update(x, np.array([[0.9]], np.float32))
        known = np.isfinite(np.asarray(predict(after)[1]))
        assert known.all() == bool(answers)


def test_a_scheme_gives_nothing_out_by_a_learner_without_evidence():
    learner = init_learner(X[:3], 0 * smooth(X[:3]), capacity=16)
    scheme, mask = Scheme(NeRCC(2, 2), learner), np.array([False, False])
    result = coded_inference(smooth_jnp, scheme, with_status=True)(AT[:2], mask)
    assert not result.recovered.any()
    np.testing.assert_array_equal(result.deviation, np.inf)
    bars = calibrate_learner_bars(init_learner(X, smooth(X), capacity=64), None)
    np.testing.assert_array_equal(bars(jnp.full(2, jnp.inf), 0.9), np.inf)
    with pytest.raises(ValueError, match="there is nothing to calibrate"):
        calibrate_learner_bars(learner, None)
    with pytest.raises(ValueError, match="there is nothing to calibrate"):
        fit_scheme(X, 0 * smooth(X), NeRCC(1, 2), capacity=64)


def test_held_out_inputs_leave_with_all_answers_to_them():
    """In a scheme that is fitted, and where bars are cross-validated on groups."""
    tuning = LearnerTuning(shapes=("squared_exponential",), steps=10)
    factors = []
    for times in (1, 4):
        x = repeated(times)
        fitted = fit_scheme(x, smooth(x), NeRCC(1, 2), capacity=256, tuning=tuning)
        bars, learner = fitted.bars, fitted.surrogate
        assert bars is not None
        assert isinstance(learner, Learner)
        scheme = Scheme(NeRCC(4, 6, points="interleaved"), learner)

        def fit(x, y, kernel=learner.kernel):
            return init_learner(x, y, capacity=256, kernel=kernel)

        cross = cross_validate_error_bars(
            smooth_jnp, scheme, x[:40], smooth(x[:40]), {"two": ExactStragglers(2)}, fit,
            key=jax.random.key(0), num_sets=4, folds=5,
        )  # fmt: skip
        factors.append([float(each.factor(0.5)) for each in (bars, cross)])
    once, more = np.array(factors)
    assert (more > 0.3 * once).all()


def test_rows_that_come_again_have_bars_that_hold():
    base = np.random.default_rng(1).uniform(-1, 1, (100, 2))
    x = np.random.default_rng(2).permutation(np.repeat(base, 6, axis=0))
    result = run_rows(slow, x, DevicePool, num_workers=4, tolerance=0.05, rows_per_call=4)
    predicted = result.status == "predicted"
    assert result.values is not None
    error = np.sqrt(np.mean((result.values - smooth(x)) ** 2, axis=1))
    assert predicted.sum() > 100
    assert np.mean(error[predicted] <= result.score[predicted]) > 0.85
    assert np.mean(error[predicted] > 0.05) < 0.02


def slow(x):
    time.sleep(0.02 * len(x))
    return smooth(x)


def test_queries_that_come_again_calibrate_no_server():
    """Nine in ten are old ones, predicted by their own answers: the bars are those of new ones."""
    random, batches = np.random.default_rng(5), 0
    predictor, policy = Predictor(capacity=512), BatchingPolicy(tolerance=0.5, coverage=0.9)
    pool = SimulatedPool(smooth, 1, seconds=lambda size: 0.05)
    with CodedBatcher(pool, Coder(Uncoded(1)), (2,), (2,), policy=policy, predictor=predictor):
        while predictor.state == "learning":
            new = random.uniform(-1, 1, (4, 2)).astype(np.float32)
            x = np.concatenate([new, X[random.integers(0, len(X), 28)]])
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
    while predictor.state == "learning":
        draw = np.random.default_rng(predictor.status()["known"]).uniform(-1, 1, (32, 2))
        draw = draw.astype(np.float32)
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
