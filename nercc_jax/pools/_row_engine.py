"""The engine for rows: runs a function on each row, computing it or knowing it well enough.

A first part of the rows is computed. A learner, on a thread of its own, is fitted to those, and
again each time twice as many are there. Once it knows enough of the function, the other rows go in
groups, uncertain ones copied, and rows that are late are decoded, or computed after all.
"""

import collections
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float, Int, Shaped

from ..codes import NeRCC
from ..schemes import fit_scheme
from ..schemes._fit_scheme import FittedScheme
from ._backend import PoolReport
from ._batch import answers_to_wait_for, check_deadline
from ._pool import AbstractPool
from ._row_files import (
    Parts,
    RowTable,
    check_parts,
    fingerprint_of_array,
    load_fitted,
    save_fitted,
)
from ._rows import AbstractRowCalls, PlainCalls, RowCoder, RowFunction
from ._steps import AccuracyTarget

_LOG = logging.getLogger(__name__)

RowStatus: TypeAlias = Literal["computed", "decoded", "lost", "waiting"]

ATTEMPTS = 3  # how often a row is sent before it is lost
LEARNER_THREAD = "nercc-learner"  # for which the end of a process waits
_LAST_SECONDS = 10.0  # a run stops itself so long before something else ends its process

_HANG = 10.0  # seconds before which no worker is taken to hang
_ROUND = 2.0  # seconds of a round in which all rows are computed
_CALL = 0.25  # seconds of a call, where rows are so quick that several go together
_LEARNING = 0.1  # share of the remaining time that workers may wait for the learner
_CAPACITY = 1024  # rows that the learner holds at most
_USEFUL = 0.5  # share of rows that the learner must know before late rows are decoded
_LEARNER = "learner"  # the name of its file in the manifest


@dataclasses.dataclass(frozen=True)
class RowProgress:
    """The state of a run over rows.

    Attributes:
        rows: Rows in all.
        computed: Rows that were computed.
        decoded: Rows that were decoded.
        lost: Rows without a value after all attempts.
        seconds: Since the run began.
        rows_per_second: Rows done by this run in a second.
    """

    rows: int
    computed: int
    decoded: int
    lost: int
    seconds: float
    rows_per_second: float

    @property
    def done(self) -> int:
        """The rows that have a value."""
        return self.computed + self.decoded

    @property
    def waiting(self) -> int:
        """The rows that have no value yet."""
        return self.rows - self.done - self.lost


@dataclasses.dataclass(frozen=True)
class RowResult:
    """The result of a run over rows, in the order of the inputs.

    Attributes:
        values: The function's own values where computed, otherwise decoded ones; NaN where there is
            none. None if no row has a value.
        status: "computed", "decoded", "lost" or "waiting", for each row.
        deviation: How far values may be off: 0 where computed, infinite where unknown.
        score: Error bars or, with `max_disagreement`, error probabilities.
        reasons: Why rows are lost, by row.
        summary: The settings and counts of the run, by name.
        report: Of the pool.
        stopped: Why the run ended early, if it did.
        fitted: The fitted scheme that late rows were decoded by, if one was learned.
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


@dataclasses.dataclass(frozen=True)
class RowSettings:
    """The numbers of a run over rows, by the names of `run_rows`.

    Messages begin with the name of the argument, by which the command line names its option.
    """

    tolerance: float | None
    max_disagreement: float | None
    coverage: float
    num_data: int
    num_workers: int
    wait_for: int
    rows_per_call: int | None
    deadline: float
    seed: int

    @classmethod
    def of(
        cls, num_workers: int, num_data: int | None, wait_for: int | None, **others: Any
    ) -> "RowSettings":
        """Return settings with the defaults of K and of the answers to wait for."""
        if num_data is None:
            num_data = max(1, num_workers * 9 // 10)
        if wait_for is None:
            wait_for = answers_to_wait_for(num_data, num_workers)
        return cls(num_data=num_data, num_workers=num_workers, wait_for=wait_for, **others)

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
        if not 1 <= self.num_data <= self.num_workers:
            raise ValueError(
                f"num_data must be from 1 to N = {self.num_workers}, not {self.num_data}: each row "
                "goes to a worker, and the others get copies"
            )
        if not 1 <= self.wait_for <= self.num_workers:
            raise ValueError(
                f"wait_for must be from 1 to N = {self.num_workers}, not {self.wait_for}"
            )
        if self.rows_per_call is not None and self.rows_per_call < 1:
            raise ValueError(f"rows_per_call must be positive, not {self.rows_per_call}")
        check_deadline(self.deadline)

    @property
    def code(self) -> NeRCC:
        """The code: K rows and N - K copies."""
        return NeRCC(self.num_data, self.num_workers)

    @property
    def target(self) -> AccuracyTarget:
        """The accuracy at which a row is known well enough."""
        return AccuracyTarget(self.tolerance, self.max_disagreement, self.coverage)

    def kept(self) -> dict[str, Any]:
        """Return the settings that a run's values depend on."""
        names = ("tolerance", "max_disagreement", "coverage", "num_data", "num_workers", "seed")
        return {name: getattr(self, name) for name in names}


def hang_timeout(deadline: float) -> float:
    """Return the seconds after which a worker is replaced, for calls with a deadline.

    All attempts but one are over by then: the last one finds new workers if all of them hung. It is
    10 s at least, since a worker may just straggle, and a new one needs time to start.
    """
    return max((ATTEMPTS - 1) * deadline, _HANG)


def run_rows(
    function: Callable[[Any], Any],
    rows: Shaped[np.ndarray, "rows ..."],
    pool: AbstractPool | Callable[..., AbstractPool],
    *,
    tolerance: float | None = None,
    max_disagreement: float | None = None,
    coverage: float = 0.9,
    num_workers: int | None = None,
    num_data: int | None = None,
    wait_for: int | None = None,
    rows_per_call: int | None = None,
    deadline: float = 30.0,
    seed: int = 0,
    folder: Path | str | None = None,
    resume: bool = False,
    about: Mapping[str, Any] | None = None,
    on_progress: Callable[[RowProgress], Any] | None = None,
) -> RowResult:
    """Run a function on each row: every row is computed, or decoded within a tolerance.

    A computed row has exactly the value that the function gave. A decoded row has a prediction from
    the rows that were computed, and its error bar is no larger than the tolerance. A row that is
    too uncertain is computed. `docs/run.md` describes how.

    Args:
        function: Any callable on (rows, ...) that returns an array (rows, ...).
        rows: Inputs, one a row: finite numbers.
        pool: An open pool whose workers run `RowFunction(function)`, not compiled; or a class such
            as `DevicePool` or `RayPool`, which is opened for the run.
        tolerance: The largest error bar of a decoded row, in units of the outputs (root mean square
            over a row's outputs). 0 computes all rows.
        max_disagreement: Instead, where outputs are scores of labels: the share of labels that may
            differ.
        coverage: The share of errors that error bars cover.
        num_workers: N (default: the open pool's workers, or 20).
        num_data: K, rows in a group; the others of N workers get copies (default: nine tenths
            of N).
        wait_for: Answers at which the other rows are decoded (default: 85 % of N, at least K).
        rows_per_call: Rows in one call (default: as many as take a quarter of a second).
        deadline: Seconds that a call may take.
        seed: Of the order of the rows, which is random, so that the first ones are typical.
        folder: Where results are written as they come (default: nowhere).
        resume: Go on with the run that the folder holds.
        about: What else the values depend on, such as a version of the function, as JSON takes it;
            a run with other values cannot be resumed.
        on_progress: Called at the beginning, and after each round of rows.

    Returns:
        Values and a status for each row. After Ctrl-C, or where the pool is about to end, the rest
        is "waiting", and `stopped` says why.

    Raises:
        ValueError: If an argument does not fit, or the folder holds another run.
        RuntimeError: If the pool does not start, or the function raises on all of the first rows.

    Example:
        >>> import numpy as np
        >>> from nercc_jax.pools import DevicePool, run_rows
        >>> def swing(x):  # any function of NumPy arrays
        ...     return np.sin(3 * x).cumsum(axis=1)
        >>> x = np.random.default_rng(0).uniform(-1, 1, (200, 2))
        >>> result = run_rows(swing, x, DevicePool, num_workers=4, tolerance=0.0)
        >>> result.values.shape, set(result.status.tolist())
        ((200, 2), {'computed'})
    """
    opened = isinstance(pool, AbstractPool)
    settings = RowSettings.of(
        num_workers or (pool.num_workers if opened else 20),
        num_data,
        wait_for,
        tolerance=tolerance,
        max_disagreement=max_disagreement,
        coverage=coverage,
        rows_per_call=rows_per_call,
        deadline=deadline,
        seed=seed,
    )
    x = _checked(rows)
    kept = {"inputs": fingerprint_of_array(x), "rows": len(x)} | settings.kept() | dict(about or {})
    table, parts = RowTable(len(x)), None
    if folder is not None:
        check_parts(Path(folder), resume)
        parts = Parts(Path(folder), kept, table)
    if opened:
        return _RowRun(pool, x, settings, table, parts).carry_out(kept, on_progress)
    options: dict[str, Any] = {"compiled": False, "hang_timeout": hang_timeout(deadline)}
    with pool(RowFunction(function), settings.num_workers, **options) as made:
        return _RowRun(made, x, settings, table, parts).carry_out(kept, on_progress)


def _checked(rows: Any) -> Shaped[np.ndarray, "rows ..."]:
    """Return rows as an array of finite numbers, which the learner needs."""
    x = np.asarray(rows)
    if x.ndim < 1 or x.dtype.kind not in "biuf" or not np.isfinite(x).all():
        raise ValueError(f"rows are finite numbers (rows, ...), not {x.dtype} of shape {x.shape}")
    return x


@dataclasses.dataclass(frozen=True)
class _Round:
    """Rows that are with the workers.

    Attributes:
        calls: The calls that have them.
        rows: Their numbers.
        size: Rows in a call.
        limit: The largest score that will do; None where all are computed.
        seconds: To wait for them, at most.
        begin: When they were sent.
    """

    calls: AbstractRowCalls
    rows: Int[np.ndarray, " rows"]
    size: int
    limit: float | None
    seconds: float
    begin: float = dataclasses.field(default_factory=time.monotonic)


class _RowRun:
    """One run over rows: which go next, which are done, and which are lost."""

    def __init__(
        self,
        pool: AbstractPool,
        x: Shaped[np.ndarray, "rows ..."],
        settings: RowSettings,
        table: RowTable,
        parts: Parts | None,
    ):
        self._pool, self._x, self._settings = pool, x, settings
        self._table, self._parts = table, parts
        self._code, self._target = settings.code, settings.target
        self._features = _features_of(x)
        order = np.random.default_rng(settings.seed).permutation(len(x))
        self._fresh = order[~table.done[order]].tolist()
        self._again: list[int] = []  # without an answer, or too uncertain
        self._alone: list[int] = []  # of calls that raised
        self._unanswered = np.zeros(len(x), int)  # rounds in which no worker computed a row in time
        self._lost: dict[int, str] = {}
        self._size, self._speed = settings.rows_per_call, 0.0
        # Rows that are computed before anything is learned: a tenth, within limits.
        self._first = min(max(len(x) // 10, 100), 256)
        self._learner = _Learner(settings, self._first)
        self._coder: RowCoder | None = None
        self._limit = 0.0
        self._begin, self._earlier = time.monotonic(), int(table.done.sum())
        if parts is not None and (path := parts.kept(_LEARNER)) is not None:
            self._learner.resume(fitted := load_fitted(path, self._code))
            self._adopt(fitted)

    def carry_out(
        self, kept: dict[str, Any], on_progress: Callable[[RowProgress], Any] | None
    ) -> RowResult:
        """Run until no row waits, or something ends the run, and return the result."""
        stopped, show = None, on_progress or (lambda progress: None)
        try:
            show(self._progress())
            for _ in self._rounds():
                show(self._progress())
                if (stopped := reason_to_stop(self._pool)) is not None:
                    break
        except KeyboardInterrupt:
            stopped = "interrupted"
        except RuntimeError:
            if self._parts is not None and not self._table.done.any():
                self._parts.remove()
                self._parts = None
            raise
        finally:
            if self._parts is not None:
                self._parts.flush(complete=bool(self._table.done.all()))
        return self._result(kept, stopped)

    def _rounds(self) -> Iterator[None]:
        """Yield after each round whose rows are in the table, until no row waits.

        While a round's answers are decoded, the next one is with the workers.

        Raises:
            RuntimeError: If the function raises on all of the first rows.
            ValueError: If it gives what the target does not fit.
        """
        flying: _Round | None = None
        while True:
            alone = flying is not None and self._table.predictions is None
            coming = None if alone else self._next()
            if flying is not None:
                self._settle(flying)
                yield
            elif coming is None:
                return
            if (flying := coming) is not None:
                flying.calls.wait(flying.seconds)

    def _next(self) -> _Round | None:
        """Send the next rows; None where none waits."""
        self._learn()
        size, workers = self._size or 1, self._pool.num_workers
        if self._alone:
            return self._compute(_cut(self._alone, 4 * workers), 1)
        if len(self._again) >= workers * size or not self._fresh:
            return self._compute(_cut(self._again, len(self._again)), size)
        if self._coder is not None and self._size is not None:
            return self._decode(self._coder, size)
        number = max(int(self._speed * _ROUND), workers * size)
        if self._table.predictions is None:
            number = self._first
        return self._compute(_cut(self._fresh, number), size)

    def _compute(self, rows: np.ndarray, size: int) -> _Round | None:
        if not len(rows):
            return None
        calls = math.ceil(len(rows) / size)
        seconds = self._settings.deadline * math.ceil(calls / self._pool.num_workers)
        return _Round(PlainCalls(self._pool, self._x[rows], size), rows, size, None, seconds)

    def _decode(self, coder: RowCoder, size: int) -> _Round:
        groups = size, self._settings.num_data
        rows = _cut(self._fresh, math.prod(groups))
        # The last groups are filled with their own rows once more: further copies.
        rows = np.resize(rows, math.prod(groups))
        x, features = (each[rows] for each in (self._x, self._features))
        grouped = (each.reshape(*groups, *each.shape[1:]) for each in (x, features))
        return _Round(coder.start(*grouped), rows, size, self._limit, self._settings.deadline)

    def _settle(self, flying: _Round) -> None:
        """Take a round's rows into the table, and sort out those that are not good enough."""
        found, rows = flying.calls.take(), flying.rows
        computed = flying.limit is None
        done = self._table.add(rows, found, flying.limit or 0.0)
        if self._parts is not None:
            self._parts.add(done.tolist())
        left = np.setdiff1d(rows, done)
        raised = {int(rows[place]): why for place, why in found.raised.items()}
        if computed and not len(done) and self._table.predictions is None and raised:
            why = next(iter(raised.values()))
            raise RuntimeError(f"the function raises on all of the first {len(rows)} rows: {why}")
        if computed:
            seconds = time.monotonic() - flying.begin
            self._speed = max(len(done) / seconds, self._speed / 2)
            if self._size is None and len(done):
                self._size = self._rows_of_call(seconds, len(done))
        for row in left.tolist():
            if row in raised and flying.size > 1:
                self._alone.append(row)
            elif row in raised:
                self._lost[row] = raised[row]
            else:
                self._unanswered[row] += computed
                if self._unanswered[row] < ATTEMPTS:
                    self._again.append(row)
                else:
                    self._lost[row] = f"no answer within {self._settings.deadline:g} s"

    def _rows_of_call(self, seconds: float, rows: int) -> int:
        """Return how many rows make a call long enough, but leave enough calls."""
        each = seconds * self._pool.num_workers / rows
        most = len(self._fresh) // (8 * self._settings.num_data)
        return max(1, min(round(_CALL / max(each, 1e-9)), most))

    def _learn(self) -> None:
        """Have the learner fitted to what there is, and take what it has learned."""
        if self._table.predictions is None or self._settings.tolerance == 0:
            return
        if self._settings.max_disagreement is not None and self._table.vectors.shape[1] < 2:
            raise ValueError(
                "max_disagreement is for labels, the largest of several outputs; this function "
                "gives one number: give a tolerance"
            )
        known = self._table.learnable
        if len(self._fresh) > self._first // 2:
            waiting = self._progress().waiting
            seconds = _LEARNING * waiting / self._speed if self._speed > 0 else 0.0
            self._learner.teach(len(known), lambda number: self._pairs(known, number), seconds)
        if (fitted := self._learner.look()) is not None:
            if self._parts is not None:
                name = f"learner-{fitted.pairs:06d}.safetensors"
                self._parts.keep(_LEARNER, name, lambda path: save_fitted(path, fitted))
            self._adopt(fitted)

    def _adopt(self, fitted: FittedScheme) -> None:
        self._limit, self._coder = self._learner.limit(fitted), None
        if self._learner.useful(fitted):
            self._coder = RowCoder(self._pool, fitted.scheme, self._target, self._settings.wait_for)

    def _pairs(self, known: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return some of these rows, at random, with their values."""
        rows = np.random.default_rng(len(known)).permutation(known)[:number]
        return self._features[rows], self._table.vectors[rows]

    def _progress(self) -> RowProgress:
        exact, done = int(self._table.exact.sum()), int(self._table.done.sum())
        seconds = time.monotonic() - self._begin
        speed = (done - self._earlier) / max(seconds, 1e-9)
        return RowProgress(len(self._table), exact, done - exact, len(self._lost), seconds, speed)

    def _result(self, kept: dict[str, Any], stopped: str | None) -> RowResult:
        table, report, fitted = self._table, self._pool.report(), self._learner.fitted
        status = np.select([table.exact, table.done], ["computed", "decoded"], "waiting")
        status[list(self._lost)] = "lost"
        return RowResult(
            table.predictions,
            status,
            table.deviation,
            table.score,
            dict(sorted(self._lost.items())),
            kept | self._counts(report),
            report,
            stopped,
            fitted,
        )

    def _counts(self, report: PoolReport) -> dict[str, Any]:
        table, progress, fitted = self._table, self._progress(), self._learner.fitted
        finite = 0
        if table.predictions is not None:
            finite = len(table.learnable)
        decoded, bars = table.done & ~table.exact, self._settings.tolerance is not None
        return {
            "rows_done": progress.done,
            "seconds": progress.seconds,
            "rows_per_second": progress.rows_per_second,
            "computed": progress.computed,
            "not_finite": progress.computed - finite,
            "decoded": progress.decoded,
            "largest_bar": float(table.score[decoded].max()) if bars and decoded.any() else None,
            "learned_from": None if fitted is None else fitted.pairs,
            "known_share": 0.0 if fitted is None else self._learner.known(fitted),
            **pool_counts(report),
            "lost": progress.lost,
        }


def reason_to_stop(pool: AbstractPool) -> str | None:
    """Return why a run must end now: something else is about to end its process."""
    if pool.ends_at - time.monotonic() >= _LAST_SECONDS:
        return None
    return "stopped before Ray ends this process, whose head is gone"


def pool_counts(report: PoolReport) -> dict[str, Any]:
    """Return what a pool has met, by the names of a summary file."""
    return {
        "late_answers": report.late,
        "errors": report.errors,
        "deaths": report.deaths,
        "deaths_by_worker": [int(deaths) for deaths in report.deaths_by_worker],
        "hung": report.hung,
    }


def _features_of(x: Shaped[np.ndarray, "rows ..."]) -> Float[np.ndarray, "rows inputs"]:
    """Return the learner's inputs, in units of their spread, at which float32 is precise enough."""
    x = x.reshape(len(x), -1).astype(np.float64)
    spread = x.std(axis=0)
    return ((x - x.mean(axis=0)) / np.where(spread > 0, spread, 1)).astype(np.float32)


def _cut(rows: list[int], number: int) -> Int[np.ndarray, " few"]:
    """Take the first rows off a list."""
    taken = np.asarray(rows[:number], int)
    del rows[:number]
    return taken


class _Learner:
    """The fitting of a scheme to computed rows, on a thread of its own: workers need not wait.

    It is fitted to `first` rows, and then each time to twice as many.
    """

    def __init__(self, settings: RowSettings, first: int):
        self._settings, self._code, self._due = settings, settings.code, first
        self._thread: threading.Thread | None = None
        self._news: collections.deque[FittedScheme] = collections.deque()
        self.fitted: FittedScheme | None = None

    def teach(
        self,
        number: int,
        pairs: Callable[[int], tuple[np.ndarray, np.ndarray]],
        seconds: float,
    ) -> None:
        """Begin a fit, if enough rows are there.

        Args:
            number: Rows that are there.
            pairs: Returns that many inputs and values.
            seconds: To wait for the fit: threads that compute keep the interpreter busy.
        """
        if self._thread is not None and self._thread.is_alive():
            return
        if number < self._due or (self.fitted is not None and self._full(self.fitted)):
            return
        self._due = 2 * number
        x, y = pairs(min(number, _CAPACITY))
        # No daemon: JAX aborts a process that ends while it compiles.
        self._thread = threading.Thread(target=self._fit, args=(x, y), name=LEARNER_THREAD)
        self._thread.start()
        self._thread.join(seconds)

    def look(self) -> FittedScheme | None:
        """Return a new fitted scheme, if there is one since the last look."""
        if not self._news:
            return None
        self.fitted = self._news.pop()
        return self.fitted

    def resume(self, fitted: FittedScheme) -> None:
        """Go on with what an earlier run learned."""
        self.fitted, self._due = fitted, 2 * fitted.pairs

    def limit(self, fitted: FittedScheme) -> float:
        """Return how large a score may be.

        Of labels, more of the decoded ones may be wrong, since only some rows are decoded.
        """
        settings = self._settings
        if settings.tolerance is not None:
            return settings.tolerance
        assert fitted.scheme.error_probability is not None
        assert settings.max_disagreement is not None
        workers = settings.num_workers
        decoded = max(workers - settings.wait_for, 1) / workers
        return fitted.scheme.error_probability.limit(min(1.0, settings.max_disagreement / decoded))

    def known(self, fitted: FittedScheme) -> float:
        """Return the share of rows that need not be computed."""
        if self._settings.tolerance is not None:
            return fitted.within(self._settings.tolerance, self._settings.coverage)
        return fitted.sure(self.limit(fitted))

    def useful(self, fitted: FittedScheme) -> bool:
        """Return whether it knows enough rows to be worth the copies of others."""
        return self.known(fitted) >= _USEFUL

    def _full(self, fitted: FittedScheme) -> bool:
        return fitted.pairs >= _CAPACITY and self.useful(fitted)

    def _fit(self, x: np.ndarray, y: np.ndarray) -> None:
        labels = self._settings.max_disagreement is not None
        try:
            self._news.append(fit_scheme(x, y, self._code, capacity=_CAPACITY, labels=labels))
        except ValueError as error:  # a function that is constant, for example
            _LOG.warning("nothing could be learned from %d rows: %s", len(x), error)
