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

from ...risk import Risk
from ...stragglers import picking
from .._policy import BatchingPolicy
from ._group import Group, Place
from ._request import Query, Source
from ._setup import DispatchSetting


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
    group: Group,
    now: float,
    evidence: LateEvidence,
    policy: BatchingPolicy,
    looked: Container[Source] = (),
) -> list[Action]:
    """Decide what becomes of a group's queries.

    After `Predict` and `Decode` it is asked again, with the estimates that they gave.

    Args:
        group: the group, which is read and not changed.
        now: the time.
        evidence: what is known.
        policy: the policy.
        looked: the sources that have been asked in this turn.

    Returns:
        What to do now, `Predict` or `Decode` alone, or `Wait` last.
    """
    queries = [*group.open_queries()]
    if group.alone:
        failed = queries and group.failed[0]
        return [Fail([place for place, _ in queries])] if failed else [Wait(math.inf)]
    times, rows, own = group.batch.times, group.rows, group.layout.own
    sent, late = ~np.isnan(group.sent_at), group.late(now)
    in_time = sent & ~group.mask & ~late
    ends = group.sent_at[in_time] + times.limit(rows)
    hedges = policy.copies > 1
    if not evidence.setting.hedges:
        outstanding = group.sent_at[sent & ~group.mask]
        longest = picking.PICKING.hung * times.median(rows)
        ends = np.append(ends, outstanding + longest)
        hedges &= group.trial or now - float(np.min(outstanding, initial=now)) >= longest
    wait = Wait(float(np.min(ends[ends > now], initial=math.inf)))
    if not late.any():
        return [wait]
    lost = [each for each in queries if not (sent & ~late)[own[each[0][0]]].any()]
    if not lost:
        return [wait]
    last = not in_time.any()
    failed = ~sent | group.failed

    def again(queries: list[tuple[Place, Query]]) -> list[Action]:
        places = [
            place
            for place, query in queries
            if not query.reexecuted and (hedges or failed[own[place[0]]].all())
        ]
        return [Copy(places, evidence.setting.overdue.copies)] if places else []

    # Approximate answers, the cheapest first. What is exact waits for no others.
    approximates = evidence.approximates and not group.spoiled
    exact = [each for each in lost if each[1].request.exact_only or not approximates]
    lost = [each for each in lost if each not in exact]
    given: list[Action] = []
    left: list[tuple[Place, Query]] = []
    if lost and evidence.predicts and "predicted" not in looked:
        return [Predict([place for place, _ in lost])]
    # What was predicted may have drifted since, and what was decoded earlier be outdated.
    usable = {"predicted": evidence.predicts, "decoded": "decoded" in looked}
    for place, query in lost:
        known = [query.approximate.get(source) for source in ("predicted", "decoded")]
        for answer in (each for each in known if each is not None and usable[each.source]):
            if answer.source == "predicted" and not answer.within:
                continue
            risk = evidence.risk[answer.source]
            if risk.admits(answer.disagreement, answer.error, calibrated=answer.within):
                given.append(GiveOut(place, answer.source))
                break
        else:
            left.append((place, query))
    if left and "decoded" not in looked and _decodes(group, evidence, policy, last):
        return [Decode([place for place, _ in left])]
    return [*given, *again(exact + left if last else exact), wait]


def _decodes(group: Group, evidence: LateEvidence, policy: BatchingPolicy, last: bool) -> bool:
    """Return whether decoding now may give answers, or evidence on them."""
    answers = int(group.mask.sum())
    if not answers or not group.coder.can_decode or evidence.limit is None:
        return False
    if policy.accuracy.promises:
        return evidence.limit > 0 or not evidence.risk["decoded"].waits or last
    # Nothing is promised: half of the redundancy suffices, and less where no more can come.
    cells, sent = len(group.cells), int((~np.isnan(group.sent_at)).sum())
    return answers >= (max(cells - 2, 1) if last else sent - (sent - cells) // 2)
