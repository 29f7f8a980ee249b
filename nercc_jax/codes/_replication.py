"""Replication, and no code at all: the usual alternatives to coding."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float

from ..arrays import check_count, check_counts, namespace
from .code import AbstractNumpyCode
from .points import copies


class AbstractCopies(AbstractNumpyCode):
    """A code whose workers compute copies of data points: each answer is a prediction.

    Of several copies that answered, the one of the lowest worker is taken.
    """

    num_data: int = eqx.field(static=True)
    num_workers: int = eqx.field(static=True)

    def _encoder(self) -> Float[Any, "num_workers num_data"]:
        return np.eye(self.num_data)[copies(self.num_data, self.num_workers)]

    def _decoder(self, available: Bool[Any, " num_workers"]) -> Float[Any, "num_data num_workers"]:
        holds = copies(self.num_data, self.num_workers)[None] == np.arange(self.num_data)[:, None]
        answered = holds & available[None]
        first = answered & (namespace(available).cumsum(answered, axis=1) == 1)
        return first.astype(float)

    def posterior_variance(
        self, available: Bool[ArrayLike, " num_workers"]
    ) -> Float[Array, " num_data"]:
        return jnp.where(self.recovered(available), 0.0, jnp.inf)

    def process_variance(
        self, y: Float[Array, "num_workers m"], available: Bool[Array, " num_workers"]
    ) -> Float[Array, ""]:
        return jnp.array(jnp.inf, y.dtype)


class Replication(AbstractCopies):
    """Replication: each worker computes a copy of one data point.

    The copies are dealt in rounds, the last one spread evenly: if K divides N, worker n gets data
    point n mod K. If none of its workers answers, a data point is lost. The "repeated" layout of
    `regression_points` has the same placement.
    """

    def __init__(self, num_data: int, num_workers: int):
        """Make a code; raise ValueError for fewer workers than data points."""
        self.num_data, self.num_workers = check_counts(num_data=num_data, num_workers=num_workers)
        copies(self.num_data, self.num_workers)  # says whether there are enough


class Uncoded(AbstractCopies):
    """No code: one worker for each data point, which is lost if its worker straggles."""

    def __init__(self, num_data: int, num_workers: int | None = None):
        """Make a code; raise ValueError for a number of workers other than that of data points."""
        num_data = check_count("num_data", num_data)
        if num_workers not in (None, num_data):
            raise ValueError(
                f"without a code, {num_data} data points take {num_data} workers, not {num_workers}"
            )
        self.num_data = self.num_workers = num_data
