"""One batch of coded data points at a pool: its tasks, its answers, and waiting for more."""

import dataclasses
import math
import operator
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jaxtyping import Bool, Float, PyTree

from .times import AnswerTimes

# When to stop waiting: at this many answers, or once a function of their mask says so.
Enough: TypeAlias = int | np.integer | Callable[[np.ndarray], bool]

# Returns why an answer cannot be used; None where it can.
Refuse: TypeAlias = Callable[[PyTree[np.ndarray]], str | None]


@dataclasses.dataclass(frozen=True)
class Failure:
    """An attempt at a coded data point that gave no answer: see `BatchAnswers`."""

    worker: int
    point: int
    reason: str
    raised: bool = False
    refused: bool = False


@dataclasses.dataclass(frozen=True)
class BatchAnswers:
    """The answers that were in when a wait ended.

    Attributes:
        values: The answers, zero where there is none; None where there is none at all.
        available: Which coded data points have an answer.
        seconds: From the moment a coded data point was handed to the pool to its answer; NaN where
            there is none.
        waited: From the batch's dispatch to the end of the wait, in seconds.
        failures: Attempts that went wrong: `worker` (-1 where the whole pool failed), the coded
            data point `point`, `reason` in one line, whether the model raised or its answer could
            not be used (`raised`; otherwise the worker died or hung), and whether there was an
            answer that could not be used (`refused`).
    """

    values: PyTree[Float[np.ndarray, "num_points ..."]] | None
    available: Bool[np.ndarray, " num_points"]
    seconds: Float[np.ndarray, " num_points"]
    waited: float
    failures: tuple[Failure, ...]


_NOTHING = np.empty(0)
_ARRAY = jax.tree.structure(0)  # of a single array

# The line of a traceback that says what was raised: frames are indented.
_RAISED = re.compile(r"[A-Za-z_][\w.]*(: |$)")


def reason_of(error: BaseException) -> str:
    """Return an exception in one line; where XLA wraps a traceback, the exception at its end."""
    text = str(error)
    _, traceback, raised = text.rpartition("Traceback (most recent call last):")
    lines = [line for line in raised.splitlines() if _RAISED.match(line)] if traceback else []
    return lines[0] if lines else f"{type(error).__name__}: {text}".splitlines()[0]


def arrays_of(tree: PyTree) -> list[Any]:
    """Return a pytree's leaves. Most trees are one array, for which JAX would take longest here."""
    return [tree] if type(tree) is np.ndarray else jax.tree.leaves(tree)


@dataclasses.dataclass(slots=True, eq=False)
class Task:
    """One coded data point to be computed: waiting, at one worker or more, or settled."""

    batch: "Batch"
    point: int
    kind: int
    value: PyTree
    size: int  # data points
    given: float  # when
    avoid: frozenset[int]  # workers that must not get it
    attempts: int = 0
    failed: set[int] = dataclasses.field(default_factory=set)  # workers at which it failed
    refusals: int = 0  # answers that could not be used
    running: int = 0  # workers that have it
    on_time: int = 0  # those of them that are not overdue
    wanted: int = 1  # as many of these as it should have
    settled: bool = False
    sent: float = math.nan  # when the latest worker got it
    settled_at: float = math.nan

    @property
    def pending(self) -> bool:
        """True if as many workers as it should have are at work on it in time."""
        return self.on_time >= self.wanted

    @property
    def limit(self) -> float:
        """The seconds after which a worker is overdue with it."""
        return self.batch.times.limit(self.size)


class Batch:
    """Coded data points dispatched together, or one after the other, and their answers.

    Pools make batches. Every wait has a deadline. `forget` a batch when done with it, or use it as
    a context manager: what has not been sent is then dropped, and answers that still come are
    counted as late and thrown away. Until then late answers are collected, and a second `wait`
    returns them.

    Example:
        >>> import numpy as np
        >>> from nercc_jax.pools import DevicePool
        >>> with DevicePool(np.negative, 2, compiled=False) as pool:
        ...     with pool.dispatch(np.ones((3, 1, 2))) as batch:
        ...         answers = batch.wait(3, deadline=10.0)
        >>> answers.available.tolist()
        [True, True, True]
    """

    def __init__(
        self,
        runner: Any,
        num_points: int,
        needed: int | None,
        copies: int,
        at_once: int,
        times: AnswerTimes,
        on_change: Callable[["Batch"], None] | None,
        refuse: Refuse,
    ):
        """Open a batch at a pool's `Runner`."""
        needed = num_points if needed is None else needed
        if not 1 <= needed <= num_points:
            raise ValueError(f"a batch of {num_points} needs 1 to as many answers, not {needed}")
        if copies < 1:
            raise ValueError(f"a coded data point has 1 copy or more, not {copies}")
        if not 1 <= at_once <= copies:
            raise ValueError(f"of {copies} copies, 1 to all go out at once, not {at_once}")
        self.num_points, self.needed = num_points, needed
        self.copies, self.at_once = copies, at_once
        self.times, self.refuse, self.on_change = times, refuse, on_change
        self.open = True
        self.tasks: dict[int, Task] = {}
        self.waiting: list[Task] = []  # those of them that are to be sent
        self.pending = 0  # coded data points at which enough workers are, and not overdue
        self.count = 0  # coded data points that have been answered
        self.available = np.zeros(num_points, bool)
        self.workers: dict[int, int] = {}  # the worker that answered, by coded data point
        self.failures: list[Failure] = []
        self._runner, self.clock = runner, runner.clock
        self._changed = threading.Condition(runner.lock)
        self._values: list[PyTree | None] = [None] * num_points
        self._seconds = np.full(num_points, np.nan)
        self._form: Any = None  # of an answer, but for the number of data points
        self._awaited = num_points  # the fewest answers that somebody waits for
        self._unsettled = 0
        self._start = self.clock.now()

    def __enter__(self) -> "Batch":
        return self

    def __exit__(self, *_) -> None:
        self.forget()

    def wait(self, enough: Enough | None = None, deadline: float = 60.0) -> BatchAnswers:
        """Wait until the answers are enough, no more can come, or the deadline has passed.

        May be called again, for more answers.

        Args:
            enough: A number of answers (default: all), or a function of the mask of those that are
                in, for example `Answers.below`.
            deadline: Seconds from this call on; may be infinite.

        Raises:
            ValueError: If the number is not from 1 to the number of coded data points, or the
                deadline is not positive.
        """
        rule = enough if callable(enough) else None
        number = self.num_points if enough is None else enough
        number = 1 if callable(number) else operator.index(number)  # NumPy's integers too
        if not 1 <= number <= self.num_points:
            raise ValueError(f"wait for 1 to {self.num_points} answers, not {number}")
        end = self.clock.now() + check_deadline(deadline)
        while True:
            with self._changed:
                while self.count < number and self._unsettled:
                    left = end - self.clock.now()
                    if left <= 0:
                        break
                    self._awaited = min(self._awaited, number)
                    self.clock.wait(self._changed, left)
                if rule is None or self.count < number or not self._unsettled:
                    return self._answers()
                mask, number = self.available.copy(), self.count + 1
            # Outside the lock: a forecast takes its time, and answers come in meanwhile.
            if rule(mask):
                with self._changed:
                    return self._answers()

    def forget(self) -> None:
        """Drop what has not been sent, and ignore answers that still come. Idempotent."""
        with self._changed:
            # Without references that make a cycle it is freed without Python's garbage collector,
            # which stops all threads: for a tenth of a second in a busy server.
            self.open, self.on_change, self.tasks = False, None, {}
            self._runner.schedule.forget(self)

    def suffice(self) -> None:
        """Send nothing more; answers that are on their way are still collected."""
        with self._changed:
            self.needed = 0

    def drop_answers(self, points: Bool[np.ndarray, " num_points"]) -> None:
        """Drop the answers to some coded data points, which may be large; others are collected."""
        with self._changed:
            for point in np.flatnonzero(points).tolist():
                self._values[point] = None

    def answer(self, point: int) -> PyTree[np.ndarray] | None:
        """Return one coded data point's answer, or None if it is not in."""
        return self._values[point]

    def lost(self, point: int) -> bool:
        """Return whether a coded data point was sent and will have no answer.

        `failures` say why.
        """
        task = self.tasks.get(point)
        return task is not None and task.settled and not self.available[point]

    def age(self, point: int) -> tuple[float, bool]:
        """Return the seconds for which the latest worker has or had a coded data point.

        They are 0 if none has it: a worker's death says nothing about how long a point takes. The
        second value is whether it is overdue.
        """
        task, seconds = self.tasks.get(point), 0.0
        if task is not None and task.settled and task.attempts:
            seconds = task.settled_at - task.sent
        elif task is not None and task.running and not task.settled:
            seconds = self.clock.now() - task.sent
        return seconds, task is not None and seconds > task.limit

    def abandoned(self, point: int) -> bool:
        """Return whether a coded data point failed and, as things are, will not be sent again.

        It has no attempts left, or the batch has enough answers without it.
        """
        task = self.tasks.get(point)
        if task is None or self.available[point] or task.running or not task.attempts:
            return False
        return task.settled or self.missing <= 0

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
        waited = self.clock.now() - self._start
        arrays = self.available.copy(), self._seconds.copy()
        return BatchAnswers(values, *arrays, waited, tuple(self.failures))

    # What follows is for the pool and its schedule, which hold the lock.

    @property
    def missing(self) -> int:
        """The answers needed beyond those that are in or pending."""
        return self.needed - self.count - self.pending

    @property
    def over(self) -> bool:
        """True if every coded data point that was sent has its answer, or never will."""
        return self._unsettled == 0

    def add(self, tasks: Sequence[Task]) -> None:
        """Add tasks that are to be sent; raise ValueError, and add none, if one cannot be."""
        if not self.open:
            raise ValueError("this batch has been forgotten: nothing more can be sent")
        new: dict[int, Task] = {}
        for task in tasks:
            point = task.point
            if point in self.tasks or point in new or not 0 <= point < self.num_points:
                raise ValueError(
                    f"coded data point {point} of {self.num_points} is not there, or has been sent "
                    "already"
                )
            task.wanted, new[point] = self.at_once, task
        self.tasks |= new
        self.waiting += tasks
        self._unsettled += len(tasks)

    def count_pending(self, task: Task, change: int, wanted: int | None = None) -> None:
        """Change the number of workers that have a task in time, and how many should."""
        before, task.on_time = task.pending, task.on_time + change
        task.wanted = task.wanted if wanted is None else wanted
        if not task.settled:
            self.pending += task.pending - before

    def hedge(self, task: Task) -> None:
        """Count a worker as overdue with a task, which other workers may get then."""
        self.count_pending(task, -1, min(self.times.overdue.copies, max(self.copies - 1, 1)))

    def settle(self, task: Task, value: PyTree | None, worker: int = -1) -> None:
        """Take a task's answer and the worker that gave it, or None if there will be none."""
        self.pending -= task.pending
        task.settled_at = self.clock.now()
        task.settled, task.value = True, _NOTHING  # it may be large, and the batch live on
        self._unsettled -= 1
        if value is not None:
            self._values[task.point], self.workers[task.point] = value, worker
            self._seconds[task.point] = task.settled_at - task.given
            self.available[task.point] = True
            self.count += 1
        if self.count >= self._awaited or self._unsettled == 0:
            self._changed.notify_all()

    def refusal(self, outcome: Any, size: int) -> str | None:
        """Return why a worker's outcome for `size` data points is no answer, if it is none."""
        if isinstance(outcome, Exception):
            return reason_of(outcome)
        try:
            leaves = arrays_of(outcome)
            if not leaves:
                return "the answer holds no array"
            for leaf in leaves:
                if leaf.ndim < 1 or leaf.shape[0] != size:
                    inside = "" if leaf is outcome else f" in a {type(outcome).__name__}"
                    came = f"an array of shape {leaf.shape}{inside}"
                    return f"{size} data points came back as {came}"
            structure = _ARRAY if leaves[0] is outcome else jax.tree.structure(outcome)
            form = structure, [leaf.shape[1:] for leaf in leaves]
            if self._form is not None and self._form != form:
                forms = [jax.tree.unflatten(*each) for each in (form, self._form)]
                return f"each answer has shape {forms[0]}, others of this batch {forms[1]}"
            refused = self.refuse(outcome)
        except Exception as error:  # no array at all, for example
            return f"the answer cannot be read: {reason_of(error)}"
        if refused is None:
            self._form = form  # of all, as of the first
        return refused


def refuse_odd(answer: PyTree[np.ndarray]) -> str | None:
    """Return why an answer cannot be decoded, if it cannot: it is not finite, or no floats."""
    for leaf in arrays_of(answer):
        if leaf.dtype.kind != "f":
            return f"the answer is {leaf.dtype}: codes work on floats"
        if not np.isfinite(leaf).all():
            return "the answer is not finite"
    return None


def check_deadline(seconds: float) -> float:
    """Return the seconds; raise ValueError if they are not positive, as NaN is not."""
    if not seconds > 0:
        raise ValueError(f"a deadline is a positive number of seconds, not {seconds}")
    return seconds
