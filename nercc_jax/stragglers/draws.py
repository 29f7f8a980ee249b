"""Draws of a law of latency, many at a time, on the host."""

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from ._laws import AbstractLatency


def draws_alike(law: AbstractLatency) -> bool:
    """Return whether a law's draws are independent of their place, for every shape.

    Draws in rows are then those in a line with the same key, whichever of the functions in
    `jax.random` draws them. Rows of a prime number of workers are cut by racks of any size, and
    there are enough of them that a rare event is among them.
    """
    rows, workers = 256, 257
    try:
        line = np.asarray(law.sample(jax.random.key(0), (rows * workers,)))
        drawn = np.asarray(law.sample(jax.random.key(0), (rows, workers)))
    except (TypeError, ValueError):
        return False
    alike = drawn.shape == (rows, workers) and line.shape == (rows * workers,)
    return alike and np.allclose(line, drawn.ravel(), rtol=1e-4, equal_nan=True)


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
