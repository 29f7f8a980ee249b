"""Coded inference on one device, on a mesh, with adversaries; and orders of data points."""

from ._robust import robust_decode
from .coded import coded_inference
from .models import CalibrationWarning, cast_model, current_conditions
from .order import order_points

__all__ = [
    "CalibrationWarning",
    "cast_model",
    "coded_inference",
    "current_conditions",
    "order_points",
    "robust_decode",
]
