"""The fallback for queries whose own workers straggle: predict, decode, or send again."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from .._policy import BatchingPolicy
from ._adaptation import AbstractAdaptation
from ._approximate import GroupAnswer, GroupDecoder, GroupPredictor
from ._coder import Coder
from ._group import Group
from ._request import Query


class Budget:
    """A share of the queries that may be spent on further calls, earned as queries come.

    No stretch of queries costs much more than its share: at most what `_SAVED` queries earn is kept
    for later.
    """

    _SAVED = 1000

    def __init__(self, share: float | None):
        """Create a budget; a share of None means no bound."""
        self._share, self._left = share, 0.0

    def earn(self, queries: int) -> None:
        """Add the share of this number of queries."""
        if self._share is not None:
            self._left = min(self._left + self._share * queries, max(self._share * self._SAVED, 1))

    def affords(self) -> bool:
        """Return whether one more call is within the budget."""
        return self._share is None or self._left >= 1

    def spend(self) -> None:
        """Spend one call, even if that makes the budget negative."""
        if self._share is not None:
            self._left -= 1


class Fallback(NamedTuple):
    """The answers to give out now, and the queries to send again."""

    answers: list[GroupAnswer]
    resend: list[Query]


class FallbackPolicy:
    """Decides what becomes of queries whose own workers straggle.

    It takes the cheapest way that is good enough: a surrogate's answer, a decoded one, and else a
    second call within the budget. Of a group it changes only which stragglers are counted.
    """

    def __init__(
        self,
        coder: Coder,
        policy: BatchingPolicy,
        adaptation: AbstractAdaptation,
        predictor: GroupPredictor,
        decoder: GroupDecoder,
    ):
        """Create a policy with an empty budget."""
        self._coder, self._observe = coder, adaptation.observe
        self._hedges = policy.copies > 1
        self._predictor, self._decoder = predictor, decoder
        self._budget = Budget(policy.max_reexecution)

    def earn(self, queries: int) -> None:
        """Add queries that were sent for the first time to the budget."""
        self._budget.earn(queries)

    def decide(self, group: Group, late: np.ndarray) -> Fallback:
        """Decide about a group's queries.

        Args:
            group: the group.
            late: mask of the coded data points that are not waited for any more.
        """
        if self._coder.systematic and not late.any():
            return Fallback([], [])  # each query has a worker of its own that is in time
        lost = [
            number
            for number, cell in enumerate(group.cells)
            if cell.pending and not (group.sent & ~late)[group.layout.own[number]].any()
        ]
        if not lost:
            return Fallback([], [])
        self._observe("straggler", int((late & ~group.counted).sum()))
        group.counted |= late
        last = not (group.outstanding & ~late).any()
        good = self._predicted(group, lost) if late.any() else []
        best: list[GroupAnswer] = []
        if self._decoder.ready(group, last):
            answered = {(given.cell, given.row) for given in good}
            more, best = self._decoder.decode_group(group, lost, last, answered)
            good += more
        if not last:
            return Fallback(good, [])
        more, resend = self._resend(group, lost, good, best)
        return Fallback(good + more, resend)

    def _predicted(self, group: Group, cells: list[int]) -> list[GroupAnswer]:
        """Return the predictions for these cells that are sure enough."""
        found = self._predictor.predictions(group, cells)
        return [GroupAnswer(*place, each.answer) for place, each in found.items() if each.sure]

    def _resend(
        self, group: Group, cells: list[int], good: list[GroupAnswer], best: list[GroupAnswer]
    ) -> Fallback:
        """Send queries again, once each and the most doubtful first; beyond the budget give `best`.

        Without hedging, only queries whose calls have failed are sent again.
        """
        if not self._hedges:
            cells = [number for number in cells if _has_failed(group, number)]
        doubtful = {(given.cell, given.row): given for given in best}
        answered = {(given.cell, given.row) for given in good}
        left = [
            (cell, row, query)
            for cell, row, query in group.open_queries(cells)
            if not query.reexecuted and (cell, row) not in answered
        ]
        answers, resend = [], []
        for cell, row, query in sorted(left, key=lambda each: _certainty(doubtful.get(each[:2]))):
            answer = doubtful.get((cell, row))
            if answer is not None and not self._budget.affords():
                self._observe("over_budget", 1)
                answers.append(answer)
                continue
            self._budget.spend()
            query.reexecuted = True
            if query.request.trace is not None:
                query.request.trace.send_again(query.place)
            self._observe("reexecution", 1)
            resend.append(query)
        return Fallback(answers, resend)


def _has_failed(group: Group, cell: int) -> bool:
    """Return whether a cell's own coded data points will get no answer."""
    assert group.batch is not None
    points: Iterable[int] = group.layout.own[cell].tolist()
    return all(group.batch.abandoned(point) for point in points if group.sent[point])


def _certainty(given: GroupAnswer | None) -> float:
    """Return how certain an answer is: -1 where there is none, 0 where nothing is known of it."""
    if given is None:
        return -1.0
    disagreement = given.answer.disagreement
    return 0.0 if math.isnan(disagreement) else 1 - disagreement
