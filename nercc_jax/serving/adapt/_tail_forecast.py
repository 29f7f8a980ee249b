"""Forecasts of tail latencies: what a setting would have made of the calls that a pool has seen.

Calls are replayed: for each as a query's own call, calls of other workers that were sent soon after
represent its copies, so that whatever slows many workers at once slows copies, too. Only queueing
is left out, so forecasts must be corrected by what is measured.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from ...pools import Call
from ..core._adaptation import DispatchSetting

# The number of calls of a size that its median needs.
_LEAST = 20
# How often each call is replayed, with other copies, and another worker's call is looked for.
_TIMES, _TRIES = 4, 10
# A tail is the mean of latencies between these quantiles: p99.9 by itself jumps where one query in
# a thousand straggles twice.
_P999, _P99 = (0.998, 0.9998), (0.99, 0.999)


@dataclasses.dataclass(frozen=True)
class TailForecast:
    """The forecast for a setting, in medians of answer times.

    Attributes:
        tail: the mean latency around p99.9.
        p99: the mean latency from p99 to p99.9.
        calls: the calls per query.
        late: the share of queries whose own worker straggles.
    """

    tail: float
    p99: float
    calls: float
    late: float


@dataclasses.dataclass(frozen=True)
class CallReplay:
    """Times of calls in medians of their size.

    Attributes:
        own: of queries' own calls.
        copies: of their copies, in turn.
        draws: uniform in [0, 1), to draw which queries a surrogate can answer.
        median: of single queries, in seconds.
    """

    own: Float[np.ndarray, " queries"]
    copies: Float[np.ndarray, "copies queries"]
    draws: Float[np.ndarray, " queries"]
    median: float

    def forecast(
        self, setting: DispatchSetting, *, known: float, extra: int, extra_calls: float
    ) -> TailForecast:
        """Return the forecast for a setting.

        Args:
            setting: the setting.
            known: the share of stragglers' queries that are answered at once.
            extra: the copies that go out with a query where redundancy is sent.
            extra_calls: the calls that redundancy adds to a query.
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
        return TailForecast(
            _mean_between(seconds, _P999),
            _mean_between(seconds, _P99),
            calls,
            float(late.mean()),
        )


def replay_calls(calls: Sequence[Call], copies: int, workers: int, seed: int) -> CallReplay | None:
    """Return a replay of the calls of sizes that are known well enough.

    Args:
        calls: a pool's latest calls.
        copies: the largest number of copies of a query, beyond its own call.
        workers: the number of workers.
        seed: of the draws.

    Returns:
        The replay; None where there are too few calls.
    """
    if not calls:
        return None
    _, seconds, size, worker = map(np.array, zip(*sorted(calls), strict=True))
    times, medians = np.full(len(calls), np.nan), {}
    for each in np.unique(size).tolist():
        of_size = size == each
        if of_size.sum() >= _LEAST:
            medians[each] = float(np.median(seconds[of_size]))
            times[of_size] = seconds[of_size] / medians[each]
    known = np.isfinite(times)
    times, worker = times[known], worker[known]
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
    return CallReplay(times[own], copied, random.random(len(own)), medians[min(medians)])


def p99_in_medians(seconds: Sequence[float]) -> float:
    """Return the mean latency from p99 to p99.9, in medians."""
    ordered = np.sort(np.asarray(seconds))
    return _mean_between(ordered, _P99) / float(ordered[len(ordered) // 2])


def _mean_between(ordered: Float[np.ndarray, " queries"], quantiles: tuple[float, float]) -> float:
    """Return the mean of sorted numbers between two quantiles."""
    begin, end = (int(quantile * len(ordered)) for quantile in quantiles)
    return float(ordered[begin : max(end, begin + 1)].mean())
