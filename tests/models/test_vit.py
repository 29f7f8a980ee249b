"""The Vision Transformer: shapes, sizes of the literature, training calls, errors.

That it computes what timm computes is `test_pretrained.py`'s business.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nercc_models.vit import (
    ViT,
    vit_base_patch16_224,
    vit_small_cifar,
    vit_small_patch16_224,
    vit_tiny_patch16_224,
)


def small_vit(**options):
    sizes = {
        "image_size": 12,
        "patch_size": 4,
        "width": 24,
        "depth": 3,
        "num_heads": 3,
        "num_classes": 5,
    }
    return ViT(**(sizes | options), rngs=nnx.Rngs(0))


def randomized(model, seed=1):
    """Every parameter random, so that the zero head hides nothing."""
    graphdef, state = nnx.split(model)
    leaves, treedef = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [
        0.2 * jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))


def images_of(model, batch=2, dtype=jnp.float32):
    shape = (batch, model.image_size, model.image_size, model.channels)
    return jax.random.normal(jax.random.key(7), shape, dtype)


def num_parameters(model):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


# Table 1 of Touvron et al. 2021 (5, 22 and 86 million), to the unit as timm counts them.
@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (vit_tiny_patch16_224, 5_717_416),
        (vit_small_patch16_224, 22_050_664),
        (vit_base_patch16_224, 86_567_656),
    ],
)
def test_sizes_of_the_literature(build, parameters):
    model = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
    assert num_parameters(model) == parameters
    images = jax.ShapeDtypeStruct((3, 224, 224, 3), jnp.float32)
    logits = nnx.eval_shape(lambda model, images: model(images), model, images)
    assert logits.shape == (3, 1000)


@pytest.mark.parametrize(("channels", "pooling"), [(3, "token"), (1, "mean")])
def test_logits_under_jit_and_vmap(channels, pooling):
    model = randomized(small_vit(pooling=pooling, channels=channels))
    images = images_of(model, batch=4)
    logits = model(images)
    assert logits.shape == (4, 5)
    assert (model.class_token is None) == (pooling == "mean")
    graphdef, state = nnx.split(model)
    jitted = jax.jit(lambda state, images: nnx.merge(graphdef, state)(images))
    np.testing.assert_allclose(jitted(state, images), logits, rtol=1e-4, atol=1e-5)
    one_by_one = jax.vmap(lambda image: model(image[None])[0])(images)
    np.testing.assert_allclose(one_by_one, logits, rtol=1e-4, atol=1e-5)


def test_patch_embedding_is_the_strided_convolution():
    model = randomized(small_vit())
    embedding, images = model.patch_embedding, images_of(model)
    kernel = embedding.projection.kernel[...].reshape(4, 4, 3, -1)
    expected = jax.lax.conv_general_dilated(
        images, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    expected = expected.reshape(2, 9, -1) + embedding.projection.bias[...]
    np.testing.assert_allclose(embedding(images), expected, rtol=1e-4, atol=1e-5)


def test_attention_matches_its_definition():
    attention = randomized(small_vit()).blocks[0].attention
    tokens = jax.random.normal(jax.random.key(3), (2, 7, 24))
    qkv = np.asarray(attention.qkv(tokens), np.float64)
    mixed = np.empty((2, 7, 24))
    for image, head in itertools.product(range(2), range(3)):
        # timm orders the joint map's outputs by (query/key/value, head, number).
        query, key, value = (qkv[image, :, 24 * i + 8 * head :][:, :8] for i in range(3))
        scores = np.exp(query @ key.T / np.sqrt(8))
        mixed[image, :, 8 * head : 8 * head + 8] = scores @ value / scores.sum(1)[:, None]
    expected = attention.projection(jnp.asarray(mixed, jnp.float32))
    np.testing.assert_allclose(attention(tokens), expected, rtol=1e-4, atol=1e-5)


def test_mean_pooling_without_positions_ignores_the_order_of_patches():
    model = randomized(small_vit(pooling="mean"))
    model.position_embedding[...] = jnp.zeros_like(model.position_embedding[...])
    images = images_of(model)
    logits = model(images)
    swapped = jnp.concatenate([images[:, 4:], images[:, :4]], axis=1)
    np.testing.assert_allclose(model(swapped), logits, rtol=1e-4, atol=1e-5)


def test_gradient_reaches_every_parameter():
    model = randomized(small_vit())
    images = images_of(model)
    gradient = nnx.grad(lambda model: (model(images) ** 2).sum())(model)
    for path, leaf in nnx.to_flat_state(gradient):
        assert bool(jnp.isfinite(leaf[...]).all()), path
        assert bool((leaf[...] != 0).any()), path


def test_stochastic_depth_acts_only_with_a_key():
    model = randomized(small_vit(stochastic_depth=0.5))
    images = images_of(model, batch=64)
    plain = model(images)
    assert jnp.array_equal(plain, randomized(small_vit())(images))
    dropped = model(images, key=jax.random.key(0))
    assert jnp.array_equal(dropped, model(images, key=jax.random.key(0)))
    assert not jnp.array_equal(dropped, model(images, key=jax.random.key(1)))
    assert jnp.array_equal(randomized(small_vit())(images, key=jax.random.key(0)), plain)


def test_stochastic_depth_leaves_the_mean_of_a_branch():
    model = randomized(small_vit(depth=2, stochastic_depth=0.5))
    tokens = jax.random.normal(jax.random.key(2), (1, 9, 24))
    block = model.blocks[1]
    branch = block.attention(block.norm1(tokens)) + tokens
    block.mlp.fc2.kernel[...] = jnp.zeros((96, 24))
    block.mlp.fc2.bias[...] = jnp.zeros(24)
    repeated = jnp.broadcast_to(tokens, (4000, 9, 24))
    mean = block(repeated, jax.random.key(5)).mean(axis=0)
    # Standard error of the mean of a branch that is 0 or doubled: |branch| / sqrt(4000).
    error = jnp.abs(mean - branch[0]) / (jnp.abs(branch - tokens)[0] / jnp.sqrt(4000.0))
    assert float(error.max()) < 4.0


def test_the_cifar_variant_takes_small_images():
    model = vit_small_cifar(rngs=nnx.Rngs(0))
    logits = model(jnp.zeros((2, 32, 32, 3)))
    assert logits.shape == (2, 10)
    assert num_parameters(model) == 810_890


@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_sine_positions_depend_on_row_and_column_alone(pooling):
    model = small_vit(positions="sincos", pooling=pooling, width=24)
    table = np.asarray(model.position_embedding[...])[0]
    if pooling == "token":
        assert not table[0].any()
        table = table[1:]
    table = table.reshape(3, 3, 24)
    # First half the column, second half the row, at six frequencies from 1 to 1/10,000.
    frequencies = [10.0 ** (-4 * i / 5) for i in range(6)]
    for place, half in ((2, table[1, 2, :12]), (1, table[1, 2, 12:])):
        angles = np.multiply(place, frequencies)
        expected = np.concatenate([np.sin(angles), np.cos(angles)])
        np.testing.assert_allclose(half, expected, rtol=0, atol=1e-6)
    assert len(np.unique(table.reshape(9, 24), axis=0)) == 9


@pytest.mark.parametrize("positions", ["normal", "sincos"])
def test_parameters_are_float32_even_in_double_precision(positions):
    with jax.enable_x64(True):
        model = small_vit(positions=positions)
        assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
        logits = model(images_of(model, dtype=jnp.float64))
    assert logits.dtype == jnp.float64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 13}, "image_size=13 is no positive multiple of patch_size=4"),
        ({"patch_size": 0}, "no positive multiple of patch_size=0"),
        ({"num_heads": 5}, "width=24 is no positive multiple of num_heads=5"),
        ({"pooling": "max"}, 'pooling=\'max\'; it is "token" or "mean"'),
        ({"positions": "cos"}, 'positions=\'cos\'; it is "normal" or "sincos"'),
        ({"positions": "sincos", "width": 27}, "needs a multiple of 4"),
        ({"stochastic_depth": 1.0}, "stochastic_depth=1.0 lies outside"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        small_vit(**options)


@pytest.mark.parametrize("shape", [(2, 3, 12, 12), (2, 16, 16, 3), (2, 12, 12, 1)])
def test_images_of_another_size_are_refused(shape):
    with pytest.raises(ValueError, match=r"takes images \(B, 12, 12, 3\); got shape"):
        small_vit()(jnp.zeros(shape))
