"""The options that say what a command runs on, and what of them can be checked at once."""

import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import typer

from ._errors import of_option
from ._own_models import HUB, check_weights, hub_name, is_own

Outputs: TypeAlias = Literal["logits", "probabilities"]  # of a classifier
Returned: TypeAlias = Literal["logits", "probabilities", "values"]

ModelName: TypeAlias = Annotated[
    str,
    typer.Option(
        help="A shipped model (`nercc models` lists them), module:name of yours (`nercc new-model` "
        "writes one), or hf:owner/name."
    ),
]
Weights: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        help="Given to module:name, which then makes the model: a file, a folder, or "
        "hf:owner/name/file."
    ),
]
Inputs: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        help="Data points without labels, as the model takes them: .npy, .npz, .csv or .parquet, "
        "one a row. Unless given: the shipped model's data set, or example_inputs() of the module."
    ),
]
DataDir: TypeAlias = Annotated[
    Path | None, typer.Option(help="Folder with the model's data set; not needed for the digits.")
]
NumData: TypeAlias = Annotated[int, typer.Option(min=1, help="K: data points coded together.")]
NumWorkers: TypeAlias = Annotated[
    int, typer.Option(min=1, help="N: workers, each given a coded point.")
]
OutputsOption: TypeAlias = Annotated[
    Returned,
    typer.Option(
        help="What workers return: a classifier's logits, their softmax, or values, which have no "
        "labels."
    ),
]

# The forms of a law of latency, in seconds.
LATENCIES = (
    "lognormal:MEDIAN:SIGMA, exponential:MEAN[:SHIFT], pareto:MINIMUM:SHAPE, "
    "stragglers:SECONDS:SHARE:FACTOR or trace:FILE"
)
CALIBRATION = 1000  # training images that a run's forecast is calibrated on


def check_shipped(model: str) -> None:
    """Raises: ValueError, listing what exists, for a name that no shipped model has; at once, where
    to import JAX and the models takes seconds."""
    from nercc_models.names import check_model_name

    with of_option("--model"):
        check_model_name(model)


def check_model(model: str, weights: Path | None, inputs: Path | None) -> None:
    """What can be seen of them before JAX is imported.

    Raises: ValueError where there is no such model, or file.
    """
    if model.startswith(HUB):
        hub_name(model)
    elif not is_own(model):
        check_shipped(model)
    if weights is not None:
        if not is_own(model):
            raise ValueError(f"--weights is for a model of your own, module:name, not {model!r}")
        check_weights(model, weights)
    if inputs is not None:
        check_file("--inputs", inputs)


def check_folder(option: str, path: Path | None) -> None:
    """Raises: ValueError where nothing can be written there: before the work, not after it."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {path.parent}")
    there = path if path.exists() else path.parent
    if not os.access(there, os.W_OK):
        raise ValueError(f"{option} {path}: {there.resolve()} may not be written to")


def check_file(option: str, path: Path) -> None:
    """Raises: ValueError where there is no such file."""
    if not path.is_file():
        raise ValueError(f"{option} {path}: there is no such file")


def check_positive(*options: Any) -> None:
    """Options and values in turn. Raises: ValueError for one that is given and not positive."""
    for option, value in zip(options[::2], options[1::2], strict=True):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{option} must be positive, not {value}")
