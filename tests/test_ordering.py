"""Ordering: short paths, buffers cut into groups, and predictions back where they belong."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nercc_jax import NeRCC, Replication, Scheme, Uncoded, coded_inference
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


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_broken_rows(broken, untyped):
    rows = np.random.default_rng(7).normal(size=(12, 3)).astype(np.float32)
    rows[[2, 5], 1] = broken
    with pytest.raises(ValueError, match=r"data points are not finite: 2, 5; take them out"):
        order_points(rows, 4)


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
    features = random_projection(points, 64)
    assert features.shape == (60, 64)
    assert features.dtype == dtype
    first, second = np.triu_indices(60, 1)
    ratio = (distances(features)[first, second] / distances(points)[first, second]) ** 2
    assert np.mean(ratio) == pytest.approx(1, abs=0.05)
    assert np.std(ratio) < 1.3 * np.sqrt(2 / 64)
    # All of them are one matrix, each number in one sum with the sign + or -.
    matrix = np.asarray(random_projection(np.eye(number, dtype=dtype), 64))
    np.testing.assert_array_equal(np.abs(matrix).sum(axis=1), 1)
    np.testing.assert_allclose(features, points @ matrix, atol=1e-4)
    assert -0.1 < matrix.sum() / number < 0.1


@pytest.mark.parametrize("shape", [(7,), (8, 8), (3, 40), (8, 8, 3)])
def test_the_hosts_projection_is_the_same(shape):
    points = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    found = random_projection(points, 64)
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, random_projection(jnp.asarray(points), 64), atol=1e-5)


def test_few_numbers_are_their_own_projection():
    images = np.arange(40, dtype=np.uint8).reshape(2, 5, 4)
    np.testing.assert_array_equal(random_projection(images, 20), images.reshape(2, -1))
    assert random_projection(images, 20).dtype == "float32"


@pytest.mark.parametrize("buffer_size", [K, 8, 1024])
@pytest.mark.parametrize("code", [Uncoded(K), Replication(K, 8)], ids=type)
def test_every_prediction_comes_back_to_its_own_data_point(code, buffer_size, x):
    """Where answers are exact, the order must not show, by hand or by a scheme."""
    everyone, own = np.ones(code.num_workers, bool), model(x)
    order = np.asarray(order_points(x, K, buffer_size=buffer_size))
    groups = coded_inference(model, code)(x[order].reshape(6, K, 3), everyone)
    np.testing.assert_allclose(groups.reshape(24, 2)[np.argsort(order)], own, atol=1e-6)
    scheme = Scheme(code, order="pixels", buffer_size=buffer_size)
    np.testing.assert_allclose(coded_inference(model, scheme)(x, everyone), own, atol=1e-6)


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


def test_broken_data_points_come_last_in_a_program(x):
    """So that as few groups are lost as can be."""
    broken = np.array([0, 5, 7, 11, 13])
    order = jax.jit(lambda x: order_points(x, K))(x.at[broken, 1].set(jnp.nan))
    assert is_permutation(order, 24)
    assert sorted(np.asarray(order)[-5:].tolist()) == broken.tolist()


ROWS = np.ones((8, 3), np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: order_points(ROWS, 0), "num_data must be a positive integer, not 0"),
        (lambda: order_points(ROWS, 4, buffer_size=3), "a buffer of 3 .* must be 4 or more"),
        (lambda: order_points(ROWS, 4, buffer_size=8.0), "buffer_size must be a positive integer"),
        (lambda: order_points(ROWS[:0], 4), r"x has shape \(0, 3\): there are no data points"),
        (lambda: order_points(ROWS, 4, features=ROWS[:5]), r"they must be \(8, \.\.\.\)"),
        (lambda: order_points(ROWS, 4, features=jnp.sum), r"features have shape \(\)"),
        (lambda: random_projection(ROWS, 0), "size must be a positive integer, not 0"),
    ],
)
def test_errors(call, message, untyped):
    with pytest.raises(ValueError, match=message):
        call()
