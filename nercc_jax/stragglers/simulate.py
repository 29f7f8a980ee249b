"""The simulator: computes times, calls and answers of queries from latencies and a policy.

It runs on NumPy arrays of any number of queries: a million take a second. A policy decides what is
sent when, given the answers so far: `Hedge` sends copies of single queries, `wait_for` ends groups
of coded data points. Latencies come from recorded calls (`RecordedCalls`), or are drawn from a law
(`draws`). Each call finds an idle worker, so there is no queueing, and the master's own work takes
no time. `testing.SimulatedPool` runs the real scheduler instead, with queues, one query at a time.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int


class Outcome(NamedTuple):
    """The result of a policy for single queries.

    Attributes:
        seconds: The time until each query is answered.
        calls: The number of calls of each query.
        late: Whether none of the calls sent at the start had answered by the limit.
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
        at_once: The number of copies that are sent together.
        hedges: Whether copies are sent. Without, late queries are predicted, or wait.

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
        """Return times and calls, given the latencies of all calls that may be sent.

        Args:
            first: Latencies of each query's own call, and of its redundant calls at the start.
            copies: Latencies of the copies that may follow, in order.
            doubled: The mask of queries that get the redundant calls.
            known: The mask of queries that a surrogate answers as soon as they are late.
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
    """Return when groups are decoded: at `number` answers, but not before `min_wait` seconds.

    A group ends earlier if all its workers have answered, or each data point has an exact answer:
    `own[k, n]` says that worker n computes data point k itself. `own` may differ between groups.

    Returns:
        The mask of answers; the time of the end; and the time of each data point's first exact
        answer, infinite if no worker computes it.
    """
    arrivals = np.sort(latencies, axis=-1)
    first = np.where(own, latencies[..., None, :], np.inf).min(axis=-1)
    enough = np.maximum(arrivals[..., number - 1], min_wait)
    end = np.minimum(np.minimum(enough, arrivals[..., -1]), first.max(axis=-1))
    return latencies <= end[..., None], end, first


class RecordedCalls(NamedTuple):
    """The times of recorded calls, replayed as queries' own calls and copies, in median times.

    Each recorded call is a query's own call. Calls of other workers that were sent soon after it
    are its copies, so that an event that slows many workers slows copies, too.

    Attributes:
        own: Times of queries' own calls, in units of the median time of calls of their size.
        copies: Times of the copies of the same queries, in order, in the same unit.
        draws: Uniform numbers in [0, 1), to draw which queries a surrogate can answer.
        median: The median time of the smallest size with enough calls, in seconds.
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
            calls: For each call, when it was sent, its seconds, its size (queries) and its worker.
            copies: The most copies of a query.
            workers: The number of workers.
            seed: The seed of the choice of copies.
            least: The number of calls that the median of a size needs.
            times: How many times each call is replayed, with different copies.
            tries: The most attempts to find a call of another worker.
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
        """Return the calls with queries whose copies are as slow as they are.

        Each query is one of these with its `probability`, independently of whether a surrogate can
        answer it. Its copies take as long as its own call.
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
    """Return times of calls, with estimates for those that were cancelled before they `ended`.

    A cancelled call takes as long as a random ended call that took longer than it had until then;
    without any, twice as long as it had.
    """
    known = np.sort(seconds[ended])
    longer = np.searchsorted(known, seconds, side="right")
    drawn = longer + (random.random(len(seconds)) * (len(known) - longer)).astype(int)
    drawn = np.append(known, np.inf)[drawn]
    return np.where(ended, seconds, np.where(drawn < np.inf, drawn, 2 * seconds))
