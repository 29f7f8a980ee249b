"""The controller of settings: picks the late rule and the redundancy by the measured tail.

It chooses as `stragglers.picking` does, by a replay of the pool's calls. Queueing is left out
there, so forecasts are corrected by what is measured.
"""

import collections
import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...pools import AbstractPool, Overdue
from ...pools.clock import TimeShare
from ...pools.times import Call
from ...stragglers import picking, simulate
from .._policy import BatchingPolicy, Observe
from ..core._adaptation import DispatchSetting, Redundancy, overdue_rule
from ..core._coder import Coder
from ._predictor import Predictor

_LOG = logging.getLogger(__name__)
PICKING = picking.PICKING


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
        self._trials = picking.CopyTrials()
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
        workers, seed = self._pool.num_workers, self._decisions
        replay = simulate.RecordedCalls.replay(calls, copies, workers, seed)
        if replay is None:
            return
        current = self.setting
        # Learn from the queries that were hedged since the last decision.
        play = self._play(current, replay)
        waits, self._waits = self._waits, []
        own, copied = picking.hedged_times(replay, play)
        times = play.hedge.limit * np.array(waits, float)
        self._trials.add(times, apart=copied, alike=own, decay=PICKING.decay)
        replay, useless = self._trials.applied(replay, play.hedge.limit)
        settings = list(self.settings)
        if useless or not current.hedges:
            settings += [each._replace(hedges=False) for each in settings]
        forecasts = {each: picking.forecast(replay, self._play(each, replay)) for each in settings}
        self._learn_factors(forecasts[current], calls)
        for each, found in forecasts.items():
            tail, cost = self._factors.get((each.redundancy, each.hedges), (1.0, 1.0))
            forecasts[each] = found._replace(tail=tail * found.tail, calls=cost * found.calls)
        own_late = forecasts[self.settings[0]].late
        most_late = own_late * (1 + PICKING.more_late) + PICKING.late_of_all
        predicts = self._predictor is not None and self._predictor.state == "answering"
        candidates = {
            each: found
            for each, found in forecasts.items()
            if (found.late <= most_late or self._answered_share(each) == 0)
            and (useless or each.hedges)
            and (predicts or each.redundancy != "uncertain")  # nothing says what is uncertain
        }
        chosen = picking.choose(candidates, current, self._most)
        if chosen == current:
            return
        reasons = []
        for each in (chosen, current):
            found = forecasts[each]
            numbers = f"p99.9 of {found.tail:.2f} medians at {found.calls:.2f} calls a query"
            reasons.append(f"{_words(each)}: {numbers}")
        self.setting, self._reason = chosen, "; before, ".join(reasons)
        self._waits = []
        self._start_measuring()
        self._pass_on("policy_change", 1)
        _LOG.info("policy: %s", self._reason)

    def _play(self, setting: DispatchSetting, calls: simulate.RecordedCalls) -> picking.Play:
        """Return how the simulator plays a setting."""
        usual = calls.median * float(np.quantile(calls.own, setting.overdue.quantile))
        limit = setting.overdue.after(usual) / calls.median
        sure = calls.draws < self._answered_share(setting)
        doubled = {"none": np.zeros_like(sure), "uncertain": ~sure, "always": np.ones_like(sure)}
        return picking.Play(
            simulate.Hedge(limit, setting.overdue.copies, setting.hedges),
            self._copies,
            doubled[setting.redundancy],
            sure,
            self._extra_calls - self._copies,
        )

    def _answered_share(self, setting: DispatchSetting) -> float:
        """Return the share of stragglers' queries that are predicted or decoded."""
        predicted = 0.0 if self._predictor is None else self._predictor.share
        decodes = setting.redundancy == "always" and self._coder.can_decode
        return max(predicted, self._decoded) if decodes else predicted

    def _learn_factors(self, forecast: picking.TailForecast, calls: Sequence[Call]) -> None:
        """Correct forecasts by what was measured since the present setting holds."""
        for each, (tail, cost) in self._factors.items():
            self._factors[each] = 1 + (tail - 1) * PICKING.decay, 1 + (cost - 1) * PICKING.decay
        self._decoded = 1 + (self._decoded - 1) * PICKING.decay
        if len(self._seconds) < PICKING.measured:
            return
        ordered = np.sort(np.asarray(self._seconds))
        median = float(ordered[len(ordered) // 2])
        tail = picking.mean_between(ordered, PICKING.p99) / median / forecast.p99
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
