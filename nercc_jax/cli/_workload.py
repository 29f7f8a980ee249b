"""What commands run codes on: a model and its data points.

A shipped model with its data set, or any other (`_own_models.py`) with inputs of a file.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array

from ..codes import AbstractCode, load_code
from ..inference import call_model, check_model
from ..stragglers import AbstractStragglers, ExactStragglers
from ._errors import of_option
from ._inputs import read_inputs
from ._options import Returned
from ._own_models import EXAMPLES, example_inputs, is_own, is_shipped, load_callable, load_hub

_HELD = 1000  # inputs kept apart, at most: a fifth of fewer


class Answering(eqx.Module):
    """A network as workers run it: its logits, or their softmax."""

    network: Any
    outputs: Returned = eqx.field(static=True)

    def __call__(self, batch: Array) -> Array:
        logits = self.network(batch)
        return jax.nn.softmax(logits) if self.outputs == "probabilities" else logits

    @property
    def input_shape(self) -> tuple[int, ...] | None:
        """Of one data point, where the network tells it."""
        return getattr(self.network, "input_shape", None)

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

    try:
        data = load_data(network.network.data, split, data_dir=data_dir)
    except ValueError as error:
        raise ValueError(f"--split {split}: {error}") from error
    return Points(split, data.images, data.labels, network.network.preprocess)


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model as workers run it, and its data points: of its data set, or `x`, one a row.

    `source` is what the data points are called. Of `x`, "test" is a fifth, `_HELD` at most, the
    same for all commands, and "train" the others.
    """

    name: str
    model: Any
    source: str
    x: np.ndarray | None
    data_dir: Path | None

    def points(self, split: str, count: int, seed: int) -> np.ndarray:
        """At most so many of a split, shuffled. Raises: ValueError for one that is not there."""
        if self.x is None:
            return self.model.images(split, self.data_dir, count, seed)[0]
        if split not in ("train", "test"):
            raise ValueError(f"--split {split}: of {self.source} there are train and test")
        order = np.random.default_rng(0).permutation(len(self.x))
        held = min(_HELD, len(order) // 5)
        rows = order[:held] if split == "test" else order[held:]
        return self.x[np.random.default_rng(seed).permutation(rows)[:count]]

    def told(self, split: str) -> str:
        """What says which data points those of a split are."""
        if self.x is None:
            return split
        return hashlib.sha256(np.ascontiguousarray(self.x).tobytes()).hexdigest()

    def rows(self, split: str) -> Points:
        """All of a split in their order; all of `x`."""
        if self.x is None:
            return points_of(self.model, split, self.data_dir)
        return Points(Path(self.source).name, self.x, np.full(len(self.x), -1), np.asarray)


def find_workload(
    name: str,
    *,
    weights: Path | None = None,
    inputs: Path | None = None,
    data_dir: Path | None = None,
    outputs: Returned = "logits",
    traced: bool = True,
) -> Workload:
    """What the options of that name mean. `traced`: whether JAX must be able to trace the model.

    Inputs are float32, or as the file has them where nothing is traced.

    Raises: ValueError where there is no such model, no inputs are known, or the model does not run
    on them; ImportError naming an extra.
    """
    model = find_model(name, weights, outputs)
    if inputs is None and is_shipped(name):
        return Workload(name, model, model.network.data, None, data_dir)
    x, source = own_inputs(name, inputs)
    if traced:
        x = x.astype(np.float32)
        _check_runs(name, model, x, source)
    return Workload(name, model, source, x, None)


def find_model(name: str, weights: Path | None, outputs: Returned) -> Any:
    """The model that an option names, as workers run it. Raises: as `find_workload`."""
    if is_shipped(name):
        return answering(name, outputs)
    network = load_callable(name, weights) if is_own(name) else load_hub(name)
    return Answering(network, outputs) if outputs == "probabilities" else network


def own_inputs(name: str, path: Path | None) -> tuple[np.ndarray, str]:
    """Data points, one a row, and where they are from. Raises: ValueError where there are none."""
    if path is not None:
        return read_inputs(path), str(path)
    found = example_inputs(name) if is_own(name) else None
    if found is None:
        module = f", or give its module {EXAMPLES}()" if is_own(name) else ""
        raise ValueError(f"--model {name}: say what it is to run on with --inputs FILE{module}")
    x = np.asarray(found)
    if x.ndim < 2 or not x.size or x.dtype.kind not in "biuf":
        raise ValueError(
            f"--model {name}: {EXAMPLES}() gave {x.dtype} of shape {x.shape}: numbers, "
            "(rows, *shape of one), are needed"
        )
    return x, f"{EXAMPLES}() of {name.partition(':')[0]}"


def _check_runs(name: str, model: Any, x: np.ndarray, source: str) -> None:
    """Raises: ValueError where JAX cannot run it on a batch of `x`, or it gives no rows."""
    check_model(model)
    one = jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
    try:
        answer: Any = eqx.filter_eval_shape(lambda batch: call_model(model, batch), one)
    except Exception as error:
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"--model {name} does not run on a batch of shape {one.shape}, of {source}, which JAX "
            f"traces (`nercc run --tolerance` traces nothing): {first}"
        ) from error
    if getattr(answer, "shape", ())[:1] != (1,) or len(answer.shape) < 2:
        told = f"--model {name} must give an array, a row for each of a batch"
        got = type(answer).__name__
        if isinstance(answer, jax.ShapeDtypeStruct):
            got = f"{answer.dtype} of shape {answer.shape} for {one.shape}"
        raise ValueError(f"{told}, not {got}")


def answering(model: str, outputs: Returned) -> Answering:
    """A shipped model by name."""
    from nercc_models import load_model

    return Answering(load_model(model), outputs)


def load_plain_code(path: Path, told: str) -> AbstractCode:
    """A code from its file, for workers that all run the served model; `told` names it in errors.

    Raises: ValueError for a code whose workers run further models beside it, and as `load_code`.
    """
    with of_option(told):
        code = load_code(path)
    if code.worker_models.any():
        raise ValueError(
            f"{told}: {type(code).__name__} has workers that run other models; here all run the "
            "served one"
        )
    return code


def enough(x: np.ndarray, source: str, num_data: int, groups: int, option: str) -> np.ndarray:
    """These data points. Raises: ValueError, saying what to change, where they fill no group, or
    not so many."""
    if len(x) < groups * num_data:
        what = f"no group of {num_data}" if groups == 1 else f"no {groups} groups of {num_data}"
        raise ValueError(
            f"{len(x)} data points fill {what}: those that {option} leaves of {source}; ask for "
            "more of them, or for a smaller --num-data"
        )
    return x


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
