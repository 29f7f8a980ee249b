"""The settings of a run over rows, its progress, and its result."""

import dataclasses
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float, Shaped

from ..risk._target import AccuracyTarget
from ..schemes._fit_scheme import FittedScheme
from ._backend import PoolReport
from ._batch import check_deadline

RowStatus: TypeAlias = Literal["computed", "predicted", "unknown", "waiting"]
Compute: TypeAlias = Literal["needed", "all"]

ATTEMPTS = 3  # how often a row is sent before it is unknown
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

    def columns(self) -> dict[str, Shaped[np.ndarray, " rows"]]:
        """Return a table's columns, as `pandas.DataFrame` and `pyarrow.table` take them.

        Returns:
            `output_0`, `output_1` and so on; `deviation`; `bar`, or `error_probability` with
            `max_disagreement`; `exact`, `status`, and `reason`, which is empty for known rows.
        """
        number = len(self.status)
        values = np.zeros((number, 0)) if self.values is None else self.values
        outputs = values.reshape(number, -1).T
        reason = np.array([self.reasons.get(row, "") for row in range(number)], str)
        return {f"output_{place}": each for place, each in enumerate(outputs)} | {
            "deviation": self.deviation,
            self.score_name: self.score,
            "exact": self.status == "computed",
            "status": self.status,
            "reason": reason,
        }

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
    def target(self) -> AccuracyTarget:
        return AccuracyTarget(self.tolerance, self.max_disagreement, self.coverage)

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
