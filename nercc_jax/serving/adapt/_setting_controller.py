"""The controller of settings: picks the late rule and the redundancy by the measured tail.

Tails are forecast by replaying a pool's calls: for each as a query's own call, calls of other
workers that were sent soon after represent its copies, so that whatever slows many workers at once
slows copies, too. What slows a query, whoever computes it, is told by copies that were sent, and
makes them useless. Only queueing is left out, so forecasts are corrected by what is measured.
"""

import collections
import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from ...pools import AbstractPool, Overdue
from ...pools._clock import TimeShare
from ...pools._times import Call
from .._policy import BatchingPolicy, Observe
from ..core._adaptation import DispatchSetting, Redundancy, overdue_rule
from ..core._coder import Coder
from ._predictor import Predictor

# The number of calls of a size that its median needs.
_LEAST = 20
# How often each call is replayed, with other copies, and another worker's call is looked for.
_TIMES, _TRIES = 4, 10
# A tail is the mean of latencies between these quantiles: p99.9 by itself jumps where one query in
# a thousand straggles twice.
_P999, _P99 = (0.998, 0.9998), (0.99, 0.999)


@dataclasses.dataclass(frozen=True)
class TailForecast:
    """The forecast for a setting: mean latencies around p99.9 and from p99 to p99.9, in medians.

    And the calls per query, the share of queries whose own worker straggles, and that of hedged
    ones whose copies straggle, too.
    """

    tail: float
    p99: float
    calls: float
    late: float
    late_copies: float


@dataclasses.dataclass(frozen=True)
class CallReplay:
    """Times of queries' own calls and of their copies, in turn, in medians of their size.

    `draws` are uniform in [0, 1), to draw which queries a surrogate can answer; `median` is that of
    single queries, in seconds.
    """

    own: Float[np.ndarray, " queries"]
    copies: Float[np.ndarray, "copies queries"]
    draws: Float[np.ndarray, " queries"]
    median: float

    def alike(self, share: float, most: float = math.inf) -> "CallReplay":
        """Return the replay with this share of the queries, up to so many medians, as slow twice.

        Copies of these take as long as the query's own call.
        """
        if not share:
            return self
        # Those which a surrogate knows are drawn in the other order.
        as_slow = (self.draws[::-1] < share) & (self.own <= most)
        return dataclasses.replace(self, copies=np.where(as_slow, self.own, self.copies))

    def limit(self, setting: DispatchSetting) -> float:
        """Return the medians after which a call is late."""
        usual = self.median * float(np.quantile(self.own, setting.overdue.quantile))
        return setting.overdue.after(usual) / self.median

    def forecast(
        self, setting: DispatchSetting, *, known: float, extra: int, extra_calls: float
    ) -> TailForecast:
        """Return the forecast for a setting, of whose stragglers' queries some are known at once.

        Where redundancy is sent, `extra` copies go out with a query, and calls are added to it.
        """
        overdue, limit = setting.overdue, self.limit(setting)
        sure = self.draws < known
        twice = {"none": np.zeros_like(sure), "uncertain": ~sure, "always": np.ones_like(sure)}
        first, doubled = self.own, twice[setting.redundancy]
        for copy in self.copies[:extra]:
            first = np.where(doubled, np.minimum(first, copy), first)
        late = first > limit
        calls = 1.0 + extra_calls * float(doubled.mean())
        seconds, again = first, late & ~sure
        again_late = again & (self.copies[extra : extra + overdue.copies] > limit).all(axis=0)
        late_copies = float(again_late.sum()) / max(float(again.sum()), 1.0)
        again = again & setting.hedges
        for number, place in enumerate(range(extra, len(self.copies), overdue.copies), start=1):
            again = again & (seconds > number * limit)
            for copy in self.copies[place : place + overdue.copies]:
                calls += float(again.mean())
                seconds = np.where(again, np.minimum(seconds, number * limit + copy), seconds)
        seconds = np.sort(np.where(late & sure, limit, seconds))
        return TailForecast(
            _mean_between(seconds, _P999),
            _mean_between(seconds, _P99),
            calls,
            float(late.mean()),
            late_copies,
        )


def replay_calls(calls: Sequence[Call], copies: int, workers: int, seed: int) -> CallReplay | None:
    """Return a replay of the calls of sizes that are known well enough; None if there are too few.

    A query has `copies` at most, beyond its own call.
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
    ordered = np.sort(np.asarray(seconds))
    return _mean_between(ordered, _P99) / float(ordered[len(ordered) // 2])


def _mean_between(ordered: Float[np.ndarray, " queries"], quantiles: tuple[float, float]) -> float:
    begin, end = (int(quantile * len(ordered)) for quantile in quantiles)
    return float(ordered[begin : max(end, begin + 1)].mean())


class CopyTrials:
    """What hedged queries show of their copies: whether these are as slow as their queries.

    Their copies are late, too, or not. How often that is to be expected, the replay says: of
    copies that are other calls of that time (`apart`), and of those that are as slow as their
    queries (`alike`).
    """

    _FEWEST, _SURE = 20, 3.0  # trials; standard deviations beyond what chance does
    _RECENT = 200  # late trials whose times are kept

    def __init__(self):
        self._counts = np.zeros(4)  # trials, late ones, and those to expect
        self._times: collections.deque[float] = collections.deque(maxlen=self._RECENT)

    def add(
        self, waits: Sequence[float], limit: float, *, apart: float, alike: float, decay: float
    ) -> None:
        """Note how many limits copies took, and the shares of late ones to expect.

        A limit is in medians. What is known already counts less, by the factor `decay`.
        """
        late = [limit * wait for wait in waits if wait > 1]
        number = len(waits)
        self._counts = decay * self._counts + (number, len(late), apart * number, alike * number)
        self._times.extend(late)

    @property
    def share(self) -> float:
        """The share of late queries whose copies are as slow: what is sure of it."""
        trials, late, apart, alike = self._counts.tolist()
        if trials < self._FEWEST:
            return 0.0
        chance = self._SURE * math.sqrt(apart * (1 - apart / trials) + 1)
        return min(max((late - apart - chance) / max(alike - apart, 1), 0.0), 1.0)

    @property
    def slowest(self) -> float:
        """How slow these are, in medians. Others, which are slower, have not shown to be alike."""
        return 1.1 * float(np.quantile(self._times, 0.9)) if self._times else 0.0


_LOG = logging.getLogger(__name__)

# Candidates besides the policy's own rule: multiples of the median.
_THRESHOLDS = (1.2, 1.35, 1.5, 2.0, 3.0, 5.0)
_AT_ONCE = 2  # copies of a straggler's query that go out together, at most
# Queries between two decisions; requests, and stragglers' queries, that a measurement needs.
_EVERY, _MEASURED, _MEASURED_LATE = 500, 1000, 20
# Settings whose p99.9, p99, or calls differ by less are equivalent, and the cheaper one is taken.
# For p99 the margin is wide, because all redundancy would always gain a little.
_SAME, _SAME_P99, _SAME_CALLS = 0.03, 0.25, 0.01
# By how much more queries may straggle than by the policy's own rule: of them, and of all queries.
_MORE_LATE, _LATE_OF_ALL = 0.1, 0.001
# The correction of forecasts decays at each decision, by half in some 11,000 queries, because load
# comes and goes; and its largest factor.
_DECAY, _WORST = 0.97, 5.0
# Without hedging, more of the slow queries than this have copies that are as slow.
_USELESS = 0.5
_SHARE = 0.02  # of the time, that decisions may take


class SettingController:
    """Picks the settings that a policy with `max_calls` leaves open, every 500 queries.

    The tail of each setting is forecast by replaying the pool's latest calls, and corrected by what
    was measured when that redundancy was last tried. Among the settings that cost at most
    `max_calls`, and with which hardly more queries straggle than with the policy's own rule, the
    one with the least p99.9 is taken; among equivalent ones that with the least p99, and then the
    cheapest. Hedging is always a candidate; where copies are as slow as their queries, so is not to
    hedge.

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
        for copies in range(1, min(policy.copies, _AT_ONCE) + 1):
            rules += [Overdue(0.5, threshold, copies=copies) for threshold in _THRESHOLDS]
        self.settings = [
            DispatchSetting(rule, each) for each in allowed for rule in dict.fromkeys(rules)
        ]
        self.setting, self._reason = self.settings[0], "nothing is known yet"
        self._trials = CopyTrials()
        self._waits: list[float] = []  # for copies, in limits of the setting
        self._factors: dict[Redundancy, tuple[float, float]] = {}  # of tails, and of calls
        # The share of stragglers' queries that redundancy answers, until it was tried.
        self._decoded = 1.0
        self._queries = self._decided_at = self._decisions = 0
        self._time = TimeShare(pool.clock, _SHARE)
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
            if before < self._decided_at + _EVERY <= self._queries:
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
        if self._queries < self._decided_at + _EVERY:
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
        replay = replay_calls(calls, copies, self._pool.num_workers, self._decisions)
        if replay is None:
            return
        current = self.setting
        self._learn_copies(replay)
        replay = replay.alike(self._trials.share, self._trials.slowest)
        useless = self._trials.share > _USELESS
        settings = list(self.settings)
        if useless or not current.hedges:
            settings += [each._replace(hedges=False) for each in settings]
        forecasts = {each: self._forecast(each, replay) for each in settings}
        self._learn_factors(forecasts[current], calls)
        forecasts = {each: self._corrected(each, found) for each, found in forecasts.items()}
        most_late = forecasts[self.settings[0]].late * (1 + _MORE_LATE) + _LATE_OF_ALL
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
        same = _least(allowed, lambda each: forecasts[each].tail, _SAME)
        same = _least(same, lambda each: forecasts[each].p99, _SAME_P99)
        # Of equal calls, by the approximate answers: they cost labels.
        cheapest = min(same, key=lambda each: (forecasts[each].calls, forecasts[each].late))
        if current in same and forecasts[current].calls <= forecasts[cheapest].calls + _SAME_CALLS:
            return
        self._change(cheapest, forecasts)

    def _forecast(self, setting: DispatchSetting, replay: CallReplay) -> TailForecast:
        known = self._answered_share(setting)
        extra, calls = self._copies, self._extra_calls
        return replay.forecast(setting, known=known, extra=extra, extra_calls=calls)

    def _learn_copies(self, replay: CallReplay) -> None:
        """Learn from the queries that were hedged since the last decision."""
        waits, self._waits = self._waits, []
        apart, alike = (
            self._forecast(self.setting, replay.alike(share)).late_copies for share in (0.0, 1.0)
        )
        limit = replay.limit(self.setting)
        self._trials.add(waits, limit, apart=apart, alike=alike, decay=_DECAY)

    def _answered_share(self, setting: DispatchSetting) -> float:
        """Return the share of stragglers' queries that are predicted or decoded."""
        predicted = 0.0 if self._predictor is None else self._predictor.share
        decodes = setting.redundancy == "always" and self._coder.can_decode
        return max(predicted, self._decoded) if decodes else predicted

    def _learn_factors(self, forecast: TailForecast, calls: Sequence[Call]) -> None:
        """Correct forecasts by what was measured since the present setting holds."""
        for each, (tail, cost) in self._factors.items():
            self._factors[each] = 1 + (tail - 1) * _DECAY, 1 + (cost - 1) * _DECAY
        self._decoded = 1 + (self._decoded - 1) * _DECAY
        if len(self._seconds) < _MEASURED:
            return
        tail = p99_in_medians(self._seconds) / forecast.p99
        sent = [call.size for call in calls if call.sent >= self._since]
        again = self._counts["reexecution"]
        given = self._counts["query_decoded"] + self._counts["query_predicted"]
        queries = self._counts.total() - again
        # Where more calls were sent than the pool keeps, their number is unknown.
        known = queries and len(sent) < len(calls)
        cost = sum(sent) / queries / forecast.calls if known else 1.0
        redundancy = self.setting.redundancy
        self._factors[redundancy] = min(max(tail, 1.0), _WORST), min(max(cost, 1.0), _WORST)
        if redundancy == "always" and given + again >= _MEASURED_LATE:
            self._decoded = given / (given + again)
        self._start_measuring()

    def _start_measuring(self) -> None:
        """Attribute what is measured from now on to the present setting."""
        self._seconds, self._since = [], self._pool.clock.now()
        self._counts = collections.Counter()

    def _corrected(self, setting: DispatchSetting, forecast: TailForecast) -> TailForecast:
        tail, calls = self._factors.get(setting.redundancy, (1.0, 1.0))
        return dataclasses.replace(
            forecast, tail=tail * forecast.tail, calls=calls * forecast.calls
        )

    def _change(
        self, chosen: DispatchSetting, forecasts: dict[DispatchSetting, TailForecast]
    ) -> None:
        def describe(setting: DispatchSetting) -> str:
            forecast = forecasts[setting]
            numbers = f"p99.9 of {forecast.tail:.2f} medians at {forecast.calls:.2f} calls a query"
            return f"{_words(setting)}: {numbers}"

        reason = f"{describe(chosen)}; before, {describe(self.setting)}"
        self.setting, self._reason = chosen, reason
        self._waits = []
        self._start_measuring()
        self._pass_on("policy_change", 1)
        _LOG.info("policy: %s", reason)


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
