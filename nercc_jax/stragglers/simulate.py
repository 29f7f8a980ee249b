"""The simulator: latencies of calls and a policy give times, calls, and who answered.

It runs on NumPy arrays of any number of queries at once: a million take a second. A policy says
what is sent when, given what has come by then: `Hedge` sends further copies of single queries,
`wait_for` ends groups of coded data points. Latencies come from calls that were recorded
(`RecordedCalls`), or are drawn from a law (`draws`). Each call finds a worker that is free:
queueing is left out, and what the master does itself takes no time. `testing.SimulatedPool` runs
the real scheduler instead, with queues, one query after the other.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int


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

    Example:
        >>> from nercc_jax.stragglers import Hedge
        >>> own, copies = np.array([1.0, 9.0]), np.array([1.0, 1.0])
        >>> Hedge(limit=2.0).outcome(own[None], copies[None]).seconds
        array([1., 3.])
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


def wait_for(
    number: int,
    latencies: Float[np.ndarray, "*groups num_workers"],
    own: Bool[np.ndarray, "... num_data num_workers"],
    min_wait: float = 0.0,
) -> tuple[
    Bool[np.ndarray, "*groups num_workers"],
    Float[np.ndarray, "*groups"],
    Float[np.ndarray, "*groups num_data"],
]:
    """Decode groups when `number` workers have answered, but not before `min_wait` seconds.

    A group ends sooner if all its workers have answered, or each data point has an answer of its
    own: `own[k, n]` says that worker n runs on data point k as it came. Groups may have workers of
    their own.

    Returns:
        The mask of answers; the time of the end; and each data point's own time, that of its own
        answer, infinite where no worker runs on it.
    """
    arrivals = np.sort(latencies, axis=-1)
    first = np.where(own, latencies[..., None, :], np.inf).min(axis=-1)
    enough = np.maximum(arrivals[..., number - 1], min_wait)
    end = np.minimum(np.minimum(enough, arrivals[..., -1]), first.max(axis=-1))
    return latencies <= end[..., None], end, first


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


def completed(
    seconds: Float[np.ndarray, " calls"],
    ended: Bool[np.ndarray, " calls"],
    random: np.random.Generator,
) -> Float[np.ndarray, " calls"]:
    """Return times of calls as they might have been, had none been cancelled before it `ended`.

    A cancelled call takes as long as a random one of those that ended and took longer; twice as
    long as it did where there is none.
    """
    known = np.sort(seconds[ended])
    longer = np.searchsorted(known, seconds, side="right")
    drawn = longer + (random.random(len(seconds)) * (len(known) - longer)).astype(int)
    drawn = np.append(known, np.inf)[drawn]
    return np.where(ended, seconds, np.where(drawn < np.inf, drawn, 2 * seconds))
