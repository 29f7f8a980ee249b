"""The share of the time that calibrating, learning, and choosing settings may take."""

import math

from ._clock import AbstractClock


class TimeShare:
    """A bound on the share of the time that a thread's work may take.

    Programs of JAX keep all cores of a CPU busy, and queries are answered meanwhile.
    """

    def __init__(
        self, clock: AbstractClock, share: float, *, longest: float = math.inf, at_once: float = 0.0
    ):
        """Start with nothing to make up for.

        One piece of work costs a pause of `longest` seconds at most. `at_once` seconds of work
        beyond the share may be done without a pause.
        """
        self._clock, self._share, self._longest = clock, share, longest
        self._at_once = at_once
        self._paid_until = -math.inf

    @property
    def next(self) -> float:
        return self._paid_until - self._at_once / self._share

    def spend(self, begin: float, share: float | None = None) -> float:
        """Count work from `begin` until now, at another share if given; return its seconds."""
        now = self._clock.now()
        pause = min((now - begin) * (1 / (share or self._share) - 1), self._longest)
        self._paid_until = max(self._paid_until, now) + pause
        return now - begin
