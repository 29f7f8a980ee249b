"""All that adapts: the one thread that learns, and what the deciding thread sees of it.

The deciding thread calls these methods, so each returns at once. What it reads is immutable, and
was computed by the other thread: the deciding thread does nothing but answer queries.
"""

import dataclasses
import logging
import math
from typing import Any

import numpy as np
from jaxtyping import Shaped

from ...evaluation._criteria import agree_on_labels, root_mean_square
from ...inference.models import warn_if_other
from ...risk import Comparison, Risk
from ...risk._accuracy import error_ratios
from ...risk.votes import AnswerChecks
from ..core._request import Answer, Source
from ..core._setup import DispatchSetting, Setup
from ..core.decide import LateEvidence
from ._decoding import DecodingEvidence, DecodingScores
from ._predictor import Predictor
from ._setting_controller import SettingController

_LOG = logging.getLogger(__name__)

_PAUSE = 1.0  # seconds before the thread goes on after a failure
_MAX_FENCED = 0.25  # share of the workers that is fenced for wrong answers


class Adaptation:
    """Two sources of approximate answers, and the choice of settings.

    One thread learns: which decoded answers are right, the surrogate, and the setting.

    Attributes:
        setup: The batcher's parts; its `observe` passes the choice of settings.
        turns: The thread that learns, not started yet.
        approximates: Whether approximate answers may be given out, by what the outputs are.
        decoding: The evidence on decoded answers.
        predictor: The surrogate, ready or not; None where there is none.
        checks: The checks of the model's own answers; None where they are given out unseen.
    """

    def __init__(self, setup: Setup, scores: DecodingScores, predictor: Predictor | None):
        """Attach the parts to each other.

        Raises:
            ValueError: for a policy that does not fit the predictor, or the promise that the scores
                were calibrated for.
        """
        policy, coder = setup.policy, setup.coder
        known, wanted = scores.accuracy, policy.accuracy
        if (known.tolerance, known.coverage) != (wanted.tolerance, wanted.coverage):
            raise ValueError(
                f"decoding was calibrated for a tolerance of {known.tolerance} and a coverage of "
                f"{known.coverage}, the policy has {wanted.tolerance} and {wanted.coverage}"
            )
        if scores.calibrated:
            warn_if_other("the error estimate", scores.conditions, setup.pool.conditions)
        self.turns = setup.clock.turns("nercc-learning", self._turn)
        self._controller = None
        if policy.max_calls is not None:
            self._controller = SettingController(setup, predictor, self.turns.wake)
            setup = dataclasses.replace(setup, observe=self._controller.observe)
        self.setup, self.predictor = setup, predictor
        self._setting = DispatchSetting.of_policy(policy)
        self.decoding = DecodingEvidence(dataclasses.replace(scores, accuracy=wanted), coder.form)
        # Whether approximate answers may be given out at all, by what the outputs are.
        self.approximates = policy.outputs != "values" or policy.tolerance is not None
        self.checks: AnswerChecks | None = None
        if predictor is not None:
            predictor.attach(setup, self.turns.wake)
            if policy.check_answers is not None:
                workers, dtype = setup.pool.num_workers, setup.pool.worker_dtype
                self.checks = AnswerChecks(workers, _MAX_FENCED, dtype, setup.observe)

    # The thread that learns.

    def _turn(self) -> float:
        due, steps = math.inf, [self.decoding.learn]
        steps += [] if self.predictor is None else [self.predictor.turn]
        steps += [] if self._controller is None else [self._controller.turn]
        for step in steps:
            try:
                due = min(due, step())
            except Exception:
                # Earlier results stay; what comes may do better.
                _LOG.exception("learning from the traffic failed")
                self.setup.observe("internal_error", 1)
                due = min(due, self.setup.clock.now() + _PAUSE)
        return due

    # The deciding thread's view.

    @property
    def can_predict(self) -> bool:
        """True if the surrogate may answer now."""
        predictor = self.predictor
        return predictor is not None and self.approximates and predictor.state == "answering"

    @property
    def setting(self) -> DispatchSetting:
        """The setting that holds now."""
        if self._controller is not None:
            return self._controller.setting
        coder = self.setup.coder
        # What mixes queries is of no use where nothing may be decoded.
        if coder.systematic and coder.can_decode and not self.approximates:
            return self._setting._replace(redundancy="none")
        return self._setting

    def risk(self, source: Source) -> Risk:
        """Return what other stragglers showed of approximate answers of this source.

        Answers that are given out are counted there, and their `audit` follows.
        """
        if source == "decoded":
            return self.decoding.risk
        assert self.predictor is not None
        return self.predictor.risk

    def evidence(self, queries: int) -> LateEvidence:
        """Return what is known by now, for a group with this number of queries."""
        limit = self.decoding.limit(queries)
        risk: dict[Source, Risk] = {"decoded": self.decoding.risk}
        if self.predictor is not None:
            risk["predicted"] = self.predictor.risk
        return LateEvidence(self.setting, self.approximates, self.can_predict, limit, risk)

    def add_answer(self, x: Shaped[np.ndarray, "..."], own: np.ndarray) -> None:
        """Take the model's own answer to a query."""
        if self.predictor is not None:
            self.predictor.add_answer(x, own)

    def audit(self, given: Answer, own: np.ndarray | None) -> bool:
        """Compare an answer with the model's own, which came late, or is None and will never come.

        One that will never come counts as wrong. If too many of those given out are wrong, nothing
        more is given out until there is evidence on other stragglers.

        Returns:
            Whether it was right.
        """
        labels = self.setup.policy.tolerance is None
        wrong, excess, value = labels, math.inf, given.value.ravel()
        if own is not None:
            form = self.setup.coder.form
            wrong = labels and not bool(agree_on_labels(value, own.ravel(), form))
            error = root_mean_square(value - own.ravel())
            excess = float(error_ratios(error, np.asarray(given.error)))
            if given.features is not None and self.decoding.add(given, wrong, float(error)):
                self.turns.wake()
        drifted = self.risk(given.source).add(
            Comparison(given.disagreement, given.error, wrong, excess),
            given=given.given,
            epoch=given.epoch,
            unknown=own is None,
            widened=given.widened,
        )
        if drifted and given.source == "predicted":
            assert self.predictor is not None
            self.predictor.discard()
        elif drifted:
            self.decoding.discard()
            self.setup.observe("drift", 1)
            _LOG.warning("decoded answers went wrong more often than promised: see the status")
        return not (wrong if labels else excess > given.widened)

    # What others see.

    def status(self) -> dict[str, Any]:
        controller, predictor, checks = self._controller, self.predictor, self.checks
        ready = predictor is not None and predictor.checks_answers
        promises = self.setup.policy.accuracy.promises
        return {
            "policy": None if controller is None else controller.status(),
            "predictor": None if predictor is None else predictor.status(),
            "checks": None if checks is None else {"ready": ready} | checks.status(),
            "decoding": self.decoding.status() if promises else None,
            "audited": self.decoding.shown,
        }

    def hints(self) -> list[str]:
        """Return why nothing is decoded or predicted, and which workers answer wrongly."""
        found, can_decode = [], self.setup.coder.can_decode
        if not self.approximates and (can_decode or self.predictor is not None):
            found.append(
                "outputs are values without a tolerance: all answers are exact; set a tolerance, "
                "or outputs = 'logits' if they are scores of labels"
            )
        elif can_decode:
            found += self.decoding.hints()
        found += [] if self.checks is None else self.checks.hints()
        return found if self.predictor is None else found + self.predictor.hints()
