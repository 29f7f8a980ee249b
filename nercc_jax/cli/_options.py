"""Options that several commands share, and checks of them that need no JAX."""

import math
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import typer

from ._errors import of_option
from ._own_models import HUB, check_weights, hub_name, is_own

Outputs: TypeAlias = Literal["logits", "probabilities"]  # of a classifier
Returned: TypeAlias = Literal["logits", "probabilities", "values"]

# Panels of `--help`.
MODEL = "Model and inputs"
CODE = "Code"
WORKERS = "Workers"
DECODING = "When to decode"
ROWS = "Row by row"
FAULTS = "Fault injection"
RAY = "Ray"
RESULTS = "Results"


def option(help: str, panel: str | None = None, *names: str, **limits: Any) -> Any:
    """Return an option with its help, in a panel of `--help`, with its limits.

    The help says what the option is, its unit, and its default where that is no value. It has the
    parameter's name unless names are given. Limits are further arguments of `typer.Option`.
    """
    return typer.Option(*names, help=help, rich_help_panel=panel, **limits)


ModelName: TypeAlias = Annotated[
    str,
    option(
        "A shipped model (`nercc models` lists them), module:name for your own (`nercc "
        "new-model` writes one), or hf:owner/name from Hugging Face's hub.",
        MODEL,
    ),
]
Weights: TypeAlias = Annotated[
    Path | None,
    option(
        "Weights for module:name, which is then called with their path and returns the model: "
        "a file, a folder, or hf:owner/name/file.",
        MODEL,
    ),
]
Inputs: TypeAlias = Annotated[
    Path | None,
    option(
        "Data points without labels, as the model takes them, one a row: .npy, .npz, .csv or "
        ".parquet (default: the shipped model's data set, or example_inputs() of the module).",
        MODEL,
    ),
]
DataDir: TypeAlias = Annotated[
    Path | None,
    option("Folder with the shipped model's data set; not needed for the digits.", MODEL),
]
NumData: TypeAlias = Annotated[int, option("K: data points that are coded together.", CODE, min=1)]
NumWorkers: TypeAlias = Annotated[
    int, option("N: coded data points, each for one worker.", CODE, min=1)
]
OutputsOption: TypeAlias = Annotated[
    Returned,
    option(
        "What workers return: a classifier's logits, their softmax, or values without labels.",
        MODEL,
    ),
]
MaxStragglers: TypeAlias = Annotated[
    int | None,
    option("Largest number of stragglers; all numbers from 0 on are used (default: N - K).", CODE),
]
Sets: TypeAlias = Annotated[
    int, option("Random straggler sets for each number of stragglers.", min=1)
]
Numbers: TypeAlias = Annotated[
    Path | None, option("JSON file for the table's numbers (default: none).", RESULTS)
]
Seed: TypeAlias = Annotated[int, option("Seed of all random numbers.")]

# The forms of a law of latency, in seconds.
LATENCIES = (
    "lognormal:MEDIAN:SIGMA, exponential:MEAN[:SHIFT], pareto:MINIMUM:SHAPE, "
    "stragglers:SECONDS:SHARE:FACTOR or trace:FILE"
)
CALIBRATION = 1000  # training images that a run's forecast is calibrated on


def check_files(model: str, weights: Path | None, inputs: Path | None) -> None:
    """Check the options of a model as far as possible before JAX is imported.

    Raises ValueError if there is no such model or file.
    """
    if model.startswith(HUB):
        hub_name(model)
    elif not is_own(model):
        from nercc_models.names import check_model_name  # it imports neither JAX nor the models

        with of_option("--model"):
            check_model_name(model)
    if weights is not None:
        if not is_own(model):
            raise ValueError(f"--weights is for a model of your own, module:name, not {model!r}")
        check_weights(model, weights)
    if inputs is not None and not inputs.is_file():
        raise ValueError(f"--inputs {inputs}: there is no such file")


def check_folder(option: str, path: Path | None) -> None:
    """Raise ValueError if nothing can be written to a path: before the work, not after it."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {path.parent}")
    there = path if path.exists() else path.parent
    if not os.access(there, os.W_OK):
        raise ValueError(f"{option} {path}: {there.resolve()} may not be written to")


def table_of_option(option: str, text: str, example: str) -> dict[str, Any]:
    """Return a table that is written as in TOML; raise ValueError, naming the option, if wrong."""
    try:
        return tomllib.loads(f"table = {text}")["table"]
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{option}: a table is needed, '{example}', not {text!r}") from error


def check_positive_options(*options: Any) -> None:
    """Raise ValueError if an option is given and not positive: options and values in turn."""
    for option, value in zip(options[::2], options[1::2], strict=True):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{option} must be positive, not {value}")


def refuse(other: str, **options: Any) -> None:
    """Raise ValueError if an option is given that does not go with another one."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"--{name.replace('_', '-')} does not go with {other}")
