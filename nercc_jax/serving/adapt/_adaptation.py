"""All that adapts, as the scheduler sees it.

The scheduler calls these methods from its own thread, so each returns at once. What it reads is
immutable, and was computed by other threads. Calibration of decoding has a thread of its own: the
scheduler's does nothing but answer queries.
"""

import logging
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped

from ...codes._trees import Form
from ...pools import AbstractPool
from ...pools._answer_checks import AnswerChecks
from ...pools._clock import AbstractClock, TimeShare
from ...risk._scores import ROWS, why_no_scores
from ...risk._straggler_risk import StragglerRisk, StragglerRow, error_ratios
from .._policy import BatchingPolicy, Observe
from ..core._adaptation import (
    DispatchSetting,
    ExpectedError,
    accuracy_target,
    overdue_rule,
)
from ..core._coder import Coder
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


class OutputsCheck:
    """Looks at the model's own answers, on a thread of its own: are they scores, or values?

    Attributes:
        scores: whether they look like scores; None before enough of them are known.
        why: why they do not.
    """

    def __init__(
        self,
        form: Form | None,
        clock: AbstractClock,
        known: Float[np.ndarray, "rows m"] | None,
    ):
        """Start with the answers that calibration has seen, if any."""
        self._form, self._answers = form, [] if known is None else list(known)
        self.scores: bool | None = None
        self.why: str | None = None
        self._turns = clock.turns("nercc-outputs", self._turn)
        self.start, self.close = self._turns.start, self._turns.close
        self._look()

    def add(self, own: np.ndarray) -> None:
        """Take an answer, and return at once."""
        if self.scores is None:
            self._answers.append(own.ravel())
            if len(self._answers) == ROWS:
                self._turns.wake()

    @property
    def progress(self) -> tuple[int, int]:
        """The number of answers seen, and the number that is needed."""
        return min(len(self._answers), ROWS), ROWS

    def _turn(self) -> float:
        self._look()
        return math.inf

    def _look(self) -> None:
        if self.scores is None and len(self._answers) >= ROWS:
            self.why = why_no_scores(np.stack(self._answers), self._form)
            self.scores = self.why is None
            found = "scores of labels" if self.scores else f"values: {self.why}"
            _LOG.info("outputs look like %s", found)


class Adaptation:
    """Calibration of decoding, a surrogate if there is one, and the choice of settings.

    Attributes:
        estimator: the estimator of decoding errors, as it is calibrated now.
        calibrator: the thread that calibrates it.
        predictor: the surrogate, ready or not; None where there is none.
        checks: the checks of the model's own answers; None where they are given out unseen.
        observe: takes a measurement.
    """

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
        self._policy, self._coder = policy, coder
        self._overdue = overdue_rule(policy)
        self._fixed = DispatchSetting(self._overdue, policy.redundancy)
        self._exact = DispatchSetting(self._overdue, "none")
        self.observe = observe if self._controller is None else self._controller.observe
        self._target = target = accuracy_target(policy)
        self.decoding_risk = StragglerRisk(target, needs_evidence=False)
        self.calibrator = BackgroundCalibrator(estimator, self.observe, pool.clock)
        self._outputs = None
        if policy.outputs is None and (coder.can_decode or predictor is not None):
            self._outputs = OutputsCheck(coder.form, pool.clock, estimator.own)
        self.checks: AnswerChecks | None = None
        if predictor is not None:
            width, rate = policy.max_batch_size, policy.check_answers
            predictor.attach(target, width, coder.form, self.observe, pool.clock, rate)
            if rate is not None:
                self.checks = AnswerChecks(
                    pool.num_workers, policy.max_fenced, pool.worker_dtype, self.observe
                )
        elif policy.check_answers is not None:
            raise ValueError(
                "check_answers needs a predictor (`--surrogate`): nothing else tells what answers "
                "should be"
            )
        parts = self.calibrator, self._controller, predictor, self._outputs
        self._parts = [each for each in parts if each is not None]

    @property
    def setting(self) -> DispatchSetting:
        """The setting that holds now."""
        if self._controller is not None:
            return self._controller.setting
        # What mixes queries is of no use where nothing may be decoded.
        mixes = self._coder.systematic and self._coder.can_decode
        return self._exact if mixes and self._exact_only else self._fixed

    @property
    def _exact_only(self) -> bool:
        """True where nothing approximate will ever be given out, by what the outputs are."""
        if self._policy.outputs == "values":
            return self._policy.tolerance is None
        return self._outputs is not None and self._outputs.scores is False

    @property
    def approximates(self) -> bool:
        """True if approximate answers may be given out at all, by what the outputs are."""
        return not self._exact_only and (self._outputs is None or bool(self._outputs.scores))

    @property
    def can_predict(self) -> bool:
        """True if the surrogate may answer now."""
        predictor = self.predictor
        return predictor is not None and self.approximates and predictor.state == "answering"

    def start(self) -> None:
        """Start the threads."""
        for each in self._parts:
            each.start()

    def close(self) -> None:
        """End the threads."""
        for each in self._parts:
            each.close()

    def status(self) -> dict[str, Any]:
        controller, predictor, checks = self._controller, self.predictor, self.checks
        ready = predictor is not None and predictor.checks_answers
        # How outputs are read, and why; None as long as that is not known.
        read, why, look = "scores", "as set", self._outputs
        if look is None:
            read = "values" if self._policy.outputs == "values" else read
        elif look.scores is None:
            known, needed = look.progress
            read, why = None, f"{known} of {needed} answers were looked at"
        else:
            read = "scores" if look.scores else "values"
            why = look.why or "the model's own answers look like scores"
        return {
            "policy": None if controller is None else controller.status(),
            "predictor": None if predictor is None else predictor.status(),
            "checks": None if checks is None else {"ready": ready} | checks.status(),
            "decoding": self.decoding_risk.status() if self._promises else None,
            "outputs": {"read_as": read, "why": why},
            "audited": list(self.decoding_risk.shown),
        }

    @property
    def _promises(self) -> bool:
        return bool(self._policy.max_disagreement) or self._policy.tolerance is not None

    def hints(self) -> list[str]:
        found, risk = [], self.decoding_risk
        if self._outputs is not None and self._outputs.scores is None:
            known, needed = self._outputs.progress
            found.append(
                f"outputs are scores or values: {known} of {needed} answers were looked at; "
                "nothing approximate is given out until then, or until outputs are set"
            )
        elif self._outputs is not None and self._exact_only:
            found.append(
                f"outputs are read as values, since {self._outputs.why}: all answers are exact; "
                "set a tolerance, or outputs = 'logits' if they are scores"
            )
        elif self._exact_only and self._coder.can_decode:
            found.append("outputs are values without a tolerance: all answers are exact")
        if self._promises:
            evidence = risk.status()
            if evidence["drifts"] and not evidence["admitted"]:
                found.append(
                    "decoded answers went wrong more often than promised: "
                    f"{evidence['compared']} of {evidence['needed']} stragglers were compared "
                    "since; nothing is decoded"
                )
            found += [] if risk.hint is None else [risk.hint]
        found += [] if self.checks is None else self.checks.hints()
        return found if self.predictor is None else found + self.predictor.hints()

    def needs_samples(self, queries: int) -> bool:
        """Return whether to send groups of this size whole, for calibration."""
        return not self._exact_only and self.calibrator.needs_samples(queries)

    @property
    def accepts_samples(self) -> bool:
        """True if the calibrator would use a group now."""
        return not self._exact_only and self.calibrator.accepts_samples

    def add_answer(self, x: Shaped[np.ndarray, "..."], own: np.ndarray) -> None:
        """Take the model's own answer to a query."""
        if self._outputs is not None:
            self._outputs.add(own)
        if self.predictor is not None:
            self.predictor.add_answer(x, own)

    def risk(self, source: Source) -> StragglerRisk:
        """Return what other stragglers showed of approximate answers of this source.

        Answers that are given out are counted there, and their `audit` follows.
        """
        if source == "decoded":
            return self.decoding_risk
        assert self.predictor is not None
        return self.predictor.risk

    def admits(self, answer: Answer, *, calibrated: bool) -> bool:
        """Return whether an approximate answer may be given out, by what stragglers showed.

        It is `calibrated` if it is within the limit of a calibration.
        """
        if answer.source == "predicted":
            assert self.predictor is not None
            return calibrated and self.predictor.admits(answer)
        risk = self.decoding_risk
        bar = 0.0 if self._target.tolerance is None else answer.error
        return bool(risk.admits(answer.disagreement, bar, calibrated=calibrated))

    def audit(self, given: ApproximateAnswer, own: np.ndarray | None) -> bool:
        """Compare an answer with the model's own, which came late, or is None and will never come.

        Returns:
            Whether it was right.
        """
        if given.answer.source == "predicted":
            assert self.predictor is not None
            return self.predictor.audit(given, own)
        answer = given.answer
        if self._target.tolerance is None:
            right = own is not None and self.estimator.agrees(answer.value, own)
            row = StragglerRow(answer.disagreement, 0.0, not right, 0.0)
        else:
            error = math.inf if own is None else np.sqrt(np.mean((answer.value - own) ** 2))
            excess = float(error_ratios(error, answer.error))
            right = excess <= given.widened
            row = StragglerRow(answer.disagreement, answer.error, False, excess)
        facts = {"given": given.given, "forced": given.forced, "epoch": given.epoch}
        facts |= {"unknown": own is None, "widened": given.widened}
        if self.decoding_risk.add(row, **facts):
            self.calibrator.discard()
            self.observe("drift", 1)
            _LOG.warning("decoded answers went wrong more often than promised: see the status")
        return right
