"""Ways to serve queries that the planner compares, and the work that it takes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..codes import AbstractCode, NeRCC, Replication, Uncoded
from ..evaluation import Estimate

KNOWN = "known, else hedged"
DOUBTED = "copies of the uncertain"


@dataclasses.dataclass(frozen=True)
class PlanEffort:
    """The work of a plan, and the numbers that its comparison rests on.

    Attributes:
        draws: Groups of queries whose times are drawn for a p99.
        screen_draws: The same in screening.
        sets: Straggler sets that each group of the held-out half meets.
        screen_sets: The same in screening, on the other half.
        calibration_sets: Straggler sets that error probabilities are calibrated on.
        enough: Codes that keep to what was asked on the held-out half, after which no more are
            measured there; as they are, and with re-execution.
        most: Codes that are measured there, at most.
        hedge_quantiles: Quantiles of the latency after which hedging sends again.
        early: Quantile of the latency before which nothing else is sent again.
        known_copies: Copies of a query whose answer no surrogate knows, at most.
        alike: Share by which p99s may differ and still count as equal; the cheaper is then better.
    """

    draws: int = 20_000
    screen_draws: int = 5_000
    sets: int = 48
    screen_sets: int = 4
    calibration_sets: int = 64
    enough: int = 3
    most: int = 10
    hedge_quantiles: tuple[float, ...] = (0.5, 0.75, 0.9, 0.95, 0.99)
    early: float = 0.9
    known_copies: int = 3
    alike: float = 0.03

    def shape(self, groups: int, workers: int, draws: int | None = None) -> tuple[int, int]:
        """Return how many draws of groups with this many workers in all are held at a time."""
        return max(min(draws or self.draws, 4_000_000 // workers), 1000), groups


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
    extra_work: float = dataclasses.field(kw_only=True, default=0.0)
    disagreement: Estimate = Estimate(0.0, 0.0)  # noqa: RUF009, it is frozen
    most_disagreement: float = 0.0
    p50: float = dataclasses.field(kw_only=True, default=0.0)
    p99: float = dataclasses.field(kw_only=True, default=0.0)
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

    @property
    def placement(self) -> dict[str, Any]:
        """The options of a scheme that places this candidate's copies."""
        share = 1 - self.wait_for / self.num_workers
        return {"redundancy": "uncertain", "straggler_share": share}

    def seen(self, times: np.ndarray | None = None, **changes: Any) -> "Candidate":
        """Return the same way with other results; times are those to the last prediction."""
        if times is not None:
            p50, p99 = (float(np.quantile(times, quantile)) for quantile in (0.5, 0.99))
            changes |= {"p50": p50, "p99": p99}
        extra = self.num_workers / self.num_data - 1 + changes.get("resent", self.resent)
        return dataclasses.replace(self, extra_work=extra, **changes)

    def feasible(self, asked: Mapping[str, Any]) -> bool:
        """Return whether it keeps to what was asked for, and was not only screened."""
        workers = self.num_workers * asked["num_queries"] // self.num_data
        return (
            (self.held_out or self.exact)
            and workers <= asked["max_workers"]
            and self.extra_work <= asked["max_extra_work"] + 1e-9
            and self.most_disagreement <= asked["max_disagreement"]
        )
