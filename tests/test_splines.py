"""Smoothing splines against a 50-digit oracle, SciPy, finite differences and their invariants."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import oracle
import pytest
import scipy.interpolate

from nercc_jax import NeRCC
from nercc_jax.splines import smoothing_matrix, smoothing_spline

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
    two = jnp.array([True, False, False, False, True, False])
    got = smoothing_spline(t, y, lambda_, available=two).evaluate(at)[:, 0]
    expected = 4 * (t[0] - at) / (t[0] - t[4])
    np.testing.assert_allclose(got, expected, rtol=0, atol=40 * jnp.finfo(dtype).eps)  # up to 4.4
    none = smoothing_matrix(t, at, lambda_, available=jnp.zeros(6, bool))
    np.testing.assert_array_equal(none, 0)


def test_weights_are_repetitions(dtype):
    t, y = jnp.array([-1.0, -0.2, 0.5, 1.0]), jnp.array([0.0, 1.0, -1.0, 2.0])
    weights, at = jnp.array([1, 3, 2, 1]), jnp.linspace(-1, 1, 9)
    repeat = np.repeat(np.arange(4), weights)
    for lambda_ in LAMBDAS:
        weighted = smoothing_spline(t, y, lambda_, weights=weights.astype(dtype)).evaluate(at)
        repeated = smoothing_spline(t[repeat], y[repeat], lambda_).evaluate(at)
        np.testing.assert_allclose(weighted, repeated, atol=30 * jnp.finfo(dtype).eps)


def test_points_an_ulp_apart_are_one(dtype):
    t = np.array([-1, -0.3, 0.2, 1], dtype)
    t = np.append(t, np.nextafter(t[2], np.asarray(1, dtype)))
    fit = smoothing_spline(t, jnp.array([0.0, 1.0, 2.0, 0.0, 4.0]), 0.0).evaluate(t)
    np.testing.assert_allclose(fit, [0, 1, 3, 0, 3], atol=1e-5)


def test_trailing_shapes(dtype):
    t, y = jnp.asarray(chebyshev(7).astype(dtype)), jnp.arange(42.0).reshape(7, 3, 2)
    spline = smoothing_spline(t, y, 1e-3)
    assert spline.evaluate(jnp.zeros(4)).shape == (4, 3, 2)


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
            exact = oracle.spline_with_end_prices(t, y, lambda_, ends, at, available=available)
            expected = np.array(exact, float)
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


def test_end_price_gradients_match_the_oracle():
    with jax.enable_x64(True):
        t, y, available = list(priced_cases(9, "float64"))[1]
        at = np.array([-1.0, -0.2, 0.5, 1.0])

        @jax.jit
        def both(ends, lambda_):
            def predict(ends, lambda_):
                spline = smoothing_spline(
                    t, jnp.asarray(y), lambda_, available=available, end_weights=ends
                )
                return spline.evaluate(at)

            return (
                jax.jacrev(predict, argnums=(0, 1))(ends, lambda_),
                jax.jacfwd(predict, argnums=(0, 1))(ends, lambda_),
            )

        for ends in ((3.0, 0.5), (1e3, 1e-3)):
            for lambda_ in (1e-6, 1e-2):
                exact = oracle.exactly([*ends, lambda_])

                def predict(values):
                    *ends, lambda_ = values
                    return mp.matrix(
                        oracle.spline_with_end_prices(t, y, lambda_, ends, at, available=available)
                    )

                expected = np.array(
                    [[float(v) for v in difference(predict, exact, i, "1e-20")] for i in range(3)]
                )
                for by_ends, by_lambda in both(jnp.array(ends), jnp.array(lambda_)):
                    got = np.column_stack([by_ends, by_lambda]).T
                    scale = np.abs(expected).max(axis=1, keepdims=True)
                    assert (scale > 0).all()
                    assert (np.abs(got - expected) < 1e-5 * scale).all()


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


def test_coincident_workers_move_as_one():
    """Moving two workers on one point together is moving their knot."""
    with jax.enable_x64(True):
        (alpha, beta, *rest), available = arguments("repeated", 1e-3, 1e-5, "float64")
        beta = np.asarray(beta)
        twins = np.flatnonzero(beta == beta[1])
        assert len(twins) > 1
        available = available | np.isin(np.arange(12), twins)
        tangent = jnp.asarray(np.isin(np.arange(12), twins), float)

        def predict(b):
            return nested((alpha, b, *rest), available, 1)

        _, slope = jax.jvp(predict, (jnp.asarray(beta),), (tangent,))
        a, le, ld, x = (oracle.exactly(np.atleast_1d(p)) for p in (alpha, *rest))

        def exact(shift):
            moved = [b + shift if i in twins else b for i, b in enumerate(oracle.exactly(beta))]
            return exact_prediction(a, moved, le[0], ld[0], x, available, 1)

        step = mp.mpf("1e-20")
        expected = float((exact(step) - exact(-step)) / (2 * step))
        np.testing.assert_allclose(slope, expected, rtol=1e-5)


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


def test_the_choice_of_lambda_is_differentiable():
    """In data, points and weights, and once more; two observations say nothing of it."""
    with jax.enable_x64(True):
        (t, y), rng = noisy(3, 15), np.random.default_rng(0)
        ways = [0.1 * rng.normal(size=15) for _ in range(3)]

        @jax.jit
        def chosen(step):
            moved = [a + step * way for a, way in zip((t, y, np.ones(15)), ways, strict=True)]
            return jnp.log(smoothing_spline(*moved[:2], None, weights=moved[2]).lambda_)

        slope, step = jax.jit(jax.grad(chosen)), 1e-2
        wanted = (chosen(step) - chosen(-step)) / (2 * step)
        np.testing.assert_allclose(slope(0.0), wanted, rtol=2e-2)
        wanted = (slope(step) - slope(-step)) / (2 * step)
        np.testing.assert_allclose(jax.jit(jax.grad(slope))(0.0), wanted, rtol=2e-2)

        def of_two(y):
            return smoothing_spline(t, y, None, available=np.arange(15) < 2).lambda_

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

FLOATS = st.floats(-1, 1, width=32)
MASKS = st.lists(st.booleans(), min_size=9, max_size=9).filter(any)
PENALTIES = st.one_of(st.just(0.0), st.floats(-12, 4).map(lambda e: 10.0**e))


@st.composite
def points(draw):
    """Nine points in any order, some of them coincident, no two closer than 0.01 otherwise."""
    return np.array(draw(st.lists(st.integers(-100, 100), min_size=9, max_size=9))) / 100.0


@hypothesis.given(points(), MASKS, PENALTIES, FLOATS, FLOATS)
def test_a_straight_line_is_reproduced(t, mask, lambda_, slope, offset):
    mask = np.array(mask)
    hypothesis.assume(len(np.unique(t[mask])) > 1)
    at = np.linspace(-1, 1, 5)
    with jax.enable_x64(True):
        spline = smoothing_spline(t, jnp.asarray(slope * t + offset), lambda_, available=mask)
        np.testing.assert_allclose(spline.evaluate(at), slope * at + offset, atol=1e-9)


@hypothesis.given(points(), MASKS, PENALTIES, st.randoms(use_true_random=False))
def test_the_matrix_keeps_its_invariants(t, mask, lambda_, random):
    """Rows sum to one, what is not available is not read, the order does not matter, and its
    product is the spline."""
    mask, at, y = np.array(mask), np.linspace(-1, 1, 5), np.sin(4 * t)
    order = np.array(random.sample(range(9), 9))
    with jax.enable_x64(True):
        matrix = smoothing_matrix(t, at, lambda_, available=mask)
        size = np.abs(matrix).sum(axis=1).max()
        np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-12 * size)
        np.testing.assert_array_equal(matrix[:, ~mask], 0)
        other = smoothing_matrix(t[order], at, lambda_, available=mask[order])
        np.testing.assert_allclose(other, matrix[:, order], atol=1e-11 * size)
        spline = smoothing_spline(t, jnp.asarray(y), lambda_, available=mask).evaluate(at)
        np.testing.assert_allclose(matrix @ y, spline, atol=1e-11 * size)


# -- Errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lambda_": None, "ends": "not-a-knot"}, "chooses one for natural ends: give a lambda_"),
        ({"ends": "clamped"}, "ends must be one of natural, not-a-knot, not 'clamped'"),
        ({"t": jnp.zeros((2, 2))}, "points must be a float vector"),
        ({"t": jnp.zeros(0)}, "points must be a float vector"),
        ({"t": jnp.arange(3)}, "points must be a float vector"),
        ({"y": jnp.zeros(4)}, "first axis must be the 3 points"),
        ({"weights": jnp.ones(2)}, "weights has shape"),
        ({"available": jnp.ones(2, bool)}, "available has shape"),
        ({"available": jnp.ones(3)}, "boolean mask"),
        ({"end_weights": jnp.ones(3)}, r"end_weights must be two, first and last, .*\(3,\)"),
        ({"end_weights": jnp.ones(())}, "end_weights must be two"),
    ],
)
def test_errors(change, message, untyped):
    given = {"t": jnp.array([-1.0, 0.0, 1.0]), "y": jnp.zeros(3), "lambda_": 0.1, **change}
    with pytest.raises(ValueError, match=message):
        smoothing_spline(given.pop("t"), given.pop("y"), given.pop("lambda_"), **given)
