"""A model as a server has it: a callable on a batch, its shapes, and what they are called."""

import dataclasses
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..inference import Model, call_model, check_model

# The names that the protocol gives to what a server adds to the model's own output.
ADDED_OUTPUTS = ("exact", "expected_disagreement", "expected_error")


@dataclasses.dataclass(frozen=True)
class Servable:
    """What is served under a name.

    `model` maps (B, *shape) to (B, *outputs), both float32. `calibration` are unlabelled inputs
    (points, *shape) for the error estimate, or None: then it is learnt from what is served.
    """

    name: str
    model: Model
    shape: tuple[int, ...]
    outputs: tuple[int, ...]
    output_name: str = "output"
    calibration: np.ndarray | None = None

    def __post_init__(self):
        if not self.name or "/" in self.name:
            raise ValueError(f"a model's name is not empty and has no slash, not {self.name!r}")
        if self.output_name in ADDED_OUTPUTS:
            raise ValueError(f"an output cannot be called {self.output_name!r}: the server's is")
        calibration = self.calibration
        if calibration is not None and calibration.shape[1:] != self.shape:
            raise ValueError(
                f"{self.name}: calibration data has shape {calibration.shape}, but the model takes "
                f"(points, {', '.join(map(str, self.shape))})"
            )


def make_servable(
    name: str,
    model: Model,
    shape: Sequence[int],
    *,
    output_name: str = "output",
    calibration: np.ndarray | None = None,
) -> Servable:
    """Traces the model on one query's shape to learn that of its answer.

    Raises: ValueError where it does not run on it, or returns no float32 array with an axis B, or
    is in training mode.
    """
    check_model(model)
    batch = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    try:
        answer: Any = eqx.filter_eval_shape(lambda x: call_model(model, x), batch)
    except Exception as error:
        first = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"{name} does not run on a batch of shape {batch.shape} (float32): {first}"
        ) from error
    answer_shape = getattr(answer, "shape", None)
    if not answer_shape or answer_shape[0] != 1 or answer.dtype != jnp.float32:
        raise ValueError(
            f"{name} must map a batch (B, {', '.join(map(str, shape))}) to a float32 array "
            f"(B, ...); for B = 1 it returned {answer}"
        )
    return Servable(name, model, tuple(shape), answer_shape[1:], output_name, calibration)


def load_callable(spec: str, weights: Path | None) -> Callable[..., Any]:
    """What `module:name` says: a model, or with weights a function of their path that makes one.

    Modules are looked for in the working directory too.

    Raises: ValueError where there is none, or it cannot be called.
    """
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"a model of your own is named module:function, not {spec!r}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{spec}: {error}") from error
    if weights is not None:
        if not weights.exists():
            raise ValueError(f"{spec}: there are no weights at {weights}")
        found = found(weights)
    if not callable(found):
        raise ValueError(f"{spec} is a {type(found).__name__}, not a callable on a batch")
    return found
