"""Picks patience and redundancy by the tail that is measured, within what may be spent."""

import collections
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from ..pools import AbstractPool, Call, Overdue
from ._coder import Coder
from ._policy import BatchingPolicy, Measure
from ._predictor import Predictor
from ._tails import Foreseen, Redundancy, Replay, Setting, replay_of, shoulder_of

_LOG = logging.getLogger(__name__)

Observe: TypeAlias = Callable[[Measure, float], Any]

# Besides the policy's own: times the median, and hedging as it was published.
_PATIENCE, _HEDGING = (1.2, 1.35, 1.5, 2.0, 3.0), ((0.9, 1.0), (0.95, 1.0))
# Queries between two looks; requests, and stragglers' queries, that tell what came of a setting.
_EVERY, _TOLD, _TELLING = 500, 1000, 20
# Settings are alike whose p99.9, p99, or calls, differ by less: the cheaper is better, what is
# there best. Of p99 it is more, of which all redundancy would always buy a little.
_ALIKE, _ALIKE_P99, _ALIKE_CALLS = 0.03, 0.25, 0.01
# More queries may straggle than by the policy's own patience: by so much, of them and of all.
_MORE_LATE, _LATE_OF_ALL = 0.1, 0.001
# What reality made of what was foreseen is forgotten at each look, by half in some 11,000 queries:
# load comes and goes.
_FORGET, _WORST = 0.97, 5.0
_SHARE = 0.02  # of the time, that looking may take


def controller_of(
    policy: BatchingPolicy,
    coder: Coder,
    pool: AbstractPool,
    predictor: Predictor | None,
    observe: Observe,
) -> "Fixed | Controller":
    """Whose `setting` holds. Raises: ValueError where the policy does not fit the code."""
    if policy.max_calls is None:
        return Fixed(policy, observe)
    return Controller(policy, coder, pool, predictor, observe)


class Fixed:
    """The setting that a policy names, for good."""

    def __init__(self, policy: BatchingPolicy, observe: Observe):
        self.setting = Setting(Overdue(policy.quantile, policy.patience), policy.redundancy)
        self.observe = observe

    def start(self) -> None:
        """There is nothing to do."""

    def close(self) -> None:
        """There is nothing to do."""

    def status(self) -> dict[str, Any] | None:
        return None


class Controller:
    """What a policy with `max_calls` leaves open, picked anew every 500 queries.

    Each setting's tail is foreseen by replaying the pool's latest calls, and corrected by what came
    of that redundancy when it was tried last. Of those that cost no more than `max_calls`, and by
    which hardly more queries straggle than by the policy's own patience, that with the least p99.9
    is taken; of such as are alike, that with the least p99, and then the cheapest. Hedging is
    always among them.
    """

    def __init__(
        self,
        policy: BatchingPolicy,
        coder: Coder,
        pool: AbstractPool,
        predictor: Predictor | None,
        observe: Observe,
    ):
        """Raises: ValueError for a code of which nothing can be left out."""
        assert policy.max_calls is not None
        if not coder.systematic:
            raise ValueError(
                "max_calls needs a code that sends queries as they came (interleaved or repeated "
                "points, replication, uncoded): of another one all is sent, or nothing"
            )
        self._most, self._attempts = policy.max_calls, policy.copies
        self._coder, self._pool, self._predictor = coder, pool, predictor
        self._told = observe
        extra = coder.num_workers - coder.num_data
        self._extra_calls = extra / coder.num_data
        self._copies = extra if coder.num_data == 1 else 0
        allowed: list[Redundancy] = ["none"]
        if extra and predictor is not None:
            allowed.append("doubtful")
        if extra and policy.redundancy == "always":
            allowed.append("always")
        rules = [Overdue(policy.quantile, policy.patience)]
        rules += [Overdue(0.5, patience) for patience in _PATIENCE]
        rules += [Overdue(*each) for each in _HEDGING]
        self.settings = [Setting(rule, each) for each in allowed for rule in dict.fromkeys(rules)]
        self.setting, self._reason = self.settings[0], "nothing is known yet"
        self._factors: dict[Redundancy, tuple[float, float]] = {}  # of tails, and of calls
        self._decoded = 1.0  # share of stragglers' queries that redundancy is good for, till tried
        self._queries = self._looked_at = self._looks = 0
        self._rests_until = -math.inf
        self._begin()
        self._turns = pool.clock.turns("nercc-controller", self._turn)
        self.start, self.close = self._turns.start, self._turns.close

    def observe(self, what: Measure, number: int | float) -> None:
        """What the batcher measures, passed on. Comes back at once."""
        self._told(what, number)
        if what in ("request_ok", "request_deadline"):
            self._seconds.append(number)
        elif what == "reexecution":
            self._ended[what] += int(number)
        elif what.startswith("query_"):
            self._ended[what] += int(number)
            self._queries += int(number)
            if self._queries >= self._looked_at + _EVERY:
                self._turns.wake()

    def status(self) -> dict[str, Any]:
        """For a server's status."""
        setting = self.setting
        return {
            "patience": setting.overdue.factor,
            "quantile": setting.overdue.quantile,
            "redundancy": setting.redundancy,
            "reason": self._reason,
        }

    def _turn(self) -> float:
        if self._queries < self._looked_at + _EVERY:
            return math.inf
        now = self._pool.clock.now()
        if now < self._rests_until:
            return self._rests_until
        self._looked_at, self._looks = self._queries, self._looks + 1
        try:
            self._look()
        except Exception:
            # What is set stays; the next look may do better.
            _LOG.exception("picking a setting failed")
            self._told("internal_error", 1)
        self._rests_until = now + (self._pool.clock.now() - now) / _SHARE
        return math.inf

    def _look(self) -> None:
        calls = self._pool.calls()
        copies = self._copies + self._attempts - 1
        replay = replay_of(calls, copies, self._pool.num_workers, self._looks)
        if replay is None:
            return
        foreseen = {each: self._foresee(replay, each) for each in self.settings}
        now = self.setting
        self._correct(foreseen[now], calls)
        late = foreseen[self.settings[0]].late
        most_late = late * (1 + _MORE_LATE) + _LATE_OF_ALL
        knows = self._predictor is not None and self._predictor.state == "answering"
        fair = [
            each
            for each in self.settings
            if (foreseen[each].late <= most_late or self._guesses(each) == 0)
            and (knows or each.redundancy != "doubtful")  # nobody says what is
        ]
        # If all cost more than may be spent, the cheapest.
        least = min(self._cost(each, foreseen) for each in fair)
        allowed = [e for e in fair if self._cost(e, foreseen) <= max(self._most, least)]
        # Where p99.9 cannot be helped, p99 may.
        alike = _least(allowed, lambda each: self._tail(each, foreseen), _ALIKE)
        alike = _least(alike, lambda each: foreseen[each].shoulder, _ALIKE_P99)
        cheapest = min(self._cost(each, foreseen) for each in alike)
        if now in alike and self._cost(now, foreseen) <= cheapest + _ALIKE_CALLS:
            return
        chosen = min(alike, key=lambda each: self._cost(each, foreseen))
        self._change(chosen, foreseen)

    def _foresee(self, replay: Replay, setting: Setting) -> Foreseen:
        return replay.foresee(
            setting,
            known=self._guesses(setting),
            extra=self._copies,
            extra_calls=self._extra_calls,
        )

    def _guesses(self, setting: Setting) -> float:
        """The share of stragglers' queries that are answered by what is known."""
        known = 0.0 if self._predictor is None else self._predictor.share
        decodes = setting.redundancy == "always" and self._coder.guesses
        return max(known, self._decoded) if decodes else known

    def _correct(self, foreseen: Foreseen, calls: Sequence[Call]) -> None:
        """By what came of the present setting since it is there."""
        for each, (tail, cost) in self._factors.items():
            self._factors[each] = 1 + (tail - 1) * _FORGET, 1 + (cost - 1) * _FORGET
        self._decoded = 1 + (self._decoded - 1) * _FORGET
        if len(self._seconds) < _TOLD:
            return
        tail = shoulder_of(self._seconds) / foreseen.shoulder
        sent = [call.size for call in calls if call.sent >= self._since]
        again = self._ended["reexecution"]
        given = self._ended["query_decoded"] + self._ended["query_predicted"]
        queries = self._ended.total() - again
        # Of more calls than are kept it is not known how many there were.
        told = queries and len(sent) < len(calls)
        cost = sum(sent) / queries / foreseen.calls if told else 1.0
        redundancy = self.setting.redundancy
        self._factors[redundancy] = min(max(tail, 1.0), _WORST), min(max(cost, 1.0), _WORST)
        if redundancy == "always" and given + again >= _TELLING:
            self._decoded = given / (given + again)
        self._begin()

    def _begin(self) -> None:
        """What is counted from here on is the present setting's."""
        self._seconds, self._since = [], self._pool.clock.now()
        self._ended = collections.Counter()

    def _tail(self, setting: Setting, foreseen: dict[Setting, Foreseen]) -> float:
        return foreseen[setting].tail * self._factors.get(setting.redundancy, (1.0, 1.0))[0]

    def _cost(self, setting: Setting, foreseen: dict[Setting, Foreseen]) -> float:
        return foreseen[setting].calls * self._factors.get(setting.redundancy, (1.0, 1.0))[1]

    def _change(self, chosen: Setting, foreseen: dict[Setting, Foreseen]) -> None:
        def words(setting: Setting) -> str:
            tail, cost = self._tail(setting, foreseen), self._cost(setting, foreseen)
            return f"{_words(setting)}: p99.9 of {tail:.2f} medians at {cost:.2f} calls a query"

        before = self.setting
        reason = f"{words(chosen)}; before, {words(before)}"
        self.setting, self._reason = chosen, reason
        self._begin()
        self._told("policy_change", 1)
        _LOG.info("policy: %s", reason)


def _least(
    settings: list[Setting], number: Callable[[Setting], float], alike: float
) -> list[Setting]:
    """Those whose number is as little as the least, or more by no larger a share."""
    numbers = [number(setting) for setting in settings]
    most = min(numbers) * (1 + alike)
    return [each for each, it in zip(settings, numbers, strict=True) if it <= most]


def _words(setting: Setting) -> str:
    overdue = setting.overdue
    when = "the median" if overdue.quantile == 0.5 else f"p{100 * overdue.quantile:g}"
    beside = {"none": "nothing", "doubtful": "what is doubtful", "always": "all redundancy"}
    times = "" if overdue.factor == 1 else f"{overdue.factor:g} times "
    return f"late after {times}{when}, {beside[setting.redundancy]} sent beside"
