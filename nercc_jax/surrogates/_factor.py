"""The inverse Cholesky factor of a covariance matrix, computed anew or updated for changed rows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..arrays import constant, namespace


def whiten(
    covariance: Float[Any, "n n"], noise: Float[Any, ""]
) -> tuple[Float[Any, "n n"], Float[Any, ""]]:
    """Return the inverse Cholesky factor, and the jitter that was added to the diagonal.

    Rounding errors of the covariances may add up to n units in the last place of the largest one,
    so a smaller noise is raised to that. If that is not enough, the jitter is enlarged until the
    factor is finite. The factor is NaN if the matrix is not finite.

    Args:
        covariance: A covariance matrix.
        noise: The least noise in its diagonal.
    """
    xp, size = namespace(covariance), len(covariance)
    fixed, eye = constant(covariance), xp.eye(size, dtype=covariance.dtype)
    largest = xp.max(xp.diagonal(fixed), initial=0)
    unit = xp.finfo(covariance.dtype).eps * largest
    jitter = xp.maximum(size * unit - constant(noise), 0).astype(covariance.dtype)
    if xp is np:
        while True:
            try:
                lower = np.linalg.cholesky(covariance + jitter * eye if jitter else covariance)
                return _inverse_of_triangle(lower), jitter
            except np.linalg.LinAlgError:
                if not jitter < largest:
                    return np.full_like(covariance, np.nan), jitter
                jitter = np.maximum(8 * jitter, 4 * unit)

    def cholesky(matrix: Array) -> Array:
        # Only the lower half is read, so asymmetry from rounding does not matter.
        return jax.lax.linalg.cholesky(matrix, symmetrize_input=False)

    def fails(jitter: Array) -> Array:
        lower = cholesky(fixed + jitter * eye)
        return ~jnp.all(jnp.isfinite(jnp.diagonal(lower))) & (jitter < largest)

    jitter = jax.lax.while_loop(fails, lambda jitter: jnp.maximum(8 * jitter, 4 * unit), jitter)
    lower = jnp.tril(cholesky(covariance + jitter * eye))
    return jax.lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True), jitter


def _inverse_of_triangle(lower: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    """Return the inverse of a lower triangular matrix, by halves, mostly with matrix products.

    SciPy offers LAPACK's routine, but its import takes longer than a first fit.
    """
    size = len(lower)
    if size <= 64:
        return np.tril(np.linalg.inv(lower))
    half, inverse = size // 2, np.zeros_like(lower)
    first, second = slice(half), slice(half, size)
    inverse[first, first] = _inverse_of_triangle(lower[first, first])
    inverse[second, second] = _inverse_of_triangle(lower[second, second])
    inverse[second, first] = -inverse[second, second] @ lower[second, first] @ inverse[first, first]
    return inverse


def replace_rows(
    whitening: Float[np.ndarray, "n n"],
    kept: Int[np.ndarray, " kept"],
    cross: Float[np.ndarray, "kept new"],
    own: Float[np.ndarray, "new new"],
    out: Float[np.ndarray, "after after"],
) -> None:
    """Write the whitening matrix of covariances of which some rows were removed and others added.

    To remove B rows, a block Householder reflection moves the entries of their columns into B rows
    of the matrix, which are dropped: Q = I - V T V' (Schreiber and Van Loan 1989), from LAPACK's
    reflectors, with T = (I + D S)^-1 D, D their scales and S the upper half of V' V. The rest is an
    inverse Cholesky factor up to a rotation, to which the new rows are appended.

    Args:
        whitening: The whitening matrix before.
        kept: The rows of the covariances that stay, in order; at least one.
        cross: The covariances of the kept rows with the new ones.
        own: The covariances of the new rows.
        out: The output, with the kept rows first; it must contain zeros.

    Raises:
        LinAlgError: The covariances are not positive definite, up to rounding.
    """
    size = len(kept)
    held = out[:size, :size]
    gone = np.setdiff1d(np.arange(len(whitening)), kept)
    if len(gone):
        packed, scales = np.linalg.qr(whitening[:, gone], mode="raw")
        rows = np.triu(packed, 1) + np.eye(*packed.shape)
        upper = np.triu(rows @ rows.T, 1)
        middle = np.linalg.solve(np.eye(len(rows)) + scales[:, None] * upper, np.diag(scales))
        # If rows are removed from an end, a view suffices: copies take most of the time here.
        at_end = kept[-1] - kept[0] == size - 1
        rest = whitening[:, kept[0] : kept[-1] + 1] if at_end else whitening.take(kept, axis=1)
        across = middle.T @ (rows @ rest)
        np.subtract(rest[len(gone) :], rows[:, len(gone) :].T @ across, out=held)
    else:
        held[...] = whitening
    white = held @ cross
    inverse = _inverse_of_triangle(np.linalg.cholesky(own - white.T @ white))
    out[size:, :size] = -inverse @ (white.T @ held)
    out[size:, size:] = inverse
