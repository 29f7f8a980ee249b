"""The model that an option names: a shipped one, `module:name` of your own, or one of the hub.

All commands keep this one contract. docs/own-models.md describes it, and `nercc new-model` writes a
file that follows it.
"""

import importlib
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HUB = "hf:"  # prefix of names on Hugging Face's hub
EXAMPLES = "example_inputs"  # function of a module with a model, for commands without --inputs


def is_own(model: str) -> bool:
    return ":" in model and not model.startswith(HUB)


def is_shipped(model: str) -> bool:
    return ":" not in model


def is_data_set(inputs: Path) -> bool:
    """Return whether inputs are named as a data set, such as digits, and not as a file."""
    from nercc_models.data import list_data

    return not inputs.is_file() and str(inputs) in list_data()


def look_here() -> None:
    """Have modules looked for in the working directory, too."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def load_callable(spec: str, weights: Path | None, option: str = "--model") -> Callable[..., Any]:
    """Return the model that `module:name` names, or that it makes from weights.

    These are a path that the named function takes, or `hf:owner/name/file` on the hub. Modules are
    looked for in the working directory, too. Errors name the option.

    Raises:
        ValueError: If there is no such model, or it cannot be called.
    """
    if not all(spec.partition(":")):
        raise ValueError(f"{option}: one of your own is named module:function, not {spec!r}")
    look_here()
    try:
        found: Any = pkgutil.resolve_name(spec)
    except Exception as error:
        known = isinstance(error, ImportError | AttributeError)
        why = str(error) if known else _first_line(error)
        raise ValueError(f"{option} {spec}: {why}") from error
    if weights is not None:
        check_weights(weights)
        path = weights
        if str(weights).startswith(HUB):
            from nercc_models import hub_file

            owner, name, *file = str(weights).removeprefix(HUB).split("/")
            path = hub_file(f"{owner}/{name}", "/".join(file))
        try:
            found = found(path)
        except Exception as error:
            raise ValueError(f"--weights {weights}: {spec} raises {_first_line(error)}") from error
    if not callable(found):
        kind = type(found).__name__
        raise ValueError(f"{option} {spec} is a {kind}, not a callable on a batch")
    return found


def example_inputs(spec: str) -> Any:
    """Return the example inputs of a loaded model's module; None if it has none."""
    found = getattr(importlib.import_module(spec.partition(":")[0]), EXAMPLES, None)
    try:
        return found() if callable(found) else found
    except Exception as error:
        raise ValueError(f"--model {spec}: {EXAMPLES}() raises {_first_line(error)}") from error


def check_weights(weights: Path) -> None:
    """Raise ValueError if there are no such weights, as far as that is known without the hub."""
    if not str(weights).startswith(HUB):
        if not weights.exists():
            raise ValueError(f"--weights {weights}: there are no weights at {weights}")
    elif str(weights).count("/") < 2:
        raise ValueError(f"weights on Hugging Face's hub are named hf:owner/name/file: {weights}")


def hub_name(spec: str) -> str:
    """Return owner/name; raise ValueError unless the model is named `hf:owner/name`."""
    name = spec.removeprefix(HUB)
    if name.count("/") != 1 or not all(name.split("/")):
        raise ValueError(f"--model: one of Hugging Face's hub is named hf:owner/name, not {spec!r}")
    return name


def find_surrogate(asked: str, model: str, outputs: str) -> Callable[..., Any]:
    """Return a cheap model that stands in for another one, which returns these outputs.

    It is `student`, the shipped one; a file that `nercc distill` wrote; or module:function.

    Raises:
        ValueError: If there is no such surrogate.
    """
    if ":" in asked:
        return load_callable(asked, None, "--surrogate")
    if asked != "student" and not asked.endswith(".safetensors"):
        raise ValueError(
            f"--surrogate: {asked!r} is no surrogate: there are student, .safetensors files of "
            "`nercc distill` and module:function"
        )
    if outputs != "logits":
        raise ValueError(f"--surrogate {asked}: students give logits, and the model {outputs}")
    from nercc_models import load_student, load_student_file

    try:
        return load_student(model) if asked == "student" else load_student_file(asked)
    except FileNotFoundError as error:
        raise ValueError(f"--surrogate {asked}: {error}") from error


def find_score(asked: str | None) -> Callable[[Any], Any] | None:
    """Return the function that scores rows, by which injected stragglers are chosen, if any.

    It is `norm`, or module:function. Raises ValueError if there is no such function.
    """
    if asked is None:
        return None
    if asked != "norm":
        return load_callable(asked, None, "--straggler-score")
    return row_norm


def row_norm(batch: Any) -> Any:
    """Return the Euclidean norm of each row, over all inputs."""
    import jax
    import numpy as np

    leaves = [np.asarray(leaf, float) for leaf in jax.tree.leaves(batch)]
    return np.sqrt(sum(np.sum(leaf.reshape(len(leaf), -1) ** 2, axis=1) for leaf in leaves))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
