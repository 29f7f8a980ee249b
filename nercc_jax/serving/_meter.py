"""The measurements of one served model: counted as they come, and read by metrics and status."""

import bisect
import collections
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..codes import AbstractCode
from ..pools import AbstractPool

OUTCOMES = ("ok", "deadline", "failed", "cancelled")
OUTCOMES += ("invalid", "overloaded", "queue_full", "draining")
ANSWERS = ("exact", "decoded", "predicted", "reexecuted")
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_RECENT = 60.0  # seconds that the status page's latencies cover, ...
_MOST = 50_000  # ... unless there are more requests than this


class Meter:
    """The measurements of one model.

    Attributes:
        served: The model's pool and code; None once it is closed.
        waiting: Returns the number of queries that wait to be sent.
        last_answer: The time of the latest answer, by the wall clock; 0 for none yet.
    """

    def __init__(
        self, pool: AbstractPool, code: AbstractCode, buckets: Mapping[str, Sequence[float]]
    ):
        """Count from 0; measures with buckets are also counted by their numbers."""
        self.served: tuple[AbstractPool, AbstractCode] | None = pool, code
        self.waiting: Callable[[], float] = lambda: 0
        self.last_answer = 0.0
        self._lock = threading.Lock()
        self._counts: collections.Counter[str] = collections.Counter()
        self._sums: collections.defaultdict[str, float] = collections.defaultdict(float)
        self._edges = buckets
        self._by_bucket = {what: [0] * (len(edges) + 1) for what, edges in buckets.items()}
        self._recent: collections.deque[tuple[float, float]] = collections.deque(maxlen=_MOST)
        self._responded = [0] * (code.num_workers + 1)

    def observe(self, what: str, number: int | float) -> None:
        """Take a measurement, from any thread. NaN is for what is not known."""
        number = float(number)
        if math.isnan(number):
            return
        with self._lock:
            self._counts[what] += 1
            self._sums[what] += number
            if what in self._edges:
                self._by_bucket[what][bisect.bisect_left(self._edges[what], number)] += 1
            if what == "request_ok":
                self._recent.append((time.monotonic(), number))
                self.last_answer = time.time()
            elif what == "workers_responded":
                self._responded[min(int(number), len(self._responded) - 1)] += 1

    def read(self, what: str) -> tuple[int, float, Sequence[int]]:
        """Return how often a measure came, the sum of its numbers, and the counts by bucket."""
        with self._lock:
            return self._counts[what], self._sums[what], list(self._by_bucket.get(what, ()))

    def close(self) -> None:
        """Let the workers and the queue go; what was counted stays."""
        self.served, self.waiting = None, lambda: 0

    def status(self) -> dict[str, Any]:
        """Return what the status page shows of it."""
        with self._lock:
            counts, sums = self._counts.copy(), self._sums.copy()
            recent, responded = list(self._recent), list(self._responded)
        answers = {answer: int(sums[f"query_{answer}"]) for answer in ANSWERS}
        requests = {outcome: counts[f"request_{outcome}"] for outcome in OUTCOMES}
        approximate, queries = answers["decoded"] + answers["predicted"], sum(answers.values())
        expected, now = counts["expected_disagreement"], time.monotonic()
        seconds = np.array([value for at, value in recent if now - at <= _RECENT])
        bins, _ = np.histogram(seconds, bins=(0, *SECONDS, np.inf))
        shares = {"p50_ms": 0.5, "p99_ms": 0.99, "p999_ms": 0.999}
        return {
            "totals": {
                "requests": sum(requests.values()),
                "queries": answers,
                "errors": {name: count for name, count in requests.items() if name != "ok"},
                "groups": counts["group_fill"],
                "stragglers": int(sums["straggler"]),
                "reexecutions": int(sums["reexecution"]),
            },
            "latency": {
                "bounds_ms": [1000 * bound for bound in SECONDS],
                "counts": bins.tolist(),
                **{
                    name: 1000 * float(np.quantile(seconds, share)) if len(seconds) else None
                    for name, share in shares.items()
                },
                "number": len(seconds),
                "seconds": _RECENT if len(recent) < _MOST else now - recent[0][0],
            },
            "responded": {"counts": responded},
            "fidelity": {
                "decoded_share": approximate / queries if queries else None,
                "expected_disagreement": (
                    sums["expected_disagreement"] / expected if expected else None
                ),
            },
        }
