"""All that adapts, as the scheduler sees it.

The scheduler calls these methods from its own thread, so each returns at once. What it reads is
immutable, and was computed by other threads: the scheduler's does nothing but answer queries.
"""

import collections
import dataclasses
import logging
import math
from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped

from ...evaluation._criteria import agree_on_labels, root_mean_square
from ...inference.models import warn_if_other
from ...pools import AbstractPool
from ...risk import Comparison, Risk
from ...risk._accuracy import error_ratios
from ...risk._outputs import ROWS, why_no_scores
from ...risk.votes import AnswerChecks
from .._policy import BatchingPolicy, Observe
from ..core._adaptation import DispatchSetting, overdue_rule
from ..core._coder import Coder
from ..core._decide import LateEvidence
from ..core._request import ApproximateAnswer, Source
from ._decoding import Compared, DecodingScores
from ._predictor import Predictor
from ._setting_controller import SettingController

_LOG = logging.getLogger(__name__)

# Comparisons of decoded answers from which a score is learned where there is no calibration, at
# least, and those that are kept.
FIRST, _COMPARED = 32, 1024


class Adaptation:
    """Scores of decoded answers, a surrogate if there is one, and the choice of settings.

    One thread learns: whether outputs are scores, which decoded answers are right, and the
    surrogate.

    Attributes:
        scores: the scores of decoded answers.
        predictor: the surrogate, ready or not; None where there is none.
        checks: the checks of the model's own answers; None where they are given out unseen.
        observe: takes a measurement.
    """

    def __init__(
        self,
        pool: AbstractPool,
        coder: Coder,
        policy: BatchingPolicy,
        scores: DecodingScores,
        predictor: Predictor | None,
        observe: Observe,
    ):
        """Attach the parts to each other, without starting their threads.

        Raises:
            ValueError: for a policy that does not fit the code, the predictor, or the promise that
                the scores were calibrated for.
        """
        known, wanted = scores.accuracy, policy.accuracy
        if (known.tolerance, known.coverage) != (wanted.tolerance, wanted.coverage):
            raise ValueError(
                f"decoding was calibrated for a tolerance of {known.tolerance} and a coverage of "
                f"{known.coverage}, the policy has {wanted.tolerance} and {wanted.coverage}"
            )
        scores = dataclasses.replace(scores, accuracy=wanted)
        if scores.calibrated:
            warn_if_other("the error estimate", scores.conditions, pool.conditions)
        self.scores, self.predictor = scores, predictor
        self._controller = (
            None
            if policy.max_calls is None
            else SettingController(policy, coder, pool, predictor, observe)
        )
        self._policy, self._coder, self._accuracy = policy, coder, policy.accuracy
        self._overdue = overdue_rule(policy)
        self._fixed = DispatchSetting(self._overdue, policy.redundancy)
        self._exact = DispatchSetting(self._overdue, "none")
        self.observe = observe if self._controller is None else self._controller.observe
        needs = self._accuracy.promises and not scores.calibrated
        self._decoding_risk = Risk(self._accuracy, needs_evidence=needs)
        unread = policy.outputs is None and (coder.can_decode or predictor is not None)
        # What is learned on the thread, from what the scheduler's thread adds.
        self._unread, self._answers = unread, [] if scores.own is None else list(scores.own)
        self._read_as: Literal["scores", "values"] | None = None if unread else "scores"
        self._why: str | None = None
        self._compared: collections.deque[Compared] = collections.deque(maxlen=_COMPARED)
        self._due = math.inf if scores.calibrated else FIRST
        self._number = self._drifts = 0
        self._learned: tuple[DecodingScores, list[Comparison]] | None = None
        self._turns = pool.clock.turns("nercc-learning", self._turn)
        self._look()
        self.checks: AnswerChecks | None = None
        if predictor is not None:
            width, rate = policy.max_batch_size, policy.check_answers
            wake = self._turns.wake
            form = coder.form
            predictor.attach(self._accuracy, width, form, self.observe, pool.clock, wake, rate)
            if rate is not None:
                self.checks = AnswerChecks(
                    pool.num_workers, policy.max_fenced, pool.worker_dtype, self.observe
                )
        elif policy.check_answers is not None:
            raise ValueError(
                "check_answers needs a predictor (`--surrogate`): nothing else tells what answers "
                "should be"
            )

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
        return self._read_as == "values"

    @property
    def approximates(self) -> bool:
        """True if approximate answers may be given out at all, by what the outputs are."""
        return not self._exact_only and self._read_as is not None

    @property
    def can_predict(self) -> bool:
        """True if the surrogate may answer now."""
        predictor = self.predictor
        return predictor is not None and self.approximates and predictor.state == "answering"

    def start(self) -> None:
        """Start the threads."""
        self._turns.start()
        if self._controller is not None:
            self._controller.start()

    def close(self) -> None:
        """End the threads."""
        self._turns.close()
        if self._controller is not None:
            self._controller.close()

    def _turn(self) -> float:
        try:
            self._look()
            if self._number >= self._due:
                drifts, compared = self._drifts, list(self._compared)
                self._due = self._number + max(self._number // 2, FIRST)
                learned = self.scores.learn(compared, self._coder.form)
                self._learned = learned if drifts == self._drifts else None
        except Exception:
            # Earlier results stay; later answers may do better.
            _LOG.exception("learning from decoded answers failed")
            self.observe("internal_error", 1)
        return math.inf if self.predictor is None else self.predictor.turn()

    def _look(self) -> None:
        """See whether outputs are scores, once enough of them are known."""
        if self._read_as is None and len(self._answers) >= ROWS:
            self._why = why_no_scores(np.stack(self._answers), self._coder.form)
            self._read_as = "scores" if self._why is None else "values"
            found = "scores of labels" if self._why is None else f"values: {self._why}"
            _LOG.info("outputs look like %s", found)

    def status(self) -> dict[str, Any]:
        controller, predictor, checks = self._controller, self.predictor, self.checks
        ready = predictor is not None and predictor.checks_answers
        # How outputs are read, and why; None as long as that is not known.
        read, why = self._read_as, self._why or "the model's own answers look like scores"
        if not self._unread:
            read, why = "values" if self._policy.outputs == "values" else "scores", "as set"
        elif read is None:
            why = f"{min(len(self._answers), ROWS)} of {ROWS} answers were looked at"
        return {
            "policy": None if controller is None else controller.status(),
            "predictor": None if predictor is None else predictor.status(),
            "checks": None if checks is None else {"ready": ready} | checks.status(),
            "decoding": self._decoding_status() if self._accuracy.promises else None,
            "outputs": {"read_as": read, "why": why},
            "audited": list(self._decoding_risk.shown),
        }

    def _decoding_status(self) -> dict[str, Any]:
        """Return what stragglers showed of decoded answers, before a score is learned, too."""
        found = self._decoding_risk.status()
        if not self.scores.known:
            found |= {"compared": self._number, "needed": max(found["needed"], FIRST)}
        return found

    def hints(self) -> list[str]:
        found, risk = [], self._decoding_risk
        if self._read_as is None:
            found.append(
                f"outputs are scores or values: {min(len(self._answers), ROWS)} of {ROWS} answers "
                "were looked at; nothing approximate is given out until then, or until outputs are "
                "set"
            )
        elif self._unread and self._exact_only:
            found.append(
                f"outputs are read as values, since {self._why}: all answers are exact; "
                "set a tolerance, or outputs = 'logits' if they are scores"
            )
        elif self._exact_only and self._coder.can_decode:
            found.append("outputs are values without a tolerance: all answers are exact")
        if self._accuracy.promises and self.approximates and self._coder.can_decode:
            if risk.waits:
                evidence = self._decoding_status()
                why = "decoded answers went wrong more often than promised: "
                compared = f"{why if risk.drifts else ''}{evidence['compared']}"
                if evidence["compared"] < evidence["needed"]:
                    compared += f" of {evidence['needed']} stragglers' answers were compared with "
                    found.append(compared + "decoded ones; nothing is decoded")
                else:
                    compared += " stragglers' answers were compared with decoded ones, of which "
                    found.append(compared + "none is sure enough; nothing is decoded")
            found += [] if risk.hint is None else [risk.hint]
        found += [] if self.checks is None else self.checks.hints()
        return found if self.predictor is None else found + self.predictor.hints()

    def add_answer(self, x: Shaped[np.ndarray, "..."], own: np.ndarray) -> None:
        """Take the model's own answer to a query."""
        if self._read_as is None:
            self._answers.append(own.ravel())
            if len(self._answers) == ROWS:
                self._turns.wake()
        if self.predictor is not None:
            self.predictor.add_answer(x, own)

    def risk(self, source: Source) -> Risk:
        """Return what other stragglers showed of approximate answers of this source.

        Answers that are given out are counted there, and their `audit` follows.
        """
        if source == "decoded":
            new, self._learned = self._learned, None
            if new is not None:  # with comparisons that it has not learned from
                self.scores, shown = new
                self._decoding_risk.replace(shown)
            return self._decoding_risk
        assert self.predictor is not None
        return self.predictor.risk

    def evidence(self, queries: int, budget: float = math.inf) -> LateEvidence:
        """Return what is known by now, for a group with this number of queries."""
        limit = math.inf
        if self._accuracy.promises:
            # What has had a drift is compared without being given out.
            limit = self.scores.limit(queries) if self.risk("decoded").drifts == 0 else -1.0
        risk: dict[Source, Risk] = {"decoded": self.risk("decoded")}
        if self.predictor is not None:
            risk["predicted"] = self.risk("predicted")
        return LateEvidence(self.setting, self.approximates, self.can_predict, limit, risk, budget)

    def audit(self, given: ApproximateAnswer, own: np.ndarray | None) -> bool:
        """Compare an answer with the model's own, which came late, or is None and will never come.

        One that will never come counts as wrong. If too many of those given out are wrong, nothing
        more is given out until there is evidence on other stragglers.

        Returns:
            Whether it was right.
        """
        answer, risk = given.answer, self.risk(given.answer.source)
        value, labels = answer.value.ravel(), self._accuracy.tolerance is None
        wrong, excess = labels, math.inf
        if own is not None:
            wrong = labels and not bool(agree_on_labels(value, own.ravel(), self._coder.form))
            error = root_mean_square(value - own.ravel())
            excess = float(error_ratios(error, np.asarray(answer.error)))
            if answer.features is not None:
                self._compared.append(Compared(answer.features, wrong, float(error)))
                self._number += 1
                if self._number >= self._due:
                    self._turns.wake()
        row = Comparison(answer.disagreement, answer.error, wrong, excess)
        drifted = risk.add(
            row,
            given=given.given,
            forced=given.forced,
            epoch=given.epoch,
            unknown=own is None,
            widened=given.widened,
        )
        if drifted and answer.source == "predicted":
            assert self.predictor is not None
            self.predictor.discard()
        elif drifted:
            # Learn from later comparisons only.
            self._compared.clear()
            self._number, self._learned, self._drifts = 0, None, self._drifts + 1
            self._due = FIRST if self._due < math.inf else self._due
            self.observe("drift", 1)
            _LOG.warning("decoded answers went wrong more often than promised: see the status")
        return not (wrong if labels else excess > given.widened)
