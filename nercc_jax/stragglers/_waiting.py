"""When a group is decoded, and when its last prediction is there: the planner's model of time.

All that is sent at one moment takes independent draws of one latency law, and finds a worker that
is free; what the master does itself takes no time here.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ..codes import AbstractCode
from ..codes._kept import encoder_of
from ._laws import AbstractLatency, AbstractWaiting, check_alike

_POOL = 1 << 20  # draws of the latency


class Latencies:
    """Draws of a law, many at a time, taken from a million that were drawn once.

    JAX would compile the law's sampling for every shape.

    Raises:
        ValueError: The law draws a negative or infinite latency.
    """

    def __init__(self, law: AbstractLatency, key: PRNGKeyArray):
        self.law = law
        check_alike(law, "give one law for all workers, such as a TraceLatency of all their times")
        self._pool = np.asarray(law.sample(key, (_POOL,)))
        self._seed = int(jax.random.bits(key))
        if not np.all(np.isfinite(self._pool) & (self._pool >= 0)):
            raise ValueError(f"latencies must be finite, in seconds, 0 or more; {law} draws others")

    def random(self, stream: int) -> np.random.Generator:
        """Return one of many independent streams of random numbers, all from the key."""
        return np.random.default_rng([self._seed, stream])

    def draw(self, stream: int, shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
        """Independent latencies in seconds, the same for the same stream."""
        return self._pool[self.random(stream).integers(0, _POOL, shape)]

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
        self, latencies: Float[Array, " num_workers"]
    ) -> tuple[Bool[Array, " num_workers"], Float[Array, ""], Float[Array, " num_data"]]:
        """Return the mask of answers, the time of the end, and each data point's own time.

        A data point's own time is that of its own answer, infinite where no worker runs on it.
        """
        workers = self.own.shape[-1]
        if len(latencies) != workers:
            raise ValueError(f"this rule is for {workers} workers, not {len(latencies)}")
        return _wait(jnp, latencies, self.own, self.number, self.min_wait)


def _wait(xp: Any, latencies: Any, own: Any, number: Any, min_wait: Any) -> tuple[Any, Any, Any]:
    """Return `Waiting.outcome` by NumPy or JAX, for latencies with any leading axes.

    NumPy sorts many short rows several times faster than XLA does on a CPU.
    """
    arrivals = xp.sort(latencies, axis=-1)
    own = xp.min(xp.where(own, latencies[..., None, :], xp.inf), axis=-1)
    enough = xp.maximum(arrivals[..., number - 1], min_wait)
    end = xp.minimum(xp.minimum(enough, arrivals[..., -1]), xp.max(own, axis=-1))
    return latencies <= end[..., None], end, own


def own_workers(code: AbstractCode) -> Bool[np.ndarray, "num_data num_workers"]:
    """Return which workers run on an uncoded data point, and on which."""
    matrix = encoder_of(code)
    apart = np.abs(matrix - np.eye(code.num_data)[:, None]).max(axis=-1)
    return apart < 1e-5  # a row of a spline's encoder is a data point's to rounding


def draw_groups(
    rule: Waiting, latencies: Latencies, stream: int, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `Waiting.outcome` of many independent groups, with the axes `shape` in front."""
    drawn = latencies.draw(stream, (*shape, rule.own.shape[-1]))
    min_wait = np.asarray(rule.min_wait, drawn.dtype)
    return _wait(np, drawn, np.asarray(rule.own), int(rule.number), min_wait)


def last_prediction(
    end: Float[np.ndarray, "*draws groups"],
    own: Float[np.ndarray, "*draws groups num_data"],
    again: Bool[np.ndarray, "*draws groups num_data"],
    seconds: Float[np.ndarray, "*draws groups num_data"],
) -> Float[np.ndarray, "*draws"]:
    """Return when the last prediction of several groups that begin together is there.

    `again` are the data points that are sent again, uncoded, when their group ends; that takes
    `seconds`, unless their own answer comes before.
    """
    there = np.minimum(own, end[..., None] + seconds)
    late = np.max(np.where(again, there, 0), axis=-1)
    return np.max(np.maximum(end, late), axis=-1)


def draw_hedged(
    latencies: Latencies,
    stream: int,
    shape: tuple[int, ...],
    after: float,
    copies: int,
    at_once: int = 1,
) -> tuple[Float[np.ndarray, "..."], Int[np.ndarray, "..."]]:
    """Return when queries are answered, and the number of copies of each.

    Every `after` seconds, `at_once` further copies of an unanswered query go out, up to `copies` in
    all.
    """
    draws = latencies.draw(stream, (copies, *shape))
    there, sent = draws[0], np.ones(shape, int)
    for number in range(1, copies):
        when = after * (1 + (number - 1) // at_once)
        late = there > when
        sent = sent + late
        there = np.where(late, np.minimum(there, when + draws[number]), there)
    return there, sent
