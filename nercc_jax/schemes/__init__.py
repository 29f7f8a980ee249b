"""Schemes: a code with an order of the data, a surrogate, and a measure of trust."""

from ._calibrate import calibrate_error_bars, calibrate_error_probability, cross_validate_error_bars
from ._fit_scheme import fit_scheme
from ._reexecute import AssessedPredictions, reexecute
from ._scheme import Scheme

__all__ = [
    "AssessedPredictions",
    "Scheme",
    "calibrate_error_bars",
    "calibrate_error_probability",
    "cross_validate_error_bars",
    "fit_scheme",
    "reexecute",
]
