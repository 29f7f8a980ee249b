"""Service times of a pool's calls, and when a call counts as overdue."""

import collections
import copy
import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

_WINDOW = 256  # latest answers of one size from which quantiles are taken
# Each of the first `_FIRST` answers updates the quantiles, and then one in `_REFRESH`.
_FIRST, _REFRESH = 20, 16


class Call(NamedTuple):
    """One call of a worker: see `AbstractPool.calls`."""

    sent: float
    seconds: float
    size: int
    worker: int


@dataclasses.dataclass(frozen=True)
class Overdue:
    """A rule for when a task is overdue: after `factor` times a quantile of recent service times.

    The quantile is that of batches of the same size, once enough of them were answered. The limit
    is at least the quantile plus `floor` seconds. A measurement shows why: without stragglers, but
    with 8 clients of LeNet5 (2 ms) keeping two cores busy, 18 % of the calls took longer than 1.5
    times the median, 1.0 % longer than the median plus 5 ms, 0.2 % longer than it plus 10 ms.

    Hedging as published waits for the 95th percentile: `Overdue(0.95, 1.0, floor=0.0)`. If more
    than one call in twenty straggles, that quantile is the service time of a straggler, so the
    default is the median.

    Args:
        quantile: The quantile of the service times, between 0 and 1 (default: the median).
        factor: The multiple of that quantile (default: 3).
        least: Answers needed before anything is overdue (default: 20).
        floor: The least number of seconds added to the quantile (default: 0.01).
        copies: Copies sent to other workers together when a task is overdue, if its batch allows
            that many (default: 1).

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> Overdue(factor=2.0).after(usual=0.5)
        1.0
    """

    quantile: float = 0.5
    factor: float = 3.0
    least: int = 20
    floor: float = 0.01
    copies: int = 1

    def __post_init__(self):
        if not 0 < self.quantile < 1 or not self.factor > 0:
            raise ValueError(
                f"a quantile in (0, 1) and a positive factor are needed, not {self.quantile} "
                f"and {self.factor}"
            )
        if not 0 <= self.floor < math.inf:
            raise ValueError(f"floor is a number of seconds from 0 on, not {self.floor}")
        if self.copies < 1:
            raise ValueError(f"copies of an overdue task are 1 or more, not {self.copies}")

    def after(self, usual: float) -> float:
        """Return the seconds after which a task is overdue.

        Args:
            usual: The quantile of the service times, in seconds.
        """
        return max(self.factor * usual, usual + self.floor)


class AnswerTimes:
    """Recent service times by batch size, and the limits after which a rule calls answers late.

    A size with too few answers takes its numbers from the other sizes: a batch is assumed to take
    no longer than a larger one, or than a smaller one scaled in proportion. Not thread-safe.
    """

    def __init__(self, overdue: Overdue | None = None):
        """Start without times."""
        self.overdue = overdue or Overdue()
        self._times: dict[int, collections.deque[float]] = {}
        self._seen: collections.Counter[int] = collections.Counter()
        self._ordered: dict[int, list[float]] = {}  # sorted, at their last update

    def under(self, overdue: Overdue | None) -> "AnswerTimes":
        """Return a view of the same service times, future ones included, with another rule."""
        same = copy.copy(self)  # a shallow copy: it shares the records
        same.overdue = overdue or self.overdue
        return same

    def add(self, size: int, seconds: float) -> bool:
        """Record the seconds of an answer to `size` data points; return whether limits changed."""
        times = self._times.setdefault(size, collections.deque(maxlen=_WINDOW))
        times.append(seconds)
        self._seen[size] += 1
        if self._seen[size] > _FIRST and self._seen[size] % _REFRESH:
            return False
        self._ordered[size] = sorted(times)
        return True

    def median(self, size: int) -> float:
        """Return the median seconds for `size` data points; infinite until enough is known."""
        return self._bound(size, lambda ordered: ordered[len(ordered) // 2])

    def limit(self, size: int) -> float:
        """Return the seconds after which an answer to `size` data points is late.

        Infinite until enough is known.
        """
        rule = self.overdue
        return self._bound(
            size, lambda ordered: rule.after(ordered[int(rule.quantile * len(ordered))])
        )

    def _bound(self, size: int, number: Callable[[list[float]], float]) -> float:
        """Return `number` of this size's sorted times, or a bound on it from the other sizes."""
        least = max(self.overdue.least, 1)
        if len(ordered := self._ordered.get(size, [])) >= least:
            return number(ordered)
        # Copied at once, because other threads add sizes meanwhile.
        others = [each for each in tuple(self._ordered.items()) if len(each[1]) >= least]
        bounds = (number(times) * max(1.0, size / other) for other, times in others)
        return min(bounds, default=math.inf)


def power_of_two(number: int | float) -> int:
    """Return the largest power of two that is at most `number`, and at least 1."""
    return 1 << max(int(number), 1).bit_length() - 1
