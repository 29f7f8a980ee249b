"""The choice of the overdue rule and the redundancy by the measured tail latency.

It uses the rules of `stragglers.picking` on a replay of the pool's calls. The replay leaves out
queueing, so forecasts are corrected by measurements.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...pools import Overdue
from ...pools.clock import TimeShare
from ...pools.times import Call
from ...risk import Risk
from ...stragglers import picking, simulate
from ..core._setup import DispatchSetting, Redundancy, Setup
from ._predictor import Predictor

_LOG = logging.getLogger(__name__)
PICKING = picking.PICKING


@dataclasses.dataclass
class _Measured:
    """The measurements since the present setting was picked, or since they were last used.

    Attributes:
        since: The time at which they began.
        seconds: The latencies of requests.
        waits: The times of late copies until their answers, in multiples of the overdue limit.
        queries: The number of answered queries.
    """

    since: float
    seconds: list[float] = dataclasses.field(default_factory=list)
    waits: list[float] = dataclasses.field(default_factory=list)
    queries: int = 0


class SettingController:
    """The controller that picks the settings of a policy with `max_calls`, every 500 queries.

    The tail of each setting is forecast by a replay of the pool's latest calls. It is corrected by
    the measurements from when the same redundancy, with or without hedging, was last used. Among
    the settings that cost at most `max_calls`, and with which hardly more queries straggle than
    with the policy's own rule, the one with the least p99.9 is picked; among equivalent ones the
    one with the least p99, and then the cheapest. If copies are as slow as their queries, settings
    without hedging are candidates, too.

    Attributes:
        setting: the present setting; immutable, and replaced as a whole.
    """

    def __init__(
        self,
        setup: Setup,
        predictor: Predictor | None,
        decoding: Risk,
        wake: Callable[[], Any],
    ):
        """Start with the policy's rule.

        `decoding` is the evidence from stragglers on decoded answers. `wake` requests a call of
        `turn` on the learning thread.
        """
        self._setup, self._predictor, self._decoding, self._wake = setup, predictor, decoding, wake
        self.setting, self._reason = self._candidates()[0], "nothing is known yet"
        self._trials = picking.CopyTrials()
        # The corrections of tails, and of calls, by redundancy and whether copies are sent.
        self._factors: dict[tuple[Redundancy, bool], tuple[float, float]] = {}
        self._queries, self._due = 0, PICKING.every
        self._time = TimeShare(setup.clock, PICKING.time_share)
        self._measured = _Measured(setup.clock.now())

    def observe(self, what: str, number: int | float) -> None:
        """Record a measurement, from any thread, and pass it on."""
        self._setup.observe(what, number)
        measured = self._measured
        if what in ("request_ok", "request_deadline"):
            measured.seconds.append(number)
        elif what == "hedge_limits":
            measured.waits.append(number)
        elif what.startswith("query_"):
            measured.queries += int(number)
            before, self._queries = self._queries, self._queries + int(number)
            if before < self._due <= self._queries:  # only once: a turn that must pause is repeated
                self._wake()

    def status(self) -> dict[str, Any]:
        setting = self.setting
        return {
            "straggler_threshold": setting.overdue.factor,
            "hedge_copies": setting.overdue.copies,
            "redundancy": setting.redundancy,
            "hedges": setting.hedges,
            "reason": self._reason,
        }

    def turn(self) -> float:
        """Pick a setting if that is due; return when the next turn is due."""
        now = self._setup.clock.now()
        if self._queries < self._due:
            return math.inf
        if now < self._time.next:
            return self._time.next
        self._due = self._queries + PICKING.every
        try:
            self._pick()
        finally:
            self._time.spend(now)
        return math.inf

    def _candidates(self) -> list[DispatchSetting]:
        """Return all settings that may be picked, those with the policy's own rule first."""
        policy, coder = self._setup.policy, self._setup.coder
        extra = coder.num_workers - coder.num_data
        allowed: list[Redundancy] = ["none"]
        if extra and self._predictor is not None:
            allowed.append("uncertain")
        if extra and policy.redundancy == "always":
            allowed.append("always")
        rules = [DispatchSetting.of_policy(policy).overdue]
        for copies in range(1, min(policy.copies, PICKING.at_once) + 1):
            rules += [Overdue(factor=threshold, copies=copies) for threshold in PICKING.thresholds]
        return [DispatchSetting(rule, each) for each in allowed for rule in dict.fromkeys(rules)]

    def _pick(self) -> None:
        pool, settings, current = self._setup.pool, self._candidates(), self.setting
        calls, seed = pool.calls(), self._queries
        copies = self._extra_copies + self._setup.policy.copies
        replay = simulate.RecordedCalls.replay(calls, copies, pool.num_workers, seed)
        if replay is None:
            return
        # Learn from the queries that were hedged since the last decision.
        play = self._play(current, replay)
        waits, self._measured.waits = self._measured.waits, []
        own, copied = picking.hedged_times(replay, play)
        times = play.hedge.limit * np.array(waits, float)
        self._trials.add(times, apart=copied, alike=own, decay=PICKING.decay)
        replay, useless = self._trials.applied(replay, play.hedge.limit)
        policys_own = settings[0]
        if useless or not current.hedges:
            settings += [each._replace(hedges=False) for each in settings]
        forecasts = {each: picking.forecast(replay, self._play(each, replay)) for each in settings}
        self._learn_factors(forecasts[current], calls)
        for each, found in forecasts.items():
            tail, cost = self._factors.get((each.redundancy, each.hedges), (1.0, 1.0))
            forecasts[each] = found._replace(tail=tail * found.tail, calls=cost * found.calls)
        own_late = forecasts[policys_own].late
        most_late = own_late * (1 + PICKING.more_late) + PICKING.late_of_all
        predicts = self._predictor is not None and self._predictor.state == "answering"
        candidates = {
            each: found
            for each, found in forecasts.items()
            if (found.late <= most_late or self._answered_share(each) == 0)
            and (useless or each.hedges)
            and (predicts or each.redundancy != "uncertain")  # which needs a surrogate
        }
        chosen = picking.choose(candidates, current, self._setup.policy.max_calls or math.inf)
        if chosen == current:
            return
        found, before = forecasts[chosen], forecasts[current]
        self._reason = (
            f"late after {chosen.overdue.factor:g} medians, {chosen.overdue.copies} copies at once"
            f"{'' if chosen.hedges else ' of hung calls only'}, redundancy {chosen.redundancy}: "
            f"p99.9 of {found.tail:.2f} medians at {found.calls:.2f} calls a query, and before of "
            f"{before.tail:.2f} at {before.calls:.2f}"
        )
        self.setting, self._measured = chosen, _Measured(self._setup.clock.now())
        self._setup.observe("policy_change", 1)
        _LOG.info("policy: %s", self._reason)

    @property
    def _extra_copies(self) -> int:
        """The number of redundant copies of each query: N - 1 if K = 1, else 0."""
        coder = self._setup.coder
        return coder.num_workers - 1 if coder.num_data == 1 else 0

    def _play(self, setting: DispatchSetting, calls: simulate.RecordedCalls) -> picking.Play:
        """Return a setting in the form that the simulator replays."""
        usual = calls.median * float(np.median(calls.own))
        limit = setting.overdue.after(usual) / calls.median
        sure = calls.draws < self._answered_share(setting)
        doubled = {"none": np.zeros_like(sure), "uncertain": ~sure, "always": np.ones_like(sure)}
        coder, copies = self._setup.coder, self._extra_copies
        return picking.Play(
            simulate.Hedge(limit, setting.overdue.copies, setting.hedges),
            copies,
            doubled[setting.redundancy],
            sure,
            (coder.num_workers - coder.num_data) / coder.num_data - copies,
        )

    def _answered_share(self, setting: DispatchSetting) -> float:
        """Return the share of stragglers' queries that are predicted or decoded."""
        predicted = 0.0 if self._predictor is None else self._predictor.share
        decodes = setting.redundancy == "always" and self._setup.coder.can_decode
        return max(predicted, self._decoding.share) if decodes else predicted

    def _learn_factors(self, forecast: picking.TailForecast, calls: Sequence[Call]) -> None:
        """Update the corrections of forecasts by the measurements under the present setting."""
        for each, (tail, cost) in self._factors.items():
            self._factors[each] = 1 + (tail - 1) * PICKING.decay, 1 + (cost - 1) * PICKING.decay
        measured = self._measured
        if len(measured.seconds) < PICKING.measured:
            return
        self._measured = _Measured(self._setup.clock.now())
        ordered = np.sort(np.asarray(measured.seconds))
        median = float(ordered[len(ordered) // 2])
        tail = picking.mean_between(ordered, PICKING.p99) / median / forecast.p99
        sent = [call.size for call in calls if call.sent >= measured.since]
        # If more calls were sent than the pool records, their number is unknown.
        known = measured.queries and len(sent) < len(calls)
        cost = sum(sent) / measured.queries / forecast.calls if known else 1.0
        factors = min(max(tail, 1.0), PICKING.worst), min(max(cost, 1.0), PICKING.worst)
        self._factors[self.setting.redundancy, self.setting.hedges] = factors
