"""Parameters to and from safetensors files: one flat table of dotted names."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def _import_safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "Weights are stored as safetensors: pip install '.[demo]' in a clone."
        ) from error
    return safetensors.numpy


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(str(part) for part in path)


def named_arrays(state: nnx.State) -> dict[str, Any]:
    """Return the arrays of a Flax state by dotted name, such as `stages.0.1.conv.kernel`."""
    return {_dotted(path): variable[...] for path, variable in nnx.to_flat_state(state)}


def with_arrays(state: nnx.State, arrays: Mapping[str, Any]) -> nnx.State:
    """Return a copy of `state` that holds `arrays`, by dotted name, in the types of `state`.

    `state` may be abstract (`jax.eval_shape`).

    Raises:
        ValueError: Arrays are missing, unexpected or wrongly shaped; the message names them.
    """
    flat = list(nnx.to_flat_state(state))
    shapes = {_dotted(path): tuple(variable.shape) for path, variable in flat}
    problems = [f"missing: {name} {shapes[name]}" for name in shapes.keys() - arrays.keys()]
    problems += [f"unexpected: {name}" for name in arrays.keys() - shapes.keys()]
    problems += [
        f"{name} has shape {np.shape(arrays[name])}, the model wants {shape}"
        for name, shape in shapes.items()
        if name in arrays and np.shape(arrays[name]) != shape
    ]
    if problems:
        raise ValueError("These weights do not fit the model. " + "; ".join(sorted(problems)))
    filled = [
        (path, variable.replace(jnp.asarray(arrays[_dotted(path)], variable.dtype)))
        for path, variable in flat
    ]
    return nnx.from_flat_state(filled)


def save_weights(path: str | Path, state: nnx.State, dtype: Any = np.float16) -> int:
    """Write a state's arrays as `dtype`; returns the size of the file in bytes."""
    with np.errstate(over="ignore"):  # refused below, by name
        arrays = {name: np.asarray(array, dtype) for name, array in named_arrays(state).items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds a value that is not finite as {np.dtype(dtype).name}.")
    _import_safetensors().save_file(arrays, str(path))
    Path(path).chmod(0o644)  # safetensors leaves it readable by its owner alone
    return Path(path).stat().st_size


def load_weights(path: str | Path, state: nnx.State, sha256: str | None = None) -> nnx.State:
    """Read the arrays that `save_weights` wrote into a state of the same structure.

    Raises:
        ValueError: The file does not have the given hash, is no such file, or does not fit.
    """
    content = Path(path).read_bytes()
    if sha256 not in (None, hashlib.sha256(content).hexdigest()):
        raise ValueError(
            f"{path} is damaged, or its card is another file's: its SHA-256 is not the card's; "
            "restore both from a copy, or train again"
        )
    safetensors = _import_safetensors()
    from safetensors import SafetensorError

    try:
        arrays = safetensors.load(content)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    return with_arrays(state, arrays)


def num_parameters(state: Any) -> int:
    """Return the number of numbers that the arrays of a pytree hold."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state))
