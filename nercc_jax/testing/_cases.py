"""Straggler sets with a code's results, and comparisons that name the set in which one fails."""

import dataclasses

import numpy as np

from ._structure import require


@dataclasses.dataclass(frozen=True)
class Cases:
    """Straggler sets with data points, answers, and the code's matrices in float64.

    Answers of unavailable workers are 0.
    """

    masks: np.ndarray  # (sets, N)
    x: np.ndarray  # (K, outputs)
    y: np.ndarray  # (sets, N, outputs)
    encoder: np.ndarray  # (N, K)
    decoders: np.ndarray  # (sets, K, N)
    recovered: np.ndarray  # (sets, K)
    tolerance: float


def float64_product(matrix: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a product in float64, and the sum of magnitudes that each entry is made of, plus 1."""
    vectors = np.asarray(vectors, np.float64)
    return matrix @ vectors, 1 + np.abs(matrix) @ np.abs(vectors)


def row_scale(matrices: np.ndarray) -> np.ndarray:
    """Return the sums of magnitudes that products of rows with ones are made of, plus 1."""
    return 1 + np.abs(matrices).sum(axis=-1, keepdims=True)


def check_matrices(name: str, matrices: np.ndarray, cases: Cases) -> None:
    """Check other decoders against those of `decoder_matrix`."""
    found = np.asarray(matrices, np.float64)
    check_close(name, found, cases.decoders, row_scale(cases.decoders), cases)


def check_close(
    name: str,
    found: np.ndarray,
    expected: np.ndarray,
    scale: np.ndarray,
    cases: Cases,
    where: np.ndarray | None = None,
) -> None:
    """Check arrays (sets, rows, outputs), in some rows of each set or in all."""
    with np.errstate(invalid="ignore"):
        error = np.abs(found - expected) / scale
    error = np.where(np.isnan(error), np.inf, error)
    if where is not None:
        error = np.where(where[..., None], error, 0)
    worst = error.reshape(len(error), -1).max(axis=1)
    place = int(worst.argmax())
    require(
        worst[place] <= cases.tolerance,
        f"{name} differs from what it must be with {describe(cases.masks[place])}: the relative "
        f"error is {worst[place]:.3g} (infinite where a value is not finite), over "
        f"{cases.tolerance:.3g}",
    )


def describe(mask: np.ndarray) -> str:
    """Return a straggler set in words."""
    available, missing = np.flatnonzero(mask), np.flatnonzero(~mask)
    if not missing.size:
        return "all workers available"
    if not available.size:
        return "no worker available"
    if available.size == 1:
        return f"only worker {available[0]} available"
    if missing.size == 1:
        return f"all workers but {missing[0]} available"
    return f"only workers {available.tolist()} available"
