"""The benchmarks of independent stragglers and of rivals: slopes, intervals, and decoded errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import bench_modules, require

SIZES = (256, 512, 1024, 2048)


@pytest.fixture(scope="module")
def bench():
    require("matplotlib", "demo")
    with bench_modules(independent="independent", rivals="rivals") as found:
        yield found


def test_the_slope_of_a_power_law_and_its_interval(bench):
    """The interval is as wide as that of slopes of data drawn anew."""
    rng = np.random.default_rng(0)

    def drawn():
        noise = rng.lognormal(0, 0.5, (4, 60, 1)) * np.ones(3)
        return [7.0 * n**-3.5 * each for n, each in zip(SIZES, noise, strict=True)]

    curve = bench.independent.curve_of(SIZES, drawn(), 0.2, 0.0)
    slopes = [
        np.polyfit(np.log(SIZES), np.log([e.mean() for e in drawn()]), 1)[0] for _ in range(400)
    ]
    low, high = curve["interval"]
    assert low < -3.5 < high
    assert high - low == pytest.approx(np.subtract(*np.quantile(slopes, (0.975, 0.025))), rel=0.3)
    assert -3 < curve["rates"]["log^3 N^-3"] < -2


def test_points_below_the_floor_are_not_fitted(bench):
    errors = [np.full((5, 2), 7.0 * n**-3.0) for n in SIZES[:-1]] + [np.full((5, 2), 1e-30)]
    curve = bench.independent.curve_of(SIZES, errors, 0.2, 1e-20)
    assert curve["slope"] == pytest.approx(-3)
    assert curve["fitted"] == list(SIZES[:-1])


def test_errors_on_the_host_are_those_of_decoding(bench):
    module = bench.independent
    function = next(module.scalar_functions(3))
    exact = function.call(function.x).reshape(3, 8, 1)
    masks = module.straggler_sets(0.2, 64, 2)
    for name, code in module.codes_of(64).items():
        y = module.answers_of(code, function)
        found = module.decoding_errors(code, masks, {"f": y}, {"f": exact})["f"]
        with jax.enable_x64(True):
            plain = jax.tree.map(jnp.asarray, code)
            for mask, errors in zip(masks, found, strict=True):
                decoded = np.stack([plain.decode(each, mask) for each in y])
                wanted = np.mean((decoded - exact) ** 2, axis=(1, 2))
                np.testing.assert_allclose(errors, wanted, rtol=1e-6, err_msg=name)


def test_gains_are_paired(bench):
    """Half of a rival's error on every set and group is a gain of a half, to rounding."""
    rivals = bench.rivals
    squared = np.random.default_rng(0).lognormal(0, 1, (1, 6, 9))
    scores = {
        "rival": rivals.Scores(4 * squared, np.ones((1, 6, 9))),
        "NeRCC tuned": rivals.Scores(squared, np.full((1, 6, 9), 0.5)),
    }
    found = rivals.summary_of(scores, 50)
    gain = found["rival"]["gain"]
    assert gain["mean"] == pytest.approx(0.5)
    assert gain["low"] == pytest.approx(0.5)
    assert found["rival"]["rmse"]["mean"] == pytest.approx(2 * np.sqrt(squared.mean()))
    spread = found["rival"]["rmse"]
    assert spread["low"] < spread["mean"] < spread["high"]
    assert found["NeRCC tuned"]["rel_acc"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
