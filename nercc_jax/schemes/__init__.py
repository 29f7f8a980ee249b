"""Schemes: a code with an order of the data, a surrogate, and a measure of trust."""

from ._calibrate import calibrate_error_bars, calibrate_error_probability, cross_validate_error_bars
from ._fit_scheme import FittedScheme, fit_scheme
from ._reexecute import AssessedPredictions, reexecute, select_uncertain
from ._scheme import PreparedInputs, Scheme

__all__ = [
    "AssessedPredictions",
    "FittedScheme",
    "PreparedInputs",
    "Scheme",
    "calibrate_error_bars",
    "calibrate_error_probability",
    "cross_validate_error_bars",
    "fit_scheme",
    "reexecute",
    "select_uncertain",
]
