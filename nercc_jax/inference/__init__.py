"""Encode, model, decode: on one device, on a mesh, in order, among liars."""

from ._coded import coded_inference
from ._robust import RobustDecoded, robust_decode
from .models import CalibrationWarning, cast_model
from .order import order_points, ordered

__all__ = [
    "CalibrationWarning",
    "RobustDecoded",
    "cast_model",
    "coded_inference",
    "order_points",
    "ordered",
    "robust_decode",
]
