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


def eliminate(left, right):
    """Gauss's elimination for a positive definite matrix; of arrays of mpmath numbers."""
    rows, n = np.concatenate([left, right], axis=1), len(left)
    for i in range(n):
        rows[i] /= rows[i, i]
        others = np.arange(n) != i
        rows[others] -= np.outer(rows[others, i], rows[i])
    return rows[:, n:]


class TruncatedPowers:
    """Cubic splines that are straight beyond two or more knots, but not natural at the outermost.

    In the basis 1, s, s^2, s^3, (s - s_i)^3_+ with s = t - first and s_i the inner knots.
    """

    def __init__(self, knots: Sequence):
        self._knots = exactly(knots)
        self._inner = [knot - self._knots[0] for knot in self._knots[1:-1]]

    def row(self, order: int, place):
        """The derivative of this order of all basis functions at a place between the knots."""
        s = place - self._knots[0]
        factor = [mp.mpf(1), mp.mpf(3), mp.mpf(6)][order]
        monomials = [mp.ff(p, order) * s ** max(p - order, 0) for p in range(4)]
        return np.array(monomials + [factor * max(s - k, 0) ** (3 - order) for k in self._inner])

    def penalty(self, end_weights: Sequence):
        """Of coefficients c: c' P c = int u''^2 + a u'(first)^2 + b u'(last)^2."""
        ends = zip(end_weights, (self._knots[0], self._knots[-1]), strict=True)
        parts = [(price, self.row(1, end)) for price, end in ends]
        # u'' is linear between knots, so that Simpson's rule is exact for its products.
        for start, end in itertools.pairwise(self._knots):
            for share, place in ((1, start), (4, (start + end) / 2), (1, end)):
                parts.append((share * (end - start) / 6, self.row(2, place)))
        return sum(weight * np.outer(row, row) for weight, row in parts)

    def value(self, place, coefficients):
        """u at any place; of the curve, or of each of several (a column each)."""
        inside = min(max(place, self._knots[0]), self._knots[-1])
        slope = self.row(1, inside) @ coefficients
        return self.row(0, inside) @ coefficients + (place - inside) * slope


def mean_gap(points) -> float:
    """The mean gap, by length, between all angles +-arccos(t) around the circle."""
    if len(points) == 0:
        return 2 * np.pi
    theta = [mp.acos(value) for value in exactly(points)]
    angles = sorted(mp.fmod(angle + 2 * mp.pi, 2 * mp.pi) for a in theta for angle in (a, -a))
    gaps = [later - angle for angle, later in itertools.pairwise(angles)]
    gaps.append(angles[0] + 2 * mp.pi - angles[-1])
    return float(sum(gap**2 for gap in gaps) / (2 * mp.pi))


def relative_rmse(decoded, own) -> float:
    """Root mean square error over the outputs' spread: answering with the mean would give 1."""
    decoded, own = np.asarray(decoded, np.float64), np.asarray(own, np.float64)
    spread = np.mean((own - own.mean(axis=0)) ** 2)
    return float(np.sqrt(np.mean((decoded - own) ** 2) / spread))
