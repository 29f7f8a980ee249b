"""RepVGG: its two forms are the same function, and its sizes are the literature's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from nercc_models.convolution import convolve
from nercc_models.repvgg import RepVGG, reparameterize, repvgg, repvgg_cifar
from nercc_models.weights import num_parameters


def with_statistics(model: RepVGG, dtype) -> RepVGG:
    """Random scales, biases and running statistics, so that no branch is trivial."""
    rng = np.random.default_rng(0)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        value = variable[...]
        if path[-1] in ("var", "scale"):
            value = rng.uniform(0.5, 1.5, value.shape)
        elif path[-1] in ("mean", "bias"):
            value = 0.3 * rng.standard_normal(value.shape)
        # Setting by index would keep the old type.
        variable.set_value(jnp.asarray(value, dtype))
    model.eval()
    return model


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-13)])
@pytest.mark.parametrize(
    "build",
    [repvgg_cifar, lambda rngs: RepVGG((6, 12, 20), (1, 3), (2, 2, 1), num_classes=7, rngs=rngs)],
)
def test_deploy_form_equals_training_form(build, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        model = with_statistics(build(rngs=nnx.Rngs(0)), dtype)
        images = jnp.asarray(np.random.default_rng(1).standard_normal((2, 32, 32, 3)), dtype)
        expected = nnx.jit(lambda m, x: m(x))(model, images)
        deployed = reparameterize(model)
        got = nnx.jit(lambda m, x: m(x))(deployed, images)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_reparameterize_leaves_the_model_and_removes_every_branch():
    model = repvgg_cifar(rngs=nnx.Rngs(0))
    deployed = reparameterize(model)
    assert model.stages[0][1].bn_identity is not None
    names = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(deployed))}
    assert not any("bn" in name or "1x1" in name for name in names)
    fresh = repvgg_cifar(deploy=True, rngs=nnx.Rngs(0))
    assert nnx.graphdef(deployed) == nnx.graphdef(fresh)


# timm 1.0.31: sum(p.numel() for p in timm.create_model("repvgg_a0").parameters()), and the same
# after timm.utils.reparameterize_model.
@pytest.mark.parametrize(
    ("size", "training", "deploy"),
    [
        ("a0", 9_108_968, 8_309_384),
        ("a1", 14_092_264, 12_789_864),
        ("a2", 28_210_600, 25_499_944),
        ("b0", 15_817_960, 14_339_048),
        ("b1", 57_415_016, 51_829_480),
        ("b2", 89_022_376, 80_315_112),
        ("b3", 123_085_288, 110_960_872),
    ],
)
def test_parameter_counts_are_timms(size, training, deploy):
    def counted(deploy):
        model = nnx.eval_shape(lambda: repvgg(size, deploy=deploy, rngs=nnx.Rngs(0)))
        return num_parameters(nnx.state(model, nnx.Param))

    assert counted(False) == training
    assert counted(True) == deploy


def test_identity_only_where_shapes_agree_and_first_blocks_have_the_stride():
    model = nnx.eval_shape(lambda: repvgg("a0", rngs=nnx.Rngs(0)))
    for stage in model.stages:
        assert stage[0].stride == 2
        assert stage[0].bn_identity is None
        assert all(block.bn_identity is not None and block.stride == 1 for block in stage[1:])


def test_errors_quote_what_came():
    with pytest.raises(ValueError, match=r"Unknown RepVGG 'a9'. Known: a0, a1"):
        repvgg("a9", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="got 2 widths, 5 strides and 1 stages"):
        RepVGG((8, 16), (1,), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"\(B, H, W, 3\); got shape \(2, 32, 32, 1\)"):
        repvgg_cifar(rngs=nnx.Rngs(0))(jnp.zeros((2, 32, 32, 1)))


@pytest.mark.parametrize("edge", [8, 16, 32])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("batch", [8, 3])
def test_convolution_and_its_gradients_are_those_of_lax(edge, stride, batch):
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((batch, edge, edge, 5)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 5, 7)), jnp.float32)
    options = {"window_strides": (stride, stride), "padding": [(1, 1), (1, 1)]}

    def value(function, **more):
        def summed(x, k):
            return jnp.sum(jnp.sin(function(x, k, **options, **more)))

        return jax.jit(jax.value_and_grad(summed, (0, 1)))(images, kernel)

    got = value(convolve)
    expected = value(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * np.abs(other).max())
