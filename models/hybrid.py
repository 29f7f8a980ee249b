"""The hybrid Vision Transformer: patches of a feature map that a few convolutions made.

Dosovitskiy et al. 2021, section 3.1; on small data and few epochs it is far ahead of patches of
pixels (Xiao et al., "Early Convolutions Help Transformers See Better", NeurIPS 2021).
"""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from .repvgg import DeployBlock, RepVGGBlock, fold
from .vit import ViT


class HybridViT(nnx.Module):
    """RepVGG blocks, then a ViT whose tokens are the pixels of their output.

    Maps images (B, image_size, image_size, 3) to logits (B, num_classes).

    Arguments:
        image_size: side of the images in pixels, a multiple of the product of the strides.
        stem_widths, stem_strides: channels and stride of each block before the transformer.
        deploy: build the blocks in deploy form, one convolution each.
        kept_tokens: share of the tokens that a training call with a key keeps, the same ones for
            the whole batch (Liu et al., "PatchDropout", WACV 2023): it saves as much time.
        options: `width`, `depth`, `num_heads`, `mlp_ratio`, `positions` of `ViT`; the tokens' mean
            is pooled.

    Raises:
        ValueError: not as many widths as strides, a share outside (0, 1]; and what `ViT` raises.
    """

    def __init__(
        self,
        *,
        image_size: int = 32,
        stem_widths: Sequence[int],
        stem_strides: Sequence[int],
        num_classes: int = 10,
        kept_tokens: float = 1.0,
        deploy: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        if not 0 < kept_tokens <= 1:
            raise ValueError(f"kept_tokens={kept_tokens} is no share in (0, 1].")
        if not stem_widths or len(stem_widths) != len(stem_strides):
            raise ValueError(
                "A stem has a width and a stride for each of its blocks; got "
                f"{len(stem_widths)} widths and {len(stem_strides)} strides."
            )
        self.image_size = image_size
        self.kept_tokens = kept_tokens
        block: Any = DeployBlock if deploy else RepVGGBlock
        inputs = [3, *stem_widths[:-1]]
        self.stem = nnx.List(
            [
                block(before, width, stride, rngs=rngs)
                for before, width, stride in zip(inputs, stem_widths, stem_strides, strict=True)
            ]
        )
        side = image_size
        for stride in stem_strides:
            side = -(-side // stride)
        self.vit = ViT(
            image_size=side,
            patch_size=1,
            channels=stem_widths[-1],
            num_classes=num_classes,
            pooling="mean",
            rngs=rngs,
            **options,
        )

    def __call__(
        self, images: Float[Array, "batch height width 3"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "batch classes"]:
        """Return logits of a preprocessed batch; with a key, a training call that drops tokens.

        Raises:
            ValueError: Images have another size.
        """
        expected = (self.image_size, self.image_size, 3)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"This hybrid ViT takes images (B, {self.image_size}, {self.image_size}, 3); got "
                f"shape {images.shape}."
            )
        x = images
        for block in self.stem:
            x = block(x)
        if key is None or self.kept_tokens == 1:
            return self.vit(x)
        tokens = self.vit.patch_embedding(x) + self.vit.position_embedding[...]
        count = max(1, round(self.kept_tokens * tokens.shape[1]))
        tokens = tokens[:, jax.random.permutation(key, tokens.shape[1])[:count]]
        for block in self.vit.blocks:
            tokens = block(tokens)
        return self.vit.head(self.vit.norm(tokens.mean(axis=1)))


def fold_stem(model: HybridViT) -> HybridViT:
    """Return the same function with one convolution for each block of the stem."""
    deployed = nnx.clone(model)
    deployed.stem = nnx.List([fold(block) for block in model.stem])
    return deployed


def hybrid_vit_cifar(*, num_classes: int = 10, deploy: bool = False, rngs: nnx.Rngs) -> HybridViT:
    """Make a model for 32x32 images: three convolutions, then four blocks on 8x8 tokens.

    ```python
    from flax import nnx
    from nercc_models import HybridViT, fold_stem, hybrid_vit_cifar

    model: HybridViT = hybrid_vit_cifar(rngs=nnx.Rngs(0))  # train it, then
    deployed = fold_stem(model)
    ```
    """
    return HybridViT(
        image_size=32,
        stem_widths=(32, 64, 128),
        stem_strides=(2, 1, 2),
        num_classes=num_classes,
        deploy=deploy,
        rngs=rngs,
        width=128,
        depth=4,
        num_heads=2,
        mlp_ratio=2.0,
        positions="sincos",
        kept_tokens=0.5,
    )
