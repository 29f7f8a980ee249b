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
import contextlib
import heapq
import itertools
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from ..codes import Uncoded
from ..inference import warn_if_other
from ..pools import AbstractPool, Overdue
from ._arrangement import Arranger
from ._budget import Budget
from ._coder import Coder
from ._fidelity import Fidelity
from ._group import Cell, Group
from ._policy import BatchingPolicy, Measure
from ._request import (
    Answer,
    DeadlineExceeded,
    InferenceFailed,
    Query,
    QueueFull,
    Reply,
    Request,
    ServerClosing,
)

_LOG = logging.getLogger(__name__)

_WINDOW = 256  # answer times that a running median looks at
_LEAST = 20  # of them, before anything is given up
# Groups that may be kept after their queries are answered, to hear what their stragglers say, and
# for how many median answer times (but at least a second).
_LINGERING, _LINGER = 256, 20
_STALE = 256  # deadlines of requests that have been answered, before they are swept out
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
        policy: BatchingPolicy | None = None,
        fidelity: Fidelity | None = None,
        observe: Callable[[Measure, float], Any] | None = None,
    ):
        """Compiles the decoder for every batch size, and starts.

        `shape` is that of one query, `outputs` that of its answer. `observe(what, number)` is told
        of all that happens; it must be quick. `fidelity` may be calibrated beforehand; the batcher
        goes on with it.

        Raises: ValueError for a policy that does not fit the code.
        """
        self.policy = policy = policy or BatchingPolicy()
        self._pool, self._shape, self._out = pool, tuple(shape), tuple(outputs)
        self._observe = observe or (lambda what, number: None)
        self._coder = coder
        self._alone = Coder(Uncoded(1), (coder.kinds[0],))
        self.fidelity = fidelity or Fidelity(coder)
        warn_if_other("the fidelity", self.fidelity.conditions, pool.conditions)
        self._enough = _enough(coder, policy)
        self._overdue = Overdue(0.5, policy.patience)
        self._budget = Budget(policy.max_reexecution)
        self._arranger: Arranger | None = None
        if policy.ordering and coder.curved:
            self._arranger = Arranger(coder, shape, policy.max_batch_size)
        self._compile()
        # Shared with callers.
        self._lock = threading.Lock()
        self._settled = threading.Condition(self._lock)
        self._waiting = 0  # queries
        self._open: set[Request] = set()
        self._closing = self._stopped = self._nudged = False
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        # The thread's own.
        self._queue: collections.deque[Query] = collections.deque()
        self._exact: collections.deque[Query] = collections.deque()
        self._group: Group | None = None  # the one that is being filled
        self._groups: set[Group] = set()
        self._looks: list[tuple[float, int, Group]] = []
        self._deadlines: list[tuple[float, int, Request]] = []
        self._numbers = itertools.count()
        self._times = _AnswerTimes()
        self._dead = 0  # queries in a queue that nobody waits for
        self._wake = math.inf  # when a group that is not full is due
        pool.on_idle(self._nudge)
        self._thread = threading.Thread(target=self._run, name="nercc-batcher", daemon=True)
        self._thread.start()

    # What callers see.

    def submit(
        self,
        x: Float[np.ndarray, "batch ..."],
        *,
        deadline: float | None = None,
        exact: bool = False,
    ) -> concurrent.futures.Future[Reply]:
        """Takes B queries, and comes back at once; the future has the `Reply`, or says why not.

        `deadline` is in seconds from now. `exact`: the model's own answers only, hedged if a worker
        straggles. Cancelling the future drops what has not been sent.

        Raises: ValueError where x is not B finite queries, or the deadline is not positive;
        `QueueFull` and `ServerClosing`. The future: `DeadlineExceeded`, `InferenceFailed`,
        `ServerClosing`.
        """
        x = self._checked(x)
        deadline = self.policy.deadline_s if deadline is None else deadline
        if not 0 < deadline < math.inf:
            raise ValueError(f"a deadline is a positive number of seconds, not {deadline}")
        request = Request(x, self._out, deadline, exact)
        with self._lock:
            if self._closing:
                self._observe("request_draining", 1)
                raise ServerClosing("no more requests are taken: the server is shutting down")
            if self._waiting + len(x) > self.policy.max_queue_size:
                self._observe("request_queue_full", 1)
                raise QueueFull(
                    f"{self._waiting} queries wait and {len(x)} more came; the queue holds "
                    f"{self.policy.max_queue_size}: come again later, or with fewer at once"
                )
            self._waiting += len(x)
            self._open.add(request)
        request.future.add_done_callback(lambda future: self._cancelled(request))
        self._inbox.put(request)
        return request.future

    @property
    def waiting(self) -> int:
        """Queries that wait to be sent."""
        return self._waiting

    @property
    def in_flight(self) -> int:
        """Requests that are not answered."""
        return len(self._open)

    def close(self, drain: float = 0.0) -> None:
        """Takes no more, answers what it has for up to `drain` seconds, and fails the rest."""
        with self._settled:
            self._closing = True
            self._inbox.put(_NUDGE)
            self._settled.wait_for(lambda: not self._open, drain)
            self._stopped = True
        self._inbox.put(_NUDGE)
        self._thread.join()
        for request in list(self._open):
            self._fail(request, ServerClosing("the server shut down before it could answer"))

    def __enter__(self) -> "CodedBatcher":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _checked(self, x: np.ndarray) -> np.ndarray:
        x = np.asarray(x)
        if x.ndim != len(self._shape) + 1 or x.shape[1:] != self._shape or not len(x):
            raise ValueError(
                f"queries must come as an array of shape (B, {', '.join(map(str, self._shape))}) "
                f"with B of 1 or more, not {x.shape}"
            )
        if not np.issubdtype(x.dtype, np.floating):
            raise ValueError(f"queries are {x.dtype}: codes work on floats, so convert them first")
        # In float32, in which workers run: what is too large for it is infinite.
        with np.errstate(over="ignore"):
            x = np.ascontiguousarray(x, np.float32)
        if not np.isfinite(x).all():
            finite = np.isfinite(x.reshape(len(x), -1)).all(axis=1)
            raise ValueError(
                f"queries {np.flatnonzero(~finite).tolist()} are not finite in float32"
            )
        return x

    def _cancelled(self, request: Request) -> None:
        if request.future.cancelled():
            self._inbox.put(request)

    def _nudge(self) -> None:
        """A worker is free."""
        if self._waiting and not self._nudged:
            self._nudged = True
            self._inbox.put(_NUDGE)

    def _compile(self) -> None:
        if self._arranger is not None:
            self._arranger.compile()
        if not self._coder.guesses:
            return  # nothing is ever decoded
        values = np.zeros((self._coder.num_workers, 1, *self._out), np.float32)
        self._predict(values, np.ones(self._coder.num_workers, bool), self._coder.num_data)
        self.fidelity.compile(self._out)

    # The thread.

    def _run(self) -> None:
        while not self._stopped:
            due = min(
                self._wake,
                self._looks[0][0] if self._looks else math.inf,
                self._deadlines[0][0] if self._deadlines else math.inf,
            )
            for item in self._receive(due):
                self._guard(self._take, item, time.monotonic())
            now = time.monotonic()
            self._guard(self._look, now)
            self._guard(self._dispatch, now)

    def _receive(self, due: float) -> list[Any]:
        """Everything that has come; waits for something, but no longer than until `due`."""
        timeout = None if math.isinf(due) else max(due - time.monotonic(), 0)
        items = []
        with contextlib.suppress(queue.Empty):
            items.append(self._inbox.get(timeout=timeout))
            while True:
                items.append(self._inbox.get_nowait())
        return items

    def _guard(self, step: Callable[..., None], *args: Any) -> None:
        """One step that fails does not end the thread; whom it concerns has a deadline."""
        try:
            step(*args)
        except Exception:
            _LOG.exception("the batcher's step %s failed", step.__name__)

    def _take(self, item: Any, now: float) -> None:
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
            lane = self._exact if request.exact_only else self._queue
            lane.extend(request.queries)
            end = request.arrived + request.deadline
            heapq.heappush(self._deadlines, (end, next(self._numbers), request))
        if request.future.cancelled() and request in self._open:
            self._observe("request_cancelled", now - request.arrived)
            self._drop(request)

    def _look(self, now: float) -> None:
        """What is due: deadlines, groups to be completed, stragglers to be given up."""
        if len(self._deadlines) > 2 * len(self._open) + _STALE:
            self._deadlines = [each for each in self._deadlines if each[2] in self._open]
            heapq.heapify(self._deadlines)
        while self._deadlines and self._deadlines[0][0] <= now:
            request = heapq.heappop(self._deadlines)[2]
            if request in self._open:
                self._fail(
                    request,
                    DeadlineExceeded(
                        f"not answered within {request.deadline:g} s: {self._waiting} queries "
                        f"wait, {self._pool.idle} of {self._pool.num_workers} workers are idle"
                    ),
                )
        while self._looks and self._looks[0][0] <= now:
            due, _, group = heapq.heappop(self._looks)
            if due == group.look_at and not group.closed:
                group.look_at = math.inf
                self._guard(self._decide, group, now)
        if self._closing and self._group is not None:
            self._complete(self._group, now)

    # Queries go out.

    def _dispatch(self, now: float) -> None:
        while self._purge(self._exact) and self._pool.idle:
            self._send_alone(self._cut(self._exact, now), now)
        if self._coder.systematic:
            self._dispatch_own(now)
        else:
            self._dispatch_groups(now)

    def _dispatch_own(self, now: float) -> None:
        """Queries go out as they came; the coded ones of full groups follow if workers are left."""
        full = []
        while self._purge(self._queue) and self._pool.idle:
            for cell in self._cells_for_all(now):
                if self._group is None:
                    self._group = self._new_group(self._coder, now)
                group = self._group
                own = self._coder.first[len(group.cells)]
                group.take(cell)
                assert cell.x is not None
                self._send(group, own, [cell.x] * len(own), now)
                if group.full:
                    self._group = None
                    full.append(group)
                else:
                    self._plan(group, now)
        for group in full:
            self._complete(group, now)

    def _dispatch_groups(self, now: float) -> None:
        """A group goes out when K queries wait, or fewer have waited for long enough."""
        num_data = self._coder.num_data
        self._wake = math.inf
        while self._purge(self._queue) and self._pool.idle:
            number = len(self._queue)
            due = self._queue[0].request.arrived + self.policy.batch_wait_timeout_s
            if number < num_data and now < due and not self._closing:
                self._wake = due
                return
            rows = _power_of_two(min(max(number // num_data, 1), self.policy.max_batch_size))
            columns = min(number, num_data)
            queries = [self._pop(self._queue, now) for _ in range(rows * columns)]
            cells = self._deal(queries, [rows] * columns, 0)
            if columns == 1:
                self._send_alone(cells[0], now)  # all coded data points would be the query
                continue
            group = self._new_group(self._coder, now)
            for cell in cells:
                group.take(cell)
            self._complete(group, now)

    def _cut(self, lane: collections.deque[Query], now: float) -> Cell:
        """The next batch for one worker: the queue is shared out among those that are idle."""
        size = self._size(len(lane), max(self._pool.idle, 1))
        return _cell([self._pop(lane, now) for _ in range(size)])

    def _cells_for_all(self, now: float) -> list[Cell]:
        """The next batches for all workers that are idle: what goes into a group's places."""
        sizes: list[int] = []
        for idle in range(self._pool.idle, 0, -1):
            left = len(self._queue) - sum(sizes)
            if left:
                sizes.append(self._size(left, idle))
        queries = [self._pop(self._queue, now) for _ in range(sum(sizes))]
        return self._deal(queries, sizes, 0 if self._group is None else len(self._group.cells))

    def _size(self, waiting: int, idle: int) -> int:
        return _power_of_two(min(math.ceil(waiting / idle), self.policy.max_batch_size))

    def _deal(self, queries: list[Query], sizes: list[int], place: int) -> list[Cell]:
        """Cells of these sizes, which make up all queries, for a group's places from `place` on."""
        if self._arranger is None:
            rest = iter(queries)
            dealt = [list(itertools.islice(rest, size)) for size in sizes]
        else:
            begin = time.perf_counter()
            dealt = self._arranger.deal(queries, sizes, place)
            self._observe("order_seconds", time.perf_counter() - begin)
        return [_cell(each) for each in dealt]

    def _pop(self, lane: collections.deque[Query], now: float) -> Query:
        query = lane.popleft()
        self._count_out(query)
        if not query.reexecuted:
            self._budget.earn(1)
        if math.isinf(query.request.sent):
            query.request.sent = now
            self._observe("queue_seconds", now - query.request.arrived)
        return query

    def _purge(self, lane: collections.deque[Query]) -> bool:
        """Takes out queries that nobody waits for; whether some are left."""
        if self._dead:
            alive = [query for query in lane if not query.done]
            self._dead -= len(lane) - len(alive)
            lane.clear()
            lane.extend(alive)
        return bool(lane)

    def _count_out(self, query: Query) -> None:
        query.waiting = False
        with self._lock:
            self._waiting -= 1

    def _done(self, query: Query) -> None:
        """Nobody waits for a query any more, which may still stand in a queue."""
        query.done = True
        if query.waiting:
            self._count_out(query)
            self._dead += 1

    def _send_alone(self, cell: Cell, now: float) -> None:
        """One batch at one worker, hedged: its answers are exact."""
        group = self._new_group(self._alone, now)
        group.take(cell)
        assert cell.x is not None
        self._send(group, np.arange(1), [cell.x], now)
        group.inputs_sent()

    def _new_group(self, coder: Coder, now: float) -> Group:
        group = Group(coder, now)
        alone = coder is self._alone
        group.batch = self._pool.open(
            coder.num_workers,
            needed=coder.num_data if coder.systematic else self._enough,
            copies=self.policy.copies if alone else 1,
            on_change=lambda batch: self._tell_of(group),
            overdue=self._overdue,
        )
        self._groups.add(group)
        return group

    def _tell_of(self, group: Group) -> None:
        """From a thread of the pool: once, until the group is looked at."""
        if not group.heard:
            group.heard = True
            self._inbox.put(group)

    def _send(
        self, group: Group, points: np.ndarray, values: Iterable[np.ndarray], now: float
    ) -> None:
        assert group.batch is not None
        group.sent_at[points] = now
        values = list(values)
        for value in values:
            self._observe("batch_size", len(value))
        kinds = [group.coder.kinds[point] for point in points]
        self._pool.send(group.batch, points.tolist(), values, kinds=kinds)

    def _complete(self, group: Group, now: float) -> None:
        """No more cells come: what is coded goes out, unless it is of no use any more."""
        if group is self._group:
            self._group = None
        coder, queries = self._coder, len(group.cells)
        group.layout = coder.layout(queries)
        self._observe("group_fill", queries / coder.num_data)
        hungry = self.fidelity.hungry(queries)
        points = np.flatnonzero(~group.sent) if hungry else group.layout.extras
        if len(points) and (group.pending or hungry):
            begin = time.perf_counter()
            coded = coder.encode(group.inputs(), points)
            self._observe("encode_seconds", time.perf_counter() - begin)
            self._send(group, points, coded, now)
        group.inputs_sent()
        self._decide(group, now)

    # Answers come, or do not.

    def _hear(self, group: Group, now: float) -> None:
        if group.closed:
            return
        batch = group.batch
        assert batch is not None
        for point in np.flatnonzero(batch.available & ~group.mask).tolist():
            value = batch.answer(point)
            assert value is not None
            group.answers[point], group.mask[point] = value, True
            place = int(group.layout.place_of[point])
            # What is coded may have waited for a worker; that tells nothing of how long it took.
            if place >= 0 or not group.coder.systematic:
                self._times.add(len(value), now - group.sent_at[point])
            if place >= 0:
                self._hear_own(group, place, value, now)
        self._decide(group, now)

    def _hear_own(self, group: Group, place: int, value: np.ndarray, now: float) -> None:
        """The model's own answers to one cell's queries."""
        own = group.layout.own[place]
        asked, heard = int(group.sent[own].sum()), int(group.mask[own].sum())
        for row, query in enumerate(group.cells[place].queries):
            self._give(query, Answer(value[row], True, asked, heard), now)
            decoded = group.decoded.pop((place, row), None)
            if decoded is not None:
                agree = self.fidelity.audit(decoded, value[row])
                self._observe("audit_same" if agree else "audit_other", 1)

    def _decide(self, group: Group, now: float) -> None:
        """Decodes what is time to decode, sends again what cannot be, ends what is answered."""
        if group is self._group:
            if now >= group.began + self.policy.batch_wait_timeout_s or self._closing:
                self._complete(group, now)
            else:
                self._plan(group, now)
            return
        if group.pending and group.coder is self._alone:
            self._fail_if_lost(group)
        elif group.pending:
            self._rescue(group, now)
        if not group.pending:
            self._end(group, now)
        if not group.closed:
            self._plan(group, now)

    def _rescue(self, group: Group, now: float) -> None:
        """Queries whose own workers straggle are decoded, or sent again if nothing will come."""
        late = self._late(group, now)
        hopeless = [
            number
            for number, cell in enumerate(group.cells)
            if cell.pending and not (group.sent & ~late)[group.layout.own[number]].any()
        ]
        if not hopeless:
            return
        self._observe("straggler", (late & ~group.counted).sum())
        group.counted |= late
        last = not (group.out & ~late).any()
        answers = int(group.mask.sum())
        ready = self._coder.systematic or answers >= self._enough or last
        best: dict[tuple[int, int], Answer] = {}
        if answers and ready and self._coder.guesses:
            best = self._decode(group, hopeless, last, now)
        if last:
            self._reexecute(group, hopeless, best, now)

    def _late(self, group: Group, now: float) -> np.ndarray:
        """Coded data points that are not waited for: they straggle, or will have no answer."""
        assert group.batch is not None
        limit = self.policy.patience * self._times.median(group.rows)
        late = group.out & (now - group.sent_at >= limit)
        for point in np.flatnonzero(group.out & ~late).tolist():
            late[point] = group.batch.abandoned(point)
        return late

    def _decode(
        self, group: Group, hopeless: list[int], last: bool, now: float
    ) -> dict[tuple[int, int], Answer]:
        """Answers those queries of these cells that may be; of others, by cell and row, the best.

        That may be nothing: no answer was sound, or it was not worth the decoding.
        """
        few, wanted = len(group.cells), self.policy.max_disagreement
        disagreement, error = self.fidelity.expect(few, group.mask)
        limit = None  # of a query's own doubt
        if wanted is None:
            good = np.full(few, self._enough_for(group, last))
        elif self._coder.doubts:
            limit = self.fidelity.doubt(few).limit(wanted)
            good = np.full(few, limit >= 0)
        else:
            good = disagreement <= wanted
        if not (good[hopeless].any() or (last and self.policy.max_reexecution is not None)):
            return {}
        begin = time.perf_counter()
        predictions, sound, doubt = self._predict(group.values(), group.mask, few)
        self._observe("decode_seconds", time.perf_counter() - begin)
        self._observe("workers_heard", int(group.mask.sum()))
        good = np.broadcast_to(good if limit is None else doubt <= limit, doubt.shape)
        doubt = np.where(np.isnan(doubt), disagreement, doubt)
        basis = int(group.sent.sum()), int(group.mask.sum())
        best: dict[tuple[int, int], Answer] = {}
        for number, row, _ in group.open_queries(hopeless):
            if not sound[row, number]:
                continue
            told = float(doubt[row, number]), float(error[number])
            answer = Answer(predictions[row, number], False, *basis, *told)
            if good[row, number]:
                self._give_decoded(group, number, row, answer, now)
            else:
                best[number, row] = answer
        return best

    def _predict(
        self, values: np.ndarray, mask: np.ndarray, queries: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Predictions by row and place, whether they are sound, and how doubtful (NaN: unknown).

        A code may have lost a query, and a sum of large answers overflowed.
        """
        width = self.policy.max_batch_size
        if self._coder.doubts:
            weights = self.fidelity.doubt(queries).weights
            predictions, recovered, doubt = self._coder.assess(values, mask, width, weights)
        else:
            predictions, recovered = self._coder.decode(values, mask, width)
            doubt = np.full(predictions.shape[:2], np.nan)
        sound = recovered & np.isfinite(predictions).reshape(*doubt.shape, -1).all(axis=-1)
        return predictions[:, :queries], sound[:, :queries], doubt[:, :queries]

    def _enough_for(self, group: Group, last: bool) -> bool:
        """Whether there are answers enough to decode, by their number alone."""
        answers = int(group.mask.sum())
        enough, least = self._enough, min(group.coder.num_data, self._enough)
        if group.coder.systematic:
            redundancy = int(group.sent.sum()) - len(group.cells)
            enough = enough if group.full else len(group.cells) + redundancy // 2
            least = max(len(group.cells) - 2, 1)
        return answers >= enough or (last and answers >= least)

    def _give_decoded(
        self, group: Group, number: int, row: int, answer: Answer, now: float
    ) -> None:
        group.decoded[number, row] = answer.value
        self._observe("expected_disagreement", answer.disagreement)
        self._give(group.cells[number].queries[row], answer, now)

    def _reexecute(
        self, group: Group, numbers: list[int], best: dict[tuple[int, int], Answer], now: float
    ) -> None:
        """Sends queries again, before all others; once each, and the most doubtful first.

        Those that the budget does not reach for are answered as best known.
        """
        if self.policy.copies == 1:  # no hedging: only what will have no answer
            assert group.batch is not None
            gone = group.batch.abandoned
            sent = group.sent
            numbers = [
                number
                for number in numbers
                if all(gone(point) for point in group.layout.own[number].tolist() if sent[point])
            ]
        left = [each for each in group.open_queries(numbers) if not each[2].reexecuted]
        again: list[Query] = []
        for number, row, query in sorted(left, key=lambda each: _certainty(best.get(each[:2]))):
            answer = best.get((number, row))
            if answer is not None and not self._budget.affords():
                self._observe("over_budget", 1)
                self._give_decoded(group, number, row, answer, now)
                continue
            self._budget.spend()
            query.reexecuted = query.waiting = True
            with self._lock:
                self._waiting += 1
            again.append(query)
            self._observe("reexecution", 1)
        self._exact.extendleft(reversed(again))

    def _fail_if_lost(self, group: Group) -> None:
        assert group.batch is not None
        if not group.batch.lost(0):
            return
        reasons = [failure.reason for failure in group.batch.failures]
        told = f"{len(reasons)} workers failed, the last: {reasons[-1]}" if reasons else "no worker"
        for query in group.cells[0].queries:
            if not query.done:
                self._fail(query.request, InferenceFailed(f"a query got no answer: {told}"))

    # Ends.

    def _give(self, query: Query, answer: Answer, now: float) -> None:
        if query.done:
            return
        self._done(query)
        if not answer.exact:
            self._observe("query_decoded", 1)
        else:
            self._observe("query_reexecuted" if query.reexecuted else "query_exact", 1)
        if query.reexecuted and query.home is not None:
            self._tell_of(query.home)  # its first group need not wait for it
        request = query.request
        if request.answer(query, answer):
            reply = request.reply(time.monotonic())
            self._observe("request_ok", reply.seconds)
            self._settle(request)
            _resolve(request.future.set_result, reply)

    def _fail(self, request: Request, error: Exception) -> None:
        if request not in self._open:
            return
        self._drop(request)
        what = "request_deadline" if isinstance(error, DeadlineExceeded) else "request_failed"
        self._observe(what, time.monotonic() - request.arrived)
        _resolve(request.future.set_exception, error)

    def _drop(self, request: Request) -> None:
        for query in request.queries:
            if not query.done:
                self._done(query)
                if query.home is not None:
                    self._tell_of(query.home)
        self._settle(request)

    def _settle(self, request: Request) -> None:
        request.release()
        with self._settled:
            self._open.discard(request)
            if not self._open:
                self._settled.notify_all()

    def _end(self, group: Group, now: float) -> None:
        """Closes a group whose queries are answered; some are kept, to hear their stragglers."""
        assert group.batch is not None
        if group.coder is self._coder and group.out.any() and now < group.linger_until:
            if math.isinf(group.linger_until) and len(self._groups) < _LINGERING:
                group.batch.suffice()
                median = self._times.median(group.rows)
                group.linger_until = now + max(1.0, _LINGER * median if median < math.inf else 0)
            if group.linger_until < math.inf:
                return
        if group.coder is self._coder and (lesson := group.lesson()) is not None:
            self.fidelity.learn(*lesson)
        group.closed = True
        self._groups.discard(group)
        group.batch.forget()

    def _plan(self, group: Group, now: float) -> None:
        """When to look at the group next, should nothing happen."""
        due = math.inf
        if group is self._group:
            due = group.began + self.policy.batch_wait_timeout_s
        elif group.linger_until < math.inf:
            due = group.linger_until
        elif group.coder is not self._alone:
            limit = self.policy.patience * self._times.median(group.rows)
            ends = group.sent_at[group.out] + limit
            due = float(np.min(ends[ends > now], initial=math.inf))
        if due < math.inf and due != group.look_at:
            group.look_at = max(due, now) + 1e-4
            heapq.heappush(self._looks, (group.look_at, next(self._numbers), group))


class _AnswerTimes:
    """Running medians of the seconds from sending to hearing, by batch size."""

    def __init__(self):
        self._times: dict[int, collections.deque[float]] = {}
        self._medians: dict[int, float] = {}
        self._seen = 0

    def add(self, size: int, seconds: float) -> None:
        times = self._times.setdefault(size, collections.deque(maxlen=_WINDOW))
        times.append(seconds)
        self._seen += 1
        if len(times) >= _LEAST and (self._seen % 16 == 0 or size not in self._medians):
            self._medians[size] = float(np.median(times))

    def median(self, size: int) -> float:
        """Of this size, or the longest of any size if it has not been seen enough."""
        return self._medians.get(size, max(self._medians.values(), default=math.inf))


def _enough(coder: Coder, policy: BatchingPolicy) -> int:
    """How many answers of a full group are enough to decode, if nothing better is known."""
    num_data, num_workers = coder.num_data, coder.num_workers
    enough = policy.wait_for
    if enough is None and coder.systematic:
        enough = num_workers - (num_workers - num_data) // 2
    elif enough is None:
        enough = min(max(num_workers * 85 // 100, num_data), num_workers)
    if not 1 <= enough <= num_workers:
        raise ValueError(f"wait_for must be from 1 to N = {num_workers}, not {enough}")
    return enough


def _certainty(answer: Answer | None) -> float:
    """What can be answered least comes first; of what nothing is known yet, one is as good."""
    if answer is None:
        return -1.0
    return 0.0 if math.isnan(answer.disagreement) else 1 - answer.disagreement


def _power_of_two(number: int) -> int:
    """The largest that is no larger than a positive number."""
    return 1 << (number.bit_length() - 1)


def _cell(queries: Sequence[Query]) -> Cell:
    x = [query.x for query in queries if query.x is not None]
    assert len(x) == len(queries), "queries that are over are taken out of the queue"
    return Cell(list(queries), x[0][None] if len(x) == 1 else np.stack(x))


def _resolve(settle: Callable[[Any], None], outcome: Any) -> None:
    with contextlib.suppress(concurrent.futures.InvalidStateError):  # it was cancelled
        settle(outcome)
