"""Ordering: short paths, buffers cut into groups, and predictions back where they belong.

Paths are held against all paths where there are few, and against what the search begins with.
"""

import itertools

import equinox as eqx
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from nercc_jax import NeRCC, coded_inference
from nercc_jax.inference import order_points
from nercc_jax.inference.order import random_projection

K = 4


def distances(rows):
    rows = np.asarray(rows, np.float64)
    return np.linalg.norm(rows[:, None] - rows, axis=-1)


def is_permutation(order, n):
    return sorted(np.asarray(order).tolist()) == list(range(n))


def model(x):
    return jnp.stack([jnp.sin(x).sum(axis=1), jnp.tanh(x).mean(axis=1)], axis=1)


@pytest.fixture
def x():
    return jnp.asarray(np.random.default_rng(0).normal(size=(24, 3)).astype("float32"))


# -- Paths ---------------------------------------------------------------------------------------


@jax.jit
def find(rows):
    """A path through all rows, as one buffer."""
    return order_points(rows, 1, features=rows, buffer_size=len(rows))


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
def test_broken_rows_come_last_in_a_program(broken):
    """So that as few groups are lost as can be."""
    rows = np.random.default_rng(7).normal(size=(12, 3)).astype(np.float32)
    rows[[2, 5], 1] = broken
    for order in (find(rows), jax.jit(lambda rows: order_points(rows, K))(rows)):
        assert is_permutation(order, 12)
        assert set(np.asarray(order)[-2:].tolist()) == {2, 5}


@pytest.mark.parametrize("number", [3, 100, 205])
def test_buffers_are_searched_each_by_itself(number):
    """However many there are at a time, with a rest or without."""
    rows = np.random.default_rng(11).normal(size=(number, 10, 3)).astype(np.float32)
    order = np.asarray(order_points(rows.reshape(-1, 3), 10, buffer_size=10)).reshape(number, 10)
    expected = [find(buffer) + 10 * place for place, buffer in enumerate(rows)]
    np.testing.assert_array_equal(order, expected)


# -- Buffers, features and groups ----------------------------------------------------------------


def test_a_buffer_orders_its_own_data_points_in_whole_groups():
    rows = np.random.default_rng(8).normal(size=(50, 3)).astype(np.float32)
    order = np.asarray(order_points(rows, K, buffer_size=19))  # four groups of 4, 16 data points
    assert is_permutation(order, 50)
    for start in range(0, 50, 16):
        part = rows[start : start + 16]
        np.testing.assert_array_equal(order[start : start + 16] - start, order_points(part, 1))
    within = np.asarray(order_points(rows, K, buffer_size=K))
    np.testing.assert_array_equal(within // K, np.arange(50) // K)
    assert is_permutation(order_points(rows[:3], K), 3)


def test_features_say_what_is_alike():
    random = np.random.default_rng(10)
    images = random.normal(size=(30, 4, 4, 2)).astype(np.float32)
    hidden = random.permutation(30).astype(np.float32)

    def look_up(images):
        return jnp.asarray(hidden)

    for features in (hidden[:, None, None], look_up):
        walked = hidden[np.asarray(order_points(images, K, features=features))]
        assert np.all(np.abs(np.diff(walked)) == 1)
    flat = images.reshape(30, -1)
    np.testing.assert_array_equal(order_points(images, K), order_points(flat, 1))
    layer = eqx.nn.Linear(3, 1, key=jax.random.key(0))
    rows = random.normal(size=(30, 3)).astype("float32")
    walked = np.asarray(jax.vmap(layer)(rows)[order_points(rows, K, features=jax.vmap(layer))])
    assert np.all(np.diff(walked[:, 0]) > 0) or np.all(np.diff(walked[:, 0]) < 0)


def test_one_compilation_for_one_shape():
    traces = []

    def counting(x):
        traces.append(x.shape)
        return x

    for seed in range(5):
        rows = np.random.default_rng(seed).normal(size=(22, 3)).astype(np.float32)
        order_points(rows, K, features=counting, buffer_size=8)
    assert traces == [(22, 3)]


@pytest.mark.parametrize("number", [1000, 1024])
def test_a_projection_keeps_distances(number, dtype):
    random = np.random.default_rng(11)
    points = (random.normal(size=(60, number)) * np.linspace(0, 2, number)).astype(dtype)
    features = random_projection(jnp.asarray(points), 64)
    assert features.shape == (60, 64)
    assert features.dtype == dtype
    first, second = np.triu_indices(60, 1)
    ratio = (distances(features)[first, second] / distances(points)[first, second]) ** 2
    assert np.mean(ratio) == pytest.approx(1, abs=0.05)
    assert np.std(ratio) < 1.3 * np.sqrt(2 / 64)
    # All of them are one matrix, each number in one sum with the sign + or -.
    matrix = np.asarray(random_projection(jnp.eye(number, dtype=dtype), 64))
    np.testing.assert_array_equal(np.abs(matrix).sum(axis=1), 1)
    np.testing.assert_allclose(features, points @ matrix, atol=1e-4)
    assert -0.1 < matrix.sum() / number < 0.1


def test_few_numbers_are_their_own_projection():
    images = jnp.arange(40, dtype=np.uint8).reshape(2, 5, 4)
    np.testing.assert_array_equal(random_projection(images, 20), images.reshape(2, -1))
    assert random_projection(images, 20).dtype == "float32"


def test_ordering_lowers_the_error():
    random = np.random.default_rng(14)
    curve = np.stack([np.cos(np.linspace(0, 5, 96)), np.linspace(-1, 1, 96)], axis=1)
    x = curve[random.permutation(96)].astype(np.float32)
    infer, mask, own = coded_inference(model, NeRCC(8, 12)), np.arange(12) % 4 != 1, model(x)

    def error(order):
        predictions = infer(x[order].reshape(12, 8, 2), mask).reshape(96, 2)
        return float(jnp.mean((predictions - own[order]) ** 2))

    within, across = (error(order_points(x, 8, buffer_size=size)) for size in (8, 96))
    assert within < error(np.arange(96)) / 2
    assert across < within / 10
