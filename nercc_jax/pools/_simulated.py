"""A pool on paper: its workers answer when a law says so, by a clock that jumps."""

import heapq
import itertools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from ..inference import Model
from ._clock import BEAT, AbstractClock, AbstractTurns
from ._crew import AbstractCrew, WorkerDied
from ._desk import Desk
from ._faults import Faults, InjectedError, WorkerFaults
from ._overdue import Overdue
from ._pool import AbstractPool

Hear = Callable[[int, int, Any], None]


class SimulatedClock(AbstractClock):
    """Jumps from event to event, all of one thread: an hour of traffic takes seconds.

    What happens at the same moment happens in the order in which it was planned, so that a run is
    the same each time, if what runs by the clock draws from seeds.
    """

    def __init__(self):
        self._now, self._numbers = 0.0, itertools.count()
        self._events: list[tuple[float, int, Callable[[], Any]]] = []

    def now(self) -> float:
        return self._now

    def at(self, when: float, event: Callable[[], Any]) -> None:
        """Plans `event()` for that time, or for now if it has passed."""
        heapq.heappush(self._events, (max(float(when), self._now), next(self._numbers), event))

    @property
    def next(self) -> float:
        """When the next event is planned; infinite if none is."""
        return self._events[0][0] if self._events else math.inf

    def step(self) -> None:
        """The next event. Raises: IndexError where none is planned."""
        self._now, _, event = heapq.heappop(self._events)
        event()

    def run(self, until: float) -> None:
        """All events up to that time, at which the clock stands then."""
        while self.next <= until:
            self.step()
        self._now = max(self._now, until)

    def turns(self, name: str, turn: Callable[[], float]) -> AbstractTurns:
        return _Turns(self, turn)

    def wait(self, condition: threading.Condition, seconds: float) -> None:
        """Time goes on, an event at most: nobody else would notify anybody."""
        end = self._now + seconds
        if self._events and self.next <= end:
            self.step()
        elif end < math.inf:
            self._now = end
        else:
            raise RuntimeError("nothing is planned any more, and somebody waits for it without end")


class _Turns(AbstractTurns):
    def __init__(self, clock: SimulatedClock, turn: Callable[[], float]):
        self._clock, self._turn = clock, turn
        self._due = math.inf
        self._closed = False

    def start(self) -> None:
        self.wake()

    def wake(self) -> None:
        self._plan(self._clock.now())

    def close(self, seconds: float | None = None) -> None:
        self._closed = True

    def _plan(self, due: float) -> None:
        """The next turn, unless it is planned for then or earlier."""
        if due < self._due:
            self._due = due
            self._clock.at(due, lambda: self._take(due))

    def _take(self, due: float) -> None:
        if due == self._due and not self._closed:
            self._due = math.inf
            self._plan(min(self._turn(), self._clock.now() + BEAT))


class SimulatedPool(AbstractPool):
    """Workers that stand on paper, as many as one likes: who gets what, and when, as elsewhere.

    Whatever happens does so in one thread, as time goes on (`clock.run`, or a wait for a batch).
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
        overdue: Overdue | None = None,
        max_attempts: int = 3,
        hang_timeout: float = 60.0,
        start_timeout: float = 60.0,
    ):
        """Starts the workers, which are ready at once.

        Args:
            model: as in `DevicePool`, on NumPy arrays; it is called at the moment of an answer.
            seconds: that an answer to a batch of so many data points takes.
            clock: of this pool, and of whatever else lives by it; a new one unless given.
            faults: what goes wrong on purpose, and how much longer an answer takes; origins of
                episodes are times of the clock.
            start_seconds: that a worker's further lives take to begin.

        Everything else is as in `DevicePool`.
        """
        models = (model,) if callable(model) else tuple(model)
        self._desk = Desk(
            _Paper(models, seconds, clock := clock or SimulatedClock(), faults, start_seconds),
            num_workers,
            len(models),
            overdue=overdue or Overdue(),
            max_attempts=max_attempts,
            hang_timeout=hang_timeout,
            start_timeout=start_timeout,
            clock=clock,
        )


class _Paper(AbstractCrew):
    """Outcomes are planned as batches are sent."""

    def __init__(
        self,
        models: Sequence[Model],
        seconds: Callable[[int], float],
        clock: SimulatedClock,
        faults: Faults | None,
        start_seconds: float,
    ):
        self._models, self._seconds, self._clock = models, seconds, clock
        self._faults, self._start_seconds = faults or Faults(), start_seconds
        self._lives: dict[int, tuple[WorkerFaults, Hear]] = {}

    def start(self, worker: int, life: int, hear: Hear) -> None:
        self._lives[worker] = self._faults.at(worker, life, self._clock.now), hear
        ready = self._clock.now() + (self._start_seconds if life else 0.0)
        self._clock.at(ready, lambda: hear(worker, life, None))

    def parcel(self, batch: PyTree) -> PyTree:
        return batch

    def send(self, worker: int, life: int, kind: int, batch: PyTree) -> None:
        faults, hear = self._lives[worker]
        delay, kinds = faults.next()
        if "hang" in kinds:
            return
        size = len(jax.tree.leaves(batch)[0])
        end = self._clock.now() + self._seconds(size) + delay
        self._clock.at(end, lambda: hear(worker, life, self._outcome(kinds, kind, batch)))

    def _outcome(self, kinds: set, kind: int, batch: PyTree) -> Any:
        if "death" in kinds:
            return WorkerDied("it died on purpose")
        if "error" in kinds:
            return InjectedError("injected on purpose")
        try:
            y = self._models[kind](batch)
        except Exception as error:  # as in every pool: that answer's trouble
            return error
        return jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), y) if "nan" in kinds else y

    def lacking(self) -> None:
        """All workers have places."""

    def close(self) -> None:
        """What is planned is no longer listened to."""
