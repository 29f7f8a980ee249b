"""Encode, model, decode: on one device, on a mesh, in order, among liars."""

from ._coded import coded_inference
from ._conditions import CalibrationWarning, cast_model
from ._ordering import order_points, ordered
from ._robust import RobustDecoded, robust_decode

__all__ = [
    "CalibrationWarning",
    "RobustDecoded",
    "cast_model",
    "coded_inference",
    "order_points",
    "ordered",
    "robust_decode",
]
