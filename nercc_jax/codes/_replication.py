"""What engineers do today: copies, or nothing."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from ._checks import check_count, check_counts
from ._code import AbstractCode, as_mask
from ._points import copies


class AbstractCopies(AbstractCode):
    """Workers run on data points as they came: an answer tells all of one, nothing of others."""

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
        """Raises: ValueError for fewer workers than data points."""
        counts = check_counts(num_data=num_data, num_workers=num_workers)
        copies(*counts)  # says whether there are enough
        self.num_data, self.num_workers = counts

    def encoder_matrix(self) -> Float[Array, "num_workers num_data"]:
        holds = copies(self.num_data, self.num_workers)
        return jax.nn.one_hot(holds, self.num_data, dtype=float)

    def decoder_matrix(
        self, available: Bool[ArrayLike, " num_workers"]
    ) -> Float[Array, "num_data num_workers"]:
        holds = copies(self.num_data, self.num_workers) == jnp.arange(self.num_data)[:, None]
        answered = holds & as_mask(available, (self.num_workers,))
        first = answered & (jnp.cumsum(answered, axis=1) == 1)
        return first.astype(float)

    def recovered(self, available: Bool[ArrayLike, " num_workers"]) -> Bool[Array, " num_data"]:
        return jnp.any(self.decoder_matrix(available) > 0, axis=1)


class Uncoded(AbstractCopies):
    """One worker a data point and nothing else: whatever straggles is lost."""

    num_data: int = eqx.field(static=True)
    num_workers: int = eqx.field(static=True)

    def __init__(self, num_data: int, num_workers: int | None = None):
        """Raises: ValueError for a number of workers other than that of data points."""
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

    def recovered(self, available: Bool[ArrayLike, " num_workers"]) -> Bool[Array, " num_data"]:
        return as_mask(available, (self.num_workers,))
