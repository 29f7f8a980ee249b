"""Ways to serve queries that the planner compares, and those that take no code."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..codes import AbstractCode, NeRCC, Replication, Uncoded
from ..evaluation import Estimate
from ..stragglers._waiting import (
    Latencies,
    Waiting,
    draw_groups,
    draw_hedged,
    last_prediction,
    own_workers,
)

PROMISED = 0.99  # quantile of the time to the last prediction
EARLY = 0.9  # quantile of the latency, before which nothing is sent again

QUANTILES = (0.5, 0.75, 0.9, 0.95, 0.99)  # of the latency, after which hedging sends again
DRAWS = 20_000  # groups of queries
# Of draws that must not be the same; a number of copies is added to that of hedging.
_STREAMS = {"hedged": 0, "again": 7, "groups": 8}
_MISSED, _WIDER = 0.01, 2.576 / 1.960  # of intervals, and by how much they are wider than 95 %'s


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to serve the queries, and what it does.

    `num_data` queries are coded together on `num_workers` workers, at the layout `points`, in the
    order `order` ("pixels", "surrogate" or None). A group is decoded when `wait_for` workers have
    answered, but not before `min_wait` seconds; predictions with an error probability over
    `limit` are sent again as they came (None: none is). Hedging sends up to `copies` of a
    query, `hedge_copies` further ones every `hedge_after` seconds.

    `extra_work` is what is sent beyond one call a query, as a share: N/K - 1 and what is sent
    again, `resent`. `disagreement` is the share of labels that differ from the model's own, lost
    ones included, and `most_disagreement` what it is at most (see `at_most`); 0 for `exact` ones
    whose predictions are all the model's own. `p50` and `p99` are of the seconds until the last of
    the queries is answered. What is not `held_out` was only screened: on few straggler sets, and
    its disagreement on the data that the error probability is calibrated on.
    """

    system: str
    num_data: int
    num_workers: int
    wait_for: int
    min_wait: float
    points: str | None = None
    order: str | None = None
    copies: int = 1
    hedge_after: float | None = None
    hedge_copies: int = 1
    limit: float | None = None
    resent: float = 0.0
    extra_work: float = dataclasses.field(kw_only=True)
    disagreement: Estimate = Estimate(0.0, 0.0)  # noqa: RUF009, it is frozen
    most_disagreement: float = 0.0
    p50: float = dataclasses.field(kw_only=True)
    p99: float = dataclasses.field(kw_only=True)
    exact: bool = True
    held_out: bool = True

    @property
    def code(self) -> AbstractCode:
        """Return the code, untuned."""
        if self.points is not None:
            return NeRCC(self.num_data, self.num_workers, points=self.points, exact=True)
        if self.num_workers == self.num_data:
            return Uncoded(self.num_data)
        return Replication(self.num_data, self.num_workers)


def feasible(candidate: Candidate, asked: Mapping[str, Any]) -> bool:
    """Return whether a candidate keeps to what was asked for, and was not only screened."""
    workers = candidate.num_workers * asked["num_queries"] // candidate.num_data
    return (
        (candidate.held_out or candidate.exact)
        and workers <= asked["max_workers"]
        and candidate.extra_work <= asked["max_extra_work"] + 1e-9
        and candidate.most_disagreement <= asked["max_disagreement"]
    )


# Without a code nothing depends on the data.


def uncoded_systems(latencies: Latencies, asked: Mapping[str, Any]) -> Iterator[Candidate]:
    """Uncoded, hedged and replicated: exact, or with lost predictions, which count as wrong."""
    queries = asked["num_queries"]
    shape = (number_of_draws(DRAWS, 3 * queries), queries)
    hedges = itertools.product(((2, 1), (3, 1), (3, 2)), QUANTILES)
    for (copies, at_once), share in [((1, 1), 0.0), *hedges]:
        after = latencies.quantile(share) if copies > 1 else np.inf
        stream = _STREAMS["hedged"] + copies
        there, sent = draw_hedged(latencies, stream, shape, after, copies, at_once)
        resent = float(np.mean(sent)) - 1
        yield make_candidate(
            "hedged" if copies > 1 else "uncoded",
            *(queries, queries, queries, 0.0),
            times=np.max(there, axis=1),
            copies=copies,
            hedge_after=after if copies > 1 else None,
            hedge_copies=at_once,
            resent=resent,
        )
    early = latencies.quantile(EARLY)
    for workers in (queries, *numbers_of_workers(queries, asked)):
        yield from _replicated(latencies, queries, workers, early)


def _replicated(
    latencies: Latencies, queries: int, workers: int, early: float
) -> Iterator[Candidate]:
    held = own_workers(Replication(queries, workers))
    system = "replication" if workers > queries else "uncoded"
    shape = (number_of_draws(DRAWS, workers), 1)
    again = latencies.draw(_STREAMS["again"], (*shape, queries))

    def draw(number: int, min_wait: float):
        rule = Waiting(latencies.law, held, number, min_wait)
        return draw_groups(rule, latencies, _STREAMS["groups"], shape)

    if workers > queries:
        yield make_candidate(
            "replication", queries, workers, workers, 0.0, times=draw(workers, 0.0)[1][:, 0]
        )
    for number in waits(queries, workers):
        for min_wait in (0.0, early):
            _, end, own = draw(number, min_wait)
            lost = own > end[..., None]
            summary = {"resent": float(np.mean(lost)), "limit": 0.0}
            times = last_prediction(end, own, lost, again)
            yield make_candidate(system, queries, workers, number, min_wait, times=times, **summary)
        late = float(np.quantile(draw(number, 0.0)[1], PROMISED))
        _, end, own = draw(number, late)
        wrong = np.mean(own > end[..., None], axis=(1, 2))
        half = 1.96 * float(np.std(wrong)) / math.sqrt(len(wrong))
        share = Estimate(float(np.mean(wrong)), half)
        most = at_most(share, len(wrong) * queries)
        summary = {"disagreement": share, "most_disagreement": most, "exact": False}
        yield make_candidate(system, queries, workers, number, late, times=end[:, 0], **summary)


def make_candidate(
    system: str,
    num_data: int,
    num_workers: int,
    wait_for: int,
    min_wait: float,
    *,
    times: np.ndarray,
    **summary: Any,
) -> Candidate:
    p50, p99 = (float(np.quantile(times, q)) for q in (0.5, PROMISED))
    extra = num_workers / num_data - 1 + summary.get("resent", 0.0)
    numbers = num_data, num_workers, wait_for, float(min_wait)
    return Candidate(system, *numbers, extra_work=extra, p50=p50, p99=p99, **summary)


def at_most(share: Estimate, points: int) -> float:
    """Return an upper bound of a share of this many data points, with a probability of 99 %.

    If the share were 4.6 over the number, none would be seen with a probability of 1 %. One of up
    to twenty candidates is chosen by this, and 95 % would often choose one that was lucky.
    """
    return max(share.mean + _WIDER * share.half_width, -math.log(_MISSED) / points)


def number_of_draws(wanted: int, workers: int) -> int:
    """Return how many draws of this many workers are held at a time."""
    return max(min(wanted, 4_000_000 // workers), 1000)


def numbers_of_workers(num_data: int, asked: Mapping[str, Any]) -> list[int]:
    """Return a third, two thirds and all of the redundancy that the budget allows."""
    groups = asked["num_queries"] // num_data
    most = min(int(num_data * (1 + asked["max_extra_work"]) + 1e-9), asked["max_workers"] // groups)
    further = [math.ceil((most - num_data) * share / 3) for share in (1, 2, 3)]
    return sorted({num_data + number for number in further if number > 0})


def waits(num_data: int, num_workers: int) -> list[int]:
    """Return numbers of answers to wait for: all but 1, 2, 4, ... and N - K; at least K / 2."""
    missing = {1, 2, 4, 8, 16, num_workers - num_data} - {0}
    least = max(num_data // 2, 1)
    return sorted({num_workers - number for number in missing if num_workers - number >= least})
