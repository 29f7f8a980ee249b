"""The immutable results that go from what adapts to the scheduler."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Float

from ...pools import Overdue
from .._policy import BatchingPolicy

Redundancy = Literal["none", "uncertain", "always"]


class DispatchSetting(NamedTuple):
    """The part of a policy that may change while queries are served.

    Attributes:
        overdue: the rule by which a call counts as late, and the copies that follow at once.
        redundancy: the coded data points that are sent beyond the queries: all that the code has
            ("always"), those for queries that a surrogate could not answer ("uncertain"), or none.
        hedges: whether late queries are sent again soon, where the policy hedges at all.
    """

    overdue: Overdue
    redundancy: Redundancy
    hedges: bool = True


@dataclasses.dataclass(frozen=True)
class Predictions:
    """A surrogate's answers to some queries, and which may be given out.

    Disagreement is the probability of another label, NaN where labels do not matter. The error
    bound, in units of the outputs, covers the error of a share `coverage` of the answers.
    """

    values: Float[np.ndarray, "queries m"]
    disagreement: Float[np.ndarray, " queries"]
    error_bound: Float[np.ndarray, " queries"]
    sure: Bool[np.ndarray, " queries"]


class Expectation(NamedTuple):
    """The expectation of the model's own answer: a row of the predictions of several queries."""

    answers: Any
    row: int


# Returns what to expect of the answers to some queries; empty where nothing is known.
Expect: TypeAlias = Callable[[Sequence[np.ndarray]], list[Expectation]]


def overdue_rule(policy: BatchingPolicy) -> Overdue:
    return Overdue(policy.quantile, policy.straggler_threshold, copies=policy.hedge_copies)
