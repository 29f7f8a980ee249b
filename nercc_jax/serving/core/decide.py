"""The decision on late queries: a pure function of a group, the time, the evidence and the policy.

The rules, each with a row in `tests/serving/test_decide.py`:

- A query waits while its own worker is in time. A coded data point is late once it takes longer
  than the pool's limit, or once its workers have failed.
- A late query gets the cheapest answer that is accurate enough: a surrogate's, else a decoded one.
  An answer is accurate enough if the risk, with its evidence from stragglers, admits it.
- If there is none, and all of the group's other answers have arrived or are late, too, the query is
  sent again, once: to one worker, or to several together if the setting says so.
- If copies are as slow as their originals (`DispatchSetting.hedges` is False), only these queries
  are sent again: those whose calls have failed or may hang, and a few for trial.
- A query that needs an exact answer does not wait for the others: it is sent again at once.
- A query in a batch of its own, not coded, fails once no worker can answer it.
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
    """The evidence on which late queries are decided.

    Attributes:
        setting: the present setting.
        approximates: whether the outputs allow approximate answers.
        predicts: whether a surrogate is calibrated and may answer.
        limit: the largest score at which a decoded answer is accurate enough, for a group of the
            present size: infinite if no accuracy is promised, negative if no answer is accurate
            enough, None if such groups were not calibrated.
        risk: by source, the evidence from stragglers on approximate answers.
    """

    setting: DispatchSetting
    approximates: bool = False
    predicts: bool = False
    limit: float | None = None
    risk: Mapping[Source, Risk] = {}


class Predict(NamedTuple):
    """An instruction to let the surrogate predict queries."""

    places: list[Place]


class Decode(NamedTuple):
    """An instruction to decode queries from the answers of their group so far."""

    places: list[Place]


class GiveOut(NamedTuple):
    """An instruction to answer a query with its approximate answer from a source."""

    place: Place
    source: Source


class Copy(NamedTuple):
    """An instruction to send queries again, each to this number of other workers together."""

    places: list[Place]
    workers: int


class Fail(NamedTuple):
    """An instruction to fail queries that no worker can answer."""

    places: list[Place]


class Wait(NamedTuple):
    """An instruction to decide again at this time, or earlier if something happens."""

    until: float


Action: TypeAlias = Predict | Decode | GiveOut | Copy | Fail | Wait


def decide(
    group: Group,
    now: float,
    evidence: LateEvidence,
    policy: BatchingPolicy,
    looked: Container[Source] = (),
) -> list[Action]:
    """Decide on a group's open queries.

    After `Predict` and `Decode` it is called again, with their answers at the queries.

    Args:
        group: the group, which is read and not changed.
        now: the time.
        evidence: the present evidence.
        policy: the policy.
        looked: the sources that have been used in this turn.

    Returns:
        The instructions for now: one `Predict` or `Decode`, or several that end with `Wait`; or one
        `Fail`.
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

    # Approximate answers, the cheapest first. Queries that need exact ones do not wait for them.
    approximates = evidence.approximates and not group.spoiled
    exact = [each for each in lost if each[1].request.exact_only or not approximates]
    lost = [each for each in lost if each not in exact]
    given: list[Action] = []
    left: list[tuple[Place, Query]] = []
    if lost and evidence.predicts and "predicted" not in looked:
        return [Predict([place for place, _ in lost])]
    # Earlier predictions may have drifted since, and earlier decoded answers may be outdated.
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
    """Return whether decoding now may give answers, or evidence on decoded answers."""
    answers = int(group.mask.sum())
    if not answers or not group.coder.can_decode or evidence.limit is None:
        return False
    if policy.accuracy.promises:
        return evidence.limit > 0 or not evidence.risk["decoded"].waits or last
    # Without a promise, half of the redundancy suffices, or less if no more answers are in time.
    cells, sent = len(group.cells), int((~np.isnan(group.sent_at)).sum())
    return answers >= (max(cells - 2, 1) if last else sent - (sent - cells) // 2)
