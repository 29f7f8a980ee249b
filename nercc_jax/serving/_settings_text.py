"""Settings as text, from a flag or a variable, where a file has tables and lists; and as TOML."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_shape(value: Any) -> Any:
    """Return the shape of one input, or of several by name: 28,28,1, or image=28,28,1,meta=4."""
    if isinstance(value, str):
        value = _by_name(value)
    if isinstance(value, Mapping):
        return {name: _axes(each) for name, each in value.items()}
    return None if value is None else _axes(value or None)


def read_datatype(value: Any) -> Any:
    """Return the datatype of all inputs, or of some by name: INT64, or ids=INT64,mask=BOOL."""
    if not isinstance(value, str) or "=" not in value:
        return value
    return {name: "".join(each) for name, each in _by_name(value).items()}


def read_table(value: Any) -> Any:
    """Return a table that is written as in TOML: {num_gpus = 0.5}."""
    if not isinstance(value, str):
        return value
    try:
        return tomllib.loads(f"table = {value}")["table"]
    except tomllib.TOMLDecodeError as error:
        raise ValueError(
            f"a table as in TOML is needed, {{num_gpus = 0.5}}, not {value!r}"
        ) from error


def read_policy(value: Any) -> Any:
    """Return a policy of versions: latest, all, or numbers with commas."""
    text = str(value).replace(" ", "")
    numbers = text.split(",")
    if text not in ("latest", "all") and not all(
        each.isdecimal() and int(each) for each in numbers
    ):
        raise ValueError(f"latest, all, or versions with commas, 1,3, are needed, not {value!r}")
    return text


def _axes(value: Any) -> tuple[int, ...]:
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value]  # pydantic's reading of a variable whose text is one number
    texts = [str(each).strip() for each in value] if isinstance(value, list | tuple) else [""]
    if not all(text.isdecimal() and int(text) for text in texts):
        raise ValueError(f"positive numbers with commas are needed, 28,28,1, not {value!r}")
    return tuple(map(int, texts))


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


def to_toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {to_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False)
    return str(value).lower()  # numbers, infinity and booleans
