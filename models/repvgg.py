"""RepVGG (Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021) in Flax NNX.

Each block trains as the sum of a 3x3 convolution, a 1x1 convolution and the identity, each followed
by a batch norm, and is then folded into one 3x3 convolution with a bias that computes the same.
Sizes, padding and epsilon are those of the authors and of timm. Images are channels-last.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Real

from .convolution import convolve

_BATCH_NORM_EPSILON = 1e-5


def _conv(inputs: int, outputs: int, size: int, stride: int, rngs: nnx.Rngs, **options: Any) -> Any:
    margin = (size - 1) // 2
    return nnx.Conv(
        inputs,
        outputs,
        (size, size),
        strides=(stride, stride),
        padding=[(margin, margin), (margin, margin)],
        rngs=rngs,
        **options,
    )


def _pointwise(
    images: Array, kernel: Array, window_strides: Sequence[int], padding: Any, **_: Any
) -> Array:
    """Compute a 1x1 convolution as a matrix product.

    XLA's weight gradient of it is 3 times faster on a CPU, where those of 1x1 convolutions take as
    long as those of 3x3 ones.
    """
    rows, columns = window_strides
    return images[:, ::rows, ::columns] @ kernel[0, 0]


def _batch_norm(channels: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(channels, momentum=0.9, epsilon=_BATCH_NORM_EPSILON, rngs=rngs)


class RepVGGBlock(nnx.Module):
    """relu(bn(conv3x3(x)) + bn(conv1x1(x)) + bn(x)), the last only where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, *, rngs: nnx.Rngs):
        self.inputs = inputs
        self.outputs = outputs
        self.stride = stride
        options: dict[str, Any] = {
            "use_bias": False,
            "kernel_init": nnx.initializers.he_normal(),
        }
        self.conv3x3 = _conv(
            inputs, outputs, 3, stride, rngs, conv_general_dilated=convolve, **options
        )
        self.conv1x1 = _conv(
            inputs, outputs, 1, stride, rngs, conv_general_dilated=_pointwise, **options
        )
        self.bn3x3 = _batch_norm(outputs, rngs)
        self.bn1x1 = _batch_norm(outputs, rngs)
        same_shape = inputs == outputs and stride == 1
        self.bn_identity = _batch_norm(outputs, rngs) if same_shape else None

    def __call__(
        self, images: Float[Array, "batch height width inputs"]
    ) -> Float[Array, "batch out_height out_width outputs"]:
        total = self.bn3x3(self.conv3x3(images)) + self.bn1x1(self.conv1x1(images))
        if self.bn_identity is not None:
            total = total + self.bn_identity(images)
        return jax.nn.relu(total)


class DeployBlock(nnx.Module):
    """relu(conv(x)): what a `RepVGGBlock` becomes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, *, rngs: nnx.Rngs):
        self.conv = _conv(inputs, outputs, 3, stride, rngs)

    def __call__(
        self, images: Float[Array, "batch height width inputs"]
    ) -> Float[Array, "batch out_height out_width outputs"]:
        return jax.nn.relu(self.conv(images))


class RepVGG(nnx.Module):
    """A stem, four stages of blocks, the mean over all pixels, and a linear head.

    Maps images (B, H, W, 3) to logits (B, num_classes). Training form unless `deploy`; the first
    block of each stage has the stage's stride.

    Arguments:
        widths: channels of the stem and of each stage.
        blocks: blocks of each stage.
        strides: stride of the stem and of each stage.

    Raises:
        ValueError: unless there is one width and one stride more than there are stages.
    """

    def __init__(
        self,
        widths: Sequence[int],
        blocks: Sequence[int],
        strides: Sequence[int] = (2, 2, 2, 2, 2),
        *,
        num_classes: int = 1000,
        deploy: bool = False,
        rngs: nnx.Rngs,
    ):
        if not len(widths) == len(strides) == len(blocks) + 1:
            raise ValueError(
                "A RepVGG has a width and a stride for its stem and for each stage; got "
                f"{len(widths)} widths, {len(strides)} strides and {len(blocks)} stages."
            )
        block: Any = DeployBlock if deploy else RepVGGBlock
        self.stem = block(3, widths[0], strides[0], rngs=rngs)
        self.stages = nnx.List()
        for before, width, count, stride in zip(
            widths[:-1], widths[1:], blocks, strides[1:], strict=True
        ):
            first = block(before, width, stride, rngs=rngs)
            others = [block(width, width, rngs=rngs) for _ in range(count - 1)]
            self.stages.append(nnx.List([first, *others]))
        self.head = nnx.Linear(widths[-1], num_classes, rngs=rngs)

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch classes"]:
        """Return logits of a preprocessed batch; raise ValueError unless it is (B, H, W, 3)."""
        if images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"RepVGG takes images (B, H, W, 3); got shape {images.shape}.")
        x = self.stem(images)
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.head(x.mean(axis=(1, 2)))


def reparameterize(model: RepVGG) -> RepVGG:
    """Return the deploy form of a model in training form: one convolution for each block.

    It uses the running statistics of the batch norms, so it equals `model.eval()`, not the model
    that is being trained. `model` is left as it is.
    """
    deployed = nnx.clone(model)
    deployed.stem = fold(model.stem)
    deployed.stages = nnx.List([nnx.List([fold(block) for block in s]) for s in model.stages])
    return deployed


def fold(block: RepVGGBlock) -> DeployBlock:
    """Return one block's three branches as one 3x3 convolution with a bias.

    A batch norm is y = s (x - mean) + bias with s = scale / sqrt(variance + epsilon); a 1x1 kernel
    is a 3x3 kernel with zeros around it, and the identity the 1x1 kernel of the unit matrix.
    """
    branches = [
        _fold_branch(block.conv3x3.kernel[...], block.bn3x3),
        _fold_branch(_pad_to_3x3(block.conv1x1.kernel[...]), block.bn1x1),
    ]
    if block.bn_identity is not None:
        unit = jnp.eye(block.inputs, dtype=block.conv1x1.kernel[...].dtype)
        branches.append(_fold_branch(_pad_to_3x3(unit[None, None]), block.bn_identity))
    kernels, biases = zip(*branches, strict=True)
    folded = DeployBlock(block.inputs, block.outputs, block.stride, rngs=nnx.Rngs(0))
    folded.conv.kernel.set_value(sum(kernels))
    folded.conv.bias.set_value(sum(biases))
    return folded


def _pad_to_3x3(kernel: Array) -> Array:
    return jnp.pad(kernel, ((1, 1), (1, 1), (0, 0), (0, 0)))


def _fold_branch(kernel: Array, norm: Any) -> tuple[Array, Array]:
    scale = norm.scale[...] / jnp.sqrt(norm.var[...] + norm.epsilon)
    return kernel * scale, norm.bias[...] - norm.mean[...] * scale


@dataclasses.dataclass(frozen=True)
class _Size:
    """Blocks of the four stages, and multiples of the widths 64, 128, 256 and of 512."""

    blocks: tuple[int, int, int, int]
    width: float
    last_width: float


_SIZES = {
    "a0": _Size((2, 4, 14, 1), 0.75, 2.5),
    "a1": _Size((2, 4, 14, 1), 1.0, 2.5),
    "a2": _Size((2, 4, 14, 1), 1.5, 2.75),
    "b0": _Size((4, 6, 16, 1), 1.0, 2.5),
    "b1": _Size((4, 6, 16, 1), 2.0, 4.0),
    "b2": _Size((4, 6, 16, 1), 2.5, 5.0),
    "b3": _Size((4, 6, 16, 1), 3.0, 5.0),
}


def repvgg(size: str, *, num_classes: int = 1000, deploy: bool = False, rngs: nnx.Rngs) -> RepVGG:
    """Make one of the family of the paper's table 2: a0, a1, a2, b0, b1, b2 or b3.

    Raises:
        ValueError: The size is another; the message lists these.
    """
    if size not in _SIZES:
        raise ValueError(f"Unknown RepVGG {size!r}. Known: {', '.join(_SIZES)}.")
    chosen = _SIZES[size]
    stages = [int(base * chosen.width) for base in (64, 128, 256)] + [int(512 * chosen.last_width)]
    widths = [min(64, stages[0]), *stages]
    return RepVGG(widths, chosen.blocks, num_classes=num_classes, deploy=deploy, rngs=rngs)


CIFAR_SHAPE = (32, 32, 3)
_CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
_CIFAR10_DEVIATION = (0.2470, 0.2435, 0.2616)


def repvgg_cifar(*, num_classes: int = 10, deploy: bool = False, rngs: nnx.Rngs) -> RepVGG:
    """Seven blocks for 32x32 images, widths 32 to 256, of which only the stem sees 32x32 pixels."""
    return RepVGG(
        widths=(32, 64, 128, 256),
        blocks=(2, 3, 1),
        strides=(1, 2, 2, 2),
        num_classes=num_classes,
        deploy=deploy,
        rngs=rngs,
    )


def preprocess_cifar10(
    images: Real[Array, "batch 32 32 3"] | Real[np.ndarray, "batch 32 32 3"],
) -> Float[Array, "batch 32 32 3"]:
    """Scale colours 0 to 255 to zero mean and unit deviation over CIFAR-10's training images."""
    scaled = jnp.asarray(images, jnp.float32) / 255
    return (scaled - jnp.array(_CIFAR10_MEAN)) / jnp.array(_CIFAR10_DEVIATION)
