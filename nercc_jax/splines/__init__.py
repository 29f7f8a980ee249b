"""Smoothing splines as linear operators, and as posteriors."""

from .smoothing import (
    SmoothingSpline,
    posterior_variance,
    process_variance,
    smoothing_matrix,
    smoothing_spline,
)

__all__ = [
    "SmoothingSpline",
    "posterior_variance",
    "process_variance",
    "smoothing_matrix",
    "smoothing_spline",
]
