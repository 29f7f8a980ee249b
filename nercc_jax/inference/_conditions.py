"""Under which conditions answers were made, and what is calibrated on them: said when they differ.

How often a label is wrong depends on how the workers round: what was calibrated on float32 answers
promises too much of bfloat16 ones, and a GPU or TPU rounds the products of a float32 model, too.
"""

import abc
import dataclasses
import warnings
from typing import Any

import equinox as eqx
import jax
from jax.typing import DTypeLike
from jaxtyping import PyTree

from ..codes._kept import x64_enabled
from ._precision import check_worker_dtype

UNKNOWN = "unknown"


class CalibrationWarning(UserWarning):
    """A calibrated object is used under other conditions than it was calibrated under.

    ```python
    import warnings

    from nercc_jax.inference import CalibrationWarning

    warnings.simplefilter("error", CalibrationWarning)  # fail instead of going on
    ```
    """


@dataclasses.dataclass(frozen=True)
class Conditions:
    """At which precision workers answer, and on what: each "unknown" unless it was recorded.

    `dtype` is the workers' (`worker_dtype`, else JAX's working precision; what a model makes of
    that by itself is the model's), `platform` is JAX's name for the kind of device, and
    `matmul_precision` is `jax.default_matmul_precision`'s, "default" if none is set.
    """

    dtype: str = UNKNOWN
    platform: str = UNKNOWN
    matmul_precision: str = UNKNOWN

    def __str__(self) -> str:
        return (
            f"{self.dtype} workers on platform {self.platform}, matmul precision "
            f"{self.matmul_precision}"
        )

    def differ(self, other: "Conditions") -> bool:
        """Return whether anything differs that is known of both."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return any(mine != theirs and UNKNOWN not in (mine, theirs) for mine, theirs in pairs)


class AbstractCalibrated(eqx.Module):
    """Something that was calibrated on answers."""

    @abc.abstractmethod
    def calibrated_under(self) -> Conditions:
        """Return the conditions of the answers of the calibration."""


def current_conditions(
    worker_dtype: DTypeLike | None = None, platform: str | None = None
) -> Conditions:
    """Return the conditions of workers that run here and now.

    They run on JAX's default device unless a platform is given.
    """
    working = "float64" if x64_enabled() else "float32"
    return Conditions(
        check_worker_dtype(worker_dtype) or working,
        platform or _default_platform(),
        matmul_precision() or "default",
    )


def matmul_precision() -> str | None:
    """Return `jax.default_matmul_precision` in this thread, None if none is set."""
    return jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]


def _default_platform() -> str:
    device: Any = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def check_conditions(tree: PyTree, used: Conditions) -> None:
    """Warn of everything in a tree that was calibrated under other conditions."""
    found = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, AbstractCalibrated))
    for node in found:
        if isinstance(node, AbstractCalibrated):
            warn_if_other(type(node).__name__.strip("_"), node.calibrated_under(), used)


def warn_if_other(what: str, calibrated: Conditions, used: Conditions) -> None:
    """Warn where these conditions differ: `CalibrationWarning`."""
    if calibrated.differ(used):
        warnings.warn(
            f"{what} was calibrated on answers of {calibrated}, and is used with {used}: what it "
            "promises was not measured there. Calibrate again under the conditions of use "
            "(worker_dtype of calibrate_error_probability, make_forecast)",
            CalibrationWarning,
            stacklevel=3,
        )
