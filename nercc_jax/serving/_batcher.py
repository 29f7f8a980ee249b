"""The batcher: one thread that takes queries from the queue to their replies.

It decides nothing by itself: `_dispatch.py` says which queries go out together, and
`core/_decide.py` what becomes of those whose workers are late. It sends nothing new that would only
wait at the pool: while all workers are busy, queries wait in the queue, and go out in larger
batches once a worker is free.
"""

import concurrent.futures
import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Shaped

from ..pools import AbstractPool
from ..pools.batch import Refuse, refuse_odd
from ._answer_screen import AnswerScreen, Audit, Settled
from ._comparisons import Comparisons
from ._dispatch import Dispatcher
from ._estimates import Estimator, fitting_policy
from ._policy import MAX_DEADLINE_S, BatchingPolicy, Observe
from .adapt._adaptation import Adaptation
from .adapt._decoding import DecodingScores
from .adapt._predictor import Predictor
from .core._coder import Coder
from .core._decide import Copy, Decode, Fail, GiveOut, Place, Predict, Wait, decide
from .core._group import Group, GroupTimers
from .core._health import Health, pool_health
from .core._request import (
    Answer,
    BatchSpec,
    DeadlineExceeded,
    InferenceFailed,
    Query,
    Reply,
    Request,
    ScaleMonitor,
    ServerClosing,
    Source,
)
from .core._requests import EventQueue, OpenRequests, QueryQueue

_LOG = logging.getLogger(__name__)

_PROBE = 5.0  # seconds that a probe may take
_LAST_TURN = 1.0  # seconds for which closing waits for a turn under way


class CodedBatcher:
    """Serves single queries, and requests of several, by one code on one pool.

    A query of a systematic code (`Coder`) goes out as it came and is answered exactly, unless its
    worker straggles; then it is decoded from what its group's other workers answered, or, where
    that is not good enough, sent again. With any other code a group is sent when it is full.

    Use it as a context manager, or `close` it. The pool is the caller's, who must not give it to
    another batcher, and must keep it open until the batcher is closed.

    JAX leaves so many objects that a full garbage collection stops all threads for 60 ms and more.
    A process of your own that serves should call `gc.collect()` and `gc.freeze()` once it has
    compiled; `nercc serve` does.

    Attributes:
        policy: the batching policy.
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
        decoding: DecodingScores | None = None,
        predictor: Predictor | None = None,
        refuse: Refuse = refuse_odd,
        observe: Observe | None = None,
    ):
        """Compile what is needed for every batch size, and start.

        Args:
            pool: the workers.
            coder: the code, made ready for streams.
            shape: the shape of a query.
            outputs: the shape of an answer.
            dtypes: of queries and answers; dtypes other than float32 cannot be coded.
            policy: the batching policy. Where it does not state the outputs, one number a row is a
                value, and several are scores once the model's own answers look like scores.
            decoding: scores of decoded answers (`calibrate_decoding`). Without them, stragglers
                have to show first which decoded answers may be given out.
            predictor: answers queries independently of their groups.
            refuse: tells which answers of workers are not valid.
            observe: called with every measurement, `observe(what, number)`; it must be quick.

        Raises:
            ValueError: for a policy, or dtypes, that do not fit the code or the predictor.
        """
        queries = BatchSpec(tuple(shape), np.dtype(dtypes[0]))
        answers = BatchSpec(tuple(outputs), np.dtype(dtypes[1]))
        policy = fitting_policy(policy or BatchingPolicy(), coder, queries, answers)
        self.policy = policy
        self._adaptation = adaptation = Adaptation(
            pool,
            coder,
            policy,
            decoding or DecodingScores(policy.accuracy),
            predictor,
            observe or (lambda what, number: None),
        )
        self._pool, self._clock, self._coder = pool, pool.clock, coder
        self._queries, self._answers = queries, answers
        self._scales = ScaleMonitor() if coder.num_data > 1 else None
        self._observe = adaptation.observe
        specs = queries, answers
        self._estimator = Estimator(coder, policy, adaptation, self._clock, specs)
        self._queue = QueryQueue(policy.max_queue_size)
        self._open = OpenRequests(self._queue, self._observe, self._clock)
        self._events = EventQueue(self._clock, "nercc-batcher", self._run)
        self._screen = None
        if adaptation.checks is not None and predictor is not None:
            self._screen = AnswerScreen(
                adaptation.checks, predictor.expect, pool, self._events, self._observe
            )
        parts = pool, self._queue, self._events, refuse, coder, policy
        self._dispatcher = Dispatcher(*parts, self._estimator, adaptation)
        self._timers = GroupTimers()
        self._comparisons = Comparisons(pool, adaptation, answers, self._submit_own)
        self._dispatch_due = math.inf
        adaptation.start()
        pool.on_idle(lambda: self._events.wake() if self.waiting else None)
        self._events.start()

    def submit(
        self,
        x: Shaped[np.ndarray, "batch ..."],
        *,
        deadline: float | None = None,
        exact: bool = False,
        high: bool = False,
    ) -> concurrent.futures.Future[Reply]:
        """Submit B queries, from any thread, and return at once.

        Args:
            x: the queries.
            deadline: seconds from now; by default the policy's.
            exact: accept only the model's own answers, hedged if a worker straggles.
            high: high priority, ahead of ordinary queries (`priority_lead_s`).

        Returns:
            A future of the `Reply`. It may raise `DeadlineExceeded`, `InferenceFailed`, or
            `ServerClosing`. Cancelling it drops what has not been sent.

        Raises:
            ValueError: where x is not B finite queries, or the deadline is not positive or more
                than an hour.
            QueueFull: where the queue has no room.
            ServerClosing: while the batcher closes.
            InferenceFailed: once the batcher is broken.
        """
        x = self._queries.check(x)
        deadline = self.policy.deadline_s if deadline is None else deadline
        if not 0 < deadline <= MAX_DEADLINE_S:
            raise ValueError(
                f"a deadline is a positive number of seconds, {MAX_DEADLINE_S:g} at most, not "
                f"{deadline:g}"
            )
        # Queries of another scale travel alone, as those that must be answered exactly.
        exact = exact or (self._scales is not None and self._scales.is_odd(x))
        lead = self.policy.priority_lead_s if high else 0.0
        arrived, values = self._clock.now(), self._answers.zeros(len(x))
        request = Request(x, values, arrived, deadline, exact, lead)
        self._open.accept(request)
        if high:
            self._observe("high_priority", len(x))
        request.on_cancel(self._events.post)
        self._events.post(request)
        return request.future

    @property
    def waiting(self) -> int:
        """The number of queries that wait to be sent."""
        return self._queue.waiting

    @property
    def in_flight(self) -> int:
        """The number of requests without a reply."""
        return len(self._open)

    def health(self) -> Health:
        """Return whether it is alive, and would answer a query now."""
        trouble = self._open.trouble(self._dispatcher.answer_time)
        return pool_health(self._pool, self._coder) if trouble is None else trouble

    def status(self) -> dict[str, Any]:
        """Return what has been learned and measured so far.

        Returns:
            By name, None for what there is not: "policy", the setting picked under `max_calls`, and
            why; "predictor"; "checks" of the model's own answers; "decoding", what stragglers
            showed of decoded answers; "outputs", whether they are read as scores or values, and
            why; "audited", whether the latest decoded answers that were compared had wrong labels,
            or errors beyond their bars.
        """
        return self._adaptation.status()

    def hints(self) -> list[str]:
        """Return why nothing is decoded or predicted, and which workers answer wrongly."""
        return self._adaptation.hints()

    def close(self, drain: float = 0.0) -> None:
        """Accept no more requests, answer for up to `drain` seconds, and fail the rest.

        A turn of the thread that does not end is not waited for.
        """
        self._open.close()
        self._events.wake()
        self._open.wait(drain)
        self._events.close(_LAST_TURN)
        for request in self._open:
            self._open.fail(request, ServerClosing("the server shut down before it could answer"))
        self._adaptation.close()

    def __enter__(self) -> "CodedBatcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The scheduler's thread.

    def _run(self) -> float:
        try:
            self._turn()
        except BaseException as error:
            _LOG.exception("the batcher ends")
            self._open.fail_all(error)
            self._events.close()
        screened = math.inf if self._screen is None else self._screen.next_due
        return min(self._dispatch_due, self._timers.next, self._open.next_deadline, screened)

    def _turn(self) -> None:
        for event in self._events.take():
            self._guard(self._handle, event, self._clock.now(), concerned=event)
        monitor = self._open.monitor
        now = monitor.report_turn(len(self._open) > 0)
        self._guard(self._handle_due, now)
        if monitor.probe_due(now):
            self._guard(self._send_probe)
        self._guard(self._dispatch, now)
        # The workers compute meanwhile.
        while self._screen is not None and self._screen.ahead and not self._events:
            self._guard(self._screen.compute_ahead)

    def _guard(self, step: Callable[..., None], *args: Any, concerned: Any = None) -> None:
        """Run a step. If it fails, fail the requests it concerns instead of the thread.

        Those are `concerned`, a group or a request, and the queries that the step took out of the
        queue.
        """
        try:
            step(*args)
            popped = self._queue.take_popped()
            if popped and self._screen is not None:
                self._screen.expect(popped)
        except Exception as error:
            _LOG.exception("the batcher's step %s failed", step.__name__)
            self._observe("internal_error", 1)
            requests = {query.request for query in self._queue.take_popped()}
            if isinstance(concerned, Group):
                requests |= {query.request for _, query in concerned.open_queries()}
                self._comparisons.discard(concerned)
                self._dispatcher.close(concerned)
            elif isinstance(concerned, Request):
                requests.add(concerned)
            for request in requests:
                why = f"internal error: {error}"
                self._fail(request, InferenceFailed(why, "internal error"))

    def _fail(self, request: Request, error: Exception) -> None:
        for query in request.queries if request.audits else ():
            for each in query.approximate.values():
                self._comparisons.audit(each, None)
            query.approximate = {}
        self._revisit(self._open.fail(request, error))

    def _revisit(self, groups: Sequence[Group]) -> None:
        """Look at groups in the next turn: some of their queries ended elsewhere."""
        for group in groups:
            self._events.post_group(group)

    def _handle(self, event: Any, now: float) -> None:
        # However long a turn is: deadlines come before the answers that were too late for them.
        self._expire(now)
        if isinstance(event, Group):
            event.posted = False
            if not event.closed:
                self._receive(event, now)
        elif isinstance(event, Audit):
            assert self._screen is not None
            self._screen.receive_audit(event)
        else:
            self._enqueue(event, now)

    def _enqueue(self, request: Request, now: float) -> None:
        """Put a request into the queue. The second time that it comes it was cancelled."""
        if not request.queued:
            request.queued = True
            self._queue.add(request)
            self._open.keep_deadline(request)
        if request.future.cancelled():
            self._revisit(self._open.cancel(request, now))

    def _submit_own(self, request: Request, *, audits: bool = True) -> bool:
        """Take a request of the server's own, and return whether; it audits, or is a probe."""
        accepted = self._open.accept_own(request, audits=audits)
        if accepted:
            self._enqueue(request, request.arrived)
        return accepted

    def _send_probe(self) -> None:
        """Send a query of zeros, to notice when workers answer again."""
        now, zeros = self._clock.now(), (self._queries.zeros(1), self._answers.zeros(1))
        self._submit_own(Request(*zeros, now, _PROBE, True), audits=False)

    def _expire(self, now: float) -> None:
        for request in self._open.pop_expired(now):
            why = (
                f"not answered within {request.deadline:g} s: {self.waiting} queries wait, "
                f"{self._pool.idle} of {self._pool.num_workers} workers are idle"
            )
            self._fail(request, DeadlineExceeded(why))

    def _handle_due(self, now: float) -> None:
        """Handle what is due: deadlines, groups to be completed, stragglers."""
        if self._screen is not None:
            self._settle(self._screen.pop_due(now), now)
            self._screen.look(now)
        self._expire(now)
        for group in self._timers.pop_due(now):
            self._guard(self._decide, group, now, concerned=group)
        filling = self._dispatcher.filling
        if self._open.closing and filling is not None:
            self._guard(self._decide, filling, now, concerned=filling)
        if self._screen is not None:  # after all that may have ended a query in this turn
            self._settle(self._screen.release(), now)

    def _dispatch(self, now: float) -> None:
        self._dispatch_due = math.inf
        closing = self._open.closing
        groups, self._dispatch_due = self._dispatcher.dispatch(now, at_once=closing)
        for group in groups:
            due = group.began + self.policy.batch_wait_timeout_s
            if group is not self._dispatcher.filling:
                due = float(np.fmin.reduce(group.sent_at, initial=math.inf))
                due += group.batch.times.limit(group.rows)
            self._timers.set(group, due, now)

    # What workers answer.

    def _receive(self, group: Group, now: float) -> None:
        batch = group.batch
        for point in np.flatnonzero(batch.available & ~group.mask).tolist():
            value = batch.answer(point)
            assert value is not None
            group.add_answer(point, value)
            self._comparisons.learn_late(group, point, value)
            place = int(group.layout.place_of[point])
            if 0 <= place < len(group.cells):
                self._receive_own(group, place, value, batch.workers[point], now)
        self._decide(group, now)

    def _receive_own(
        self, group: Group, place: int, value: np.ndarray, worker: int, now: float
    ) -> None:
        own = group.layout.own[place]
        asked = int((~np.isnan(group.sent_at[own])).sum())
        responded, queries = int(group.mask[own].sum()), group.cells[place].queries
        if self._screen is not None:
            kept, again, settled = self._screen.receive(worker, queries, value)
            self._copy(again, 1, now)
            self._settle(settled, now)
            if len(kept) < len(queries):
                queries, value = [queries[row] for row in kept], value[kept]
        for row, query in enumerate(queries):
            self._comparisons.learn(query, value[row, ...])
        answer = Answer(value, "exact", asked, responded)
        self._revisit(self._open.answer(queries, answer, now))

    def _settle(self, settled: Sequence[Settled], now: float) -> None:
        for query, verdict, suspicious in settled:
            number = max(len(query.candidates), 1)
            if not suspicious:
                self._comparisons.learn(query, verdict.value)
            answer = Answer(verdict.value[None], "exact", number, number, suspicious=suspicious)
            self._revisit(self._open.answer([query], answer, now))

    def _copy(self, queries: Sequence[Query], workers: int, now: float) -> None:
        """Have further workers compute queries that are late, or whose answers look wrong."""
        for query in queries:
            query.reexecuted = True
            self._observe("reexecution", 1)
        self._dispatcher.copy(queries, workers, now)

    # What becomes of a group.

    def _decide(self, group: Group, now: float) -> None:
        """Carry out what is decided about a group's queries, and close it once none is open."""
        if group is self._dispatcher.filling:
            due = group.began + self.policy.batch_wait_timeout_s
            if now < due and not self._open.closing:
                self._timers.set(group, due, now)
                return
            self._dispatcher.complete(group, now)
        for known in group.estimates.values():
            known.pop("decoded", None)  # further answers may have come since
        looked: set[Source] = set()
        while group.pending:
            view, before = group.view(looked), len(looked)
            budget = self._dispatcher.again
            evidence = self._adaptation.evidence(len(group.cells), budget.left)
            for action in decide(view, now, evidence, self.policy, self._estimator.enough):
                match action:
                    case Predict(places):
                        self._estimator.predict(group, places)
                        looked.add("predicted")
                    case Decode(places):
                        self._estimator.decode(group, places)
                        looked.add("decoded")
                    case GiveOut() as given:
                        self._give(group, given, now)
                    case Copy(places, workers):
                        budget.left -= len(places)
                        self._copy([group.query(place) for place in places], workers, now)
                    case Fail(places):
                        self._give_up_queries(group, places, now)
                    case Wait(until):
                        self._timers.set(group, until, now)
            if len(looked) == before:
                late = view.late(now) & (not group.alone)
                self._observe("straggler", int((late & ~group.counted).sum()))
                group.counted |= late
                break
        if not group.pending:
            self._end_group(group, now)

    def _give(self, group: Group, given: GiveOut, now: float) -> None:
        """Give an approximate answer out, which is to be compared with the model's own."""
        place, source, forced = given
        (answer, _), query = group.estimates[place][source], group.query(place)
        risk, record = self._adaptation.risk(source), query.approximate[source]
        disagreement, error = map(float, risk.expected(answer.disagreement, answer.error))
        if answer.error > 0:
            record.widened = error / answer.error
        record.forced = forced
        if forced:
            self._observe("over_budget", 1)
        self._comparisons.give(group, place[0], query, record)
        self._observe("expected_disagreement", disagreement)
        if self.policy.tolerance is not None:
            self._observe("expected_error", error / self.policy.tolerance)
        shown = {"disagreement": disagreement, "error": error, "value": answer.value[None]}
        self._revisit(self._open.answer([query], dataclasses.replace(answer, **shown), now))

    def _give_up_queries(self, group: Group, places: Sequence[Place], now: float) -> None:
        """Fail queries that no worker will answer, or give out the answers that are held back."""
        failures = group.batch.failures
        public = f"a query got no answer: {len(failures) or 'no'} workers failed"
        why = f"{public}, the last: {failures[-1].reason}" if failures else public
        if failures and failures[-1].refused:
            public = why  # the server's own words
        for query in map(group.query, places):
            if self._screen is not None and query.candidates and not query.done:
                self._settle([self._screen.give_up(query)], now)
            elif not query.done:
                self._fail(query.request, InferenceFailed(why, public))

    def _end_group(self, group: Group, now: float) -> None:
        """Close a group without open queries, once all that was given out has been compared."""
        if group.is_copy and group.batch.tasks[0].running:
            group.batch.suffice()  # nothing more is sent; how long the copy takes is of interest
            return
        if group.is_copy and group.mask.all():
            took, limit = now - group.batch.tasks[0].sent, group.batch.times.limit(group.rows)
            if limit < math.inf:
                self._observe("hedge_limits", took / limit)
        for each in [group] if group.alone else self._comparisons.keep(group):
            self._dispatcher.close(each)
