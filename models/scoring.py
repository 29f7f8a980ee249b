"""How many labels a classifier gets right."""

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
        return self.correct / self.total


def score(classify: Callable[[Any], Any], data: Data, *, batch_size: int = 500) -> Score:
    """Score `classify`, stored images (B, H, W, C) to logits (B, classes), on all of `data`.

    The last batch is filled up with copies, so that one compiled program serves every batch.
    """
    if len(data) == 0:
        raise ValueError(f"The data set {data.name!r} is empty: there is nothing to score.")
    correct = 0
    for batch in data.batches(batch_size):
        padding = [(0, batch_size - len(batch)), (0, 0), (0, 0), (0, 0)]
        logits = classify(jnp.asarray(np.pad(batch.images, padding, mode="edge")))
        guesses = np.argmax(np.asarray(logits), axis=-1)[: len(batch)]
        correct += int(np.sum(guesses == batch.labels))
    return Score(correct, len(data))
