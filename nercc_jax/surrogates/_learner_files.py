"""Learners to and from files: safetensors, whose header says what it is."""

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..codes import join, write_whole
from ._kernels import Kernel
from ._learner import Learner
from ._pairs import Function
from ._window import one_row

_FORMAT = "nercc-jax learner"
_VERSION = "1"
# The covariances and their factor are made anew from these.
_WINDOW = ("inputs", "residuals", "priors", "filled", "place", "scale")
_KERNEL = ("groups", "centre", "unit", "widths", "linear", "noise")


def save_learner(
    path: str | Path, learner: Learner, about: Mapping[str, Any] | None = None
) -> None:
    """Writes a learner: its window, its kernel, and the version of the model it learned from.

    Functions (`features`, `prior`) are not written: `load_learner` asks for them again. `about`,
    JSON values of the caller's choice, is kept beside it. Raises: TypeError where `about` is no
    JSON, OSError as `open` does (the file is as before then), ImportError without the package
    safetensors.
    """
    _needs_safetensors()
    from safetensors.numpy import save

    window = {name: getattr(learner, name) for name in _WINDOW}
    kernel = {f"kernel.{name}": getattr(learner.kernel, name) for name in _KERNEL}
    arrays = {n: np.asarray(leaf) for n, leaf in (window | kernel).items() if leaf is not None}
    header = {
        "format": _FORMAT,
        "format_version": _VERSION,
        "shape": learner.kernel.shape,
        "version": learner.version,
        "features": str(learner.features is not None),
        "prior": str(learner.prior is not None),
        "outputs": json.dumps([learner.form.shapes, learner.form.dtypes]),
        "about": json.dumps(dict(about or {}), allow_nan=False),
    }
    content = save(arrays, metadata=header)
    write_whole(Path(path), lambda file: file.write(content))


def load_learner(
    path: str | Path,
    y: Any = None,
    *,
    features: Function | None = None,
    prior: Function | None = None,
    version: str | None = None,
) -> Learner:
    """The learner that `save_learner` wrote, predicting as it did but for rounding.

    `features` and `prior` as it was made with. `y`: any answers as the model gives them, for a
    model whose outputs are a pytree; vectors and single arrays need none. With a `version`, a
    learner of another version of the model is refused.

    Raises: ValueError, naming the file, where it is no such file or holds no sound learner, it is
    of another version, or functions are given that it was made without, or the reverse; OSError as
    `open` does.
    """
    header, arrays = _read(path)
    if version is not None and header["version"] != version:
        raise ValueError(
            f"{path} learned from version {header['version']!r} of the model, not {version!r}"
        )
    for name, given in (("features", features), ("prior", prior)):
        if header[name] != str(given is not None):
            wanted = "without" if given is not None else "with"
            raise ValueError(f"{path} was made {wanted} `{name}`: load it so")
    try:
        return _learner(header, arrays, y, features, prior)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no sound learner: {error}") from error


def learner_card(path: str | Path) -> dict[str, Any]:
    """What a file says of its learner beside it: `about`, as given to `save_learner`."""
    return json.loads(_read(path)[0]["about"])


def _read(path: str | Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    _needs_safetensors()
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(Path(path), framework="numpy") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, so none of a learner: {error}") from error
    if header.get("format") != _FORMAT:
        raise ValueError(f"{path} does not say format {_FORMAT!r}: it is no file of a learner")
    if header.get("format_version") != _VERSION:
        raise ValueError(
            f"{path} is of format {header.get('format_version')}; this nercc-jax reads {_VERSION}"
        )
    return header, arrays


def _needs_safetensors() -> None:
    if importlib.util.find_spec("safetensors") is None:
        raise ImportError("files of learners need safetensors: pip install 'nercc-jax[demo]'")


def _learner(
    header: dict[str, str],
    arrays: dict[str, np.ndarray],
    y: Any,
    features: Function | None,
    prior: Function | None,
) -> Learner:
    numbers = {name: arrays[f"kernel.{name}"] for name in _KERNEL}
    kernel = Kernel(header["shape"], **numbers)  # pyright: ignore[reportArgumentType]
    shapes, dtypes = json.loads(header["outputs"])
    if y is None:
        if len(shapes) != 1:
            raise ValueError(f"its outputs are a pytree of {len(shapes)} arrays: give such a `y`")
        y = jnp.zeros((1, *shapes[0]), dtypes[0])
    form = join(one_row(jax.tree.map(jnp.asarray, y)), 1)[1]
    if [list(shape) for shape in form.shapes] != shapes:
        raise ValueError(f"its outputs have shapes {shapes}, `y` {form.shapes}")
    learner = Learner(
        kernel,
        form,
        capacity=len(arrays["filled"]),
        features=features,
        prior=prior,
        version=header["version"],
    )
    fields = [name for name in _WINDOW if getattr(learner, name) is not None]
    for name in fields:
        if arrays[name].shape != getattr(learner, name).shape:
            raise ValueError(f"{name} has shape {arrays[name].shape}")
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"{name} is not finite")
    loaded = eqx.tree_at(
        lambda learner: [getattr(learner, name) for name in fields],
        learner,
        [jnp.asarray(arrays[name], getattr(learner, name).dtype) for name in fields],
    )
    return loaded.refreshed()
