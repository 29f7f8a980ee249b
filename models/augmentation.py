"""Random changes to training images, one jitted program for a whole batch."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Changes to each training image; every number is in pixels, and zero switches it off.

    Attributes:
        padding: Zeros around the image, from which the original size is cut out at a random place.
        flip: Whether to mirror left to right with probability one half.
        cutout: Edge of a square at a random place that becomes zero (DeVries and Taylor, 2017).
        mixup: Mix each image and label with another of the batch, in shares drawn from Beta(mixup,
            mixup) (Zhang et al., 2018).
    """

    padding: int = 0
    flip: bool = False
    cutout: int = 0
    mixup: float = 0.0


def augment(
    key: PRNGKeyArray,
    images: Float[Array, "batch height width channels"],
    targets: Float[Array, "batch classes"],
    how: Augmentation,
) -> tuple[Float[Array, "batch height width channels"], Float[Array, "batch classes"]]:
    """Return the changed images, and the label distributions, which mixup mixes, too."""
    crop_key, flip_key, cutout_key, mixup_key = jax.random.split(key, 4)
    if how.padding:
        images = _random_crop(crop_key, images, how.padding)
    if how.flip:
        mirrored = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    if how.cutout:
        images = _cutout(cutout_key, images, how.cutout)
    if how.mixup:
        images, targets = _mixup(mixup_key, images, targets, how.mixup)
    return images, targets


def _random_crop(key: PRNGKeyArray, images: Array, padding: int) -> Array:
    margins = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(images, margins)
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * padding + 1)

    def cut(image: Array, corner: Array) -> Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:])

    return jax.vmap(cut)(padded, corners)


def _cutout(key: PRNGKeyArray, images: Array, edge: int) -> Array:
    """Zero a square with its centre anywhere in the image, so that a part may lie outside."""
    batch, height, width, _ = images.shape
    centres = jax.random.uniform(key, (2, batch, 1)) * jnp.array([[[height]], [[width]]])
    rows = jnp.abs(jnp.arange(height) + 0.5 - centres[0]) < edge / 2
    columns = jnp.abs(jnp.arange(width) + 0.5 - centres[1]) < edge / 2
    hidden = rows[:, :, None] & columns[:, None, :]
    return jnp.where(hidden[..., None], 0.0, images)


def _mixup(key: PRNGKeyArray, images: Array, targets: Array, shape: float) -> tuple[Array, Array]:
    """Mix with one share for the batch; the partners are the same batch in reverse."""
    share = jax.random.beta(key, shape, shape)
    images = share * images + (1 - share) * images[::-1]
    return images, share * targets + (1 - share) * targets[::-1]
