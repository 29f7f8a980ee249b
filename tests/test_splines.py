"""Smoothing splines and their posterior: 50 digits, SciPy, kriging and finite differences."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import matrices
import mpmath as mp
import numpy as np
import oracle
import pytest
import scipy.interpolate

import nercc_jax as nj
from nercc_jax import NeRCC
from nercc_jax.codes import BerrutSpline, LearnedDecoder, regression_points
from nercc_jax.splines import (
    posterior_variance,
    process_variance,
    smoothing_matrix,
    smoothing_spline,
)
from nercc_jax.splines.host import smoothing_matrix_on_host, variances_on_host

LAMBDAS = (0.0, 1e-12, 1e-8, 1e-4, 1e-1, 1e2)
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


def chebyshev(n):
    return np.cos(np.pi * np.arange(n) / max(n - 1, 1))


def make_knots(kind, n, rng):
    """Knots in no order; random ones with gaps that differ up to twentyfold."""
    if kind == "chebyshev":
        t = chebyshev(n)
    elif kind == "uniform":
        t = np.linspace(-1, 1, n)
    elif kind == "repeated":
        t = np.resize(chebyshev((n + 1) // 2), n)
    else:
        t = np.cumsum(rng.uniform(0.05, 1, n))
        t = 2 * (t - t[0]) / (t[-1] - t[0]) - 1
    return rng.permutation(t)


def make_masks(t, rng):
    """0, 30 and 60 % missing, at random and as a block of neighbours; two distinct ones stay."""
    n, by_place = len(t), np.argsort(t)
    yield np.ones(n, bool)
    for share in (0.3, 0.6):
        number = min(round(share * n), n - 2)
        for block in (False, True):
            start = rng.integers(0, n - number + 1)
            lost = by_place[start : start + number] if block else rng.permutation(n)[:number]
            mask = ~np.isin(np.arange(n), lost)
            if len(np.unique(t[mask])) > 1:
                yield mask


@jax.jit
def decode(code, y, available):
    return code.decode(y, available)


@jax.jit
def decode_with_matrix(code, y, available):
    y = jnp.where(available, y, 0)
    return jnp.matmul(code.decoder_matrix(available), y, precision="highest")


def cases(n, kind, dtype):
    """(code, data, mask, exact predictions) over all lambdas and masks."""
    rng = np.random.default_rng(n)
    beta = make_knots(kind, n, rng).astype(dtype)
    alpha = np.cos(np.pi * (2 * np.arange(max(2, n // 3)) + 1) / 2 / max(2, n // 3)).astype(dtype)
    y = np.sin(5 * beta.astype(float)).astype(dtype)
    for available in make_masks(beta, rng):
        for lambda_ in LAMBDAS:
            lambda_ = np.asarray(lambda_, dtype)
            code = NeRCC(len(alpha), n, lambda_dec=lambda_, points=(alpha, beta))
            exact = oracle.smoothing_spline(beta, y, lambda_, alpha, available=available)
            yield code, np.where(available, y, np.nan), available, exact


def errors(code, available, got, exact):
    """Absolute errors; beyond the outermost answers relative to an exact value above one."""
    known = np.asarray(code.beta)[available]
    outside = (code.alpha < known.min()) | (code.alpha > known.max())
    for value, reference, far in zip(np.asarray(got), exact, outside, strict=True):
        scale = max(1, abs(reference)) if far else 1
        yield float(abs(mp.mpf(float(value)) - reference) / scale)


# One program a number of points: the extremes, what most use, and what is hardest for float32.
SIZES = [4, 20, 200, pytest.param(100, marks=pytest.mark.slow)]


@pytest.mark.parametrize("kind", ["chebyshev", "uniform", "random", "repeated"])
@pytest.mark.parametrize("n", SIZES)
def test_decoding_is_accurate(n, kind, dtype):
    for code, y, available, exact in cases(n, kind, dtype):
        assert code.beta.dtype == dtype
        worst = max(errors(code, available, decode(code, y, available), exact))
        assert worst < TOLERANCE[dtype], (float(code.lambda_dec), available)


@pytest.mark.parametrize("n", [100])  # of few, `test_a_price_on_end_slopes_is_accurate` shows it
def test_the_matrix_is_accurate_up_to_its_own_rounding(n, dtype):
    for code, y, available, exact in cases(n, "random", dtype):
        got = decode_with_matrix(code, np.where(available, y, 0), available)
        size = np.abs(code.decoder_matrix(available)).sum(axis=1).max()
        worst = max(errors(code, available, got, exact))
        assert worst < TOLERANCE[dtype] * max(1, size / 30)


def test_limits(dtype):
    rng = np.random.default_rng(2)
    t, y = chebyshev(40).astype(dtype), jnp.asarray(rng.normal(size=(40, 3)).astype(dtype))
    interpolation = smoothing_matrix(t, t, 0.0)
    np.testing.assert_allclose(interpolation, np.eye(40), atol=TOLERANCE[dtype])
    line = np.polynomial.Polynomial.fit
    for lambda_ in (np.inf, 1e30):
        fit = smoothing_spline(t, y, lambda_).evaluate(t)
        for column in range(3):
            expected = line(t.astype(float), np.asarray(y[:, column], float), 1)(t.astype(float))
            np.testing.assert_allclose(fit[:, column], expected, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("place", [np.nan, np.inf])
def test_points_that_are_not_finite_do_not_count(place):
    t, y = np.array([0.0, place, 1.0, 3.0], np.float32), np.array([1.0, 9.0, 2.0, 4.0], np.float32)
    at = np.array([0.5, 2.0], np.float32)
    few = smoothing_spline(t, y, 0.01, available=np.isfinite(t)).evaluate(at)
    np.testing.assert_array_equal(smoothing_spline(t, y, 0.01).evaluate(at), few)
    assert not np.any(smoothing_matrix(t, at, 0.01)[:, 1])


@pytest.mark.parametrize("lambda_", [-1e-6, np.nan])
def test_a_lambda_that_is_none_makes_everything_nan(lambda_):
    """A negative one was taken for 0."""
    t, y = np.arange(3.0), np.array([1.0, 2.0, 4.0])
    assert np.isnan(smoothing_spline(t, y, lambda_).values).all()
    assert np.isnan(smoothing_matrix(t, t, lambda_)).all()


@pytest.mark.parametrize("lambda_", [0.0, 1e-4, 1e2, np.inf])
def test_few_observations(lambda_, dtype):
    t, y = jnp.asarray(chebyshev(6).astype(dtype)), jnp.arange(6.0)[:, None]
    at = jnp.linspace(-1, 1, 5)
    for used in range(6):
        one = jnp.arange(6) == used
        constant = smoothing_spline(t, y, lambda_, available=one).evaluate(at)
        np.testing.assert_allclose(constant, np.full((5, 1), float(used)), rtol=1e-6)
        np.testing.assert_allclose(
            smoothing_matrix(t, at, lambda_, available=one).sum(1), 1, rtol=1e-6
        )
        assert np.isinf(posterior_variance(t, at, lambda_, available=one)).all()
    two = jnp.array([True, False, False, False, True, False])
    got = smoothing_spline(t, y, lambda_, available=two).evaluate(at)[:, 0]
    expected = 4 * (t[0] - at) / (t[0] - t[4])
    np.testing.assert_allclose(got, expected, rtol=0, atol=40 * jnp.finfo(dtype).eps)  # up to 4.4
    assert np.isfinite(posterior_variance(t, at, lambda_, available=two)).all()
    assert process_variance(t, y, lambda_, available=two) == np.inf
    none = smoothing_matrix(t, at, lambda_, available=jnp.zeros(6, bool))
    np.testing.assert_array_equal(none, 0)
    assert np.isinf(posterior_variance(t, at, lambda_, available=jnp.zeros(6, bool))).all()


def test_points_an_ulp_apart_are_one(dtype):
    t = np.array([-1, -0.3, 0.2, 1], dtype)
    t = np.append(t, np.nextafter(t[2], np.asarray(1, dtype)))
    fit = smoothing_spline(t, jnp.array([0.0, 1.0, 2.0, 0.0, 4.0]), 0.0).evaluate(t)
    np.testing.assert_allclose(fit, [0, 1, 3, 0, 3], atol=1e-5)


def test_large_n_stays_accurate(dtype):
    n = 20_000
    t = np.linspace(-1, 1, n).astype(dtype)
    y = np.sin(5 * t.astype(float)).astype(dtype)
    at = np.linspace(-1, 1, 200).astype(dtype)
    fit = smoothing_spline(t, jnp.asarray(y), 0.0).evaluate(at)
    np.testing.assert_allclose(fit, np.sin(5 * at.astype(float)), atol=20 * TOLERANCE[dtype])


# -- A price on the slopes at the ends ------------------------------------------------------------

END_WEIGHTS = ((0.0, 0.0), (3.0, 0.0), (0.0, 1e3), (1e4, 1e4))


def priced_cases(n, dtype):
    """(points, data, mask) with all points and, of nine, with some missing, one or two left."""
    rng = np.random.default_rng(n)
    t = make_knots("random", n, rng).astype(dtype) if n > 1 else np.array([0.3], dtype)
    t = (0.9 * t).astype(dtype)
    y = np.sin(5 * t.astype(float)).astype(dtype)
    yield t, y, np.ones(n, bool)
    if n == 9:
        yield t, y, np.arange(9) % 3 > 0
        yield t, y, np.isin(np.arange(9), [2, 7])
        yield t, y, np.arange(9) == 4
        twins = np.where(np.arange(9) < 3, t[0], t)
        yield twins, y, np.arange(9) != 5


@pytest.mark.parametrize("end_weights", END_WEIGHTS)
@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_a_price_on_end_slopes_is_accurate(n, end_weights, dtype):
    at = np.linspace(-1, 1, 7).astype(dtype)
    ends = np.asarray(end_weights, dtype)
    for t, y, available in priced_cases(n, dtype):
        for lambda_ in (1e-12, 1e-6, 1e-2):
            lambda_ = np.asarray(lambda_, dtype)
            mu = float(lambda_) * available.sum()
            wanted = matrices.spline_matrix(t[available], at, mu, tuple(map(float, ends)))
            expected = wanted @ y[available].astype(float)
            spline = smoothing_spline(
                t, np.where(available, y, np.nan), lambda_, available=available, end_weights=ends
            )
            matrix = smoothing_matrix(t, at, lambda_, available=available, end_weights=ends)
            scale = np.maximum(1, np.abs(expected))
            assert np.max(np.abs(spline.evaluate(at) - expected) / scale) < TOLERANCE[dtype]
            size = max(1, np.abs(matrix).sum(axis=1).max() / 30)
            product = np.asarray(matrix, float) @ np.where(available, y, 0)
            assert np.max(np.abs(product - expected) / scale) < size * TOLERANCE[dtype]
            np.testing.assert_array_equal(matrix[:, ~available], 0)


# -- Gradients ----------------------------------------------------------------------------------


def model(x):
    return jnp.tanh(2 * x) + x**2


def exact_model(x):
    return mp.tanh(2 * x) + x**2


def exact_prediction(alpha, beta, lambda_enc, lambda_dec, x, available, k):
    coded = oracle.smoothing_spline(alpha, x, lambda_enc, beta)
    answers = [exact_model(c) for c in coded]
    return oracle.smoothing_spline(beta, answers, lambda_dec, alpha, available=available)[k]


def nested(inputs, available, k):
    alpha, beta, lambda_enc, lambda_dec, x = inputs
    code = NeRCC(
        len(alpha), len(beta), lambda_enc=lambda_enc, lambda_dec=lambda_dec, points=(alpha, beta)
    )
    return code.decode(model(code.encode(x)), available)[k]


# Compiled once for all layouts, lambdas and masks.
reverse_gradient, forward_gradient = jax.jit(jax.jacrev(nested)), jax.jit(jax.jacfwd(nested))


def arguments(layout, lambda_enc, lambda_dec, dtype):
    code = NeRCC(5, 12, points=layout)
    rng = np.random.default_rng(3)
    x = rng.uniform(-1, 1, 5).astype(dtype)
    available = rng.permutation(12) >= 4
    parts = (
        code.alpha,
        code.beta,
        jnp.asarray(lambda_enc),
        jnp.asarray(lambda_dec),
        jnp.asarray(x),
    )
    return tuple(p.astype(dtype) for p in parts), available


def difference(f, values, index, step):
    """The central difference of f in one number, of a list or alone, with 50 digits."""

    def moved(sign):
        change = sign * mp.mpf(step)
        if index is None:
            return f(values + change)
        return f([v + change if i == index else v for i, v in enumerate(values)])

    return (moved(1) - moved(-1)) / (2 * mp.mpf(step))


@pytest.mark.parametrize("layout", ["chebyshev", "uniform", "interleaved"])
@pytest.mark.parametrize(("lambda_enc", "lambda_dec"), [(1e-12, 1e-8), (1e-4, 1e-12), (1e-2, 1e-3)])
def test_gradients_match_the_oracle(layout, lambda_enc, lambda_dec):
    with jax.enable_x64(True):
        inputs, available = arguments(layout, lambda_enc, lambda_dec, "float64")
        for k in (0, 2):
            reverse = reverse_gradient(inputs, available, k)
            forward = forward_gradient(inputs, available, k)
            exact = [oracle.exactly(np.atleast_1d(p)) for p in inputs]
            exact[2], exact[3] = exact[2][0], exact[3][0]
            for argument, (r, f) in enumerate(zip(reverse, forward, strict=True)):

                def vary(value, argument=argument, k=k, exact=exact):
                    parts = [value if i == argument else p for i, p in enumerate(exact)]
                    return exact_prediction(*parts, available, k)

                indices = [None] if np.ndim(r) == 0 else range(len(r))
                # A step of lambda must stay far below lambda itself.
                expected = [float(difference(vary, exact[argument], i, "1e-20")) for i in indices]
                scale = np.max(np.abs(expected))
                assert scale > 0
                for got in (r, f):
                    error = np.abs(np.atleast_1d(got) - expected).max()
                    assert error <= 1e-5 * scale, (argument, k)


@jax.jit
@jax.grad
def gradient_of_sum(inputs, available):
    alpha, beta, lambda_enc, lambda_dec, x = inputs
    code = NeRCC(5, 12, lambda_enc=lambda_enc, lambda_dec=lambda_dec, points=(alpha, beta))
    decoded = code.try_decode(model(code.encode(x)), available)
    return jnp.sum(jnp.where(decoded.recovered, decoded.predictions, 0))


@pytest.mark.parametrize("layout", ["chebyshev", "interleaved", "repeated"])
@pytest.mark.parametrize("lambda_", [0.0, 1e-12, 1e2])
def test_gradients_are_finite_in_float32(layout, lambda_):
    inputs, available = arguments(layout, lambda_, lambda_, "float32")
    for mask in (available, np.arange(12) == 3, np.zeros(12, bool)):
        for gradient in gradient_of_sum(inputs, mask):
            assert np.isfinite(gradient).all()


def test_float32_gradients_are_close_to_float64():
    as_users_do = not jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)  # what they are held against
    with jax.enable_x64(True):
        inputs, available = arguments("chebyshev", 1e-5, 1e-6, "float64")
        inputs = tuple(p.astype("float32").astype("float64") for p in inputs)
        wide = reverse_gradient(inputs, available, 2)
    jax.config.update("jax_disable_most_optimizations", not as_users_do)
    narrow = tuple(jnp.asarray(np.asarray(p), "float32") for p in inputs)
    for got, expected in zip(reverse_gradient(narrow, available, 2), wide, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-3 * np.abs(expected).max())


# -- Choice of lambda ------------------------------------------------------------------------------


def noisy(seed, n=40):
    """Noisy waves on uneven points, none close to another: there SciPy's search finds the least."""
    rng = np.random.default_rng(seed)
    t = np.arange(n) / 2 + rng.uniform(-0.15, 0.15, n)
    return t, np.sin(t * rng.uniform(0.2, 1)) + rng.uniform(0.1, 0.6) * rng.normal(size=n)


def test_cross_validation_chooses_as_scipy_does():
    """Theirs says its choice only to the fit, which ours makes with the lambda that it found."""
    with jax.enable_x64(True):
        choose = jax.jit(lambda t, y, mask: smoothing_spline(t, y, None, available=mask))
        for seed in range(20):
            t, y = noisy(seed)
            found = choose(t, np.where(np.arange(40) == 39, np.nan, y), np.arange(40) < 39)
            theirs = scipy.interpolate.make_smoothing_spline(t[:39], y[:39])
            ours = [
                scipy.interpolate.make_smoothing_spline(t[:39], y[:39], lam=39 * lambda_)(t[:39])
                for lambda_ in float(found.lambda_) * np.exp([-1e-3, 0, 1e-3])
            ]
            np.testing.assert_allclose(found.values[:39], ours[1], atol=1e-8)
            way = ours[2] - ours[0]
            apart = way @ (theirs(t[:39]) - ours[1]) / (way @ way)  # in steps of 2e-3 in log lambda
            assert abs(apart) < 0.5, seed


@pytest.mark.parametrize("order", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_choice_of_lambda_is_differentiable(order):
    """In data, points and weights, and once more; two observations say nothing of it."""
    with jax.enable_x64(True):
        (t, y), rng = noisy(3, 15), np.random.default_rng(0)
        ways = [0.1 * rng.normal(size=15) for _ in range(3)]

        def chosen(step):
            moved = [a + step * way for a, way in zip((t, y, np.ones(15)), ways, strict=True)]
            return jnp.log(smoothing_spline(*moved[:2], None, weights=moved[2]).lambda_)

        slope, step = jax.grad(chosen), 1e-2
        of, derivative = map(jax.jit, (chosen, slope) if order == 1 else (slope, jax.grad(slope)))
        wanted = (of(step) - of(-step)) / (2 * step)
        np.testing.assert_allclose(derivative(0.0), wanted, rtol=2e-2)

        def of_two(y):
            return smoothing_spline(t, y, None, available=np.arange(15) < 2).lambda_

        if order == 1:
            assert not np.any(jax.jit(jax.grad(of_two))(y))


def test_the_choice_weighs_coincident_observations_as_one_knot(dtype):
    """Two observations a point, or their mean and what they differ by: the same in many masks."""
    t, y = (np.tile(each, 2).astype(dtype) for each in noisy(5, 12))
    y[12:] += 0.1
    masks = np.stack([np.ones(24, bool), np.arange(24) != 3, np.arange(24) < 2])
    choose = jax.jit(jax.vmap(lambda m: smoothing_spline(t, y, None, available=m)))
    found = choose(masks)
    assert np.all(np.isfinite(found.values[:, :12]))
    assert np.all(found.lambda_ > 0)


# -- Invariants ---------------------------------------------------------------------------------

MASKS = st.lists(st.booleans(), min_size=9, max_size=9)
PENALTIES = st.one_of(st.just(0.0), st.floats(-12, 4).map(lambda e: 10.0**e))


@st.composite
def points(draw):
    """Nine points in any order, some of them coincident, no two closer than 0.01 otherwise."""
    return np.array(draw(st.lists(st.integers(-100, 100), min_size=9, max_size=9))) / 100.0


def covariance(s, t):
    """Of twice integrated white noise of variance 1 that starts at -2 with value and slope 0."""
    s, t = sorted((s + 2, t + 2))
    return s**2 * (3 * t - s) / 6


def exact(t, at, mu, y=None, weights=None):
    """Posterior variance (and tau^2 of observations y) with a straight line nothing is known of.

    Universal kriging: the covariance of the observations K, the line's basis B.
    """
    t, at = [mp.mpf(float(v)) for v in t], [mp.mpf(float(v)) for v in at]
    n = len(t)
    system = mp.matrix(n + 2, n + 2)
    for i in range(n):
        own = mu / mp.mpf(float(weights[i])) if weights is not None else mu
        for j in range(n):
            system[i, j] = covariance(t[i], t[j]) + (own if i == j else 0)
        for c, value in enumerate((mp.mpf(1), t[i])):
            system[i, n + c] = system[n + c, i] = value
    variances = []
    for a in at:
        right = mp.matrix([covariance(s, a) for s in t] + [mp.mpf(1), a])
        solution = mp.lu_solve(system, right)
        variances.append(covariance(a, a) - mp.fdot(solution, right))
    if y is None:
        return np.array([float(v) for v in variances])
    y = mp.matrix([mp.mpf(float(v)) for v in y] + [0, 0])
    solution = mp.lu_solve(system, y)
    return float(mp.fdot(y[:n], solution[:n]) / (n - 2))


@jax.jit
def by_program(t, y, at, lambda_, given):
    """All that can be asked of a fit with natural ends."""
    spline = smoothing_spline(t, jnp.where(given["available"], y, jnp.nan), lambda_, **given)
    matrix = smoothing_matrix(t, at, lambda_, **given)
    variance = posterior_variance(t, at, lambda_, **given)
    return spline.evaluate(at), matrix, variance, process_variance(t, y, lambda_, **given)


@hypothesis.given(
    points(),
    MASKS,
    PENALTIES,
    st.lists(st.floats(0.2, 5), min_size=9, max_size=9),
    st.sampled_from(((0.0, 0.0), *END_WEIGHTS)),
)
@hypothesis.settings(max_examples=40)
def test_fits_are_the_textbooks_on_the_host_and_in_programs(t, mask, lambda_, weights, prices):
    """Of any observations, weighted, coincident, few and in any order.

    So straight lines are reproduced, rows of the matrix sum to one, nothing is read of what is not
    available, and a variance is that of the process of which the spline is the posterior mean.
    """
    mask, weights, prices = np.array(mask), np.array(weights), np.array(prices)
    at, y = np.array([-1.2, -0.5, 0.0, 0.33, 1.0]), np.sin(4 * t)
    given = {"available": mask, "weights": weights, "end_weights": prices}
    mu = float(lambda_) * weights[mask].sum()
    wanted = np.zeros((5, 9))
    if mask.any():
        given_weights = weights[mask].tolist()
        wanted[:, mask] = matrices.spline_matrix(t[mask], at, mu, tuple(prices), given_weights)
    size = max(1, np.abs(wanted).sum(axis=1).max())
    with jax.enable_x64(True):
        asked = by_program(t, y, at, jnp.asarray(lambda_), given)
        found, matrix, variance, process = map(np.asarray, asked)
        if mask.any():
            np.testing.assert_allclose(found, wanted @ y, atol=1e-9 * size)
        np.testing.assert_array_equal(matrix[:, ~mask], 0)
    host = smoothing_matrix_on_host(t, at, lambda_, **given)
    for each in (matrix, host):
        np.testing.assert_allclose(each, wanted, atol=1e-9 * size)
        np.testing.assert_allclose(each.sum(axis=1), mask.any(), atol=1e-10 * size)
    knots, place = np.unique(t[mask], return_inverse=True)
    on_host, root = variances_on_host(t, at, lambda_, **given)
    if len(knots) < 2:
        assert np.isinf(variance).all()
        assert np.isinf(on_host).all()
        return
    np.testing.assert_allclose(on_host, variance, rtol=1e-6, atol=1e-12)
    if len(knots) > 2:
        np.testing.assert_allclose(np.sum((root @ y) ** 2), process, rtol=1e-6)
    if not prices.any():
        mu = mp.mpf(max(mu, 1e-18))
        heavy = np.bincount(place, weights[mask])
        krige = exact(knots, at, mu, weights=heavy)
        np.testing.assert_allclose(variance, krige, rtol=1e-6, atol=1e-12)
        if len(knots) > 2:  # differences among coincident observations are left out
            means = np.bincount(place, (weights * y)[mask]) / heavy
            np.testing.assert_allclose(process, exact(knots, [], mu, means, heavy), rtol=1e-6)


# -- The posterior ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lambda_", [0.0, 1e-9, 1e-5, 1e-2])
@pytest.mark.parametrize("layout", ["chebyshev", "interleaved", "repeated"])
def test_variance_is_the_posteriors(layout, lambda_, dtype):
    alpha, beta = regression_points(6, 9, layout)
    available = np.array([1, 1, 0, 1, 0, 1, 1, 1, 0], bool)
    got = posterior_variance(beta, alpha, lambda_, available=available)
    assert got.dtype == dtype
    t = np.asarray(beta, np.float64)[available]
    mu = mp.mpf(max(lambda_, 1e-18)) * len(t)
    want = exact(t, np.asarray(alpha, np.float64), mu)
    tolerance = {"float32": 3e-4, "float64": 1e-8}[dtype]
    np.testing.assert_allclose(
        got, want, rtol=tolerance, atol=2e-9 if dtype == "float32" else 1e-13
    )
    on_host, _ = variances_on_host(
        np.asarray(beta), np.asarray(alpha), lambda_, available=available
    )
    np.testing.assert_allclose(on_host, want, rtol=1e-8, atol=1e-13)


@pytest.mark.parametrize("lambda_", [0.0, 1e-9, 1e-5, 1e-2])
def test_process_variance_is_restricted_maximum_likelihood(lambda_, dtype, key):
    _, beta = regression_points(8, 20, "chebyshev")
    y = jax.random.normal(key, (20, 1)) + 3 * jnp.sin(4 * beta)[:, None] + 50
    available = np.arange(20) % 3 != 1
    unread = jnp.where(available[:, None], y, jnp.nan)
    got = process_variance(beta, unread, lambda_, available=available)
    t, seen = np.asarray(beta, np.float64)[available], np.asarray(y, np.float64)[available, 0]
    want = exact(t, [], mp.mpf(max(lambda_, 1e-18)) * len(t), seen)
    np.testing.assert_allclose(got, want, rtol={"float32": 2e-3, "float64": 1e-8}[dtype])
    _, root = variances_on_host(np.asarray(beta), np.zeros(0), lambda_, available=available)
    broken = np.where(available, np.asarray(y, np.float64)[:, 0], 1e9)
    np.testing.assert_allclose(np.sum((root @ broken) ** 2), want, rtol=1e-8)


def test_one_compilation_serves_every_mask():
    t = jnp.linspace(-1.0, 1.0, 12)
    compiled = posterior_variance.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
    before = compiled._cache_size()
    for missing in range(5):
        posterior_variance(t, t[:3], 0.0, available=np.arange(12) != missing)
    assert compiled._cache_size() <= before + 1


@pytest.mark.parametrize("code", ["spline", "berrut", "learned"])
@pytest.mark.parametrize("scale", [1e-25, 1e-19, 1e18, 1e25])
def test_deviations_scale_with_the_answers(code, scale, key):
    """Their squares are 0 or infinite in float32."""
    codes = {"spline": NeRCC, "berrut": BerrutSpline}
    root = jax.random.normal(key, (13, 13), jnp.float32)
    made = codes[code](4, 9) if code in codes else LearnedDecoder(np.ones((9, 4)) / 4, root * scale)
    y, mask = jax.random.normal(key, (9, 2), jnp.float32), np.arange(9) != 4
    unit = made if code in codes else LearnedDecoder(np.ones((9, 4)) / 4, root)
    _, wanted = unit.decode(y, mask, return_uncertainty=True)
    for decode in (made.decode, jax.jit(made.decode, static_argnames="return_uncertainty")):
        _, got = decode(y * scale, mask, return_uncertainty=True)
        np.testing.assert_allclose(got / scale, wanted, rtol=1e-5)


def test_groups_of_groups_of_groups():
    """As sets, groups and coordinates are: it ended the process, by a fault of jaxlib's."""
    t = jnp.linspace(-1.0, 1.0, 24)
    masks = np.random.default_rng(0).random((4, 10, 1, 24)) < 0.8

    def of_mask(mask):
        return posterior_variance(t, t[:20], 1e-4, available=mask)

    found = jax.jit(jax.vmap(jax.vmap(jax.vmap(of_mask))))(masks)
    one = jax.jit(of_mask)
    for place in ((0, 0, 0), (3, 9, 0)):
        np.testing.assert_allclose(found[place], one(masks[place]), rtol=1e-4)


# -- Ends of one cubic over two gaps ---------------------------------------------------------------


def ending(dtype, seed=0):
    """Points in no order, two of them twice, and a mask that leaves out one at an end."""
    rng = np.random.default_rng(seed)
    t = np.cumsum(rng.uniform(0.3, 1, 12))
    t = rng.permutation(2 * (t - t[0]) / (t[-1] - t[0]) - 1)
    t = np.concatenate([t, t[[2, 7]]]).astype(dtype)
    available = ~np.isin(np.arange(14), [4, int(np.argmax(t))])
    return t, available


def cubic(t):
    return (1 + t - 2 * t**2 + 3 * t**3)[:, None]


def test_not_a_knot_is_scipys_cubic_spline(dtype):
    """In fits, and matrices of programs and of the host; straight beyond the ends, natural of few.

    It smooths nearly as a natural one does, and hardly smooths cubics away.
    """
    t, available = ending(dtype)
    y = np.stack([np.sin(3 * t), np.exp(t)], axis=1)
    few = [np.arange(14) < number for number in (4, 3, 2, 1)]
    for mask in (available, *few):
        distinct, places = np.unique(t[mask], return_index=True)
        at = np.linspace(distinct[0] - 0.5, distinct[-1] + 0.5, 31).astype(dtype)
        weights = matrices.cubic_matrix(distinct, at)
        tolerance = 2 * TOLERANCE[dtype] * max(1, np.abs(weights).sum(axis=1).max())
        options = {"available": mask, "ends": "not-a-knot"}
        fit = smoothing_spline(t, np.where(mask[:, None], y, np.nan), 0.0, **options).evaluate(at)
        for found in (
            fit,
            smoothing_matrix(t, at, 0.0, **options) @ y,
            smoothing_matrix_on_host(t, at, 0.0, **options) @ y,
        ):
            np.testing.assert_allclose(found, weights @ y[mask][places], atol=tolerance)
        if len(distinct) >= 4:
            natural = smoothing_matrix(t, at, 0.0, available=mask) @ y
            assert np.abs(natural - fit).max() > 1e-3
            inside = np.linspace(distinct[0], distinct[-1], 9).astype(dtype)
            found = smoothing_spline(t, cubic(t), 1e-9, **options).evaluate(inside)
            np.testing.assert_allclose(found, cubic(inside), atol=1e-4)
    at = np.linspace(-1, 1, 9).astype(dtype)
    options["available"] = available
    for lambda_ in (1e-5, 1e-2, 10.0, np.inf):
        program = smoothing_matrix(t, at, lambda_, **options)
        # Where points lie that are not available changed what is smoothed.
        alone = smoothing_matrix_on_host(t[available], at, lambda_, ends="not-a-knot")
        host = smoothing_matrix_on_host(t, at, lambda_, **options)
        for found, wanted in ((host, program), (program[:, available], alone)):
            np.testing.assert_allclose(found, wanted, atol=20 * TOLERANCE[dtype])
        if lambda_ >= 10:
            natural = smoothing_matrix(t, at, lambda_, available=available) @ cubic(t)
            atol = 0.02 * np.abs(cubic(t)).max()
            np.testing.assert_allclose(program @ cubic(t), natural, atol=atol)


@pytest.mark.parametrize(("num_data", "num_workers", "lambda_"), [(7, 50, 1e-5), (8, 20, 0.0)])
def test_programs_are_as_exact_as_the_host_whatever_the_data(num_data, num_workers, lambda_):
    """Third derivatives of noise over the outermost gaps, 0.002 wide, are a million times it."""
    code = nj.codes.BerrutSpline(num_data, num_workers, lambda_dec=lambda_)
    available = ~np.isin(np.arange(num_workers), [1, num_workers - 2])
    y = np.random.default_rng(0).normal(size=(num_workers, 3)).astype(np.float32)
    wanted = code.decoder_on_host(available) @ y
    np.testing.assert_allclose(jax.jit(code.decode)(y, available), wanted, atol=1e-5)
    spline = smoothing_spline(code.beta, y, lambda_, available=available, ends=code.ends)
    np.testing.assert_allclose(spline.evaluate(code.alpha), wanted, atol=1e-5)


def fitted(t, at, lambda_, weights, prices, y, **given):
    given |= {"weights": weights, "end_weights": prices}
    return smoothing_spline(t, y, lambda_, **given).evaluate(at)


def with_not_a_knot(t, at, lambda_, weights, prices, y, **given):
    given |= {"weights": weights, "end_weights": prices, "ends": "not-a-knot"}
    return smoothing_matrix(t, at, lambda_, **given) @ y


def posterior(t, at, lambda_, weights, prices, y, **given):
    given |= {"weights": weights, "end_weights": prices}
    process = process_variance(t, y, lambda_, **given)
    return jnp.log(jnp.append(posterior_variance(t, at, lambda_, **given), process))


@pytest.mark.parametrize("function", [fitted, with_not_a_knot, posterior])
def test_derivatives_are_central_differences(function):
    """In points, of which two move as one, places, lambda, weights, prices and data.

    First ones in both modes, and each of the second ones.
    """
    random, available = np.random.default_rng(3), np.arange(10) % 4 != 2
    t = np.append(np.linspace(-1, 1, 9) + random.uniform(-0.1, 0.1, 9), 0.0)
    at, y = random.uniform(-1.1, 1.1, 3), random.normal(size=10)
    weights, by = random.uniform(0.5, 2, 10), random.normal(size=4)
    ways = [random.normal(size=np.shape(each)) for each in (t, at, 1e-2, weights, (1, 1), y)]
    t[9], ways[0][9] = t[4], ways[0][4]
    assert available[[4, 9]].all()

    def total(steps, prices):
        moved = [step * way for step, way in zip(steps, ways, strict=True)]
        lambda_, *heavy = (
            each * jnp.exp(move)
            for each, move in zip((1e-2, weights, prices), moved[2:5], strict=True)
        )
        numbers = t + moved[0], at + moved[1], lambda_, *heavy, y + moved[5]
        found = function(*numbers, available=available)
        return jnp.sum(by[: found.size] * found)

    with jax.enable_x64(True):
        slopes, of = jax.jit(jax.value_and_grad(total)), jax.jit(jax.jacfwd(total))
        second, nothing, step = jax.jit(jax.jacfwd(jax.grad(total))), jnp.zeros(6), 1e-5
        for prices in jnp.array([[3.0, 0.5], [1e3, 1e-3]]):
            first, curved = slopes(nothing, prices)[1], second(nothing, prices)
            np.testing.assert_allclose(of(nothing, prices), first, rtol=1e-8, atol=1e-10)
            for place, shift in enumerate(step * jnp.eye(6)):
                (above, slope), (below, before) = (slopes(s, prices) for s in (shift, -shift))
                wanted = (above - below) / (2 * step)
                np.testing.assert_allclose(first[place], wanted, rtol=1e-4, atol=1e-7)
                wanted = (slope - before) / (2 * step)
                np.testing.assert_allclose(curved[place], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("price", [1e10, 1e20, 3e38, np.inf])
def test_ends_of_any_price_are_flat(price, dtype):
    """The docstring names infinity; infinity times a penalty is NaN."""
    t = np.linspace(-1, 1, 6).astype(dtype)
    prices = np.full(2, price, np.float64).astype(dtype)
    spline = smoothing_spline(t, np.sin(3 * t), 0.1, end_weights=prices)
    beyond = spline.evaluate(np.array([-1.4, -1.2, 1.2, 1.4], dtype))
    np.testing.assert_allclose(beyond[:2], beyond[0], atol=1e-6)
    np.testing.assert_allclose(beyond[2:], beyond[3], atol=1e-6)
    host = smoothing_matrix_on_host(t, t, 0.1, end_weights=prices) @ np.sin(3 * t)
    np.testing.assert_allclose(spline.evaluate(t), host, atol=2e-6)


@pytest.mark.parametrize(
    "numbers", [{"lambda_dec": 1e38, "end_penalty": 1e32}, {"lambda_dec": 1.0, "end_penalty": 3e38}]
)
def test_penalties_that_overflow_decode_all_the_same(numbers):
    code, mask = nj.NeRCC(4, 9, **numbers), np.isin(np.arange(9), [3, 4])
    found = jax.jit(code.try_decode)(np.ones((9, 1), np.float32), mask)
    assert np.all(found.recovered)
    np.testing.assert_allclose(found.predictions, 1, atol=1e-6)
