"""All that adapts, behind the interface that the scheduler knows.

Calibration of decoding has a thread of its own: the scheduler's does nothing but answer queries.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped

from ...pools import AbstractPool
from ...pools._answer_checks import AnswerChecks
from ...pools._clock import AbstractClock, TimeShare
from ...risk._straggler_risk import AccuracyTarget, StragglerRisk, StragglerRow
from .._policy import BatchingPolicy, Observe
from ..core._adaptation import (
    AbstractAdaptation,
    DispatchSetting,
    Expectation,
    ExpectedError,
    Predictions,
    overdue_rule,
)
from ..core._coder import Coder
from ..core._error_probability import DecodingErrorProbability
from ..core._request import Answer, ApproximateAnswer, Source
from ._error_estimator import ErrorEstimator
from ._predictor import Predictor
from ._setting_controller import SettingController

_LOG = logging.getLogger(__name__)

# The share of the time that calibration may take: programs of JAX keep all cores of a CPU busy. It
# pauses between the steps of an update, too, once they have taken this many seconds more than their
# share, so that each burst is short.
_SHARE = 0.005
_AT_ONCE = 0.01
_LONGEST = 10.0  # seconds of pause that one step costs at most
_END = object()  # of steps


class BackgroundCalibrator:
    """A thread that updates an `ErrorEstimator`, whose results others read meanwhile.

    It holds one group and one set of workers at a time. Until the group is used no other is
    accepted, and a newer set of workers replaces the older: there is more traffic than time.
    """

    def __init__(
        self,
        estimator: ErrorEstimator,
        observe: Observe,
        clock: AbstractClock,
    ):
        self._estimator, self._observe = estimator, observe
        self._group: tuple[np.ndarray, np.ndarray] | None = None
        self._requested: tuple[int, np.ndarray] | None = None
        self._discard = False
        self._steps: Iterator[None] | None = None  # of the update in progress
        self._clock = clock
        self._time = TimeShare(clock, _SHARE, longest=_LONGEST, at_once=_AT_ONCE)
        self._turns = clock.turns("nercc-calibrator", self._turn)
        self.start, self.close = self._turns.start, self._turns.close

    @property
    def accepts_samples(self) -> bool:
        return self._group is None

    def needs_samples(self, queries: int) -> bool:
        return self.accepts_samples and self._estimator.needs_samples(queries)

    def add_group(
        self,
        answers: Float[np.ndarray, "num_workers ..."],
        originals: Float[np.ndarray, "queries ..."],
    ) -> None:
        """Take a group for `ErrorEstimator.add_group`, and return at once."""
        self._group = answers, originals
        self._turns.wake()

    def discard(self) -> None:
        """Discard all groups, as `ErrorEstimator.discard` does, at once for readers."""
        self._discard = True
        self._turns.wake()

    def expected_error(self, queries: int, mask: Bool[np.ndarray, " num_workers"]) -> ExpectedError:
        """Return the expected error; request an update where it is unknown or out of date."""
        expected = self._estimator.expected_error(queries, mask)
        if not expected.current:
            self._requested = queries, mask.copy()
            self._turns.wake()
        return expected

    def _turn(self) -> float:
        if self._discard:
            # What is in progress is from before.
            self._discard, self._steps, self._group = False, None, None
            self._estimator.discard()
        if self._steps is None and self._group is None and self._requested is None:
            return math.inf
        if self._clock.now() >= self._time.next:
            self._try_step()
        return max(self._time.next, self._clock.now())

    def _try_step(self) -> None:
        begin = self._clock.now()
        try:
            self._steps = self._steps or self._update()
            if next(self._steps, _END) is _END:
                self._steps = None
        except Exception:
            # Earlier results stay; the next group may do better.
            _LOG.exception("calibrating with a group failed")
            self._steps = None
            self._observe("internal_error", 1)
        self._observe("learn_seconds", self._time.spend(begin))

    def _update(self) -> Iterator[None]:
        group, self._group = self._group, None
        requested, self._requested = self._requested, None
        if group is not None:
            yield from self._estimator.add_group(*group)
        if requested is not None:
            yield from self._estimator.update_expected(*requested)


class Adaptation(AbstractAdaptation):
    """Calibration of decoding, a surrogate if there is one, and the choice of settings."""

    def __init__(
        self,
        pool: AbstractPool,
        coder: Coder,
        policy: BatchingPolicy,
        estimator: ErrorEstimator,
        predictor: Predictor | None,
        observe: Observe,
    ):
        """Attach the parts to each other, without starting their threads.

        Raises:
            ValueError: for a policy that does not fit the code or the predictor.
        """
        self.estimator, self.predictor = estimator, predictor
        self._controller = (
            None
            if policy.max_calls is None
            else SettingController(policy, coder, pool, predictor, observe)
        )
        self._policy = policy
        self._fixed = DispatchSetting(overdue_rule(policy), policy.redundancy)
        self._observe = observe if self._controller is None else self._controller.observe
        decoding = AccuracyTarget(max_disagreement=policy.max_disagreement)
        self.decoding_risk = StragglerRisk(decoding, needs_evidence=False)
        self._calibrator = BackgroundCalibrator(estimator, self._observe, pool.clock)
        self._checks = None
        if predictor is not None:
            target = AccuracyTarget(policy.tolerance, policy.max_disagreement)
            width, rate = policy.max_batch_size, policy.check_answers
            predictor.attach(target, width, coder.form, self._observe, pool.clock, rate)
            if rate is not None:
                self._checks = AnswerChecks(
                    pool.num_workers, policy.max_fenced, pool.worker_dtype, self._observe
                )
        elif policy.check_answers is not None:
            raise ValueError(
                "check_answers needs a predictor (`--surrogate`): nothing else tells what answers "
                "should be"
            )
        parts = self._calibrator, self._controller, predictor
        self._parts = [each for each in parts if each is not None]

    @property
    def setting(self) -> DispatchSetting:
        return self._fixed if self._controller is None else self._controller.setting

    @property
    def predicts(self) -> bool:
        return self.predictor is not None

    @property
    def can_predict(self) -> bool:
        return self.predictor is not None and self.predictor.state == "answering"

    @property
    def checks(self) -> AnswerChecks | None:
        return self._checks

    def expect(self, x: Sequence[np.ndarray]) -> list[Expectation]:
        return [] if self.predictor is None else self.predictor.expect(x)

    def start(self) -> None:
        """Start the threads."""
        for each in self._parts:
            each.start()

    def close(self) -> None:
        """End the threads."""
        for each in self._parts:
            each.close()

    def observe(self, what: str, number: int | float) -> None:
        self._observe(what, number)

    def status(self) -> dict[str, Any]:
        controller, predictor, checks = self._controller, self.predictor, self._checks
        ready = predictor is not None and predictor.checks_answers
        return {
            "policy": None if controller is None else controller.status(),
            "predictor": None if predictor is None else predictor.status(),
            "checks": None if checks is None else {"ready": ready} | checks.status(),
            "decoding": self.decoding_risk.status() if self._policy.max_disagreement else None,
            "audited": list(self.decoding_risk.shown),
        }

    def hints(self) -> list[str]:
        found, risk = [], self.decoding_risk
        if self._policy.max_disagreement:
            evidence = risk.status()
            if evidence["drifts"] and not evidence["admitted"]:
                found.append(
                    "decoded answers went wrong more often than promised: "
                    f"{evidence['compared']} of {evidence['needed']} stragglers were compared "
                    "since; nothing is decoded"
                )
            found += [] if risk.hint is None else [risk.hint]
        found += [] if self._checks is None else self._checks.hints()
        return found if self.predictor is None else found + self.predictor.hints()

    def needs_samples(self, queries: int) -> bool:
        return self._calibrator.needs_samples(queries)

    @property
    def accepts_samples(self) -> bool:
        return self._calibrator.accepts_samples

    def add_group(
        self,
        answers: Float[np.ndarray, "num_workers ..."],
        originals: Float[np.ndarray, "queries ..."],
    ) -> None:
        self._calibrator.add_group(answers, originals)

    def add_answer(self, x: Shaped[np.ndarray, "..."], own: np.ndarray) -> None:
        if self.predictor is not None:
            self.predictor.add_answer(x, own)

    def risk(self, source: Source) -> StragglerRisk:
        if source == "decoded":
            return self.decoding_risk
        assert self.predictor is not None
        return self.predictor.risk

    def admits(self, answer: Answer, *, calibrated: bool) -> bool:
        if answer.source == "predicted":
            assert self.predictor is not None
            return calibrated and self.predictor.admits(answer)
        risk = self.decoding_risk
        return bool(risk.admits(answer.disagreement, 0.0, calibrated=calibrated))

    def audit(self, given: ApproximateAnswer, own: np.ndarray | None) -> bool:
        if given.answer.source == "predicted":
            assert self.predictor is not None
            return self.predictor.audit(given, own)
        right = own is not None and self.estimator.agrees(given.answer.value, own)
        row = StragglerRow(given.answer.disagreement, 0.0, not right, 0.0)
        facts = {"given": given.given, "forced": given.forced, "epoch": given.epoch}
        if self.decoding_risk.add(row, unknown=own is None, **facts):
            self._calibrator.discard()
            self._observe("drift", 1)
            _LOG.warning("decoded answers went wrong more often than promised: see the status")
        return right

    def error_probability(self, queries: int) -> DecodingErrorProbability:
        return self.estimator.error_probability(queries)

    def expected_error(self, queries: int, mask: Bool[np.ndarray, " num_workers"]) -> ExpectedError:
        return self._calibrator.expected_error(queries, mask)

    def predict(self, x: Shaped[np.ndarray, "queries ..."]) -> Predictions | None:
        return None if self.predictor is None else self.predictor.predict(x)
