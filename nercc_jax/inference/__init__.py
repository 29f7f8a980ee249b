"""Encode, model, decode: on one device, on a mesh, partly, in order, among liars."""

from ._coded import coded_inference
from ._conditions import CalibrationWarning
from ._ordering import order_points, ordered, random_projection
from ._partial import partial_inference
from ._paths import short_path
from ._precision import cast_model
from ._robust import RobustDecoded, find_adversaries, robust_decode

__all__ = [
    "CalibrationWarning",
    "RobustDecoded",
    "cast_model",
    "coded_inference",
    "find_adversaries",
    "order_points",
    "ordered",
    "partial_inference",
    "random_projection",
    "robust_decode",
    "short_path",
]
