"""Short paths through rows, against all paths, and against what the search begins with."""

import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from nercc_jax.inference import order_points


@jax.jit
def find(rows):
    """A path through all rows, as one buffer."""
    return order_points(rows, 1, features=rows, buffer_size=len(rows))


def distances(rows):
    rows = np.asarray(rows, np.float64)
    return np.linalg.norm(rows[:, None] - rows, axis=-1)


def length(rows, order):
    return distances(rows)[np.asarray(order)[:-1], np.asarray(order)[1:]].sum()


def nearest_neighbour(rows):
    """From the row farthest from the mean: where the search begins."""
    apart = distances(rows)
    order = [int(np.argmax(np.linalg.norm(rows - rows.mean(axis=0), axis=1)))]
    while len(order) < len(rows):
        left = [row for row in range(len(rows)) if row not in order]
        order.append(min(left, key=lambda row: apart[order[-1], row]))
    return order


def is_permutation(order, n):
    return sorted(np.asarray(order).tolist()) == list(range(n))


# Shapes are few: each is a compilation.
@hypothesis.given(
    strategies.lists(strategies.integers(-1000, 1000), min_size=12, max_size=12, unique=True)
)
def test_points_on_a_line_are_sorted(places):
    """On a line the shortest path is known."""
    rows = np.outer(places, [3.0, -4.0, 12.0]) + 7
    walked = np.asarray(places)[np.asarray(find(rows.astype(np.float32)))]
    assert np.all(np.diff(walked) > 0) or np.all(np.diff(walked) < 0)


def test_it_is_near_the_shortest_of_all_paths(dtype):
    """Against all 5,040 paths: a tenth longer at most in the mean, and often the shortest."""
    paths = np.array(list(itertools.permutations(range(7))))
    random = np.random.default_rng(1)
    ratios = []
    for _ in range(40):
        rows = random.normal(size=(7, 2)).astype(dtype)
        least = distances(rows)[paths[:, :-1], paths[:, 1:]].sum(axis=1).min()
        ratios.append(length(rows, find(rows)) / least)
    assert min(ratios) > 1 - 1e-5
    assert np.mean(ratios) < 1.05
    assert np.mean(np.array(ratios) < 1 + 1e-5) > 0.5


@pytest.mark.parametrize("d", [2, 10])
def test_two_opt_shortens_the_path_it_starts_with(d):
    random = np.random.default_rng(2)
    ratios = []
    for _ in range(10):
        rows = random.normal(size=(60, d)).astype(np.float32)
        order = find(rows)
        assert is_permutation(order, 60)
        ratios.append(length(rows, order) / length(rows, nearest_neighbour(rows)))
    assert max(ratios) < 1 + 1e-5, "it never makes the path longer"
    assert np.mean(ratios) < 0.97


def test_alike_rows_lie_side_by_side():
    random = np.random.default_rng(3)
    cluster = np.arange(60) % 5
    centres = 50 * random.normal(size=(5, 8))
    rows = (centres[cluster] + random.normal(size=(60, 8))).astype(np.float32)
    assert np.count_nonzero(np.diff(cluster[np.asarray(find(rows))])) == 4
    twins = np.repeat(random.normal(size=(20, 8)), 3, axis=0).astype(np.float32)
    twins = twins[random.permutation(60)]
    steps = np.diff(twins[np.asarray(find(twins))], axis=0)
    assert np.count_nonzero(np.any(steps != 0, axis=1)) == 19


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_or_equal_rows(n):
    assert is_permutation(find(np.arange(2.0 * n, dtype=np.float32).reshape(n, 2)), n)
    assert is_permutation(find(np.ones((n, 2), np.float32)), n)
    assert is_permutation(find(np.ones((n, 0), np.float32)), n)


def test_size_and_place_do_not_matter(dtype):
    rows = np.random.default_rng(4).integers(-50, 50, size=(30, 4)).astype(dtype)
    order = find(rows)
    np.testing.assert_array_equal(find(rows * dtype_power(dtype)), order)
    np.testing.assert_array_equal(find(rows / dtype_power(dtype)), order)
    assert length(rows, find(rows + 1024)) == pytest.approx(length(rows, order), rel=0.02)


def dtype_power(dtype):
    """A power of two whose square is out of range."""
    return np.asarray(2.0**100 if dtype == "float32" else 2.0**600, dtype)


def test_half_precision_rows():
    rows = np.random.default_rng(5).normal(size=(30, 4)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(find(rows), find(rows.astype(np.float32)))


def test_transforms(dtype):
    rows = np.random.default_rng(6).normal(size=(3, 20, 4)).astype(dtype)
    each = [find(group) for group in rows]
    np.testing.assert_array_equal(jax.vmap(find)(rows), each)
    np.testing.assert_array_equal(jax.jit(find)(rows[0]), each[0])
    along = jax.grad(lambda rows: jnp.sum(rows[find(rows)][:5] ** 2))(jnp.asarray(rows[0]))
    expected = np.zeros_like(rows[0])
    first = np.asarray(each[0][:5])
    expected[first] = 2 * rows[0][first]
    np.testing.assert_allclose(along, expected, rtol=1e-6)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_broken_rows_come_last(broken):
    rows = np.random.default_rng(7).normal(size=(12, 3)).astype(np.float32)
    rows[[2, 5], 1] = broken
    order = np.asarray(find(rows))
    assert is_permutation(order, 12)
    assert set(order[-2:].tolist()) == {2, 5}


def test_many_equal_rows():
    """Each is as near as the next: no row is waited for by all others."""
    rows = np.random.default_rng(8).permutation(np.repeat(np.eye(2, dtype=np.float32), 200, axis=0))
    steps = np.diff(rows[np.asarray(find(rows))], axis=0)
    assert np.count_nonzero(np.any(steps != 0, axis=1)) == 1


def test_rows_of_which_each_waits_for_the_next():
    """Gaps that grow: only one pair at a time is mutually nearest."""
    places = np.cumsum(1.01 ** np.arange(400))
    rows = np.random.default_rng(9).permutation(np.outer(places, [3.0, 4.0]).astype(np.float32))
    order = find(rows)
    assert is_permutation(order, 400)
    assert length(rows, order) < 1.02 * 5 * (places[-1] - places[0])


@pytest.mark.parametrize("number", [3, 100, 205])
def test_buffers_are_searched_each_by_itself(number):
    """However many there are at a time, with a rest or without."""
    rows = np.random.default_rng(11).normal(size=(number, 10, 3)).astype(np.float32)
    order = np.asarray(order_points(rows.reshape(-1, 3), 10, buffer_size=10)).reshape(number, 10)
    expected = [find(buffer) + 10 * place for place, buffer in enumerate(rows)]
    np.testing.assert_array_equal(order, expected)
