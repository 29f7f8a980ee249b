"""What tails a way of serving would have had on the calls that a pool has seen.

Calls are replayed: for each as a query's own, calls of other workers that were sent soon after
stand for its copies, so that what slows many workers at once slows copies, too. Only queueing is
not in it: whoever uses this has to look at what comes of it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from ..pools import Call, Overdue

Redundancy = Literal["none", "doubtful", "always"]

# Calls of a size that its median is taken of, at least.
_LEAST = 20
# How often each call is looked at, with other copies, and another worker's is looked for.
_TIMES, _TRIES = 4, 10
# A tail is the mean of latencies between these quantiles: p99.9 by itself jumps where one query in
# a thousand straggles twice.
_TAIL, _SHOULDER = (0.998, 0.9998), (0.99, 0.999)


class Setting(NamedTuple):
    """What may be changed while queries are served.

    `overdue`: from when on a call straggles. `redundancy`: what goes out beyond the queries; copies
    of those that a predictor could not answer ("doubtful"), all that the code has, or nothing.
    """

    overdue: Overdue
    redundancy: Redundancy


@dataclasses.dataclass(frozen=True)
class Foreseen:
    """Of a setting: its tail in medians of answer times, calls a query, and who straggles.

    `tail` is about p99.9, `shoulder` the mean from p99 to there; `late` is the share of queries
    whose own worker straggles.
    """

    tail: float
    shoulder: float
    calls: float
    late: float


@dataclasses.dataclass(frozen=True)
class Replay:
    """Times of calls in medians of their size: of queries' own, and of copies in their turn.

    `median` is that of single queries, in seconds; `draws` are uniform in [0, 1).
    """

    own: Float[np.ndarray, " queries"]
    copies: Float[np.ndarray, "copies queries"]
    draws: Float[np.ndarray, " queries"]
    median: float

    def foresee(
        self, setting: Setting, *, known: float, extra: int, extra_calls: float
    ) -> Foreseen:
        """What a setting would have made of it.

        `known`: the share of stragglers' queries that are answered at once. With redundancy `extra`
        copies of a query go out with it, and with all of it a query costs `extra_calls` more.
        """
        overdue = setting.overdue
        usual = self.median * float(np.quantile(self.own, overdue.quantile))
        limit = overdue.after(usual) / self.median
        sure = self.draws < known
        twice = {"none": np.zeros_like(sure), "doubtful": ~sure, "always": np.ones_like(sure)}
        first, doubled = self.own, twice[setting.redundancy]
        for copy in self.copies[:extra]:
            first = np.where(doubled, np.minimum(first, copy), first)
        late = first > limit
        calls = 1.0 + extra_calls * float(doubled.mean())
        seconds, again = first, late & ~sure
        for number, copy in enumerate(self.copies[extra:], start=1):
            again = again & (seconds > number * limit)
            calls += float(again.mean())
            seconds = np.where(again, np.minimum(seconds, number * limit + copy), seconds)
        seconds = np.sort(np.where(late & sure, limit, seconds))
        return Foreseen(
            _between(seconds, _TAIL), _between(seconds, _SHOULDER), calls, float(late.mean())
        )


def replay_of(calls: Sequence[Call], copies: int, workers: int, seed: int) -> Replay | None:
    """Of the calls of sizes that are known well enough; None where they are too few.

    `copies`: that a query has at most, beyond its own call.
    """
    if not calls:
        return None
    _, seconds, size, worker = map(np.array, zip(*sorted(calls), strict=True))
    times, known = np.full(len(calls), np.nan), {}
    for each in np.unique(size).tolist():
        of_size = size == each
        if of_size.sum() >= _LEAST:
            known[each] = float(np.median(seconds[of_size]))
            times[of_size] = seconds[of_size] / known[each]
    sound = np.isfinite(times)
    times, worker = times[sound], worker[sound]
    if len(times) < _LEAST:
        return None
    random = np.random.default_rng(seed)
    own = np.tile(np.arange(len(times)), _TIMES)
    drawn = []
    for copy in range(copies):
        near = own.copy()
        for _ in range(_TRIES):  # a copy goes to another worker
            same = worker[near] == worker[own]
            steps = random.integers(copy * workers, (copy + 1) * workers, int(same.sum())) + 1
            near[same] = (own[same] + steps) % len(times)
        drawn.append(times[near])
    copied = np.reshape(drawn, (copies, len(own)))
    return Replay(times[own], copied, random.random(len(own)), known[min(known)])


def shoulder_of(seconds: Sequence[float]) -> float:
    """The mean from p99 to p99.9, in medians."""
    ordered = np.sort(np.asarray(seconds))
    return _between(ordered, _SHOULDER) / float(ordered[len(ordered) // 2])


def _between(ordered: Float[np.ndarray, " queries"], quantiles: tuple[float, float]) -> float:
    """The mean of sorted numbers between two quantiles."""
    begin, end = (int(quantile * len(ordered)) for quantile in quantiles)
    return float(ordered[begin : max(end, begin + 1)].mean())
