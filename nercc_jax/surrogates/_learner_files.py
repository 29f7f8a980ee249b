"""Files of learners, in the safetensors format."""

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from ..codes._trees import join
from ..codes.whole_files import NO_CHECKSUM, read_checked, write_checked
from .kernel import Function, Kernel
from .learner import Learner

_FORMAT = "nercc-jax learner"
_VERSION = "2"
# The factor is made again from these. Rows may be a ring that begins at `place`: earlier releases
# wrote such windows.
_WINDOW = ("inputs", "residuals", "priors", "counts", "scatter")
_KERNEL = ("groups", "centre", "unit", "widths", "linear", "noise")
_TRUST = ("theta", "kappa")


def save_learner(
    path: str | Path,
    learner: Learner,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write a learner: its window, its kernel, and the version of the model that it learned from.

    Functions (`features`, `prior`) are not written; `load_learner` asks for them again.

    Args:
        path: The file.
        learner: The learner.
        about: JSON values of the caller's choice that are kept in the file (`learner_card`).

    Raises:
        TypeError: `about` is no JSON.
        OSError: As `open`; the file is then as before.
        ImportError: The package safetensors is missing.
    """
    _check_package()
    from safetensors.numpy import save

    parts = {name: getattr(learner, name) for name in (*_TRUST, "scale")}
    parts["place"] = np.asarray(int(learner.size) % learner.capacity, np.int32)
    parts |= {name: getattr(learner.window, name) for name in _WINDOW}
    parts |= {f"kernel.{name}": getattr(learner.kernel, name) for name in _KERNEL}
    arrays = {name: np.array(leaf) for name, leaf in parts.items() if leaf is not None}
    header = {
        "format": _FORMAT,
        "format_version": _VERSION,
        "checksum": NO_CHECKSUM,
        "shape": learner.kernel.shape,
        "version": learner.version,
        "features": str(learner.features is not None),
        "prior": str(learner.prior is not None),
        "outputs": json.dumps([learner.form.shapes, learner.form.dtypes]),
        "about": json.dumps(dict(about or {}), allow_nan=False),
    }
    write_checked(Path(path), save(arrays, metadata=header))


def load_learner(
    path: str | Path,
    y: Any = None,
    *,
    features: Function | None = None,
    prior: Function | None = None,
    version: str | None = None,
) -> Learner:
    """Read the learner that `save_learner` wrote; it predicts the same but for rounding.

    Args:
        path: The file.
        y: Any answers of the model, where its outputs are a pytree of several arrays.
        features: The function that the learner was made with, if any.
        prior: The function that the learner was made with, if any.
        version: A model version; a learner of another one is refused.

    Raises:
        ValueError: The file, which is named, is damaged, has no checksum, holds no sound learner or
            one of another version, or a function is missing or superfluous.
        OSError: As `open`.
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
        shapes, dtypes = json.loads(header["outputs"])
        if y is None:
            if len(shapes) != 1:
                raise ValueError(
                    f"its outputs are a pytree of {len(shapes)} arrays: give such a `y`"
                )
            y = np.zeros((1, *shapes[0]), dtypes[0])
        form = join(jax.tree.map(np.asarray, y), 1)[1]
        if [list(shape) for shape in form.shapes] != shapes:
            raise ValueError(f"its outputs have shapes {shapes}, `y` {form.shapes}")
        numbers: dict[str, Any] = {name: arrays[f"kernel.{name}"] for name in _KERNEL}
        kernel = Kernel(header["shape"], **numbers)  # pyright: ignore[reportArgumentType]
        counts = arrays["counts"]
        functions: dict[str, Any] = {"features": features, "prior": prior}
        trust: dict[str, Any] = {name: arrays[name] for name in _TRUST if name in arrays}
        learner = Learner(
            kernel, form, capacity=len(counts), version=header["version"], **functions, **trust
        )
        for name in (*_WINDOW, "scale"):
            own = getattr(learner if name == "scale" else learner.window, name)
            if own is None:
                continue
            if arrays[name].shape != own.shape:
                raise ValueError(f"{name} has shape {arrays[name].shape}")
            if not np.isfinite(arrays[name]).all():
                raise ValueError(f"{name} is not finite")
            arrays[name] = arrays[name].astype(own.dtype)
        order = np.roll(np.arange(len(counts)), -int(arrays["place"]))
        order = order[np.argsort(counts[order] == 0, stable=True)]  # the oldest first, and no gaps
        rows = {name: arrays[name][order] for name in _WINDOW if name in arrays}
        known = dataclasses.replace(learner.window, **rows), arrays["scale"]
        return eqx.tree_at(lambda one: (one.window, one.scale), learner, known).refactorized()
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no sound learner: {error}") from error


def learner_card(path: str | Path) -> dict[str, Any]:
    """Return what `save_learner` was given as `about`."""
    return json.loads(_read(path)[0]["about"])


def _read(path: str | Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    _check_package()
    from safetensors import SafetensorError
    from safetensors.numpy import load

    content = read_checked(Path(path), "restore it from a copy, or learn and save it again")
    try:
        arrays = load(content)
        # The header's length in eight bytes, and then the header, as JSON.
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is no safetensors file of a learner: {error}") from error
    if header.get("format") != _FORMAT:
        raise ValueError(f"{path} does not say format {_FORMAT!r}: it is no file of a learner")
    if header.get("format_version") != _VERSION:
        raise ValueError(
            f"{path} is of format {header.get('format_version')}; this nercc-jax reads {_VERSION}"
        )
    return header, arrays


def _check_package() -> None:
    if importlib.util.find_spec("safetensors") is None:
        raise ImportError("files of learners need safetensors: pip install '.[demo]' in a clone")
