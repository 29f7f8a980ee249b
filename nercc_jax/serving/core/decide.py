"""The fate of late queries: a pure function of a group, the time, the evidence and the policy.

The rules, each with a row in `tests/serving/test_decide.py`:

- While its own worker is in time, a query waits. A coded data point is late once it takes longer
  than the pool's limit, or once its workers have failed.
- A late query gets the cheapest answer that is good enough: a surrogate's, else a decoded one.
  Good enough is what a calibration admits, or what other stragglers have shown to be right.
- If none is, and none of the group's answers can be waited for any more, the query goes to another
  worker, once; to several at once where the setting says so.
- Where copies are as slow as what they copy, only queries whose calls have failed are sent again,
  those that may hang, and a few for trial.
- What must be exact waits for none of the group's answers: it goes to another worker at once.
- A query that is alone at its worker fails once no worker has an answer.
"""

import math
from collections.abc import Container, Mapping
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int

from ...risk import Risk
from ...stragglers import picking
from .._policy import BatchingPolicy
from ._coder import Coder
from ._request import Answer, Source
from ._setup import DispatchSetting

Place: TypeAlias = tuple[int, int]  # of a query: its cell in the group, and its row there


class QueryView(NamedTuple):
    """A query that somebody waits for.

    Attributes:
        place: its place in the group.
        copied: whether it was sent again.
        exact_only: whether only the model's own answer will do.
        answers: its approximate answers.
    """

    place: Place
    copied: bool = False
    exact_only: bool = False
    answers: tuple[Answer, ...] = ()


class GroupView(NamedTuple):
    """A snapshot of a group.

    Attributes:
        coder: its code.
        own: by cell, the coded data points that are the query itself.
        sent_at: by coded data point, when it was sent; NaN where it was not.
        answered: the coded data points with an answer.
        failed: those that will have none, as things are.
        queries: the queries that somebody waits for.
        limit: seconds after which a call is late, by the pool's rule.
        median: median seconds of a call.
        alone: it is a batch for one worker, uncoded.
        trial: its late queries are sent again to see how slow copies are.
        looked: the sources that have been asked in this turn.
    """

    coder: Coder
    own: tuple[Int[np.ndarray, " _"], ...]
    sent_at: Float[np.ndarray, " points"]
    answered: Bool[np.ndarray, " points"]
    failed: Bool[np.ndarray, " points"]
    queries: tuple[QueryView, ...]
    limit: float
    median: float
    alone: bool = False
    trial: bool = False
    looked: Container[Source] = frozenset()

    def late(self, now: float) -> Bool[np.ndarray, " points"]:
        """Return the coded data points that are not waited for any more."""
        outstanding = ~np.isnan(self.sent_at) & ~self.answered
        return outstanding & ((now - self.sent_at >= self.limit) | self.failed)


class LateEvidence(NamedTuple):
    """The state of all learning, handed over as a whole by the thread that learns.

    Attributes:
        setting: the setting that holds.
        approximates: whether the outputs allow approximate answers.
        predicts: whether a surrogate may answer.
        limit: the largest score within the calibration of decoded answers, for a group of the
            present size; infinite where nothing is promised, negative where nothing is good enough,
            None where a promise was not calibrated for such groups.
        risk: what stragglers showed of approximate answers, by source.
    """

    setting: DispatchSetting
    approximates: bool = False
    predicts: bool = False
    limit: float | None = None
    risk: Mapping[Source, Risk] = {}


class Predict(NamedTuple):
    """Ask the surrogate for answers."""

    places: list[Place]


class Decode(NamedTuple):
    """Decode these from what has been answered."""

    places: list[Place]


class GiveOut(NamedTuple):
    """Give an approximate answer out."""

    place: Place
    source: Source


class Copy(NamedTuple):
    """Send queries to this number of other workers at once."""

    places: list[Place]
    workers: int


class Fail(NamedTuple):
    """Give queries up: no worker has an answer."""

    places: list[Place]


class Wait(NamedTuple):
    """Decide again at this time, should nothing happen before."""

    until: float


Action: TypeAlias = Predict | Decode | GiveOut | Copy | Fail | Wait


def decide(
    group: GroupView, now: float, evidence: LateEvidence, policy: BatchingPolicy
) -> list[Action]:
    """Decide what becomes of a group's queries.

    After `Predict` and `Decode` it is asked again, with the estimates that they gave.

    Args:
        group: the group.
        now: the time.
        evidence: what is known.
        policy: the policy.

    Returns:
        What to do now, `Predict` or `Decode` alone, or `Wait` last.
    """
    places = [query.place for query in group.queries]
    if group.alone:
        return [Fail(places)] if group.failed[0] and places else [Wait(math.inf)]
    sent, late = ~np.isnan(group.sent_at), group.late(now)
    in_time = sent & ~group.answered & ~late
    ends = group.sent_at[in_time] + group.limit
    hedges = policy.copies > 1
    if not evidence.setting.hedges:
        outstanding = group.sent_at[sent & ~group.answered]
        longest = picking.PICKING.hung * group.median
        ends = np.append(ends, outstanding + longest)
        hedges &= group.trial or now - float(np.min(outstanding, initial=now)) >= longest
    wait = Wait(float(np.min(ends[ends > now], initial=math.inf)))
    if not late.any():
        return [wait]
    lost = [each for each in group.queries if not (sent & ~late)[group.own[each.place[0]]].any()]
    if not lost:
        return [wait]
    last = not in_time.any()
    failed = ~sent | (group.failed & ~group.answered)

    def again(queries: list[QueryView]) -> list[Action]:
        places = [
            each.place
            for each in queries
            if not each.copied and (hedges or failed[group.own[each.place[0]]].all())
        ]
        return [Copy(places, evidence.setting.overdue.copies)] if places else []

    # Approximate answers, the cheapest first. What is exact waits for no others.
    exact = [each for each in lost if each.exact_only or not evidence.approximates]
    lost = [each for each in lost if each not in exact]
    given: list[Action] = []
    left: list[QueryView] = []
    if lost and evidence.predicts and "predicted" not in group.looked:
        return [Predict([each.place for each in lost])]
    for query in lost:
        for answer in query.answers:
            if answer.source == "predicted" and not (answer.within and evidence.predicts):
                continue  # or it has drifted since
            risk = evidence.risk[answer.source]
            if risk.admits(answer.disagreement, answer.error, calibrated=answer.within):
                given.append(GiveOut(query.place, answer.source))
                break
        else:
            left.append(query)
    if left and "decoded" not in group.looked and _decodes(group, evidence, policy, last):
        return [Decode([each.place for each in left])]
    return [*given, *again(exact + left if last else exact), wait]


def _decodes(group: GroupView, evidence: LateEvidence, policy: BatchingPolicy, last: bool) -> bool:
    """Return whether decoding now may give answers, or evidence on them."""
    answers = int(group.answered.sum())
    if not answers or not group.coder.can_decode or evidence.limit is None:
        return False
    if policy.accuracy.promises:
        return evidence.limit > 0 or not evidence.risk["decoded"].waits or last
    # Nothing is promised: half of the redundancy suffices, and less where no more can come.
    cells, sent = len(group.own), int((~np.isnan(group.sent_at)).sum())
    return answers >= (max(cells - 2, 1) if last else sent - (sent - cells) // 2)
