"""The simulator: latencies of calls and a policy give times, calls, and who answered.

It runs on NumPy arrays of any number of queries at once: a million take a second. A policy says
what is sent when, given what has come by then; `Hedge` sends further copies of single queries, and
`Waiting` ends a group of coded data points. Latencies are drawn from a law (`Latencies`) or come
from calls that were recorded (`RecordedCalls`). Each call finds a worker that is free: queueing is
left out, and what the master does itself takes no time. `testing.SimulatedPool` runs the real
scheduler instead, with queues, one query after the other.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ..codes import AbstractCode
from ..codes._kept import encoder_of
from ._laws import AbstractLatency, AbstractWaiting, check_alike


class Latencies:
    """Draws of a law, many at a time, taken from a million that were drawn once.

    JAX would compile the law's sampling for every shape.

    Raises:
        ValueError: The law draws a negative or infinite latency.
    """

    def __init__(self, law: AbstractLatency, key: PRNGKeyArray, *, draws: int = 1 << 20):
        self.law = law
        check_alike(law, "give one law for all workers, such as a TraceLatency of all their times")
        self._pool = np.asarray(law.sample(key, (draws,)))
        self._seed = int(jax.random.bits(key))
        if not np.all(np.isfinite(self._pool) & (self._pool >= 0)):
            raise ValueError(f"latencies must be finite, in seconds, 0 or more; {law} draws others")

    def random(self, stream: int) -> np.random.Generator:
        """Return one of many independent streams of random numbers, all from the key."""
        return np.random.default_rng([self._seed, stream])

    def draw(self, stream: int, shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
        """Return independent latencies in seconds, the same for the same stream."""
        return self._pool[self.random(stream).integers(0, len(self._pool), shape)]

    def quantile(self, share: float) -> float:
        return float(np.quantile(self._pool, share))


class Outcome(NamedTuple):
    """The result of a policy for single queries.

    Attributes:
        seconds: The time until each query has its answer.
        calls: The calls that were sent for it.
        late: Whether nothing that was sent at once had answered by the limit.
    """

    seconds: Float[np.ndarray, "*queries"]
    calls: Int[np.ndarray, "*queries"]
    late: Bool[np.ndarray, "*queries"]


@dataclasses.dataclass(frozen=True)
class Hedge:
    """The policy "send `at_once` copies of a query each time `limit` passes without an answer".

    Attributes:
        limit: The time after which a query without an answer is late, and between further copies,
            in the unit of the latencies.
        at_once: Copies that go out together.
        hedges: False for no copies at all: what is late is predicted, or takes its time.
    """

    limit: float
    at_once: int = 1
    hedges: bool = True

    def outcome(
        self,
        first: Float[np.ndarray, "at_start *queries"],
        copies: Float[np.ndarray, "copies *queries"],
        *,
        doubled: Bool[np.ndarray, "*queries"] | bool = True,
        known: Bool[np.ndarray, "*queries"] | bool = False,
    ) -> Outcome:
        """Return times and calls, given the latencies of all calls that might be sent.

        Args:
            first: Latencies of each query's own call, and of the redundant calls beside it.
            copies: Latencies of the copies that may follow, in this order.
            doubled: Which queries get the redundant calls.
            known: Which queries a surrogate answers when they are late, at once.
        """
        seconds = np.min(np.where(np.asarray(doubled), first[1:], np.inf), axis=0, initial=np.inf)
        seconds = np.minimum(first[0], seconds)
        calls = 1 + (len(first) - 1) * np.broadcast_to(doubled, seconds.shape).astype(int)
        late = seconds > self.limit
        hedged = late & ~np.asarray(known) & self.hedges
        for number, copy in enumerate(copies):
            when = self.limit * (1 + number // self.at_once)
            sent = hedged & (seconds > when)
            calls = calls + sent
            seconds = np.where(sent, np.minimum(seconds, when + copy), seconds)
        return Outcome(np.where(late & known, self.limit, seconds), calls, late)

    def first_copy(
        self, copies: Float[np.ndarray, "copies *queries"]
    ) -> Float[np.ndarray, "*queries"]:
        """Return the seconds from a query's limit to the first answer of its copies."""
        never = np.full((1, *copies.shape[1:]), np.inf)
        return self.outcome(never, copies).seconds - self.limit


class RecordedCalls(NamedTuple):
    """The times of recorded calls as queries' own calls and as their copies, in medians.

    For each call as a query's own, calls of other workers that were sent soon after stand for its
    copies, so that what slows many workers at once slows copies, too.

    Attributes:
        own: By the median of calls of their size.
        copies: Those of further calls of the same query, in turn.
        draws: Uniform in [0, 1), to draw which queries a surrogate can answer.
        median: That of single queries, in seconds.
    """

    own: Float[np.ndarray, " queries"]
    copies: Float[np.ndarray, "copies queries"]
    draws: Float[np.ndarray, " queries"]
    median: float

    @classmethod
    def replay(
        cls,
        calls: Sequence[tuple[float, float, int, int]],
        copies: int,
        workers: int,
        seed: int,
        *,
        least: int = 20,
        times: int = 4,
        tries: int = 10,
    ) -> "RecordedCalls | None":
        """Return a replay of calls; None if too few have a size whose median is known.

        Args:
            calls: When each was sent, its seconds, its size (queries) and its worker.
            copies: The most copies of a query.
            workers: The number of workers.
            seed: Of the choice of copies.
            least: The number of calls of a size that its median needs.
            times: How often each call is replayed, with other copies.
            tries: How often a call of another worker is looked for.
        """
        if not calls:
            return None
        _, seconds, size, worker = map(np.array, zip(*sorted(calls), strict=True))
        relative, medians = np.full(len(calls), np.nan), {}
        for each in np.unique(size).tolist():
            of_size = size == each
            if of_size.sum() >= least:
                medians[each] = float(np.median(seconds[of_size]))
                relative[of_size] = seconds[of_size] / medians[each]
        known = np.isfinite(relative)
        relative, worker = relative[known], worker[known]
        if len(relative) < least:
            return None
        random = np.random.default_rng(seed)
        own = np.tile(np.arange(len(relative)), times)
        drawn = []
        for copy in range(copies):
            near = own.copy()
            for _ in range(tries):  # a copy goes to another worker
                same = worker[near] == worker[own]
                steps = random.integers(copy * workers, (copy + 1) * workers, int(same.sum())) + 1
                near[same] = (own[same] + steps) % len(relative)
            drawn.append(relative[near])
        copied = np.reshape(drawn, (copies, len(own)))
        return cls(relative[own], copied, random.random(len(own)), medians[min(medians)])

    def as_slow(self, probability: Float[np.ndarray, " queries"]) -> "RecordedCalls":
        """Return the calls where this share of the queries is as slow each time.

        Copies of these take as long as the query's own call. They are drawn independently of the
        queries that a surrogate knows.
        """
        same = self.draws[::-1] < probability
        return self._replace(copies=np.where(same, self.own, self.copies))

    def lost_share(self, limit: float, probability: Float[np.ndarray, " queries"]) -> float:
        """Return the share of the time beyond a limit that copies cannot save (see `as_slow`)."""
        beyond = np.maximum(self.own - limit, 0)
        return float(beyond @ probability) / max(float(beyond.sum()), 1e-9)


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
        """Return the outcomes of many independent groups, with the axes `shape` in front."""
        return self.outcome(latencies.draw(stream, (*shape, self.own.shape[-1])))


def own_workers(code: AbstractCode) -> Bool[np.ndarray, "num_data num_workers"]:
    """Return which workers run on an uncoded data point, and on which."""
    matrix = encoder_of(code)
    apart = np.abs(matrix - np.eye(code.num_data)[:, None]).max(axis=-1)
    return apart < 1e-5  # a row of a spline's encoder is a data point's to rounding


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
