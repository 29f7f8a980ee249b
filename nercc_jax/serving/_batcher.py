"""Queries from many callers, coded in groups before a pool of workers, each answered by itself.

The queue is worked off by one thread. It sends nothing that would only wait at the pool: while all
workers are busy, queries queue here, and go out in larger batches once a worker is free. A query of
a systematic code (see `_coder.py`) goes out as it came and is answered exactly, unless its worker
straggles; then it is decoded from what its group's other workers answered, or, where that is not
good enough, sent again. Of any other code a group is sent when it is full. What goes out together
is arranged so that queries beside each other are alike; nothing waits for that.
"""

import collections
import concurrent.futures
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Shaped

from ..inference import warn_if_other
from ..pools import AbstractPool, AnswerTimes, Refuse, refuse_odd
from ._agenda import Agenda
from ._arrangement import Arranger
from ._coder import Coder
from ._controller import controller_of
from ._fidelity import Fidelity
from ._foresight import Foresight
from ._group import Group, Guess
from ._health import Health, health_of_pool
from ._lanes import Lanes
from ._ledger import Ledger
from ._policy import MAX_DEADLINE_S, BatchingPolicy, Measure
from ._predictor import Predictor
from ._record import Record
from ._request import (
    Answer,
    DeadlineExceeded,
    InferenceFailed,
    Reply,
    Request,
    ServerClosing,
    words_of,
)
from ._rescue import Rescue
from ._rows import CODED, Rows
from ._sender import Sender
from ._tutor import Tutor

_LOG = logging.getLogger(__name__)

# Groups that may be kept after their queries are answered, to hear what their stragglers say, and
# for how many median answer times (but at least a second).
_LINGERING, _LINGER = 256, 20
_QUESTION = 5.0  # seconds that a question of its own may take
_NUDGE = object()


class CodedBatcher:
    """Serves single queries, and requests of several, by one code on one pool.

    `submit` may be called from any thread. Use it as a context manager, or `close` it; the pool is
    its caller's, who must not give it to another batcher, and must keep it open until then.
    """

    def __init__(
        self,
        pool: AbstractPool,
        coder: Coder,
        shape: Sequence[int],
        outputs: Sequence[int],
        *,
        dtypes: tuple[DTypeLike, DTypeLike] = (np.float32, np.float32),
        policy: BatchingPolicy | None = None,
        fidelity: Fidelity | None = None,
        predictor: Predictor | None = None,
        refuse: Refuse = refuse_odd,
        observe: Callable[[Measure, float], Any] | None = None,
    ):
        """Compiles what it needs for every batch size, and starts.

        `shape` is that of one query, `outputs` that of its answer, `dtypes` are theirs: others than
        float32 cannot be coded. `observe(what, number)` is told of all that happens; it must be
        quick. `fidelity` may be calibrated beforehand; the batcher goes on with it. A `predictor`
        answers queries from what is known beside their groups; what is wrong of both together
        stays below the policy's `max_disagreement`.

        Raises: ValueError for a policy, or dtypes, that do not fit the code or the predictor.
        """
        self._queries = Rows(tuple(shape), np.dtype(dtypes[0]))
        self._answers = Rows(tuple(outputs), np.dtype(dtypes[1]))
        if coder.num_data > 1 and {self._queries.dtype, self._answers.dtype} != {CODED}:
            raise ValueError(
                f"queries are {self._queries.dtype} and answers {self._answers.dtype}: only "
                "float32 can be coded, so give a Coder(Uncoded(1))"
            )
        self.policy = policy = policy or BatchingPolicy()
        self._pool, self._clock = pool, pool.clock
        observe = observe or (lambda what, number: None)
        self.controller = controller_of(policy, coder, pool, predictor, observe)
        self._observe = self.controller.observe
        self._coder = coder
        self.fidelity = fidelity or Fidelity(coder)
        warn_if_other("the fidelity", self.fidelity.conditions, pool.conditions)
        ordered = policy.ordering and coder.curved
        arranger = Arranger(coder, shape, policy.max_batch_size) if ordered else None
        self._tutor = Tutor(self.fidelity, self._observe, pool.clock)
        self._predictor = predictor
        share = policy.shared_by(coder.guesses + (predictor is not None))
        rows = self._queries, self._answers
        foresight = Foresight(predictor, coder, share, rows, self._observe, pool.clock)
        self._rescue = Rescue(coder, share, self._tutor, foresight, self._observe, pool.clock)
        self._compile(arranger)
        self._lanes = Lanes(policy.max_queue_size)
        self._ledger = Ledger(self._lanes, self._observe, pool.clock)
        self._inbox: collections.deque[Any] = collections.deque()
        self._times = AnswerTimes(self.controller.setting.overdue)
        self._sender = Sender(
            pool,
            coder,
            self._lanes,
            arranger,
            policy=policy,
            hungry=self._tutor.hungry,
            foresight=foresight,
            enough=self._rescue.enough,
            refuse=refuse,
            setting=self.controller.setting,
            answer_time=lambda: self._times.median(policy.max_batch_size),
            observe=self._observe,
            tell=self._tell_of,
        )
        self._agenda = Agenda()
        self._nudged = False
        self._turns = pool.clock.turns("nercc-batcher", self._run)
        beside = self._tutor, self.controller, predictor
        self._beside = [each for each in beside if each is not None]
        for each in self._beside:
            each.start()
        pool.on_idle(self._nudge)
        self._turns.start()

    # What callers see.

    def submit(
        self,
        x: Shaped[np.ndarray, "batch ..."],
        *,
        deadline: float | None = None,
        exact: bool = False,
        high: bool = False,
        record: Record | None = None,
    ) -> concurrent.futures.Future[Reply]:
        """Takes B queries, and comes back at once; the future has the `Reply`, or says why not.

        `deadline` is in seconds from now. `exact`: the model's own answers only, hedged if a worker
        straggles. `high`: of high priority, ahead of ordinary queries (`priority_lead_s`).
        `record`: of what becomes of it. Cancelling the future drops what is not sent.

        Raises: ValueError where x is not B finite queries, or the deadline is not positive or more
        than an hour; `QueueFull` and `ServerClosing`; `InferenceFailed` once the batcher is broken.
        The future: `DeadlineExceeded`, `InferenceFailed`, `ServerClosing`.
        """
        x = self._queries.check(x)
        deadline = self.policy.deadline_s if deadline is None else deadline
        if not 0 < deadline <= MAX_DEADLINE_S:
            raise ValueError(
                f"a deadline is a positive number of seconds, {MAX_DEADLINE_S:g} at most, not "
                f"{deadline:g}"
            )
        lead = self.policy.priority_lead_s if high else 0.0
        arrived, values = self._clock.now(), self._answers.zeros(len(x))
        request = Request(x, values, arrived, deadline, exact, lead, record)
        self._ledger.accept(request)
        if high:
            self._observe("high_priority", len(x))
        request.on_cancel(self._put)
        self._put(request)
        return request.future

    @property
    def waiting(self) -> int:
        """Queries that wait to be sent."""
        return self._lanes.waiting

    @property
    def in_flight(self) -> int:
        """Requests that are not answered."""
        return len(self._ledger.open)

    def health(self) -> Health:
        """Whether it is alive, and would answer a query now."""
        trouble = self._ledger.trouble(self._times.median(self.policy.max_batch_size))
        return health_of_pool(self._pool, self._coder) if trouble is None else trouble

    def close(self, drain: float = 0.0) -> None:
        """Takes no more, answers what it has for up to `drain` seconds, and fails the rest."""
        self._ledger.shut()
        self._turns.wake()
        self._ledger.wait(drain)
        self._turns.close()
        for each in self._beside:
            each.close()
        for request in list(self._ledger.open):
            self._ledger.fail(request, ServerClosing("the server shut down before it could answer"))

    def __enter__(self) -> "CodedBatcher":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # From any thread.

    def _put(self, item: Any) -> None:
        self._inbox.append(item)
        self._turns.wake()

    def _nudge(self) -> None:
        """A worker is free."""
        if self.waiting and not self._nudged:
            self._nudged = True
            self._put(_NUDGE)

    def _tell_of(self, group: Group) -> None:
        """Something happened to a group: once, until it is looked at."""
        if not group.heard:
            group.heard = True
            self._put(group)

    def _compile(self, arranger: Arranger | None) -> None:
        """All that coding runs: what compiles later does so at the cost of whoever asks then."""
        if arranger is not None:
            arranger.compile()
        if not self._coder.guesses:
            return  # nothing is ever decoded
        everyone = np.ones(self._coder.num_workers, bool)
        zeros = self._answers.zeros(len(everyone))[:, None]
        self._rescue.predict(zeros, everyone, self._coder.num_data)
        self.fidelity.compile(self._answers.shape, self.policy.max_batch_size)

    def _run(self) -> float:
        """A turn, and when the next one is due."""
        try:
            self._turn()
        except BaseException as error:
            _LOG.exception("the batcher ends")
            self._ledger.break_off(error)
            self._turns.close()
        return min(self._sender.wake, self._agenda.next)

    def _turn(self) -> None:
        for _ in range(len(self._inbox)):  # of what comes meanwhile, the next turn takes care
            item = self._inbox.popleft()
            self._guard(self._take, item, self._clock.now(), owed=item)
        if (setting := self.controller.setting) is not self._sender.setting:
            self._sender.setting, self._times = setting, self._times.under(setting.overdue)
        pulse = self._ledger.pulse
        now = pulse.turn(bool(self._ledger.open))
        self._guard(self._look, now)
        if pulse.asks(now):
            self._guard(self._ask)
        self._guard(self._dispatch, now)
        self._sender.taken.clear()

    def _guard(self, step: Callable[..., None], *args: Any, owed: Any = None) -> None:
        """One step that fails does not end the thread, and whom it concerns is told at once.

        That is `owed`, a group or a request, and what the step had taken from a lane.
        """
        try:
            step(*args)
        except Exception as error:
            _LOG.exception("the batcher's step %s failed", step.__name__)
            self._observe("internal_error", 1)
            requests = {query.request for query in self._sender.taken}
            if isinstance(owed, Group):
                requests |= {query.request for *_, query in owed.open_queries()}
                self._sender.end(owed)
            elif isinstance(owed, Request):
                requests.add(owed)
            for request in requests:
                self._ledger.fail(request, InferenceFailed(f"internal error: {words_of(error)}"))

    def _ask(self) -> None:
        """A question of its own, of zeros: so that it is known when workers answer again."""
        now, zeros = self._clock.now(), (self._queries.zeros(1), self._answers.zeros(1))
        question = Request(*zeros, now, _QUESTION, True)
        if self._ledger.ask(question):
            self._take_request(question, now)

    def _take(self, item: Any, now: float) -> None:
        self._expire(now)  # however long a turn is; and who was told so by others is not answered
        if isinstance(item, Group):
            item.heard = False
            self._hear(item, now)
        elif item is _NUDGE:
            self._nudged = False
        else:
            self._take_request(item, now)

    def _take_request(self, request: Request, now: float) -> None:
        """A request comes, or, a second time, has been cancelled."""
        if not request.queued:
            request.queued = True
            self._lanes.put(request)
            self._agenda.promise(request)
        if request.future.cancelled():
            self._ledger.cancel(request, now)

    def _expire(self, now: float) -> None:
        """Tells those whose deadlines have passed."""
        for request in self._agenda.expired(now, self._ledger.open, self.in_flight):
            why = (
                f"not answered within {request.deadline:g} s: {self.waiting} queries wait, "
                f"{self._pool.idle} of {self._pool.num_workers} workers are idle"
            )
            self._ledger.fail(request, DeadlineExceeded(why))

    def _look(self, now: float) -> None:
        """What is due: deadlines, groups to be completed, stragglers to be given up."""
        self._expire(now)
        for group in self._agenda.due(now):
            self._guard(self._decide, group, now, owed=group)
        filling = self._sender.filling
        if self._ledger.closing and filling is not None:
            self._guard(self._decide, filling, now, owed=filling)

    def _dispatch(self, now: float) -> None:
        # Nothing can have come of them yet.
        for group in self._sender.dispatch(now, at_once=self._ledger.closing):
            self._guard(self._plan, group, now, owed=group)
        for query in self._sender.taken:
            if not query.reexecuted:
                self._rescue.earn()

    # Answers come, or do not.

    def _hear(self, group: Group, now: float) -> None:
        batch = group.batch
        if group.closed or batch is None:
            return
        for point in np.flatnonzero(batch.available & ~group.mask).tolist():
            value = batch.answer(point)
            assert value is not None
            group.hear(point, value, now, batch.workers[point])
            place = int(group.layout.place_of[point])
            # What is coded may have waited for a worker; that tells nothing of how long it took.
            if place >= 0 or not group.coder.systematic:
                self._times.add(len(value), now - float(group.sent_at[point]))
            if place >= 0:
                self._hear_own(group, place, value, now)
        self._decide(group, now)

    def _hear_own(self, group: Group, place: int, value: np.ndarray, now: float) -> None:
        """The model's own answers to one cell's queries."""
        own = group.layout.own[place]
        asked, heard = int(group.sent[own].sum()), int(group.mask[own].sum())
        for row, query in enumerate(group.cells[place].queries):
            guess = group.guessed.pop((place, row), None)
            if guess is not None:
                self._audit(guess.answer, value[row])
            x = query.x if guess is None else guess.x
            if self._predictor is not None and x is not None:
                self._predictor.hear(x, value[row])
            self._ledger.give(query, Answer(value[row], "exact", asked, heard), now)

    def _audit(self, given: Answer, own: np.ndarray) -> None:
        """The model's own answer came after all."""
        if given.way == "predicted":
            assert self._predictor is not None
            right = self._predictor.audit(given, own)
        else:
            right = self.fidelity.audit(given.value, own)
        self._observe("audit_same" if right else "audit_other", 1)

    def _decide(self, group: Group, now: float) -> None:
        """Decodes what is time to decode, sends again what cannot be, ends what is answered."""
        if group is self._sender.filling:
            due = group.began + self.policy.batch_wait_timeout_s
            if now < due and not self._ledger.closing:
                self._plan(group, now)
                return
            self._sender.complete(group, now)
        if group.pending and group.coder is self._sender.alone:
            self._fail_if_lost(group)
        elif group.pending:
            given, again = self._rescue.rescue(group, self._late(group, now))
            for each in given:
                query = group.cells[each.cell].queries[each.row]
                if query.x is not None:
                    group.guessed[each.cell, each.row] = Guess(each.answer, query.x)
                self._observe("expected_disagreement", each.answer.disagreement)
                self._ledger.give(query, each.answer, now)
            self._lanes.put_again(again)
        if not group.pending:
            self._end(group, now)
        if not group.closed:
            self._plan(group, now)

    def _late(self, group: Group, now: float) -> np.ndarray:
        """Coded data points that are not waited for: they straggle, or will have no answer."""
        assert group.batch is not None
        out = group.out
        late = out & (now - group.sent_at >= self._times.limit(group.rows))
        for point in np.flatnonzero(out & ~late).tolist():
            late[point] = group.batch.abandoned(point)
        return late

    def _fail_if_lost(self, group: Group) -> None:
        assert group.batch is not None
        if not group.batch.lost(0):
            return
        reasons = [failure.reason for failure in group.batch.failures]
        told = f"{len(reasons)} workers failed, the last: {reasons[-1]}" if reasons else "no worker"
        for query in group.cells[0].queries:
            if not query.done:
                self._ledger.fail(query.request, InferenceFailed(f"a query got no answer: {told}"))

    def _end(self, group: Group, now: float) -> None:
        """Closes a group whose queries are answered; some are kept, to hear their stragglers."""
        assert group.batch is not None
        if group.coder is self._coder and group.out.any() and now < group.linger_until:
            if math.isinf(group.linger_until) and len(self._sender.groups) < _LINGERING:
                group.batch.suffice()
                median = self._times.median(group.rows)
                group.linger_until = now + max(1.0, _LINGER * median if median < math.inf else 0)
            if group.linger_until < math.inf:
                return
        learns = group.coder is self._coder and self._coder.guesses and self._tutor.curious
        if learns and (lesson := group.lesson()) is not None:
            self._tutor.teach(*lesson)
        self._sender.end(group)

    def _plan(self, group: Group, now: float) -> None:
        """When to look at the group next, should nothing happen."""
        due = math.inf
        if group is self._sender.filling:
            due = group.began + self.policy.batch_wait_timeout_s
        elif group.linger_until < math.inf:
            due = group.linger_until
        elif group.coder is not self._sender.alone:
            ends = group.sent_at[group.out] + self._times.limit(group.rows)
            due = float(np.min(ends[ends > now], initial=math.inf))
        self._agenda.look(group, due, now)
