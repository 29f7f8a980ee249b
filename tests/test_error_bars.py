"""Error bars, from ratios of errors to deviations that are counted by hand."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from nercc_jax.risk._error_bars import error_bars_from_ratios

# The k-th smallest of 99 ratios covers k hundredths of others; those that are NaN do not count.
RATIOS = np.random.default_rng(0).permutation([*range(1, 100), *[math.nan] * 7]).astype(float)


@pytest.mark.parametrize(
    ("coverage", "factor"), [(0.005, 1), (0.25, 25), (0.5, 50), (0.9, 90), (0.991, math.inf)]
)
def test_a_factor_is_the_ratio_that_covers_its_share_of_others(coverage, factor):
    assert float(error_bars_from_ratios(RATIOS).factor(coverage)) == factor


def test_bars_are_zero_for_what_is_exact_and_infinite_where_nothing_is_known():
    deviation = jnp.array([0.0, 0.5, 2.0, jnp.inf])
    bars = error_bars_from_ratios(RATIOS)
    np.testing.assert_array_equal(bars(deviation), [0.0, 45.0, 180.0, np.inf])
    np.testing.assert_array_equal(bars(deviation, 0.999), [0.0, np.inf, np.inf, np.inf])


def test_of_many_ratios_a_thousand_quantiles_are_kept():
    ratios = np.random.default_rng(1).exponential(size=100_000)
    bars = error_bars_from_ratios(ratios)
    for coverage in (0.05, 0.5, 0.9, 0.99):
        covered = np.mean(ratios <= float(bars.factor(coverage)))
        assert coverage - 1e-5 <= covered <= coverage + 2e-3  # never shorter than asked


def test_without_a_ratio_there_are_no_bars():
    with pytest.raises(ValueError, match="nothing to calibrate"):
        error_bars_from_ratios(np.full(3, np.nan))


@pytest.mark.parametrize("coverage", [0.0, 1.0, -0.5, math.nan])
def test_wrong_coverages(coverage, untyped):
    with pytest.raises(ValueError, match="between 0 and 1"):
        error_bars_from_ratios(RATIOS).factor(coverage)
