"""Comparisons of approximate answers that were given out with the model's own, however late."""

from collections.abc import Callable

import numpy as np

from ..pools import AbstractPool
from ._policy import MAX_DEADLINE_S
from .adapt._adaptation import Adaptation
from .core._group import Group, LateAnswer
from .core._request import ApproximateAnswer, BatchSpec, Query, Request

# The share of approximate answers whose queries nobody has as they came that is computed, too.
_AUDITED = 0.02


class Comparisons:
    """Sees to it that what is given out is compared with the model's own, and learned from.

    For the scheduler's thread only. The groups, and their memory, that are kept for it are bounded.
    """

    def __init__(
        self,
        pool: AbstractPool,
        adaptation: Adaptation,
        answers: BatchSpec,
        submit: Callable[[Request], bool],
        *,
        most: int = 4096,
        size: int = 1 << 26,
    ):
        """Keep at most `most` groups and `size` bytes.

        `submit` takes requests of the server's own, unless queries wait, and returns whether.
        """
        self._pool, self._adaptation, self._answers = pool, adaptation, answers
        self._submit, self._most, self._left = submit, most, size
        self._kept: dict[Group, int] = {}
        self._random = np.random.default_rng(0)

    def give(self, group: Group, cell: int, query: Query, record: ApproximateAnswer) -> None:
        """Note an answer that is given out, if the model's own will be known."""
        record.given = not record.forced
        # A query that nobody has as it came is computed for comparison alone, now and then.
        if np.isnan(group.sent_at[group.layout.own[cell]]).all():
            del query.approximate[record.answer.source]
            computed = record.given and self._random.random() < _AUDITED
            record.given = computed and self._ask_again(record)
        if record.given:
            self._adaptation.risk(record.answer.source).give()

    def learn(self, query: Query, own: np.ndarray) -> None:
        """Compare approximate answers to a query with the model's own, and learn from this."""
        x = query.x
        approximate, query.approximate = query.approximate, {}
        for each in approximate.values():
            self.audit(each, own)
            x = each.x if x is None else x
        if x is not None:
            self._adaptation.add_answer(x, own)

    def learn_late(self, group: Group, point: int, value: np.ndarray) -> None:
        """Compare what was given out with an answer that comes after its group is over."""
        left = []
        for each in group.late:
            if point in each.points:
                own = value[each.row, ...]
                self.audit(each.given, own)
                if each.given.x is not None:
                    self._adaptation.add_answer(each.given.x, own)
            else:
                left.append(each)
        group.late = left

    def keep(self, group: Group) -> list[Group]:
        """Keep a group that is over for what may still come; return the groups that are not kept.

        Queries whose answers do not come by themselves are computed again.
        """
        if group.cells:
            group.keep_late()
        never = self._without(group, lambda late: not group.comes(late))
        over = [] if group.late else [group]
        if group.late and group not in self._kept:
            self._kept[group] = sum(each.kept_bytes for each in group.late)
            self._left -= self._kept[group]
            while len(self._kept) > self._most or (self._left < 0 and self._kept):
                over.append(next(iter(self._kept)))
                self.discard(over[-1])
                never += self._without(over[-1], lambda late: True)
        for each in over:
            self.discard(each)
        for each in never:
            if each.given.forced or not self._ask_again(each.given):
                self.audit(each.given, None)
        return over

    def discard(self, group: Group) -> None:
        self._left += self._kept.pop(group, 0)

    def audit(self, given: ApproximateAnswer, own: np.ndarray | None) -> None:
        """Compare an approximate answer with the model's own, None if that will never come."""
        right = self._adaptation.audit(given, own)
        if given.given or given.forced:
            known = "audit_same" if right else "audit_other"
            self._adaptation.observe("audit_unknown" if own is None else known, 1)

    @staticmethod
    def _without(group: Group, leaves: Callable[[LateAnswer], bool]) -> list[LateAnswer]:
        """Take those that leave out of a group's late answers."""
        left = list(filter(leaves, group.late))
        group.late = [each for each in group.late if each not in left]
        return left

    def _ask_again(self, given: ApproximateAnswer) -> bool:
        """Have the model answer, for comparison, where workers are free; return whether."""
        if given.x is None or given.repeated or not self._pool.idle:
            return False
        x, zeros = given.x[None], self._answers.zeros(1)
        request = Request(x, zeros, self._pool.clock.now(), MAX_DEADLINE_S, True)
        request.queries[0].approximate[given.answer.source] = given
        given.repeated = self._submit(request)
        return given.repeated
