"""Stragglers: sets of them, laws of latency, and rules of waiting."""

from ._laws import (
    AbstractLatency,
    AbstractStragglers,
    ContiguousStragglers,
    ExactStragglers,
    ExponentialLatency,
    IndependentStragglers,
    LogNormalLatency,
    ParetoLatency,
    TraceLatency,
    WaitFor,
    WaitUntil,
    straggler_sets,
)
from ._waiting import Latencies, Waiting, draw_groups, draw_hedged, last_prediction, own_workers

__all__ = [
    "AbstractLatency",
    "AbstractStragglers",
    "ContiguousStragglers",
    "ExactStragglers",
    "ExponentialLatency",
    "IndependentStragglers",
    "Latencies",
    "LogNormalLatency",
    "ParetoLatency",
    "TraceLatency",
    "WaitFor",
    "WaitUntil",
    "Waiting",
    "draw_groups",
    "draw_hedged",
    "last_prediction",
    "own_workers",
    "straggler_sets",
]
