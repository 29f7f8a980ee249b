"""Ordering: short paths, buffers cut into groups, and predictions back where they belong."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nercc_jax import Berrut, NeRCC, Replication, Uncoded, coded_inference
from nercc_jax.codes import Decoded
from nercc_jax.inference import order_points, ordered
from nercc_jax.inference.order import random_projection, short_path

K, N = 4, 10


def distances(rows):
    rows = np.asarray(rows, np.float64)
    return np.linalg.norm(rows[:, None] - rows, axis=-1)


def is_permutation(order, n):
    return sorted(np.asarray(order).tolist()) == list(range(n))


def model(x):
    return jnp.stack([jnp.sin(x).sum(axis=1), jnp.tanh(x).mean(axis=1)], axis=1)


@pytest.fixture
def x():
    return jnp.asarray(np.random.default_rng(0).normal(size=(6, K, 3)).astype("float32"))


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_broken_rows(broken, untyped):
    rows = np.random.default_rng(7).normal(size=(12, 3)).astype(np.float32)
    rows[[2, 5], 1] = broken
    with pytest.raises(ValueError, match=r"rows of features are not finite: 2, 5; take them out"):
        short_path(rows)
    with pytest.raises(ValueError, match=r"features of data points are not finite: 2, 5"):
        order_points(rows, 4)


def test_a_buffer_orders_its_own_data_points_in_whole_groups():
    rows = np.random.default_rng(8).normal(size=(50, 3)).astype(np.float32)
    order = np.asarray(order_points(rows, K, buffer_size=19))  # four groups of 4, 16 data points
    assert is_permutation(order, 50)
    for start in range(0, 50, 16):
        part = rows[start : start + 16]
        np.testing.assert_array_equal(order[start : start + 16] - start, short_path(part))
    within = np.asarray(order_points(rows, K, buffer_size=K))
    np.testing.assert_array_equal(within // K, np.arange(50) // K)
    np.testing.assert_array_equal(order_points(rows[:3], K), short_path(rows[:3]))


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
    np.testing.assert_array_equal(order_points(images, K), short_path(flat))
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


@pytest.mark.parametrize("code", [Uncoded(K), Replication(K, 8)], ids=type)
def test_every_prediction_comes_back_to_its_own_data_point(code, x):
    """Where answers are exact, the order must not show."""
    everyone = np.ones(code.num_workers, bool)
    for buffer_size in (K, 8, 1024):
        infer = ordered(coded_inference(model, code), K, buffer_size=buffer_size)
        expected = np.asarray(model(x.reshape(-1, 3))).reshape(6, K, 2)
        np.testing.assert_allclose(infer(x, everyone), expected, atol=1e-6)
        np.testing.assert_allclose(infer(np.asarray(x), everyone), expected, atol=1e-6)
        np.testing.assert_allclose(infer(x[0], everyone), expected[0], atol=1e-6)


def test_masks_and_workers_are_those_of_the_groups_sent(x):
    """A worker without a copy loses the one data point that the new order gave it."""
    masks = np.random.default_rng(12).uniform(size=(6, K)) < 0.6
    status = ordered(coded_inference(model, Replication(K, K), with_status=True), K)(x, masks)
    assert isinstance(status, Decoded)
    order = np.asarray(order_points(x.reshape(-1, 3), K))
    recovered = np.zeros(24, bool)
    recovered[order] = masks.reshape(-1)
    np.testing.assert_array_equal(status.recovered, recovered.reshape(6, K))
    np.testing.assert_array_equal(status.responded, masks)
    lost = np.isnan(np.asarray(status.predictions)).all(axis=-1)
    np.testing.assert_array_equal(lost, ~recovered.reshape(6, K))


def lean(x, available):
    """Stands for coded inference: each prediction leans on all of its group, and on its mask."""
    share = jnp.asarray(available).mean(axis=1)[:, None, None]
    return jnp.sin(x) + share * jnp.cumsum(x, axis=1)


def test_groups_are_those_of_the_order(x):
    masks = np.random.default_rng(13).uniform(size=(6, N)) < 0.7
    predictions = ordered(lean, K, buffer_size=12)(x, masks)
    flat = np.asarray(x).reshape(-1, 3)
    order = np.asarray(order_points(flat, K, buffer_size=12)).reshape(6, K)
    for group, mask in zip(order, masks, strict=True):
        expected = np.sin(flat[group]) + mask.mean() * np.cumsum(flat[group], axis=0)
        np.testing.assert_allclose(predictions.reshape(-1, 3)[group], expected, atol=1e-5)


def test_ordering_lowers_the_error():
    random = np.random.default_rng(14)
    curve = np.stack([np.cos(np.linspace(0, 5, 96)), np.linspace(-1, 1, 96)], axis=1)
    x = curve[random.permutation(96)].reshape(12, 8, 2).astype(np.float32)
    code = NeRCC(8, 12)
    mask = np.arange(12) % 4 != 1
    own = model(x.reshape(-1, 2)).reshape(12, 8, 2)
    infer = coded_inference(model, code)

    def error(infer):
        return float(jnp.mean((infer(x, mask) - own) ** 2))

    within, across = (error(ordered(infer, 8, buffer_size=size)) for size in (8, 96))
    assert within < error(infer) / 2
    assert across < within / 10


def test_broken_data_points_spoil_as_few_groups_as_can_be(x):
    """Five in five groups; together they fill one, and reach into a second."""
    x = x.at[jnp.array([0, 1, 2, 4, 5]), jnp.array([0, 1, 3, 2, 0]), 0].set(jnp.nan)
    broken = np.isnan(np.asarray(x)).any(axis=-1)
    everyone = np.ones(N, bool)
    lost = np.isnan(ordered(coded_inference(model, NeRCC(K, N)), K)(x, everyone)).all(axis=-1)
    assert lost.sum() == 2 * K
    assert lost[broken].all()


def test_it_passes_through_jit_arguments_and_meshes(x):
    def scaled(batch, scale):
        return scale * model(batch)

    code, mask = Replication(K, N), np.arange(N) != 3
    expected = np.asarray(model(x.reshape(-1, 3))).reshape(6, K, 2)
    infer = ordered(coded_inference(scaled, code), K)
    np.testing.assert_allclose(infer(x, mask, 2.0), 2 * expected, atol=1e-5)
    np.testing.assert_allclose(jax.jit(infer)(x, mask, 1.0), expected, atol=1e-5)
    mesh = jax.make_mesh((5,), ("workers",), devices=jax.devices()[:5])
    spread = ordered(coded_inference(model, code, mesh=mesh), K)
    np.testing.assert_allclose(spread(x, mask), expected, atol=1e-5)


def test_gradients_pass_through_the_order(x):
    """As if the order were given."""
    masks = np.ones((6, N), bool)
    order = order_points(x.reshape(-1, 3), K)

    def known(x):
        return jnp.sum(jnp.sin(lean(x.reshape(-1, 3)[order].reshape(x.shape), masks)))

    slope = jax.grad(lambda x: jnp.sum(jnp.sin(ordered(lean, K)(x, masks))))(x)
    np.testing.assert_allclose(slope, jax.grad(known)(x), atol=1e-5)
    assert np.abs(slope).max() > 0.1


def test_any_shape_of_data_point_and_code():
    images = np.random.default_rng(16).normal(size=(3, K, 5, 4, 1)).astype(np.float32)
    infer = ordered(coded_inference(lambda b: b.mean(axis=(1, 2, 3)), Berrut(K, N)), K)
    predictions = infer(images, np.ones(N, bool))
    assert predictions.shape == (3, K)
    assert np.isfinite(predictions).all()
    square = np.random.default_rng(17).normal(size=(K, K, 2)).astype(np.float32)
    exact = ordered(coded_inference(model, Uncoded(K)), K)(square, np.ones((K, K), bool))
    np.testing.assert_allclose(exact, model(square.reshape(-1, 2)).reshape(K, K, 2), atol=1e-6)


ROWS = np.ones((8, 3), np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: short_path(np.ones(3, np.float32)), r"features must be \(n, d\).*not \(3,\)"),
        (lambda: short_path(np.ones((0, 3), np.float32)), r"n of 1 or more, not \(0, 3\)"),
        (lambda: short_path(np.ones((2, 3), int)), "features are int32: convert them to floats"),
        (lambda: order_points(ROWS, 0), "num_data must be a positive integer, not 0"),
        (lambda: order_points(ROWS, 4, buffer_size=3), "a buffer of 3 .* must be 4 or more"),
        (lambda: order_points(ROWS, 4, buffer_size=8.0), "buffer_size must be a positive integer"),
        (lambda: order_points(ROWS[:0], 4), r"x has shape \(0, 3\): there are no data points"),
        (lambda: order_points(ROWS, 4, features=ROWS[:5]), r"they must be \(8, \.\.\.\)"),
        (lambda: order_points(ROWS, 4, features=jnp.sum), r"features have shape \(\)"),
        (lambda: random_projection(ROWS, 0), "size must be a positive integer, not 0"),
        (lambda: ordered(model, 4)(ROWS, np.ones(N, bool)), "must be"),
        (lambda: ordered(model, 4)(ROWS[:4], np.ones((1, N), bool)), r"\(groups, K, \.\.\.\)"),
        (
            lambda: ordered(model, 4)(np.ones((4, 4, 2)), np.ones(N, bool)),
            "may be one group of 4 or 4 groups",
        ),
        (lambda: ordered(model, 4, buffer_size=2), "a buffer of 2 data points holds no group"),
    ],
)
def test_errors(call, message, untyped):
    with pytest.raises(ValueError, match=message):
        call()
