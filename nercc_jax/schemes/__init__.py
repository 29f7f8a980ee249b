"""Schemes: a code with an order of the data, a surrogate, and calibrated uncertainty."""

from ._calibrate import calibrate_error_bars, calibrate_error_probability
from .scheme import Scheme, reexecute

__all__ = [
    "Scheme",
    "calibrate_error_bars",
    "calibrate_error_probability",
    "reexecute",
]
