"""The state of a run over rows: events in, instructions out; no thread, clock, pool or file.

A row is in one state at a time:

| state | event | next state |
|---|---|---|
| WAITING, AGAIN | it is sent to a worker | SENT |
| SENT | its call has no answer in time | AGAIN, with fewer others; FAILED after three attempts |
| SENT | the function raised on its call | AGAIN, in halves; FAILED if it was alone |
| all but COMPUTED | its answer came, however late | COMPUTED; AGAIN if the answer is in doubt |
| COMPUTED | its answer is doubted later | AGAIN, until other workers have answered |
| all but COMPUTED, PREDICTED | the run ends, and the row is known well enough | PREDICTED |
| WAITING, AGAIN, SENT | the run ends, and it is not | FAILED |

While other calls have a row, none of its calls that ends takes it out of SENT. Rows that are known
well enough stay WAITING, and are left out of the queue. Once the run is over, answers change no
row: they judge the error bars of what was not waited for.

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
from ..risk.ensembles import RowEvidence
from ._checks import RowChecks
from ._evidence import NEWS, Evidence
from ._interface import ATTEMPTS, RowProgress, RowSettings
from ._learner import Learned
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
        copies: The number of its own copies.
        given_up: Whether its rows were sent again after the deadline, or are lost.
        age: The seconds for which its worker has had it.
        late: Whether that is longer than usual.
    """

    call: int
    rows: Int[np.ndarray, " few"]
    size: int
    avoid: frozenset[int]
    copy: bool
    copies: int = 0
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
        offered: That number when the learner was last offered what came; negative before, where
            an earlier run had rows computed.
        looked_at: That number when all that was unchecked was last looked at.
        estimated: The latest estimate of the statistic, if the run goes on until it is known.
        over: Whether the run has ended.
        todo: What is to be done.

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
        self.evidence = Evidence(settings, x, table)
        self.checks: RowChecks | None = None
        if settings.check_answers is not None:
            self.checks = RowChecks(table, report.num_workers, settings, worker_dtype)
        self.computed, self.looked_at = 0, -1
        self.offered = -len(table.all_in(COMPUTED))  # an earlier run's are news
        self.estimated: Estimated | None = None
        self.over = False
        self.todo: list[Instruction] = []
        self._input_bytes = x[0].nbytes
        self._sent = 0  # calls
        self._idle = 0  # workers, by the last look and what was sent since
        order = np.random.default_rng(settings.seed).permutation(len(x))
        # Rows that are computed before anything is learned: a tenth, within limits. These and some
        # of the others, all of them at random, judge the learner's error bars.
        self._first = min(max(len(order) // 10, 100), 256)
        table["audit"][np.append(order[: self._first], order[self._first :: 20])] = True
        waiting = order[table["state"][order] == WAITING]
        self.queue = RowQueue(waiting, report.num_workers, settings)

    def handle(self, event: Event) -> list[Instruction]:
        """Take an event, and return what is to be done, in that order.

        Raises:
            RuntimeError: If the function raises on all of the first rows.
            ValueError: If it gives what the accuracy does not fit.
        """
        self.todo = []
        if isinstance(event, Tick):
            self._look(event)
        elif isinstance(event, Learned):
            if not self.over:
                checked = self.evidence.take(event)
                _refill(self)
                if checked and self.checks is not None:
                    # Values from before there was a check are taken back where they look wrong.
                    rows = self.table.unchecked[self.table["estimated"][self.table.unchecked]]
                    wrong, _ = self.evidence.look_wrong(rows, self.table.vectors[rows])
                    self.table["checked"][rows[~wrong]] = True
                    self.take_back(self.checks.doubt(rows[wrong]))
        elif isinstance(event, Estimated):
            self.estimated = event
            if event.short and not self.over:
                _end(self, "since the statistic was known well enough")
            elif not self.over and self.evidence.fit is not None:
                _refill(self)
        else:
            call = self.calls.pop(event.call)
            self.table["overdue"][call.rows] = False
            if not call.copy and not call.given_up:
                self.table["held"][call.rows] -= 1
            if isinstance(event, Answered):
                self._take(event, call)
            elif not self.over:
                self._fail(call, event.why, event.raised)
        if not self.over:
            report, out = self.seen.report, sum(not call.given_up for call in self.calls.values())
            # Two for each worker, so that none waits for the next; one where calls are about to
            # grow. And one for each that is idle, since it may be a new one.
            ahead = 2 if self.queue.timed else 1
            room = max(ahead * (report.num_workers - report.starting) - out, self._idle)
            for _ in range(room):
                rows = self.queue.take(lambda rows: self.table["state"][rows] <= AGAIN)
                if not len(rows):
                    break
                self.table["held"][rows] += 1
                self.table["state"][rows] = SENT
                self._send(rows, copy=False)
        return self.todo

    def _send(self, rows: Int[np.ndarray, " few"], copy: bool) -> None:
        """Send rows to a worker."""
        size = 1 << (len(rows) - 1).bit_length()  # few shapes, for functions that compile
        size = min(size, self.settings.rows_per_call or size)
        avoid = frozenset() if self.checks is None else self.checks.avoid(rows)
        self.calls[self._sent] = Send(self._sent, rows, size, avoid, copy)
        self.todo.append(self.calls[self._sent])
        self._sent += 1
        self._idle = max(self._idle - 1, 0)

    def _take(self, event: Answered, call: Send) -> None:
        """Take a worker's values, or let them judge error bars where the run is over."""
        table, rows, values = self.table, call.rows, event.values[: len(call.rows)]
        if self.over:
            self.evidence.check_bars(rows, values.reshape(len(rows), -1))
            return
        if table.values is not None and values.shape[1:] != table.values.shape[1:]:
            shapes = f"a row came as {values.shape[1:]}, others as {table.values.shape[1:]}"
            self._fail(call, shapes, raised=True)
            return
        fresh = table["state"][rows] != COMPUTED
        rows, values = rows[fresh], values[fresh]
        if self.checks is not None and len(rows):
            looks = self.evidence.look_wrong(rows, values.reshape(len(rows), -1))
            given, values = self.checks.take(event.call, event.worker, rows, values, *looks)
            table.move(rows[~given], AGAIN)
            self.queue.send_again(rows[~given])
            rows, values = rows[given], values[given]
        if len(rows):
            late = event.late or call.given_up or call.copy  # a copy is that of a late call
            table["late"][rows] = late
            self.evidence.compare(rows, values.reshape(len(rows), -1), late)
            table.put(rows, values, 0.0, 0.0, COMPUTED)
            self.computed += len(rows)
            self.todo.append(Give(rows, computed=True))
            self.queue.observe(call.size, event.usual, self._input_bytes + values[0].nbytes)
        self._review()

    def _fail(self, call: Send, why: str, raised: bool) -> None:
        """Sort out the rows of a call that has no answer, or one that cannot be used."""
        table, reasons = self.table, self.table.reasons
        rows = call.rows[(table["state"][call.rows] == SENT) & (table["held"][call.rows] == 0)]
        if raised and len(call.rows) > 1:
            table["state"][rows] = AGAIN
            self.queue.halve(rows)
            return
        table["tries"][rows] += 1
        lost = table["tries"][rows] >= (1 if raised else ATTEMPTS)
        table["state"][rows] = np.where(lost, FAILED, AGAIN)
        # A row that hangs must not take those with it that share its calls: the last attempt is its
        # own, the second is shared with few.
        last = table["tries"][rows] == ATTEMPTS - 1
        self.queue.send_again(rows[~lost & last], 1)
        self.queue.send_again(rows[~lost & ~last], max(len(call.rows) // 8, 1))
        reasons |= dict.fromkeys(rows[lost].tolist(), why)
        if raised and table.values is None and len(reasons) >= min(self._first, len(table.rows)):
            first = f"all of the first {len(reasons)} rows"
            raise RuntimeError(f"the function raises on {first}: {why}")

    def _look(self, tick: Tick) -> None:
        """Give up calls after their deadline, learn, end when all is done, or copy late calls."""
        self.seen, self._idle = tick, tick.report.idle
        if self.over:
            return
        overdue, limit = self.table["overdue"], self.settings.deadline
        for call in self.calls.values():
            overdue[call.rows] = False
        for number, (age, late) in tick.ages.items():
            call = self.calls[number]
            call.age, call.late = age, late
            if age > limit and not call.given_up:
                call.given_up = True  # an answer that still comes is welcome
                if not call.copy:
                    self.table["held"][call.rows] -= 1
                    self._fail(call, f"no answer within {limit:g} s", raised=False)
            overdue[call.rows] |= late or call.given_up
        if self.checks is not None:
            self.checks.look(tick.report)
            self._review()

        _offer_news(self)
        late_first = self.estimated is not None and self.estimated.estimate.from_late > 0.5
        if tick.now >= (self.settings.job_deadline or math.inf):
            _end(self, "before the job's deadline")
        elif _finished(self):
            _end(self, "before the job's last call")
        elif self.queue.empty or late_first:
            # Copies may be as slow as what they copy: before other rows go those on a quarter of
            # the workers only.
            first = max(tick.report.num_workers // 4, 1) if late_first else 0
            first -= sum(call.copy and not call.given_up for call in self.calls.values())
            for call in sorted(self.calls.values(), key=lambda call: -call.age):
                rows = call.rows[self.table["state"][call.rows] < PREDICTED]
                twice = call.late and not (call.copy or call.given_up) and call.copies < 2
                if twice and len(rows) and (first > 0 or (self.queue.empty and self._idle > 0)):
                    call.copies, first = call.copies + 1, first - 1
                    self._send(rows, copy=True)

    def _review(self) -> None:
        """Have workers fenced that answer wrongly, and take back what is in doubt by now."""
        if self.checks is not None:
            fenced, (rows, accused) = self.checks.fenced, self.checks.review()
            if self.checks.fenced != fenced:
                self.todo.append(Fence(self.checks.fenced))
            if accused:
                self.evidence.distrust()
            self.take_back(rows)

    def take_back(self, rows: Int[np.ndarray, " few"]) -> None:
        """Treat rows in doubt as if they had no values, until other workers have computed them."""
        if len(rows):
            self.table.put(rows, np.nan, np.inf, np.inf, AGAIN)
            self.evidence.forget(rows)
            self.queue.send_again(rows)
            self.todo.append(Give(rows, computed=None))

    def progress(self) -> RowProgress:
        """Return the numbers of rows that are computed, predicted and so on."""
        state, report = self.table["state"], self.seen.report
        known = np.count_nonzero(self.table["known"] & (state < PREDICTED))
        late = (call for call in self.calls.values() if call.late and not call.copy)
        return RowProgress(
            rows=len(state),
            computed=int(np.count_nonzero(state == COMPUTED)),
            predicted=int(np.count_nonzero(state == PREDICTED) + known),
            unknown=len(self.table.reasons),
            late=sum(len(call.rows) for call in late),
            workers=report.num_workers - report.starting,
            seconds=self.seen.now,
            rows_per_second=self.computed / max(self.seen.now, 1e-9),
        )

    def row_evidence(self) -> RowEvidence | None:
        """Return all that is known of rows' values, for statistics; None if none is finite."""
        table, mean = self.table, self.evidence.mean
        if table.values is None or not len(table.learnable):
            return None
        computed, audit = table["state"] == COMPUTED, table["audit"].copy()
        late = table.late | ((table["tries"] > 0) & ~computed)
        values, deviation = table.values, table["expected"].copy()
        judged = computed & (audit | late)
        if computed.all():  # nothing is predicted, and nothing need be copied
            return RowEvidence(values, values, deviation, computed, late, audit, judged)
        # A row without a prediction has the mean of all, which is off by their spread.
        known = values[table.learnable]
        predictions = np.broadcast_to(known.mean(axis=0), values.shape).copy()
        estimated = table["estimated"] & np.isfinite(deviation)
        deviation[~estimated] = np.sqrt(np.mean((known - known.mean(axis=0)) ** 2))
        earlier = ~estimated & (table["state"] == PREDICTED)  # by the run that is resumed
        predictions[earlier], deviation[earlier] = values[earlier], table["deviation"][earlier]
        if mean is not None:
            predictions[estimated] = mean[estimated].reshape(-1, *known.shape[1:])
            judged &= estimated
            judged[judged] = self.evidence.tells(np.flatnonzero(judged))
        own = computed.reshape(-1, *[1] * (known.ndim - 1))
        values = np.where(own, values, predictions)
        return RowEvidence(values, predictions, deviation, computed, late, audit, judged)


def _finished(run: RowState) -> bool:
    """Return whether no row is to be waited for, and all values have been looked at."""
    if not _settled(run):
        return False
    earlier = run.evidence.fit is None and len(run.table.all_in(PREDICTED)) > 0  # an earlier run's
    if earlier and run.offered < 0:
        _begin_to_learn(run, hurry=True)
    if run.seen.learning and (earlier or (run.queue.spent and len(run.table.open))):
        return False  # nothing else can be known, or judged, of these
    if run.checks is not None and run.table.values is not None:
        outdated = not run.evidence.due and len(run.table.open) > 0
        news = run.looked_at != run.computed and (len(run.table.unchecked) > 0 or outdated)
        if news and not run.seen.learning:
            run.looked_at = run.computed
            _begin_to_learn(run, hurry=True)
        if run.seen.learning:
            return False
    run.evidence.notice_late()
    return _settled(run)


def _settled(run: RowState) -> bool:
    """Return whether all rows are done or known, as things are; send the doubtful ones."""
    if not run.queue.empty:
        return False
    evidence, table, spent = run.evidence, run.table, run.queue.spent
    # Known well enough before, and now not: an audit has shown that bars were too short.
    _refill(run)
    if run.estimated is not None and not (spent or len(run.queue.waiting)):
        rows = table.all_in(WAITING)  # not yet short enough: more are drawn
        run.queue.waiting = np.random.default_rng(run.computed).permutation(rows)[:NEWS]
        table["audit"][run.queue.waiting], table["known"][run.queue.waiting] = True, False
    rows = table.all_in(SENT)
    if not run.queue.empty or not len(rows):
        return run.queue.empty
    if run.estimated is not None or evidence.fit is None:
        return False
    # A call that is not late has its answer soon, which is better than a prediction; and audits are
    # computed, however late they are.
    late = [call.rows for call in run.calls.values() if call.late]
    good = np.isin(rows, np.concatenate([[], *late]))
    good &= evidence.score(rows, late=True) <= evidence.limit
    return bool((good & ~(table["audit"][rows] & (run.settings.compute == "needed"))).all())


def _refill(run: RowState) -> None:
    """Let those rows wait to be sent that are not known well enough, the least certain first.

    If the run is for a statistic, the rows come first that add most to its interval, known or not.
    Every fourth is drawn at random, so that the errors of ever more predictions are known.
    """
    table, evidence, adds = run.table, run.evidence, None
    rows = table.all_in(WAITING)
    table["known"][:] = False
    if evidence.fit is not None and (run.settings.compute == "needed" or run.queue.empty):
        table["known"][rows] = evidence.score(rows) <= evidence.limit
    wanted = ~table["known"][rows]
    if run.estimated is not None and run.estimated.estimate.uncertainty is not None:
        adds = run.estimated.estimate.uncertainty[rows]
        if (few := np.count_nonzero(table["audit"][rows])) < NEWS // 4:
            drawn = np.random.default_rng(run.computed).permutation(rows)[: NEWS // 4 - few]
            table["audit"][drawn] = True
        wanted |= adds > 0
    wanted |= table["audit"][rows]
    run.queue.waiting = evidence.order(rows[wanted], None if adds is None else adds[wanted])


def _end(run: RowState, why: str) -> None:
    """End the run: predict the rows that are known well enough, and say why others are not."""
    run.over, evidence, table = True, run.evidence, run.table
    evidence.notice_late()
    rows = table.open
    score = evidence.score(rows, table.late[rows] | (table["tries"][rows] > 0))
    failed = table["state"][rows] == FAILED
    good = np.zeros(len(rows), bool)
    if evidence.fit is not None:
        raised = failed & (table["tries"][rows] < ATTEMPTS)
        good = (score <= evidence.limit) & ~raised
    left = ~good & ~failed
    table["state"][rows[left]] = FAILED
    # A prediction with too large a bar is there all the same.
    given = good | (left & np.isfinite(score))
    if given.any():
        assert evidence.mean is not None
        assert table.values is not None
        few, state = rows[given], np.where(good[given], PREDICTED, FAILED)
        values = evidence.mean[few].reshape(-1, *table.values.shape[1:])
        table.put(
            few, values.astype(table.values.dtype), table["expected"][few], score[given], state
        )
    for row, bar in zip(rows[left].tolist(), score[left], strict=True):
        reason = f"not computed {why}"
        if run.checks is not None and run.checks.doubts(row):
            reason = "its answers differ, or one looked wrong"
        barred = f"; its error bar is {bar:.3g}" if np.isfinite(bar) else ""
        table.reasons[row] = reason + barred
    if good.any():
        run.todo.append(Give(rows[good], computed=False))


def _offer_news(run: RowState) -> None:
    """Have the learner learn what came, if it is worth its time."""
    settings, tick = run.settings, run.seen
    if (settings.tolerance == 0 and run.checks is None) or run.table.values is None:
        return
    if settings.max_disagreement is not None and run.table.vectors.shape[1] < 2:
        raise ValueError(
            "max_disagreement is for labels, the largest of several outputs; this function "
            "gives one number: give a tolerance"
        )
    until_end = (settings.job_deadline or math.inf) - tick.now
    hurry = until_end < 3 * tick.fit_seconds
    news = run.computed - run.offered >= NEWS or (hurry and run.evidence.fit is None)
    if tick.learning or not news:
        return
    # How long it takes to compute the rows that wait, at the speed so far, if a call lasts as long
    # again as it has lasted. While calls still grow, the speed is that of what comes next, not of
    # what was: it is not known in the first second.
    speed = max(run.computed / max(tick.now, 1e-9), 1e-9)
    oldest = max((call.age for call in run.calls.values()), default=0.0)
    longer = max(len(run.queue.waiting) / speed, oldest) > min(tick.fit_seconds, until_end)
    known = run.queue.timed or tick.now >= 1.0 or run.offered < 0
    if (known and longer) or run.queue.spent:
        _begin_to_learn(run, hurry)


def _begin_to_learn(run: RowState, hurry: bool) -> None:
    """Have the learner learn all that came, if there is enough of it."""
    run.offered = run.computed
    if (work := run.evidence.task(hurry=hurry)) is not None:
        run.seen = run.seen._replace(learning=True)
        run.todo.append(Learn(work))
