"""The networks: RepVGG and the hybrid fold without changing, ViT computes what it says, sizes fit.

That they compute what timm computes is `test_pretrained.py`'s business.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from nercc_models import load_model
from nercc_models.convolution import convolve
from nercc_models.hybrid import HybridViT, fold_stem, hybrid_vit_cifar
from nercc_models.lenet5 import LeNet5
from nercc_models.repvgg import RepVGG, reparameterize, repvgg, repvgg_cifar
from nercc_models.vit import (
    ViT,
    vit_base_patch16_224,
    vit_small_cifar,
    vit_small_patch16_224,
    vit_tiny_patch16_224,
)
from nercc_models.weights import num_parameters


def small_vit(**options):
    sizes = {"image_size": 12, "patch_size": 4, "width": 24, "depth": 3, "num_heads": 3}
    return ViT(**(sizes | {"num_classes": 5} | options), rngs=nnx.Rngs(0))


def randomized(model, dtype="float32"):
    """Every number random: heads start at zero and would hide all else; no branch is trivial."""
    rng = np.random.default_rng(0)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        value = 0.2 * rng.standard_normal(variable.shape)
        if path[-1] in ("var", "scale"):
            value = rng.uniform(0.5, 1.5, variable.shape)
        variable.set_value(jnp.asarray(value, dtype))
    model.eval()
    return model


def images_of(*shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), dtype)


# timm 1.0.31: sum(p.numel() for p in timm.create_model("repvgg_a0").parameters()), and the same
# after timm.utils.reparameterize_model. ViT: Table 1 of Touvron et al. 2021 (5, 22 and 86 million).
@pytest.mark.parametrize(
    ("build", "training", "deploy"),
    [
        *(
            pytest.param(
                *(lambda size=size, **options: repvgg(size, **options), training, deploy),
                marks=[pytest.mark.slow] if size > "a0" else (),
            )
            for size, training, deploy in (
                ("a0", 9_108_968, 8_309_384),
                ("a1", 14_092_264, 12_789_864),
                ("a2", 28_210_600, 25_499_944),
                ("b0", 15_817_960, 14_339_048),
                ("b1", 57_415_016, 51_829_480),
                ("b2", 89_022_376, 80_315_112),
                ("b3", 123_085_288, 110_960_872),
            )
        ),
        (vit_tiny_patch16_224, 5_717_416, None),
        (vit_small_patch16_224, 22_050_664, None),
        (vit_base_patch16_224, 86_567_656, None),
        (vit_small_cifar, 810_890, None),
        (hybrid_vit_cifar, 660_426, None),
        (LeNet5, 61_706, None),
    ],
)
def test_sizes_of_the_literature(build, training, deploy):
    for expected, options in ((training, {}), (deploy, {"deploy": True})):
        if expected is not None:
            model = nnx.eval_shape(lambda options=options: build(**options, rngs=nnx.Rngs(0)))
            assert num_parameters(nnx.state(model, nnx.Param)) == expected
    size = getattr(model, "image_size", None)
    if size is not None:
        images = jax.ShapeDtypeStruct((3, size, size, 3), jnp.float32)
        logits = nnx.eval_shape(lambda model, images: model(images), model, images)
        assert logits.shape == (3, 1000 if size == 224 else 10)


# Folding.


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-13)])
@pytest.mark.parametrize(
    ("build", "fold"),
    [
        (repvgg_cifar, reparameterize),
        (
            lambda rngs, **options: RepVGG(
                (6, 12, 20), (1, 3), (2, 2, 1), num_classes=7, rngs=rngs, **options
            ),
            reparameterize,
        ),
        (hybrid_vit_cifar, fold_stem),
    ],
    ids=["repvgg_cifar", "repvgg", "hybrid"],
)
def test_deploy_form_equals_training_form(build, fold, dtype, tolerance):
    """And leaves the model as it is, without a branch of its own."""
    if fold is fold_stem and dtype == "float64":
        pytest.skip("its ViT computes in float32")
    with jax.enable_x64(dtype == "float64"):
        model = randomized(build(rngs=nnx.Rngs(0)), dtype)
        images = images_of(2, 32, 32, 3, dtype=dtype)
        expected = nnx.jit(lambda m, x: m(x))(model, images)
        deployed = fold(model)
        got = nnx.jit(lambda m, x: m(x))(deployed, images)
        fresh = nnx.eval_shape(lambda: build(deploy=True, rngs=nnx.Rngs(0)))
    assert got.dtype == dtype
    bound = (10 if fold is fold_stem else 1) * tolerance * np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=bound)
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(deployed))}
    assert not any("bn" in name or "1x1" in name for name in names)
    kept = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
    assert any("bn3x3" in name for name in kept)
    assert nnx.graphdef(deployed) == nnx.graphdef(fresh)


@pytest.mark.parametrize("edge", [8, 16, 32])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("batch", [8, 3])
def test_convolution_and_its_gradients_are_those_of_lax(edge, stride, batch):
    images, kernel = images_of(batch, edge, edge, 5), images_of(3, 3, 5, 7)
    options = {"window_strides": (stride, stride), "padding": [(1, 1), (1, 1)]}

    def value(function, **more):
        def summed(x, k):
            return jnp.sum(jnp.sin(function(x, k, **options, **more)))

        return jax.jit(jax.value_and_grad(summed, (0, 1)))(images, kernel)

    got = value(convolve)
    expected = value(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * np.abs(other).max())


# Vision Transformers.


def test_stochastic_depth_acts_only_with_a_key():
    model, still = (randomized(small_vit(stochastic_depth=rate)) for rate in (0.5, 0.0))
    images = images_of(64, 12, 12, 3)
    plain, dropped = model(images), model(images, key=jax.random.key(0))
    assert jnp.array_equal(plain, still(images))
    assert jnp.array_equal(dropped, model(images, key=jax.random.key(0)))
    assert not jnp.array_equal(dropped, model(images, key=jax.random.key(1)))
    assert jnp.array_equal(still(images, key=jax.random.key(0)), plain)


@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_sine_positions_depend_on_row_and_column_alone(pooling):
    table = np.asarray(small_vit(positions="sincos", pooling=pooling).position_embedding[...])[0]
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


# Errors quote what came.

STEM = {"stem_widths": (8,), "stem_strides": (2,), "rngs": nnx.Rngs(0)}
SMALL_HYBRID = STEM | {"image_size": 8, "width": 8, "depth": 1, "num_heads": 1}


def lenet5():
    return load_model("lenet5-digits")


# By the message: a model, its options, and the shape of images where it can be made.
IMPOSSIBLE = {
    "image_size=13 is no positive multiple of patch_size=4": (small_vit, {"image_size": 13}),
    "no positive multiple of patch_size=0": (small_vit, {"patch_size": 0}),
    "width=24 is no positive multiple of num_heads=5": (small_vit, {"num_heads": 5}),
    """pooling='max'; it is "token" or "mean\"""": (small_vit, {"pooling": "max"}),
    """positions='cos'; it is "normal" or "sincos\"""": (small_vit, {"positions": "cos"}),
    "needs a multiple of 4": (small_vit, {"positions": "sincos", "width": 27}),
    "stochastic_depth=1.0 lies outside": (small_vit, {"stochastic_depth": 1.0}),
    "(B, 12, 12, 3); got shape (2, 3, 12, 12)": (small_vit, {}, (2, 3, 12, 12)),
    "(B, 12, 12, 3); got shape (2, 16, 16, 3)": (small_vit, {}, (2, 16, 16, 3)),
    "(B, 12, 12, 3); got shape (2, 12, 12, 1)": (small_vit, {}, (2, 12, 12, 1)),
    "(B, 32, 32, 1); got shape (2, 28, 28, 1)": (lenet5, {}, (2, 28, 28, 1)),
    "Unknown RepVGG 'a9'. Known: a0, a1": (repvgg, {"size": "a9", "rngs": nnx.Rngs(0)}),
    "got 2 widths, 5 strides and 1 stages": (
        RepVGG,
        {"widths": (8, 16), "blocks": (1,), "rngs": nnx.Rngs(0)},
    ),
    "(B, H, W, 3); got shape (2, 32, 32, 1)": (
        repvgg_cifar,
        {"rngs": nnx.Rngs(0)},
        (2, 32, 32, 1),
    ),
    "kept_tokens=0 is no share in (0, 1]": (HybridViT, STEM | {"kept_tokens": 0}),
    "got 2 widths and 1 strides": (HybridViT, STEM | {"stem_widths": (8, 8)}),
    "(B, 8, 8, 3); got shape (1, 16, 16, 3)": (HybridViT, SMALL_HYBRID, (1, 16, 16, 3)),
}


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_impossible_sizes_and_images_are_refused(message):
    make, options, *shapes = IMPOSSIBLE[message]

    def run():
        model = make(**options)
        return [model(jnp.zeros(shape)) for shape in shapes]

    with pytest.raises(ValueError, match=re.escape(message)):
        run()
