"""The engine for rows: runs a function on each row, computing it or knowing it well enough.

Workers are kept busy, row after row: no row waits for others. Once a learner, on a thread of its
own, has been fitted to what came, rows that it knows well enough need not be computed, and those
that it knows least go next. Some are computed all the same, drawn at random: they judge its bars.
"""

import contextlib
import dataclasses
import math
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from ..pools import AbstractPool, Batch, PoolReport
from ..pools._backend import pool_counts
from ._calls import (
    ATTEMPTS,
    Compute,
    RowCall,
    RowFunction,
    RowProgress,
    RowResult,
    RowSettings,
    bars_that_held,
    checked_ids,
    checked_rows,
    hang_timeout,
    late_answers,
    reason_to_stop,
)
from ._checks import RowChecks
from ._learner import RowLearner
from ._predictions import NEWS
from ._queue import RowQueue
from .files import (
    Parts,
    RowTable,
    check_parts,
    fingerprint_of_array,
    load_fitted,
    save_fitted,
)


def run_rows(
    function: Callable[[Any], Any],
    rows: Shaped[np.ndarray, "rows ..."],
    pool: AbstractPool | Callable[..., AbstractPool],
    *,
    tolerance: float | None = None,
    max_disagreement: float | None = None,
    coverage: float = 0.9,
    compute: Compute = "needed",
    num_workers: int | None = None,
    rows_per_call: int | None = None,
    deadline: float = 30.0,
    job_deadline: float | None = None,
    grace: float = 0.0,
    max_calls: int | None = None,
    check_answers: float | None = None,
    max_fenced: float = 0.25,
    seed: int = 0,
    folder: Path | str | None = None,
    resume: bool = False,
    about: Mapping[str, Any] | None = None,
    ids: Shaped[np.ndarray, " rows"] | Sequence[str | int] | None = None,
    on_progress: Callable[[RowProgress], Any] | None = None,
    on_rows: Callable[[Any, Any, bool], Any] | None = None,
) -> RowResult:
    """Run a function on each row: every row is computed, or predicted within a tolerance.

    A computed row has exactly the value that the function gave. A predicted row has a prediction
    from the rows that were computed, and its error bar is no larger than the tolerance. A row that
    is too uncertain is computed. `docs/run.md` describes how.

    Args:
        function: Any callable on (rows, ...) that returns an array (rows, ...).
        rows: Inputs, one a row: finite numbers.
        pool: An open pool whose workers run `RowFunction(function)`, not compiled; or a class such
            as `DevicePool` or `RayPool`, which is opened for the run.
        tolerance: The largest error bar of a predicted row, in units of the outputs (root mean
            square over a row's outputs). 0 computes all rows.
        max_disagreement: Instead, where outputs are scores of labels: the share of predicted labels
            that may differ from the function's own.
        coverage: The share of errors that error bars cover.
        compute: "needed" computes no row that is known well enough, except some at random, which
            judge the error bars; "all" predicts only rows that are late.
        num_workers: The number of workers of a pool that is opened (default: 20).
        rows_per_call: Rows in one call, at most those there are (default: as many as take 0.05 to
            0.25 s).
        deadline: Seconds that a call may take before its rows are sent again.
        job_deadline: Seconds after which the run ends, with what is known by then (default: none).
        grace: Seconds for which a run that has ended waits for answers that workers still owe. They
            change no value, and judge the error bars of late rows in the summary.
        max_calls: Rows to compute at most, those chosen that tell most (default: no limit).
        check_answers: The share of right answers that may look wrong. Answers that do are compared
            with other workers' (default: none are). It takes three workers.
        max_fenced: The largest share of workers that is fenced for wrong answers.
        seed: Of the order of the rows, which is random, so that the first ones are typical.
        folder: Where results are written as they come (default: nowhere).
        resume: Go on with the run that the folder holds.
        about: What else the values depend on, such as a version of the function, as JSON takes it;
            a run with other values cannot be resumed.
        ids: An id of each row, a text or a whole number, which the result and its files carry.
        on_progress: Called at the beginning, at the end, and in between when rows came, ten times a
            second at most, with numbers of rows: `rows` in all, `computed`, `predicted` (not to be
            computed, as things are), `done` (both), `unknown` (after all attempts), `waiting`, and
            `late`; `workers` alive, `seconds` since the run began, `rows_per_second` computed.
        on_rows: Called with rows as soon as they have values, each once: their numbers, their
            values, and whether they were computed. Rows of a folder that is resumed come first. A
            row whose value was taken back by `check_answers` comes again.

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
    x, names = checked_rows(rows), checked_ids(ids, len(rows))
    settings = RowSettings(
        tolerance=tolerance,
        max_disagreement=max_disagreement,
        coverage=coverage,
        compute=compute,
        rows_per_call=None if rows_per_call is None else min(rows_per_call, len(x)),
        deadline=deadline,
        job_deadline=job_deadline,
        grace=grace,
        max_calls=max_calls,
        check_answers=check_answers,
        max_fenced=max_fenced,
        seed=seed,
    )
    kept = {"rows": len(x)} | settings.kept() | dict(about or {})
    table, parts = RowTable(len(x)), None
    if folder is not None:
        check_parts(Path(folder), resume)
        parts = Parts(Path(folder), {"inputs": fingerprint_of_array(x)} | kept, table, names)
    opening: Any = contextlib.nullcontext(pool)
    if not isinstance(pool, AbstractPool):
        options: Any = {"compiled": False, "hang_timeout": hang_timeout(deadline)}
        opening = pool(RowFunction(function), num_workers or 20, **options)
    with opening as opened:
        run = _RowRun(opened, x, settings, table, parts, on_rows)
        return dataclasses.replace(run.carry_out(kept, on_progress), ids=names)


class _RowRun:
    """One run over rows: which go next, which are with workers, and which are done."""

    def __init__(
        self,
        pool: AbstractPool,
        x: Shaped[np.ndarray, "rows ..."],
        settings: RowSettings,
        table: RowTable,
        parts: Parts | None,
        on_rows: Callable[[Any, Any, bool], Any] | None = None,
    ):
        self._on_rows = on_rows or (lambda rows, values, computed: None)
        self._pool, self._x, self._settings = pool, x, settings
        self._table, self._parts = table, parts
        self._begin = time.monotonic()
        self._ends_at = self._begin + (settings.job_deadline or math.inf)
        order = np.random.default_rng(settings.seed).permutation(len(x))
        # Rows that are computed before anything is learned: a tenth, within limits. These and some
        # of the others, all of them at random, judge the learner's error bars.
        self._first = min(max(len(x) // 10, 100), 256)
        self._audits = np.zeros(len(x), bool)
        self._audits[order[: self._first]] = self._audits[order[self._first :: 20]] = True
        checks, selects = settings.check_answers, settings.compute == "needed"
        self._learner = RowLearner(settings.target, x, self._audits, checks, selects)
        self._checks = None
        if settings.check_answers is not None:
            self._checks = RowChecks(len(x), pool, settings.max_fenced, settings.check_answers)
        self._last_check = -1  # rows computed when all that was unchecked was last looked at
        self._queue = RowQueue(order[~table.done[order]], pool.num_workers, settings)
        self._calls: dict[Batch, RowCall] = {}
        self._workers = (
            self._pool.num_workers - self._pool.report().starting
        )  # that were alive at the last look
        self._news: queue.SimpleQueue[Batch] = queue.SimpleQueue()
        self._held = np.zeros(len(x), int)  # calls that have a row, and are not given up
        self._tries = np.zeros(len(x), int)  # calls that had it, and gave no answer in time
        self._late = np.zeros(len(x), bool)  # rows that came late, or are late
        self._unknown: dict[int, str] = {}
        self._computed = 0  # rows that this run has had computed
        self._offered = 0  # of them, those that the learner was last offered
        self._known = np.zeros(len(x), bool)  # rows that need not be computed, as things are
        if parts is not None and (path := parts.kept("learner")) is not None:
            self._learner.resume(load_fitted(path), table)

    def carry_out(
        self, kept: dict[str, Any], on_progress: Callable[[RowProgress], Any] | None
    ) -> RowResult:
        """Run until no row waits, or something ends the run, and return the result."""
        try:
            stopped = self._compute(on_progress or (lambda progress: None))
            result = self._result(kept, stopped)
            if stopped is None and self._settings.grace > 0:
                labels = self._settings.max_disagreement is not None
                with contextlib.suppress(KeyboardInterrupt):
                    answers = late_answers(self._calls.values(), self._settings.grace)
                    held, number = bars_that_held(result, answers, labels)
                    result.summary["came_late"] += number
                    result.summary["came_late_held"] += held
            return result
        except RuntimeError:
            if self._parts is not None and not self._table.done.any():
                self._parts.remove()
                self._parts = None
            raise
        finally:
            for batch in self._calls:
                batch.forget()
            if self._parts is not None:
                self._parts.flush(complete=bool(self._table.done.all()))

    def _compute(self, show: Callable[[RowProgress], Any]) -> str | None:
        """Compute rows, and predict the others; return why this ended early, if it did."""
        try:
            show(self._progress())
            for computed in (True, False):
                rows = np.flatnonzero(self._table.done & (self._table.exact == computed))
                if len(rows) and self._table.predictions is not None:
                    self._on_rows(rows, self._table.predictions[rows], computed)
            for _ in self._turns():
                show(self._progress())
                if (stopped := reason_to_stop(self._pool)) is not None:
                    break
            else:
                stopped = None
                self._predict()
            show(self._progress())
        except KeyboardInterrupt:
            return "interrupted"
        return stopped

    def _turns(self) -> Iterator[None]:
        """Yield now and then, until no row is to be waited for or the job's time is over.

        Raises:
            RuntimeError: If the function raises on all of the first rows.
            ValueError: If it gives what the target does not fit.
        """
        look_at = shown = 0.0
        if self._learner.fitted is not None:
            self._arrange()
        while True:
            self._send()
            now = time.monotonic()
            if now >= look_at or not (self._calls or len(self._queue)):
                self._workers = self._pool.num_workers - self._pool.report().starting
                self._look_at_late_calls()
                if self._checks is not None:
                    self._checks.look(self._pool.report())
                    self._follow_fences()
                self._learn()
                if self._finished() or now >= self._ends_at:
                    return
                look_at = now + 0.05
            try:
                batches = [self._news.get(timeout=max(look_at - time.monotonic(), 0.001))]
            except queue.Empty:
                continue
            while not self._news.empty():
                batches.append(self._news.get())
            for batch in batches:
                call = self._calls.get(batch)
                if call is not None and call.over:
                    self._take(call)
            if time.monotonic() >= shown + 0.1:
                yield
                shown = time.monotonic()

    # Sending.

    def _send(self) -> None:
        out = sum(not call.given_up for call in self._calls.values())
        # Two for each worker, so that none waits for the next; one where calls are about to grow.
        ahead = 2 if self._queue.timed else 1
        room = max(ahead * self._workers - out, self._pool.idle)  # newcomers are idle
        while room > 0 and len(rows := self._queue.take(self._table.done)):
            self._held[rows] += 1
            self._open(rows, copy=False)
            room -= 1

    def _open(self, rows: Int[np.ndarray, " few"], copy: bool) -> None:
        size = self._settings.rows_per_call or 1 << (len(rows) - 1).bit_length()
        avoid = () if self._checks is None else self._checks.avoid(rows)
        call = RowCall(self._pool, rows, self._x, size, copy, self._news.put, avoid)
        self._calls[call.batch] = call

    # Answers.

    def _take(self, call: RowCall) -> None:
        late, values = call.late, call.values()
        del self._calls[call.batch]
        call.batch.forget()
        if not call.copy and not call.given_up:
            self._held[call.rows] -= 1
        if values is None:
            self._fail(call, call.raised())
            return
        others = self._table.predictions
        if others is not None and values.shape[1:] != others.shape[1:]:
            why = f"a row came as {values.shape[1:]}, others as {others.shape[1:]}"
            self._fail(call, why)
            return
        fresh = ~self._table.exact[call.rows]
        rows, values = call.rows[fresh], values[fresh]
        if len(rows) and self._checks is not None:
            rows, values = self._screen(call.worker, rows, values)
        if len(rows):
            vectors = values.reshape(len(rows), -1)
            late |= call.given_up or call.copy  # a copy is that of a late call
            self._late[rows] = late
            self._learner.compare(rows, vectors, late)
            nothing = np.zeros(len(rows))
            self._table.add(rows, values, nothing, nothing, exact=True)
            self._computed += len(rows)
            self._known[rows] = False
            self._forget_reasons(rows)
            if self._parts is not None:
                self._parts.add(rows.tolist())
            self._on_rows(rows, values, True)
            self._queue.observe(call.size, call.batch.times, self._x[0].nbytes + values[0].nbytes)
        if self._checks is not None:  # of what is in the table now, too
            self._follow_fences()

    # Checks.

    def _screen(
        self, worker: int, rows: Int[np.ndarray, " few"], values: Float[np.ndarray, "few ..."]
    ) -> tuple[Int[np.ndarray, " some"], Float[np.ndarray, "some ..."]]:
        """Return the rows that have values now; others have the rest computed again."""
        assert self._checks is not None
        looks = self._learner.look_wrong(rows, values.reshape(len(rows), -1))
        given, values = self._checks.take(worker, rows, values, *looks)
        self._queue.send_first(rows[~given])
        return rows[given], values[given]

    def _follow_fences(self) -> None:
        assert self._checks is not None
        rows = self._checks.follow_fences(self._table.exact, self._table.predictions)
        if rows is not None:
            self._learner.forget_check()
            self._take_back(rows)
        if self._table.predictions is not None:
            self._take_back(self._checks.doubt_calls(self._table.predictions))

    def _take_back(self, rows: Int[np.ndarray, " few"]) -> None:
        """Treat rows in doubt as if they had no values, until other workers have computed them."""
        if len(rows):
            self._table.take_back(rows)
            self._learner.forget(rows)
            self._queue.send_first(rows)
            if self._parts is not None:
                self._parts.add(rows.tolist())

    def _unchecked(self) -> Int[np.ndarray, " some"]:
        """Return the rows whose values have not been looked at."""
        checked = self._table.exact if self._checks is None else self._checks.checked
        return np.flatnonzero(self._table.exact & ~checked)

    def _awaits_check(self) -> bool:
        """Return whether values are still to be looked at, and see to it that they are."""
        if self._checks is None or self._table.predictions is None:
            return False
        if self._learner.at_work:
            return True
        outdated = self._learner.outdated and not self._table.done.all()
        if self._last_check == self._computed or not (len(self._unchecked()) or outdated):
            return False
        self._last_check = self._computed
        self._begin_to_learn(hurry=True)
        return self._learner.at_work

    def _forget_reasons(self, rows: Int[np.ndarray, " few"]) -> None:
        for row in rows.tolist() if self._unknown else ():
            self._unknown.pop(row, None)

    def _fail(self, call: RowCall, raised: str | None) -> None:
        """Sort out the rows of a call that has no answer, or one that cannot be used."""
        rows = call.rows[~self._table.done[call.rows]]
        if raised is None:
            if not call.given_up and not call.copy:
                self._try_again(rows.tolist(), call.failure())
            return
        if len(call.rows) > 1:
            self._queue.halve(rows)
            return
        self._unknown |= dict.fromkeys(rows.tolist(), raised)
        if self._table.predictions is None and len(self._unknown) >= min(
            self._first, len(self._table)
        ):
            raise RuntimeError(
                f"the function raises on all of the first {len(self._unknown)} rows: {raised}"
            )

    def _try_again(self, rows: list[int], why: str) -> None:
        for row in rows:
            self._tries[row] += 1
            if self._tries[row] < ATTEMPTS:
                self._queue.send_again([row])
            else:
                self._unknown[row] = why

    def _look_at_late_calls(self) -> None:
        """Give up calls after their deadline; copy late ones where workers would be idle."""
        idle = 0 if len(self._queue) else self._pool.idle
        for call in sorted(self._calls.values(), key=lambda call: -call.age()):
            if call.over:  # what its `on_change` said came before it was in the table of calls
                self._take(call)
            elif call.age() > self._settings.deadline and not call.given_up:
                call.given_up = True  # an answer that still comes is welcome
                if not call.copy:
                    self._held[call.rows] -= 1
                    free = ~self._table.done[call.rows] & (self._held[call.rows] == 0)
                    why = f"no answer within {self._settings.deadline:g} s"
                    self._try_again(call.rows[free].tolist(), why)
            elif call.late and not call.copy and idle > 0 and call.copies < 2:
                rows = call.rows[~self._table.done[call.rows]]
                if len(rows):
                    call.copies, idle = call.copies + 1, idle - 1
                    self._open(rows, copy=True)

    # Learning.

    def _learn(self) -> None:
        """Have the learner learn what came, and take what it has learned."""
        settings, table = self._settings, self._table
        if (settings.tolerance == 0 and self._checks is None) or table.predictions is None:
            return
        if settings.max_disagreement is not None and table.vectors.shape[1] < 2:
            raise ValueError(
                "max_disagreement is for labels, the largest of several outputs; this function "
                "gives one number: give a tolerance"
            )
        before = self._learner.fitted
        if self._learner.look():
            fitted = self._learner.fitted
            assert fitted is not None
            new = before is None or fitted.pairs != before.pairs  # else it only learned some more
            if self._parts is not None and new:
                name = f"learner-{fitted.pairs:06d}.npz"
                self._parts.keep("learner", name, lambda path: save_fitted(path, fitted))
            self._arrange()
            checked, checks = self._learner.checked, self._checks
            if checked is not None and checks is not None:
                # Taken back is what is found to look wrong among earlier values.
                still = table.exact[checked.rows] & ~checks.checked[checked.rows]
                rows = checked.rows[still]
                looks = checked.looks_wrong[still], checked.residuals[still]
                self._take_back(checks.recheck(rows, table.predictions[rows], *looks))
        until_end = self._ends_at - time.monotonic()
        hurry = until_end < 3 * self._learner.seconds
        news = self._computed - self._offered >= NEWS or (hurry and self._learner.fitted is None)
        worth_it = self._seconds_left() > min(self._learner.seconds, until_end)
        if news and not self._learner.busy and worth_it:
            self._begin_to_learn(hurry)

    def _begin_to_learn(self, hurry: bool) -> None:
        self._offered, table = self._computed, self._table
        known, rows = (table.learnable, table.vectors), np.flatnonzero(~table.done)
        self._learner.begin(*known, rows, self._late_rows(), hurry, self._unchecked())

    def _late_rows(self) -> Bool[np.ndarray, " rows"]:
        late = self._late.copy()
        for call in self._calls.values():
            late[call.rows] |= call.late or call.given_up
        return late

    def _notice_late(self) -> None:
        """Have the learner compare the rows that wait with all that have been late by now."""
        if self._learner.fitted is not None:
            known = self._table.learnable, self._table.vectors
            self._learner.notice_late(np.flatnonzero(~self._table.done), *known, self._late_rows())

    def _seconds_left(self) -> float:
        """Return how long it takes to compute the rows that wait, at the speed so far.

        A call is taken to last as long again as it has lasted. While calls still grow, the speed
        is that of what comes next, not of what was: it is not known in the first second.
        """
        seconds = max(time.monotonic() - self._begin, 1e-9)
        if not self._queue.timed and seconds < 1.0:
            return 0.0
        speed = self._computed / seconds
        age = max((call.age() for call in self._calls.values()), default=0.0)
        return max(len(self._queue.waiting) / max(speed, 1e-9), age)

    def _arrange(self) -> None:
        """Decide which rows are computed, and in which order."""
        rows = self._free()
        self._known[:] = False
        self._known[rows] = self._learner.score(rows) <= self._learner.limit
        if self._settings.compute == "needed":
            rows = rows[~self._known[rows] | self._audits[rows]]
        self._queue.waiting = self._learner.order(rows)

    def _finished(self) -> bool:
        """Return whether no row is to be waited for."""
        if not self._settled() or self._awaits_check():
            return False
        self._notice_late()
        return self._settled()

    def _settled(self) -> bool:
        """Return whether all rows are done or known, as things are; send the doubtful ones."""
        if not self._queue.empty:
            return False
        rows = self._free()
        if self._learner.fitted is not None:
            # Known well enough before, and now not: an audit has shown that bars were too short.
            rows = rows[self._learner.score(rows) > self._learner.limit]
        if not self._queue.spent and len(rows):
            self._queue.waiting = self._learner.order(rows)
            return False
        rows = np.flatnonzero((self._held > 0) & ~self._table.done)
        if not len(rows):
            return True
        # A call that is not late has its answer soon, which is better than a prediction; and
        # audits are computed, however late they are.
        late = [call.rows for call in self._calls.values() if call.late]
        if self._learner.fitted is None or not np.isin(rows, np.concatenate([[], *late])).all():
            return False
        good = self._learner.score(rows, late=True) <= self._learner.limit
        return bool((good & ~(self._audits[rows] & (self._settings.compute == "needed"))).all())

    def _free(self) -> Int[np.ndarray, " rows"]:
        """Return rows without a value that no worker has, and that are not to be sent again."""
        free = ~self._table.done & (self._held == 0)
        free[[*self._unknown, *self._queue.to_send_again()]] = False
        return np.flatnonzero(free)

    def _predict(self) -> None:
        """Take predictions for the rows that are not computed, where they are good enough."""
        self._notice_late()
        rows = np.flatnonzero(~self._table.done)
        if self._settings.tolerance == 0 or self._learner.fitted is None or not len(rows):
            return
        score = self._scores(rows)
        raised = np.isin(rows, [row for row in self._unknown if self._tries[row] < ATTEMPTS])
        good = (score <= self._learner.limit) & ~raised
        rows, score = rows[good], score[good]
        if len(rows):
            deviation = self._learner.deviation[rows]
            values = self._values_of(rows)
            self._table.add(rows, values, deviation, score, exact=False)
            self._forget_reasons(rows)
            if self._parts is not None:
                self._parts.add(rows.tolist())
            self._on_rows(rows, values, False)

    def _scores(self, rows: Int[np.ndarray, " some"]) -> Float[np.ndarray, " some"]:
        """Return the scores of rows; those that straggle are compared with others that did."""
        late = self._late_rows()[rows] | (self._tries[rows] > 0)
        learner = self._learner
        return np.where(late, learner.score(rows, late=True), learner.score(rows))

    def _values_of(self, rows: Int[np.ndarray, " some"]) -> Float[np.ndarray, "some ..."]:
        """Return the predictions of rows, in the shape and dtype of the function's values."""
        assert self._learner.mean is not None
        assert self._table.predictions is not None
        shape = self._table.predictions.shape[1:]
        return self._learner.mean[rows].reshape(-1, *shape).astype(self._table.predictions.dtype)

    # What there is.

    def _progress(self) -> RowProgress:
        exact, done = int(self._table.exact.sum()), int(self._table.done.sum())
        seconds = time.monotonic() - self._begin
        known = self._known & ~self._table.done
        if self._settings.compute == "all":
            known[:] = False
        late = sum(len(call.rows) for call in self._calls.values() if call.late and not call.copy)
        return RowProgress(
            rows=len(self._table),
            computed=exact,
            predicted=done - exact + int(known.sum()),
            unknown=len(self._unknown),
            late=late,
            workers=self._pool.num_workers - self._pool.report().starting,
            seconds=seconds,
            rows_per_second=self._computed / max(seconds, 1e-9),
        )

    def _result(self, kept: dict[str, Any], stopped: str | None) -> RowResult:
        table, report = self._table, self._pool.report()
        status = np.array(["waiting", "predicted", "computed"])[
            table.done.astype(int) + table.exact
        ]
        values, deviation, score = table.predictions, table.deviation.copy(), table.score.copy()
        if stopped is None:
            # The job's deadline, or its number of calls: the bar is larger than the tolerance.
            rows = np.flatnonzero(~table.done)
            rows = rows[~np.isin(rows, [*self._unknown])]
            found = self._scores(rows)
            if values is not None and np.isfinite(found).any():
                values, known = values.copy(), rows[np.isfinite(found)]
                values[known] = self._values_of(known)
                deviation[known] = self._learner.deviation[known]
                score[known] = found[np.isfinite(found)]
            why = "deadline" if time.monotonic() >= self._ends_at else "last call"
            why = np.full(len(rows), f"not computed before the job's {why}", object)
            if self._checks is not None:
                why[self._checks.in_doubt(rows)] = "its answers differ, or one looked wrong"
            self._unknown |= {
                row: reason + (f"; its error bar is {bar:.3g}" if np.isfinite(bar) else "")
                for row, reason, bar in zip(rows.tolist(), why, found.tolist(), strict=True)
            }
        status[[*self._unknown]] = "unknown"
        return RowResult(
            values,
            status,
            deviation,
            score,
            dict(sorted(self._unknown.items())),
            kept | self._counts(report),
            report,
            stopped,
            self._learner.fitted,
        )

    def _counts(self, report: PoolReport) -> dict[str, Any]:
        table, progress, fitted = self._table, self._progress(), self._learner.fitted
        finite = 0 if table.predictions is None else len(table.learnable)
        predicted, bars = table.done & ~table.exact, self._settings.tolerance is not None
        number = int(predicted.sum())
        audited, late = self._learner.held(late=False), self._learner.held(late=True)
        speed = max(progress.rows_per_second, 1e-9)
        return {
            "rows_done": progress.computed + number,
            "seconds": progress.seconds,
            "seconds_if_all_were_computed": progress.seconds + number / speed,
            "rows_per_second": progress.rows_per_second,
            "computed": progress.computed,
            "not_finite": progress.computed - finite,
            "predicted": number,
            "largest_bar": float(table.score[predicted].max()) if bars and number else None,
            "learned_from": None if fitted is None else fitted.pairs,
            "audited": audited[1],
            "audited_held": audited[0],
            "came_late": late[1],
            "came_late_held": late[0],
            **pool_counts(report),
            "unknown": progress.unknown,
            **({} if self._checks is None else self._checks.counts()),
        }
