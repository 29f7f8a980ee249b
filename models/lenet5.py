"""LeNet5 (LeCun et al., 1998) as it is trained today: ReLU, max pooling, a plain linear output."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Real

INPUT_SHAPE = (32, 32, 1)


class LeNet5(nnx.Module):
    """Two 5x5 convolutions, three linear layers; 61,706 parameters for ten classes.

    Maps images (B, 32, 32, 1), float, to logits (B, num_classes). The names of the layers are those
    of the usual PyTorch version.
    """

    def __init__(self, num_classes: int = 10, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 6, (5, 5), padding="VALID", rngs=rngs)
        self.conv2 = nnx.Conv(6, 16, (5, 5), padding="VALID", rngs=rngs)
        self.fc1 = nnx.Linear(16 * 5 * 5, 120, rngs=rngs)
        self.fc2 = nnx.Linear(120, 84, rngs=rngs)
        self.fc3 = nnx.Linear(84, num_classes, rngs=rngs)

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch classes"]:
        """Return logits of a preprocessed batch.

        Raises:
            ValueError: Images are not (B, 32, 32, 1).
        """
        if images.ndim != 4 or images.shape[1:] != INPUT_SHAPE:
            raise ValueError(f"LeNet5 takes images (B, 32, 32, 1); got shape {images.shape}.")
        x = nnx.max_pool(jax.nn.relu(self.conv1(images)), (2, 2), strides=(2, 2))
        x = nnx.max_pool(jax.nn.relu(self.conv2(x)), (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)  # height, width, channel: PyTorch's order is channel first
        return self.fc3(jax.nn.relu(self.fc2(jax.nn.relu(self.fc1(x)))))


def preprocess_mnist(
    images: Real[Array, "batch 28 28 1"] | Real[np.ndarray, "batch 28 28 1"],
) -> Float[Array, "batch 32 32 1"]:
    """Scale MNIST's grey levels 0 to 255 to 0 to 1, and add the frame of two pixels."""
    scaled = jnp.asarray(images, jnp.float32) / 255
    return jnp.pad(scaled, ((0, 0), (2, 2), (2, 2), (0, 0)))


def preprocess_digits(
    images: Real[Array, "batch 8 8 1"] | Real[np.ndarray, "batch 8 8 1"],
) -> Float[Array, "batch 32 32 1"]:
    """Scale scikit-learn's grey levels 0 to 16 to 0 to 1, and resize 8x8 to 32x32 (bilinear)."""
    scaled = jnp.asarray(images, jnp.float32) / 16
    return jax.image.resize(scaled, (scaled.shape[0], *INPUT_SHAPE), "bilinear")
