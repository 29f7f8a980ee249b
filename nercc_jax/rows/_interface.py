"""The types at the interface of a run over rows: settings, progress and result."""

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

ATTEMPTS = 3  # calls of a row without an answer after which it is unknown


@dataclasses.dataclass(frozen=True)
class RowSettings:
    """The settings of a run over rows, which `run_rows` also takes by name.

    Either `tolerance` or `max_disagreement` is needed.

    Attributes:
        tolerance: The largest error bar of a predicted row, in units of the outputs (root mean
            square over a row's outputs). 0 computes all rows.
        max_disagreement: For outputs that are scores of labels, instead of `tolerance`: the share
            of predicted labels that may differ from the function's own.
        coverage: The share of errors that error bars cover.
        compute: "needed" does not compute rows whose predictions are accurate enough, except some
            at random, which test the error bars; "all" predicts only rows that are late.
        rows_per_call: Rows in one call, at most the number of rows (default: as many as take 0.05
            to 0.25 s).
        deadline: Seconds that a call may take before its rows are sent again.
        job_deadline: Seconds after which the run ends, with the values known then (default: none).
        grace: Seconds for which a run that has ended waits for in-flight calls. Their answers
            change no value; they test the error bars of late rows in the summary.
        max_calls: The most rows to compute, the least certain ones first (default: no limit).
        check_answers: The share of right answers that may look wrong. Answers that look wrong are
            compared with other workers' answers (default: no checks). It needs three workers.
        max_fenced: The largest share of workers that may be fenced for wrong answers.
        seed: The seed of the rows' order, which is random so that the first rows are typical.

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
        # Messages begin with the field's name, which the command line replaces by its option's.
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
                # None is valid if it is the default.
                fitting = getattr(type(self), name) is None if value is None else fits(value)
            except TypeError:  # it is not a number
                fitting = False
            if not fitting:
                raise ValueError(f"{name} must be {wanted}, not {value!r}")

    @property
    def accuracy(self) -> Accuracy:
        """The accuracy that a prediction needs, so that its row is not computed."""
        names = ("tolerance", "max_disagreement", "coverage")
        return Accuracy(**{name: getattr(self, name) for name in names})

    @property
    def hang_timeout(self) -> float:
        """The seconds after which a pool that `run_rows` opens replaces a worker that hangs.

        All attempts but the last are over by then, so the last finds new workers even if all hung.
        It is at least 10 s, since a worker may only straggle, and a new one takes time to start.
        """
        return max((ATTEMPTS - 1) * self.deadline, 10.0)


@dataclasses.dataclass(frozen=True)
class RowProgress:
    """The progress of a run over rows, in numbers of rows.

    Attributes:
        rows: All rows.
        computed: Rows with the function's own values.
        predicted: Rows whose present predictions are accurate enough not to compute them.
        unknown: Rows that have failed: after all attempts, or when the run ended.
        workers: Workers that have started.
        seconds: Seconds since the run began.
        rows_per_second: Rows computed per second.
        estimate: The latest estimate of the run's `statistic`, if it has one.
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
    """Return a run's settings and counts as a table, without those that are 0 or None."""
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
        values: The function's own values where computed, otherwise predicted values; NaN for rows
            with neither. None if no row has a value.
        status: "computed", "predicted", "unknown" or "waiting", for each row.
        deviation: The expected error of each value, before it is calibrated: 0 where computed,
            infinite without a value.
        score: Error bars or, with `max_disagreement`, error probabilities.
        reasons: Why rows are unknown, by row. An unknown row may have a prediction, whose error bar
            is larger than the tolerance.
        summary: The settings and counts of the run, by name.
        report: The pool's report.
        stopped: Why the run was stopped early; None if it was not.
        ids: The rows' ids, if they have any.
        evidence: The predictions and errors of rows on which the statistics are based.
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

        Computed rows add no error. The error of the others is estimated from rows drawn at random,
        and from rows that were late.

        Args:
            f: Maps values (rows, ...) to one number a row, such as one output or a norm (default:
                the function's only output).
            coverage: The probability with which the interval contains the mean.
            weights: The rows' weights, 0 or positive (default: equal weights).

        Raises:
            ValueError: If an argument does not fit, rows have several outputs and there is no `f`,
                or `f` returns a number that is not finite.

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
        """Return the share of all rows that satisfy a condition, with an interval; see `mean`.

        `condition` maps the numbers that `f` returns, (rows,), to booleans.
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
        """Return the columns of a table, for `pandas.DataFrame` or `pyarrow.table`.

        Returns:
            `id`, if rows have ids; `output_0`, `output_1` and so on; `deviation`; `bar`, or
            `error_probability` with `max_disagreement`; `exact`, True where computed; `status`; and
            `reason`, which is empty unless the row is unknown.
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
        """Return the summary, one line for each number."""
        return summary_text(self.summary)
