"""What the library computes, by the textbook and in 50 digits; shares nothing with it.

Smoothing splines: Green and Silverman 1994, section 2.3, Reinsch's pentadiagonal system, solved by
an LDL' decomposition in mpmath. With 50 digits its cancellation does not matter. With prices on the
slopes at the ends: normal equations in the truncated power basis.
"""

import itertools
from collections.abc import Sequence

import mpmath as mp
import numpy as np

mp.mp.dps = 50


def exactly(values) -> list:
    """Floats of any precision as exact 50-digit numbers; mpmath numbers stay as they are."""
    if isinstance(values, np.ndarray):
        values = values.astype(np.float64)
    return [value if isinstance(value, mp.mpf) else mp.mpf(float(value)) for value in values]


def merge(t: Sequence, y: Sequence, available=None) -> tuple[list, list, list]:
    """Distinct increasing knots, mean observations and counts of the available points."""
    t, y = exactly(t), exactly(y)
    chosen = [i for i in range(len(t)) if available is None or available[i]]
    knots = sorted({t[i] for i in chosen})
    groups = [[y[i] for i in chosen if t[i] == knot] for knot in knots]
    return knots, [sum(g) / len(g) for g in groups], [mp.mpf(len(g)) for g in groups]


def smoothing_spline(t, y, lambda_, at, *, available=None) -> list:
    """u(at) for the minimiser of 1/n sum |u(t_i) - y_i|^2 + lambda int |u''|^2."""
    t, y, w = merge(t, y, available)
    at, n = exactly(at), len(t)
    if n == 1:
        return [y[0] for _ in at]
    mu = (lambda_ if isinstance(lambda_, mp.mpf) else mp.mpf(float(lambda_))) * sum(w)
    h = [t[i + 1] - t[i] for i in range(n - 1)]
    q = [(1 / h[j], -1 / h[j] - 1 / h[j + 1], 1 / h[j + 1]) for j in range(n - 2)]
    m = n - 2
    d0 = [
        (h[j] + h[j + 1]) / 3 + mu * sum(q[j][k] ** 2 / w[j + k] for k in range(3))
        for j in range(m)
    ]
    d1 = [
        h[j + 1] / 6 + mu * (q[j][1] * q[j + 1][0] / w[j + 1] + q[j][2] * q[j + 1][1] / w[j + 2])
        for j in range(m - 1)
    ]
    d2 = [mu * q[j][2] * q[j + 2][0] / w[j + 2] for j in range(m - 2)]
    gamma = _solve(d0, d1, d2, [sum(q[j][k] * y[j + k] for k in range(3)) for j in range(m)])
    g = [
        y[i] - mu / w[i] * sum(q[j][i - j] * gamma[j] for j in range(max(0, i - 2), min(m, i + 1)))
        for i in range(n)
    ]
    return [_evaluate(t, h, g, [mp.mpf(0), *gamma, mp.mpf(0)], a) for a in at]


def _solve(d0, d1, d2, b):
    """LDL' of a symmetric pentadiagonal system."""
    m = len(d0)
    d, l1, l2, z = [0] * m, [0] * m, [0] * m, list(b)
    for j in range(m):
        before = l1[j - 1] if j >= 1 else 0
        d[j] = d0[j] - (before**2 * d[j - 1] if j >= 1 else 0)
        d[j] -= l2[j - 2] ** 2 * d[j - 2] if j >= 2 else 0
        if j + 1 < m:
            l1[j] = (d1[j] - (before * d[j - 1] * l2[j - 1] if j >= 1 else 0)) / d[j]
        if j + 2 < m:
            l2[j] = d2[j] / d[j]
        z[j] -= (before * z[j - 1] if j >= 1 else 0) + (l2[j - 2] * z[j - 2] if j >= 2 else 0)
    x = [z[j] / d[j] for j in range(m)]
    for j in reversed(range(m)):
        x[j] -= (l1[j] * x[j + 1] if j + 1 < m else 0) + (l2[j] * x[j + 2] if j + 2 < m else 0)
    return x


def _evaluate(t, h, g, gamma, a):
    """The natural cubic with values g and second derivatives gamma at t."""
    if a <= t[0]:
        return g[0] - (t[0] - a) * ((g[1] - g[0]) / h[0] - h[0] / 6 * gamma[1])
    if a >= t[-1]:
        return g[-1] + (a - t[-1]) * ((g[-1] - g[-2]) / h[-1] + h[-1] / 6 * gamma[-2])
    i = max(j for j in range(len(h)) if t[j] <= a)
    u, v = a - t[i], t[i + 1] - a
    bend = (1 + u / h[i]) * gamma[i + 1] + (1 + v / h[i]) * gamma[i]
    return (u * g[i + 1] + v * g[i]) / h[i] - u * v / 6 * bend


def spline_with_end_prices(t, y, lambda_, end_weights, at, *, available=None) -> list:
    """u(at) for the minimiser of

        1/n sum |u(t_i) - y_i|^2 + lambda (int u''^2 + a u'(first)^2 + b u'(last)^2),

    with (a, b) the end weights: between the outermost points some cubic spline with knots at the
    points, not a natural one, in the basis 1, s, s^2, s^3, (s - s_i)^3_+; beyond them straight.
    """
    t, y, w = merge(t, y, available)
    at, (a, b), lambda_ = exactly(at), exactly(end_weights), exactly([lambda_])[0]
    n = len(t)
    if n == 1:
        return [y[0] for _ in at]

    def powers(order: int, s) -> list:
        """The derivative of this order of all basis functions at s."""
        factor = [mp.mpf(1), mp.mpf(3), mp.mpf(6)][order]
        monomials = [mp.ff(p, order) * s ** max(p - order, 0) for p in range(4)]
        return monomials + [factor * max(s - knot, 0) ** (3 - order) for knot in inner]

    inner = [knot - t[0] for knot in t[1:-1]]
    size, span, total = n + 2, t[-1] - t[0], sum(w)
    left, right = mp.mpf(0), mp.mpf(0)
    for knot, value, weight in zip(t, y, w, strict=True):
        row = mp.matrix(powers(0, knot - t[0]))
        left, right = left + weight / total * row * row.T, right + weight / total * value * row
    for price, s in ((a, mp.mpf(0)), (b, span)):
        row = mp.matrix(powers(1, s))
        left += lambda_ * price * row * row.T
    # u'' is linear between knots, so that Simpson's rule is exact for its products.
    for start, end in itertools.pairwise(t):
        for share, place in ((1, start), (4, (start + end) / 2), (1, end)):
            row = mp.matrix(powers(2, place - t[0]))
            left += lambda_ * share * (end - start) / 6 * row * row.T
    assert (left.rows, left.cols) == (size, size)
    coefficients = mp.lu_solve(left, right)

    def u(order: int, s):
        return mp.fdot(powers(order, s), coefficients)

    def value(place):
        inside = min(max(place, t[0]), t[-1])
        return u(0, inside - t[0]) + (place - inside) * u(1, inside - t[0])

    return [value(place) for place in at]


def mean_gap(points) -> float:
    """The mean gap, by length, between all angles +-arccos(t) around the circle."""
    if len(points) == 0:
        return 2 * np.pi
    theta = [mp.acos(value) for value in exactly(points)]
    angles = sorted(mp.fmod(angle + 2 * mp.pi, 2 * mp.pi) for a in theta for angle in (a, -a))
    gaps = [later - angle for angle, later in itertools.pairwise(angles)]
    gaps.append(angles[0] + 2 * mp.pi - angles[-1])
    return float(sum(gap**2 for gap in gaps) / (2 * mp.pi))
