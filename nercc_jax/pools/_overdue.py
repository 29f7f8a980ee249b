"""When an answer is late enough to act on it."""

import dataclasses


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
