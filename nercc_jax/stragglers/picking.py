"""The choice of how to hedge: the setting with the shortest tail within a budget of calls.

Tails are forecast by replaying recorded calls (`simulate`). Some queries are slow at any worker, so
copies of them are useless; copies that were sent show how many. These are pure functions, used by
the server's setting controller and by `hedging.hedge`.
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
    """The constants of the choice of a setting. A median is the median service time.

    Attributes:
        thresholds: Limits after which a query is late that are tried, in medians.
        at_once: The most copies of a late query that are sent together.
        every: Queries between two decisions.
        measured: Requests that a measurement needs.
        p999: The quantiles between which latencies are averaged for p99.9, which alone is unstable
            if one query in a thousand straggles twice.
        p99: The quantiles between which latencies are averaged for p99.
        same: The relative difference up to which p99.9s count as equal; the cheaper is then better.
        same_p99: The same for p99; it is wide, because full redundancy always gains a little.
        same_calls: The calls a query by which a setting must be cheaper than the present one.
        more_late: The share by which more queries may straggle than with the policy's own rule.
        late_of_all: The share of all queries that may straggle in addition.
        decay: The factor of corrections at each decision: they halve in about 11,000 queries, since
            load changes.
        worst: The largest correction of a forecast, as a factor.
        lost: The share of late queries' time that copies cannot save, above which not hedging is a
            candidate.
        tried: The share of late queries that are copied as a probe while copies seem useless.
        hung: The medians after which a query is copied in any case, since its worker may hang.
        time_share: The share of the time that decisions may take.
        edges: The edges of the bins of time, in medians, for the shares of queries whose copies are
            as slow as they are.
        trials: The number of copies that these shares need.
        sure: The standard deviations beyond chance that these shares need.
        kept: The latest calls from which `hedge` decides, as many as a pool keeps.
        recent: The latest calls from which `hedge` weighs targets.
        saved: The most copies that `hedge` saves.
        finished: The share of requests whose slower calls `hedge` does not cancel, to record times.
        slow: The medians beyond which a call counts against its target, in `hedge`.
        least_weight: The least weight of a target in `hedge`; one that is not slow has 1.
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
    """A setting in the form that the simulator replays.

    Attributes:
        hedge: The policy for late queries, with its limit in medians.
        extra: The redundant calls that are sent together with a query.
        doubled: The mask of queries that get them.
        known: The mask of queries that a surrogate answers as soon as they are late.
        further: The further calls of each doubled query, in addition to `extra`.
    """

    hedge: Hedge
    extra: int = 0
    doubled: Bool[np.ndarray, " queries"] | bool = True
    known: Bool[np.ndarray, " queries"] | bool = False
    further: float = 0.0


class TailForecast(NamedTuple):
    """The forecast for a setting.

    `tail` and `p99` are mean latencies around p99.9, and from p99 to p99.9, in medians; `calls` are
    the calls a query; `late` is the share of queries that are late.
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

    With `raced`, the second array has the times until the first answer, of a copy or of the own
    call: if slower calls are cancelled, only these times are observed.
    """
    first = np.concatenate([calls.own[None], calls.copies[: play.extra]])
    copies = calls.copies[play.extra :]
    late = play.hedge.outcome(first, copies[:0], doubled=play.doubled).late
    hedged = late & ~np.asarray(play.known)
    # The times from the limit to the first answer of a copy, as if the own call never answered.
    never, policy = np.full((1, hedged.sum()), np.inf), dataclasses.replace(play.hedge, hedges=True)
    first_copy = policy.outcome(never, copies[:, hedged]).seconds - policy.limit
    own = calls.own[hedged]
    return own, np.minimum(own, policy.limit + first_copy) if raced else first_copy


def mean_between(ordered: Float[np.ndarray, " queries"], quantiles: tuple[float, float]) -> float:
    """Return the mean of sorted numbers between two of their quantiles."""
    begin, end = (int(quantile * len(ordered)) for quantile in quantiles)
    return float(ordered[begin : max(end, begin + 1)].mean())


class CopyTrials:
    """A record of the copies of hedged queries, which shows whether copies are as slow as these.

    The times of copies are counted in bins with `PICKING.edges`. The replay gives the counts to
    expect in two cases: copies are independent calls (`apart`), or as slow as their queries
    (`alike`).
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
        """Add copies' times, in medians, and samples of the times to expect in both cases.

        Earlier counts are multiplied by `decay`.
        """
        number = len(times)
        self._seen = decay * self._seen + number * _shares_by_time(times)
        self._apart = decay * self._apart + number * _shares_by_time(apart)
        self._alike = decay * self._alike + number * _shares_by_time(alike)

    @property
    def shares(self) -> Float[np.ndarray, " bins"]:
        """Lower bounds of the shares of slow queries, by time, whose copies are as slow."""
        trials = float(self._seen.sum())
        if trials < PICKING.trials:
            return np.zeros_like(self._seen)
        more = beyond_chance(self._seen, self._apart / trials, trials)
        return np.clip(more / np.maximum(self._alike - self._apart, 1), 0, 1)

    def applied(self, calls: RecordedCalls, limit: float) -> tuple[RecordedCalls, bool]:
        """Return the calls with copies as slow as observed, and whether copies are useless.

        They are useless if they save less than half of the time beyond the limit.
        """
        as_slow = self.shares[np.digitize(calls.own, PICKING.edges)]
        return calls.as_slow(as_slow), calls.lost_share(limit, as_slow) > PICKING.lost


def beyond_chance(
    counts: Float[np.ndarray, " bins"],
    shares: Float[np.ndarray, " bins"],
    trials: Float[np.ndarray, " bins"] | float,
) -> Float[np.ndarray, " bins"]:
    """Return by how much counts exceed the expected ones and `PICKING.sure` standard deviations."""
    expected = shares * trials
    return counts - expected - PICKING.sure * np.sqrt(expected * (1 - shares) + 1)


def _shares_by_time(times: Float[np.ndarray, " times"]) -> Float[np.ndarray, " bins"]:
    counts = np.bincount(np.digitize(times, PICKING.edges), minlength=len(PICKING.edges) + 1)
    return counts / max(len(times), 1)


def choose(forecasts: Mapping[Setting, TailForecast], current: Setting, budget: float) -> Setting:
    """Return the setting with the shortest tail that costs no more than `budget` calls a query.

    That is the setting with the least p99.9; among equal ones the least p99, which may improve if
    p99.9 cannot; then the cheapest. The present setting stays if no other is clearly better. If all
    settings exceed the budget, the cheapest is chosen.
    """
    least = min(each.calls for each in forecasts.values())
    same = [each for each, found in forecasts.items() if found.calls <= max(budget, least)]
    same = _least(same, lambda each: forecasts[each].tail, PICKING.same)
    same = _least(same, lambda each: forecasts[each].p99, PICKING.same_p99)
    # Among equally cheap ones, the one with fewest late queries: approximate answers cost labels.
    cheapest = min(same, key=lambda each: (forecasts[each].calls, forecasts[each].late))
    saved = forecasts[current].calls - forecasts[cheapest].calls if current in same else np.inf
    return current if saved <= PICKING.same_calls else cheapest


def _least(
    settings: list[Setting], number: Callable[[Setting], float], margin: float
) -> list[Setting]:
    """Return the settings whose `number` exceeds the least one by at most the share `margin`."""
    numbers = [number(setting) for setting in settings]
    most = min(numbers) * (1 + margin)
    return [each for each, it in zip(settings, numbers, strict=True) if it <= most]
