"""What becomes of queries whose own workers straggle: foreseen, decoded, or sent again."""

import dataclasses
import math
from collections.abc import Callable, Container, Iterable
from typing import Any

import numpy as np

from ..pools import AbstractClock
from ._budget import Budget
from ._coder import Coder
from ._foresight import Foresight
from ._group import Group
from ._policy import BatchingPolicy
from ._request import Answer, Query
from ._tutor import Tutor


@dataclasses.dataclass(frozen=True)
class Given:
    """An answer that is not the model's own, and whose it is: a group's cell and row."""

    cell: int
    row: int
    answer: Answer


class Rescue:
    """Decides by a policy and by what a tutor knows. It changes nothing but what a group counts."""

    def __init__(
        self,
        coder: Coder,
        policy: BatchingPolicy,
        tutor: Tutor,
        foresight: Foresight,
        observe: Callable[[Any, float], Any],
        clock: AbstractClock,
    ):
        """Raises: ValueError for a policy that does not fit the code."""
        self._clock = clock
        self._coder, self._policy, self._tutor, self._observe = coder, policy, tutor, observe
        self._foresight = foresight
        self._budget = Budget(policy.max_reexecution)
        # How far decoded answers are off in units of the outputs, nobody says: they are none.
        functions = policy.max_disagreement is None and policy.tolerance is not None
        self._wanted = 0.0 if functions else policy.max_disagreement
        self.enough = _enough(coder, policy)

    def earn(self) -> None:
        """A query goes out for the first time."""
        self._budget.earn(1)

    def rescue(self, group: Group, late: np.ndarray) -> tuple[list[Given], list[Query]]:
        """The answers to give now, and the queries to send again; `late` are not waited for."""
        if self._coder.systematic and not late.any():
            return [], []  # who waits has a worker of its own, which is quick to see
        hopeless = [
            number
            for number, cell in enumerate(group.cells)
            if cell.pending and not (group.sent & ~late)[group.layout.own[number]].any()
        ]
        if not hopeless:
            return [], []
        self._observe("straggler", int((late & ~group.counted).sum()))
        group.counted |= late
        last = not (group.out & ~late).any()
        answers = int(group.mask.sum())
        ready = self._coder.systematic or answers >= self.enough or last
        good = self._foreseen(group, hopeless) if late.any() else []
        best: list[Given] = []
        if answers and ready and self._coder.guesses:
            over = {(given.cell, given.row) for given in good}
            more, best = self._decode(group, hopeless, last, over)
            good += more
        if not last:
            return good, []
        more, again = self._send_again(group, hopeless, good, best)
        return good + more, again

    def _foreseen(self, group: Group, hopeless: list[int]) -> list[Given]:
        """Of these cells: what is known, and sure enough, beside the group's answers."""
        found = self._foresight.of(group, hopeless)
        return [Given(*place, each.answer) for place, each in found.items() if each.sure]

    def _decode(
        self, group: Group, hopeless: list[int], last: bool, over: Container[tuple[int, int]]
    ) -> tuple[list[Given], list[Given]]:
        """Of these cells: answers that may be given, and the best there are to other queries.

        Those that are `over` need none. There may be nothing: no answer was sound, or it was not
        worth the decoding.
        """
        few, wanted = len(group.cells), self._wanted
        expected = self._tutor.expect(few, group.mask)
        limit = None  # of a query's own doubt
        if wanted is None:
            good = np.full(few, self._enough_for(group, last))
        elif self._coder.doubts:
            limit = self._tutor.fidelity.doubt(few).limit(wanted)
            good = np.full(few, limit >= 0)
        else:
            good = expected.disagreement <= wanted
        if not (good[hopeless].any() or (last and self._policy.max_reexecution is not None)):
            return [], []
        begin = self._clock.now()
        predictions, sound, doubt = self.predict(group.values(), group.mask, few)
        decoded = self._clock.now()
        self._observe("decode_seconds", decoded - begin)
        self._observe("workers_heard", int(group.mask.sum()))
        good = np.broadcast_to(good if limit is None else doubt <= limit, doubt.shape)
        doubt = np.where(np.isnan(doubt), expected.disagreement, doubt)
        basis = int(group.sent.sum()), int(group.mask.sum())
        found: tuple[list[Given], list[Given]] = [], []
        for number, row, _ in group.open_queries(hopeless):
            if sound[row, number] and (number, row) not in over:
                told = float(doubt[row, number]), float(expected.error[number])
                answer = Answer(predictions[row, number], "decoded", *basis, *told)
                found[not good[row, number]].append(Given(number, row, answer))
        if group.record is not None:
            group.record.add("decode", begin, decoded, answers=basis[1])
            sure, doubtful = map(len, found)
            group.record.add("doubt", decoded, self._clock.now(), sure=sure, doubtful=doubtful)
        return found

    def predict(
        self, values: np.ndarray, mask: np.ndarray, queries: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Predictions by row and place, whether they are sound, and how doubtful (NaN: unknown).

        A code may have lost a query, and a sum of large answers overflowed.
        """
        width = self._policy.max_batch_size
        if self._coder.doubts:
            weights = self._tutor.fidelity.doubt(queries).weights
            predictions, recovered, doubt = self._coder.assess(values, mask, width, weights)
        else:
            predictions, recovered = self._coder.decode(values, mask, width)
            doubt = np.full(predictions.shape[:2], np.nan)
        sound = recovered & np.isfinite(predictions).reshape(*doubt.shape, -1).all(axis=-1)
        return predictions[:, :queries], sound[:, :queries], doubt[:, :queries]

    def _enough_for(self, group: Group, last: bool) -> bool:
        """Whether there are answers enough to decode, by their number alone."""
        answers = int(group.mask.sum())
        enough, least = self.enough, min(group.coder.num_data, self.enough)
        if group.coder.systematic:
            redundancy = int(group.sent.sum()) - len(group.cells)
            enough = enough if group.full else len(group.cells) + redundancy // 2
            least = max(len(group.cells) - 2, 1)
        return answers >= enough or (last and answers >= least)

    def _send_again(
        self, group: Group, cells: list[int], good: list[Given], best: list[Given]
    ) -> tuple[list[Given], list[Query]]:
        """What is sent again, once each, the most doubtful first, and beyond the budget the best.

        Without hedging only what will have no answer is.
        """
        if self._policy.copies == 1:
            cells = [number for number in cells if _is_gone(group, number)]
        known = {(given.cell, given.row): given for given in best}
        over = {(given.cell, given.row) for given in good}
        left = [
            (cell, row, query)
            for cell, row, query in group.open_queries(cells)
            if not query.reexecuted and (cell, row) not in over
        ]
        given, again = [], []
        for cell, row, query in sorted(left, key=lambda each: _certainty(known.get(each[:2]))):
            answer = known.get((cell, row))
            if answer is not None and not self._budget.affords():
                self._observe("over_budget", 1)
                given.append(answer)
                continue
            self._budget.spend()
            query.reexecuted = True
            if query.request.record is not None:
                query.request.record.send_again(query.place)
            self._observe("reexecution", 1)
            again.append(query)
        return given, again


def _is_gone(group: Group, cell: int) -> bool:
    """Whether a cell's own coded data points will have no answer."""
    assert group.batch is not None
    points: Iterable[int] = group.layout.own[cell].tolist()
    return all(group.batch.abandoned(point) for point in points if group.sent[point])


def _certainty(given: Given | None) -> float:
    """What can be answered least comes first; of what nothing is known yet, one is as good."""
    if given is None:
        return -1.0
    disagreement = given.answer.disagreement
    return 0.0 if math.isnan(disagreement) else 1 - disagreement


def _enough(coder: Coder, policy: BatchingPolicy) -> int:
    """How many answers of a full group are enough to decode, if nothing better is known."""
    num_data, num_workers = coder.num_data, coder.num_workers
    enough = policy.wait_for
    if enough is None and coder.systematic:
        enough = num_workers - (num_workers - num_data) // 2
    elif enough is None:
        enough = min(max(num_workers * 85 // 100, num_data), num_workers)
    if not 1 <= enough <= num_workers:
        raise ValueError(f"wait_for must be from 1 to N = {num_workers}, not {enough}")
    return enough
