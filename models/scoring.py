"""Accuracy of classifiers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from .data import Data


@dataclasses.dataclass(frozen=True)
class Score:
    """`correct` of `total` images were given their true label."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Return the share of right labels."""
        return self.correct / self.total


def score(classify: Callable[[Any], Any], data: Data, *, batch_size: int = 500) -> Score:
    """Score `classify`, stored images (B, H, W, C) to logits (B, classes), on all of `data`."""
    if len(data) == 0:
        raise ValueError(f"The data set {data.name!r} is empty: there is nothing to score.")
    guesses = np.argmax(in_batches(classify, data.images, batch_size), axis=-1)
    return Score(int(np.sum(guesses == data.labels)), len(data))


def in_batches(function: Callable[[Any], Any], x: np.ndarray, batch_size: int = 500) -> np.ndarray:
    """Return `function`, (B, ...) to (B, ...), of all rows of `x` (at least one), in batches.

    The last batch is filled up with copies, so that one compiled program serves every batch.
    """
    parts = []
    for start in range(0, len(x), batch_size):
        batch = x[start : start + batch_size]
        padding = [(0, batch_size - len(batch))] + [(0, 0)] * (x.ndim - 1)
        y = function(jnp.asarray(np.pad(batch, padding, mode="edge")))
        parts.append(np.asarray(y)[: len(batch)])
    return np.concatenate(parts)
