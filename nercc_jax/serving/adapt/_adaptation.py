"""All that adapts, behind the interface that the scheduler knows."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped

from ...pools import AbstractPool
from .._policy import BatchingPolicy, Observe
from ..core._adaptation import (
    AbstractAdaptation,
    DispatchSetting,
    ExpectedError,
    Predictions,
    fixed_setting,
)
from ..core._coder import Coder
from ..core._error_probability import DecodingErrorProbability
from ..core._request import Answer
from ._background_calibrator import BackgroundCalibrator
from ._error_estimator import ErrorEstimator
from ._online_calibration import PredictionGoal
from ._predictor import Predictor
from ._setting_controller import SettingController


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

        Args:
            pool: the workers, whose latest calls settings are chosen by.
            coder: the code.
            policy: the batching policy.
            estimator: the error of decoded answers.
            predictor: a surrogate.
            observe: receives all metrics.

        Raises:
            ValueError: for a policy that does not fit the code or the predictor.
        """
        self.estimator, self.predictor = estimator, predictor
        self._controller = (
            None
            if policy.max_calls is None
            else SettingController(policy, coder, pool, predictor, observe)
        )
        self._fixed = fixed_setting(policy)
        self._observe = observe if self._controller is None else self._controller.observe
        self._calibrator = BackgroundCalibrator(estimator, self._observe, pool.clock)
        if predictor is not None:
            shared = policy.shared_by(coder.can_decode + 1)
            goal = PredictionGoal(shared.max_disagreement, shared.tolerance)
            width = policy.max_batch_size
            predictor.attach(goal, width, coder.form, self._observe, pool.clock)
        parts = self._calibrator, self._controller, predictor
        self._parts = [each for each in parts if each is not None]

    @property
    def setting(self) -> DispatchSetting:
        return self._fixed if self._controller is None else self._controller.setting

    @property
    def predicts(self) -> bool:
        return self.predictor is not None

    def start(self) -> None:
        for each in self._parts:
            each.start()

    def close(self) -> None:
        for each in self._parts:
            each.close()

    def observe(self, what: Any, number: int | float) -> None:
        self._observe(what, number)

    def setting_status(self) -> dict[str, Any] | None:
        """Return the chosen setting for a server's status; None where the policy fixes it."""
        return None if self._controller is None else self._controller.status()

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

    def audit(self, given: Answer, own: np.ndarray) -> bool:
        if given.source == "predicted":
            assert self.predictor is not None
            return self.predictor.audit(given, own)
        return self.estimator.audit(given.value, own)

    def error_probability(self, queries: int) -> DecodingErrorProbability:
        return self.estimator.error_probability(queries)

    def expected_error(self, queries: int, mask: Bool[np.ndarray, " num_workers"]) -> ExpectedError:
        return self._calibrator.expected_error(queries, mask)

    def predict(self, x: Shaped[np.ndarray, "queries ..."]) -> Predictions | None:
        predictor = self.predictor
        if predictor is None or predictor.state != "answering":
            return None
        return predictor.predict(x)
