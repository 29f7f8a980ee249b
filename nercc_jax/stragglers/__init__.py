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
    RowLatency,
    TraceLatency,
    WaitFor,
    WaitUntil,
    straggler_sets,
)

__all__ = [
    "AbstractLatency",
    "AbstractStragglers",
    "ContiguousStragglers",
    "ExactStragglers",
    "ExponentialLatency",
    "IndependentStragglers",
    "LogNormalLatency",
    "ParetoLatency",
    "RowLatency",
    "TraceLatency",
    "WaitFor",
    "WaitUntil",
    "straggler_sets",
]
