"""Smoothing splines as linear operators, and as posteriors."""

from ._ends import Ends, check_ends
from ._fit import Fit, fit
from ._knots import Knots, gather_knots
from ._posterior import posterior_variance, process_variance
from ._smoothing import SmoothingSpline, smoothing_matrix, smoothing_spline

__all__ = [
    "Ends",
    "Fit",
    "Knots",
    "SmoothingSpline",
    "check_ends",
    "fit",
    "gather_knots",
    "posterior_variance",
    "process_variance",
    "smoothing_matrix",
    "smoothing_spline",
]
