"""Settings that come as text, from a flag or a variable, where a file has tables and lists."""

import tomllib
from collections.abc import Mapping
from typing import Any


def none(value: Any) -> Any:
    """TOML has no null, and the environment has only strings."""
    return None if value == "none" else value


def shape(value: Any) -> Any:
    """Of one input, or of several by name: 28,28,1, or image=28,28,1,meta=4 where it is text."""
    if isinstance(value, str):
        value = _by_name(value)
    if isinstance(value, Mapping):
        return {name: _axes(each) for name, each in value.items()}
    return None if value is None else _axes(value or None)


def _axes(value: Any) -> tuple[int, ...]:
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value]  # what is made of a variable whose text is one number
    texts = [str(each).strip() for each in value] if isinstance(value, list | tuple) else [""]
    if not all(text.isdecimal() and int(text) for text in texts):
        raise ValueError(f"positive numbers with commas are needed, 28,28,1, not {value!r}")
    return tuple(map(int, texts))


def datatype(value: Any) -> Any:
    """Of all inputs, or of some by name: INT64, or ids=INT64,mask=BOOL where it is text."""
    if not isinstance(value, str) or "=" not in value:
        return value
    return {name: "".join(each) for name, each in _by_name(value).items()}


def _by_name(text: str) -> Any:
    """What stands between commas, by the names before it, if there are any."""
    found: dict[str, list[str]] = {}
    name = ""
    for part in text.split(","):
        before, equals, after = part.rpartition("=")
        name = before.strip() if equals else name
        found.setdefault(name, []).extend([after.strip()] if after.strip() or not equals else [])
    if len(found) > 1 and "" in found:
        raise ValueError(f"all inputs are named, or none is, not {text!r}")
    return found.get("", found)


def table(value: Any) -> Any:
    """From text, as in a file: {num_gpus = 0.5}."""
    if not isinstance(value, str):
        return value
    try:
        return tomllib.loads(f"table = {value}")["table"]
    except tomllib.TOMLDecodeError as error:
        raise ValueError(
            f"a table as in TOML is needed, {{num_gpus = 0.5}}, not {value!r}"
        ) from error


def paths(value: Any) -> Any:
    """Several, with commas between them where they are one text."""
    return [part for part in value.split(",") if part] if isinstance(value, str) else value
