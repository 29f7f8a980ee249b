"""Regression points: the papers' formulas, and the layouts' promises."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from matrices import LAYOUTS

from nercc_jax.codes import regression_points


def test_the_papers_points(dtype):
    alpha, beta = regression_points(8, 20)
    k, n = np.arange(1, 9), np.arange(1, 21)
    assert alpha.dtype == beta.dtype == dtype
    np.testing.assert_allclose(alpha, np.cos((2 * k - 1) * np.pi / 16), atol=1e-7)
    np.testing.assert_allclose(beta, np.cos((n - 1) * np.pi / 19), atol=1e-7)
    _, beta = regression_points(10, 12, "approxifer")
    np.testing.assert_allclose(beta, np.cos(np.arange(12) * np.pi / 12), atol=1e-7)
    alpha, beta = regression_points(10, 12, "sbacc")
    np.testing.assert_allclose(beta, np.cos((2 * np.arange(12) + 1) * np.pi / 24), atol=1e-7)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(
    ("num_data", "num_workers"), [(1, 1), (1, 5), (2, 3), (8, 9), (8, 20), (20, 100)]
)
def test_every_layout_is_sound(name, num_data, num_workers):
    alpha, beta = (np.asarray(p) for p in regression_points(num_data, num_workers, name))
    assert alpha.shape == (num_data,)
    assert beta.shape == (num_workers,)
    assert len(set(alpha)) == num_data
    assert np.abs(np.concatenate([alpha, beta])).max() <= 1
    if name in ("interleaved", "repeated"):
        assert set(alpha) <= set(beta), "to the last bit"
    if name == "interleaved" and num_data > 1:
        assert len(set(beta)) == num_workers
    if name == "repeated":
        counts = np.unique(beta, return_counts=True)[1]
        assert set(beta) == set(alpha)
        assert counts.max() - counts.min() <= 1


SIZES = [(1, 1), (1, 5), (2, 2), (3, 4), (8, 9), (20, 24), (20, 30), (20, 60)]
SHARES = [0.0, 0.2, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(("num_data", "num_workers"), SIZES)
def test_mixed_points(num_data, num_workers, share):
    alpha, beta = regression_points(num_data, num_workers, f"mixed:{share}")
    alpha, beta = np.asarray(alpha), np.asarray(beta)
    np.testing.assert_array_equal(alpha, regression_points(num_data, num_workers)[0])
    further = num_workers - num_data
    repeats = further if num_data == 1 else round(share * further)
    own = beta[:, None] == alpha
    counts = own.sum(axis=0)
    assert counts.sum() == num_data + repeats
    assert counts.min() >= 1
    assert counts.max() - counts.min() <= 1
    between = beta[~own.any(axis=1)]
    assert len(set(between)) == between.size == further - repeats
    if between.size:
        gaps = np.bincount(np.searchsorted(np.sort(alpha), between), minlength=num_data)
        assert gaps[0] == 0, "none beyond the alphas"
        assert gaps[1:].max() - gaps[1:].min() <= 1


@pytest.mark.parametrize(("num_data", "num_workers"), SIZES)
def test_mixtures_end_at_the_plain_layouts(num_data, num_workers):
    for share, name in ((0, "interleaved"), (1, "repeated")):
        _, mixed = regression_points(num_data, num_workers, f"mixed:{share}")
        np.testing.assert_array_equal(mixed, regression_points(num_data, num_workers, name)[1])


def test_few_repeats_and_few_points_between_take_turns():
    """Four further workers for 20 data points: each in a quarter of the line of its own."""
    alpha, beta = regression_points(20, 24, "mixed:0.5")
    angles = np.arccos(np.asarray(beta[20:], float)) / np.pi
    assert sorted(np.floor(4 * angles)) == [0, 1, 2, 3]
    order = np.argsort(angles)
    assert list(np.isin(beta[20:], alpha)[order]) == [True, False, True, False]


def test_given_points_keep_their_order():
    given = (jnp.array([0.5, -0.5]), jnp.array([0.0, 0.0, 1.0]))
    alpha, beta = regression_points(2, 3, given)
    np.testing.assert_array_equal(alpha, given[0])
    np.testing.assert_array_equal(beta, given[1])


def test_the_layouts_are_those_that_an_error_names():
    with pytest.raises(ValueError, match="points must be one of") as error:
        regression_points(2, 3, "chebychev")
    named = re.findall(r"[\w:]+", str(error.value).partition("one of ")[2])
    assert tuple(named[: len(LAYOUTS)]) == LAYOUTS
    assert named[len(LAYOUTS)] == "mixed:SHARE"
