"""Smoothing splines as linear operators."""

from ._knots import Knots, gather_knots
from ._smoothing import SmoothingSpline, smoothing_matrix, smoothing_spline

__all__ = ["Knots", "SmoothingSpline", "gather_knots", "smoothing_matrix", "smoothing_spline"]
