"""When an answer is late enough to act on it."""

import collections
import dataclasses

import numpy as np

_WINDOW = 256  # service times that the running quantile looks at
_REFRESH = 16  # answers between two looks


@dataclasses.dataclass(frozen=True)
class Overdue:
    """When a task is overdue: after `factor` times this `quantile` of recent service times.

    Hedging as published waits for the 95th percentile: `Overdue(0.95, 1.0)`. Where more than one in
    twenty straggles that quantile is a straggler's own time, so the default looks at the median.
    Until `least` answers are in, nothing is overdue.
    """

    quantile: float = 0.5
    factor: float = 3.0
    least: int = 20

    def __post_init__(self):
        if not 0 < self.quantile < 1 or not self.factor > 0:
            raise ValueError(
                f"a quantile in (0, 1) and a positive factor are needed, not {self.quantile} "
                f"and {self.factor}"
            )


class Limits:
    """Recent service times, and the seconds after which each rule has a task overdue."""

    def __init__(self, overdue: Overdue):
        self._times: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._limits = {overdue: np.inf}
        self._seen = 0

    def __getitem__(self, overdue: Overdue) -> float:
        return self._limits[overdue]

    def follow(self, overdue: Overdue) -> None:
        """Keeps this rule's limit, too."""
        if overdue not in self._limits:
            self._limits[overdue] = self._limit(overdue)

    def observe(self, seconds: float) -> bool:
        """Takes a service time; whether a limit fell."""
        self._times.append(seconds)
        self._seen += 1
        # Often at first, until every rule has seen enough to have a limit.
        if self._seen % _REFRESH and not np.isinf(max(self._limits.values())):
            return False
        before = self._limits
        self._limits = {overdue: self._limit(overdue) for overdue in before}
        return any(self._limits[overdue] < limit for overdue, limit in before.items())

    def _limit(self, overdue: Overdue) -> float:
        """The seconds after which this rule has a task overdue, for now."""
        if len(self._times) < overdue.least:
            return np.inf
        return overdue.factor * float(np.quantile(self._times, overdue.quantile))
