"""Settings as text, from a flag or a variable, where a file has tables and lists; and as TOML."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator


def _read_shape(value: Any) -> Any:
    """Return the shape of one input, or of several by name: 28,28,1, or image=28,28,1,meta=4."""
    value = _by_name(value) if isinstance(value, str) else value
    if isinstance(value, Mapping):
        return {name: _read_shape(each) for name, each in value.items()}
    if value is None or value == "":
        return None
    # One number is pydantic's reading of a variable whose text it is.
    axes = [value] if isinstance(value, int) and not isinstance(value, bool) else value
    texts = [str(each).strip() for each in axes] if isinstance(axes, list | tuple) else [""]
    if not all(text.isdecimal() and int(text) for text in texts):
        raise ValueError(f"positive numbers with commas are needed, 28,28,1, not {value!r}")
    return tuple(map(int, texts))


def _read_datatype(value: Any) -> Any:
    """Return the datatype of all inputs, or of some by name: INT64, or ids=INT64,mask=BOOL."""
    if not isinstance(value, str) or "=" not in value:
        return value
    return {name: "".join(each) for name, each in _by_name(value).items()}


def _by_name(text: str) -> Any:
    """Return the parts between commas, by the names before them if there are any."""
    found: dict[str, list[str]] = {}
    name = ""
    for part in text.split(","):
        before, equals, after = part.rpartition("=")
        name = before.strip() if equals else name
        found.setdefault(name, []).extend([after.strip()] if after.strip() or not equals else [])
    if len(found) > 1 and "" in found:
        raise ValueError(f"all inputs are named, or none is, not {text!r}")
    return found.get("", found)


def _read_table(value: Any) -> Any:
    """Return a table that is written as in TOML, with or without braces: {num_gpus = 0.5}."""
    if not isinstance(value, str):
        return value
    text = value if value.lstrip().startswith("{") else f"{{{value}}}"
    try:
        return tomllib.loads(f"table = {text}")["table"]
    except tomllib.TOMLDecodeError as error:
        raise ValueError(
            f"a table as in TOML is needed, {{num_gpus = 0.5}}, not {value!r}"
        ) from error


def _read_faults(value: Any) -> Any:
    """Return a table of faults, which is checked where there are any."""
    table = _read_table(value)
    if not table or not isinstance(table, Mapping):
        return table
    from ..pools.options import check_faults  # late: it takes JAX

    return check_faults(table)


Shapes: TypeAlias = Annotated[
    tuple[int, ...] | dict[str, tuple[int, ...]] | None, BeforeValidator(_read_shape)
]
Datatypes: TypeAlias = Annotated[str | dict[str, str] | None, BeforeValidator(_read_datatype)]
Table = BeforeValidator(_read_table)
Faults = BeforeValidator(_read_faults)
# TOML has no null, and the environment has only strings.
PortOrNone: TypeAlias = Annotated[
    int | None, BeforeValidator(lambda value: None if value == "none" else value)
]


def to_toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {to_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False)
    return str(value).lower()  # numbers, infinity and booleans
