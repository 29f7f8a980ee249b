"""What people pass to a run over rows and get from it: function, settings, progress and result."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float, Shaped

from ..evaluation.tables import text_table
from ..pools import PoolReport
from ..risk import Accuracy, EnsembleEstimate
from ..risk.ensembles import RowEvidence, RowStatistic, Weights, average, quantile

Compute: TypeAlias = Literal["needed", "all"]

ATTEMPTS = 3  # how often a row is sent before it is unknown


@dataclasses.dataclass(frozen=True)
class RowSettings:
    """The settings of a run over rows, which `run_rows` takes by name, too.

    Either `tolerance` or `max_disagreement` is needed.

    Attributes:
        tolerance: The largest error bar of a predicted row, in units of the outputs (root mean
            square over a row's outputs). 0 computes all rows.
        max_disagreement: Instead, where outputs are scores of labels: the share of predicted labels
            that may differ from the function's own.
        coverage: The share of errors that error bars cover.
        compute: "needed" computes no row that is known well enough, except some at random, which
            judge the error bars; "all" predicts only rows that are late.
        rows_per_call: Rows in one call, at most those there are (default: as many as take 0.05 to
            0.25 s).
        deadline: Seconds that a call may take before its rows are sent again.
        job_deadline: Seconds after which the run ends, with what is known by then (default: none).
        grace: Seconds for which a run that has ended waits for answers that workers still owe. They
            change no value, and judge the error bars of late rows in the summary.
        max_calls: Rows to compute at most, the least certain ones (default: no limit).
        check_answers: The share of right answers that may look wrong. Answers that do are compared
            with other workers' (default: none are). It takes three workers.
        max_fenced: The largest share of workers that is fenced for wrong answers.
        seed: Of the order of the rows, which is random, so that the first ones are typical.

    Raises:
        ValueError: If a number does not fit.

    Example:
        >>> RowSettings(tolerance=0.02, job_deadline=600.0).coverage
        0.9
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
        # Messages begin with the name of the field, by which the command line names its option.
        if (self.tolerance is None) == (self.max_disagreement is None):
            raise ValueError(
                "tolerance is needed, in units of the outputs (0: all rows are computed), or "
                "max_disagreement, where the outputs are scores of labels, not both"
            )
        rules: dict[str, tuple[str, Callable[[Any], bool]]] = {
            "tolerance": ("0 or positive", lambda value: 0 <= value < np.inf),
            "max_disagreement": ("in [0, 1]", lambda value: 0 <= value <= 1),
            "coverage": ("between 0 and 1", lambda value: 0 < value < 1),
            "compute": ("'needed' or 'all'", lambda value: value in ("needed", "all")),
            "rows_per_call": ("positive", lambda value: value >= 1),
            "deadline": ("a positive number of seconds", lambda value: value > 0),
            "job_deadline": ("a positive number of seconds", lambda value: value > 0),
            "grace": ("a number of seconds from 0 on", lambda value: 0 <= value < np.inf),
            "max_calls": ("positive", lambda value: value >= 1),
            "check_answers": ("between 0 and 1", lambda value: 0 < value < 1),
            "max_fenced": ("in [0, 1)", lambda value: 0 <= value < 1),
        }
        for name, (wanted, fits) in rules.items():
            value = getattr(self, name)
            try:
                # None stands for the default where that is none.
                fitting = getattr(type(self), name) is None if value is None else fits(value)
            except TypeError:  # it is no number
                fitting = False
            if not fitting:
                raise ValueError(f"{name} must be {wanted}, not {value!r}")

    @property
    def accuracy(self) -> Accuracy:
        """The accuracy at which a row is known well enough."""
        names = ("tolerance", "max_disagreement", "coverage")
        return Accuracy(**{name: getattr(self, name) for name in names})

    @property
    def hang_timeout(self) -> float:
        """The seconds after which a pool of the run's own replaces a worker.

        All attempts but one are over by then: the last one finds new workers if all of them hung.
        It is 10 s at least, since a worker may just straggle, and a new one needs time to start.
        """
        return max((ATTEMPTS - 1) * self.deadline, 10.0)


@dataclasses.dataclass(frozen=True)
class RowProgress:
    """The state of a run over rows, in numbers of rows.

    Attributes:
        rows: All rows.
        computed: Rows with the function's own values.
        predicted: Rows that are not to be computed, as things are.
        unknown: Rows that are given up, after all attempts.
        workers: Workers alive.
        seconds: Since the run began.
        rows_per_second: Computed rows.
        estimate: The latest estimate of the `statistic` that the run was asked for.
    """

    rows: int
    computed: int
    predicted: int
    unknown: int
    workers: int
    seconds: float
    rows_per_second: float
    estimate: EnsembleEstimate | None = None

    def __str__(self) -> str:
        unknown = f", unknown {self.unknown:,}" if self.unknown else ""
        return (
            f"computed {self.computed:,}, predicted {self.predicted:,}, waiting "
            f"{self.waiting:,}{unknown}; {self.rows_per_second:,.1f} rows/s, "
            f"{self.workers:,} workers"
        )

    @property
    def done(self) -> int:
        """The rows that are computed or predicted."""
        return self.computed + self.predicted

    @property
    def waiting(self) -> int:
        """The rows that are neither done nor unknown."""
        return self.rows - self.done - self.unknown


def summary_text(summary: Mapping[str, Any]) -> str:
    """Return a run's settings and counts as a table, without those that are 0 or none."""
    lines = []
    for name, value in summary.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        words = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if number else ""
        if isinstance(value, dict):
            words = "; ".join(f"worker {worker}: {why}" for worker, why in value.items())
        if value and words:
            lines.append((name.replace("_", " "), words))
    return text_table(lines, left=2)


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
        ids: The rows' ids, if they have any.
        evidence: Predictions and errors of rows, which the statistics rest on.
    """

    values: Float[np.ndarray, "rows ..."] | None
    status: Shaped[np.ndarray, " rows"]
    deviation: Float[np.ndarray, " rows"]
    score: Float[np.ndarray, " rows"]
    reasons: dict[int, str]
    summary: dict[str, Any]
    report: PoolReport
    stopped: str | None
    ids: Shaped[np.ndarray, " rows"] | None = None
    evidence: RowEvidence | None = None

    def mean(
        self, f: RowStatistic | None = None, *, coverage: float = 0.9, weights: Weights = None
    ) -> EnsembleEstimate:
        """Return the mean over all rows, computed or not, with an interval (`docs/ensembles.md`).

        Computed rows add no error. What others add is judged by rows drawn at random and by rows
        that came late.

        Args:
            f: Maps values (rows, ...) to a number a row, such as one output or a norm (default: the
                function's only output).
            coverage: The probability with which the interval holds.
            weights: Of the rows, from 0 on (default: all the same).

        Raises:
            ValueError: If an argument does not fit, rows have several outputs and there is no `f`,
                or it gives a number that is not finite.

        Example:
            >>> from nercc_jax import DevicePool
            >>> from nercc_jax.rows import run_rows
            >>> x = np.linspace(0, 1, 200)[:, None]
            >>> result = run_rows(np.square, x, DevicePool, num_workers=2, tolerance=0.01)
            >>> round(result.mean().value, 2)
            0.33
        """
        return average(self._mapped(f), np.asarray, weights, coverage)

    def probability(
        self,
        condition: RowStatistic,
        f: RowStatistic | None = None,
        *,
        coverage: float = 0.9,
        weights: Weights = None,
    ) -> EnsembleEstimate:
        """Return the share of all rows that meet a condition, with an interval; see `mean`.

        `condition` maps what `f` gives, (rows,), to booleans.
        """
        return average(self._mapped(f), condition, weights, coverage, step=True)

    def quantile(
        self,
        q: float,
        f: RowStatistic | None = None,
        *,
        coverage: float = 0.9,
        weights: Weights = None,
    ) -> EnsembleEstimate:
        """Return the least value that a share `q` of all rows does not exceed; see `mean`."""
        return quantile(self._mapped(f), q, weights, coverage)

    def _mapped(self, f: RowStatistic | None) -> RowEvidence:
        if self.evidence is None:
            raise ValueError("no row has a value yet, by which all others could be estimated")
        return self.evidence.map(f)

    def columns(self) -> dict[str, Shaped[np.ndarray, " rows"]]:
        """Return a table's columns, as `pandas.DataFrame` and `pyarrow.table` take them.

        Returns:
            `id`, if rows have ids; `output_0`, `output_1` and so on; `deviation`; `bar`, or
            `error_probability` with `max_disagreement`; `exact`, `status`, and `reason`, which is
            empty for known rows.
        """
        number, labels = len(self.status), self.summary.get("max_disagreement") is not None
        score = "error_probability" if labels else "bar"
        values = np.zeros((number, 0)) if self.values is None else self.values
        outputs = enumerate(values.reshape(number, -1).T)
        return {
            **({} if self.ids is None else {"id": self.ids}),
            **{f"output_{place}": each for place, each in outputs},
            "deviation": self.deviation,
            score: self.score,
            "exact": self.status == "computed",
            "status": self.status,
            "reason": np.array([self.reasons.get(row, "") for row in range(number)], str),
        }

    def __str__(self) -> str:
        """Return what the run did, a line for each number."""
        return summary_text(self.summary)
