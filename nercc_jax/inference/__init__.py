"""Encode, model, decode: on one device, on a mesh, partly, in order, among liars."""

from ._coded import AbstractScheme, CodedInference, Work, coded_inference, coded_predictions
from ._conditions import (
    UNKNOWN,
    AbstractCalibrated,
    CalibrationWarning,
    Conditions,
    check_conditions,
    current_conditions,
    matmul_precision,
    warn_if_other,
)
from ._groups import group_points
from ._models import Model, call_model, check_model
from ._ordering import (
    Features,
    order_points,
    ordered,
    projection_on_host,
    random_projection,
)
from ._partial import partial_inference
from ._paths import short_path
from ._precision import cast_floats, cast_model, check_worker_dtype, worker_dtype_of
from ._robust import RobustDecoded, RobustMethod, find_adversaries, robust_decode
from ._spmd import place, slots
from ._workers import run_workers

__all__ = [
    "UNKNOWN",
    "AbstractCalibrated",
    "AbstractScheme",
    "CalibrationWarning",
    "CodedInference",
    "Conditions",
    "Features",
    "Model",
    "RobustDecoded",
    "RobustMethod",
    "Work",
    "call_model",
    "cast_floats",
    "cast_model",
    "check_conditions",
    "check_model",
    "check_worker_dtype",
    "coded_inference",
    "coded_predictions",
    "current_conditions",
    "find_adversaries",
    "group_points",
    "matmul_precision",
    "order_points",
    "ordered",
    "partial_inference",
    "place",
    "projection_on_host",
    "random_projection",
    "robust_decode",
    "run_workers",
    "short_path",
    "slots",
    "warn_if_other",
    "worker_dtype_of",
]
