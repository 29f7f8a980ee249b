"""One batch of coded data points at a pool: its tasks, its answers, and how to wait for them."""

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

# When to stop waiting: at this many answers, or once a function of their mask returns True.
Enough: TypeAlias = int | np.integer | Callable[[np.ndarray], bool]

# Returns why an answer cannot be used; None if it can.
Refuse: TypeAlias = Callable[[PyTree[np.ndarray]], str | None]


@dataclasses.dataclass(frozen=True)
class Failure:
    """An attempt to compute a coded data point that failed: see `BatchAnswers`."""

    worker: int
    point: int
    reason: str
    raised: bool = False
    refused: bool = False


@dataclasses.dataclass(frozen=True)
class BatchAnswers:
    """The answers that had arrived when a wait ended.

    Attributes:
        values: The answers, zero for coded data points without one; None if there is none at all.
        available: The mask of coded data points that have an answer.
        seconds: Seconds from handing each coded data point to the pool until its answer; NaN
            without one.
        waited: Seconds from the opening of the batch to the end of the wait.
        failures: Attempts that failed: `worker` (-1 if the whole pool failed), the coded data point
            `point`, `reason` in one line, `raised` (the model raised, or its answer could not be
            used; otherwise the worker died or hung), and `refused` (there was an answer, and it
            could not be used).
    """

    values: PyTree[Float[np.ndarray, "num_points ..."]] | None
    available: Bool[np.ndarray, " num_points"]
    seconds: Float[np.ndarray, " num_points"]
    waited: float
    failures: tuple[Failure, ...]


_NOTHING = np.empty(0)
_ARRAY = jax.tree.structure(0)  # of a single array

# The line of a traceback with the exception; the lines of its frames are indented.
_RAISED = re.compile(r"[A-Za-z_][\w.]*(: |$)")


def reason_of(error: BaseException) -> str:
    """Return an exception in one line; of a traceback that XLA wraps, the exception at its end."""
    text = str(error)
    _, traceback, raised = text.rpartition("Traceback (most recent call last):")
    lines = [line for line in raised.splitlines() if _RAISED.match(line)] if traceback else []
    return lines[0] if lines else f"{type(error).__name__}: {text}".splitlines()[0]


def arrays_of(tree: PyTree) -> list[Any]:
    """Return a pytree's leaves, with a shortcut for one NumPy array, which most trees are."""
    return [tree] if type(tree) is np.ndarray else jax.tree.leaves(tree)


@dataclasses.dataclass(slots=True, eq=False)
class Task:
    """One coded data point to compute: waiting, in flight at one or more workers, or settled."""

    batch: "Batch"
    point: int
    kind: int
    value: PyTree
    size: int  # data points
    given: float  # when it was handed to the pool
    avoid: frozenset[int]  # workers that must not get it
    attempts: int = 0
    failed: set[int] = dataclasses.field(default_factory=set)  # workers at which it failed
    refusals: int = 0  # answers that could not be used
    running: int = 0  # workers that have it
    on_time: int = 0  # workers that have it and are not overdue
    wanted: int = 1  # the number that `on_time` should have
    settled: bool = False  # it has its answer, or was given up
    sent: float = math.nan  # when the latest worker got it
    settled_at: float = math.nan

    @property
    def pending(self) -> bool:
        """True if enough workers that are not overdue have it."""
        return self.on_time >= self.wanted

    @property
    def limit(self) -> float:
        """The seconds after which a worker that has it is overdue."""
        return self.batch.times.limit(self.size)


class Batch:
    """Coded data points dispatched together, or one after the other, and their answers.

    Pools create batches. Every wait has a deadline. `forget` a batch when you are done with it, or
    use it as a context manager: unsent tasks are then dropped, and answers that still arrive are
    counted as late and discarded. Until then late answers are collected, and a second `wait`
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
        self.waiting: list[Task] = []  # the tasks to send
        self.pending = 0  # unsettled tasks that enough workers have, which are not overdue
        self.count = 0  # coded data points that have been answered
        self.available = np.zeros(num_points, bool)
        self.workers: dict[int, int] = {}  # the worker that answered, by coded data point
        self.failures: list[Failure] = []
        self._runner, self.clock = runner, runner.clock
        self._changed = threading.Condition(runner.lock)
        self._values: list[PyTree | None] = [None] * num_points
        self._seconds = np.full(num_points, np.nan)
        self._form: Any = None  # the structure and the shapes of an answer, without the batch axis
        self._awaited = num_points  # the fewest answers that a caller waits for
        self._unsettled = 0
        self._start = self.clock.now()

    def __enter__(self) -> "Batch":
        return self

    def __exit__(self, *_) -> None:
        self.forget()

    def wait(self, enough: Enough | None = None, deadline: float = 60.0) -> BatchAnswers:
        """Wait until the answers are enough, no more can arrive, or the deadline has passed.

        May be called again, for more answers.

        Args:
            enough: A number of answers (default: all), or a function of the mask of the answers
                that have arrived, for example `Answers.below`.
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
            # Without the lock: the rule may take time, and answers arrive in the meantime.
            if rule(mask):
                with self._changed:
                    return self._answers()

    def forget(self) -> None:
        """Drop unsent tasks, and ignore answers that still arrive. Idempotent."""
        with self._changed:
            # Reference cycles are broken here, so that Python's garbage collector is not needed: it
            # stops all threads, for a tenth of a second in a busy server.
            self.open, self.on_change, self.tasks = False, None, {}
            self._runner.schedule.forget(self)

    def suffice(self) -> None:
        """Send nothing more; answers of in-flight tasks are still collected."""
        with self._changed:
            self.needed = 0

    def drop_answers(self, points: Bool[np.ndarray, " num_points"]) -> None:
        """Free the answers of some coded data points, which may be large; keep the others."""
        with self._changed:
            for point in np.flatnonzero(points).tolist():
                self._values[point] = None

    def answer(self, point: int) -> PyTree[np.ndarray] | None:
        """Return one coded data point's answer, or None if it has not arrived."""
        return self._values[point]

    def lost(self, point: int) -> bool:
        """Return whether a coded data point was sent and will have no answer.

        `failures` say why.
        """
        task = self.tasks.get(point)
        return task is not None and task.settled and not self.available[point]

    def age(self, point: int) -> tuple[float, bool]:
        """Return for how long the latest worker has had a coded data point, and if it is overdue.

        The time, in seconds, stops when the point is settled. It is 0 while no worker has the
        point: a worker's death says nothing about how long the point takes.
        """
        task, seconds = self.tasks.get(point), 0.0
        if task is not None and task.settled and task.attempts:
            seconds = task.settled_at - task.sent
        elif task is not None and task.running and not task.settled:
            seconds = self.clock.now() - task.sent
        return seconds, task is not None and seconds > task.limit

    def abandoned(self, point: int) -> bool:
        """Return whether a coded data point has failed and will not be sent again, as things stand.

        It has no attempts left, or the batch has or expects enough answers without it.
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

    # The members below are for the pool and its schedule, which hold the lock.

    @property
    def missing(self) -> int:
        """The number of answers needed beyond those that have arrived or are pending."""
        return self.needed - self.count - self.pending

    @property
    def over(self) -> bool:
        """True if every task was answered or given up."""
        return self._unsettled == 0

    def add(self, tasks: Sequence[Task]) -> None:
        """Add tasks to send; raise ValueError, and add none, if one of them cannot be sent."""
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
        """Add `change` to a task's `on_time`, set its `wanted` if given, and update `pending`."""
        before, task.on_time = task.pending, task.on_time + change
        task.wanted = task.wanted if wanted is None else wanted
        if not task.settled:
            self.pending += task.pending - before

    def hedge(self, task: Task) -> None:
        """Count a worker as overdue with a task, so that other workers may get copies."""
        self.count_pending(task, -1, min(self.times.overdue.copies, max(self.copies - 1, 1)))

    def settle(self, task: Task, value: PyTree | None, worker: int = -1) -> None:
        """Store a task's answer and its worker; a `value` of None means that there is no answer."""
        self.pending -= task.pending
        task.settled_at = self.clock.now()
        task.settled, task.value = True, _NOTHING  # free the input, since the batch may live long
        self._unsettled -= 1
        if value is not None:
            self._values[task.point], self.workers[task.point] = value, worker
            self._seconds[task.point] = task.settled_at - task.given
            self.available[task.point] = True
            self.count += 1
        if self.count >= self._awaited or self._unsettled == 0:
            self._changed.notify_all()

    def refusal(self, outcome: Any, size: int) -> str | None:
        """Return why a worker's outcome for `size` data points cannot be used; None if it can."""
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
        except Exception as error:  # for example, it is not an array
            return f"the answer cannot be read: {reason_of(error)}"
        if refused is None:
            self._form = form  # later answers must have the same
        return refused


def refuse_odd(answer: PyTree[np.ndarray]) -> str | None:
    """Return why an answer cannot be decoded (not floats, or not finite); None if it can."""
    for leaf in arrays_of(answer):
        if leaf.dtype.kind != "f":
            return f"the answer is {leaf.dtype}: codes work on floats"
        if not np.isfinite(leaf).all():
            return "the answer is not finite"
    return None


def check_deadline(seconds: float) -> float:
    """Return the seconds; raise ValueError if they are not positive, or NaN."""
    if not seconds > 0:
        raise ValueError(f"a deadline is a positive number of seconds, not {seconds}")
    return seconds
