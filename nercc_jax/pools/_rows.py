"""A user's function of rows, as workers call it, its rows, and one call of it."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from ..codes._trees import is_float
from ._batch import Batch
from ._pool import AbstractPool


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


def checked_rows(rows: Any) -> Shaped[np.ndarray, "rows ..."]:
    """Return rows as an array of finite numbers, which the learner needs."""
    x = np.asarray(rows)
    if x.ndim < 1 or not x.size or x.dtype.kind not in "biuf" or not np.isfinite(x).all():
        raise ValueError(f"rows are finite numbers (rows, ...), not {x.dtype} of shape {x.shape}")
    return x


class RowCall:
    """Some rows that one worker computes. A pool tries others if it dies or the function raises.

    Fewer rows than `size` are filled up with their own once more, for functions that are compiled
    for each shape. A `copy` has the rows of another call. One of the pool's threads calls
    `on_change` when there may be something to take.
    """

    def __init__(
        self,
        pool: AbstractPool,
        rows: Int[np.ndarray, " few"],
        x: Shaped[np.ndarray, "rows ..."],
        size: int,
        copy: bool,
        on_change: Callable[[Batch], Any],
        avoid: Collection[int] = (),
    ):
        self.rows, self.size, self.copy = rows, size, copy
        self.copies = 0  # other calls with the same rows
        self.given_up = False  # its rows have been sent again, or are lost
        self.batch = pool.open(1, copies=1, on_change=on_change, refuse=lambda answer: None)
        pool.send(self.batch, [0], [np.take(x, np.resize(rows, size), axis=0)], avoid=avoid)

    def age(self) -> float:
        """Return the seconds for which its worker has or had it; 0 while none has it.

        A worker's death begins it again, since that says nothing about how long the rows take.
        """
        task = self.batch.tasks.get(0)
        return 0.0 if task is None else self.batch.age(task)

    @property
    def running(self) -> bool:
        task = self.batch.tasks.get(0)
        return task is not None and task.running > 0

    @property
    def late(self) -> bool:
        """Return whether it takes, or took, longer than the pool's rule for overdue tasks."""
        return self.age() > self.batch.times.limit(self.size)

    @property
    def over(self) -> bool:
        """Return whether it has its answer, or will have none."""
        return bool(self.batch.available[0]) or self.batch.lost(0)

    def values(self) -> Float[np.ndarray, "few ..."] | None:
        """Return the function's values for the rows, if they are in."""
        answer: Any = self.batch.answer(0)
        return None if answer is None else answer[: len(self.rows)]

    @property
    def worker(self) -> int:
        return self.batch.workers[0]

    def raised(self) -> str | None:
        """Return what the function raised, if that is why there are no values."""
        reasons = [each.reason for each in self.batch.failures if each.raised]
        return reasons[-1] if reasons else None

    def failure(self) -> str:
        return self.batch.failures[-1].reason if self.batch.failures else "no answer"
