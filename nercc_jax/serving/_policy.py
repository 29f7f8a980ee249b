"""How a batcher forms groups, how long it waits, and what it gives out."""

import dataclasses
import math
from typing import Literal, TypeAlias

# Seconds that a request may wait at most, whoever asks: no wait is without a bound.
MAX_DEADLINE_S = 3600.0


@dataclasses.dataclass(frozen=True)
class BatchingPolicy:
    """Batching, waiting and fidelity.

    - `max_batch_size`: queries that a worker gets at once, at most. One idle worker and a long
      queue make large batches, many idle workers single queries. A power of two: batches are
      powers of two, for which everything is compiled ahead.
    - `batch_wait_timeout_s`: seconds after which a group that is not full is completed without
      waiting for more queries. (Of a code that sends no query as it came, nothing is sent before.)
    - `max_queue_size`: queries that may wait to be sent; more are refused at once. (Of high
      priority a quarter more may.)
    - `deadline_s`: seconds that a request has unless it says otherwise; at most an hour.
    - `priority_lead_s`: seconds that queries of high priority go ahead of others: before those that
      came up to so long earlier, and behind those that have waited longer. 0: nobody does.
    - `patience`: a coded data point straggles once it is out for so many times the running
      `quantile` (the median) of answer times. What straggles is decoded, or sent again. Hedging as
      published has the quantile 0.95 and the patience 1.
    - `wait_for`: how many answers of a group are enough to decode, if nothing better is known;
      unless given, 85 % of N but at least K, or half of the redundancy for interleaved codes.
    - `max_disagreement`: of the queries whose own worker straggles (or that have none), this share
      may get a label that is not the model's own, in the mean. Each is decoded and judged by
      itself, by its margin and deviation: what is sure enough for that is answered at once; what is
      doubtful waits for more answers, and is sent again once none are to come. (A code that is no
      regression tells no deviation: there the mean over queries at its place decides for a query.)
      None: decode as soon as `wait_for` answers are in, whatever is expected.
    - `tolerance`: for functions, with a predictor: a straggler's query is answered by it where that
      is off by no more, in units of the outputs, in nine of ten cases. Then nothing is decoded.
    - `redundancy`: "always" sends what a code has beyond the queries themselves while workers are
      free; "doubtful" only where a predictor could not answer for one of a group's queries: copies
      of those alone, where the code has copies. None is sent before the predictor knows enough.
    - `max_redundancy`: with "doubtful", send no more than this share of the queries for that.
    - `max_reexecution`: send no more than this share of all queries again because they are
      doubtful; beyond it what is best known is given out, with its doubt. None: no bound. (What
      cannot be decoded at all is sent again in any case, and counts.)
    - `max_calls`: calls a query that may be spent in the mean (of batches, rows). Then patience and
      redundancy are not fixed, but picked as queries are served, by the tail that is measured: see
      `Controller`. Of what is said here redundancy is the most, and hardly more queries straggle
      than by this patience. None: as is said here.
    - `ordering`: arrange queries that go out together so that those coded beside each other are
      alike. Queries are compared as they come, and none waits for it.
    - `copies`: workers that may have the same query in hand, when it is to be answered exactly, or
      cannot be decoded, and the first straggles (hedging). 1: what straggles is waited for.
    """

    max_batch_size: int = 8
    batch_wait_timeout_s: float = 0.01
    max_queue_size: int = 1024
    deadline_s: float = 10.0
    priority_lead_s: float = 1.0
    patience: float = 1.5
    quantile: float = 0.5
    wait_for: int | None = None
    max_disagreement: float | None = None
    max_reexecution: float | None = None
    tolerance: float | None = None
    redundancy: Literal["always", "doubtful"] = "always"
    max_redundancy: float | None = None
    max_calls: float | None = None
    ordering: bool = True
    copies: int = 2

    def __post_init__(self):
        if self.max_batch_size < 1 or self.max_batch_size & (self.max_batch_size - 1):
            raise ValueError(f"max_batch_size must be a power of two, not {self.max_batch_size}")
        if self.max_queue_size < 1 or self.copies < 1:
            raise ValueError(
                f"max_queue_size {self.max_queue_size} and copies {self.copies} must be 1 or more"
            )
        if not (
            0 <= self.batch_wait_timeout_s < math.inf
            and 0 < self.deadline_s <= MAX_DEADLINE_S
            and self.patience > 0
        ):
            raise ValueError(
                f"batch_wait_timeout_s {self.batch_wait_timeout_s} must be 0 or more, deadline_s "
                f"{self.deadline_s} from above 0 to {MAX_DEADLINE_S:g}, and patience "
                f"{self.patience} positive"
            )
        if not 0 < self.quantile < 1:
            raise ValueError(f"quantile must be between 0 and 1, not {self.quantile}")
        if not 0 <= self.priority_lead_s < math.inf:
            raise ValueError(f"priority_lead_s must be 0 or more, not {self.priority_lead_s}")
        if self.max_disagreement is not None and not 0 <= self.max_disagreement < 1:
            raise ValueError(f"max_disagreement must be in [0, 1), not {self.max_disagreement}")
        if self.tolerance is not None and not 0 < self.tolerance < math.inf:
            raise ValueError(f"tolerance must be positive, not {self.tolerance}")
        if self.redundancy not in ("always", "doubtful"):
            raise ValueError(f"redundancy must be 'always' or 'doubtful', not {self.redundancy!r}")
        if self.max_redundancy is not None and not self.max_redundancy >= 0:
            raise ValueError(f"max_redundancy must be 0 or more, not {self.max_redundancy}")
        if self.max_calls is not None and not 1 <= self.max_calls < math.inf:
            raise ValueError(
                f"max_calls must be 1 or more, the call of each query, not {self.max_calls}"
            )
        if self.max_reexecution is not None and not 0 <= self.max_reexecution <= 1:
            raise ValueError(f"max_reexecution must be in [0, 1], not {self.max_reexecution}")

    def shared_by(self, ways: int) -> "BatchingPolicy":
        """The same where answers are guessed in several ways, which share what may be wrong."""
        if self.max_disagreement is None or ways < 2:
            return self
        return dataclasses.replace(self, max_disagreement=self.max_disagreement / ways)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The sizes of batches that workers get."""
        return tuple(1 << power for power in range(self.max_batch_size.bit_length()))


# What is measured, and what its number is: seconds, a count, or a share.
Measure: TypeAlias = Literal[
    # Requests by how they ended, with their seconds, ...
    "request_ok",
    "request_deadline",
    "request_failed",
    "request_cancelled",
    # ... and 0 for those refused before they were requests.
    "request_queue_full",
    "request_draining",
    "request_invalid",
    "request_overloaded",
    # Queries by how they were answered.
    "query_exact",
    "query_decoded",
    "query_predicted",
    "query_reexecuted",
    "high_priority",
    "queue_seconds",
    "compute_seconds",
    "batch_size",
    "group_fill",
    "order_seconds",
    "encode_seconds",
    "decode_seconds",
    "workers_heard",
    "expected_disagreement",
    "straggler",
    "reexecution",
    "over_budget",
    "predict_seconds",
    # Of the learning that goes on beside, a turn of it.
    "learn_seconds",
    # Something of ours failed, which should not.
    "internal_error",
    # Predictions went wrong more often than was promised.
    "drift",
    # Another patience or redundancy was picked.
    "policy_change",
    "audit_same",
    "audit_other",
]
