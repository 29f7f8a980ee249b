"""The smoothing spline's matrix on the host, by LAPACK in float64: nothing is compiled.

Beside the values g_j and slopes v_j at the knots, the third derivative f_i and the mean second
derivative b_i of each gap h_i are unknowns. In these the spline is the solution of a banded system,

    g_{i+1} - g_i - h_i (v_i + v_{i+1}) / 2 - h_i^3 f_i / 12 = 0,      v_{i+1} - v_i - h_i b_i = 0,
    w_j g_j + mu (f_{j-1} - f_j) = w_j y_j,
    b_{j-1} - b_j - (h_{j-1} f_{j-1} + h_j f_j) / 2 + e_j v_j = 0,

the last two being the derivatives of the penalised squares by g_j and v_j, with the penalty
mu (h b^2 + h^3 f^2 / 12) of a gap and mu e_j v_j^2 of a slope. Unlike the equations in g and v
alone it is well conditioned for every mu from zero on: against 60 digits, with up to 60 points of
which 60 % are missing, Gaussian elimination with row exchanges is off by 2e-15 at most.

Source: Green and Silverman 1994, section 2.1, for the functional.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from ._fit import hermite_basis
from ._knots import gather_knots

_BAND = 3  # of the system, on either side of the diagonal


def smoothing_matrix_on_host(
    t: Float[np.ndarray, " n"],
    at: Float[np.ndarray, " k"],
    lambda_: Float[np.ndarray, ""] | np.floating | float,
    *,
    weights: Float[np.ndarray, " n"] | None = None,
    available: Bool[np.ndarray, " n"] | None = None,
    end_weights: Float[np.ndarray, "2"] | None = None,
) -> Float[np.ndarray, "k n"]:
    """Return `smoothing_matrix` of NumPy's arrays, for natural ends, in float64.

    It takes 0.2 ms for 20 points and 8 predictions, 0.3 ms for 100 and 20. Arguments as for
    `smoothing_spline`; coincidence of points is judged at the precision of t.
    """
    weights = np.ones(len(t)) if weights is None else np.asarray(weights, np.float64)
    counted = weights if available is None else np.where(available, weights, 0)
    knots = gather_knots(t, counted)
    seen = np.flatnonzero(knots.weights > 0)
    on_knots = np.zeros((len(at), len(knots.t)))
    if len(seen) == 1:
        on_knots[:, seen] = 1
    elif len(seen) > 1:
        heavy = np.zeros(2) if end_weights is None else np.asarray(end_weights, np.float64)
        observed = knots.t[seen].astype(np.float64), knots.weights[seen]
        on_knots[:, seen] = _matrix(*observed, float(lambda_), heavy, np.asarray(at, np.float64))
    return knots.spread(on_knots)


def _matrix(
    t: Float[np.ndarray, " n"],
    weights: Float[np.ndarray, " n"],
    lambda_: float,
    end_weights: Float[np.ndarray, "2"],
    at: Float[np.ndarray, " k"],
) -> Float[np.ndarray, "k n"]:
    """Return the matrix for increasing knots, all of them with a weight."""
    h, span = np.diff(t), t[-1] - t[0]
    # Beyond it the fit is the straight line, to rounding.
    mu = min(lambda_, (1 + span**3) / np.finfo(np.float64).eps) * weights.sum()
    size = 4 * len(t) - 2  # unknowns g, v, f, b for each knot, but for the last, which has no gap
    band = np.zeros((3 * _BAND + 1, size))

    def put(rows: np.ndarray, columns: np.ndarray, values: np.ndarray | float) -> None:
        band[2 * _BAND + rows - columns, columns] = values

    knot, gap = 4 * np.arange(len(t)), 4 * np.arange(len(h))
    shear, bend = gap + 2, gap + 3  # these gaps' unknowns, and their equations
    scale = 1 / np.maximum(weights, mu)
    put(knot, knot, weights * scale)
    put(gap + 4, shear, mu * scale[1:])
    put(gap, shear, -mu * scale[:-1])
    ends = np.zeros(len(t))
    ends[[0, -1]] = end_weights
    steady = 1 / np.maximum(1, ends)
    put(knot + 1, knot + 1, ends * steady)
    for slope, after in ((gap + 5, steady[1:]), (gap + 1, -steady[:-1])):
        put(slope, bend, after)
        put(slope, shear, -h / 2 * np.abs(after))
    for row, column, values in (
        (shear, gap, -1.0),
        (shear, gap + 4, 1.0),
        (shear, gap + 1, -h / 2),
        (shear, gap + 5, -h / 2),
        (shear, shear, -(h**3) / 12),
        (bend, gap + 1, -1.0),
        (bend, gap + 5, 1.0),
        (bend, bend, -h),
    ):
        put(row, column, values)

    # Predictions are coefficients of values and slopes: one solution of the transpose for each.
    left, _, basis = hermite_basis(t, at)
    right = np.zeros((size, len(at)))
    place = np.arange(len(at))
    for offset, coefficients in zip((0, 1, 4, 5), basis, strict=True):
        right[4 * left + offset, place] = coefficients
    # Late: it takes as long to import as Equinox.
    from scipy.linalg import lapack as found

    lapack: Any = found

    factor, pivots, _ = lapack.dgbtrf(band, _BAND, _BAND, overwrite_ab=True)
    solved, _ = lapack.dgbtrs(factor, _BAND, _BAND, right, pivots, trans=1, overwrite_b=True)
    return (solved[knot] * (weights * scale)[:, None]).T
