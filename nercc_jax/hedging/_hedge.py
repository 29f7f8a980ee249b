"""Hedged calls: the event loop's thread sends and cancels calls, and another thread decides."""

import asyncio
import functools
import logging
import math
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from ..stragglers import picking, simulate
from ._choice import Choice, TimedCall, next_choice

_LOG = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class hedge(Generic[Answer]):
    """An async call over interchangeable targets, with copies if that shortens the latency tail.

    A request calls one target. If that takes longer than a limit, it calls another target, takes
    the first answer, and cancels the other call. The limit is learned: the latest calls are
    replayed with each candidate, and the one with the shortest tail within the budget is picked,
    repeatedly. If copies are as slow as their originals (the query itself is slow, or something
    behind all targets), almost none are sent: only one late request in ten is hedged, which shows
    when copies help again. Nothing is hedged before 20 requests. A target that is slow or fails
    more often than others gets fewer first calls, but at least 3 % of another's.

        >>> import asyncio
        >>> from nercc_jax import hedge
        >>> async def ask(server, question):
        ...     await asyncio.sleep(0.001)  # such as: await client.get(f"{server}/{question}")
        ...     return f"{question} to {server}"
        >>> async def main():
        ...     hedged = hedge(ask, ["one", "two"], budget=1.05)
        ...     return [await hedged(question) for question in ("first", "second")], hedged.counts
        >>> asyncio.run(main())  # doctest: +NORMALIZE_WHITESPACE
        (['first to one', 'second to two'], {'requests': 2, 'calls': 2, 'hedges': 0, 'won': 0})

    A call may be made twice, and may be cancelled: hedge reads, inference, and other calls that are
    safe to repeat. Cancelling a request cancels its calls. In one request of ten, slower calls are
    not cancelled, so that their times are recorded. A failed call does not end a request while
    another call is in flight; if all fail, the first one's exception is raised, without retries.

    An instance belongs to one event loop, and may answer any number of requests concurrently. It
    keeps the times of the latest 4,096 calls. To export the counts to Prometheus, as
    `hedge_requests_total` and so on, call `REGISTRY.register(hedged)`.

    Attributes:
        counts: Numbers of `requests`, of their `calls`, of `hedges` (copies) among the calls, and
            of hedges that `won`: they answered first.
    """

    def __init__(
        self,
        call: Callable[..., Awaitable[Answer]],
        targets: Sequence[Any] | None = None,
        *,
        budget: float = 1.1,
        name: str = "hedge",
    ):
        """Hedge a call.

        Args:
            call: Called as `call(target, *args, **kwargs)`, or without a target if there are none.
            targets: Clients, addresses or channels, one of which is passed to each call. A copy
                goes to another target than the first call. None for a call with its own load
                balancing, such as a deployment's handle.
            budget: The mean number of calls a request, at most (default: 1.1). Up to ten unused
                copies are saved.
            name: The prefix of the metrics' names.

        Raises:
            ValueError: If the budget is below 1, `targets` is empty, or `call` is not callable.
        """
        if not callable(call):
            raise ValueError(f"call is an async callable (target, ...), not {call!r}")
        if not 1 <= budget < math.inf:
            raise ValueError(f"budget is the mean calls a request, 1 or more, not {budget}")
        if targets is not None and not targets:
            raise ValueError("there is no target: give one or more, or None for a call without")
        self._targets = [()] if targets is None else [(each,) for each in targets]
        self._call, self._budget, self._name = call, budget, name
        self.counts = dict.fromkeys(("requests", "calls", "hedges", "won"), 0)
        number = len(self._targets)
        self._copies = 1 if number == 2 else 2
        self._choice = Choice(simulate.Hedge(math.inf), math.inf, [1.0] * number)
        self._in_flight, self._credit = [0] * number, [0.0] * number
        self._tokens, self._random = 0.0, random.Random(0)
        self._tasks: set[asyncio.Task[Answer]] = set()  # event loops hold only weak references
        self._calls: deque[TimedCall] = deque(maxlen=picking.PICKING.kept)
        self._raced: deque[float] = deque(maxlen=picking.PICKING.kept)  # seconds of hedged requests
        self._trials = picking.CopyTrials()
        self._due, self._rests_until = 20.0, -math.inf

    async def __call__(self, *args: Any, **kwargs: Any) -> Answer:
        """Return the first answer.

        Raises:
            Exception: The first call's, if all have failed.
        """
        loop, policy = asyncio.get_running_loop(), self._choice.hedge
        self.counts["requests"] += 1
        self._tokens = min(self._tokens + self._budget - 1, picking.PICKING.saved)
        # If copies are useless, a share of requests tries them; a very long call may hang.
        hedges = policy.hedges or self._random.random() < picking.PICKING.tried
        limit = self._choice.median * (policy.limit if hedges else picking.PICKING.hung)
        limit = max(limit, 1e-3)  # the resolution of timers
        began = loop.time()
        due, tasks, used = began + limit, [], []
        self._send(args, kwargs, tasks, used)
        left_to_run = 0.0
        try:
            while pending := [task for task in tasks if not task.done()]:
                left = self._copies + 1 - len(tasks)
                wait = max(due - loop.time(), 0) if left and due < math.inf else None
                done, _ = await asyncio.wait(pending, timeout=wait, return_when="FIRST_COMPLETED")
                for task in tasks:
                    if task in done and not task.cancelled() and task.exception() is None:
                        left_to_run = picking.PICKING.finished
                        self.counts["won"] += task is not tasks[0]
                        if hedges and len(tasks) > 1:
                            self._raced.append(loop.time() - began)
                        return task.result()
                if not done:
                    copies = min(policy.at_once, left, int(self._tokens))
                    due += limit if copies else due - began  # without budget: wait twice as long
                    for _ in range(copies):
                        self._tokens -= 1
                        self._send(args, kwargs, tasks, used)
            return tasks[0].result()  # raises, since all calls have failed
        finally:
            if self._random.random() >= left_to_run:
                for task in tasks:
                    task.cancel()
            if self.counts["requests"] >= self._due and loop.time() >= self._rests_until:
                self._decide(loop)

    def _send(
        self, args: Sequence[Any], kwargs: dict[str, Any], tasks: list[Any], used: list[int]
    ) -> None:
        """Send a call to a target that this request has not used yet, if there are several.

        This is smooth weighted round robin. A target with more calls in flight than its weight's
        share gets fewer.
        """
        weights, free = self._choice.weights, [*range(len(self._targets))]
        if len(free) > 1:
            free = [each for each in free if each not in used]
        usual = sum(self._in_flight) / sum(weights)  # calls in flight, by weight
        shares = {
            each: weights[each] * (1 + usual * weights[each]) / (1 + self._in_flight[each])
            for each in free
        }
        for each, share in shares.items():
            self._credit[each] += share / sum(shares.values())
        target = max(free, key=self._credit.__getitem__)
        self._credit[target] -= 1

        async def run() -> Answer:
            return await self._call(*self._targets[target], *args, **kwargs)

        loop = asyncio.get_running_loop()
        call, task = TimedCall(target, loop.time(), first=not used), loop.create_task(run())
        self.counts["calls"] += 1
        self.counts["hedges"] += not call.first
        self._in_flight[target] += 1

        def ended(task: asyncio.Task[Answer]) -> None:
            self._in_flight[target] -= 1
            self._tasks.discard(task)
            call.seconds = loop.time() - call.sent
            if task.cancelled():
                call.end = "cancelled"
            else:
                call.end = "answered" if task.exception() is None else "failed"
            self._calls.append(call)

        task.add_done_callback(ended)
        self._tasks.add(task)
        tasks.append(task)
        used.append(target)

    def _decide(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the next decision on another thread, which takes about 30 ms."""
        requests, began = self.counts["requests"], loop.time()
        known = list(self._calls), np.array(self._raced), self._choice, self._trials
        run = functools.partial(next_choice, *known, copies=self._copies, budget=self._budget)
        self._due = math.inf
        self._raced.clear()

        def decided(future: asyncio.Future[Choice]) -> None:
            self._due = min(2 * requests, requests + picking.PICKING.every)
            self._rests_until = loop.time() + (loop.time() - began) / picking.PICKING.time_share
            try:
                self._choice = future.result()
            except Exception:  # keep the present choice; the next decision may succeed
                _LOG.exception("deciding when to hedge failed")

        loop.run_in_executor(None, run).add_done_callback(decided)

    def status(self) -> dict[str, Any]:
        """Return the counts, whether and when late requests are hedged, and targets' weights."""
        policy, median, weights = self._choice
        known = policy.limit < math.inf
        return self.counts | {
            "hedging": known and policy.hedges,
            "after_seconds": policy.limit * median if known else None,
            "copies_at_once": policy.at_once,
            "weights": list(weights),
        }

    def collect(self) -> Iterator[Any]:
        """Yield the counts as metrics for Prometheus's Python client."""
        from prometheus_client.core import CounterMetricFamily

        for name, number in self.counts.items():
            yield CounterMetricFamily(f"{self._name}_{name}", f"Number of {name}.", value=number)
