"""What commands run codes on: a shipped model and images of its data set."""

import dataclasses
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array

from ..codes import AbstractCode, load_code
from ..stragglers import AbstractStragglers, ExactStragglers
from ._options import Outputs


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


@dataclasses.dataclass(frozen=True)
class Points:
    """Data points as they are kept, what makes inputs of them, and labels, -1 if not known."""

    name: str
    images: np.ndarray
    labels: np.ndarray
    preprocess: Callable[[np.ndarray], Any]


def points_of(network: Answering, split: str, data_dir: Path | None) -> Points:
    """A split of a shipped model's data set."""
    from nercc_models import load_data

    data = load_data(network.network.data, split, data_dir=data_dir)
    return Points(split, data.images, data.labels, network.network.preprocess)


def own_points(path: Path) -> Points:
    """Of a .npy file. Raises: ValueError where it holds none."""
    found = read_array(path, f"--data {path}")
    if found.ndim < 2 or not len(found):
        raise ValueError(f"--data {path}: (points, *shape of one) is needed, not {found.shape}")
    return Points(path.name, found, np.full(len(found), -1), np.asarray)


def answering(model: str, outputs: Outputs) -> Answering:
    """A shipped model by name."""
    from nercc_models import load_model

    return Answering(load_model(model), outputs)


def load_plain_code(path: Path, told: str) -> AbstractCode:
    """A code from its file, for workers that all run the served model; `told` names it in errors.

    Raises: ValueError for a code whose workers run further models beside it, and as `load_code`.
    """
    code = load_code(path)
    if code.worker_models.any():
        raise ValueError(
            f"{told}: {type(code).__name__} has workers that run other models; here all run the "
            "served one"
        )
    return code


def straggler_laws(
    num_data: int, num_workers: int, max_stragglers: int | None
) -> dict[str, AbstractStragglers]:
    """Every number of stragglers from 0 to `max_stragglers`, N - K unless given, by name.

    Raises: ValueError where that leaves no worker, or is negative.
    """
    if max_stragglers is None:
        max_stragglers = max(num_workers - num_data, 0)
    if not 0 <= max_stragglers < num_workers:
        raise ValueError(
            f"--max-stragglers {max_stragglers} leaves none of {num_workers} workers to answer"
        )
    return {str(s): ExactStragglers(s) for s in range(max_stragglers + 1)}


def read_arrays(path: Path, told: str) -> np.ndarray | dict[str, np.ndarray]:
    """A .npy file's array, or those of an .npz file by name, as `read_array`."""
    if path.suffix != ".npz":
        return read_array(path, told)
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name].astype(np.float32) for name in file.files}
    except (ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{told} has no arrays of numbers by name: {error}") from error


def read_array(path: Path, told: str) -> np.ndarray:
    """A .npy file's array, float32; `told` names it in errors.

    Raises: ValueError where it holds no numbers, OSError as `open` does.
    """
    try:
        with path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False).astype(np.float32)
    except ValueError as error:
        raise ValueError(f"{told} is no array of numbers: {error}") from error
