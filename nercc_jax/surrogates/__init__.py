"""Cheap models beside the coded one, doubt, and the scheme that joins them."""

from ._doubt import Doubt, assess, calibrate_doubt, doubt_of, margin, observe
from ._logistic import logistic_regression
from ._scheme import Assessed, Scheme, doubtful, reexecute
from ._surrogate import Surrogate, decode_with_surrogate, fit_surrogate

__all__ = [
    "Assessed",
    "Doubt",
    "Scheme",
    "Surrogate",
    "assess",
    "calibrate_doubt",
    "decode_with_surrogate",
    "doubt_of",
    "doubtful",
    "fit_surrogate",
    "logistic_regression",
    "margin",
    "observe",
    "reexecute",
]
