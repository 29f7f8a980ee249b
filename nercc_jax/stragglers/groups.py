"""Latencies that are drawn from a law, and groups of coded data points that wait for some of them.

As in `simulate`, everything runs on any number of groups at once, without queues.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ..codes import AbstractCode
from ..codes._kept import encoder_of
from ._laws import AbstractLatency, AbstractWaiting, draws_alike


class Latencies:
    """Draws of a law, many at a time, taken from a million that were drawn once.

    JAX would compile the law's sampling for every shape. A law that differs between workers, or
    slows some of them together, is drawn once for each number of workers.

    Raises:
        ValueError: The law draws a negative or infinite latency, or not for any number of workers.
    """

    def __init__(self, law: AbstractLatency, key: PRNGKeyArray, *, draws: int = 1 << 20):
        self.law = law
        self._draws, self._key = draws, key
        self._alike = draws_alike(law)
        self._pool = self._rows(None if self._alike else 16)
        self._rows_of = {16: self._pool}
        self._seed = int(jax.random.bits(key))

    def _rows(self, workers: int | None) -> Float[np.ndarray, "..."]:
        """Return draws (rows, workers) of a law, or a million for whichever worker."""
        shape = (self._draws,) if workers is None else (max(self._draws // workers, 1), workers)
        try:
            drawn = np.asarray(self.law.sample(self._key, shape)).reshape(shape)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{self.law} does not draw latencies {shape}: its last axis must take any number "
                "of workers"
            ) from error
        if not np.all(np.isfinite(drawn) & (drawn >= 0)):
            raise ValueError(
                f"latencies must be finite, in seconds, 0 or more; {self.law} draws others"
            )
        return drawn

    def random(self, stream: int) -> np.random.Generator:
        """Return one of many independent streams of random numbers, all from the key."""
        return np.random.default_rng([self._seed, stream])

    def draw(self, stream: int, shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
        """Return latencies in seconds, the same for the same stream.

        They are independent, but for workers, the last axis, that a law slows together.
        """
        if self._alike:
            return self._pool[self.random(stream).integers(0, len(self._pool), shape)]
        if (workers := shape[-1]) not in self._rows_of:
            self._rows_of[workers] = self._rows(workers)
        rows = self._rows_of[workers]
        return rows[self.random(stream).integers(0, len(rows), shape[:-1])]

    def quantile(self, share: float) -> float:
        return float(np.quantile(self._pool, share))


class Waiting(AbstractWaiting):
    """The rule "decode when `number` workers have answered, but not before `min_wait` seconds".

    A group ends sooner if all its workers have answered, or each data point has an answer of its
    own: `own[k, n]` says that worker n runs on data point k as it came (`own_workers`). Groups may
    have workers of their own.
    """

    latency: AbstractLatency
    own: Bool[Array, "*groups num_data num_workers"] = eqx.field(converter=jnp.asarray)
    number: Int[Array, ""] = eqx.field(converter=jnp.asarray)
    min_wait: Float[Array, ""] = eqx.field(converter=lambda value: jnp.asarray(value, float))

    def outcome(
        self, latencies: Float[Array | np.ndarray, "*groups num_workers"]
    ) -> tuple[Any, Any, Any]:
        """Return the mask of answers, the time of the end, and each data point's own time.

        A data point's own time is that of its own answer, infinite where no worker runs on it.
        NumPy arrays give NumPy arrays, and sort many short rows several times faster than XLA does
        on a CPU.
        """
        workers = self.own.shape[-1]
        if latencies.shape[-1] != workers:
            raise ValueError(f"this rule is for {workers} workers, not {latencies.shape[-1]}")
        xp: Any = np if isinstance(latencies, np.ndarray) else jnp
        min_wait = xp.asarray(self.min_wait, latencies.dtype)
        arrivals = xp.sort(latencies, axis=-1)
        own = xp.where(xp.asarray(self.own), latencies[..., None, :], xp.inf).min(axis=-1)
        enough = xp.maximum(xp.take(arrivals, xp.asarray(self.number) - 1, axis=-1), min_wait)
        end = xp.minimum(xp.minimum(enough, arrivals[..., -1]), own.max(axis=-1))
        return latencies <= end[..., None], end, own

    def draw(
        self, latencies: Latencies, stream: int, shape: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the outcomes of independent groups, as many as `shape` has."""
        return self.outcome(latencies.draw(stream, (*shape, self.own.shape[-1])))


def own_workers(code: AbstractCode) -> Bool[np.ndarray, "num_data num_workers"]:
    """Return which workers run on an uncoded data point, and on which."""
    matrix = encoder_of(code)
    apart = np.abs(matrix - np.eye(code.num_data)[:, None]).max(axis=-1)
    return apart < 1e-5  # a row of a spline's encoder is a data point's to rounding
