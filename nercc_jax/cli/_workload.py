"""What commands run codes on: a shipped model and images of its data set."""

from pathlib import Path
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array

Outputs: TypeAlias = Literal["logits", "probabilities"]


class Answering(eqx.Module):
    """A network as workers run it: its logits, or their softmax."""

    network: Any
    outputs: Outputs = eqx.field(static=True)

    def __call__(self, batch: Array) -> Array:
        logits = self.network(batch)
        return jax.nn.softmax(logits) if self.outputs == "probabilities" else logits

    def images(
        self, split: str, data_dir: Path | None, count: int, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """At most `count` preprocessed images of the network's data set, shuffled, and labels."""
        from nercc_models import load_data

        data = load_data(self.network.data, split, data_dir=data_dir)
        chosen = np.random.default_rng(seed).permutation(len(data.labels))[:count]
        return np.asarray(self.network.preprocess(data.images[chosen])), data.labels[chosen]


def answering(model: str, outputs: Outputs) -> Answering:
    """A shipped model by name."""
    from nercc_models import load_model

    return Answering(load_model(model), outputs)


def check_folder(option: str, path: Path) -> None:
    """Raises: ValueError where the path's folder does not exist: before the work, not after it."""
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {path.parent}")
