"""The controller of settings: picks the late rule and the redundancy by the measured tail.

Tails are forecast by replaying a pool's calls (`stragglers.simulate`). What slows a query, whoever
computes it, is told by copies that were sent, and makes them useless. Queueing is left out, so
forecasts are corrected by what is measured.
"""

import collections
import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from ...pools import AbstractPool, Overdue
from ...pools.clock import TimeShare
from ...pools.times import Call
from ...stragglers.simulate import Hedge, RecordedCalls
from .._policy import BatchingPolicy, Observe
from ..core._adaptation import DispatchSetting, Redundancy, overdue_rule
from ..core._coder import Coder
from ._predictor import Predictor

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Picking:
    """The numbers that the choice of a setting rests on.

    Attributes:
        thresholds: Limits of lateness that are tried besides the policy's own rule, in medians.
        at_once: Copies of a straggler's query that go out together, at most.
        every: Queries between two decisions.
        measured: Requests that a measurement needs.
        measured_late: Stragglers' queries that a measurement needs.
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
        time_share: Share of the time that decisions may take.
        edges: Times between which shares of queries that are slow each time differ, in medians.
        trials: Copies that these shares need.
        sure: Standard deviations beyond chance that these shares need.
    """

    thresholds: tuple[float, ...] = (1.2, 1.35, 1.5, 2.0, 3.0, 5.0)
    at_once: int = 2
    every: int = 500
    measured: int = 1000
    measured_late: int = 20
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
    time_share: float = 0.02
    edges: tuple[float, ...] = (1.5, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0)
    trials: int = 20
    sure: float = 3.0


PICKING = Picking()


@dataclasses.dataclass(frozen=True)
class TailForecast:
    """The forecast for a setting: mean latencies around p99.9 and from p99 to p99.9, in medians.

    And the calls per query, and the share of queries whose own worker straggles.
    """

    tail: float
    p99: float
    calls: float
    late: float


def forecast(
    calls: RecordedCalls,
    setting: DispatchSetting,
    *,
    known: float,
    extra: int,
    extra_calls: float,
) -> TailForecast:
    """Return the forecast for a setting, of whose stragglers' queries some are known at once.

    Where redundancy is sent, `extra` copies go out with a query, and calls are added to it.
    """
    sure, doubled = _known_and_doubled(calls, setting, known)
    first = np.concatenate([calls.own[None], calls.copies[:extra]])
    hedge, copies = hedge_of(calls, setting), calls.copies[extra:]
    found = hedge.outcome(first, copies, doubled=doubled, known=sure)
    seconds = np.sort(found.seconds)
    further = (extra_calls - extra) * float(doubled.mean())
    return TailForecast(
        _mean_between(seconds, PICKING.p999),
        _mean_between(seconds, PICKING.p99),
        float(found.calls.mean()) + further,
        float(found.late.mean()),
    )


def hedged_times(
    calls: RecordedCalls, setting: DispatchSetting, *, known: float, extra: int
) -> tuple[Float[np.ndarray, " hedged"], Float[np.ndarray, " hedged"]]:
    """Return the times of late queries that no surrogate knows, and of their copies."""
    sure, doubled = _known_and_doubled(calls, setting, known)
    first = np.concatenate([calls.own[None], calls.copies[:extra]])
    hedge, copies = hedge_of(calls, setting), calls.copies[extra:]
    hedged = hedge.outcome(first, copies[:0], doubled=doubled).late & ~sure
    copied = dataclasses.replace(hedge, hedges=True).first_copy(copies[:, hedged])
    return calls.own[hedged], copied


def hedge_of(calls: RecordedCalls, setting: DispatchSetting) -> Hedge:
    """Return a setting's policy, with its limit in medians."""
    overdue = setting.overdue
    usual = calls.median * float(np.quantile(calls.own, overdue.quantile))
    return Hedge(overdue.after(usual) / calls.median, overdue.copies, setting.hedges)


def _known_and_doubled(
    calls: RecordedCalls, setting: DispatchSetting, known: float
) -> tuple[Bool[np.ndarray, " queries"], Bool[np.ndarray, " queries"]]:
    """Return which queries a surrogate knows, and which get redundant calls."""
    sure = calls.draws < known
    doubled = {"none": np.zeros_like(sure), "uncertain": ~sure, "always": np.ones_like(sure)}
    return sure, doubled[setting.redundancy]


def _mean_between(ordered: Float[np.ndarray, " queries"], quantiles: tuple[float, float]) -> float:
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
        chance = PICKING.sure * np.sqrt(self._apart * (1 - self._apart / trials) + 1)
        more = self._seen - self._apart - chance
        return np.clip(more / np.maximum(self._alike - self._apart, 1), 0, 1)


def _shares_by_time(times: Float[np.ndarray, " times"]) -> Float[np.ndarray, " bins"]:
    counts = np.bincount(np.digitize(times, PICKING.edges), minlength=len(PICKING.edges) + 1)
    return counts / max(len(times), 1)


class SettingController:
    """Picks the settings that a policy with `max_calls` leaves open, every 500 queries.

    The tail of each setting is forecast by replaying the pool's latest calls, and corrected by what
    was measured when that redundancy was last tried, hedged or not. Among the settings that cost at
    most `max_calls`, and with which hardly more queries straggle than with the policy's own rule,
    the one with the least p99.9 is taken; among equivalent ones that with the least p99, and then
    the cheapest. Hedging is always a candidate; where copies are as slow as their queries, so is
    not to hedge.

    Attributes:
        setting: the setting that holds; immutable, and replaced as a whole.
        settings: all candidates, the policy's own first.
    """

    def __init__(
        self,
        policy: BatchingPolicy,
        coder: Coder,
        pool: AbstractPool,
        predictor: Predictor | None,
        observe: Observe,
    ):
        """Start with the policy's rule. Raises ValueError for a code that needs its redundancy."""
        assert policy.max_calls is not None
        if not coder.systematic:
            raise ValueError(
                "max_calls needs a code that sends queries as they came (interleaved or repeated "
                "points, replication, uncoded): of another one all is sent, or nothing"
            )
        self._most, self._attempts = policy.max_calls, policy.copies
        self._coder, self._pool, self._predictor = coder, pool, predictor
        self._pass_on = observe
        extra = coder.num_workers - coder.num_data
        self._extra_calls = extra / coder.num_data
        self._copies = extra if coder.num_data == 1 else 0
        allowed: list[Redundancy] = ["none"]
        if extra and predictor is not None:
            allowed.append("uncertain")
        if extra and policy.redundancy == "always":
            allowed.append("always")
        rules = [overdue_rule(policy)]
        for copies in range(1, min(policy.copies, PICKING.at_once) + 1):
            rules += [Overdue(0.5, threshold, copies=copies) for threshold in PICKING.thresholds]
        self.settings = [
            DispatchSetting(rule, each) for each in allowed for rule in dict.fromkeys(rules)
        ]
        self.setting, self._reason = self.settings[0], "nothing is known yet"
        self._trials = CopyTrials()
        self._waits: list[float] = []  # for copies, in limits of the setting
        # Of tails, and of calls, by redundancy and whether it is hedged.
        self._factors: dict[tuple[Redundancy, bool], tuple[float, float]] = {}
        # The share of stragglers' queries that redundancy answers, until it was tried.
        self._decoded = 1.0
        self._queries = self._decided_at = self._decisions = 0
        self._time = TimeShare(pool.clock, PICKING.time_share)
        self._start_measuring()
        self._turns = pool.clock.turns("nercc-controller", self._turn)
        self.start, self.close = self._turns.start, self._turns.close

    def observe(self, what: str, number: int | float) -> None:
        """Take a measurement, and pass it on. Returns at once."""
        self._pass_on(what, number)
        if what in ("request_ok", "request_deadline"):
            self._seconds.append(number)
        elif what == "hedge_limits":
            self._waits.append(number)
        elif what == "reexecution":
            self._counts[what] += int(number)
        elif what.startswith("query_"):
            self._counts[what] += int(number)
            before, self._queries = self._queries, self._queries + int(number)
            # Once: a turn that has to wait comes back by itself.
            if before < self._decided_at + PICKING.every <= self._queries:
                self._turns.wake()

    def status(self) -> dict[str, Any]:
        setting = self.setting
        return {
            "straggler_threshold": setting.overdue.factor,
            "quantile": setting.overdue.quantile,
            "hedge_copies": setting.overdue.copies,
            "redundancy": setting.redundancy,
            "hedges": setting.hedges,
            "reason": self._reason,
        }

    def _turn(self) -> float:
        if self._queries < self._decided_at + PICKING.every:
            return math.inf
        now = self._pool.clock.now()
        if now < self._time.next:
            return self._time.next
        self._decided_at, self._decisions = self._queries, self._decisions + 1
        try:
            self._decide()
        except Exception:
            # The setting stays; the next decision may do better.
            _LOG.exception("picking a setting failed")
            self._pass_on("internal_error", 1)
        self._time.spend(now)
        return math.inf

    def _decide(self) -> None:
        calls = self._pool.calls()
        copies = self._copies + self._attempts
        replay = RecordedCalls.replay(calls, copies, self._pool.num_workers, self._decisions)
        if replay is None:
            return
        current = self.setting
        # Learn from the queries that were hedged since the last decision.
        waits, self._waits = self._waits, []
        known = self._answered_share(current)
        own, copied = hedged_times(replay, current, known=known, extra=self._copies)
        limit = hedge_of(replay, current).limit
        times = limit * np.array(waits, float)
        self._trials.add(times, apart=copied, alike=own, decay=PICKING.decay)
        as_slow = self._trials.shares[np.digitize(replay.own, PICKING.edges)]
        useless = replay.lost_share(limit, as_slow) > PICKING.lost
        replay = replay.as_slow(as_slow)
        settings = list(self.settings)
        if useless or not current.hedges:
            settings += [each._replace(hedges=False) for each in settings]
        forecasts = {
            each: forecast(
                replay,
                each,
                known=self._answered_share(each),
                extra=self._copies,
                extra_calls=self._extra_calls,
            )
            for each in settings
        }
        self._learn_factors(forecasts[current], calls)
        for each, found in forecasts.items():
            tail, cost = self._factors.get((each.redundancy, each.hedges), (1.0, 1.0))
            forecasts[each] = dataclasses.replace(
                found, tail=tail * found.tail, calls=cost * found.calls
            )
        own_late = forecasts[self.settings[0]].late
        most_late = own_late * (1 + PICKING.more_late) + PICKING.late_of_all
        predicts = self._predictor is not None and self._predictor.state == "answering"
        candidates = [
            each
            for each in settings
            if (forecasts[each].late <= most_late or self._answered_share(each) == 0)
            and (useless or each.hedges)
            and (predicts or each.redundancy != "uncertain")  # nothing says what is uncertain
        ]
        # If all cost more than may be spent, the cheapest.
        least = min(forecasts[each].calls for each in candidates)
        allowed = [e for e in candidates if forecasts[e].calls <= max(self._most, least)]
        # Where p99.9 cannot be helped, p99 may.
        same = _least(allowed, lambda each: forecasts[each].tail, PICKING.same)
        same = _least(same, lambda each: forecasts[each].p99, PICKING.same_p99)
        # Of equal calls, by the approximate answers: they cost labels.
        cheapest = min(same, key=lambda each: (forecasts[each].calls, forecasts[each].late))
        saved = forecasts[current].calls - forecasts[cheapest].calls
        if current in same and saved <= PICKING.same_calls:
            return
        reasons = []
        for each in (cheapest, current):
            found = forecasts[each]
            numbers = f"p99.9 of {found.tail:.2f} medians at {found.calls:.2f} calls a query"
            reasons.append(f"{_words(each)}: {numbers}")
        self.setting, self._reason = cheapest, "; before, ".join(reasons)
        self._waits = []
        self._start_measuring()
        self._pass_on("policy_change", 1)
        _LOG.info("policy: %s", self._reason)

    def _answered_share(self, setting: DispatchSetting) -> float:
        """Return the share of stragglers' queries that are predicted or decoded."""
        predicted = 0.0 if self._predictor is None else self._predictor.share
        decodes = setting.redundancy == "always" and self._coder.can_decode
        return max(predicted, self._decoded) if decodes else predicted

    def _learn_factors(self, forecast: TailForecast, calls: Sequence[Call]) -> None:
        """Correct forecasts by what was measured since the present setting holds."""
        for each, (tail, cost) in self._factors.items():
            self._factors[each] = 1 + (tail - 1) * PICKING.decay, 1 + (cost - 1) * PICKING.decay
        self._decoded = 1 + (self._decoded - 1) * PICKING.decay
        if len(self._seconds) < PICKING.measured:
            return
        ordered = np.sort(np.asarray(self._seconds))
        median = float(ordered[len(ordered) // 2])
        tail = _mean_between(ordered, PICKING.p99) / median / forecast.p99
        sent = [call.size for call in calls if call.sent >= self._since]
        again = self._counts["reexecution"]
        given = self._counts["query_decoded"] + self._counts["query_predicted"]
        queries = self._counts.total() - again
        # Where more calls were sent than the pool keeps, their number is unknown.
        known = queries and len(sent) < len(calls)
        cost = sum(sent) / queries / forecast.calls if known else 1.0
        redundancy = self.setting.redundancy
        factors = min(max(tail, 1.0), PICKING.worst), min(max(cost, 1.0), PICKING.worst)
        self._factors[redundancy, self.setting.hedges] = factors
        if redundancy == "always" and given + again >= PICKING.measured_late:
            self._decoded = given / (given + again)
        self._start_measuring()

    def _start_measuring(self) -> None:
        """Attribute what is measured from now on to the present setting."""
        self._seconds, self._since = [], self._pool.clock.now()
        self._counts = collections.Counter()


def _least(
    settings: list[DispatchSetting], number: Callable[[DispatchSetting], float], margin: float
) -> list[DispatchSetting]:
    """Return the settings whose number exceeds the least by no more than this share."""
    numbers = [number(setting) for setting in settings]
    most = min(numbers) * (1 + margin)
    return [each for each, it in zip(settings, numbers, strict=True) if it <= most]


def _words(setting: DispatchSetting) -> str:
    overdue = setting.overdue
    when = "the median" if overdue.quantile == 0.5 else f"p{100 * overdue.quantile:g}"
    redundancy = {
        "none": "no redundancy",
        "uncertain": "redundancy where the surrogate is uncertain",
        "always": "all redundancy",
    }
    times = "" if overdue.factor == 1 else f"{overdue.factor:g} times "
    copies = f", {overdue.copies} copies at once" if overdue.copies > 1 else ""
    copies = copies if setting.hedges else ", no copies (as slow as their queries)"
    return f"late after {times}{when}{copies}, {redundancy[setting.redundancy]}"
