"""Calls of a user's function on rows: computed, or decoded from what is known of the function.

Workers get rows as they are, one copy of each or, where some are copied, more: so a function need
not be defined between its rows, nor be a JAX function.
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from ..codes._trees import is_float
from ..schemes import Scheme
from ._batch import Batch
from ._pool import AbstractPool
from ._steps import AccuracyTarget, Outgoing, scheme_steps
from ._worker import no_mesh, off_meshes

# After enough answers are in, the others are waited for during this share of the time so far.
_GRACE = 0.25


@dataclasses.dataclass(frozen=True)
class RowFunction:
    """A function of a batch of rows, as workers call it: on NumPy arrays, and checked.

    Integers and booleans become float64, half precision float32.

    Args:
        function: Any callable on (rows, ...) that returns an array (rows, ...).

    Raises:
        TypeError: When called, if the function returns no array of numbers.
        ValueError: When called, if it returns another number of rows.

    Example:
        >>> RowFunction(lambda x: x.sum(axis=1) > 0)(np.ones((2, 3)))
        array([1., 1.])
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
class RowValues:
    """Values of some rows, and how accurate they are.

    Attributes:
        values: The function's own values where `exact`, NaN included, otherwise decoded ones; None
            where no value is known at all.
        exact: Which rows were computed.
        deviation: How far values may be off: 0 where exact, infinite where unknown.
        score: The error bar or the error probability by which an `AccuracyTarget` goes.
        raised: Why rows have no value on which the function raised.
    """

    values: Float[np.ndarray, "rows ..."] | None
    exact: Bool[np.ndarray, " rows"]
    deviation: Float[np.ndarray, " rows"]
    score: Float[np.ndarray, " rows"]
    raised: dict[int, str]


class AbstractRowCalls(abc.ABC):
    """Rows that were sent to workers."""

    @abc.abstractmethod
    def wait(self, deadline: float) -> None:
        """Wait until it is time to `take` the answers, for `deadline` seconds at most."""

    @abc.abstractmethod
    def take(self) -> RowValues:
        """Return what is known of the rows; answers that come later are ignored."""


class PlainCalls(AbstractRowCalls):
    """Calls that compute all rows, `size` of them each; a call that is overdue is sent twice."""

    def __init__(self, pool: AbstractPool, x: Shaped[np.ndarray, "rows ..."], size: int):
        # All calls have one size, for functions that are compiled for each.
        number = math.ceil(len(x) / size)
        self._rows, self._places = len(x), np.resize(np.arange(len(x)), (number, size))
        self._batch = _send(pool, [x[places] for places in self._places])

    def wait(self, deadline: float) -> None:
        self._batch.wait(deadline=deadline)

    def take(self) -> RowValues:
        values, exact, raised = _collect(self._batch, self._places, self._rows)
        unknown = np.where(exact, 0.0, np.inf)
        return RowValues(values, exact, unknown, unknown, raised)


class RowCoder:
    """A scheme that copies uncertain rows, carried out on rows of a function.

    Args:
        pool: The workers.
        scheme: With `redundancy="uncertain"`.
        target: By which rows are scored.
        wait_for: The number of answers at which the other rows are decoded.

    Raises:
        ValueError: If the scheme sends anything but rows as they are.
    """

    def __init__(self, pool: AbstractPool, scheme: Scheme, target: AccuracyTarget, wait_for: int):
        scheme = off_meshes(scheme)
        if not scheme.places_copies:
            raise ValueError("rows go as they are: redundancy='uncertain' is needed")
        self.scheme, self.target, self.wait_for = scheme, target, wait_for
        self._pool = pool
        self._encode, self.decode = scheme_steps(scheme)

    @no_mesh()
    def start(
        self,
        x: Shaped[np.ndarray, "groups num_data ..."],
        features: Float[np.ndarray, "groups num_data d"],
    ) -> "CodedCalls":
        """Send rows in groups; `features` are the inputs of the scheme's surrogate for them."""
        outgoing = self._encode(features)
        assert outgoing.encoders is not None
        holds = np.argmax(outgoing.encoders, axis=-1)
        groups = np.arange(len(x))
        calls = [x[groups, holds[:, worker]] for worker in range(holds.shape[1])]
        return CodedCalls(self, outgoing, holds, _send(self._pool, calls, self.wait_for))


class CodedCalls(AbstractRowCalls):
    """Calls on groups of rows, uncertain ones copied; rows that are late are decoded."""

    def __init__(
        self,
        coder: RowCoder,
        outgoing: Outgoing,
        holds: Int[np.ndarray, "groups num_workers"],
        batch: Batch,
    ):
        self._coder, self._outgoing, self._holds, self._batch = coder, outgoing, holds, batch

    def wait(self, deadline: float) -> None:
        waited = self._batch.wait(self._coder.wait_for, deadline).waited
        grace = min(_GRACE * waited, deadline - waited)
        if grace > 0:
            self._batch.wait(deadline=grace)

    @no_mesh()
    def take(self) -> RowValues:
        scheme, target = self._coder.scheme, self._coder.target
        groups, num_data = len(self._holds), scheme.code.num_data
        places = (self._holds + num_data * np.arange(groups)[:, None]).T
        values, exact, raised = _collect(self._batch, places, groups * num_data)
        if values is None:
            unknown = np.full(groups * num_data, np.inf)
            return RowValues(None, exact, unknown, unknown, raised)
        vectors = values.reshape(len(values), -1)
        sound = exact & np.isfinite(vectors).all(axis=1)
        y = np.where(sound[:, None], vectors, 0).astype(np.float32)
        available = self._batch.available[:, None] & sound[places]
        found = self._coder.decode(self._outgoing, y[places], available.T)
        decoded = np.asarray(found.decoded.predictions).reshape(values.shape)
        score = np.array(target.score(scheme.bars, found), float).reshape(-1)
        deviation = np.array(found.deviation, float).reshape(-1)
        # A row on which the function raised has no value, whatever its neighbours say.
        lost = [place for place in raised if not exact[place]]
        score[lost] = deviation[lost] = np.inf
        score[exact] = deviation[exact] = 0
        lead = (len(values), *[1] * (values.ndim - 1))
        values = np.where(exact.reshape(lead), values, decoded)
        return RowValues(values, exact, deviation, score, raised)


def _send(pool: AbstractPool, calls: list[np.ndarray], needed: int | None = None) -> Batch:
    batch = pool.open(len(calls), needed=needed, refuse=lambda answer: None)
    pool.send(batch, range(len(calls)), calls)
    return batch


def _collect(
    batch: Batch, places: Int[np.ndarray, "calls size"], rows: int
) -> tuple[np.ndarray | None, Bool[np.ndarray, " rows"], dict[int, str]]:
    """Take a batch's answers row by row, and forget the batch.

    Returns:
        The values of the rows that were computed, zeros elsewhere; which rows those are; and of the
        others, why the function raised on them.
    """
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
