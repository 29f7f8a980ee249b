"""Whether a batcher would answer now, and if not, why."""

import dataclasses
import math

from ..pools import AbstractClock, AbstractPool
from ._coder import Coder

# Seconds after which a thread that has not turned is taken for stuck, and without an answer while
# queries wait, for a batcher of little use; models that take long get so many answer times.
STUCK, _SILENT, _ANSWER_TIMES = 5.0, 3.0, 5
# Queries without an answer, one after the other, that make a batcher ask itself; and how often.
_SUSPICIOUS, _ASK_EVERY = 3, 1.0


@dataclasses.dataclass(frozen=True)
class Health:
    """`live`: restarting would not help; `ready`: a query would be answered now. Else why not."""

    live: bool
    ready: bool
    trouble: str | None = None


def health_of_pool(pool: AbstractPool, coder: Coder) -> Health:
    """Whether its workers would answer a group now.

    That takes as many as the code needs answers, if it has a worker for each coded data point.
    """
    if pool.trouble is not None:
        return Health(False, False, pool.trouble)
    silence = pool.clock.now() - pool.heartbeat
    if silence > STUCK:
        return Health(False, False, f"the pool is stuck for {silence:.0f} s")
    if pool.alarm is not None:
        return Health(True, False, pool.alarm)
    report = pool.report()
    ready = report.num_workers - report.starting
    least = coder.num_data if report.num_workers >= coder.num_workers else 1
    if ready == 0:
        return Health(True, False, f"none of {report.num_workers} workers is ready")
    if ready < least:
        few = f"{ready} of {report.num_workers} workers are ready"
        return Health(True, False, f"{few}, and a group needs answers of {least}")
    return Health(True, True)


class Pulse:
    """What is seen of answers. The batcher's thread changes it, others ask."""

    def __init__(self, clock: AbstractClock):
        self._clock = clock
        self.beat = clock.now()  # of the batcher's thread
        self._since = math.inf  # when somebody began to wait, since when nobody was answered
        self._failed = 0  # queries, one after the other
        self._asked = 0.0
        self.sick: str | None = None  # why the last question of our own had no answer

    def turn(self, open_: bool) -> float:
        """The thread goes round; whether requests are open. Gives the time."""
        now = self.beat = self._clock.now()
        if not open_:
            self._since = math.inf
        elif math.isinf(self._since):
            self._since = now
        return now

    def answered(self, now: float) -> None:
        self._since, self._failed, self.sick = now, 0, None

    def failed(self) -> None:
        self._failed += 1

    def asks(self, now: float) -> bool:
        """Whether it is time for a question of our own."""
        due = (self._failed >= _SUSPICIOUS or self.sick is not None) and (
            now >= self._asked + _ASK_EVERY
        )
        if due:
            self._asked = now
        return due

    def trouble(self, answer_time: float) -> Health | None:
        """What is wrong, if anything; models take `answer_time` seconds, inf if not known."""
        now = self._clock.now()
        if now - self.beat > STUCK:
            return Health(False, False, f"the batcher is stuck for {now - self.beat:.0f} s")
        slow = _ANSWER_TIMES * answer_time if answer_time < math.inf else 0.0
        if now - self._since > max(_SILENT, slow):
            return Health(
                True, False, f"no answer for {now - self._since:.0f} s while queries wait"
            )
        if self.sick is not None:
            return Health(True, False, f"a query of its own got no answer: {self.sick}")
        return None
