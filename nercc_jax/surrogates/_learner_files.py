"""Files of learners, in the safetensors format."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..codes._trees import Form, join
from ..codes.whole_files import NO_CHECKSUM, read_checked, write_checked
from ._components import ComponentLearner
from ._kernels import Kernel
from ._learner import Learner
from ._pairs import Function, one_row
from ._surrogate import trust as sound_trust

_FORMAT = "nercc-jax learner"
_VERSION = "2"
# The covariances and their factor are made anew from these.
_WINDOW = ("inputs", "residuals", "priors", "counts", "scatter", "place")
_KERNEL = ("groups", "centre", "unit", "widths", "linear", "noise")
_TRUST = ("theta", "kappa")
# What a component has for itself: the rest of its window is that of all.
_OWN = ("residuals", "scatter")


def save_learner(
    path: str | Path,
    learner: Learner | ComponentLearner,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write a learner: its window, its kernels, and the version of the model that it learned from.

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
    _needs_safetensors()
    from safetensors.numpy import save

    whole = learner if isinstance(learner, Learner) else learner.rest
    parts = (
        _named(learner, _TRUST)
        | _named(whole.window, _WINDOW)
        | _named(whole.kernel, _KERNEL, "kernel")
        | {"scale": whole.scale}
    )
    if isinstance(learner, ComponentLearner):
        parts |= {"directions": learner.directions, "own.scale": learner.own.scale}
        parts |= _named(learner.own.window, _OWN, "own")
        parts |= _named(learner.own.kernel, _KERNEL, "own.kernel")
    arrays = {name: np.asarray(leaf) for name, leaf in parts.items() if leaf is not None}
    header = {
        "format": _FORMAT,
        "format_version": _VERSION,
        "checksum": NO_CHECKSUM,
        "shape": whole.kernel.shape,
        "version": learner.version,
        "features": str(learner.features is not None),
        "prior": str(learner.prior is not None),
        "outputs": json.dumps([learner.form.shapes, learner.form.dtypes]),
        "about": json.dumps(dict(about or {}), allow_nan=False),
    }
    write_checked(Path(path), save(arrays, metadata=header))


def _named(of: Any, names: Sequence[str], prefix: str = "") -> dict[str, Any]:
    return {f"{prefix}.{name}" if prefix else name: getattr(of, name) for name in names}


def load_learner(
    path: str | Path,
    y: Any = None,
    *,
    features: Function | None = None,
    prior: Function | None = None,
    version: str | None = None,
) -> Learner | ComponentLearner:
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
        return _learner(header, arrays, y, features, prior)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no sound learner: {error}") from error


def learner_card(path: str | Path) -> dict[str, Any]:
    """Return what `save_learner` was given as `about`."""
    return json.loads(_read(path)[0]["about"])


def _read(path: str | Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    _needs_safetensors()
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


def _needs_safetensors() -> None:
    if importlib.util.find_spec("safetensors") is None:
        raise ImportError("files of learners need safetensors: pip install '.[demo]' in a clone")


def _learner(
    header: dict[str, str],
    arrays: dict[str, np.ndarray],
    y: Any,
    features: Function | None,
    prior: Function | None,
) -> Learner | ComponentLearner:
    form = _form(header, y)
    trust: dict[str, Any] = {name: arrays[name] for name in _TRUST if name in arrays}
    named = {"shape": header["shape"], "version": header["version"]}
    if "directions" not in arrays:
        return _plain(arrays, form, features=features, prior=prior, **named, **trust)
    directions = arrays["directions"]
    number = directions.shape[-1]
    if directions.shape != (form.size, number) or not np.isfinite(directions).all():
        raise ValueError(f"directions of {form.size} outputs have shape {directions.shape}")
    rest = _plain(arrays, _form_of_rows(form.size), **named)
    window = {name: arrays[name] for name in (*_WINDOW, "scale") if name in arrays}
    each = {name.removeprefix("own."): a for name, a in arrays.items() if name.startswith("own.")}
    own = [
        _plain(
            window | {name: array[i] for name, array in each.items()},
            _form_of_rows(1),
            shape=header["shape"],
        )
        for i in range(number)
    ]
    theta, kappa = sound_trust(**trust)
    return ComponentLearner(
        features=features,
        prior=prior,
        directions=jnp.asarray(directions),
        own=jax.tree.map(lambda *leaves: jnp.stack(leaves), *own),
        rest=rest,
        theta=theta,
        kappa=kappa,
        form=form,
    )


def _form(header: dict[str, str], y: Any) -> Form:
    """Return the outputs' form; raise ValueError where it is unknown, or `y` has another."""
    shapes, dtypes = json.loads(header["outputs"])
    if y is None:
        if len(shapes) != 1:
            raise ValueError(f"its outputs are a pytree of {len(shapes)} arrays: give such a `y`")
        y = jnp.zeros((1, *shapes[0]), dtypes[0])
    form = join(one_row(jax.tree.map(jnp.asarray, y)), 1)[1]
    if [list(shape) for shape in form.shapes] != shapes:
        raise ValueError(f"its outputs have shapes {shapes}, `y` {form.shapes}")
    return form


def _form_of_rows(size: int) -> Form:
    return join(jnp.zeros((1, size)), 1)[1]


def _plain(arrays: Mapping[str, np.ndarray], form: Form, *, shape: str, **options: Any) -> Learner:
    """Return a learner of these arrays; raise ValueError where they are not sound."""
    numbers: dict[str, Any] = {name: arrays[f"kernel.{name}"] for name in _KERNEL}
    kernel = Kernel(shape, **numbers)  # pyright: ignore[reportArgumentType]
    learner = Learner(kernel, form, capacity=len(arrays["counts"]), **options)
    names = [name for name in _WINDOW if getattr(learner.window, name) is not None]

    def parts(one: Learner) -> list[Array]:
        return [*(getattr(one.window, name) for name in names), one.scale]

    found = []
    for name, own in zip([*names, "scale"], parts(learner), strict=True):
        if arrays[name].shape != own.shape:
            raise ValueError(f"{name} has shape {arrays[name].shape}")
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"{name} is not finite")
        found.append(jnp.asarray(arrays[name], own.dtype))
    return eqx.tree_at(parts, learner, found).refactorized()
