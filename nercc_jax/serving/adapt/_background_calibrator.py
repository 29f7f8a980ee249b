"""Calibration beside the scheduler, whose own thread does nothing but answer queries."""

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from ...pools import AbstractClock
from ..core._adaptation import ExpectedError
from ._error_estimator import ErrorEstimator

_LOG = logging.getLogger(__name__)

# The share of the time that calibration may take: programs of JAX keep all cores of a CPU busy. It
# pauses between the steps of an update, too, once they have taken this many seconds more than their
# share, so that each burst is short.
_SHARE = 0.005
_AT_ONCE = 0.01
_LONGEST = 10.0  # seconds of pause that one step costs at most
_END = object()  # of steps


class BackgroundCalibrator:
    """A thread that updates an `ErrorEstimator`, whose results others read meanwhile.

    It holds one group and one set of workers at a time. Until the group is used no other is
    accepted, and a newer set of workers replaces the older: there is more traffic than time.
    """

    def __init__(
        self,
        estimator: ErrorEstimator,
        observe: Callable[[Any, float], Any],
        clock: AbstractClock,
    ):
        self._estimator, self._observe = estimator, observe
        self._group: tuple[np.ndarray, np.ndarray] | None = None
        self._requested: tuple[int, np.ndarray] | None = None
        self._steps: Iterator[None] | None = None  # of the update in progress
        # When the time's share makes up for the steps taken so far.
        self._clock, self._paid_until = clock, -math.inf
        self._turns = clock.turns("nercc-calibrator", self._turn)
        self.start, self.close = self._turns.start, self._turns.close

    @property
    def accepts_samples(self) -> bool:
        """Whether `add_group` would use a group now."""
        return self._group is None

    def needs_samples(self, queries: int) -> bool:
        """Return whether groups of this size should be sent whole."""
        return self.accepts_samples and self._estimator.needs_samples(queries)

    def add_group(
        self,
        answers: Float[np.ndarray, "num_workers ..."],
        originals: Float[np.ndarray, "queries ..."],
    ) -> None:
        """Take a group for `ErrorEstimator.add_group`, and return at once."""
        self._group = answers, originals
        self._turns.wake()

    def expected_error(self, queries: int, mask: Bool[np.ndarray, " num_workers"]) -> ExpectedError:
        """Return the expected error; request an update where it is unknown or out of date."""
        expected = self._estimator.expected_error(queries, mask)
        if not expected.current:
            self._requested = queries, mask.copy()
            self._turns.wake()
        return expected

    def _turn(self) -> float:
        if self._steps is None and self._group is None and self._requested is None:
            return math.inf
        if self._clock.now() >= self._next:
            seconds = self._try_step()
            since = max(self._paid_until, self._clock.now())
            self._paid_until = since + min(seconds * (1 / _SHARE - 1), _LONGEST)
        return max(self._next, self._clock.now())

    @property
    def _next(self) -> float:
        """The time at which the next step may begin."""
        return self._paid_until - _AT_ONCE / _SHARE

    def _try_step(self) -> float:
        """Take a step, and return the seconds that it took."""
        begin = self._clock.now()
        try:
            self._steps = self._steps or self._update()
            if next(self._steps, _END) is _END:
                self._steps = None
        except Exception:
            # Earlier results stay; the next group may do better.
            _LOG.exception("calibrating with a group failed")
            self._steps = None
            self._observe("internal_error", 1)
        seconds = self._clock.now() - begin
        self._observe("learn_seconds", seconds)
        return seconds

    def _update(self) -> Iterator[None]:
        group, self._group = self._group, None
        requested, self._requested = self._requested, None
        if group is not None:
            yield from self._estimator.add_group_in_steps(*group)
        if requested is not None:
            yield from self._estimator.update_expected_in_steps(*requested)
