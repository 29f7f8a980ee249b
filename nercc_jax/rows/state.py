"""The state of a run over rows: events in, instructions out; no thread, clock, pool or file.

A row is in one state at a time:

| state | event | next state |
|---|---|---|
| WAITING, AGAIN | the row is sent to a worker | SENT |
| SENT | its call timed out, or its workers died | AGAIN, in a smaller call; FAILED at attempt 3 |
| SENT | the function raised on its call | AGAIN, in a smaller call; FAILED if it was alone |
| all but COMPUTED | an answer arrived, however late | COMPUTED; AGAIN if the answer looks wrong |
| COMPUTED | its value is doubted later | AGAIN, until other workers have answered |
| all but COMPUTED, PREDICTED | the run ends, and its prediction is accurate enough | PREDICTED |
| WAITING, AGAIN, SENT | the run ends, and its prediction is not | FAILED |

A failed call moves a row out of SENT only if it is the row's main call: the latest one that is not
a copy. Rows that are predicted accurately enough stay WAITING, but leave the queue. After the run
is over, answers change no row; they only test the error bars of rows that were not waited for.

Workers are kept busy: no row waits for others. After a learner has been fitted to computed rows,
rows that it predicts accurately enough need not be computed, and the least certain rows go next.
Some rows, drawn at random (`audit`), are computed in any case, to test the learner's error bars.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, Int, Shaped

from ..pools import PoolReport
from ..risk import EnsembleEstimate
from ._checks import RowChecks
from ._evidence import LEARNING, Evidence, Learned
from ._interface import ATTEMPTS, RowSettings
from ._queue import RowQueue
from ._table import AGAIN, COMPUTED, FAILED, PREDICTED, SENT, WAITING, RowTable


class Answered(NamedTuple):
    """A worker's answer to a call, which was `late` if the pool's rule made it overdue.

    `usual` is the median time of calls of that size, in seconds.
    """

    call: int
    worker: int
    values: Float[np.ndarray, "rows ..."]
    late: bool
    usual: float


class Failed(NamedTuple):
    """A call that failed for good: the function `raised` on it, or its workers died."""

    call: int
    why: str
    raised: bool


class Tick(NamedTuple):
    """A reading of the clock, the pool and the learner, taken at regular intervals.

    Attributes:
        now: Seconds since the run began.
        report: The pool's report.
        ages: By call, the seconds since its latest worker got it (0 if no worker has it), and
            whether the call is overdue by the pool's rule.
        learning: Whether the learner is working, or pausing after its work.
        fit_seconds: The seconds that the learner's last task took.
    """

    now: float
    report: PoolReport
    ages: Mapping[int, tuple[float, bool]] = {}
    learning: bool = False
    fit_seconds: float = 0.5


class Estimated(NamedTuple):
    """A new estimate of the statistic that the caller asked for, from all rows so far.

    Attributes:
        estimate: The estimate.
        short: Whether `stop_when` accepts it, so that the run may end.
    """

    estimate: EnsembleEstimate
    short: bool


Event: TypeAlias = Answered | Estimated | Failed | Learned | Tick


@dataclasses.dataclass
class Send:
    """An instruction to send rows to a worker, and afterwards the record of this in-flight call.

    Attributes:
        call: The call's number.
        rows: The rows.
        size: The batch size of the call; if it exceeds the number of rows, these are repeated.
        avoid: Workers that must not get it.
        copy: Whether it repeats the rows of another in-flight call, which is late.
        copied: Whether another call repeats its rows.
        given_up: Whether it exceeded the deadline, so that its rows were queued again or failed.
        age: The seconds since its latest worker got it.
        late: Whether it is overdue by the pool's rule.
    """

    call: int
    rows: Int[np.ndarray, " few"]
    size: int
    avoid: frozenset[int]
    copy: bool
    copied: bool = False
    given_up: bool = False
    age: float = 0.0
    late: bool = False


class Give(NamedTuple):
    """An instruction to write rows to the folder, and to pass their values to `on_rows`.

    `computed` is None for rows whose values were taken back: these are written, not passed on.
    """

    rows: Int[np.ndarray, " few"]
    computed: bool | None


class Fence(NamedTuple):
    """An instruction to send these workers no more calls."""

    workers: frozenset[int]


class Learn(NamedTuple):
    """An instruction to call `work` on a background thread; a result is an event."""

    work: Callable[[], Learned | None]


Instruction: TypeAlias = Send | Give | Fence | Learn


class RowState:
    """The state machine of a run over rows: `handle` takes an event and returns instructions.

    Args:
        settings: The run's settings.
        x: The inputs of all rows.
        table: The table of rows, with the values of an earlier run if this one resumes it.
        report: The pool's report.
        worker_dtype: The dtype that the workers compute in.

    Attributes:
        calls: The in-flight calls, by number.
        evidence: The latest predictions, and the errors that calibrate their error bars.
        checks: The checks of answers, if `check_answers` is set.
        queue: The rows to send next.
        seen: The latest `Tick`.
        computed: The number of rows that this run has computed.
        estimated: The latest estimate of the statistic, if there is a `stop_when`.
        over: Whether the run has ended.

    Raises:
        ValueError: If answers are to be checked, and there are fewer than three workers.
    """

    def __init__(
        self,
        settings: RowSettings,
        x: Shaped[np.ndarray, "rows ..."],
        table: RowTable,
        report: PoolReport,
        worker_dtype: str | None = None,
    ):
        self.settings, self.table, self.seen = settings, table, Tick(0.0, report)
        self.calls: dict[int, Send] = {}
        self.evidence, self.checks = Evidence(settings, x, table), None
        if settings.check_answers is not None:
            self.checks = RowChecks(table, report.num_workers, settings, worker_dtype)
        self.computed, self.over = 0, False
        # The value of `computed` at the learner's last task (rows of an earlier run count as new),
        # and when values that came before there was a check were last checked.
        self._learned_at, self._checked_at = -len(table.all_in(COMPUTED)), -1
        self.estimated: EnsembleEstimate | None = None
        self._todo: list[Instruction] = []
        self._row_bytes = x[0].nbytes  # of a row's inputs
        self._sent, self._idle = 0, 0  # the numbers of calls sent, and of idle workers
        order = np.random.default_rng(settings.seed).permutation(len(x))
        # The first rows and one in twenty of all, in random order, test the learner's error bars.
        table["audit"][order[: first_rows(len(x))]] = table["audit"][order[::20]] = True
        self.queue = RowQueue(table, order, report.num_workers, settings)

    def handle(self, event: Event) -> list[Instruction]:
        """Handle an event, and return the instructions to carry out, in order.

        Raises:
            RuntimeError: If the function raises on all of the first rows.
            ValueError: If `max_disagreement` is set, and the function returns one number a row.
        """
        self._todo, table = [], self.table
        if isinstance(event, Answered | Failed):
            call = self.calls.pop(event.call)
            table["overdue"][call.rows] = False
            if isinstance(event, Answered):
                self._handle_answer(event, call)
            elif not self.over:
                fail_call(self.table, self.queue, call, event.why, event.raised)
        elif isinstance(event, Tick):
            self.seen, self._idle = event, event.report.idle
            if not self.over:
                self._handle_tick(event)
        elif isinstance(event, Estimated):
            self.estimated = event.estimate
            if event.short and not self.over:
                self._end("since the statistic was known well enough")
        elif not self.over and self.evidence.take(event) and self.checks is not None:
            # The new check may find earlier values wrong, which are then computed again.
            self._take_back(self.checks.doubt(self.evidence.look_back()))
        if self.over:
            return self._todo
        if isinstance(event, Estimated | Learned) and self.evidence.fit is not None:
            self.queue.refill(self.evidence, self.estimated, self.computed)
        report, out = self.seen.report, sum(not call.given_up for call in self.calls.values())
        # Two calls in flight for each worker, so that none waits for its next one; only one while
        # the call size may still grow. And one for each idle worker, which may be a new one.
        ahead = 2 if self.queue.timed else 1
        for _ in range(max(ahead * (report.num_workers - report.starting) - out, self._idle)):
            if not len(rows := self.queue.take()):
                break
            table["state"][rows], table["main"][rows] = SENT, self._sent
            self._send(rows)
        return self._todo

    def _send(self, rows: Int[np.ndarray, " few"], copy: bool = False) -> None:
        """Send rows to a worker, in a batch padded to a power of two: fewer shapes to compile."""
        size = 1 << (len(rows) - 1).bit_length()
        size = min(size, self.settings.rows_per_call or size)
        avoid = frozenset() if self.checks is None else self.checks.avoid(rows)
        self.calls[self._sent] = Send(self._sent, rows, size, avoid, copy)
        self._todo.append(self.calls[self._sent])
        self._sent += 1
        self._idle = max(self._idle - 1, 0)

    def _handle_answer(self, event: Answered, call: Send) -> None:
        """Store a worker's values; after the run is over, only test error bars with them."""
        table, rows, values = self.table, call.rows, event.values[: len(call.rows)]
        vectors = values.reshape(len(rows), -1)
        if self.over:
            return self.evidence.compare(rows, vectors, late=True, over=True)
        if table.values is not None and values.shape[1:] != table.values.shape[1:]:
            why = f"a row came as {values.shape[1:]}, others as {table.values.shape[1:]}"
            return fail_call(table, self.queue, call, why, raised=True)
        if self.settings.max_disagreement is not None and vectors.shape[1] < 2:
            raise ValueError(
                "max_disagreement is for labels, the largest of several outputs; this function "
                "gives one number: give a tolerance"
            )
        given = table["state"][rows] != COMPUTED
        rows, values, vectors = rows[given], values[given], vectors[given]
        if self.checks is not None and len(rows):
            looks = self.evidence.look_wrong(rows, vectors)
            given, values = self.checks.take(event.call, event.worker, rows, values, *looks)
            table["state"][rows[~given]] = AGAIN
            for row in rows[~given].tolist():
                table.reasons.pop(row, None)  # of rows that had failed before
            self.queue.send_again(rows[~given])
            rows, values, vectors = rows[given], values[given], vectors[given]
        if len(rows):
            late = event.late or call.given_up or call.copy  # a copy repeats a late call
            table["late"][rows] = late
            self.evidence.compare(rows, values.reshape(len(rows), -1), late)
            table.put(rows, values, 0.0, COMPUTED)
            self.computed += len(rows)
            self._todo.append(Give(rows, computed=True))
            self.queue.observe(call.size, event.usual, self._row_bytes + values[0].nbytes)
        return self._review()

    def _handle_tick(self, tick: Tick) -> None:
        """Give up calls after their deadline, start the learner, end the run, copy late calls."""
        overdue, limit, settings = self.table["overdue"], self.settings.deadline, self.settings
        overdue[:] = False
        for number, (age, late) in tick.ages.items():
            call = self.calls[number]
            call.age, call.late = age, late
            if age > limit and not call.given_up:
                call.given_up = True  # an answer that still arrives is used
                why = f"no answer within {limit:g} s"
                fail_call(self.table, self.queue, call, why, raised=False)
            overdue[call.rows] |= late or call.given_up
        self._review()

        # Learn, if that takes less time than is left: the time for the waiting rows at the speed so
        # far, or for the oldest call, which is assumed to last twice its present age. In the first
        # second, while the call size still grows, the speed so far does not predict the rest.
        until_end = (settings.job_deadline or math.inf) - tick.now
        hurry = until_end < 3 * tick.fit_seconds
        news = self.computed - self._learned_at >= LEARNING.news
        news |= hurry and self.evidence.fit is None
        needed = self.table.values is not None and (settings.tolerance != 0 or self.checks)
        if needed and news and not tick.learning:
            oldest = max((call.age for call in self.calls.values()), default=0.0)
            left = len(self.queue.waiting) * tick.now / max(self.computed, 1)
            known = self.queue.timed or tick.now >= 1.0 or self._learned_at < 0
            if self.queue.spent or (known and max(left, oldest) > min(tick.fit_seconds, until_end)):
                self._learn(hurry)

        if until_end <= 0 or (self.queue.empty and self._finished()):
            return self._end(f"before the job's {'deadline' if until_end <= 0 else 'last call'}")
        # Late calls are copied once, to workers that would be idle. A copy may be as slow as its
        # original, so copies go before other rows in one case only: if most of a statistic's
        # interval comes from late rows. Then they take at most a quarter of the workers.
        late_first = self.estimated is not None and self.estimated.from_late > 0.5
        first = max(tick.report.num_workers // 4, 1) if late_first else 0
        first -= sum(call.copy and not call.given_up for call in self.calls.values())
        most = max(first, self._idle if self.queue.empty else 0)
        for call in sorted(self.calls.values(), key=lambda call: -call.age):
            rows = call.rows[self.table["state"][call.rows] < PREDICTED]
            elsewhere = call.copy or call.given_up or call.copied  # another call has its rows
            if most > 0 and call.late and not elsewhere and len(rows):
                call.copied, most = True, most - 1
                self._send(rows, copy=True)
        return None

    def _learn(self, hurry: bool) -> None:
        """Start a learner's task on the computed rows, if there are enough new ones."""
        self._learned_at = self.computed
        if (work := self.evidence.task(hurry=hurry)) is not None:
            self.seen = self.seen._replace(learning=True)
            self._todo.append(Learn(work))

    def _review(self) -> None:
        """Fence workers that answer wrongly, and take back the values that are in doubt now."""
        if self.checks is not None:
            fenced, (rows, accused) = self.checks.fenced, self.checks.review(self.seen.report)
            if self.checks.fenced != fenced:
                self._todo.append(Fence(self.checks.fenced))
            if accused:
                self.evidence.distrust()
            self._take_back(rows)

    def _take_back(self, rows: Int[np.ndarray, " few"]) -> None:
        """Discard the values of rows in doubt, and queue these for other workers."""
        if len(rows):
            self.table.put(rows, np.nan, np.inf, AGAIN)
            self.evidence.forget(rows)
            self.queue.send_again(rows)
            self._todo.append(Give(rows, computed=None))

    def _finished(self) -> bool:
        """Return whether the run need not wait for any row, after the queue has run empty.

        The refilled queue may hold rows again: those that were predicted accurately enough before
        an audit showed that the error bars were too short.
        """
        evidence, table, queue, checks = self.evidence, self.table, self.queue, self.checks
        queue.refill(evidence, self.estimated, self.computed)
        if self.estimated is not None and not (queue.spent or len(queue.waiting)):
            rows = table.all_in(WAITING)  # the interval is still too long: draw more rows
            queue.waiting = np.random.default_rng(self.computed).permutation(rows)[: LEARNING.news]
            table["audit"][queue.waiting], table["known"][queue.waiting] = True, False
        rows, late = table.all_in(SENT), [each.rows for each in self.calls.values() if each.late]
        if not queue.empty or (len(rows) and (self.estimated is not None or evidence.fit is None)):
            return False
        # Calls that are not late will answer soon, and an answer is better than a prediction.
        # Audits are waited for, however late they are.
        good = np.isin(rows, np.concatenate([[], *late]))
        good &= evidence.score(rows, late=True) <= evidence.limit if len(rows) else True
        good &= ~(table["audit"][rows] & (self.settings.compute == "needed"))
        if not good.all():
            return False
        if self.seen.learning:  # rows beyond `max_calls` can only be predicted: wait for that
            return checks is None and not (queue.spent and len(table.open))
        # Before the end, check once the values that came before there was a check, and fit the
        # learner again if rows that it learned were taken back.
        if checks is not None and table.values is not None and self._checked_at != self.computed:
            unchecked = (table["state"] == COMPUTED) & ~table["checked"]
            self._checked_at = self.computed
            if unchecked.any() or (not evidence.due and len(table.open)):
                self._learn(hurry=True)
        return not self.seen.learning

    def _end(self, why: str) -> None:
        """End the run: predict rows where that is accurate enough; note why others failed."""
        self.over, rows = True, self.table.open
        good, score = self.evidence.predict(rows)
        for row, bar in zip(rows[~good].tolist(), score[~good].tolist(), strict=True):
            reason = f"not computed {why}"
            if self.checks is not None and row in self.checks.answers:
                reason = "its answers differ, or one looked wrong"
            barred = f"; its error bar is {bar:.3g}" if np.isfinite(bar) else ""
            self.table.reasons.setdefault(row, reason + barred)
        if good.any():
            self._todo.append(Give(rows[good], computed=False))


def fail_call(table: RowTable, queue: RowQueue, call: Send, why: str, raised: bool) -> None:
    """Queue the rows of a failed call again, or mark them FAILED after their last attempt.

    A row on which the function raises or hangs must not fail the rows that share its calls. So they
    are sent again in smaller calls, and in the last attempt each row has a call of its own.

    Raises:
        RuntimeError: If the function raises on all of the first rows.
    """
    rows, reasons = call.rows, table.reasons
    rows = rows[(table["state"][rows] == SENT) & (table["main"][rows] == call.call)]
    alone = raised and len(call.rows) == 1
    table["tries"][rows] += not raised
    lost = alone | (table["tries"][rows] >= ATTEMPTS)
    table["state"][rows] = np.where(lost, FAILED, AGAIN)
    last = table["tries"][rows] == ATTEMPTS - 1
    queue.send_again(rows[~lost & last], 1)
    queue.send_again(rows[~lost & ~last], max(len(call.rows) // 8, 1))
    reasons |= dict.fromkeys(rows[lost].tolist(), why)
    table["raised"][rows] = alone
    if raised and table.values is None and len(reasons) >= first_rows(len(table.rows)):
        raise RuntimeError(f"the function raises on all of the first {len(reasons)} rows: {why}")


def first_rows(number: int) -> int:
    """Return how many of `number` rows are audited first: a tenth of them, from 100 to 256."""
    return min(max(number // 10, 100), 256, number)
