"""The options that say what a command runs on, and what of them can be checked at once."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import typer

Outputs: TypeAlias = Literal["logits", "probabilities"]

ModelName: TypeAlias = Annotated[
    str, typer.Option(help="A shipped model; `nercc models` lists them.")
]
DataDir: TypeAlias = Annotated[
    Path | None, typer.Option(help="Folder with the model's data set; not needed for the digits.")
]
NumData: TypeAlias = Annotated[int, typer.Option(help="K: data points coded together.")]
NumWorkers: TypeAlias = Annotated[int, typer.Option(help="N: workers, each given a coded point.")]
OutputsOption: TypeAlias = Annotated[Outputs, typer.Option(help="What workers return.")]

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

    check_model_name(model)


def check_folder(option: str, path: Path) -> None:
    """Raises: ValueError where the path's folder does not exist: before the work, not after it."""
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {path.parent}")


def check_file(option: str, path: Path) -> None:
    """Raises: ValueError where there is no such file."""
    if not path.is_file():
        raise ValueError(f"{option} {path}: there is no such file")


def check_positive(*options: Any) -> None:
    """Options and values in turn. Raises: ValueError for one that is given and not positive."""
    for option, value in zip(options[::2], options[1::2], strict=True):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{option} must be positive, not {value}")
