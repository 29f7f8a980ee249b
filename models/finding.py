"""Models by name: shipped ones, your own as `module:name`, and those of Hugging Face's hub."""

import importlib
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float

from .hub import load_hub_model
from .hub_files import hub_file
from .names import HUB
from .registry import Outputs, load_model


class SoftmaxModel(eqx.Module):
    """A network of logits as a function of a batch to probabilities: their softmax."""

    network: Any

    def __call__(self, batch: Array) -> Float[Array, "batch classes"]:
        return jax.nn.softmax(self.network(batch))

    @property
    def input_shape(self) -> tuple[int, ...] | None:
        """The shape of one data point, or None if the network does not state it."""
        return getattr(self.network, "input_shape", None)


def find_model(name: str, weights: str | Path | None = None, outputs: Outputs = "logits") -> Any:
    """Return the model that a name stands for in every `nercc` command: a callable on a batch.

    Args:
        name: A shipped model (`list_models`); `module:name`, as for `find_callable`; or
            `hf:owner/name`, as for `load_hub_model`.
        weights: Those of `module:name`, as for `find_callable`.
        outputs: What it returns: logits (for any other function: what that returns), or their
            softmax.

    Raises:
        ValueError: There is no such model.
        ImportError: An extra is missing; the message names it.

    Example:
        >>> find_model("lenet5-digits").input_shape
        (32, 32, 1)
        >>> find_model("jax.numpy:tanh")([0.0]).tolist()
        [0.0]
    """
    hub = name.startswith(HUB)
    if weights is not None and (hub or ":" not in name):
        raise ValueError(f"weights are for a model of your own, module:name, not {name!r}")
    if ":" not in name:
        return load_model(name, outputs=outputs)
    found = load_hub_model(name.removeprefix(HUB)) if hub else find_callable(name, weights)
    return SoftmaxModel(found) if outputs == "probabilities" else found


def find_callable(name: str, weights: str | Path | None = None) -> Callable[..., Any]:
    """Return the callable `module:name`, or the one that it makes from weights.

    Modules are looked for in the working directory, too.

    Args:
        name: `package.module:object.attribute`.
        weights: A path that the named function is called with, or `hf:owner/name/file`, which is
            fetched. Default: the named object is the callable itself.

    Raises:
        ValueError: There is no such callable.

    Example:
        >>> find_callable("math:sqrt")(4.0)
        2.0
    """
    if not all(name.partition(":")):
        raise ValueError(f"one of your own is named module:function, not {name!r}")
    _look_here()
    try:
        found: Any = pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        raise ValueError(str(error)) from error
    except Exception as error:
        raise ValueError(_first_line(error)) from error
    if str(weights).startswith(HUB) and str(weights).count("/") < 2:
        raise ValueError(f"weights of the hub are named hf:owner/name/file, not {weights}")
    if weights is not None:
        try:
            if str(weights).startswith(HUB):
                owner, repository, *file = str(weights).removeprefix(HUB).split("/")
                weights = hub_file(f"{owner}/{repository}", "/".join(file))
            found = found(weights)
        except Exception as error:
            raise ValueError(f"{name} raises of {weights} {_first_line(error)}") from error
    if not callable(found):
        raise ValueError(f"{name} is a {type(found).__name__}, not a callable on a batch")
    return found


def example_inputs(name: str) -> Any:
    """Return what `example_inputs` of a model's module is or returns; None if it has none.

    Raises:
        ValueError: There is no such module, or the function raises.

    Example:
        >>> example_inputs("jax.numpy:tanh") is None
        True
    """
    _look_here()
    try:
        found = getattr(importlib.import_module(name.partition(":")[0]), "example_inputs", None)
        return found() if callable(found) else found
    except ImportError as error:
        raise ValueError(str(error)) from error
    except Exception as error:
        raise ValueError(f"example_inputs() raises {_first_line(error)}") from error


def _look_here() -> None:
    """Have modules looked for in the working directory, too."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
