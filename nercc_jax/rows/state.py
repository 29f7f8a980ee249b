"""The state of a run over rows: events in, instructions out; no thread, clock, pool or file.

A row is in one state at a time:

| state | event | next state |
|---|---|---|
| WAITING, AGAIN | it is sent to a worker | SENT |
| SENT | its call has no answer in time | AGAIN, with fewer others; FAILED after three attempts |
| SENT | the function raised on its call | AGAIN, with fewer others; FAILED if it was alone |
| all but COMPUTED | its answer came, however late | COMPUTED; AGAIN if the answer is in doubt |
| COMPUTED | its answer is doubted later | AGAIN, until other workers have answered |
| all but COMPUTED, PREDICTED | the run ends, and the row is known well enough | PREDICTED |
| WAITING, AGAIN, SENT | the run ends, and it is not | FAILED |

Only the call that a row was sent in last takes it out of SENT where it fails: others were given up,
or are copies. Rows that are known well enough stay WAITING, and are left out of the queue. Once the
run is over, answers change no row: they judge the error bars of what was not waited for.

Workers are kept busy, row after row: no row waits for others. Once a learner has been fitted to
what came, rows that it knows well enough need not be computed, and those that it knows least go
next. Some are computed all the same, drawn at random (`audit`): they judge its error bars.
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
from ._evidence import NEWS, Evidence, Learned
from ._interface import ATTEMPTS, RowSettings
from ._queue import RowQueue
from ._table import AGAIN, COMPUTED, FAILED, PREDICTED, SENT, WAITING, RowTable


class Answered(NamedTuple):
    """A worker's values for the rows of a call; `late` by the pool's rule.

    Calls of that size take `usual` seconds.
    """

    call: int
    worker: int
    values: Float[np.ndarray, "rows ..."]
    late: bool
    usual: float


class Failed(NamedTuple):
    """A call that will have no answer, since the function `raised`, or its workers died."""

    call: int
    why: str
    raised: bool


class Tick(NamedTuple):
    """A look at clock, pool and learner.

    Attributes:
        now: Seconds since the run began.
        report: Of the pool.
        ages: Of each call, the seconds for which its worker has had it (0: none has it), and
            whether that is longer than the pool's rule for overdue tasks.
        learning: Whether the learner is at work, or rests.
        fit_seconds: The seconds that the last task took.
    """

    now: float
    report: PoolReport
    ages: Mapping[int, tuple[float, bool]] = {}
    learning: bool = False
    fit_seconds: float = 0.5


class Estimated(NamedTuple):
    """An estimate of the statistic that the run is for, from all rows so far.

    Attributes:
        estimate: The estimate.
        short: Whether its interval is short enough.
    """

    estimate: EnsembleEstimate
    short: bool


Event: TypeAlias = Answered | Estimated | Failed | Learned | Tick


@dataclasses.dataclass
class Send:
    """Send rows to a worker; then the state of this call, until it is `Answered` or `Failed`.

    Attributes:
        call: Its number.
        rows: The rows.
        size: The rows of the call, which is filled up with its own once more.
        avoid: Workers that must not get it.
        copy: Whether it has the rows of another call, which is late.
        copied: Whether it has a copy.
        given_up: Whether its rows were sent again after the deadline, or are lost.
        age: The seconds for which its worker has had it.
        late: Whether that is longer than usual.
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
    """Have rows written, and give their values to the caller.

    `computed` is None where they have no values any more, which is written only.
    """

    rows: Int[np.ndarray, " few"]
    computed: bool | None


class Fence(NamedTuple):
    """Send these workers nothing more."""

    workers: frozenset[int]


class Learn(NamedTuple):
    """Do this work, beside all else; what it returns is an event."""

    work: Callable[[], Learned | None]


Instruction: TypeAlias = Send | Give | Fence | Learn


class RowState:
    """All that is known of a run over rows: `handle` takes an event, and says what is to be done.

    Args:
        settings: The run's settings.
        x: The inputs of all rows.
        table: What an earlier run had, if there was one.
        report: Of the pool.
        worker_dtype: The dtype that its workers compute in.

    Attributes:
        calls: Those under way, by number.
        evidence: The latest estimates, and how far these are off.
        checks: The doubts about answers, if they are checked.
        queue: What is sent next.
        seen: The last look.
        computed: The number of rows that this run has had computed.
        estimated: The latest estimate of the statistic, if the run goes on until it is known.
        over: Whether the run has ended.

    Raises:
        ValueError: If answers are to be checked, and there are too few workers.
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
        # That number when the learner was last offered what came (an earlier run's rows are news),
        # and when values that were unchecked were last looked at.
        self._offered, self._looked_at = -len(table.all_in(COMPUTED)), -1
        self.estimated: EnsembleEstimate | None = None
        self._todo: list[Instruction] = []
        self._row_bytes, self._sent, self._idle = x[0].nbytes, 0, 0  # of calls, and idle workers
        order = np.random.default_rng(settings.seed).permutation(len(x))
        # The first rows and some of the others, all at random, judge the learner's error bars.
        table["audit"][order[: first_rows(len(x))]] = table["audit"][order[::20]] = True
        self.queue = RowQueue(table, order, report.num_workers, settings)

    def handle(self, event: Event) -> list[Instruction]:
        """Take an event, and return what is to be done, in that order.

        Raises:
            RuntimeError: If the function raises on all of the first rows.
            ValueError: If it gives what the accuracy does not fit.
        """
        self._todo, table = [], self.table
        if isinstance(event, Answered | Failed):
            call = self.calls.pop(event.call)
            table["overdue"][call.rows] = False
            if isinstance(event, Answered):
                self._take(event, call)
            elif not self.over:
                fail_call(self.table, self.queue, call, event.why, event.raised)
        elif isinstance(event, Tick):
            self.seen, self._idle = event, event.report.idle
            if not self.over:
                self._look(event)
        elif isinstance(event, Estimated):
            self.estimated = event.estimate
            if event.short and not self.over:
                self._end("since the statistic was known well enough")
        elif not self.over and self.evidence.take(event) and self.checks is not None:
            # Values from before there was a check are taken back where they look wrong.
            self._take_back(self.checks.doubt(self.evidence.look_back()))
        if self.over:
            return self._todo
        if isinstance(event, Estimated | Learned) and self.evidence.fit is not None:
            self.queue.refill(self.evidence, self.estimated, self.computed)
        report, out = self.seen.report, sum(not call.given_up for call in self.calls.values())
        # Two for each worker, so that none waits for the next; one where calls are about to grow.
        # And one for each that is idle, since it may be a new one.
        ahead = 2 if self.queue.timed else 1
        for _ in range(max(ahead * (report.num_workers - report.starting) - out, self._idle)):
            if not len(rows := self.queue.take()):
                break
            table["state"][rows], table["main"][rows] = SENT, self._sent
            self._send(rows)
        return self._todo

    def _send(self, rows: Int[np.ndarray, " few"], copy: bool = False) -> None:
        """Send rows to a worker, which gets some of them twice where that makes fewer shapes."""
        size = 1 << (len(rows) - 1).bit_length()
        size = min(size, self.settings.rows_per_call or size)
        avoid = frozenset() if self.checks is None else self.checks.avoid(rows)
        self.calls[self._sent] = Send(self._sent, rows, size, avoid, copy)
        self._todo.append(self.calls[self._sent])
        self._sent += 1
        self._idle = max(self._idle - 1, 0)

    def _take(self, event: Answered, call: Send) -> None:
        """Take a worker's values, or let them judge error bars where the run is over."""
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
            for row in rows[~given].tolist():  # that were given up
                table.reasons.pop(row, None)
            self.queue.send_again(rows[~given])
            rows, values, vectors = rows[given], values[given], vectors[given]
        if len(rows):
            late = event.late or call.given_up or call.copy  # a copy is that of a late call
            table["late"][rows] = late
            self.evidence.compare(rows, values.reshape(len(rows), -1), late)
            table.put(rows, values, 0.0, COMPUTED)
            self.computed += len(rows)
            self._todo.append(Give(rows, computed=True))
            self.queue.observe(call.size, event.usual, self._row_bytes + values[0].nbytes)
        return self._review()

    def _look(self, tick: Tick) -> None:
        """Give up calls after their deadline, learn, end when all is done, or copy late calls."""
        overdue, limit, settings = self.table["overdue"], self.settings.deadline, self.settings
        overdue[:] = False
        for number, (age, late) in tick.ages.items():
            call = self.calls[number]
            call.age, call.late = age, late
            if age > limit and not call.given_up:
                call.given_up = True  # an answer that still comes is welcome
                fail_call(
                    self.table, self.queue, call, f"no answer within {limit:g} s", raised=False
                )
            overdue[call.rows] |= late or call.given_up
        self._review()

        # Learn what came, if that takes no longer than to compute the rows that wait, at the speed
        # so far, and calls that last as long again as they have lasted. The speed of the first
        # second, while calls still grow, is not that of what follows.
        until_end = (settings.job_deadline or math.inf) - tick.now
        hurry = until_end < 3 * tick.fit_seconds
        news = self.computed - self._offered >= NEWS or (hurry and self.evidence.fit is None)
        needed = self.table.values is not None and (settings.tolerance != 0 or self.checks)
        if needed and news and not tick.learning:
            oldest = max((call.age for call in self.calls.values()), default=0.0)
            left = len(self.queue.waiting) * tick.now / max(self.computed, 1)
            known = self.queue.timed or tick.now >= 1.0 or self._offered < 0
            if self.queue.spent or (known and max(left, oldest) > min(tick.fit_seconds, until_end)):
                self._learn(hurry)

        if until_end <= 0:
            return self._end("before the job's deadline")
        if self.queue.empty and self._finished():
            return self._end("before the job's last call")
        # Late calls go once more, to workers that would be idle. Copies may be as slow as what they
        # copy. So before other rows go only those of a run for a statistic whose interval comes
        # from late rows, on a quarter of the workers.
        late_first = self.estimated is not None and self.estimated.from_late > 0.5
        first = max(tick.report.num_workers // 4, 1) if late_first else 0
        first -= sum(call.copy and not call.given_up for call in self.calls.values())
        for call in sorted(self.calls.values(), key=lambda call: -call.age):
            rows = call.rows[self.table["state"][call.rows] < PREDICTED]
            may = first > 0 or (self.queue.empty and self._idle > 0)
            elsewhere = call.copy or call.given_up or call.copied  # its rows are in another call
            if may and call.late and not elsewhere and len(rows):
                call.copied, first = True, first - 1
                self._send(rows, copy=True)
        return None

    def _learn(self, hurry: bool) -> None:
        """Have the learner learn all that came, if there is enough of it."""
        self._offered = self.computed
        if (work := self.evidence.task(hurry=hurry)) is not None:
            self.seen = self.seen._replace(learning=True)
            self._todo.append(Learn(work))

    def _review(self) -> None:
        """Have workers fenced that answer wrongly, and take back what is in doubt by now."""
        if self.checks is not None:
            fenced, (rows, accused) = self.checks.fenced, self.checks.review(self.seen.report)
            if self.checks.fenced != fenced:
                self._todo.append(Fence(self.checks.fenced))
            if accused:
                self.evidence.distrust()
            self._take_back(rows)

    def _take_back(self, rows: Int[np.ndarray, " few"]) -> None:
        """Treat rows in doubt as if they had no values, until other workers have computed them."""
        if len(rows):
            self.table.put(rows, np.nan, np.inf, AGAIN)
            self.evidence.forget(rows)
            self.queue.send_again(rows)
            self._todo.append(Give(rows, computed=None))

    def _finished(self) -> bool:
        """Return whether no row is to be waited for, now that none may be sent.

        Rows wait to be sent if they were known well enough before, and are not now, since an audit
        has shown that bars were too short.
        """
        evidence, table, queue = self.evidence, self.table, self.queue
        self.queue.refill(self.evidence, self.estimated, self.computed)
        if self.estimated is not None and not (queue.spent or len(queue.waiting)):
            rows = table.all_in(WAITING)  # not yet short enough: more are drawn
            queue.waiting = np.random.default_rng(self.computed).permutation(rows)[:NEWS]
            table["audit"][queue.waiting], table["known"][queue.waiting] = True, False
        rows = table.all_in(SENT)
        if not queue.empty or (len(rows) and (self.estimated is not None or evidence.fit is None)):
            return False
        # A call that is not late has its answer soon, which is better than a prediction; and audits
        # are computed, however late they are.
        late = [call.rows for call in self.calls.values() if call.late]
        good = np.isin(rows, np.concatenate([[], *late]))
        good &= evidence.score(rows, late=True) <= evidence.limit if len(rows) else True
        good &= ~(table["audit"][rows] & (self.settings.compute == "needed"))
        if not good.all():
            return False
        if self.seen.learning:  # of rows that may not be computed, nothing else can be known
            return self.checks is None and not (queue.spent and len(table.open))
        # Values that came before there was a check are looked at, once, and what was learned from
        # rows that were taken back is learned again.
        unchecked = (table["state"] == COMPUTED) & ~table["checked"]
        if (
            self.checks is not None
            and table.values is not None
            and self._looked_at != self.computed
        ):
            self._looked_at = self.computed
            if unchecked.any() or (not evidence.due and len(table.open)):
                self._learn(hurry=True)
        return not self.seen.learning

    def _end(self, why: str) -> None:
        """End the run: predict rows that are known well enough, and say why others are not."""
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
    """Sort out the rows of a call that has no answer, or one that cannot be used.

    A row on which the function raises, or that hangs, must not take those with it that share its
    calls: they go again in smaller ones, and the last attempt is each row's own.

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
    """Return how many of so many rows are computed before anything is learned, within limits."""
    return min(max(number // 10, 100), 256, number)
