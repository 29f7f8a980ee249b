"""The inverse of a covariance matrix whose rows are replaced, kept as a whitening matrix.

A whitening matrix W of A has W' W = A^-1. From Cholesky's factor L it is L^-1. When B rows and
columns of A are replaced, one block Householder reflection moves their share of W into B of its
rows, and these are computed again: four products of n x n with n x B, where a new factor takes n^3
/ 3 operations one after the other, and solving with it is slower than multiplying by W (for n =
1,024 and 32 columns on two CPU cores ten times). Reflections are orthogonal, so rounding errors add
up but do not grow. Every solution is refined against A itself, and its error is measured.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int

from ..codes._products import multiply

_FIRST, _FACTOR, _TRIES = 4.0, 8.0, 24  # of epsilon times the diagonal; 8^24 makes all diagonal
# By how much of its right side a solution may miss it before it is refined, once, which squares it.
ERROR = 1e-2
_PROBES = 8  # right sides that this is looked at for
_HALVED = 64  # rows of a triangle up to which halves gain nothing
_BY_ROWS = Layout(major_to_minor=(0, 1))


def whiten(
    covariance: Float[Array, "n n"],
) -> tuple[Float[Array, "n n"], Float[Array, ""]]:
    """Return the inverse of Cholesky's factor, and what was added to the diagonal for it.

    Nothing is added where that is enough, else as little as makes the factor finite. NaN where the
    matrix is not finite.
    """
    factor, jitter = cholesky_factor(covariance)
    eye = jnp.eye(len(covariance), dtype=covariance.dtype)
    return jax.lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True), jitter


def whiten_on_host(covariance: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    """Return the inverse of Cholesky's factor, by NumPy in float64.

    As little is added to the diagonal as makes it positive definite. (SciPy has more of LAPACK, but
    its import takes longer than a first fit.)
    """
    own = np.diagonal(covariance).copy()
    jitter = 0.0
    for _ in range(_TRIES + 1):
        try:
            return _inverse_of_triangle(np.linalg.cholesky(covariance))
        except np.linalg.LinAlgError:
            jitter = max(jitter * _FACTOR, _FIRST * np.finfo(float).eps * own.max(initial=0))
            np.fill_diagonal(covariance, own + jitter)
    return np.full_like(covariance, np.nan)


def _inverse_of_triangle(lower: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    """Return the inverse of a lower triangle, by halves: nearly all of it is products."""
    size = len(lower)
    if size <= _HALVED:
        return np.tril(np.linalg.inv(lower))
    half, inverse = size // 2, np.zeros_like(lower)
    first, second = slice(half), slice(half, size)
    inverse[first, first] = _inverse_of_triangle(lower[first, first])
    inverse[second, second] = _inverse_of_triangle(lower[second, second])
    inverse[second, first] = -inverse[second, second] @ lower[second, first] @ inverse[first, first]
    return inverse


def soundly_whitened(
    covariance: Float[Array, "n n"],
) -> tuple[Float[Array, "n n"], Float[Array, ""], Float[Array, ""]]:
    """Return a whitening matrix with accurate solutions, what was added for it, and its error.

    In contrast to `whiten`, enough is added for solutions to be right, not only finite. The error
    is `error_of`, before refinement. It has no derivative.
    """
    size = len(covariance)
    eye = jnp.eye(size, dtype=covariance.dtype)
    unit = jnp.finfo(covariance.dtype).eps * jnp.max(jnp.diagonal(covariance), initial=0)

    def attempt(jitter: Array) -> tuple[Array, Array]:
        shifted = covariance + jitter * eye
        factor = jax.lax.linalg.cholesky(shifted, symmetrize_input=False)
        inverse = jax.lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True)
        whitening = jnp.tril(inverse)
        return whitening, error_of(shifted, whitening)

    def fails(state: tuple[Array, Array, Array, Array]) -> Array:
        _, error, _, tries = state
        return ~(error <= ERROR) & (tries < _TRIES)

    def again(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        _, _, jitter, tries = state
        jitter = jnp.maximum(jitter * _FACTOR, unit * _FIRST)
        return *attempt(jitter), jitter, tries + 1

    none = jnp.zeros_like(unit)
    start = (*attempt(none), none, jnp.zeros((), int))
    whitening, error, jitter, _ = jax.lax.while_loop(fails, again, start)
    return whitening, jitter, error


def sound_or_anew(
    covariance: Float[Array, "n n"],
    whitening: Float[Array, "n n"],
    jitter: Float[Array, ""],
    finished: Bool[Array, ""],
    most: float,
) -> tuple[Float[Array, "n n"], Float[Array, ""], Float[Array, ""]]:
    """Return this whitening matrix, its jitter and its error, or new ones where it is not accurate.

    Where it is not `finished`, or its error exceeds `most`, `soundly_whitened` makes a new one of
    the covariances without their jitter. It has no derivative.
    """
    error = error_of(covariance, whitening)

    def anew() -> tuple[Array, Array, Array]:
        eye = jnp.eye(len(covariance), dtype=covariance.dtype)
        return soundly_whitened(covariance - jitter * eye)

    sound = finished & (error <= most)
    return jax.lax.cond(sound, lambda: (whitening, jitter, error), anew)


@jax.custom_jvp
def cholesky_factor(
    covariance: Float[Array, "n n"],
) -> tuple[Float[Array, "n n"], Float[Array, ""]]:
    """Return Cholesky's factor, and what was added to the diagonal: see `whiten`."""
    size = len(covariance)
    eye = jnp.eye(size, dtype=covariance.dtype)
    unit = jnp.finfo(covariance.dtype).eps * jnp.max(jnp.diagonal(covariance), initial=0)

    def attempt(jitter: Array) -> Array:
        # What is not symmetric by a rounding need not be made so: the lower half is read.
        return jax.lax.linalg.cholesky(covariance + jitter * eye, symmetrize_input=False)

    def fails(state: tuple[Array, Array, Array]) -> Array:
        factor, _, tries = state
        return ~jnp.all(jnp.isfinite(jnp.diagonal(factor))) & (tries < _TRIES)

    def again(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        _, jitter, tries = state
        jitter = jnp.maximum(jitter * _FACTOR, unit * _FIRST)
        return attempt(jitter), jitter, tries + 1

    none = jnp.zeros_like(unit)
    factor, jitter, _ = jax.lax.while_loop(fails, again, (attempt(none), none, jnp.zeros((), int)))
    return jnp.tril(factor), jitter


@cholesky_factor.defjvp
def _(primals, tangents):
    """Return dL = L Phi(L^-1 dA L^-T), Phi the lower half with half the diagonal."""
    factor, jitter = cholesky_factor(*primals)
    solve = functools.partial(jax.lax.linalg.triangular_solve, factor, lower=True)
    middle = solve(solve(tangents[0], left_side=True), left_side=False, transpose_a=True)
    half = jnp.tril(middle) - jnp.diag(jnp.diagonal(middle)) / 2
    return (factor, jitter), (multiply(factor, half), jnp.zeros_like(jitter))


def replace_rows(
    whitening: Float[Array, "n n"],
    columns: Float[Array, "n b"],
    places: Int[Array, " b"],
) -> tuple[Float[Array, "n n"], Float[Array, ""]]:
    """Return the whitening matrix with rows and columns replaced, and what was added for it.

    Args:
        whitening: The whitening matrix before.
        columns: The new columns, with their own rows.
        places: Their places.
    """
    count = len(places)
    reflected = _reflect(whitening, whitening[:, places])
    # Of the first rows nothing is kept, and the others have nothing to do with the old columns.
    # Masked, not cut: of what takes time here most is going through memory.
    rows, old = jnp.arange(len(whitening)) < count, jnp.zeros(len(whitening), bool)
    kept = jnp.where(rows[:, None] | old.at[places].set(True), 0, reflected)
    cross = multiply(kept, columns.at[places].set(0))
    across = _by_rows(_by_rows(cross).T)
    own = columns[places] - multiply(across, cross)
    inverse, jitter = whiten((own + own.T) / 2)
    fresh = -multiply(inverse, _by_rows(multiply(across, kept)))
    return kept.at[:count].set(fresh.at[:, places].set(inverse)), jitter


def _reflect(whitening: Float[Array, "n n"], panel: Float[Array, "n b"]) -> Float[Array, "n n"]:
    """Return Q' W, with the orthogonal Q for which Q' panel is zero below its first rows.

    Q = I - V T V' (Schreiber and Van Loan 1989), from LAPACK's reflectors: T = (I + D S)^-1 D, with
    D their scales and S the upper half of V' V.
    """
    packed, scales = jnp.linalg.qr(panel, mode="raw")
    rows = jnp.triu(packed, 1) + jnp.eye(*packed.shape, dtype=packed.dtype)
    upper = jnp.triu(multiply(rows, rows.T), 1)
    middle = jax.lax.linalg.triangular_solve(
        jnp.eye(len(rows), dtype=packed.dtype) + scales[:, None] * upper,
        jnp.diag(scales),
        left_side=True,
    )
    across = multiply(middle.T, _by_rows(multiply(rows, whitening)))
    return whitening - multiply(rows.T, across)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def condition(
    covariance: Float[Array, "n n"],
    whitening: Float[Array, "n n"],
    cross: Float[Array, "q n"],
    groups: int,
) -> tuple[Float[Array, "q n"], Float[Array, "groups points points"]]:
    """Return the weights B A^-1 of points in groups, and B A^-1 B' within each group.

    The solution F is refined once by its residual, R = B - F A, and G = R W' W; then B A^-1 B' = F
    (B + R)' + R A^-1 R', in which G is right to the third order: five products with a large matrix,
    not six. Differentiable in A and B as the exact solution is.
    """
    first = _twice(cross, whitening)
    missed = cross - _by_rows(multiply(first, covariance))
    more = _twice(missed, whitening)
    known = _within(groups, first, cross + missed) + _within(groups, more, missed)
    return first + more, (known + jnp.swapaxes(known, 1, 2)) / 2


@condition.defjvp
def _(groups, primals, tangents):
    """Return dW = (dB - W dA) A^-1 of weights W, and W dB' + dB W' - W dA W'."""
    covariance, whitening, _ = primals
    weights, known = condition(*primals, groups)
    change, _, along = tangents
    turned = multiply(weights, change)
    step = _solve(covariance, whitening, along - turned)
    once = _within(groups, weights, along)
    both = once + jnp.swapaxes(once, 1, 2) - _within(groups, weights, turned)
    return (weights, known), (step, both)


def _within(
    groups: int, left: Float[Array, "q n"], right: Float[Array, "q n"]
) -> Float[Array, "groups points points"]:
    """Return left right' for rows in the same group."""
    left, right = (each.reshape(groups, -1, each.shape[1]) for each in (left, right))
    return multiply(left, jnp.swapaxes(right, 1, 2))


def _solve(
    covariance: Float[Array, "n n"],
    whitening: Float[Array, "n n"],
    right: Float[Array, "q n"],
) -> Float[Array, "q n"]:
    """Return B A^-1, refined once; differentiable in A and B as the exact solution is."""
    whitening = jax.lax.stop_gradient(whitening)

    def times(rows: Array) -> Array:
        return multiply(rows, covariance)

    def inverse(_, rows: Array) -> Array:
        first = _twice(rows, whitening)
        return first + _twice(rows - times(first), whitening)

    return jax.lax.custom_linear_solve(times, right, inverse, symmetric=True)


def error_of(covariance: Float[Array, "n n"], whitening: Float[Array, "n n"]) -> Float[Array, ""]:
    """Return the relative residual of solutions before refinement, the worst of some right sides.

    The right sides are as smooth as covariances are. (A times the solution for a unit vector is
    mostly rounding, however good the factor is.)
    """
    draws = np.random.default_rng(0).normal(size=(_PROBES, len(covariance)))
    right = _by_rows(multiply(jnp.asarray(draws, covariance.dtype), covariance))
    missed = right - _by_rows(multiply(_twice(right, whitening), covariance))
    return jnp.max(jnp.linalg.norm(missed, axis=1) / jnp.linalg.norm(right, axis=1))


def _twice(rows: Float[Array, "q n"], whitening: Float[Array, "n n"]) -> Float[Array, "q n"]:
    """Return rows W' W.

    The first product goes by columns, W rows': rows W' takes half as long again.
    """
    first = multiply(whitening, _by_rows(rows.T))
    return _by_rows(multiply(_by_rows(_by_rows(first).T), whitening))


def _by_rows(rows: Float[Array, "q n"]) -> Float[Array, "q n"]:
    """Return the same rows, laid out row by row in memory.

    Left to itself, XLA lays out products of few rows with a large matrix by columns, and its CPU
    code takes five times as long (n = 1,024, two cores).
    """
    return with_layout_constraint(rows, _BY_ROWS)
