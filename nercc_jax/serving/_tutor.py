"""Learning beside the batcher: the thread that answers queries does nothing else."""

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from ..pools import AbstractClock
from ._fidelity import Expected, Fidelity

_LOG = logging.getLogger(__name__)

# Of the time, that learning may take: programs of JAX keep all cores of a CPU busy. It rests within
# a lesson, too, so that what it does at once is short: once its steps have taken so many seconds
# more than their share.
_SHARE = 0.005
_AT_ONCE = 0.01
_LONGEST = 10.0  # seconds of rest that one step costs at most
_END = object()  # of steps


class Tutor:
    """A thread that teaches a `Fidelity`, whose results others read while it works.

    Its inbox has a slot for a group and one for a set of answers that nobody knows yet. While they
    are taken no other group is wanted, and another set takes the old one's place: traffic has more
    to tell than there is time for.
    """

    def __init__(
        self,
        fidelity: Fidelity,
        observe: Callable[[Any, float], Any],
        clock: AbstractClock,
    ):
        self.fidelity, self._observe = fidelity, observe
        self._lesson: tuple[np.ndarray, np.ndarray] | None = None
        self._asked: tuple[int, np.ndarray] | None = None
        self._steps: Iterator[None] | None = None  # of what it is about
        self._clock, self._paid_until = clock, -math.inf  # when its share makes up for its steps
        self._turns = clock.turns("nercc-tutor", self._turn)
        self.start = self._turns.start

    @property
    def curious(self) -> bool:
        """Whether a group is wanted. To make one of what came, and to wake a thread, takes time."""
        return self._lesson is None

    def hungry(self, queries: int) -> bool:
        """Whether all answers to a group of so many are wanted: nothing is known of such yet."""
        return self.curious and self.fidelity.hungry(queries)

    def teach(
        self,
        answers: Float[np.ndarray, "num_workers ..."],
        originals: Float[np.ndarray, "queries ..."],
    ) -> None:
        """A group for `Fidelity.learn`. Comes back at once."""
        self._lesson = answers, originals
        self._turns.wake()

    def expect(self, queries: int, mask: Bool[np.ndarray, " num_workers"]) -> Expected:
        """`Fidelity.expect`; what is not known yet is NaN, and will be known soon."""
        expected = self.fidelity.expect(queries, mask)
        if not expected.fresh:
            self._asked = queries, mask.copy()
            self._turns.wake()
        return expected

    def close(self) -> None:
        self._turns.close()

    def _turn(self) -> float:
        if self._steps is None and self._lesson is None and self._asked is None:
            return math.inf
        if self._clock.now() >= self._next:
            seconds = self._try(self._step)
            since = max(self._paid_until, self._clock.now())
            self._paid_until = since + min(seconds * (1 / _SHARE - 1), _LONGEST)
        return max(self._next, self._clock.now())

    @property
    def _next(self) -> float:
        """When the next step may begin."""
        return self._paid_until - _AT_ONCE / _SHARE

    def _try(self, step: Callable[[], None]) -> float:
        """Does it, and returns the seconds that it took."""
        begin = self._clock.now()
        try:
            step()
        except Exception:
            # What was known stays; the next group may do better.
            _LOG.exception("learning from a group failed")
            self._observe("internal_error", 1)
        seconds = self._clock.now() - begin
        self._observe("learn_seconds", seconds)
        return seconds

    def _step(self) -> None:
        self._steps = self._steps or self._learn()
        if next(self._steps, _END) is _END:
            self._steps = None

    def _learn(self) -> Iterator[None]:
        lesson, self._lesson = self._lesson, None
        asked, self._asked = self._asked, None
        if lesson is not None:
            yield from self.fidelity.learn_by_steps(*lesson)
        if asked is not None:
            yield from self.fidelity.foresee_by_steps(*asked)
