"""The spline as a posterior, against the covariance of integrated white noise in 50 digits."""

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import pytest
from jax.test_util import check_grads

from nercc_jax import NeRCC
from nercc_jax.codes import BerrutSpline, LearnedDecoder, regression_points
from nercc_jax.splines import posterior_variance, process_variance
from nercc_jax.splines._host import variances_on_host

mp.mp.dps = 50


def covariance(s, t):
    """Of twice integrated white noise of variance 1 that starts at -2 with value and slope 0."""
    s, t = sorted((s + 2, t + 2))
    return s**2 * (3 * t - s) / 6


def exact(t, at, mu, y=None):
    """Posterior variance (and tau^2 of observations y) with a straight line nothing is known of.

    Universal kriging: the covariance of the observations K, the line's basis B.
    """
    t, at = [mp.mpf(float(v)) for v in t], [mp.mpf(float(v)) for v in at]
    n = len(t)
    system = mp.matrix(n + 2, n + 2)
    for i in range(n):
        for j in range(n):
            system[i, j] = covariance(t[i], t[j]) + (mu if i == j else 0)
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


LAMBDAS = (0.0, 1e-9, 1e-5, 1e-2)


@pytest.mark.parametrize("lambda_", LAMBDAS)
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


@pytest.mark.parametrize("lambda_", LAMBDAS)
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


def test_outside_and_with_few_answers(dtype):
    t = jnp.linspace(-0.5, 0.5, 5)
    got = posterior_variance(t, jnp.array([-1.0, 1.0, 0.9]), 0.0)
    np.testing.assert_allclose(got, exact(t, [-1, 1, 0.9], mp.mpf(1e-20)), rtol=1e-4)
    one = np.arange(5) == 2
    assert np.all(np.isinf(posterior_variance(t, t, 0.0, available=one)))
    assert np.all(np.isinf(posterior_variance(t, t, 0.0, available=one & ~one)))
    two = np.arange(5) < 2
    assert np.all(np.isfinite(posterior_variance(t, t, 0.0, available=two)))
    assert process_variance(t, t, 0.0, available=two) == np.inf
    for mask, finite in ((one, False), (one & ~one, False), (two, True)):
        variance, root = variances_on_host(np.asarray(t), np.asarray(t), 0.0, available=mask)
        assert np.isfinite(variance).all() == finite
        assert not root.any()


def test_coincident_answers_are_one(dtype):
    t = jnp.array([-1.0, -0.3, -0.3, -0.3, 0.4, 1.0])
    at = jnp.array([-0.6, -0.3, 0.1])
    weights = jnp.array([1.0, 3.0, 1.0, 1.0])
    once = t[jnp.array([0, 1, 4, 5])]
    mean = 6 * 1e-3  # mu is lambda times the sum of the weights, the same in both
    got = posterior_variance(t, at, mean / 6)
    want = posterior_variance(once, at, mean / 6, weights=weights)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_on_the_host_ends_and_weights_and_coincident_answers_count_as_in_programs():
    t = np.array([-1.0, -0.3, -0.3, 0.2, 0.4, 1.0], np.float32)
    at, y = np.array([-1.2, -0.6, -0.3, 0.1, 1.5]), np.array([1.0, 3.0, -2.0, 0.5, 7.0, 0.1])
    options = {"weights": np.array([1.0, 3, 1, 1, 0, 2]), "end_weights": np.array([0.3, 2.0])}
    with jax.enable_x64(True):
        for lambda_ in (0.0, 1e-3, np.inf):
            variance, root = variances_on_host(t, at, lambda_, **options)
            want = posterior_variance(t.astype(float), at, lambda_, **options)
            np.testing.assert_allclose(variance, want, rtol=1e-8)
            # Differences among coincident answers are left out.
            want = process_variance(t.astype(float), y, lambda_, **options)
            np.testing.assert_allclose(np.sum((root @ y) ** 2), want, rtol=1e-8)


def test_a_heavy_answer_is_certain(dtype):
    t = jnp.linspace(-1.0, 1.0, 7)
    heavy = jnp.where(jnp.arange(7) == 3, 1 / jnp.finfo(t.dtype).eps, 1)
    got = posterior_variance(t, t, 1e-9, weights=heavy)
    assert got[3] < 1e-6 * got[2]


def test_end_weights_make_the_ends_surer(dtype):
    t, at = jnp.linspace(-0.5, 0.5, 5), jnp.array([-1.0, 1.0])
    free = posterior_variance(t, at, 1e-3)
    held = posterior_variance(t, at, 1e-3, end_weights=jnp.array([1e6, 0.0]))
    assert held[0] < 0.9 * free[0]
    np.testing.assert_allclose(held[1], free[1], rtol=0.05)


def test_gradients_against_finite_differences():
    with jax.enable_x64(True):
        _, beta = regression_points(6, 9, "chebyshev")
        at = jnp.array([-0.7, 0.05, 0.99])

        def total(beta, lambda_):
            return jnp.sum(jnp.log(posterior_variance(beta, at, lambda_)))

        check_grads(total, (beta[1:-1] * 1.0, jnp.asarray(1e-3)), order=1, rtol=1e-4)


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
