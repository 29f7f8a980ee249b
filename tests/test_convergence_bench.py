"""The convergence benchmark: its slopes, its verdicts, and its expectation over noise."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import bench_modules, require

from nercc_jax import Berrut


@pytest.fixture(scope="module")
def bench():
    """bench/_convergence.py, which imports its neighbours as scripts do."""
    require("matplotlib", "demo")
    with bench_modules(convergence="_convergence") as found:
        yield found.convergence


SIZES = (20, 100, 500, 2000)


def _points(means, half_widths=(0.0, 0.0, 0.0, 0.0)):
    return [
        {"num_workers": n, "stragglers": 3, "mean": mean, "half_width": half_width}
        for n, mean, half_width in zip(SIZES, means, half_widths, strict=True)
    ]


def _power(exponent):
    return [7 * n**exponent for n in SIZES]


def test_slopes_against_scipy(bench):
    from scipy.stats import linregress

    points = _points([3.0, 0.2, 0.03, 0.001])
    fit = bench.fit_slope(points)
    x, y = (np.log([point[name] for point in points]) for name in ("num_workers", "mean"))
    expected = linregress(x, y)
    assert fit["slope"] == pytest.approx(expected.slope)
    assert fit["standard_error"] == pytest.approx(expected.stderr)
    assert (fit["first"], fit["last"], fit["num_points"]) == (20, 2000, 4)
    assert bench.fit_slope(points[:2]) is None


def test_standard_error_knows_the_spread_over_sets(bench):
    # Points on a line tell of no scatter; their own half widths do.
    means = _power(-2.5)
    points = _points(means, [0.4 * mean for mean in means])
    draws = np.random.default_rng(0).normal(np.log(means), 0.2, (4000, 4))
    slopes = np.polyfit(np.log(SIZES), draws.T, 1)[0]
    assert bench.fit_slope(points)["standard_error"] == pytest.approx(slopes.std(), rel=0.05)


def _curve(bench, exponent, code, law, noise=0.0):
    case = bench.Case("t sin t", law.name, noise, code)
    points = _points(_power(exponent))
    for point in points:
        point["stragglers"] = law.number(point["num_workers"])
    return bench._curve(case, points, 0.0, smooth=True)


@pytest.mark.parametrize(("exponent", "confirmed"), [(-3.5, True), (-2.5, False)])
def test_verdict(bench, exponent, confirmed):
    curve = _curve(bench, exponent, bench._NERCC, bench._FIXED_LAW)
    (bound,) = curve["bounds"]
    assert bound["slope"] == pytest.approx(-3)
    assert bound["confirmed"] == confirmed


def test_bounds_of_a_share_of_stragglers(bench):
    curve = _curve(bench, -2.5, bench._BACC, bench._SHARE_LAW)
    growing, falling = curve["bounds"]
    assert growing["slope"] == pytest.approx(2, abs=0.05)
    assert -2 < falling["slope"] < -1
    assert growing["confirmed"]
    assert falling["confirmed"]


def test_points_below_the_floor_are_not_fitted(bench):
    points = _points([*_power(-3.5)[:-1], 1e-30])
    curve = bench._curve(bench.Case("f", "S = 3", 0.0, bench._NERCC), points, 1e-20, smooth=True)
    assert curve["all"]["slope"] == pytest.approx(-3.5)
    assert curve["all"]["last"] == 500


def test_noise_adds_its_expectation(bench):
    """Against noise that is drawn."""
    code = Berrut(3, 9)
    rng = np.random.default_rng(0)
    answers, exact = rng.normal(size=(2, 9, 4)), rng.normal(size=(2, 3, 4))
    masks = np.array([[True] * 9, [True] * 4 + [False] * 2 + [True] * 3])
    found = bench.score(code, answers, exact, masks).error(0.3)
    noise = 0.3 * rng.normal(size=(2000, 2, 9, 4))
    for mask, error in zip(masks, found, strict=True):
        decoder = np.asarray(code.decoder_matrix(jnp.asarray(mask)))
        drawn = np.mean((decoder @ (answers + noise) - exact) ** 2)
        assert error == pytest.approx(drawn, rel=0.02)


def test_straggler_sets(bench):
    for law in bench.LAWS:
        masks = bench._masks(law, 40, 16)
        assert masks.shape == (2, 16, 40)
        assert (np.sum(~masks, axis=2) == law.number(40)).all()
        assert len(np.unique(masks.reshape(-1, 40), axis=0)) > 30
