"""The objects that options name: models and their data points, callables, surrogates and codes.

docs/own-models.md describes models of your own; `nercc new-model` writes a template.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np

import nercc_models

from ..codes import AbstractCode, load_code
from ..codes.workers import call_model
from ..inference.models import check_model
from ..pools.batch import reason_of
from ..pools.options import check_faults
from ._command import of_option
from ._options import Options, Returned


def find_workload(options: Options, *, traced: bool = True) -> tuple[Any, nercc_models.DataPoints]:
    """Return the model and the data points that the options of the command line select.

    If JAX calls the model (`traced`), inputs of your own are converted to float32; otherwise they
    keep the dtype of their file.

    Raises:
        ValueError: If there is no such model, there are no inputs, or the model does not run on
            them.
        ImportError: If an extra is missing; the message names it.
    """
    name, outputs, inputs = options.model, options.outputs, options.inputs
    model = model_of(name, options.weights, outputs)
    columns = None if options.columns is None else options.columns.split(",")
    with of_option(f"--model {name}" if inputs is None else f"--inputs {inputs}"):
        table = columns, options.id_column, options.data_dir
        data = nercc_models.find_points(name, model, inputs, *table)
    if not traced:
        return model, data
    if data.x is not None:
        data = dataclasses.replace(data, x=data.x.astype(np.float32))

    # JAX must be able to run the model, which must return a row for each data point.
    check_model(model)
    with of_option(f"--split {options.split}"):
        one = data.shuffled(options.split or "test", 1, 0) if data.x is None else data.x
    one = jax.ShapeDtypeStruct((1, *one.shape[1:]), np.float32)
    try:
        answer: Any = eqx.filter_eval_shape(lambda batch: call_model(model, batch), one)
    except Exception as error:
        raise ValueError(
            f"--model {name} does not run on a batch of shape {one.shape} of {data.source}: "
            f"{reason_of(error)}"
        ) from error
    if getattr(answer, "shape", ())[:1] != (1,) or len(answer.shape) < 2:
        raise ValueError(
            f"--model {name} must give an array, a row for each of a batch, not {answer} for "
            f"{one.shape}"
        )
    if outputs != "values" and answer.shape[-1] == 1:
        raise ValueError(
            f"--outputs {outputs}: {name} gives one number a row, whose largest is always itself, "
            "so that there are no labels: say --outputs values"
        )
    return model, data


def model_of(name: str, weights: Path | None, outputs: Returned) -> Any:
    """Return the model that --model names; raise a ValueError with its name if there is none."""
    with of_option(f"--model {name}"):
        wanted = "probabilities" if outputs == "probabilities" else "logits"
        return nercc_models.find_model(name, weights, wanted)


def callable_of(option: str, name: str) -> Callable[..., Any]:
    """Return the callable that an option names; raise a ValueError with its name if none is."""
    with of_option(f"{option} {name}"):
        return nercc_models.find_callable(name)


def surrogate_of(asked: str, model: str, outputs: str) -> Callable[..., Any]:
    """Return the surrogate of a model that returns these outputs.

    `asked` is `student`, the shipped one; a file that `nercc distill` wrote; or module:function.

    Raises:
        ValueError: If there is no such surrogate.
    """
    if ":" in asked:
        return callable_of("--surrogate", asked)
    if asked != "student" and not asked.endswith(".safetensors"):
        raise ValueError(
            f"--surrogate: {asked!r} is no surrogate: there are student, .safetensors files of "
            "`nercc distill` and module:function"
        )
    if outputs != "logits":
        raise ValueError(f"--surrogate {asked}: students give logits, and the model {outputs}")
    with of_option(f"--surrogate {asked}"):
        load = nercc_models.load_student_file
        return nercc_models.load_student(model) if asked == "student" else load(asked)


def faults_of(asked: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the faults in a table, with `straggler_score` as a function, if it is there.

    Raises:
        ValueError: If there is no such fault or function, or a value does not fit.
    """
    with of_option("--faults"):
        found = check_faults(asked or {})
        if (score := found.get("straggler_score")) is not None:
            found["straggler_score"] = callable_of("straggler_score", score)
    return found


def load_plain_code(path: Path, option: str) -> AbstractCode:
    """Return a code from its file, for workers that all run the served model.

    Raises a ValueError with the option's name if it is no such code, or cannot be read.
    """
    with of_option(option):
        code = load_code(path)
    if code.worker_models.any():
        raise ValueError(
            f"{option}: {type(code).__name__} has workers that run other models; here all "
            "workers must run the served model"
        )
    return code
