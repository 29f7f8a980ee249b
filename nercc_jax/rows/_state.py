"""The state of a run over rows: events in, instructions out; no thread, clock, pool or file.

A row is in one state at a time:

| state | event | next state |
|---|---|---|
| WAITING, AGAIN | it is sent to a worker | SENT |
| SENT | its call has no answer, or none within the deadline | AGAIN; FAILED after three attempts |
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
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, Int, Shaped

from ..evaluation._criteria import row_errors
from ..pools import PoolReport
from ..risk.ensembles import RowEvidence
from ._checks import RowChecks
from ._evidence import NEWS, Evidence
from ._interface import ATTEMPTS, RowProgress, RowSettings
from ._learner import Learned, LearnerTask
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
    ages: Mapping[int, tuple[float, bool]]
    learning: bool
    fit_seconds: float


class Estimated(NamedTuple):
    """An estimate of the statistic that the run is for, from all rows so far.

    Attributes:
        short: Whether its interval is short enough.
        late: Whether most of the interval comes from late rows.
    """

    short: bool
    late: bool


Event: TypeAlias = Answered | Estimated | Failed | Learned | Tick


class Send(NamedTuple):
    """Send rows to a worker, but to none of those to `avoid`, as many times as fill a `size`."""

    call: int
    rows: Int[np.ndarray, " few"]
    size: int
    avoid: frozenset[int]


class Forget(NamedTuple):
    """Drop a call: its answer was taken, or none will be."""

    call: int


class Give(NamedTuple):
    """Give values to the caller, and have them written."""

    rows: Int[np.ndarray, " few"]
    computed: bool


class Withdraw(NamedTuple):
    """Have it written that rows have no values any more."""

    rows: Int[np.ndarray, " few"]


class Fence(NamedTuple):
    """Send these workers nothing more."""

    workers: frozenset[int]


class Learn(NamedTuple):
    """Carry a task out, beside all else."""

    task: LearnerTask


class Finish(NamedTuple):
    """The run is over."""


Instruction: TypeAlias = Send | Forget | Give | Withdraw | Fence | Learn | Finish


@dataclasses.dataclass
class RowCall:
    """Some rows that one worker computes.

    Attributes:
        rows: The rows.
        size: The rows of the call, which is filled up with its own once more.
        copy: Whether it has the rows of another call, which is late.
        copies: The number of its own copies.
        given_up: Whether its rows were sent again after the deadline, or are lost.
        age: The seconds for which its worker has had it.
        late: Whether that is longer than usual.
    """

    rows: Int[np.ndarray, " few"]
    size: int
    copy: bool
    copies: int = 0
    given_up: bool = False
    age: float = 0.0
    late: bool = False


class RowState:
    """All that is known of a run over rows: `handle` takes an event, and says what is to be done.

    Its table may take what an earlier run had; then it has to `begin`.

    Args:
        settings: The run's settings.
        x: The inputs of all rows.

    Attributes:
        table: All that is known of each row.
        calls: Those under way, by number.
        evidence: The latest estimates, and how far these are off.
        checks: The doubts about answers, if they are checked.
        queue: What is sent next.
        seen: The last look.
        computed: The number of rows that this run has had computed.
        offered: That number when the learner was last offered what came.
        looked_at: That number when all that was unchecked was last looked at.
        estimated: The latest estimate of the statistic, if the run goes on until it is known.
        over: Whether the run has ended.
    """

    checks: RowChecks | None
    queue: RowQueue
    seen: Tick

    def __init__(self, settings: RowSettings, x: Shaped[np.ndarray, "rows ..."]):
        self.settings = settings
        self.table = RowTable(len(x))
        self.calls: dict[int, RowCall] = {}
        self.evidence = Evidence(settings, x, self.table)
        self.computed = self.offered = 0
        self.looked_at = -1
        self.estimated: Estimated | None = None
        self.over = False
        self._input_bytes = x[0].nbytes
        self._sent = 0  # calls
        self._idle = 0  # workers, by the last look and what was sent since
        self._todo: list[Instruction] = []

    def begin(self, report: PoolReport, worker_dtype: str | None = None) -> None:
        """Begin with a pool, whose workers compute in a dtype.

        Raises:
            ValueError: If answers are to be checked, and there are too few workers.
        """
        order = np.random.default_rng(self.settings.seed).permutation(len(self.table.rows))
        # Rows that are computed before anything is learned: a tenth, within limits. These and some
        # of the others, all of them at random, judge the learner's error bars.
        self._first = min(max(len(order) // 10, 100), 256)
        self.table["audit"][np.append(order[: self._first], order[self._first :: 20])] = True
        waiting = order[self.table.state(order) == WAITING]
        self.queue = RowQueue(waiting, report.num_workers, self.settings)
        self.seen = Tick(0.0, report, {}, learning=False, fit_seconds=0.5)
        self.checks, rate = None, self.settings.check_answers
        if rate is not None:
            most = self.settings.max_fenced
            self.checks = RowChecks(self.table, report.num_workers, rate, most, worker_dtype)

    def handle(self, event: Event) -> list[Instruction]:
        """Take an event, and return what is to be done, in that order.

        Raises:
            RuntimeError: If the function raises on all of the first rows.
            ValueError: If it gives what the accuracy does not fit.
        """
        self._todo = []
        if isinstance(event, Tick):
            self._looked(event)
        elif isinstance(event, Learned):
            if not self.over:
                _arrange(self, event)
        elif isinstance(event, Estimated):
            self.estimated = event
            if event.short and not self.over:
                _end(self, "since the statistic was known well enough")
        elif (call := self.calls.pop(event.call, None)) is not None:
            self.do(Forget(event.call))
            self.table["overdue"][call.rows] = False
            if not call.copy and not call.given_up:
                self.table["held"][call.rows] -= 1
            if isinstance(event, Answered):
                self._answered(event, call)
            elif not self.over:
                self._failed(call, event.why, event.raised)
        if not self.over:
            report, out = self.seen.report, sum(not call.given_up for call in self.calls.values())
            # Two for each worker, so that none waits for the next; one where calls are about to
            # grow. And one for each that is idle, since it may be a new one.
            ahead = 2 if self.queue.timed else 1
            room = max(ahead * (report.num_workers - report.starting) - out, self._idle)
            for _ in range(room):
                rows = self.queue.take(lambda rows: self.table.state(rows) <= AGAIN)
                if not len(rows):
                    break
                self.table["held"][rows] += 1
                self.table["state"][rows] = SENT
                self._open(rows, copy=False)
        return self._todo

    def do(self, instruction: Instruction) -> None:
        """Add an instruction to what is to be done."""
        self._todo.append(instruction)

    # Calls.

    def _open(self, rows: Int[np.ndarray, " few"], copy: bool) -> None:
        """Send rows to a worker."""
        size = self.settings.rows_per_call or 1 << (len(rows) - 1).bit_length()
        avoid = frozenset() if self.checks is None else self.checks.avoid(rows)
        self.calls[self._sent] = RowCall(rows, size, copy)
        self.do(Send(self._sent, rows, size, avoid))
        self._sent += 1
        self._idle = max(self._idle - 1, 0)

    def _answered(self, event: Answered, call: RowCall) -> None:
        """Take a worker's values."""
        rows, values = call.rows, event.values[: len(call.rows)]
        if self.over:
            _judge(self, rows, values)
            return
        if self.table.values is not None and values.shape[1:] != self.table.values.shape[1:]:
            shapes = f"a row came as {values.shape[1:]}, others as {self.table.values.shape[1:]}"
            self._failed(call, shapes, raised=True)
            return
        fresh = self.table.state(rows) != COMPUTED
        rows, values = rows[fresh], values[fresh]
        if self.checks is not None and len(rows):
            looks = self.evidence.look_wrong(rows, values.reshape(len(rows), -1))
            given, values = self.checks.take(event.call, event.worker, rows, values, *looks)
            self.table.move(rows[~given], AGAIN)
            self.queue.send_first(rows[~given])
            rows, values = rows[given], values[given]
        if len(rows):
            late = event.late or call.given_up or call.copy  # a copy is that of a late call
            self.table["late"][rows] = late
            self.evidence.compare(rows, values.reshape(len(rows), -1), late)
            self.table.put(rows, values, 0.0, 0.0, COMPUTED)
            self.computed += len(rows)
            self.do(Give(rows, computed=True))
            self.queue.observe(call.size, event.usual, self._input_bytes + values[0].nbytes)
        self._follow_fences()

    def _failed(self, call: RowCall, why: str, raised: bool) -> None:
        """Sort out the rows of a call that has no answer, or one that cannot be used."""
        table, rows, reasons = self.table, call.rows, self.table.reasons
        rows = rows[(table.state(rows) == SENT) & (table["held"][rows] == 0)]
        if not raised:
            table["tries"][rows] += 1
            spent = table["tries"][rows] >= ATTEMPTS
            table["state"][rows] = np.where(spent, FAILED, AGAIN)
            self.queue.send_again(rows[~spent].tolist())
            reasons |= dict.fromkeys(rows[spent].tolist(), why)
        elif len(call.rows) > 1:
            table["state"][rows] = AGAIN
            self.queue.halve(rows)
        else:
            table["tries"][rows] += 1
            table["state"][rows] = FAILED
            reasons |= dict.fromkeys(rows.tolist(), why)
            if table.values is None and len(reasons) >= min(self._first, len(table.rows)):
                first = f"all of the first {len(reasons)} rows"
                raise RuntimeError(f"the function raises on {first}: {why}")

    def _looked(self, tick: Tick) -> None:
        """Give up calls after their deadline, learn, end when all is done, or copy late calls."""
        self.seen, self._idle = tick, tick.report.idle
        if self.over:
            return
        for call in self.calls.values():
            self.table["overdue"][call.rows] = False
        for number, (age, late) in tick.ages.items():
            call = self.calls[number]
            call.age, call.late = age, late
            if age > self.settings.deadline and not call.given_up:
                call.given_up = True  # an answer that still comes is welcome
                if not call.copy:
                    self.table["held"][call.rows] -= 1
                    why = f"no answer within {self.settings.deadline:g} s"
                    self._failed(call, why, raised=False)
            self.table["overdue"][call.rows] |= late or call.given_up
        if self.checks is not None:
            self.checks.look(tick.report)
            self._follow_fences()
        _offer_news(self)
        late_first = self.estimated is not None and self.estimated.late
        if tick.now >= _end_of(self.settings) or _finished(self):
            why = "deadline" if tick.now >= _end_of(self.settings) else "last call"
            _end(self, f"before the job's {why}")
        elif self.queue.empty or late_first:
            calls = sorted(self.calls.values(), key=lambda call: -call.age)
            late_calls = (call for call in calls if call.late and not (call.copy or call.given_up))
            for call in late_calls:
                rows = call.rows[self.table.state(call.rows) < PREDICTED]
                if len(rows) and call.copies < 2 and (late_first or self._idle > 0):
                    call.copies += 1
                    self._open(rows, copy=True)

    def _follow_fences(self) -> None:
        """Have workers fenced that answer wrongly, and take back what is in doubt by now."""
        if self.checks is None:
            return
        fenced = self.checks.fenced
        rows = self.checks.follow_fences()
        if self.checks.fenced != fenced:
            self.do(Fence(self.checks.fenced))
        if rows is not None:
            self.evidence.distrust()
            self.take_back(rows)
        if self.table.values is not None:
            self.take_back(self.checks.doubt_calls())

    def take_back(self, rows: Int[np.ndarray, " few"]) -> None:
        """Treat rows in doubt as if they had no values, until other workers have computed them."""
        if len(rows):
            self.table.take_back(rows)
            self.evidence.forget(rows)
            self.queue.send_first(rows)
            self.do(Withdraw(rows))

    def progress(self) -> RowProgress:
        """Return the numbers of rows that are computed, predicted and so on."""
        count, state = np.bincount(self.table["state"], minlength=COMPUTED + 1), self.table["state"]
        known = np.count_nonzero(self.table["known"] & (state < PREDICTED))
        report, calls = self.seen.report, self.calls.values()
        return RowProgress(
            rows=len(self.table.rows),
            computed=int(count[COMPUTED]),
            predicted=int(count[PREDICTED] + known),
            unknown=len(self.table.reasons),
            late=sum(len(call.rows) for call in calls if call.late and not call.copy),
            workers=report.num_workers - report.starting,
            seconds=self.seen.now,
            rows_per_second=self.computed / max(self.seen.now, 1e-9),
        )

    def row_evidence(self) -> RowEvidence | None:
        """Return all that is known of rows' values, for statistics; None if none is finite."""
        table, mean = self.table, self.evidence.mean
        if table.values is None or not len(table.learnable):
            return None
        computed, deviation = table["state"] == COMPUTED, table["expected"].copy()
        late = table.late | ((table["tries"] > 0) & ~computed)
        judged = computed & (table["audit"] | late)
        if computed.all():  # nothing is predicted, and nothing need be copied
            values = table.values
            return RowEvidence(values, values, deviation, computed, late, table["audit"], judged)
        # A row without a prediction has the mean of all, which is off by their spread.
        known = table.values[table.learnable]
        predictions = np.broadcast_to(known.mean(axis=0), table.values.shape).copy()
        estimated = table["estimated"] & np.isfinite(deviation)
        earlier = ~estimated & (table["state"] == PREDICTED)  # by the run that is resumed
        predictions[earlier], deviation[earlier] = (
            table.values[earlier],
            table["deviation"][earlier],
        )
        deviation[~estimated & ~earlier] = np.sqrt(np.mean((known - known.mean(axis=0)) ** 2))
        if mean is not None:
            predictions[estimated] = mean[estimated].reshape(-1, *known.shape[1:])
            judged &= estimated
            judged[judged] = self.evidence.tells(np.flatnonzero(judged))
        values = predictions.copy()
        values[computed] = table.values[computed]
        audit = table["audit"].copy()
        return RowEvidence(values, predictions, deviation, computed, late, audit, judged)


# When a run is over.


def _end_of(settings: RowSettings) -> float:
    """Return the seconds after which a run is over at the latest."""
    return settings.job_deadline or math.inf


def _finished(run: RowState) -> bool:
    """Return whether no row is to be waited for."""
    if not _settled(run) or _awaits_check(run):
        return False
    run.evidence.notice_late()
    return _settled(run)


def _settled(run: RowState) -> bool:
    """Return whether all rows are done or known, as things are; send the doubtful ones."""
    if not run.queue.empty:
        return False
    rows, evidence = run.table.all_in(WAITING), run.evidence
    if evidence.fit is not None:
        # Known well enough before, and now not: an audit has shown that bars were too short.
        rows = rows[evidence.score(rows) > evidence.limit]
    if not run.queue.spent and len(rows):
        run.queue.waiting = evidence.order(rows)
        return False
    if run.estimated is not None:  # not yet short enough: more are drawn at random
        rows = run.table.all_in(WAITING)
        rows = np.random.default_rng(run.computed).permutation(rows)[:NEWS]
        if not run.queue.spent and len(rows):
            run.table["audit"][rows], run.table["known"][rows] = True, False
            run.queue.waiting = rows
            return False
    rows = run.table.all_in(SENT)
    if not len(rows):
        return True
    # A call that is not late has its answer soon, which is better than a prediction; and audits are
    # computed, however late they are.
    late = [call.rows for call in run.calls.values() if call.late]
    if run.estimated is not None or evidence.fit is None:
        return False
    if not np.isin(rows, np.concatenate([[], *late])).all():
        return False
    good = evidence.score(rows, late=True) <= evidence.limit
    needed = run.table["audit"][rows] & (run.settings.compute == "needed")
    return bool((good & ~needed).all())


def _end(run: RowState, why: str) -> None:
    """End the run: predict the rows that are known well enough, and say why others are not."""
    run.over, evidence, table = True, run.evidence, run.table
    evidence.notice_late()
    rows = table.open
    score = evidence.score(rows, table.late[rows] | (table["tries"][rows] > 0))
    failed = table.state(rows) == FAILED
    good = np.zeros(len(rows), bool)
    if evidence.fit is not None:
        raised = failed & (table["tries"][rows] < ATTEMPTS)
        good = (score <= evidence.limit) & ~raised
    left = ~good & ~failed
    reasons = np.full(len(rows), f"not computed {why}", object)
    if run.checks is not None:
        reasons[run.checks.in_doubt(rows)] = "its answers differ, or one looked wrong"
    # A prediction with too large a bar is there all the same.
    for places, state in ((good, PREDICTED), (left & np.isfinite(score), FAILED)):
        if places.any():
            assert evidence.mean is not None
            assert table.values is not None
            values = evidence.mean[rows[places]].reshape(-1, *table.values.shape[1:])
            values, deviation = values.astype(table.values.dtype), table["expected"][rows[places]]
            table.put(rows[places], values, deviation, score[places], state)
    table["state"][rows[left]] = FAILED
    for row, reason, bar in zip(rows[left].tolist(), reasons[left], score[left], strict=True):
        barred = f"; its error bar is {bar:.3g}" if np.isfinite(bar) else ""
        table.reasons[row] = reason + barred
    if good.any():
        run.do(Give(rows[good], computed=False))
    run.do(Finish())


def _judge(
    run: RowState, rows: Int[np.ndarray, " few"], values: Float[np.ndarray, "few ..."]
) -> None:
    """Judge the error bars of rows by answers that came after the end."""
    table, labels = run.table, run.settings.tolerance is None
    vectors = values.reshape(len(rows), -1)
    barred = table.state(rows) == PREDICTED if labels else np.isfinite(table["score"][rows])
    barred &= (table.state(rows) < COMPUTED) & np.isfinite(vectors).all(axis=1)
    barred &= ~table["late"][rows]  # another answer has judged it
    rows, y = rows[barred], vectors[barred].astype(np.float32)
    if len(rows):
        table["late"][rows] = True
        mean = table.vectors[rows].astype(np.float32)
        if labels:
            held = np.argmax(mean, axis=1) == np.argmax(y, axis=1)
        else:
            held = row_errors(mean, y) <= table["score"][rows]
        run.evidence.late.held += held.tolist()


# What is learned.


def _arrange(run: RowState, learned: Learned) -> None:
    """Take what was learned, and decide which rows are computed, in which order."""
    evidence, table = run.evidence, run.table
    trusted, looks = evidence.take(learned), learned.looks
    rows = table.all_in(WAITING)
    table["known"][:] = False
    if run.settings.compute == "needed":
        table["known"][rows] = known = evidence.score(rows) <= evidence.limit
        rows = rows[~known | table["audit"][rows]]
    run.queue.waiting = evidence.order(rows)
    if trusted and looks is not None and run.checks is not None:
        still = (table.state(looks.rows) == COMPUTED) & ~table["checked"][looks.rows]
        rows, found = looks.rows[still], (looks.looks_wrong[still], looks.residuals[still])
        # Taken back is what is found to look wrong among earlier values.
        run.take_back(run.checks.recheck(rows, *found))


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
    until_end = _end_of(settings) - tick.now
    hurry = until_end < 3 * tick.fit_seconds
    news = run.computed - run.offered >= NEWS or (hurry and run.evidence.fit is None)
    if tick.learning or not news:
        return
    # How long it takes to compute the rows that wait, at the speed so far, if a call lasts as long
    # again as it has lasted. While calls still grow, the speed is that of what comes next, not of
    # what was: it is not known in the first second.
    if run.queue.timed or tick.now >= 1.0:
        speed = max(run.computed / max(tick.now, 1e-9), 1e-9)
        oldest = max((call.age for call in run.calls.values()), default=0.0)
        if max(len(run.queue.waiting) / speed, oldest) > min(tick.fit_seconds, until_end):
            _begin_to_learn(run, hurry)


def _begin_to_learn(run: RowState, hurry: bool) -> None:
    """Have the learner learn all that came, if there is enough of it."""
    run.offered = run.computed
    task = run.evidence.task(hurry=hurry)
    if task is not None:
        run.seen = run.seen._replace(learning=True)
        run.do(Learn(task))


def _awaits_check(run: RowState) -> bool:
    """Return whether values are still to be looked at, and see to it that they are."""
    if run.checks is None or run.table.values is None:
        return False
    outdated = not run.evidence.due and len(run.table.open) > 0
    news = run.looked_at != run.computed and (len(run.table.unchecked) > 0 or outdated)
    if news and not run.seen.learning:
        run.looked_at = run.computed
        _begin_to_learn(run, hurry=True)
    return run.seen.learning
