"""Settings as the file that would say the same."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..serving._settings import ModelSettings, ServerSettings


def as_toml(server: "ServerSettings", models: "Sequence[ModelSettings]") -> str:
    """A configuration file with all settings: the server's, and each model's."""
    of_server = server.model_dump(exclude={"defaults", "models"})
    of_server["grpc_port"] = of_server["grpc_port"] or "none"
    lines = _lines(of_server)
    for model in models:
        lines += ["", "[[models]]", *_lines(model.model_dump())]
    return "\n".join(lines)


def _lines(settings: dict[str, Any]) -> list[str]:
    # TOML has no null; what is None is so unless it is set.
    return [f"{name} = {_value(value)}" for name, value in settings.items() if value is not None]


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False)
    return str(value).lower()  # numbers, infinity and booleans
