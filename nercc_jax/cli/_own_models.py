"""Which model an option means: a shipped one, `module:name` of yours, or one of the hub.

The one contract of all commands; docs/own-models.md tells it, and `nercc new-model` writes a file
that keeps to it.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HUB = "hf:"  # begins what lies on Hugging Face's hub
EXAMPLES = "example_inputs"  # of a module with a model: what commands take without --inputs


def is_own(model: str) -> bool:
    """Whether it is `module:name`."""
    return ":" in model and not model.startswith(HUB)


def is_shipped(model: str) -> bool:
    """Whether it is one of ours, by its name."""
    return ":" not in model


def look_here() -> None:
    """Has modules looked for in the working directory, too."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def load_callable(spec: str, weights: Path | None, option: str = "--model") -> Callable[..., Any]:
    """What `module:name` says: a model, or with weights a function of their path that makes one.

    Modules are looked for in the working directory too. Weights may lie on the hub,
    `hf:owner/name/file`.

    Raises: ValueError where there is none, or it cannot be called.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"{option}: one of your own is named module:function, not {spec!r}")
    found: Any = _module(spec, option)
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise ValueError(f"{option} {spec}: {error}") from error
    if weights is not None:
        path = _local(spec, weights)
        try:
            found = found(path)
        except Exception as error:
            raise ValueError(f"--weights {weights}: {spec} raises {_first_line(error)}") from error
    if not callable(found):
        kind = type(found).__name__
        raise ValueError(f"{option} {spec} is a {kind}, not a callable on a batch")
    return found


def example_inputs(spec: str) -> Any:
    """What the module of a model says that it may be run on; None where it says nothing."""
    found = getattr(_module(spec), EXAMPLES, None)
    try:
        return found() if callable(found) else found
    except Exception as error:
        raise ValueError(f"--model {spec}: {EXAMPLES}() raises {_first_line(error)}") from error


def check_weights(spec: str, weights: Path) -> None:
    """Raises: ValueError where there are none."""
    if not str(weights).startswith(HUB) and not weights.exists():
        raise ValueError(f"--weights {weights}: there are no weights at {weights}")


def load_hub(spec: str) -> Any:
    """The model `hf:owner/name`. Raises: ValueError and ImportError, as `load_hub_model`."""
    from nercc_models import load_hub_model

    return load_hub_model(hub_name(spec))


def hub_name(spec: str) -> str:
    """Raises: ValueError unless it is `hf:owner/name`."""
    name = spec.removeprefix(HUB)
    if name.count("/") != 1 or not all(name.split("/")):
        raise ValueError(f"--model: one of Hugging Face's hub is named hf:owner/name, not {spec!r}")
    return name


def _module(spec: str, option: str = "--model") -> Any:
    """Of `module:name`. Raises: ValueError where it cannot be imported, whatever it raises."""
    look_here()
    try:
        return importlib.import_module(spec.partition(":")[0])
    except Exception as error:
        told = str(error) if isinstance(error, ImportError) else _first_line(error)
        raise ValueError(f"{option} {spec}: {told}") from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _local(spec: str, weights: Path) -> Path:
    check_weights(spec, weights)
    if not str(weights).startswith(HUB):
        return weights
    from nercc_models import hub_file

    owner, name, *file = str(weights).removeprefix(HUB).split("/")
    if not file:
        raise ValueError(f"weights on Hugging Face's hub are named hf:owner/name/file: {weights}")
    return hub_file(f"{owner}/{name}", "/".join(file))
