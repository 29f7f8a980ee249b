"""Learning beside the batcher: the thread that answers queries does nothing else."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from ..pools import AbstractClock
from ._fidelity import Expected, Fidelity

_LOG = logging.getLogger(__name__)

# Of the time, that learning may take: programs of JAX keep all cores of a CPU busy.
_SHARE = 0.005
_LONGEST = 10.0  # seconds that it rests at most


class Tutor:
    """A thread that teaches a `Fidelity`, whose results others read while it works.

    Its inbox has a slot for a group and one for a set of answers that nobody knows yet. While they
    are taken no other group is wanted, and another set takes the old one's place: traffic has more
    to tell than there is time for.
    """

    def __init__(
        self,
        fidelity: Fidelity,
        outputs: Sequence[int],
        observe: Callable[[Any, float], Any],
        clock: AbstractClock,
        first: Callable[[], None],
    ):
        """`outputs`: the shape of a query's answer. `first` is done before there is any lesson."""
        self.fidelity, self._outputs, self._observe, self._first = fidelity, outputs, observe, first
        self._lesson: tuple[np.ndarray, np.ndarray] | None = None
        self._asked: tuple[int, np.ndarray] | None = None
        self._clock, self._rests_until = clock, -math.inf
        self._compiled = False
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
        if not self._compiled:
            # Seconds, which no query has to wait for.
            self._try(self._first)
            self._try(lambda: self.fidelity.compile_lessons(self._outputs))
            self._compiled = True
        if self._lesson is None and self._asked is None:
            return math.inf
        if self._clock.now() >= self._rests_until:
            seconds = self._try(self._learn)
            rest = min(seconds * (1 / _SHARE - 1), _LONGEST)
            self._rests_until = self._clock.now() + rest
        return self._rests_until

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

    def _learn(self) -> None:
        lesson, self._lesson = self._lesson, None
        asked, self._asked = self._asked, None
        if lesson is not None:
            self.fidelity.learn(*lesson)
        if asked is not None:
            self.fidelity.foresee(*asked)
