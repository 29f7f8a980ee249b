"""The hybrid ViT: its stem folds without changing the function, and sizes must fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nercc_models.hybrid import HybridViT, fold_stem, hybrid_vit_cifar
from nercc_models.vit import Block
from nercc_models.weights import num_parameters


def randomized(model):
    """Every number random: the head starts at zero and would hide all else."""
    rng = np.random.default_rng(0)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        positive = path[-1] in ("var", "scale")
        value = (
            rng.uniform(0.5, 1.5, variable.shape)
            if positive
            else 0.2 * rng.standard_normal(variable.shape)
        )
        variable.set_value(jnp.asarray(value, jnp.float32))
    model.eval()
    return model


def test_folding_the_stem_changes_nothing():
    model = randomized(hybrid_vit_cifar(rngs=nnx.Rngs(0)))
    images = jnp.asarray(np.random.default_rng(1).standard_normal((2, 32, 32, 3)), jnp.float32)
    run = nnx.jit(lambda model, images: model(images))
    expected, deployed = run(model, images), fold_stem(model)
    np.testing.assert_allclose(run(deployed, images), expected, rtol=1e-4, atol=1e-4)
    assert model.stem[0].bn3x3 is not None
    fresh = nnx.eval_shape(lambda: hybrid_vit_cifar(deploy=True, rngs=nnx.Rngs(0)))
    assert nnx.graphdef(deployed) == nnx.graphdef(fresh)


def test_the_cifar_variant_counts():
    model = nnx.eval_shape(lambda: hybrid_vit_cifar(rngs=nnx.Rngs(0)))
    assert num_parameters(nnx.state(model, nnx.Param)) == 660_426
    assert model.vit.position_embedding.shape == (1, 64, 128)


def test_a_training_call_keeps_a_share_of_the_tokens(monkeypatch):
    shapes, call = [], Block.__call__

    def spy(block, tokens, *args):
        shapes.append(tokens.shape)
        return call(block, tokens, *args)

    monkeypatch.setattr(Block, "__call__", spy)
    model = randomized(hybrid_vit_cifar(rngs=nnx.Rngs(0)))
    images = jnp.asarray(np.random.default_rng(1).standard_normal((2, 32, 32, 3)), jnp.float32)
    first, again, other = (model(images, key=jax.random.key(seed)) for seed in (0, 0, 1))
    whole = model(images)
    assert shapes == 12 * [(2, 32, 128)] + 4 * [(2, 64, 128)]
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    model.kept_tokens = 1.0
    np.testing.assert_array_equal(model(images, key=jax.random.key(0)), whole)


def test_errors_quote_what_came():
    with pytest.raises(ValueError, match=r"kept_tokens=0 is no share in \(0, 1\]"):
        HybridViT(stem_widths=(8,), stem_strides=(2,), kept_tokens=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="got 2 widths and 1 strides"):
        HybridViT(stem_widths=(8, 8), stem_strides=(2,), rngs=nnx.Rngs(0))
    model = HybridViT(
        image_size=8,
        stem_widths=(8,),
        stem_strides=(2,),
        width=8,
        depth=1,
        num_heads=1,
        rngs=nnx.Rngs(0),
    )
    model.eval()
    with pytest.raises(ValueError, match=r"\(B, 8, 8, 3\); got shape \(1, 16, 16, 3\)"):
        model(jnp.zeros((1, 16, 16, 3)))
