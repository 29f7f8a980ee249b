"""Vision Transformer (Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021) in Flax NNX.

Layer by layer the same function as timm's `VisionTransformer`: pre-norm blocks, one biased linear
map for queries, keys and values, LayerNorm with epsilon 1e-6, the exact (erf) GELU, and a final
norm. Images are channels-last. Weights of timm load with `nercc_models.pretrained`.
"""

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

Pooling: TypeAlias = Literal["token", "mean"]
Positions: TypeAlias = Literal["normal", "sincos"]

_LAYER_NORM_EPSILON = 1e-6
# Initial values as in the authors' own code: Xavier for the blocks, a head of zeros.
_xavier = nnx.initializers.xavier_uniform()
_near_zero = nnx.initializers.normal(1e-6)


def _layer_norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance, E[x^2] - E[x]^2, cancels: in float32 it costs two digits against timm.
    return nnx.LayerNorm(width, epsilon=_LAYER_NORM_EPSILON, use_fast_variance=False, rngs=rngs)


def _stochastic_depth(
    branch: Float[Array, "batch token width"], rate: float, key: PRNGKeyArray | None
) -> Float[Array, "batch token width"]:
    """Drop the whole branch of an image with probability `rate` (Huang et al. 2016)."""
    if key is None or rate == 0.0:
        return branch
    kept = jax.random.bernoulli(key, 1.0 - rate, (branch.shape[0], 1, 1))
    return jnp.where(kept, branch / (1.0 - rate), 0.0)


class PatchEmbedding(nnx.Module):
    """Cut images into square patches and map each to `width` numbers.

    A strided convolution does the same; as one matrix product over the flattened patches (row,
    column, channel) it needs no convolution, forward or backward.
    """

    def __init__(self, patch_size: int, channels: int, width: int, *, rngs: nnx.Rngs):
        self.patch_size = patch_size
        self.projection = nnx.Linear(
            patch_size * patch_size * channels,
            width,
            kernel_init=nnx.initializers.lecun_normal(),
            rngs=rngs,
        )

    def __call__(
        self, images: Float[Array, "batch height width channel"]
    ) -> Float[Array, "batch patch embedding"]:
        batch, height, width, channels = images.shape
        size = self.patch_size
        rows, columns = height // size, width // size
        patches = images.reshape(batch, rows, size, columns, size, channels)
        patches = patches.transpose(0, 1, 3, 2, 4, 5)
        return self.projection(patches.reshape(batch, rows * columns, size * size * channels))


class Attention(nnx.Module):
    """Multi-head self-attention, softmax(q k' / sqrt(d)) v in every head."""

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.qkv = nnx.Linear(width, 3 * width, kernel_init=_xavier, rngs=rngs)
        self.projection = nnx.Linear(width, width, kernel_init=_xavier, rngs=rngs)

    def __call__(
        self, tokens: Float[Array, "batch token width"]
    ) -> Float[Array, "batch token width"]:
        batch, length, width = tokens.shape
        heads = self.num_heads
        qkv = self.qkv(tokens).reshape(batch, length, 3, heads, width // heads)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        mixed = jax.nn.dot_product_attention(query, key, value)
        return self.projection(mixed.reshape(batch, length, width))


class Mlp(nnx.Module):
    """Two linear maps with the exact GELU between them, applied to every token alike."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(width, hidden, kernel_init=_xavier, bias_init=_near_zero, rngs=rngs)
        self.fc2 = nnx.Linear(hidden, width, kernel_init=_xavier, bias_init=_near_zero, rngs=rngs)

    def __call__(
        self, tokens: Float[Array, "batch token width"]
    ) -> Float[Array, "batch token width"]:
        return self.fc2(jax.nn.gelu(self.fc1(tokens), approximate=False))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        stochastic_depth: float,
        *,
        rngs: nnx.Rngs,
    ):
        self.stochastic_depth = stochastic_depth
        self.norm1 = _layer_norm(width, rngs)
        self.attention = Attention(width, num_heads, rngs=rngs)
        self.norm2 = _layer_norm(width, rngs)
        self.mlp = Mlp(width, int(width * mlp_ratio), rngs=rngs)

    def __call__(
        self, tokens: Float[Array, "batch token width"], key: PRNGKeyArray | None = None
    ) -> Float[Array, "batch token width"]:
        key1, key2 = (None, None) if key is None else jax.random.split(key)
        rate = self.stochastic_depth
        tokens = tokens + _stochastic_depth(self.attention(self.norm1(tokens)), rate, key1)
        return tokens + _stochastic_depth(self.mlp(self.norm2(tokens)), rate, key2)


class ViT(nnx.Module):
    """Vision Transformer: square images to logits.

    Arguments:
        image_size: side of the images in pixels, a multiple of `patch_size`.
        patch_size: side of a patch in pixels.
        width: numbers a token, a multiple of `num_heads`.
        depth: blocks.
        num_heads: attention heads a block.
        mlp_ratio: hidden units of a block's MLP, as a multiple of `width`.
        num_classes: logits.
        channels: channels of an image.
        positions: what the position embedding starts from, "normal" noise or the "sincos" of the
            patch's row and column (Vaswani et al. 2017; Beyer et al. 2022), learned from there on.
        pooling: "token" reads the logits off a learned class token, normalised; "mean" has no such
            token and normalises the mean over the patches (timm: `class_token=False,
            global_pool="avg"`).
        stochastic_depth: probability with which training drops a branch of the last block; it
            rises linearly from 0 at the first block. Acts only on calls that bring a key.
        rngs: source of the initial weights (stream `params`).

    Raises:
        ValueError: sizes that do not divide, numbers that are not positive, an unknown pooling.

    Source: Dosovitskiy et al. 2021, equations 1 to 4; timm's `vision_transformer.py`.
    """

    def __init__(
        self,
        *,
        image_size: int = 224,
        patch_size: int = 16,
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        channels: int = 3,
        positions: Positions = "normal",
        pooling: Pooling = "token",
        stochastic_depth: float = 0.0,
        rngs: nnx.Rngs,
    ):
        _check_sizes(image_size, patch_size, width, num_heads)
        _check_choices(pooling, positions, width, stochastic_depth)
        self.image_size = image_size
        self.channels = channels
        self.num_classes = num_classes
        self.pooling = pooling
        self.patch_embedding = PatchEmbedding(patch_size, channels, width, rngs=rngs)
        self.class_token = (
            nnx.Param(_near_zero(rngs.params(), (1, 1, width), jnp.float32))
            if pooling == "token"
            else None
        )
        grid, has_token = image_size // patch_size, pooling == "token"
        if positions == "sincos":
            first = _sincos_positions(grid, has_token, width)
        else:
            shape = (1, grid**2 + has_token, width)
            first = nnx.initializers.normal(0.02)(rngs.params(), shape, jnp.float32)
        self.position_embedding = nnx.Param(first)
        rates = [stochastic_depth * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nnx.List(
            [Block(width, num_heads, mlp_ratio, rate, rngs=rngs) for rate in rates]
        )
        self.norm = _layer_norm(width, rngs)
        self.head = nnx.Linear(
            width, num_classes, kernel_init=nnx.initializers.zeros_init(), rngs=rngs
        )

    def features(
        self, images: Float[Array, "batch height width channel"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "batch embedding"]:
        """Pooled and normalised tokens, which the head maps to logits; as `__call__` otherwise."""
        expected = (self.image_size, self.image_size, self.channels)
        if images.ndim != 4 or images.shape[1:] != expected:
            sizes = ", ".join(map(str, expected))
            raise ValueError(f"This ViT takes images (B, {sizes}); got shape {images.shape}.")
        tokens = self.patch_embedding(images)
        if self.class_token is not None:
            class_token = jnp.broadcast_to(
                self.class_token[...], (tokens.shape[0], 1, tokens.shape[2])
            )
            tokens = jnp.concatenate([class_token, tokens], axis=1)
        tokens = tokens + self.position_embedding[...]
        keys = [None] * len(self.blocks) if key is None else jax.random.split(key, len(self.blocks))
        for block, block_key in zip(self.blocks, keys, strict=True):
            tokens = block(tokens, block_key)
        # The norm acts token by token: normalising the class token alone is the same, and cheaper.
        pooled = tokens[:, 0] if self.pooling == "token" else tokens.mean(axis=1)
        return self.norm(pooled)

    def __call__(
        self, images: Float[Array, "batch height width channel"], *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "batch num_classes"]:
        """Return logits of a batch of images.

        Args:
            images: Preprocessed images (zero mean, unit scale), channels last.
            key: Makes this a training call, with stochastic depth; without it the result is
                deterministic.

        Returns:
            Logits, in the type of the images and weights.

        Raises:
            ValueError: Images have another size, at trace time.
        """
        return self.head(self.features(images, key=key))


def _sincos_positions(grid: int, has_token: bool, width: int) -> Float[Array, "1 token width"]:
    """Return sines and cosines of a patch's place, at wavelengths 2 pi to 20,000 pi patches.

    They have the order and the frequencies of Beyer et al. 2022 ("Better plain ViT baselines for
    ImageNet-1k"); the class token, which has no place, starts at zero.
    """
    quarter = width // 4
    frequencies = 1e4 ** (-jnp.arange(quarter) / max(quarter - 1, 1))
    rows, columns = jnp.divmod(jnp.arange(grid**2), grid)
    angles = [place[:, None] * frequencies for place in (columns, rows)]
    waves = [wave(angle) for angle in angles for wave in (jnp.sin, jnp.cos)]
    table = jnp.concatenate(waves, axis=1).astype(jnp.float32)
    return jnp.pad(table, ((int(has_token), 0), (0, 0)))[None]


def _check_sizes(image_size: int, patch_size: int, width: int, num_heads: int) -> None:
    if patch_size < 1 or image_size < 1 or image_size % patch_size:
        raise ValueError(
            f"image_size={image_size} is no positive multiple of patch_size={patch_size}"
        )
    if num_heads < 1 or width < 1 or width % num_heads:
        raise ValueError(f"width={width} is no positive multiple of num_heads={num_heads}")


def _check_choices(pooling: str, positions: str, width: int, stochastic_depth: float) -> None:
    if pooling not in ("token", "mean"):
        raise ValueError(f'pooling={pooling!r}; it is "token" or "mean"')
    if positions not in ("normal", "sincos"):
        raise ValueError(f'positions={positions!r}; it is "normal" or "sincos"')
    if positions == "sincos" and width % 4:
        raise ValueError(f'width={width}; positions="sincos" needs a multiple of 4')
    if not 0.0 <= stochastic_depth < 1.0:
        raise ValueError(f"stochastic_depth={stochastic_depth} lies outside [0, 1)")


def vit_tiny_patch16_224(*, num_classes: int = 1000, rngs: nnx.Rngs) -> ViT:
    """Make ViT-Ti/16 for 224x224 images: 5,717,416 parameters with 1,000 classes."""
    return ViT(width=192, num_heads=3, num_classes=num_classes, rngs=rngs)


def vit_small_patch16_224(*, num_classes: int = 1000, rngs: nnx.Rngs) -> ViT:
    """Make ViT-S/16 for 224x224 images: 22,050,664 parameters with 1,000 classes."""
    return ViT(width=384, num_heads=6, num_classes=num_classes, rngs=rngs)


def vit_base_patch16_224(*, num_classes: int = 1000, rngs: nnx.Rngs) -> ViT:
    """Make ViT-B/16 for 224x224 images: 86,567,656 parameters with 1,000 classes."""
    return ViT(width=768, num_heads=12, num_classes=num_classes, rngs=rngs)


def vit_small_cifar(*, num_classes: int = 10, stochastic_depth: float = 0.0, rngs: nnx.Rngs) -> ViT:
    """Make a ViT for 32x32 images: 64 patches of 4x4, mean pooling; 810,890 parameters.

    It is narrow for speed: it trains on 1.8 times as many images a second as at width 192.
    Positions that start as sines are three points ahead of random ones in the first minutes of
    training.
    """
    return ViT(
        image_size=32,
        patch_size=4,
        width=128,
        depth=6,
        num_heads=2,
        mlp_ratio=2.0,
        num_classes=num_classes,
        positions="sincos",
        pooling="mean",
        stochastic_depth=stochastic_depth,
        rngs=rngs,
    )
