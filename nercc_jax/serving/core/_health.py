"""Health: whether a batcher would answer a query now, and if not, why."""

import dataclasses
import math

from ...pools import AbstractPool
from ...pools.clock import AbstractClock
from ._coder import Coder

# Seconds without a turn after which a thread counts as stuck, ...
STUCK = 5.0
# ... and without an answer while queries wait after which a batcher is not ready. Models that take
# long have this many answer times instead.
_SILENT, _ANSWER_TIMES = 3.0, 5
# Failed queries in a row after which the batcher sends a probe, and the seconds between probes.
_SUSPICIOUS, _PROBE_EVERY = 3, 1.0


@dataclasses.dataclass(frozen=True)
class Health:
    """The health of a batcher or a model: where it is not live, only a restart would help."""

    live: bool
    ready: bool
    trouble: str | None = None


def pool_health(pool: AbstractPool, coder: Coder) -> Health:
    """Return whether the workers of a pool would answer a group now.

    A group takes as many workers as the code needs answers, if the pool has a worker for each coded
    data point; otherwise one worker computes several of them.
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


class HealthMonitor:
    """Judges a batcher by its turns and answers. Its thread reports, any thread may ask.

    Attributes:
        failed_in_a_row: the number of requests that failed since the last answer.
        probe_error: why the latest probe failed, if nothing was answered since.
    """

    def __init__(self, clock: AbstractClock):
        self._clock = clock
        self._last_turn = clock.now()
        # Since when somebody waits and nobody was answered; infinite if nobody waits.
        self._silent_since = math.inf
        self.failed_in_a_row = 0
        self._probed_at = 0.0
        self.probe_error: str | None = None

    def report_turn(self, open_requests: bool) -> float:
        """Record a turn of the batcher's thread, and return the time."""
        now = self._last_turn = self._clock.now()
        if not open_requests:
            self._silent_since = math.inf
        elif math.isinf(self._silent_since):
            self._silent_since = now
        return now

    def report_answer(self, now: float) -> None:
        self._silent_since, self.failed_in_a_row, self.probe_error = now, 0, None

    def probe_due(self, now: float) -> bool:
        """Return whether to send a probe now; if so, the next one is due a second later."""
        suspicious = self.failed_in_a_row >= _SUSPICIOUS or self.probe_error is not None
        due = suspicious and now >= self._probed_at + _PROBE_EVERY
        if due:
            self._probed_at = now
        return due

    def trouble(self, answer_time: float) -> Health | None:
        """Return what is wrong, if anything; an answer usually takes `answer_time` seconds."""
        now = self._clock.now()
        if now - self._last_turn > STUCK:
            return Health(False, False, f"the batcher is stuck for {now - self._last_turn:.0f} s")
        slow = _ANSWER_TIMES * answer_time if answer_time < math.inf else 0.0
        silence = now - self._silent_since
        if silence > max(_SILENT, slow):
            return Health(True, False, f"no answer for {silence:.0f} s while queries wait")
        if self.probe_error is not None:
            return Health(True, False, f"a query of its own got no answer: {self.probe_error}")
        return None
