"""Files of codes: JSON with the kind of code and every number to the last bit."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from ..arrays import read_entries, write_entries
from ._berrut_spline import BerrutSpline
from ._lagrange import Lagrange
from ._nercc import NeRCC
from ._parity import Parity
from ._replication import Replication, Uncoded
from .berrut import Berrut
from .code import AbstractCode
from .learned_decoder import LearnedDecoder

_ENTRIES = {"code", "numbers", "dtypes", "about"}
# Numbers that codes got later: a file without them means the constructor's default.
_LATER = {"exact", "ends"}
_KINDS = {
    kind.__name__: kind
    for kind in (
        Berrut, BerrutSpline, Lagrange, LearnedDecoder, NeRCC, Parity, Replication, Uncoded,
    )
}  # fmt: skip


def save_code(path: str | Path, code: AbstractCode, about: Mapping[str, Any] | None = None) -> None:
    """Write a code as JSON: version, kind, numbers (points and lambdas), their dtype.

    A code of your own is a pytree, which `eqx.tree_serialise_leaves(path, code)` writes, and
    `eqx.tree_deserialise_leaves(path, like)` reads into a code of the same class and sizes.

    Args:
        path: The file.
        code: The code.
        about: JSON values of the caller's choice that are kept in the file (`code_card`), such as
            what it was tuned on.

    Raises:
        ValueError: The code is not one of this package's, or its numbers are not finite.
        TypeError: `about` is not JSON.
        OSError: As `open`; the file is then unchanged.
    """
    kind = type(code).__name__
    if _KINDS.get(kind) is not type(code):
        raise ValueError(
            f"{kind} is none of the codes that files hold: {', '.join(_KINDS)}; save the numbers "
            "of another one by eqx.tree_serialise_leaves(path, code)"
        )
    leaves = {field.name: getattr(code, field.name) for field in dataclasses.fields(code)}
    arrays = {name: np.asarray(leaf) for name, leaf in leaves.items() if eqx.is_array(leaf)}
    if broken := [name for name, value in arrays.items() if not np.isfinite(value).all()]:
        raise ValueError(f"{', '.join(broken)} of this code are not finite")
    # The shortest decimals that give these numbers back: half as long as those of float64.
    numbers = leaves | {
        name: each.astype(str).astype(float).tolist() for name, each in arrays.items()
    }
    content = {
        "code": kind,
        "numbers": numbers,
        "dtypes": {name: str(value.dtype) for name, value in arrays.items()},
        "about": dict(about or {}),
    }
    json.dumps(content, allow_nan=False)  # raises for NaN, which other programs cannot read
    write_entries(Path(path), "code", content)


def load_code(path: str | Path) -> AbstractCode:
    """Read the code that `save_code` wrote, with the same matrices to the last bit.

    A code of float64 numbers loses digits where JAX's x64 is off.

    Raises:
        ValueError: The named file is damaged, not a file of a code, of a later version, or its
            numbers do not make a code. A file without a checksum, such as one that you wrote, is
            read without a check.
        OSError: As `open`.
    """
    content = _read(path)
    kind = _KINDS.get(str(content["code"]))
    if kind is None:
        raise ValueError(f"{path} holds a {content['code']!r}; known: {', '.join(_KINDS)}")
    try:
        numbers = dict(content["numbers"])
        for name, dtype in content["dtypes"].items():
            numbers[name] = jnp.asarray(np.asarray(numbers[name], dtype))
        fields = {field.name for field in dataclasses.fields(kind)}
        if not fields - _LATER <= numbers.keys() <= fields:
            raise ValueError(f"its numbers are {sorted(numbers)}, not {sorted(fields)}")
        if "alpha" in numbers:
            numbers["points"] = (numbers.pop("alpha"), numbers.pop("beta"))
        return kind(**numbers)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no sound {content['code']}: {error}") from error


def code_card(path: str | Path) -> dict[str, Any]:
    """Return the JSON values that `save_code` was given as `about`."""
    return _read(path)["about"]


def _read(path: str | Path) -> dict[str, Any]:
    remedy = "restore it from a copy, or write it again"
    return read_entries(Path(path), "code", _ENTRIES, remedy, editable=True)
