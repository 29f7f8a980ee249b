"""Draws of a latency law on the host, and a test whether they depend on their place."""

import functools
import math
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from ._laws import AbstractLatency


def draw_latencies(
    law: AbstractLatency, key: PRNGKeyArray, shape: tuple[int, ...]
) -> Float[np.ndarray, "..."]:
    """Return latencies in seconds; the last axis is workers, which a law may slow together.

    Raises:
        ValueError: The law draws a negative or infinite latency, or cannot draw this shape.
    """
    try:
        drawn = np.asarray(law.sample(key, shape)).reshape(shape)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{law} does not draw latencies {shape}: its last axis must take any number of workers"
        ) from error
    if not np.all(np.isfinite(drawn) & (drawn >= 0)):
        raise ValueError(f"latencies must be finite, in seconds, 0 or more; {law} draws others")
    return drawn


def latency_draws(
    law: AbstractLatency, key: PRNGKeyArray
) -> Callable[[int, tuple[int, ...]], Float[np.ndarray, "..."]]:
    """Return a function of a stream's number and a shape, whose results are reproducible.

    Each stream and shape is drawn once. If a law's draws do not depend on their place, they are cut
    from vectors whose lengths are powers of two, so that few programs are compiled.
    """
    alike = draws_alike(law)

    @functools.cache
    def drawn(stream: int, shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
        own, number = jax.random.fold_in(key, stream), math.prod(shape)
        if not alike:
            return draw_latencies(law, own, shape)
        line = draw_latencies(law, own, (1 << (number - 1).bit_length(),))
        return line[:number].reshape(shape)

    return drawn


def draws_alike(law: AbstractLatency) -> bool:
    """Return whether a law's draws are independent of their place, for every shape.

    If they are, draws in rows equal those in a vector with the same key, for any function of
    `jax.random`. The number of workers in a row is prime, so racks of any size do not fit, and
    there are enough rows to contain a rare event.
    """
    rows, workers = 256, 257
    try:
        line = np.asarray(law.sample(jax.random.key(0), (rows * workers,)))
        drawn = np.asarray(law.sample(jax.random.key(0), (rows, workers)))
    except (TypeError, ValueError):
        return False
    alike = drawn.shape == (rows, workers) and line.shape == (rows * workers,)
    return alike and np.allclose(line, drawn.ravel(), rtol=1e-4, equal_nan=True)
