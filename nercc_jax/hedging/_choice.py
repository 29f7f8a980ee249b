"""When to send a second call, and which targets get fewer: decided from recorded calls."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from ..stragglers import picking, simulate


@dataclasses.dataclass
class TimedCall:
    """A call to a target: the `first` of its request, or a copy; how and when it ended."""

    target: int
    sent: float
    first: bool
    seconds: float = math.nan
    end: Literal["", "answered", "failed", "cancelled"] = ""


class Choice(NamedTuple):
    """The policy, with a limit in medians; the median, in seconds; and the targets' weights."""

    hedge: simulate.Hedge
    median: float
    weights: Sequence[float]


def next_choice(
    calls: Sequence[TimedCall],
    raced: Float[np.ndarray, " requests"],
    choice: Choice,
    trials: picking.CopyTrials,
    *,
    copies: int,
    budget: float,
) -> Choice:
    """Return the next choice, or the present one if too few calls were recorded.

    Args:
        calls: The latest calls.
        raced: Seconds of the requests that were hedged under the present choice.
        choice: The present choice.
        trials: The evidence from earlier copies; `raced` is added to it.
        copies: The most copies of a request.
        budget: The mean number of calls a request, at most.
    """
    first = [call for call in calls if call.first and call.end != "failed"]
    rows = np.array([(call.sent, call.seconds, call.target) for call in first]).reshape(-1, 3)
    answered = np.array([call.end == "answered" for call in first], bool)
    rows[:, 1] = simulate.completed(rows[:, 1], answered, np.random.default_rng(0))
    recorded = [(sent, seconds, 1, int(target)) for sent, seconds, target in rows.tolist()]
    replay = simulate.RecordedCalls.replay(recorded, copies, len(choice.weights), seed=0)
    if replay is None:
        return choice

    hedge, candidates = choice.hedge, []
    if hedge.limit < math.inf:
        own, ended = picking.hedged_times(replay, picking.Play(hedge), raced=True)
        trials.add(raced / replay.median, apart=ended, alike=own, decay=picking.PICKING.decay)
        replay, useless = trials.applied(replay, hedge.limit)
        candidates = [dataclasses.replace(hedge, hedges=hedges) for hedges in (True, not useless)]
    for at_once in range(1, min(picking.PICKING.at_once, copies) + 1):
        late = min(0.9 * (budget - 1) / at_once, 1)  # this share spends nine tenths of the budget
        limits = [*picking.PICKING.thresholds, float(np.quantile(replay.own, 1 - late))]
        candidates += [simulate.Hedge(limit, at_once) for limit in limits]
    forecasts = {each: picking.forecast(replay, picking.Play(each)) for each in candidates}
    for each, found in forecasts.items():
        # Copies beyond the budget are not sent, so the requests stay as slow as they are.
        if found.calls > budget:
            refused = 1 - (budget - 1) / (found.calls - 1)
            left = replay.as_slow(np.full(len(replay.own), refused))
            forecasts[each] = picking.forecast(left, picking.Play(each))._replace(calls=budget)
    hedge = picking.choose(forecasts, hedge, budget)

    # A target that is slow or fails more often than the others has its weight halved each time.
    number, slow = np.zeros((2, len(choice.weights)))
    for call in calls[-picking.PICKING.recent :]:
        late = call.end == "failed" or call.seconds > picking.PICKING.slow * replay.median
        number[call.target] += late or call.end == "answered"
        slow[call.target] += late
    of_others = (slow.sum() - slow) / np.maximum(number.sum() - number, 1)
    worse = picking.beyond_chance(slow, of_others, number) > 0
    weights = np.array(choice.weights) * np.where(worse, 0.5, 2)
    return Choice(hedge, replay.median, weights.clip(picking.PICKING.least_weight, 1).tolist())
