"""Smoothing splines as linear operators."""

from ._smoothing import SmoothingSpline, smoothing_matrix, smoothing_spline

__all__ = ["SmoothingSpline", "smoothing_matrix", "smoothing_spline"]
