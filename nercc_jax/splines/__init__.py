"""Smoothing splines as linear operators, and as posteriors."""

from ._ends import Ends, check_ends
from ._fit import LinearMap
from ._host import smoothing_matrix_on_host
from ._knots import Knots, gather_knots
from ._namespace import namespace, product
from ._platforms import alike_in_shard_map, by_platform
from ._posterior import posterior_variance, posterior_variances, process_variance
from ._smoothing import (
    SmoothingSpline,
    smoothing_map,
    smoothing_matrix,
    smoothing_spline,
)

__all__ = [
    "Ends",
    "Knots",
    "LinearMap",
    "SmoothingSpline",
    "alike_in_shard_map",
    "by_platform",
    "check_ends",
    "gather_knots",
    "namespace",
    "posterior_variance",
    "posterior_variances",
    "process_variance",
    "product",
    "smoothing_map",
    "smoothing_matrix",
    "smoothing_matrix_on_host",
    "smoothing_spline",
]
