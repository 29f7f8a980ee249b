"""Models of users' sizes for serving.py, with random weights: what is measured is the server."""

import functools
from typing import Any

import jax
import numpy as np

SHAPES = {"wide": (64,), "images": (224, 224, 3)}
_OUTPUTS, _HIDDEN, _PATCH = 1000, 256, 16


def wide(x: Any) -> Any:
    """Map (B, 64) to (B, 1000) by two layers."""
    return _head("wide", x, 64)


def images(x: Any) -> Any:
    """Map (B, 224, 224, 3) to (B, 1000): patches as a ViT has them, their mean, two layers.

    Some 60 million operations a query, a millisecond on one core: what a server adds shows.
    """
    side = 224 // _PATCH
    patches = x.reshape(-1, side, _PATCH, side, _PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    kernel = _weights("patches", _PATCH * _PATCH * 3, _HIDDEN)
    embedded = jax.nn.gelu(patches.reshape(-1, side * side, kernel.shape[0]) @ kernel)
    return _head("images", embedded.mean(axis=1), _HIDDEN)


def prepare(x: Any) -> Any:
    """Map (B, 224, 224, 3) bytes to the floats that `images` takes."""
    return x.astype(np.float32) / 127.5 - 1


def _head(name: str, x: Any, width: int) -> Any:
    hidden = jax.nn.gelu(x @ _weights(f"{name} hidden", width, _HIDDEN))
    return hidden @ _weights(f"{name} out", _HIDDEN, _OUTPUTS)


@functools.cache
def _weights(name: str, rows: int, columns: int) -> np.ndarray:
    rng = np.random.default_rng(list(name.encode()))
    return rng.normal(0, rows**-0.5, (rows, columns)).astype(np.float32)
