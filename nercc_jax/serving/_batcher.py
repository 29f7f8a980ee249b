"""The batcher: serves requests of one or more queries by one code on one pool of workers.

Its thread, the deciding thread, takes queries from the queue to their replies. `_dispatch.py`
decides which queries are sent together, and `core/decide.py` what happens to queries whose workers
are late; this file carries that out. New queries are not sent to wait at the pool: while all
workers are busy they wait in the queue, and are sent in larger batches once a worker is free.
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

from ..pools import AbstractPool
from ..pools.batch import Refuse, refuse_odd
from ._answer_screen import AnswerScreen
from ._approximate import Approximations
from ._dispatch import Dispatcher
from ._policy import MAX_DEADLINE_S, BatchingPolicy, Observe
from .adapt._decoding import DecodingScores
from .adapt._predictor import Predictor
from .core._coder import Coder
from .core._group import Group, Place
from .core._request import (
    Answer,
    DeadlineExceeded,
    InferenceFailed,
    Query,
    Reply,
    Request,
    ServerClosing,
    Source,
)
from .core._requests import Health, OpenRequests, Timers
from .core._setup import BatchSpec, Setup
from .core.decide import Copy, Decode, Fail, GiveOut, Predict, Wait, decide

_LOG = logging.getLogger(__name__)

# Seconds for which closing waits for a running turn, and for a step of learning.
_LAST_TURN, _LAST_STEP = 1.0, 30.0
_PROBE = 5.0  # the deadline of a probe, in seconds
# Seconds after its due time at which a group is handled, so that its calls are overdue by then.
_MARGIN = 1e-4


class CodedBatcher:
    """A batcher, which serves requests of one or more queries by one code on one pool.

    A query is sent to a worker uncoded and answered exactly, unless the worker straggles. Then it
    is decoded from the answers of its group's other workers, or, if that is not accurate enough,
    sent again.

    Use it as a context manager, or `close` it. The pool belongs to the caller, who must not pass it
    to another batcher, and must keep it open until the batcher is closed.

    JAX keeps so many objects that a full garbage collection stops all threads for 60 ms or more. If
    you serve from your own process, call `gc.collect()` and `gc.freeze()` after compilation, as
    `nercc serve` does.

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
        """Compile the programs for all batch sizes, and start.

        Args:
            pool: the workers.
            coder: the code, prepared for streams of queries.
            shape: the shape of a query.
            outputs: the shape of an answer.
            dtypes: of queries and answers; dtypes other than float32 cannot be coded.
            policy: the batching policy (default: `BatchingPolicy()`).
            decoding: scores of decoded answers (`calibrate_decoding`). Without them, decoded
                answers are returned only if the policy promises no accuracy.
            predictor: a surrogate that answers queries independently of their groups.
            refuse: returns why a worker's answer is not valid, or None.
            observe: called with every measurement, `observe(what, number)`; it must be fast.

        Raises:
            ValueError: if the policy or the dtypes do not fit the code or the predictor.
        """
        queries = BatchSpec(tuple(shape), np.dtype(dtypes[0]))
        answers = BatchSpec(tuple(outputs), np.dtype(dtypes[1]))
        policy, observe = policy or BatchingPolicy(), observe or (lambda what, number: None)
        setup = Setup(pool, coder, policy, queries, answers, refuse, observe)
        setup = setup.checked(predicts=predictor is not None)
        scores = decoding or DecodingScores(policy.accuracy)
        known = Approximations(setup, scores, predictor, lambda own: self._requests.accept_own(own))
        self._approximations, self._setup = known, known.setup
        setup = known.setup
        self.policy, clock = setup.policy, setup.clock
        self._inbox: collections.deque[Request | Group] = collections.deque()
        self._turns = clock.turns("nercc-batcher", self._run)
        size = self.policy.max_queue_size
        self._requests = OpenRequests(size, setup.observe, clock, self._post)
        self._screen = AnswerScreen(setup, predictor)
        self._dispatcher = Dispatcher(setup, self._requests, known, self._post)
        self._timers: Timers[Group] = Timers()  # when to decide on a group again
        known.turns.start()
        pool.on_idle(lambda: self._turns.wake() if self.waiting else None)
        self._turns.start()

    def submit(
        self,
        x: Shaped[np.ndarray, "batch ..."],
        *,
        deadline: float | None = None,
        exact: bool = False,
    ) -> concurrent.futures.Future[Reply]:
        """Submit B queries, from any thread, and return at once.

        Args:
            x: the queries.
            deadline: seconds from now (default: the policy's).
            exact: accept only the model's own answers, hedged if a worker straggles.

        Returns:
            A future of the `Reply`. It may raise `DeadlineExceeded`, `InferenceFailed`, or
            `ServerClosing`. Cancelling it drops queries that have not been sent.

        Raises:
            ValueError: if x is not B finite queries, or the deadline is not positive or exceeds an
                hour.
            QueueFull: if the queue has no room.
            ServerClosing: while the batcher closes.
            InferenceFailed: once the batcher is broken.
        """
        setup, policy = self._setup, self.policy
        x = setup.queries.check(x)
        deadline = policy.deadline_s if deadline is None else deadline
        if not 0 < deadline <= MAX_DEADLINE_S:
            raise ValueError(
                f"a deadline is a positive number of seconds, {MAX_DEADLINE_S:g} at most, not "
                f"{deadline:g}"
            )
        values, now = setup.answers.zeros(len(x)), setup.clock.now()
        request = Request(x, values, now, deadline, exact)
        self._requests.accept(request)
        request.on_cancel(self._post)
        self._post(request)
        return request.future

    @property
    def waiting(self) -> int:
        """The number of queries in the queue."""
        return self._requests.waiting

    @property
    def in_flight(self) -> int:
        """The number of requests without a reply."""
        return len(self._requests)

    def health(self) -> Health:
        """Return whether the batcher is alive, and would answer a query now."""
        return self._requests.monitor.health(self._setup.pool, self._dispatcher.answer_time)

    def status(self) -> dict[str, Any]:
        """Return the status of the batcher's parts.

        Returns:
            By name, None for parts that it does not have: "policy", the setting picked under
            `max_calls`, and why; "predictor"; "checks" of the model's own answers; "decoding", the
            evidence from stragglers on decoded answers.
        """
        return self._approximations.status() | {"checks": self._screen.status()}

    def close(self, drain: float = 0.0) -> None:
        """Accept no more requests, answer for up to `drain` seconds, and fail the rest.

        The wait for a thread whose turn does not end is bounded.
        """
        self._requests.drain(drain, self._turns.wake)
        self._turns.close(_LAST_TURN)
        for request in self._requests:
            why = "the server shut down before it could answer"
            self._requests.fail(request, ServerClosing(why))
        self._approximations.turns.close(_LAST_STEP)

    def __enter__(self) -> "CodedBatcher":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The deciding thread.

    def _post(self, event: Request | Group) -> None:
        """Post a new or cancelled request, or a group with news, to the deciding thread."""
        self._inbox.append(event)
        self._turns.wake()

    def _run(self) -> float:
        try:
            self._turn()
        except BaseException as error:
            _LOG.exception("the batcher ends")
            self._requests.fail_all(error)
            self._turns.close()
        return min(self._timers.next, self._requests.deadlines.next, self._screen.next_due)

    def _turn(self) -> None:
        clock, requests = self._setup.clock, self._requests
        number = len(self._inbox)  # later events are left for the next turn
        for event in dict.fromkeys(self._inbox.popleft() for _ in range(number)):
            self._guard(self._handle, event, clock.now(), concerned=event)
        now = requests.monitor.report_turn(len(requests) > 0)
        self._guard(self._handle_due, now)
        if requests.monitor.probe_due(now):  # a query of zeros shows when workers answer again
            zeros = self._setup.queries.zeros(1), self._setup.answers.zeros(1)
            request = Request(*zeros, clock.now(), _PROBE, True, own="probe")
            self._guard(requests.accept_own, request)
        self._guard(self._dispatch, now)

    def _guard(self, step: Callable[..., Any], *args: Any, concerned: Any = None) -> None:
        """Run a step. If it raises, fail only the requests that it concerns, not the thread.

        These are `concerned` (a request, or those of a group), and those whose queries the step
        took out of the queue.
        """
        self._requests.taken = []
        try:
            step(*args)
        except Exception as error:
            _LOG.exception("the batcher's step %s failed", step.__name__)
            self._setup.observe("internal_error", 1)
            failed = {query.request for query in self._requests.taken}
            if isinstance(concerned, Group):
                failed |= {query.request for _, query in concerned.open_queries()}
                self._approximations.discard(concerned)
                self._dispatcher.close(concerned)
            elif isinstance(concerned, Request):
                failed.add(concerned)
            for request in failed:
                why = f"internal error: {error}"
                self._fail(request, InferenceFailed(why, "internal error"))

    def _fail(self, request: Request, error: Exception) -> None:
        for query in request.queries if request.own == "audit" else ():
            self._approximations.learn(query, None)
        self._requests.fail(request, error)

    def _handle(self, event: Request | Group, now: float) -> None:
        # Even in a long turn, deadlines are handled before answers that came after them.
        self._expire(now)
        if isinstance(event, Request):
            self._requests.enqueue(event)
            if event.future.cancelled():
                self._requests.cancel(event, now)
        elif event in self._dispatcher.groups:
            self._receive(event, now)

    def _expire(self, now: float) -> None:
        pool = self._setup.pool
        for request in self._requests.deadlines.pop_due(now):
            why = (
                f"not answered within {request.deadline:g} s: {self.waiting} queries wait, "
                f"{pool.idle} of {pool.num_workers} workers are idle"
            )
            self._fail(request, DeadlineExceeded(why))

    def _handle_due(self, now: float) -> None:
        """Handle what is due: deadlines, groups to complete, stragglers."""
        self._screen.settle_due(now)
        self._settle(now)
        self._expire(now)
        filling = self._dispatcher.filling
        if self._requests.monitor.closing and filling is not None:
            self._timers.set(filling, now)
        for group in self._timers.pop_due(now):
            if group in self._dispatcher.groups:
                self._guard(self._decide, group, now, concerned=group)
        self._screen.release()  # after all steps that may have ended a query in this turn
        self._settle(now)

    def _dispatch(self, now: float) -> None:
        dispatcher, policy = self._dispatcher, self.policy
        for group in dispatcher.dispatch(now):
            due = group.began + policy.batch_wait_timeout_s
            if group is not dispatcher.filling:
                due = float(np.fmin.reduce(group.sent_at, initial=math.inf))
                due += group.batch.times.limit(group.rows)
            self._look_at(group, due, now)

    def _look_at(self, group: Group, due: float, now: float) -> None:
        """Decide on a group again at this time; an infinite time leaves its timer unchanged."""
        if due < math.inf:
            self._timers.set(group, max(due, now) + _MARGIN)

    def _receive(self, group: Group, now: float) -> None:
        """Take workers' new answers to a group, and decide on its other queries."""
        batch, layout = group.batch, group.layout
        for point in np.flatnonzero(batch.available & ~group.mask).tolist():
            value = batch.answer(point)
            assert value is not None
            group.mask[point] = True
            if group.answers:
                group.answers[point] = value
            place = int(layout.place_of[point])
            if not 0 <= place < len(group.cells):
                continue
            # The model's own answers to the queries of a cell.
            own, queries = layout.own[place], group.cells[place].queries
            asked, responded = (~np.isnan(group.sent_at[own])).sum(), group.mask[own].sum()
            rows = self._screen.receive(batch.workers[point], queries, value)
            self._settle(now)
            if len(rows) < len(queries):
                queries, value = [queries[row] for row in rows], value[rows]
            for row, query in enumerate(queries):
                self._approximations.learn(query, value[row, ...])
            self._requests.answer(queries, Answer(value, "exact", int(asked), int(responded)), now)
        self._decide(group, now)

    def _settle(self, now: float) -> None:
        """Carry out the screen's decisions on answers that it held back."""
        outcomes = self._screen.take()
        self._copy([query for query, verdict in outcomes if verdict is None], 1, now)
        for query, verdict in outcomes:
            if verdict is not None:
                number, doubted = max(len(query.candidates), 1), not verdict.agreed
                if not doubted:
                    self._approximations.learn(query, verdict.value)
                answer = Answer(verdict.value[None], "exact", number, number, suspicious=doubted)
                self._requests.answer([query], answer, now)

    def _copy(self, queries: Sequence[Query], workers: int, now: float) -> None:
        """Send queries again that are late, or whose answers look wrong."""
        for query in queries:
            query.reexecuted = True
            self._setup.observe("reexecution", 1)
        self._dispatcher.copy(queries, workers, now)

    def _decide(self, group: Group, now: float) -> None:
        """Carry out the decisions on a group's queries; close it if no query is open any more."""
        dispatcher, policy, setup = self._dispatcher, self.policy, self._setup
        if group is dispatcher.filling:
            due = group.began + policy.batch_wait_timeout_s
            if now < due and not self._requests.monitor.closing:
                self._look_at(group, due, now)
                return
            dispatcher.complete(group, now)
        looked: set[Source] = set()
        while any(group.open_queries()):
            before, evidence = len(looked), self._approximations.evidence(len(group.cells))
            for action in decide(group, now, evidence, policy, looked):
                match action:
                    case Predict(places):
                        self._approximations.predict(group, places)
                        looked.add("predicted")
                    case Decode(places):
                        self._approximations.decode(group, places)
                        looked.add("decoded")
                    case GiveOut() as given:
                        query, answer = self._approximations.give(group, given)
                        self._requests.answer([query], answer, now)
                    case Copy(places, workers):
                        self._copy([group.query(place) for place in places], workers, now)
                    case Fail(places):
                        self._give_up(group, places, now)
                    case Wait(until):
                        self._look_at(group, until, now)
            if len(looked) == before:
                late = group.late(now) & (not group.alone)
                setup.observe("straggler", int((late & ~group.counted).sum()))
                group.counted |= late
                break
        if any(group.open_queries()):
            return

        # A group without open queries is closed after its approximate answers have been compared.
        if group.kind == "copy" and group.batch.tasks[0].running:
            group.batch.suffice()  # send nothing more, but measure how long the copy takes
            return
        if group.kind == "copy" and group.mask.all():
            took, limit = now - group.batch.tasks[0].sent, group.batch.times.limit(group.rows)
            if limit < math.inf:
                setup.observe("hedge_limits", took / limit)
        for each in [group] if group.alone else self._approximations.keep(group):
            self._timers.drop(each)
            dispatcher.close(each)

    def _give_up(self, group: Group, places: Sequence[Place], now: float) -> None:
        """Fail queries that no worker will answer, or return their answers that were held back."""
        failures = group.batch.failures
        public = f"a query got no answer: {len(failures) or 'no'} workers failed"
        why = f"{public}, the last: {failures[-1].reason}" if failures else public
        if failures and failures[-1].refused:
            public = why  # the message is the server's own, so clients may see it
        for query in map(group.query, places):
            if query.candidates:
                self._screen.give_up(query)
            elif not query.done:
                self._fail(query.request, InferenceFailed(why, public))
        self._settle(now)
