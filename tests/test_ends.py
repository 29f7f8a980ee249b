"""Splines that end with one cubic over two gaps: against SciPy, and where they cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.interpolate import CubicSpline

import nercc_jax as nj
from nercc_jax.splines import smoothing_matrix, smoothing_spline
from nercc_jax.splines._host import smoothing_matrix_on_host

ATOL = {"float32": 2e-5, "float64": 1e-9}


def _points(dtype, seed=0):
    """Points in no order, two of them twice, and a mask that leaves out one at an end."""
    rng = np.random.default_rng(seed)
    t = np.cumsum(rng.uniform(0.3, 1, 12))
    t = rng.permutation(2 * (t - t[0]) / (t[-1] - t[0]) - 1)
    t = np.concatenate([t, t[[2, 7]]]).astype(dtype)
    available = ~np.isin(np.arange(14), [4, int(np.argmax(t))])
    return t, available


def _cubic(t):
    return (1 + t - 2 * t**2 + 3 * t**3)[:, None]


def test_not_a_knot_is_scipys(dtype):
    t, available = _points(dtype)
    y = np.stack([np.sin(3 * t), np.exp(t)], axis=1)
    distinct, places = np.unique(t[available], return_index=True)
    at = np.linspace(distinct[0], distinct[-1], 31).astype(dtype)
    wanted = CubicSpline(distinct, y[available][places], bc_type="not-a-knot")(at)
    bent, natural = (
        smoothing_matrix(t, at, 0.0, available=available, ends=ends) @ y
        for ends in ("not-a-knot", "natural")
    )
    np.testing.assert_allclose(bent, wanted, atol=ATOL[dtype])
    assert np.abs(natural - wanted).max() > 1e-3


@pytest.mark.parametrize(("num_data", "num_workers", "lambda_"), [(7, 50, 1e-5), (8, 20, 0.0)])
def test_programs_are_as_exact_as_the_host_whatever_the_data(num_data, num_workers, lambda_):
    """Third derivatives of noise over the outermost gaps, 0.002 wide, are a million times it."""
    code = nj.codes.BerrutSpline(num_data, num_workers, lambda_dec=lambda_)
    available = ~np.isin(np.arange(num_workers), [1, num_workers - 2])
    y = np.random.default_rng(0).normal(size=(num_workers, 3)).astype(np.float32)
    wanted = code.decoder_on_host(available)[0] @ y
    np.testing.assert_allclose(jax.jit(code.decode)(y, available), wanted, atol=1e-5)
    spline = smoothing_spline(code.beta, y, lambda_, available=available, ends=code.ends)
    np.testing.assert_allclose(spline.evaluate(code.alpha), wanted, atol=1e-5)


def test_gradients_are_those_of_differences():
    random = np.random.default_rng(3)
    t, at = np.sort(random.uniform(-1, 1, 9)), random.uniform(-1, 1, 3)
    y, by = random.normal(size=(9, 2)), random.normal(size=(3, 2))
    weights, heavy = random.uniform(0.5, 2, 9), np.asarray([0.3, 0.1])
    moved = [random.normal(size=np.shape(each)) for each in (t, at, 1e-4, weights, heavy)]
    with jax.enable_x64(True):

        @jax.jit
        def total(step):
            points = [
                each + step * way
                for each, way in zip((t, at, 1e-4, weights, heavy), moved, strict=True)
            ]
            known = {"weights": points[3], "end_weights": points[4], "ends": "not-a-knot"}
            return jnp.sum(by * (smoothing_matrix(*points[:3], **known) @ y))

        slope, step = jax.jit(jax.grad(total)), 1e-8
        wanted = (total(step) - total(-step)) / (2 * step)
        np.testing.assert_allclose(slope(0.0), wanted, rtol=1e-5)
        wanted = (slope(step) - slope(-step)) / (2 * step)
        np.testing.assert_allclose(jax.jit(jax.grad(slope))(0.0), wanted, rtol=1e-4)


def test_programs_for_accelerators_have_no_loop():
    code = nj.codes.BerrutSpline(3, 6)
    slope = jax.grad(
        lambda lambda_: jnp.sum(smoothing_matrix(code.beta, code.alpha, lambda_, ends=code.ends))
    )
    text = jax.jit(slope).trace(0.1).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.while" not in text


def test_on_the_host_it_is_scipys_and_smooths_as_a_program_does():
    with jax.enable_x64(True):
        t, available = _points("float64")
        distinct = np.unique(t[available])
        at = np.linspace(distinct[0], distinct[-1], 31)
        wanted = CubicSpline(distinct, np.sin(3 * distinct), bc_type="not-a-knot")(at)
        for lambda_ in (0.0, 1e-5, 1e-2, np.inf):
            options = {"available": available, "ends": "not-a-knot"}
            matrix = smoothing_matrix_on_host(t, at, lambda_, **options)
            program = smoothing_matrix(jnp.asarray(t), jnp.asarray(at), lambda_, **options)
            np.testing.assert_allclose(matrix, program, atol=1e-9)
            if lambda_ == 0:
                np.testing.assert_allclose(matrix @ np.sin(3 * t), wanted, atol=1e-12)
        few = available & (np.cumsum(available) <= 3)
        bent, natural = (
            smoothing_matrix_on_host(t, at, 0.0, available=few, ends=ends)
            for ends in ("not-a-knot", "natural")
        )
        np.testing.assert_array_equal(bent, natural)


def test_beyond_the_ends_it_goes_straight_on(dtype):
    t, available = _points(dtype)
    spline = smoothing_spline(t, _cubic(t), 0.0, available=available, ends="not-a-knot")
    for end, step in ((t[available].min(), -0.5), (t[available].max(), 0.5)):
        slope = 1 - 4 * end + 9 * end**2
        wanted = _cubic(np.asarray([end])) + slope * step
        np.testing.assert_allclose(
            spline.evaluate(jnp.asarray([end + step])), wanted, atol=100 * ATOL[dtype]
        )


@pytest.mark.parametrize(
    ("number", "lambda_"), [(0, 0.0), (1, 0.0), (2, 0.0), (3, 0.0), (12, 10.0)]
)
def test_of_few_observations_it_is_natural_and_nearly_where_much_is_smoothed(
    number, lambda_, dtype
):
    t, _ = _points(dtype)
    available = np.arange(14) < number
    at = np.linspace(-1, 1, 9).astype(dtype)
    natural, found = (
        smoothing_spline(t, _cubic(t), lambda_, available=available, ends=ends).evaluate(at)
        for ends in ("natural", "not-a-knot")
    )
    atol = 0.02 * np.abs(_cubic(t)).max() if lambda_ else ATOL[dtype] / 10
    np.testing.assert_allclose(found, natural, atol=atol)


def test_cubics_come_back_from_four_and_where_little_is_smoothed(dtype):
    t, available = _points(dtype)
    for mask in (np.arange(14) < 4, available):
        at = np.linspace(t[mask].min(), t[mask].max(), 9).astype(dtype)
        found = smoothing_spline(t, _cubic(t), 1e-9, available=mask, ends="not-a-knot")
        np.testing.assert_allclose(found.evaluate(at), _cubic(at), atol=1e-4)


def test_a_code_decodes_by_it(dtype):
    code = nj.NeRCC(20, 24, points="interleaved", lambda_dec=0.0, ends="not-a-knot")
    assert nj.NeRCC(20, 24, ends="not-a-knot").end_penalty == 0
    assert nj.NeRCC(20, 24).end_penalty > 0
    available = jnp.arange(24) != 1
    y = jnp.asarray(np.exp(np.asarray(code.beta))[:, None])
    wanted = np.exp(np.asarray(code.alpha))[:, None]
    decoded = code.decode(y, available)
    np.testing.assert_allclose(decoded, wanted, atol=1e-4)
    np.testing.assert_allclose(code.decoder_matrix(available) @ y, decoded, atol=10 * ATOL[dtype])
    natural = nj.NeRCC(20, 24, points="interleaved", lambda_dec=0.0)
    error = np.abs(natural.decode(y, available) - wanted).max()
    assert np.abs(decoded - wanted).max() < error / 2


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
