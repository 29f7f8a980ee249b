"""When an answer is late enough to act on it."""

import collections
import dataclasses
import math

_WINDOW = 256  # answers of a size that a running quantile looks at
_REFRESH = 16  # answers between two looks


@dataclasses.dataclass(frozen=True)
class Overdue:
    """When a task is overdue: after `factor` times this `quantile` of recent service times.

    Those of batches of its size count, and it is never less than the quantile and `floor` seconds:
    where nobody straggled, but 8 clients kept two cores busy with LeNet5 (2 ms), 18 % of the calls
    took longer than 1.5 times the median, 1.0 % than the median and 5 ms, 0.2 % than it and 10 ms.
    Hedging as published waits for the 95th percentile: `Overdue(0.95, 1.0, floor=0.0)`. Where more
    than one in twenty straggles that quantile is a straggler's own time, so the default looks at
    the median. Until `least` answers are in, nothing is overdue.
    """

    quantile: float = 0.5
    factor: float = 3.0
    least: int = 20
    floor: float = 0.01

    def __post_init__(self):
        if not 0 < self.quantile < 1 or not self.factor > 0:
            raise ValueError(
                f"a quantile in (0, 1) and a positive factor are needed, not {self.quantile} "
                f"and {self.factor}"
            )
        if not 0 <= self.floor < math.inf:
            raise ValueError(f"floor is a number of seconds from 0 on, not {self.floor}")

    def after(self, usual: float) -> float:
        """Seconds after which a task is overdue, where the quantile of service times is `usual`."""
        return max(self.factor * usual, usual + self.floor)


class AnswerTimes:
    """How long answers take, by the size of their batch, and from when on one is late.

    Of a size that has not been seen often enough the others tell a bound: it takes no longer than a
    larger one, nor, in proportion, than a smaller one. Not for several threads at once.
    """

    def __init__(self, overdue: Overdue | None = None):
        self.overdue = overdue or Overdue()
        self._times: dict[int, collections.deque[float]] = {}
        self._seen: collections.Counter[int] = collections.Counter()
        # By size, where enough is known.
        self._medians: dict[int, float] = {}
        self._limits: dict[int, float] = {}

    def add(self, size: int, seconds: float) -> bool:
        """Takes the seconds of an answer to `size` data points; whether a limit fell by that."""
        times = self._times.setdefault(size, collections.deque(maxlen=_WINDOW))
        times.append(seconds)
        self._seen[size] += 1
        before = self._limits.get(size, math.inf)
        if len(times) < self.overdue.least or (before < math.inf and self._seen[size] % _REFRESH):
            return False
        ordered = sorted(times)
        self._medians[size] = ordered[len(ordered) // 2]
        usual = ordered[int(self.overdue.quantile * len(ordered))]
        self._limits[size] = self.overdue.after(usual)
        return self._limits[size] < before

    def median(self, size: int) -> float:
        """Seconds that an answer to `size` data points takes; infinite until enough is known."""
        return _bound(self._medians, size)

    def limit(self, size: int) -> float:
        """Seconds after which an answer to `size` data points is late; infinite at first."""
        return _bound(self._limits, size)

    def under(self, overdue: Overdue) -> "AnswerTimes":
        """What these have seen, looked at by another rule."""
        other = AnswerTimes(overdue)
        for size, times in self._times.items():
            for seconds in times:
                other.add(size, seconds)
        return other


class TimesByRule:
    """One pool's answer times, under every rule that one of its batches has."""

    def __init__(self, overdue: Overdue):
        self._times = {overdue: AnswerTimes(overdue)}

    def under(self, overdue: Overdue) -> AnswerTimes:
        """The running times that all batches of a rule look at; a new rule's know the past."""
        if overdue not in self._times:
            first = next(iter(self._times.values()))
            self._times[overdue] = first.under(overdue)
        return self._times[overdue]

    def add(self, size: int, seconds: float) -> bool:
        """As `AnswerTimes.add`, for each."""
        fell = False
        for times in self._times.values():
            fell |= times.add(size, seconds)
        return fell


def _bound(known: dict[int, float], size: int) -> float:
    """By size, the number of this one, or what it cannot be above."""
    found = known.get(size)
    if found is not None:
        return found
    bounds = (seconds * max(1.0, size / other) for other, seconds in known.items())
    return min(bounds, default=math.inf)
