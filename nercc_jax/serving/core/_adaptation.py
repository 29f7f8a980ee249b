"""The border between the scheduler and what adapts: observations go over it, results come back.

The scheduler calls these methods from its own thread, so each returns at once. What it reads is
immutable, and was computed by other threads.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Shaped

from ...pools import Overdue
from ...pools._answer_checks import AnswerChecks
from ...risk._straggler_risk import AccuracyTarget, StragglerRisk
from .._policy import BatchingPolicy
from ._error_probability import DecodingErrorBars, DecodingErrorProbability
from ._request import Answer, ApproximateAnswer, Source

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


class ExpectedError(NamedTuple):
    """The error to expect of each query of a group, by label and by distance; NaN where unknown.

    `current` says whether nothing has been observed since that would change the estimate.
    """

    disagreement: Float[np.ndarray, " queries"]
    error: Float[np.ndarray, " queries"]
    current: bool


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


class AbstractAdaptation(abc.ABC):
    """Calibration, prediction, and the choice of settings, as the scheduler sees them."""

    @property
    @abc.abstractmethod
    def setting(self) -> DispatchSetting:
        """The setting that holds now."""

    @property
    @abc.abstractmethod
    def approximates(self) -> bool:
        """Return whether approximate answers may be given out at all, by what the outputs are."""

    @property
    @abc.abstractmethod
    def predicts(self) -> bool:
        """Return whether there is a surrogate, ready or not."""

    @property
    @abc.abstractmethod
    def can_predict(self) -> bool:
        """Return whether the surrogate may answer now."""

    @property
    @abc.abstractmethod
    def checks(self) -> AnswerChecks | None:
        """The checks of the model's own answers; None where they are given out unseen."""

    @abc.abstractmethod
    def expect(self, x: Sequence[np.ndarray]) -> list[Expectation]:
        """Return what to expect of the model's own answers to some queries, if anything is known.

        It returns before that is computed.
        """

    @abc.abstractmethod
    def observe(self, what: str, number: int | float) -> None:
        """Take a measurement of the scheduler's."""

    @abc.abstractmethod
    def needs_samples(self, queries: int) -> bool:
        """Return whether to send groups of this size whole, for calibration."""

    @property
    @abc.abstractmethod
    def accepts_samples(self) -> bool:
        """Return whether `add_group` would use a group now."""

    @abc.abstractmethod
    def add_group(
        self,
        answers: Float[np.ndarray, "num_workers ..."],
        originals: Float[np.ndarray, "queries ..."],
    ) -> None:
        """Take a group all of whose coded data points were answered."""

    @abc.abstractmethod
    def add_answer(self, x: Shaped[np.ndarray, "..."], own: np.ndarray) -> None:
        """Take the model's own answer to a query."""

    @abc.abstractmethod
    def risk(self, source: Source) -> StragglerRisk:
        """Return what other stragglers showed of approximate answers of this source.

        Answers that are given out are counted there, and their `audit` follows.
        """

    @abc.abstractmethod
    def admits(self, answer: Answer, *, calibrated: bool) -> bool:
        """Return whether an approximate answer may be given out, by what stragglers showed.

        It is `calibrated` if it is within the limit of a calibration.
        """

    @abc.abstractmethod
    def audit(self, given: ApproximateAnswer, own: np.ndarray | None) -> bool:
        """Compare an answer with the model's own, which came late, or is None and will never come.

        Returns:
            Whether it was right.
        """

    @abc.abstractmethod
    def error_probability(self, queries: int) -> DecodingErrorProbability | DecodingErrorBars:
        """Return the calibrated error probability, or error bars, for groups of this size."""

    @abc.abstractmethod
    def expected_error(self, queries: int, mask: Bool[np.ndarray, " num_workers"]) -> ExpectedError:
        """Return the error to expect of groups of this size, decoded from these workers."""

    @abc.abstractmethod
    def predict(self, x: Shaped[np.ndarray, "queries ..."]) -> Predictions | None:
        """Return a surrogate's answers; None while there is none that is calibrated."""


def accuracy_target(policy: BatchingPolicy) -> AccuracyTarget:
    return AccuracyTarget(policy.tolerance, policy.max_disagreement, policy.coverage)


def overdue_rule(policy: BatchingPolicy) -> Overdue:
    return Overdue(policy.quantile, policy.straggler_threshold, copies=policy.hedge_copies)
