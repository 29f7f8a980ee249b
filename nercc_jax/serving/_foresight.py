"""What a predictor says of a group's queries: looked up once for each."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ..pools import AbstractClock
from ._coder import Coder
from ._group import Foreseen, Group
from ._policy import BatchingPolicy
from ._predictor import Predictor
from ._request import Answer
from ._rows import CODED, Rows
from ._study import Goal


class Foresight:
    """Asks the predictor of a batcher, if there is one."""

    def __init__(
        self,
        predictor: Predictor | None,
        coder: Coder,
        policy: BatchingPolicy,
        rows: tuple[Rows, Rows],
        observe: Callable[[Any, float], Any],
        clock: AbstractClock,
    ):
        """Of queries and answers that are such rows.

        Raises: ValueError where these, or the policy, do not fit the predictor, or its absence.
        """
        self._predictor, self._outputs = predictor, rows[1].shape
        self._observe, self._clock = observe, clock
        if predictor is None:
            if policy.redundancy == "doubtful" or policy.tolerance is not None:
                raise ValueError(
                    "redundancy 'doubtful' and a tolerance need a predictor (`--surrogate`): "
                    "nothing else tells what is doubtful, or how far off"
                )
            return
        if {each.dtype for each in rows} != {CODED}:
            raise ValueError(f"only float32 can be predicted, not {[str(r.dtype) for r in rows]}")
        goal = Goal(policy.max_disagreement, policy.tolerance)
        predictor.attach(goal, policy.max_batch_size, coder.form, observe, clock)

    def of(self, group: Group, cells: Iterable[int]) -> dict[tuple[int, int], Foreseen]:
        """By cell and row, of these cells' queries that somebody waits for; none before it knows.

        A query is asked about once: what is learned meanwhile is hardly more.
        """
        if self._predictor is None or self._predictor.state != "answering":
            return {}
        waiting = list(group.open_queries(cells))
        new = [each for each in waiting if each[:2] not in group.foreseen]
        if new:
            begin = self._clock.now()
            found = self._predictor.predict(np.stack([_inputs(query.x) for *_, query in new]))
            end = self._clock.now()
            self._observe("predict_seconds", end - begin)
            if found is None:
                return {}
            basis = int(group.sent.sum()), int(group.mask.sum())
            for place, (cell, row, _) in enumerate(new):
                value = found.values[place].reshape(self._outputs)
                told = float(found.doubt[place]), float(found.bar[place])
                answer = Answer(value, "predicted", *basis, *told)
                group.foreseen[cell, row] = Foreseen(answer, bool(found.sure[place]))
            if group.record is not None:
                sure = int(found.sure.sum())
                group.record.add("predict", begin, end, sure=sure, doubtful=len(new) - sure)
        return {each[:2]: group.foreseen[each[:2]] for each in waiting}

    def doubted(self, group: Group) -> set[int]:
        """The cells that have a query whose answer would not be known."""
        cells = range(len(group.cells))
        return {cell for (cell, _), foreseen in self.of(group, cells).items() if not foreseen.sure}


def _inputs(x: np.ndarray | None) -> np.ndarray:
    assert x is not None, "queries that somebody waits for have their inputs"
    return x
