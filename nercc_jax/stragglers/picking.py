"""The choice of how to hedge: the setting with the shortest tail within a budget of calls.

Tails are forecast by replaying recorded calls (`simulate`), of which some queries are slow whoever
computes them: copies that were sent show it, and are then useless. Nothing here sends a call or
looks at a clock. The server's controller of settings and `hedging.hedge` both pick by it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Bool, Float

from .simulate import Hedge, RecordedCalls

Setting = TypeVar("Setting")


@dataclasses.dataclass(frozen=True)
class Picking:
    """The numbers that the choice of a setting rests on.

    Attributes:
        thresholds: Limits of lateness that are tried besides the policy's own rule, in medians.
        at_once: Copies of a straggler's query that go out together, at most.
        every: Queries between two decisions.
        measured: Requests that a measurement needs.
        p999: Quantiles between which latencies are averaged: p99.9 by itself jumps where one query
            in a thousand straggles twice.
        p99: The same for p99.
        same: Share by which p99.9s may differ and count as equal; the cheaper is then better.
        same_p99: The same for p99: wide, because all redundancy would always gain a little.
        same_calls: Calls a query by which a setting must be cheaper than the present one.
        more_late: Share by which more queries may straggle than by the policy's own rule.
        late_of_all: Share of all queries that may straggle in addition.
        decay: Factor of corrections at each decision: half in some 11,000 queries, because load
            comes and goes.
        worst: Largest correction of a forecast, as a factor.
        lost: Share of late queries' time that copies cannot save, from which on not to hedge is a
            candidate.
        tried: Share of late queries that are copied all the same, to see whether that is so still.
        hung: Medians after which a query is copied in any case: whoever has it may hang.
        time_share: Share of the time that decisions may take.
        edges: Times between which shares of queries that are slow each time differ, in medians.
        trials: Copies that these shares need.
        sure: Standard deviations beyond chance that these shares need.
        kept: Latest calls that `hedge` decides by, as many as a pool keeps.
        recent: Those by which it weighs targets.
        saved: Copies that `hedge` saves up, at most.
        finished: Share of the losers that `hedge` lets run to their end, to learn their time.
        slow: Medians beyond which a call counts against its target, in `hedge`.
        least_weight: Least weight of a target, in `hedge`; one that is not slow has 1.
    """

    thresholds: tuple[float, ...] = (1.2, 1.35, 1.5, 2.0, 3.0, 5.0)
    at_once: int = 2
    every: int = 500
    measured: int = 1000
    p999: tuple[float, float] = (0.998, 0.9998)
    p99: tuple[float, float] = (0.99, 0.999)
    same: float = 0.03
    same_p99: float = 0.25
    same_calls: float = 0.01
    more_late: float = 0.1
    late_of_all: float = 0.001
    decay: float = 0.97
    worst: float = 5.0
    lost: float = 0.5
    tried: float = 0.1
    hung: float = 30.0
    time_share: float = 0.02
    edges: tuple[float, ...] = (1.5, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0)
    trials: int = 20
    sure: float = 3.0
    kept: int = 4096
    recent: int = 2048
    saved: float = 10.0
    finished: float = 0.1
    slow: float = 1.5
    least_weight: float = 1 / 32


PICKING = Picking()


class Play(NamedTuple):
    """A setting as the simulator plays it.

    Attributes:
        hedge: The policy for late queries, with its limit in medians.
        extra: Redundant calls that go out with a query.
        doubled: Which queries get them.
        known: Which queries a surrogate answers when they are late, at once.
        further: Calls a query, of those doubled, in addition to `extra`.
    """

    hedge: Hedge
    extra: int = 0
    doubled: Bool[np.ndarray, " queries"] | bool = True
    known: Bool[np.ndarray, " queries"] | bool = False
    further: float = 0.0


class TailForecast(NamedTuple):
    """The forecast for a setting: mean latencies around p99.9 and from p99 to p99.9, in medians.

    And the calls per query, and the share of queries whose own call is late.
    """

    tail: float
    p99: float
    calls: float
    late: float


def forecast(calls: RecordedCalls, play: Play) -> TailForecast:
    """Return the forecast for a setting."""
    first = np.concatenate([calls.own[None], calls.copies[: play.extra]])
    copies, doubled = calls.copies[play.extra :], play.doubled
    found = play.hedge.outcome(first, copies, doubled=doubled, known=play.known)
    seconds = np.sort(found.seconds)
    return TailForecast(
        mean_between(seconds, PICKING.p999),
        mean_between(seconds, PICKING.p99),
        float(found.calls.mean() + play.further * np.mean(doubled)),
        float(found.late.mean()),
    )


def hedged_times(
    calls: RecordedCalls, play: Play, *, raced: bool = False
) -> tuple[Float[np.ndarray, " hedged"], Float[np.ndarray, " hedged"]]:
    """Return the times of late queries that are sent again, and of their first copies.

    With `raced` the latter are the times until the first answer, by copy or by the query's own
    call: where the loser is cancelled, no more is seen.
    """
    first = np.concatenate([calls.own[None], calls.copies[: play.extra]])
    copies = calls.copies[play.extra :]
    late = play.hedge.outcome(first, copies[:0], doubled=play.doubled).late
    hedged = late & ~np.asarray(play.known)
    # From the limit to the first answer of the copies, as if the query's own never came.
    never, policy = np.full((1, hedged.sum()), np.inf), dataclasses.replace(play.hedge, hedges=True)
    first_copy = policy.outcome(never, copies[:, hedged]).seconds - policy.limit
    own = calls.own[hedged]
    return own, np.minimum(own, policy.limit + first_copy) if raced else first_copy


def mean_between(ordered: Float[np.ndarray, " queries"], quantiles: tuple[float, float]) -> float:
    """Return the mean of sorted numbers between two of their quantiles."""
    begin, end = (int(quantile * len(ordered)) for quantile in quantiles)
    return float(ordered[begin : max(end, begin + 1)].mean())


class CopyTrials:
    """A record of the copies of hedged queries, which shows whether they are as slow as these.

    Their times are counted between `PICKING.edges`. How often each is to be expected, the replay
    says: of copies that are other calls of that time (`apart`), and of those that are as slow as
    their queries (`alike`).
    """

    def __init__(self):
        self._seen, self._apart, self._alike = np.zeros((3, len(PICKING.edges) + 1))

    def add(
        self,
        times: Float[np.ndarray, " copies"],
        *,
        apart: Float[np.ndarray, " _"],
        alike: Float[np.ndarray, " _"],
        decay: float,
    ) -> None:
        """Note copies' times, in medians, and samples of those to expect.

        What is known already counts less, by the factor `decay`.
        """
        number = len(times)
        self._seen = decay * self._seen + number * _shares_by_time(times)
        self._apart = decay * self._apart + number * _shares_by_time(apart)
        self._alike = decay * self._alike + number * _shares_by_time(alike)

    @property
    def shares(self) -> Float[np.ndarray, " bins"]:
        """The shares of slow queries, by their time, whose copies are as slow: what is sure."""
        trials = float(self._seen.sum())
        if trials < PICKING.trials:
            return np.zeros_like(self._seen)
        more = beyond_chance(self._seen, self._apart / trials, trials)
        return np.clip(more / np.maximum(self._alike - self._apart, 1), 0, 1)

    def applied(self, calls: RecordedCalls, limit: float) -> tuple[RecordedCalls, bool]:
        """Return the calls with copies as slow as was seen, and whether they are of no use.

        They are of no use where they save less than half of the time beyond the limit.
        """
        as_slow = self.shares[np.digitize(calls.own, PICKING.edges)]
        return calls.as_slow(as_slow), calls.lost_share(limit, as_slow) > PICKING.lost


def beyond_chance(
    counts: Float[np.ndarray, " bins"],
    shares: Float[np.ndarray, " bins"],
    trials: Float[np.ndarray, " bins"] | float,
) -> Float[np.ndarray, " bins"]:
    """Return by how much counts exceed these shares of the trials, and what chance adds to them."""
    expected = shares * trials
    return counts - expected - PICKING.sure * np.sqrt(expected * (1 - shares) + 1)


def _shares_by_time(times: Float[np.ndarray, " times"]) -> Float[np.ndarray, " bins"]:
    counts = np.bincount(np.digitize(times, PICKING.edges), minlength=len(PICKING.edges) + 1)
    return counts / max(len(times), 1)


def choose(forecasts: Mapping[Setting, TailForecast], current: Setting, budget: float) -> Setting:
    """Return the setting with the shortest tail that costs no more than `budget` calls a query.

    That is the least p99.9; among equal ones the least p99, which may be helped where p99.9 cannot;
    then the cheapest. The present setting stays where another is hardly better. If all cost more
    than may be spent, the cheapest is taken.
    """
    least = min(each.calls for each in forecasts.values())
    same = [each for each, found in forecasts.items() if found.calls <= max(budget, least)]
    same = _least(same, lambda each: forecasts[each].tail, PICKING.same)
    same = _least(same, lambda each: forecasts[each].p99, PICKING.same_p99)
    # Of equal calls, by the approximate answers: they cost labels.
    cheapest = min(same, key=lambda each: (forecasts[each].calls, forecasts[each].late))
    saved = forecasts[current].calls - forecasts[cheapest].calls if current in same else np.inf
    return current if saved <= PICKING.same_calls else cheapest


def _least(
    settings: list[Setting], number: Callable[[Setting], float], margin: float
) -> list[Setting]:
    """Return the settings whose number exceeds the least by no more than this share."""
    numbers = [number(setting) for setting in settings]
    most = min(numbers) * (1 + margin)
    return [each for each, it in zip(settings, numbers, strict=True) if it <= most]
