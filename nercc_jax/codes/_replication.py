"""Copies, or nothing: what engineers do today."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float

from ..splines.arrays import namespace
from ._checks import check_count, check_counts
from ._code import AbstractCode, MatrixOnHost, as_mask
from ._points import copies


class AbstractCopies(AbstractCode):
    """A code whose workers run on data points themselves: each answer is one's prediction."""

    def posterior_variance(
        self, available: Bool[ArrayLike, " num_workers"]
    ) -> Float[Array, " num_data"]:
        return jnp.where(self.recovered(available), 0.0, jnp.inf)

    def process_variance(
        self, y: Float[Array, "num_workers m"], available: Bool[Array, " num_workers"]
    ) -> Float[Array, ""]:
        return jnp.array(jnp.inf, y.dtype)


class Replication(AbstractCopies):
    """Each worker computes a copy of one data point; the first copy that answers is taken.

    The copies are dealt in rounds, the last one spread evenly: for K dividing N, worker n gets data
    point n mod K. A data point none of whose workers answers is lost. The "repeated" layout of
    `regression_points` has the same placement.
    """

    num_data: int = eqx.field(static=True)
    num_workers: int = eqx.field(static=True)

    def __init__(self, num_data: int, num_workers: int):
        """Make a code; raise ValueError for fewer workers than data points."""
        counts = check_counts(num_data=num_data, num_workers=num_workers)
        copies(*counts)  # says whether there are enough
        self.num_data, self.num_workers = counts

    def encoder_matrix(self) -> Float[Array, "num_workers num_data"]:
        return jnp.asarray(self.encoder_on_host(), float)

    def decoder_matrix(
        self, available: Bool[ArrayLike, " num_workers"]
    ) -> Float[Array, "num_data num_workers"]:
        return self._first(as_mask(available, (self.num_workers,))).astype(float)

    def recovered(self, available: Bool[ArrayLike, " num_workers"]) -> Bool[Array, " num_data"]:
        return jnp.any(self._first(as_mask(available, (self.num_workers,))), axis=1)

    def encoder_on_host(self) -> Float[np.ndarray, "num_workers num_data"]:
        return np.eye(self.num_data)[copies(self.num_data, self.num_workers)]

    def decoder_on_host(self, available: Bool[np.ndarray, " num_workers"]) -> MatrixOnHost:
        first = self._first(available)
        return first.astype(float), first.any(axis=1)

    def _first(self, available: Bool[Any, " num_workers"]) -> Bool[Any, "num_data num_workers"]:
        """Return which worker's answer is taken for each data point."""
        holds = copies(self.num_data, self.num_workers)[None] == np.arange(self.num_data)[:, None]
        answered = holds & available[None]
        return answered & (namespace(available).cumsum(answered, axis=1) == 1)


class Uncoded(AbstractCopies):
    """One worker a data point and nothing else: whatever straggles is lost."""

    num_data: int = eqx.field(static=True)
    num_workers: int = eqx.field(static=True)

    def __init__(self, num_data: int, num_workers: int | None = None):
        """Make a code; raise ValueError for a number of workers other than that of data points."""
        num_data = check_count("num_data", num_data)
        if num_workers not in (None, num_data):
            raise ValueError(
                f"without a code, {num_data} data points take {num_data} workers, not {num_workers}"
            )
        self.num_data = self.num_workers = num_data

    def encoder_matrix(self) -> Float[Array, "num_workers num_data"]:
        return jnp.eye(self.num_data, dtype=float)

    def decoder_matrix(
        self, available: Bool[ArrayLike, " num_workers"]
    ) -> Float[Array, "num_data num_workers"]:
        return jnp.diag(as_mask(available, (self.num_workers,)).astype(float))

    def encoder_on_host(self) -> Float[np.ndarray, "num_workers num_data"]:
        return np.eye(self.num_data)

    def decoder_on_host(self, available: Bool[np.ndarray, " num_workers"]) -> MatrixOnHost:
        return np.diag(available.astype(float)), available

    def recovered(self, available: Bool[ArrayLike, " num_workers"]) -> Bool[Array, " num_data"]:
        return as_mask(available, (self.num_workers,))
