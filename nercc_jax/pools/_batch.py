"""One batch of coded data points at a pool: what has been answered, and waiting for more."""

import dataclasses
import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Bool, Float, PyTree

from ._clock import AbstractClock
from ._crew import reason_of
from ._overdue import AnswerTimes

# When to stop waiting: this many answers are in, or these answers are enough.
Enough: TypeAlias = int | np.integer | Callable[[np.ndarray], bool]

# Why an answer is none, None where it is one.
Refuse: TypeAlias = Callable[[PyTree[np.ndarray]], str | None]


@dataclasses.dataclass(frozen=True)
class Failure:
    """A worker that did not answer a coded data point, and why.

    `raised`: the model raised, or its answer was none; else the worker died, or hung.
    """

    worker: int
    point: int
    reason: str
    raised: bool = False


@dataclasses.dataclass(frozen=True)
class BatchAnswers:
    """What was in when the wait ended.

    `values` are zero where no answer was in, and None where there was none at all; `seconds` count
    from the moment a coded data point was handed to the pool to its answer, NaN where there is
    none; `waited` is from the batch's dispatch to the end of the wait.
    """

    values: PyTree[Float[np.ndarray, "num_points ..."]] | None
    available: Bool[np.ndarray, " num_points"]
    seconds: Float[np.ndarray, " num_points"]
    waited: float
    failures: tuple[Failure, ...]


_NOTHING = np.empty(0)
_ARRAY = jax.tree.structure(0)  # of a single array


def arrays_of(tree: PyTree) -> list[Any]:
    """A pytree's leaves. Most are one array, and JAX takes longer for that than all else here."""
    return [tree] if type(tree) is np.ndarray else jax.tree.leaves(tree)


class Task:
    """A coded data point on its way: waiting, at one worker or more, or settled."""

    __slots__ = (
        "attempts",
        "batch",
        "failed",
        "fresh",
        "given",
        "kind",
        "point",
        "running",
        "settled",
        "size",
        "value",
    )

    def __init__(self, batch: "Batch", point: int, kind: int, value: PyTree):
        self.batch, self.point, self.kind, self.value = batch, point, kind, value
        self.size = len(arrays_of(value)[0])  # data points
        self.given = batch.clock.now()
        self.attempts = 0
        self.failed: set[int] = set()  # workers that it went wrong with
        self.running = 0  # workers that have it in hand
        self.fresh = 0  # those of them that are not overdue
        self.settled = False

    @property
    def limit(self) -> float:
        """Seconds after which a worker is overdue with it."""
        return self.batch.times.limit(self.size)


@dataclasses.dataclass(frozen=True)
class Books:
    """What batches of a pool share: its lock, its clock, and who is told that one is forgotten."""

    lock: threading.RLock
    clock: AbstractClock
    forget: Callable[["Batch"], None]


class Batch:
    """Coded data points dispatched together, or one after the other, and their answers.

    Made by a pool. Every wait has a deadline; `forget` a batch when done with it, or use it as a
    context manager: what has not been sent is then dropped, and answers that still come are counted
    as late and thrown away. Until then late answers are collected, and a second `wait` has them.
    """

    def __init__(
        self,
        books: Books,
        num_points: int,
        needed: int | None,
        copies: int,
        times: AnswerTimes,
        on_change: Callable[["Batch"], None] | None,
        refuse: Refuse,
    ):
        if needed is None:
            needed = num_points
        if not 1 <= needed <= num_points:
            raise ValueError(f"a batch of {num_points} needs 1 to as many answers, not {needed}")
        if copies < 1:
            raise ValueError(f"a coded data point has 1 copy or more, not {copies}")
        self.num_points, self.needed, self.copies = num_points, needed, copies
        self.times, self._refuse = times, refuse
        self.open = True
        self.waiting: list[Task] = []
        self.tasks: dict[int, Task] = {}
        self.available = np.zeros(num_points, bool)
        self.failures: list[Failure] = []
        self.on_change = on_change
        self.clock, self._on_forget = books.clock, books.forget
        self._values: list[PyTree | None] = [None] * num_points
        self._seconds = np.full(num_points, np.nan)
        self.workers: dict[int, int] = {}  # who answered, by coded data point
        self._form: Any = None  # of an answer, but for the number of data points
        self._changed = threading.Condition(books.lock)
        self._awaited = num_points
        self._count = 0
        self._unsettled = 0
        self.hopes = 0
        self._start = self.clock.now()

    def __enter__(self) -> "Batch":
        return self

    def __exit__(self, *_) -> None:
        self.forget()

    @property
    def count(self) -> int:
        """How many coded data points have been answered."""
        return self._count

    def wait(self, enough: Enough | None = None, deadline: float = 60.0) -> BatchAnswers:
        """Waits until the answers are enough, no more can come, or `deadline` seconds have passed.

        `enough` is a number of answers (all unless given), or a function of the mask of those that
        are in, for example `Forecast.below`. The deadline counts from this call. May be called
        again, for more.

        Raises: ValueError for a number that is not from 1 to the number of coded data points, or a
        deadline that is not positive; it may be infinite.
        """
        if enough is None:
            enough = self.num_points
        if not callable(enough):
            enough = operator.index(enough)  # NumPy's integers too
        if isinstance(enough, int) and not 1 <= enough <= self.num_points:
            raise ValueError(f"wait for 1 to {self.num_points} answers, not {enough}")
        end = self.clock.now() + check_deadline(deadline)
        while True:
            with self._changed:
                seen = self._count
                number = enough if isinstance(enough, int) else seen + 1
                if isinstance(enough, int) and seen >= enough:
                    return self._answers()
                if self._unsettled == 0 or self.clock.now() >= end:
                    return self._answers()
                mask = self.available.copy()
            # Outside the lock: a forecast takes its time, and answers come in meanwhile.
            if not isinstance(enough, int) and seen > 0 and enough(mask):
                with self._changed:
                    return self._answers()
            with self._changed:
                while self._count < number and self._unsettled:
                    left = end - self.clock.now()
                    if left <= 0:
                        break
                    self._awaited = min(self._awaited, number)
                    self.clock.wait(self._changed, left)

    def forget(self) -> None:
        """Drops what is not sent, and lets answers that still come go. Does nothing twice."""
        self._on_forget(self)

    def suffice(self) -> None:
        """Nothing more is needed: what waits is not sent, what is on its way is still heard."""
        with self._changed:
            self.needed = 0

    def answer(self, point: int) -> PyTree[np.ndarray] | None:
        """One coded data point's answer, if it is in."""
        return self._values[point]

    def lost(self, point: int) -> bool:
        """Whether a coded data point was sent and will have no answer; `failures` say why."""
        task = self.tasks.get(point)
        return task is not None and task.settled and not self.available[point]

    def abandoned(self, point: int) -> bool:
        """Whether a coded data point failed and, as things are, will not be sent again.

        It has no attempts left, or the batch has answers enough without it.
        """
        task = self.tasks.get(point)
        if task is None or self.available[point] or task.running or not task.attempts:
            return False
        return task.settled or self.short <= 0

    def _answers(self) -> BatchAnswers:
        some = next((value for value in self._values if value is not None), None)
        values = None
        if some is not None:
            values = jax.tree.map(
                lambda leaf: np.zeros((self.num_points, *leaf.shape), leaf.dtype), some
            )
            wholes = arrays_of(values)
            for point in np.flatnonzero(self.available):
                for whole, part in zip(wholes, arrays_of(self._values[point]), strict=True):
                    whole[point] = part
        return BatchAnswers(
            values,
            self.available.copy(),
            self._seconds.copy(),
            self.clock.now() - self._start,
            tuple(self.failures),
        )

    # What follows is for the desk, which holds the lock.

    @property
    def short(self) -> int:
        """How many answers are needed beyond those that are in or may be hoped for."""
        return self.needed - self._count - self.hopes

    @property
    def over(self) -> bool:
        """Whether every coded data point that was sent has its answer, or will never have one."""
        return self._unsettled == 0

    def check_new(self, points: Sequence[int]) -> None:
        """Raises: ValueError where one of these cannot be sent."""
        if not self.open:
            raise ValueError("this batch has been forgotten: nothing more can be sent")
        seen = set()
        for point in points:
            sent = point in self.tasks or point in seen
            if sent or not 0 <= point < self.num_points:
                raise ValueError(
                    f"coded data point {point} of {self.num_points} is not there, or has been sent "
                    "already"
                )
            seen.add(point)

    def add(self, task: Task) -> None:
        """Takes a task that is to be sent."""
        self.tasks[task.point] = task
        self.waiting.append(task)
        self._unsettled += 1

    def end(self) -> None:
        """It is forgotten, and holds nothing that holds it, so that it goes by itself.

        To look for garbage stops all threads, for a tenth of a second where a server made some.
        """
        self.open, self.on_change = False, None
        self.tasks = {}

    def hope(self, task: Task, change: int) -> None:
        """Counts the tasks that some worker has in hand and is not overdue with."""
        before, task.fresh = task.fresh > 0, task.fresh + change
        if not task.settled:
            self.hopes += (task.fresh > 0) - before

    def settle(self, task: Task, value: PyTree | None, worker: int = -1) -> None:
        """Takes a task's answer, and who gave it, or that it has none."""
        self.hopes -= task.fresh > 0
        task.settled, task.value = True, _NOTHING  # it may be large, and the batch live on
        self._unsettled -= 1
        if value is not None:
            self._values[task.point], self.workers[task.point] = value, worker
            self._seconds[task.point] = self.clock.now() - task.given
            self.available[task.point] = True
            self._count += 1
        if self._count >= self._awaited or self._unsettled == 0:
            self._changed.notify_all()

    def refusal(self, outcome: Any, size: int) -> str | None:
        """Why what a worker made of `size` data points is no answer, if so."""
        if isinstance(outcome, Exception):
            return reason_of(outcome)
        try:
            return self._odd(outcome, size)
        except Exception as error:  # no array at all, for example
            return f"the answer cannot be read: {reason_of(error)}"

    def _odd(self, value: PyTree[np.ndarray], size: int) -> str | None:
        leaves = arrays_of(value)
        if not leaves:
            return "the answer holds no array"
        for leaf in leaves:
            if leaf.ndim < 1 or leaf.shape[0] != size:
                return f"{size} data points came back as an array of shape {leaf.shape}"
        structure = _ARRAY if leaves[0] is value else jax.tree.structure(value)
        form = structure, [leaf.shape[1:] for leaf in leaves]
        if self._form is not None and self._form != form:
            forms = [jax.tree.unflatten(*each) for each in (form, self._form)]
            return f"each answer has shape {forms[0]}, others of this batch {forms[1]}"
        refused = self._refuse(value)
        if refused is None:
            self._form = form  # of all, as of the first
        return refused


def refuse_odd(answer: PyTree[np.ndarray]) -> str | None:
    """Why an answer cannot be decoded, if so."""
    for leaf in arrays_of(answer):
        if leaf.dtype.kind != "f":
            return f"the answer is {leaf.dtype}: codes work on floats"
        if not np.isfinite(leaf).all():
            return "the answer is not finite"
    return None


def check_deadline(seconds: float) -> float:
    """The seconds. Raises: ValueError where they are not positive (NaN is not)."""
    if not seconds > 0:
        raise ValueError(f"a deadline is a positive number of seconds, not {seconds}")
    return seconds
