"""Files of learners: their arrays by name, of which the factor is made again."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

from ..codes._trees import join
from ..codes.whole_files import read_arrays, write_arrays
from .kernel import Function, Kernel
from .learner import Learner

_FORMAT = "nercc-jax learner 3"


def save_learner(
    path: str | Path, learner: Learner, about: Mapping[str, Any] | None = None
) -> None:
    """Write a learner, its window and its kernel, as an .npz file with a checksum.

    Functions (`features`, `prior`) are not written; `load_learner` asks for them again.

    Args:
        path: The file.
        learner: The learner.
        about: JSON values of the caller's choice that are kept in the file (`learner_card`).

    Raises:
        TypeError: `about` is no JSON.
        OSError: As `open`; the file is then as before.
    """
    kernel = {k: np.asarray(v) for k, v in vars(learner.kernel).items() if eqx.is_array(v)}
    arrays = {f"kernel.{name}": leaf for name, leaf in kernel.items()}
    arrays |= {f"window.{name}": np.asarray(v) for name, v in vars(learner.window).items()}
    for name in ("theta", "kappa", "scale"):
        arrays[name] = np.asarray(getattr(learner, name))
    header = {
        "format": _FORMAT,
        "shape": learner.kernel.shape,
        "features": learner.features is not None,
        "prior": learner.prior is not None,
        "outputs": [learner.form.shapes, learner.form.dtypes],
        "about": dict(about or {}),
    }
    text = json.dumps(header, allow_nan=False).encode()
    write_arrays(Path(path), arrays | {"header": np.frombuffer(text, np.uint8)})


def load_learner(
    path: str | Path,
    y: Any = None,
    *,
    features: Function | None = None,
    prior: Function | None = None,
) -> Learner:
    """Read the learner that `save_learner` wrote; it predicts the same but for rounding.

    Args:
        path: The file.
        y: Any answers of the model, where its outputs are a pytree of several arrays.
        features: The function that the learner was made with, if any.
        prior: The function that the learner was made with, if any.

    Raises:
        ValueError: The file, which is named, is damaged, has no checksum or holds no sound learner,
            or a function is missing or superfluous.
        OSError: As `open`.
    """
    header, arrays = _read(path)
    for name, given in (("features", features), ("prior", prior)):
        if header[name] != (given is not None):
            wanted = "without" if given is not None else "with"
            raise ValueError(f"{path} was made {wanted} `{name}`: load it so")
    try:
        shapes, dtypes = header["outputs"]
        if y is None:
            if len(shapes) != 1:
                raise ValueError(
                    f"its outputs are a pytree of {len(shapes)} arrays: give such a `y`"
                )
            y = np.zeros((1, *shapes[0]), dtypes[0])
        form = join(jax.tree.map(np.asarray, y), 1)[1]
        if [list(shape) for shape in form.shapes] != shapes:
            raise ValueError(f"its outputs have shapes {shapes}, `y` {form.shapes}")
        kernel, window = (
            {name.removeprefix(kind): leaf for name, leaf in arrays.items() if kind in name}
            for kind in ("kernel.", "window.")
        )
        learner = Learner(
            Kernel(header["shape"], **kernel), form, capacity=len(window["counts"]),
            features=features, prior=prior,
        )  # fmt: skip
        for name, own in vars(learner.window).items():
            if window[name].shape != own.shape or not np.isfinite(window[name]).all():
                raise ValueError(f"{name} has shape {window[name].shape}, or is not finite")
            window[name] = window[name].astype(own.dtype)
        known = [dataclasses.replace(learner.window, **window)]
        known += [arrays[name] for name in ("theta", "kappa", "scale")]
        places = lambda one: [one.window, one.theta, one.kappa, one.scale]  # noqa: E731
        return eqx.tree_at(places, learner, known).refactorized()
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no sound learner: {error}") from error


def learner_card(path: str | Path) -> dict[str, Any]:
    """Return what `save_learner` was given as `about`."""
    return _read(path)[0]["about"]


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    arrays = read_arrays(Path(path), "restore it from a copy, or learn and save it again")
    header = json.loads(bytes(arrays.pop("header", b"{}")))
    if header.get("format") != _FORMAT:
        raise ValueError(f"{path} does not say {_FORMAT!r}: it is no file of a learner")
    return header, arrays
