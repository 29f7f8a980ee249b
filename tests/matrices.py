"""Both matrices of every code by the textbook, in float64: what the library's are compared with.

They take a code's public numbers (alpha, beta, lambdas) and share nothing else with it. Splines are
solved in many digits, the rest is plain NumPy. A code that is none of the package's is defined by
its own matrices: these are taken.
"""

import functools

import jax
import jax.numpy as jnp
import mpmath as mp
import numpy as np
import oracle
from scipy.interpolate import CubicSpline

from nercc_jax import Berrut, Lagrange, NeRCC, Parity, Replication, Uncoded, nested_objective
from nercc_jax.codes import BerrutSpline, LearnedDecoder
from nercc_jax.tuning import learn_decoder

# All layouts that the error at an unknown one names: `test_codes.py` compares them.
LAYOUTS = ("chebyshev", "approxifer", "sbacc", "uniform", "interleaved", "repeated")

# For lambda = 0, and for answers that a code keeps as they are. Normal equations square both, and
# 150 digits have room for that.
_SMALL, _HEAVY, _DIGITS = 1e-30, 1e30, 150
_SUMS = (Parity, Replication, Uncoded)  # whose workers get sums of data points


def errors_of_sets(model, code, x, masks, **options) -> jax.Array:
    """The nested objective under each straggler set by itself; 0 where a set loses all."""

    return jax.vmap(lambda mask: nested_objective(model, code, x, mask[None], **options))(masks)


def decoded_by_hand(code, models, groups, masks) -> np.ndarray:
    """(sets, groups, num_data, m): predictions, a set and a group at a time; NaN where one is lost.

    `models` are functions of NumPy's batches, the served one first, which get one coded data point
    at a time. An answer that is not finite is not used.
    """
    models = models if isinstance(models, list | tuple) else [models]
    found = []
    for group in np.asarray(groups, float):
        coded = encoder_matrix(code) @ group
        kinds = zip(code.worker_models, coded, strict=True)
        y = np.stack([np.asarray(models[kind](point[None]), float)[0] for kind, point in kinds])
        for mask in masks:
            responded = np.asarray(mask) & np.isfinite(y).all(axis=1)
            decoder = decoder_matrix(code, responded)
            kept = decoder.any(axis=1)[:, None]
            found.append(np.where(kept, decoder[:, responded] @ y[responded], np.nan))
    return np.swapaxes(np.reshape(found, (len(groups), len(masks), *found[0].shape)), 0, 1)


def encoder_matrix(code) -> np.ndarray:
    """(num_workers, num_data): what makes coded data points of data points."""
    k, n = code.num_data, code.num_workers
    if isinstance(code, NeRCC):
        return spline_matrix(code.alpha, code.beta, float(code.lambda_enc) * k)
    if isinstance(code, Berrut | BerrutSpline):
        return berrut_matrix(code.alpha, code.beta)
    if isinstance(code, Lagrange):
        return lagrange_matrix(code.alpha, code.beta)
    if not isinstance(code, _SUMS):
        return _float64(code.encoder_matrix())
    matrix = np.zeros((n, k))
    for worker in range(n):
        matrix[worker, _data_points_of(code, worker)] = 1
    return matrix


def decoder_matrix(code, available) -> np.ndarray:
    """(num_data, num_workers): what makes predictions of answers; 0 where there is none."""
    responded = np.flatnonzero(available)
    matrix = np.zeros((code.num_data, code.num_workers))
    if isinstance(code, NeRCC):
        if responded.size:
            matrix[:, responded] = _regression(code, np.asarray(available))
    elif isinstance(code, Berrut):
        if responded.size:
            matrix[:, responded] = berrut_matrix(_float64(code.beta)[responded], code.alpha)
    elif isinstance(code, BerrutSpline):
        if responded.size:
            beta, mu = _float64(code.beta)[responded], float(code.lambda_dec) * responded.size
            natural = code.ends == "natural"
            spline = (
                spline_matrix(beta, code.alpha, mu) if natural else cubic_matrix(beta, code.alpha)
            )
            matrix[:, responded] = spline
    elif isinstance(code, Lagrange):
        # Of more than the threshold, that many spread evenly along the line.
        order = responded[np.argsort(_float64(code.beta)[responded], kind="stable")]
        if order.size >= code.threshold:
            taken = np.floor(np.linspace(0, order.size - 1, code.threshold) + 0.5).astype(int)
            chosen = order[taken]
            matrix[:, chosen] = lagrange_matrix(_float64(code.beta)[chosen], code.alpha)
    elif isinstance(code, LearnedDecoder):
        matrix[:, responded] = _least_squares(_float64(code.root), code.num_workers, responded)
    elif not isinstance(code, _SUMS):
        return _float64(code.decoder_matrix(available))
    else:
        for data_point in range(code.num_data):
            _subtract(code, data_point, responded, matrix[data_point])
    return matrix


def learned(num_data, num_workers) -> LearnedDecoder:
    """A decoder that was learned, for these numbers of data points and workers."""
    x = jax.random.normal(jax.random.key(0), (8 * num_data, 3))
    code = NeRCC(num_data, num_workers)
    return learn_decoder(jnp.tanh, code, x, key=jax.random.key(1), num_groups=40)


def _least_squares(root, number, responded) -> np.ndarray:
    """By the normal equations, with the answers' noise; rows of sum 1 by Lagrange's multiplier."""
    moments = root.T @ root
    noise = 1e-6 * np.trace(moments[:number, :number]) / number
    inner = moments[np.ix_(responded, responded)] + noise * np.eye(responded.size)
    sides = np.concatenate([moments[responded, number:], np.ones((responded.size, 1))], axis=1)
    found = np.linalg.solve(inner, sides)
    free, common = found[:, :-1], found[:, -1:]
    return (free + common / common.sum() * (1 - free.sum(axis=0))).T


def _regression(code, available) -> np.ndarray:
    beta, alpha = _float64(code.beta), _float64(code.alpha)
    used = beta[available]
    growth = oracle.mean_gap(used) / oracle.mean_gap(beta)
    mu = float(code.lambda_dec) * growth ** float(code.gap_exponent) * used.size
    ends = float(code.end_penalty) * (1 - np.array([used.min(), used.max()]) ** 2)
    own = np.isin(used, alpha) & code.exact
    return spline_matrix(used, alpha, mu, tuple(ends), tuple(np.where(own, _HEAVY, 1.0).tolist()))


def spline_matrix(t, at, mu, ends=(0.0, 0.0), weights=None) -> np.ndarray:
    """(at, t): values at `at` of the minimiser over u of

    sum_i w_i (u(t_i) - y_i)^2 + mu (int u''^2 + ends[0] u'(first)^2 + ends[1] u'(last)^2).
    """
    t, at = _float64(t), _float64(at)
    weights = tuple(weights or [1.0] * len(t))
    return _spline_matrix(tuple(t), tuple(at), float(mu), tuple(ends), weights)


@functools.cache
def _spline_matrix(t, at, mu, ends, weights) -> np.ndarray:
    knots = sorted(set(t))
    if len(knots) == 1:
        return np.tile(np.asarray(weights) / sum(weights), (len(at), 1))
    with mp.workdps(_DIGITS):
        curve = oracle.TruncatedPowers(knots)
        rows = np.array([curve.row(0, place) for place in oracle.exactly(t)])
        weighted = rows * np.array(oracle.exactly(weights))[:, None]
        penalty = curve.penalty(oracle.exactly(ends))
        curves = oracle.eliminate(weighted.T @ rows + max(mu, _SMALL) * penalty, weighted.T)
        values = [curve.value(place, curves) for place in oracle.exactly(at)]
        return np.array(values, float)


def cubic_matrix(t, at) -> np.ndarray:
    """The interpolating cubic spline with not-a-knot ends, by SciPy; straight on beyond them."""
    at, order = _float64(at), np.argsort(t)
    if len(t) < 4:
        return spline_matrix(t, at, 0.0)
    curve = CubicSpline(t[order], np.eye(len(t))[order], bc_type="not-a-knot")
    inside = np.clip(at, t.min(), t.max())
    return curve(inside) + (at - inside)[:, None] * curve(inside, 1)


def berrut_matrix(points, at) -> np.ndarray:
    """Berrut 1988, equation 1: sum_i s_i y_i / (x - t_i) / sum_i s_i / (x - t_i), s_i = (-1)^i.

    Points that coincide are one, with the mean of what was observed there.
    """
    points, at = _float64(points), _float64(at)
    knots, place, counts = np.unique(points, return_inverse=True, return_counts=True)
    signs = (-1.0) ** np.arange(len(knots))
    on_knots = np.array([_rational(knots, signs, x) for x in at])
    return on_knots[:, place] / counts[place]


def lagrange_matrix(points, at) -> np.ndarray:
    """prod_(j != i) (x - t_j) / (t_i - t_j)."""
    points, at = _float64(points), _float64(at)
    matrix = np.ones((len(at), len(points)))
    for i, own in enumerate(points):
        for other in np.delete(points, i):
            matrix[:, i] *= (at - other) / (own - other)
    return matrix


def _rational(knots, signs, x) -> np.ndarray:
    if x in knots:
        return (knots == x).astype(float)
    terms = signs / (x - knots)
    return terms / terms.sum()


def _data_points_of(code, worker) -> list[int]:
    """The data points whose sum a worker of replication, parity or no code gets."""
    k, n = code.num_data, code.num_workers
    if isinstance(code, Parity) and worker >= k:
        return list(range(worker - k, k, n - k))
    rounds, left = divmod(n, k)
    if worker < rounds * k:
        return [worker % k]
    return [int((worker - rounds * k + 0.5) * k / left)]  # the last round, spread evenly


def _subtract(code, data_point, responded, row):
    """Fills in a row of the decoder: the first copy, else the parity without the others."""
    k, sums = code.num_data, isinstance(code, Parity)
    copies = [
        n for n in responded if (n < k or not sums) and _data_points_of(code, n) == [data_point]
    ]
    if copies:
        row[copies[0]] = 1
    elif sums:
        parity = k + data_point % (code.num_workers - k)
        others = [i for i in _data_points_of(code, parity) if i != data_point]
        if {parity, *others} <= set(responded):
            row[parity], row[others] = 1, -1


def _float64(values) -> np.ndarray:
    return np.asarray(values, np.float64)
