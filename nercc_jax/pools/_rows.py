"""A run over rows: the function as workers call it, its calls, settings, progress and result."""

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from ..codes._trees import is_float
from ..evaluation._criteria import row_errors
from ..risk import Accuracy
from ..schemes._calibrate import FittedScheme
from ._backend import PoolReport
from ._batch import Batch, check_deadline
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


def checked_ids(ids: Any, rows: int) -> Shaped[np.ndarray, " rows"] | None:
    """Return the rows' ids as an array of texts or of whole numbers; None where there are none."""
    if ids is None:
        return None
    found = np.asarray(ids)
    if found.shape != (rows,) or found.dtype.kind not in "iuU":
        raise ValueError(
            f"ids are a text or a whole number for each of {rows} rows, not {found.dtype} of shape "
            f"{found.shape}"
        )
    return found


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


RowStatus: TypeAlias = Literal["computed", "predicted", "unknown", "waiting"]
Compute: TypeAlias = Literal["needed", "all"]

ATTEMPTS = 3  # how often a row is sent before it is unknown
_LAST_SECONDS = 10.0  # a run stops itself so long before something else ends its process
_HANG = 10.0  # seconds before which no worker is taken to hang


@dataclasses.dataclass(frozen=True)
class RowProgress:
    """The state of a run over rows: see `run_rows`."""

    rows: int
    computed: int
    predicted: int
    unknown: int
    late: int
    workers: int
    seconds: float
    rows_per_second: float

    @property
    def done(self) -> int:
        return self.computed + self.predicted

    @property
    def waiting(self) -> int:
        return self.rows - self.done - self.unknown


@dataclasses.dataclass(frozen=True)
class RowResult:
    """The result of a run over rows, in the order of the inputs.

    Attributes:
        values: The function's own values where computed, otherwise predicted ones; NaN where there
            is none. None if no row has a value.
        status: "computed", "predicted", "unknown" or "waiting", for each row.
        deviation: How far values may be off: 0 where computed, infinite where unknown.
        score: Error bars or, with `max_disagreement`, error probabilities.
        reasons: Why rows are unknown, by row. One that is unknown because of the job's deadline may
            have a prediction, whose error bar is larger than the tolerance.
        summary: The settings and counts of the run, by name.
        report: Of the pool.
        stopped: Why the run ended early, if it did.
        fitted: The fitted scheme that rows were predicted by, if one was learned.
        ids: The rows' ids, if they have any.
    """

    values: Float[np.ndarray, "rows ..."] | None
    status: Shaped[np.ndarray, " rows"]
    deviation: Float[np.ndarray, " rows"]
    score: Float[np.ndarray, " rows"]
    reasons: dict[int, str]
    summary: dict[str, Any]
    report: PoolReport
    stopped: str | None
    fitted: FittedScheme | None
    ids: Shaped[np.ndarray, " rows"] | None = None

    def columns(self) -> dict[str, Shaped[np.ndarray, " rows"]]:
        """Return a table's columns, as `pandas.DataFrame` and `pyarrow.table` take them.

        Returns:
            `id`, if rows have ids; `output_0`, `output_1` and so on; `deviation`; `bar`, or
            `error_probability` with `max_disagreement`; `exact`, `status`, and `reason`, which is
            empty for known rows.
        """
        number = len(self.status)
        values = np.zeros((number, 0)) if self.values is None else self.values
        outputs = values.reshape(number, -1).T
        reason = np.array([self.reasons.get(row, "") for row in range(number)], str)
        ids = {} if self.ids is None else {"id": self.ids}
        return (
            ids
            | {f"output_{place}": each for place, each in enumerate(outputs)}
            | {
                "deviation": self.deviation,
                self.score_name: self.score,
                "exact": self.status == "computed",
                "status": self.status,
                "reason": reason,
            }
        )

    @property
    def score_name(self) -> str:
        """The name of the scores: `bar` or `error_probability`."""
        labels = self.summary.get("max_disagreement") is not None
        return "error_probability" if labels else "bar"


@dataclasses.dataclass(frozen=True)
class RowSettings:
    """The numbers of a run over rows, by the names of `run_rows`.

    Messages begin with the name of the argument, by which the command line names its option.
    """

    tolerance: float | None = None
    max_disagreement: float | None = None
    coverage: float = 0.9
    compute: Compute = "needed"
    rows_per_call: int | None = None
    deadline: float = 30.0
    job_deadline: float | None = None
    grace: float = 0.0
    max_calls: int | None = None
    check_answers: float | None = None
    max_fenced: float = 0.25
    seed: int = 0

    def __post_init__(self):
        if (self.tolerance is None) == (self.max_disagreement is None):
            raise ValueError(
                "tolerance is needed, in units of the outputs (0: all rows are computed), or "
                "max_disagreement, where the outputs are scores of labels, not both"
            )
        if self.tolerance is not None and not 0 <= self.tolerance < np.inf:
            raise ValueError(f"tolerance must be 0 or positive, not {self.tolerance}")
        if self.max_disagreement is not None and not 0 <= self.max_disagreement <= 1:
            raise ValueError(f"max_disagreement must be in [0, 1], not {self.max_disagreement}")
        if not 0 < self.coverage < 1:
            raise ValueError(f"coverage is a share between 0 and 1, not {self.coverage}")
        if self.compute not in ("needed", "all"):
            raise ValueError(f"compute is 'needed' or 'all', not {self.compute!r}")
        for name in ("rows_per_call", "max_calls"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, not {value}")
        if self.check_answers is not None and not 0 < self.check_answers < 1:
            raise ValueError(f"check_answers must be between 0 and 1, not {self.check_answers}")
        if not 0 <= self.max_fenced < 1:
            raise ValueError(f"max_fenced must be in [0, 1), not {self.max_fenced}")
        check_deadline(self.deadline)
        if self.job_deadline is not None and not self.job_deadline > 0:
            raise ValueError(
                f"job_deadline is a positive number of seconds, not {self.job_deadline}"
            )
        if not 0 <= self.grace < np.inf:
            raise ValueError(f"grace is a number of seconds from 0 on, not {self.grace}")

    @property
    def target(self) -> Accuracy:
        return Accuracy(
            max_disagreement=self.max_disagreement,
            tolerance=self.tolerance,
            coverage=self.coverage,
        )

    def kept(self) -> dict[str, Any]:
        """Return the settings that a run's values depend on."""
        names = ("tolerance", "max_disagreement", "coverage", "seed")
        return {name: getattr(self, name) for name in names}


def hang_timeout(deadline: float) -> float:
    """Return the seconds after which a worker is replaced, for calls with a deadline.

    All attempts but one are over by then: the last one finds new workers if all of them hung. It is
    10 s at least, since a worker may just straggle, and a new one needs time to start.
    """
    return max((ATTEMPTS - 1) * deadline, _HANG)


def reason_to_stop(pool: AbstractPool) -> str | None:
    """Return why a run must end now: something else is about to end its process."""
    if pool.ends_at - time.monotonic() >= _LAST_SECONDS:
        return None
    return "stopped before Ray ends this process, whose head is gone"


def late_answers(
    calls: Collection[RowCall], seconds: float
) -> dict[int, Float[np.ndarray, " outputs"]]:
    """Wait some seconds for the calls that workers have; return the values that came, by row.

    Calls that no worker has are dropped.
    """
    end = time.monotonic() + seconds
    for call in calls:
        if not (call.running or call.over):
            call.batch.forget()
    found: dict[int, Float[np.ndarray, " outputs"]] = {}
    for call in calls:
        if call.batch.open:
            call.batch.wait(deadline=max(end - time.monotonic(), 1e-3))
        if (values := call.values()) is not None:
            found |= zip(call.rows.tolist(), values.reshape(len(values), -1), strict=True)
    return found


def bars_that_held(
    result: RowResult, answers: Mapping[int, Float[np.ndarray, " outputs"]], labels: bool
) -> tuple[int, int]:
    """Return how many of the error bars of rows that came late held, and how many there are.

    The answers are the function's own values, by row. Where outputs are scores of labels,
    predictions are judged by their label.
    """
    barred = result.status == "predicted" if labels else np.isfinite(result.score)
    barred &= result.status != "computed"
    rows = [row for row, y in answers.items() if barred[row] and np.isfinite(y).all()]
    if not rows or result.values is None:
        return 0, 0
    y = np.stack([answers[row] for row in rows])
    mean = result.values[rows].reshape(len(rows), -1)
    if labels:
        held = np.argmax(mean, axis=1) == np.argmax(y, axis=1)
    else:
        error = row_errors(jnp.asarray(mean, jnp.float32), jnp.asarray(y, jnp.float32))
        held = np.asarray(error) <= result.score[rows]
    return int(held.sum()), len(rows)
