"""Simulated time, and a simulated pool whose workers answer when a law says so."""

import heapq
import itertools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from ..inference.models import Model
from ..pools import AbstractPool, Faults
from ..pools.backend import OnOutcome, WorkerBackend, WorkerDied
from ..pools.clock import BEAT, AbstractClock, Turns
from ..pools.worker import Program, Worker


class SimulatedClock(AbstractClock):
    """A clock that jumps from event to event, in one thread: an hour of traffic takes seconds.

    Events of the same time happen in the order in which they were planned. So a run can be
    repeated exactly, if everything that runs by the clock draws from seeds.

    Example:
        >>> clock = SimulatedClock()
        >>> clock.at(3600.0, lambda: print("an hour later"))
        >>> clock.run(until=7200.0)
        an hour later
        >>> clock.now()
        7200.0
    """

    def __init__(self):
        self._now, self._numbers = 0.0, itertools.count()
        self._events: list[tuple[float, int, Callable[[], Any]]] = []

    def now(self) -> float:
        return self._now

    def at(self, when: float, event: Callable[[], Any]) -> None:
        """Plan a call of `event()` at a time, or now if that time has passed."""
        heapq.heappush(self._events, (max(float(when), self._now), next(self._numbers), event))

    @property
    def next(self) -> float:
        """The time of the next event; infinite if none is planned."""
        return self._events[0][0] if self._events else math.inf

    def step(self) -> None:
        """Jump to the next event; raise IndexError if none is planned."""
        self._now, _, event = heapq.heappop(self._events)
        event()

    def run(self, until: float) -> None:
        """Run all events up to a time, and set the clock to it."""
        while self.next <= until:
            self.step()
        self._now = max(self._now, until)

    def turns(self, name: str, turn: Callable[[], float]) -> Turns:
        planned, closed = math.inf, False

        def plan(due: float) -> None:
            """Plan the next turn, unless it is planned for that time or earlier."""
            nonlocal planned
            if due < planned:
                planned = due
                self.at(due, lambda: take(due))

        def take(due: float) -> None:
            nonlocal planned
            if due == planned and not closed:
                planned = math.inf
                plan(min(turn(), self._now + BEAT))

        def close(seconds: float | None = None) -> None:
            nonlocal closed
            closed = True

        return Turns(lambda: plan(self._now), lambda: plan(self._now), close)

    def start(self, name: str, work: Callable[[], Any]) -> Callable[[], bool]:
        """Do the work at once: it takes no simulated time."""
        work()
        return lambda: False

    def wait(self, condition: threading.Condition, seconds: float) -> None:
        """Jump to the next event, or to the end of the wait: nothing else could notify anybody."""
        end = self._now + seconds
        if self._events and self.next <= end:
            self.step()
        elif end < math.inf:
            self._now = end
        else:
            raise RuntimeError("nothing is planned any more, and a wait for it has no end")


class SimulatedPool(AbstractPool):
    """A pool of simulated workers, with the scheduler of all pools and a clock that jumps.

    Everything happens in one thread while the clock moves: by `clock.run`, or by waiting for a
    batch. The workers are ready at once. The `rules` are as for `DevicePool`: `overdue`,
    `max_attempts`, `hang_timeout` and `start_timeout`.

    Args:
        model: As for `DevicePool`, on NumPy arrays; it is called at the moment of an answer.
        seconds: Returns the seconds that a call takes, given its number of data points.
        clock: The clock of this pool, which others may share (default: a new one).
        faults: Faults to inject, and delays of answers. Their times are the clock's.
        start_seconds: Seconds that a worker takes to start again after a death.

    Example:
        >>> import numpy as np
        >>> with SimulatedPool(np.negative, 2, seconds=lambda size: 5.0) as pool:
        ...     with pool.dispatch(np.ones((4, 1, 3))) as batch:
        ...         answers = batch.wait(deadline=60.0)
        ...     pool.clock.now()
        10.0
    """

    def __init__(
        self,
        model: Model | Sequence[Model],
        num_workers: int,
        *,
        seconds: Callable[[int], float],
        clock: SimulatedClock | None = None,
        faults: Faults | None = None,
        start_seconds: float = 1.0,
        **rules: Any,
    ):
        models = (model,) if callable(model) else tuple(model)
        clock = clock or SimulatedClock()
        self._begin(
            _SimulatedBackend(models, seconds, clock, faults, start_seconds),
            num_workers,
            len(models),
            clock=clock,
            **rules,
        )


class _SimulatedBackend(WorkerBackend):
    """Workers whose outcomes are planned as batches are sent."""

    def __init__(
        self,
        models: tuple[Model, ...],
        seconds: Callable[[int], float],
        clock: SimulatedClock,
        faults: Faults | None,
        start_seconds: float,
    ):
        self._program = Program(models, jax.local_devices()[0], compiled=False)
        self._seconds, self._clock = seconds, clock
        self._faults, self._start_seconds = faults or Faults(), start_seconds
        self._lives: dict[int, tuple[Worker, OnOutcome]] = {}

    def start(self, worker: int, life: int, on_outcome: OnOutcome) -> None:
        faults = self._faults.at(worker, life, self._clock.now)
        self._lives[worker] = Worker(self._program, faults, die=lambda: None), on_outcome
        ready = self._clock.now() + (self._start_seconds if life else 0.0)
        self._clock.at(ready, lambda: on_outcome(worker, life, None))

    def send(self, worker: int, life: int, kind: int, batch: PyTree) -> None:
        simulated, on_outcome = self._lives[worker]
        struck = simulated.faults.strike(batch)
        if "hang" in struck.kinds:
            return

        def answer() -> Any:
            if "death" in struck.kinds:
                return WorkerDied("it died on purpose")
            try:
                return simulated.answer(struck, kind, batch)
            except Exception as error:  # as in every pool, the error is the call's outcome
                return error

        size = len(jax.tree.leaves(batch)[0])
        end = self._clock.now() + self._seconds(size) + struck.seconds
        self._clock.at(end, lambda: on_outcome(worker, life, answer()))

    def close(self) -> None:
        """Do nothing: the scheduler ignores what is still planned."""
