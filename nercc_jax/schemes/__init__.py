"""Schemes: a code with an order of the data, a surrogate, and a measure of trust."""

from ._calibrate import bars_of_scheme, calibrate_bars, calibrate_doubt
from ._fit_scheme import Lesson, fit_scheme
from ._reexecute import Assessed, doubtful, reexecute
from ._scheme import Prepared, Scheme

__all__ = [
    "Assessed",
    "Lesson",
    "Prepared",
    "Scheme",
    "bars_of_scheme",
    "calibrate_bars",
    "calibrate_doubt",
    "doubtful",
    "fit_scheme",
    "reexecute",
]
