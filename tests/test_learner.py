"""The learner from past answers, against a Gaussian process in float64 by NumPy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.stats import norm

from nercc_jax import NeRCC, save_code
from nercc_jax.risk import calibrate_learner_bars
from nercc_jax.surrogates import (
    Kernel,
    LearnerTuning,
    fit_learner,
    init_learner,
    learner_card,
    load_learner,
    principal_components,
    save_learner,
    tune_learner,
)
from nercc_jax.surrogates.nearest import nearest_predictions

CAPACITY, B = 48, 6
RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 3))
FEW = LearnerTuning(steps=2)
EPS = {"float32": 1e-3, "float64": 1e-8}


def model(x):
    return jnp.stack([jnp.sin(2 * x[:, 0]) * x[:, 1], jnp.cos(x.sum(1))], axis=1)


def rough(x):
    return 0.5 * model(x)


@eqx.filter_jit
def predict(learner, x):
    return learner.predict(x)


SHAPES = {
    "squared_exponential": lambda r: np.exp(-(r**2) / 2),
    "matern32": lambda r: (1 + np.sqrt(3) * r) * np.exp(-np.sqrt(3) * r),
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
    learner = init_learner(x[:B], model(x[:B]), capacity=CAPACITY, kernel=kernel)
    seen = list(range(B))
    for place in range(B, len(X) - B, B):  # more than the window holds
        here = np.arange(place, place + B)
        observed = RNG.uniform(size=B) < 0.8
        # What is not observed may be anything.
        y = model(x[here]).at[~observed].set(jnp.nan)
        learner = learner.update(x[here].at[~observed].set(jnp.inf), y)
        seen += here[observed].tolist()
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
    learner = init_learner(x, y, capacity=CAPACITY, kernel=kernel, features=features)
    mean, deviation = nearest_predictions(learner)(X[-B:].astype(np.float32))
    wanted, _ = exact(kernel, z[:30], y, z[-B:])
    np.testing.assert_allclose(mean, wanted, atol=1e-3)
    scaled = z / np.float64(kernel.unit) / 1.5
    nearest = SHAPES[shape](cdist(scaled[-B:], scaled[:30]).min(axis=1))
    variance = (1.001 - nearest**2 / 1.001) * np.mean((y - y.mean(axis=0)) ** 2)
    np.testing.assert_allclose(deviation, np.sqrt(variance), rtol=1e-3)


def test_a_prior_carries_what_it_can_and_features_are_what_tells():
    x = jnp.asarray(X, float)
    learner = init_learner(x[:40], model(x[:40]), capacity=64, prior=rough, features=jnp.sin)
    mean, _ = learner.predict(x[40:50])
    kernel = learner.kernel
    wanted, _ = exact(kernel, jnp.sin(x[:40]), model(x[:40]) - rough(x[:40]), jnp.sin(x[40:50]))
    np.testing.assert_allclose(mean, wanted + rough(x[40:50]), atol=1e-3)
    # A few rows more, which are written into the factor.
    more = learner.update(x[40:43], model(x[40:43])).predict(x[50:60])[0]
    anew = init_learner(
        x[:43], model(x[:43]), capacity=64, prior=rough, features=jnp.sin, kernel=kernel
    )
    np.testing.assert_allclose(more, anew.predict(x[50:60])[0], atol=1e-3)
    far = 1e4 * jnp.ones((1, 3))
    alone = init_learner(x[:40], model(x[:40]), prior=rough, capacity=64).predict(far)[0]
    rest = jnp.mean(model(x[:40]) - rough(x[:40]), axis=0)
    np.testing.assert_allclose(alone, rough(far) + rest, atol=1e-4)


def test_outputs_may_be_any_tree():
    x = jnp.asarray(X[:20], float)
    y = {"a": model(x), "b": jnp.sin(x[:, 0])}
    learner = init_learner({"image": x, "id": jnp.arange(20)}, y, capacity=32)
    mean, deviation = learner.predict({"image": x[:5] + 0.1, "id": jnp.arange(5)})
    assert mean["a"].shape == (5, 2)
    assert mean["b"].shape == deviation.shape == (5,)
    both = init_learner(x, jnp.column_stack([model(x), jnp.sin(x[:, 0])]), capacity=32)
    joined, same = both.predict(x[:5] + 0.1)
    np.testing.assert_allclose(jnp.column_stack([mean["a"], mean["b"]]), joined, atol=1e-6)
    np.testing.assert_allclose(deviation, same, rtol=1e-5)


def test_it_knows_nothing_at_first():
    x = jnp.asarray(X[:10], float)
    learner = init_learner(x[:0], model(x[:0]), capacity=32)
    mean, deviation = learner.predict(x)
    np.testing.assert_array_equal(mean, 0)
    np.testing.assert_array_equal(deviation, np.inf)
    again = learner.update(x, model(x))
    anew = init_learner(x, model(x), capacity=32, kernel=learner.kernel)
    np.testing.assert_allclose(again.predict(x)[0], anew.predict(x)[0], atol=1e-5)


def test_pairs_that_hardly_differ_and_no_noise():
    """Float32 cannot factorise this; the answer stays finite and right."""
    x = jnp.tile(jnp.asarray(X[:4], jnp.float32), (8, 1)) + 3e-4 * jnp.arange(32)[:, None]
    kernel = Kernel("squared_exponential", centre=jnp.zeros(3), widths=[3.0], noise=1e-12)
    learner = init_learner(x, model(x), capacity=32, kernel=kernel)
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
        learner = init_learner(x[:40], model(x[:40]), capacity=CAPACITY)

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


def test_replaced_rows_cost_no_accuracy():
    """Errors are those of exact solutions, after each update."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-2, 2, (512, 4)).astype(np.float32)
    y = np.stack(
        [
            np.exp(np.sin(x[:, 0]) + 0.7 * x[:, 1]) * np.cos(x[:, 2]),
            np.sin(x[:, 0] * x[:, 3]),
        ],
        axis=1,
    )
    kernel = Kernel("squared_exponential", centre=np.zeros(4), widths=[4.0], noise=3e-5)
    learner = init_learner(x[:128], y[:128], capacity=256, kernel=kernel)
    for end in range(144, 272, 16):
        new = slice(end - 16, end)
        learner = learner.update(x[new], y[new])
        known = slice(max(end - 256, 0), end)
        wanted, _ = exact(kernel, x[known], y[known], x[-200:])
        found = learner.predict(x[-200:])[0]
        errors = [np.sqrt(np.mean((each - y[-200:]) ** 2)) for each in (found, wanted)]
        assert errors[0] < 1.1 * errors[1]


def test_pairs_that_come_and_go_leave_the_factor_that_a_new_one_is():
    """With repeated inputs among them; in the same float64, so that nothing but the way differs."""
    rng, x = np.random.default_rng(2), X.astype(np.float32)
    learner = init_learner(x[:40], np.asarray(model(x[:40])), capacity=CAPACITY)
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
    learner = init_learner(x, y, capacity=16)
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

    before = init_learner(x[:96], wave(x[:96]), capacity=96)
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


def test_tuning_again_keeps_how_wide_widths_are_beside_each_other():
    """By one width for all, what tells nothing counts as much as what tells all: error 0.2, not
    0.02."""
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.uniform(-1, 1, size=(96 + 60, 6)), float)
    y = jnp.sin(4 * x[:, :1])
    start = init_learner(x[:96], y[:96], capacity=96)
    learner = tune_learner(start, LearnerTuning(shapes=("squared_exponential",), steps=30))
    errors = {}
    for widths in ("kept", "one"):
        again = tune_learner(learner, LearnerTuning(widths=widths, steps=0))
        errors[widths] = float(jnp.sqrt(jnp.mean((again.predict(x[96:])[0] - y[96:]) ** 2)))
        if widths == "kept":
            ratios = again.kernel.widths / learner.kernel.widths
            np.testing.assert_allclose(ratios, ratios[0], rtol=1e-5)
    before = float(jnp.sqrt(jnp.mean((learner.predict(x[96:])[0] - y[96:]) ** 2)))
    assert errors["kept"] < 1.1 * before
    assert errors["one"] > 5 * before


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
        calibrate_learner_bars(init_learner(x[:0], y[:0], capacity=32))


def test_a_file_holds_it(tmp_path):
    x = jnp.asarray(X[:20], float)
    learner = fit_learner(x, model(x), capacity=32, prior=rough, tuning=FEW)
    path = tmp_path / "learner.npz"
    save_learner(path, learner, {"of": "a test"})
    assert learner_card(path) == {"of": "a test"}
    loaded = load_learner(path, prior=rough)
    for mine, theirs in zip(learner.predict(x + 0.1), loaded.predict(x + 0.1), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)
    with pytest.raises(ValueError, match="was made with `prior`: load it so"):
        load_learner(path)
    path.write_bytes(b"no such file")
    with pytest.raises(ValueError, match="has no checksum: it is another file"):
        load_learner(path)
    save_code(path, NeRCC(3, 6))
    with pytest.raises(ValueError, match=r"learner.npz is no .npz file: restore it from a copy"):
        load_learner(path)


def test_a_kernel_is_tuned_on_three_pairs_at_least():
    learner = init_learner(jnp.asarray(X[:4], float), model(X[:4]), capacity=8)
    assert np.isfinite(tune_learner(learner, FEW).predict(X[4:5])[1])
    few = init_learner(jnp.asarray(X[:2], float), model(X[:2]), capacity=8)
    with pytest.raises(ValueError, match="2 pairs tell nothing of a kernel: three at least"):
        tune_learner(few, FEW)


def tuned(**change):
    return fit_learner(jnp.asarray(X[:4]), model(X[:4]), tuning=LearnerTuning(**change))


def kernel(**numbers):
    return Kernel(**{"centre": np.zeros(2), "widths": [1.0, 1.0]} | numbers)


def started(**change):
    given = {"x": jnp.ones((4, 3)), "y": jnp.ones((4, 2))} | change
    return init_learner(given.pop("x"), given.pop("y"), **given)


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        (tuned, {"shapes": ("cubic",)}, "a kernel's shape must be one of"),
        (tuned, {"widths": "all"}, "must be 'auto', 'one', 'each', 'kept' or groups, not 'all'"),
        (tuned, {"rows": 2}, "rows must be an integer from 3 on"),
        (tuned, {"widths": (0, 1)}, "widths must group 3 features"),
        (kernel, {"widths": [1.0, -1.0]}, "widths must be positive and finite"),
        (kernel, {"widths": [1.0, np.inf]}, "widths must be positive and finite"),
        (kernel, {"noise": 0.0}, "noise must be positive and finite"),
        (kernel, {"linear": -1.0}, "linear must be 0 or positive and finite"),
        (kernel, {"linear": np.nan}, "linear must be 0 or positive and finite"),
        (started, {"capacity": 0}, "capacity must be a positive integer"),
        (started, {"y": np.ones((3, 2))}, "x are 4 data points, y 3 answers"),
        (started, {"y": np.ones((4, 2), int)}, "y is int"),
        (started, {"x": np.ones((4, 3), int)}, "no float among the data points"),
        (started, {"kernel": "linear"}, "shape must be one of squared_exponential, matern32"),
        (started, {"kernel": Kernel(centre=np.zeros(2))}, "the kernel is for 2 features, not 3"),
        (started, {"prior": lambda x: x}, "the surrogate gives outputs"),
    ],
)
def test_wrong_use(make, change, message, untyped):
    with pytest.raises(ValueError, match=message):
        make(**change)
