"""Rows of anyone's function on a pool: computed, or decoded from what is known of the function.

Workers get rows as they are, each one of them or, where some are copied, more than one: so a
function need not be defined between its rows, nor be a function of JAX's.
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from ..codes import is_float
from ..schemes import Scheme
from ._batch import Batch
from ._pool import AbstractPool
from ._schemes import Goal, Sent, scheme_steps
from ._worker import no_mesh, off_meshes

# What is no straggler answers within this share of the time that the others took, after them.
_GRACE = 0.25


@dataclasses.dataclass(frozen=True)
class RowFunction:
    """A function of a batch of rows as workers call it: as it is, on NumPy's arrays.

    Raises: TypeError for what it gives that is no array of numbers, ValueError for another number
    of rows.
    """

    function: Callable[[Any], Any]

    def __call__(self, batch: Shaped[np.ndarray, "rows ..."]) -> Float[np.ndarray, "rows ..."]:
        found = self.function(batch)
        if found is None or isinstance(found, dict | tuple):
            raise TypeError(
                f"the function gave a {type(found).__name__}: an array (rows, ...) is needed"
            )
        y = np.asarray(found)
        if y.dtype.kind in "biu":
            y = y.astype(np.float64)
        if not is_float(y):
            raise TypeError(f"the function gave {y.dtype}: real numbers are needed")
        if y.shape[:1] != (len(batch),):
            raise ValueError(f"{len(batch)} rows came back as an array of shape {y.shape}")
        return y.astype(np.float32) if y.dtype.itemsize < 4 else y


@dataclasses.dataclass(frozen=True)
class Rows:
    """What became of some rows.

    `deviation` is 0 where `exact`: there `values` are what the function gave, NaN included. Else it
    says how far they may be off, infinite where nothing is known, and `score` is what a `Goal` goes
    by. `values` is None where nothing is known of any. `raised` says why there is no answer, by
    place, where the function raised.
    """

    values: Float[np.ndarray, "rows ..."] | None
    exact: Bool[np.ndarray, " rows"]
    deviation: Float[np.ndarray, " rows"]
    score: Float[np.ndarray, " rows"]
    raised: dict[int, str]


class AbstractRound(abc.ABC):
    """Rows on their way."""

    @abc.abstractmethod
    def wait(self, deadline: float) -> None:
        """Until it is time to `take` what is in, or so many seconds have passed."""

    @abc.abstractmethod
    def take(self) -> Rows:
        """What became of the rows; nothing more is heard of them."""


class ComputedRows(AbstractRound):
    """All rows computed, `size` of them in a call; a call that is overdue is sent twice."""

    def __init__(self, pool: AbstractPool, x: Shaped[np.ndarray, "rows ..."], size: int):
        # All calls are alike, as a function that is compiled for each size would have it.
        number = math.ceil(len(x) / size)
        self._rows, self._places = len(x), np.resize(np.arange(len(x)), (number, size))
        self._batch = _send(pool, [x[places] for places in self._places])

    def wait(self, deadline: float) -> None:
        self._batch.wait(deadline=deadline)

    def take(self) -> Rows:
        values, exact, raised = _heard(self._batch, self._places, self._rows)
        unknown = np.where(exact, 0.0, np.inf)
        return Rows(values, exact, unknown, unknown, raised)


class RowCoder:
    """A scheme that copies what is doubtful, carried out on rows of a function.

    `goal` says what a row is scored by, `wait_for` at how many of N answers the rest is decoded.
    """

    def __init__(self, pool: AbstractPool, scheme: Scheme, goal: Goal, wait_for: int):
        scheme = off_meshes(scheme)
        if not scheme.places_copies:
            raise ValueError("rows go as they are: redundancy='doubtful' is needed")
        self.scheme, self.goal, self.wait_for = scheme, goal, wait_for
        self._pool = pool
        self._send, self.judge = scheme_steps(scheme)

    @no_mesh()
    def start(
        self,
        x: Shaped[np.ndarray, "groups num_data ..."],
        features: Float[np.ndarray, "groups num_data d"],
    ) -> "CodedRows":
        """Sends rows in groups. `features` are what the scheme's surrogate knows them by."""
        sent = self._send(features)
        assert sent.encoders is not None
        holds = np.argmax(sent.encoders, axis=-1)
        groups = np.arange(len(x))
        calls = [x[groups, holds[:, worker]] for worker in range(holds.shape[1])]
        return CodedRows(self, sent, holds, _send(self._pool, calls, self.wait_for))


class CodedRows(AbstractRound):
    """Rows in groups, the doubtful ones copied: who has not answered in time is decoded."""

    def __init__(
        self,
        coder: RowCoder,
        sent: Sent,
        holds: Int[np.ndarray, "groups num_workers"],
        batch: Batch,
    ):
        self._coder, self._sent, self._holds, self._batch = coder, sent, holds, batch

    def wait(self, deadline: float) -> None:
        waited = self._batch.wait(self._coder.wait_for, deadline).waited
        grace = min(_GRACE * waited, deadline - waited)
        if grace > 0:
            self._batch.wait(deadline=grace)

    @no_mesh()
    def take(self) -> Rows:
        scheme, goal = self._coder.scheme, self._coder.goal
        groups, num_data = len(self._holds), scheme.code.num_data
        places = (self._holds + num_data * np.arange(groups)[:, None]).T
        values, exact, raised = _heard(self._batch, places, groups * num_data)
        if values is None:
            unknown = np.full(groups * num_data, np.inf)
            return Rows(None, exact, unknown, unknown, raised)
        vectors = values.reshape(len(values), -1)
        sound = exact & np.isfinite(vectors).all(axis=1)
        y = np.where(sound[:, None], vectors, 0).astype(np.float32)
        available = self._batch.available[:, None] & sound[places]
        judged = self._coder.judge(self._sent, y[places], available.T)
        decoded = np.asarray(judged.decoded.predictions).reshape(values.shape)
        score = np.array(goal.score(scheme.bars, judged), float).reshape(-1)
        deviation = np.array(judged.deviation, float).reshape(-1)
        # What the function raised on has no value, whatever its neighbours say.
        lost = [place for place in raised if not exact[place]]
        score[lost] = deviation[lost] = np.inf
        score[exact] = deviation[exact] = 0
        lead = (len(values), *[1] * (values.ndim - 1))
        values = np.where(exact.reshape(lead), values, decoded)
        return Rows(values, exact, deviation, score, raised)


def _send(pool: AbstractPool, calls: list[np.ndarray], needed: int | None = None) -> Batch:
    batch = pool.open(len(calls), needed=needed, refuse=lambda answer: None)
    pool.send(batch, range(len(calls)), calls)
    return batch


def _heard(
    batch: Batch, places: Int[np.ndarray, "calls size"], rows: int
) -> tuple[np.ndarray | None, Bool[np.ndarray, " rows"], dict[int, str]]:
    """The values of the rows that were computed, zeros elsewhere; which those are; and of those
    that were not, on which the function raised. Forgets the batch."""
    batch.forget()
    exact, values = np.zeros(rows, bool), None
    for call in np.flatnonzero(batch.available):
        answer: Any = batch.answer(int(call))
        if values is None:
            values = np.zeros((rows, *answer.shape[1:]), answer.dtype)
        values[places[call]], exact[places[call]] = answer, True
    raised = {
        int(place): failure.reason
        for failure in batch.failures
        if failure.raised
        for place in places[failure.point]
    }
    return values, exact, {place: why for place, why in raised.items() if not exact[place]}
