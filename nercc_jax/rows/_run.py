"""A run over rows on a pool: reports events to the state, and carries out its instructions.

It owns the pool's batches, the clock, the files and the learner's thread. All decisions are made in
`state.py`.
"""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from threadpoolctl import ThreadpoolController

from ..pools import AbstractPool, Batch, Overdue
from ..pools.clock import TimeShare
from ..risk import Accuracy, EnsembleEstimate
from ..risk.ensembles import RowEvidence
from ._evidence import Learned
from ._interface import RowProgress, RowResult, RowSettings
from ._table import COMPUTED, PREDICTED, RowTable
from .files import Parts, fingerprint, ids_of_rows
from .state import (
    Answered,
    Estimated,
    Event,
    Failed,
    Fence,
    Give,
    RowState,
    Send,
    Tick,
)

_TICK = 0.05  # seconds between two ticks
_SHOWN = 0.1  # seconds between two reports of progress, at least
_LEARNING = 0.5  # the share of the time, and of the cores, that learning may take
_FROM_THE_FIRST = Overdue(least=1)  # gives a median service time from the first call on


def run_rows(
    function: Callable[[Any], Any],
    rows: Shaped[np.ndarray, "rows ..."],
    pool: AbstractPool | Callable[..., AbstractPool],
    settings: RowSettings | None = None,
    *,
    accuracy: Accuracy | None = None,
    num_workers: int | None = None,
    folder: Path | str | None = None,
    resume: bool = False,
    about: Mapping[str, Any] | None = None,
    ids: Shaped[np.ndarray, " rows"] | Sequence[str | int] | None = None,
    on_progress: Callable[[RowProgress], Any] | None = None,
    on_rows: Callable[[Any, Any, bool], Any] | None = None,
    statistic: Callable[[RowResult], EnsembleEstimate] | None = None,
    stop_when: Callable[[EnsembleEstimate], bool] | None = None,
    **options: Any,
) -> RowResult:
    """Run a function on each row: every row is computed, or predicted within a tolerance.

    A computed row has exactly the value that the function returned. A predicted row has a
    prediction from the computed rows, with an error bar no larger than the tolerance. A row whose
    error bar is larger is computed. `docs/run.md` describes how.

    Args:
        function: Any callable on (rows, ...) that returns an array (rows, ...).
        rows: Inputs, one a row: finite numbers.
        pool: An open pool whose workers run the function, not compiled; or a class such as
            `DevicePool` or `RayPool`, which is opened for the run.
        settings: The accuracy, deadlines and so on (default: `RowSettings(**options)`).
        accuracy: The accuracy of predicted rows, in place of the settings'.
        num_workers: The number of workers of a pool that is opened (default: 20).
        folder: The folder to which results are written during the run (default: none).
        resume: Continue the run in the folder: its computed rows are not computed again; its
            predicted rows are predicted from these, or computed.
        about: Further facts that the values depend on, such as a version of the function, as JSON
            values; a run with other facts cannot be resumed.
        ids: An id of each row, a text or a whole number, which the result and its files contain.
        on_progress: Called at the beginning, at the end, and when rows were answered, at most ten
            times a second.
        on_rows: Called with row numbers, values, and whether these were computed, as soon as rows
            have values: once for each row, rows of a resumed folder first. A row whose value was
            taken back by `check_answers` is passed again.
        statistic: Returns an estimate of what the run is for, such as `lambda result:
            result.mean()`, from the result so far. Progress includes the latest estimate. The calls
            take at most a tenth of this thread's time.
        stop_when: Returns whether an estimate of the statistic is good enough to end the run, such
            as `lambda estimate: estimate.width < 0.1`. Until then the run computes the rows that
            add most to the interval, such as those near a threshold, and one in four at random. If
            most of the interval comes from late rows, these are sent again first.
        **options: Fields of `RowSettings` by name, such as `tolerance`, in place of those given.

    Returns:
        Values and a status for each row. After Ctrl-C, or if Ray is about to end this process, the
        other rows are "waiting", and `stopped` gives the reason.

    Raises:
        ValueError: If an argument does not fit, or the folder holds another run.
        RuntimeError: If the pool does not start, or the function raises on all of the first rows.

    Example:
        >>> import numpy as np
        >>> from nercc_jax import DevicePool
        >>> from nercc_jax.rows import run_rows
        >>> def swing(x):  # any function of NumPy arrays
        ...     return np.sin(3 * x).cumsum(axis=1)
        >>> x = np.random.default_rng(0).uniform(-1, 1, (200, 2))
        >>> result = run_rows(swing, x, DevicePool, num_workers=4, tolerance=0.0)
        >>> result.values.shape, set(result.status.tolist())
        ((200, 2), {'computed'})
    """
    x = np.asarray(rows)
    numbers = x.ndim > 0 and x.size and x.dtype.kind in "biuf"
    odd = np.argwhere(~np.isfinite(x)) if numbers else []
    if not numbers or len(odd):
        where = f", with {x[tuple(odd[0])]} in row {odd[0][0]}" if numbers else ""
        kind = f"{x.dtype} of shape {x.shape}"
        raise ValueError(f"rows are finite numbers (rows, ...), not {kind}{where}")
    if stop_when is not None and statistic is None:
        raise ValueError("stop_when needs the statistic whose estimates it judges")
    names = ids_of_rows(ids, len(x))
    if accuracy is not None:
        if not isinstance(accuracy, Accuracy):
            raise ValueError(f"accuracy is an Accuracy(tolerance=...), not {accuracy!r}")
        options |= dataclasses.asdict(accuracy)
    if settings is None:
        settings = RowSettings(**options)
    elif options:
        settings = dataclasses.replace(settings, **options)
    if settings.rows_per_call is not None:
        most = min(settings.rows_per_call, len(x))
        settings = dataclasses.replace(settings, rows_per_call=most)
    kept = {"tolerance", "max_disagreement", "coverage", "seed"}  # which values depend on
    facts = {"rows": len(x)} | {name: getattr(settings, name) for name in kept} | dict(about or {})
    table, parts = RowTable(len(x)), None
    if folder is not None:
        parts = Parts(folder, facts | {"inputs": fingerprint(x)}, names, resume=resume)
        for each in parts.read():
            table.take(each)
    opening: Any = contextlib.nullcontext(pool)
    if not isinstance(pool, AbstractPool):
        further: Any = {"compiled": False, "hang_timeout": settings.hang_timeout}
        opening = pool(function, num_workers or 20, **further)
    with opening as opened:
        state = RowState(settings, x, table, opened.report(), opened.worker_dtype)
        run = _Run(opened, x, state, parts, on_rows or (lambda *_: None))
        if statistic is not None:
            so_far = functools.partial(_result, state, opened, facts, None, names)
            run.statistic, run.stop_when = (lambda: statistic(so_far())), stop_when
        stopped = run.carry_out(on_progress or (lambda _: None))
        return _result(state, opened, facts, stopped, names)


class _Run:
    """One run's pool, calls, files and learner.

    Attributes:
        statistic: Returns an estimate from the result so far; None if the caller wants none.
        stop_when: Returns whether an estimate is good enough to end the run.
        estimate: The latest estimate.
    """

    statistic: Callable[[], EnsembleEstimate] | None = None
    stop_when: Callable[[EnsembleEstimate], bool] | None = None
    estimate: EnsembleEstimate | None = None

    def __init__(
        self,
        pool: AbstractPool,
        x: Shaped[np.ndarray, "rows ..."],
        state: RowState,
        parts: Parts | None,
        on_rows: Callable[[Any, Any, bool], Any],
    ):
        self._pool, self._x, self._state = pool, x, state
        self._parts, self._on_rows = parts, on_rows
        self._clock = pool.clock
        self._learned: list[Learned] = []
        self._learns: Callable[[], bool] = lambda: False
        self._fit_seconds, self._learning_time = 0.5, TimeShare(pool.clock, _LEARNING)
        # BLAS's threads wait by spinning. One for each core starves whatever else runs: with fewer,
        # runs computed 1.2 to 1.7 times as many rows.
        self._blas = ThreadpoolController().select(user_api="blas")
        threads = max((each["num_threads"] for each in self._blas.info()), default=1)
        self._blas_threads = max(int(_LEARNING * threads), 1)
        self._batches: dict[int, Batch] = {}
        self._news: list[int] = []  # calls that may have ended
        self._changed = threading.Condition()
        self._begin = pool.clock.now()
        self._estimated, self._time = 0, TimeShare(pool.clock, 0.1)

    def carry_out(self, show: Callable[[RowProgress], Any]) -> str | None:
        """Run until the state is over; return why the run was stopped early, None if it was not."""
        state, stopped = self._state, None
        look_at = shown = 0.0
        try:
            show(self._progress())
            rows = state.table.all_in(COMPUTED)  # rows that an earlier run computed
            if len(rows) and state.table.values is not None:
                self._on_rows(rows, state.table.values[rows], True)
            while not state.over and stopped is None:
                if (now := self._clock.now()) >= look_at or not self._batches:
                    while self._learned:
                        self._handle(self._learned.pop(0))
                    ages = {number: batch.age(0) for number, batch in self._batches.items()}
                    # The learner pauses after its work, to leave the cores to other threads.
                    learning = self._learns() or now < self._learning_time.next
                    seen = now - self._begin, self._pool.report(), ages, learning
                    self._handle(Tick(*seen, self._fit_seconds))
                    look_at = now + _TICK
                news = not state.over and self._take_ended(look_at)
                if news and self._clock.now() >= shown + _SHOWN:
                    show(self._progress())
                    shown, stopped = self._clock.now(), self._pool.ending
            show(self._progress())
        except KeyboardInterrupt:
            stopped = "interrupted"
        finally:
            if stopped is None and state.over:
                # Wait for calls that workers have; drop those that no worker has.
                end = self._clock.now() + state.settings.grace
                for number, batch in list(self._batches.items()):
                    if not batch.available[0] and not batch.age(0)[0]:
                        self._batches.pop(number).forget()
                with contextlib.suppress(KeyboardInterrupt):
                    while self._batches and self._clock.now() < end:
                        self._take_ended(end)
            for batch in self._batches.values():
                batch.forget()
            if self._parts is not None and len(state.table.open) < len(self._x):
                self._parts.flush(complete=not len(state.table.open))
        return stopped

    def _progress(self) -> RowProgress:
        """Return the progress, with a new estimate if rows were computed and its time allows."""
        computed, begin = self._state.computed, self._clock.now()
        if self.statistic is not None and computed != self._estimated and begin >= self._time.next:
            self.estimate, self._estimated = self.statistic(), computed
            self._time.spend(begin)
            if self.stop_when is not None:
                self._handle(Estimated(self.estimate, bool(self.stop_when(self.estimate))))
        return _progress_of(self._state, self.estimate)

    def _learn(self, work: Callable[[], Learned | None]) -> None:
        """Run a learner's task, on the learner's thread."""
        begin = self._clock.now()
        try:
            with self._blas.limit(limits=self._blas_threads):
                learned = work()
            if learned is not None:
                self._learned.append(learned)
        finally:
            self._fit_seconds = self._learning_time.spend(begin)

    def _take_ended(self, until: float) -> bool:
        """Wait until calls end or a time is reached; return whether some calls may have ended."""
        with self._changed:
            if not self._news:
                self._clock.wait(self._changed, max(until - self._clock.now(), 0.001))
            numbers, self._news = self._news, []
        for number in numbers:
            batch = self._batches.get(number)
            if batch is None or not (batch.available[0] or batch.lost(0)):
                continue
            late = self._batches.pop(number).age(0)[1]
            if batch.available[0]:
                values: Any = batch.answer(0)
                if values.dtype.kind != "f":
                    values = values.astype(float)
                usual = batch.times.under(_FROM_THE_FIRST).median(len(values))
                self._handle(Answered(number, batch.workers[0], values, late, usual))
            else:
                raised = [each.reason for each in batch.failures if each.raised]
                reasons = raised or [each.reason for each in batch.failures] or ["no answer"]
                self._handle(Failed(number, reasons[-1], bool(raised)))
            batch.forget()
        return bool(numbers)

    def _note(self, number: int, batch: Batch) -> None:
        """Note that a call may have ended. Called by the pool's threads."""
        with self._changed:
            self._news.append(number)
            self._changed.notify()

    def _handle(self, event: Event) -> None:
        """Pass an event to the state, and carry out its instructions."""
        state, parts = self._state, self._parts
        for each in state.handle(event):
            if isinstance(each, Send):
                change = functools.partial(self._note, each.call)
                batch = self._pool.open(1, copies=1, on_change=change, refuse=_refuse)
                self._batches[each.call] = batch
                x = np.take(self._x, np.resize(each.rows, each.size), axis=0)
                self._pool.send(batch, [0], [x], avoid=each.avoid)
            elif isinstance(each, Give):
                if parts is not None:
                    parts.add(state.table.arrays(each.rows))
                if each.computed is not None and state.table.values is not None:
                    self._on_rows(each.rows, state.table.values[each.rows], each.computed)
            elif isinstance(each, Fence):
                self._pool.fence(each.workers)
            else:  # not a daemon thread: the process does not exit before it ends
                work = functools.partial(self._learn, each.work)
                self._learns = self._clock.start("nercc-learner", work)


def _refuse(answer: Any) -> str | None:
    """Return why a worker's answer is not an array of real numbers; None if it is one."""
    if not isinstance(answer, np.ndarray):
        return f"the function gave a {type(answer).__name__}: an array (rows, ...) is needed"
    if answer.dtype.kind not in "biuf":
        return f"the function gave {answer.dtype}: real numbers are needed"
    whole = answer.dtype.kind in "iu" and answer.size > 0
    if whole and max(abs(int(answer.min())), abs(int(answer.max()))) > 2**53:
        return f"the function gave {answer.dtype} beyond 2^53, which no float64 holds exactly"
    return None


def _progress_of(state: RowState, estimate: EnsembleEstimate | None = None) -> RowProgress:
    """Return the numbers of rows that are computed, predicted and so on."""
    states, report = state.table["state"], state.seen.report
    known = np.count_nonzero(state.table["known"] & (states < PREDICTED))
    return RowProgress(
        rows=len(states),
        computed=int(np.count_nonzero(states == COMPUTED)),
        predicted=int(np.count_nonzero(states == PREDICTED) + known),
        unknown=len(state.table.reasons),
        workers=report.num_workers - report.starting,
        seconds=state.seen.now,
        rows_per_second=state.computed / max(state.seen.now, 1e-9),
        estimate=estimate,
    )


def _result(
    state: RowState,
    pool: AbstractPool,
    facts: dict[str, Any],
    stopped: str | None,
    ids: Shaped[np.ndarray, " rows"] | None,
) -> RowResult:
    """Return the result so far, in the order of the inputs."""
    table, progress, report = state.table, _progress_of(state), pool.report()
    computed, predicted = table.all_in(COMPUTED), table.all_in(PREDICTED)
    status = np.full(len(table.rows), "waiting", "U9")
    status[computed], status[predicted] = "computed", "predicted"
    status[[*table.reasons]] = "unknown"
    fit, learnable = state.evidence.fit, computed if table.values is None else table.learnable
    summary = {
        "rows_done": len(computed) + len(predicted),
        "seconds": progress.seconds,
        "rows_per_second": progress.rows_per_second,
        "computed": len(computed),
        "not_finite": len(computed) - len(learnable),
        "predicted": len(predicted),
        "learned_from": None if fit is None else fit.pairs,
        **state.evidence.held,
        **report.summary(),
        "unknown": len(table.reasons),
        **({} if state.checks is None else state.checks.counts()),
    }
    return RowResult(
        table.values,
        status,
        table["deviation"].copy(),
        table["score"].copy(),
        dict(sorted(table.reasons.items())),
        facts | summary,
        report,
        stopped,
        ids,
        _row_evidence(state) if len(learnable) else None,
    )


def _row_evidence(state: RowState) -> RowEvidence:
    """Return values, predictions and errors of all rows, for statistics."""
    table, mean, values = state.table, state.evidence.mean, state.table.values
    assert values is not None
    computed, audit = table["state"] == COMPUTED, table["audit"].copy()
    late = table.late | ((table["tries"] > 0) & ~computed)
    deviation, judged = table["expected"].copy(), computed & (audit | late)
    if computed.all():  # nothing is predicted, so no copy is needed
        return RowEvidence(values, values, deviation, computed, late, audit, judged)
    # A row without a prediction gets the mean of the computed rows, and their spread as deviation.
    known = values[table.learnable]
    predictions = np.broadcast_to(known.mean(axis=0), values.shape).copy()
    estimated = table["estimated"] & np.isfinite(deviation)
    deviation[~estimated] = np.sqrt(np.mean((known - known.mean(axis=0)) ** 2))
    if mean is not None:
        predictions[estimated] = mean[estimated].reshape(-1, *known.shape[1:])
        judged = computed & table["judged"]
    own = computed.reshape(-1, *[1] * (known.ndim - 1))
    values = np.where(own, values, predictions)
    return RowEvidence(values, predictions, deviation, computed, late, audit, judged)
