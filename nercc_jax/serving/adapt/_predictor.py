"""Predicted answers: a surrogate's, where it is certain enough about a straggler's query."""

import collections
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped

from ...codes._checks import check_count
from ...codes._trees import Form
from ...inference.models import Model
from ...pools.clock import AbstractClock, TimeShare
from ...risk import Accuracy, Risk
from ...surrogates import AbstractSurrogate, Surrogate
from .._policy import Observe
from ..core._adaptation import Expectation, Predictions
from ._online_calibration import BATCH, FIRST, OnlineCalibration, is_on_host, repeat_rows

_LOG = logging.getLogger(__name__)

_WAITING = 512  # answers that wait to be learned from; later ones replace the earliest
# The share of the time that learning may take, since programs of JAX keep all cores of a CPU busy,
# at first and where it has settled, and the longest pause that follows from it, in seconds.
_SHARE, _LATER, _LONGEST = 0.05, 0.01, 1.0

State = Literal["learning", "answering", "drifted"]


class Predictor:
    """A surrogate that answers stragglers' queries, and learns from the model's own answers.

    Given to a `CodedBatcher`, it answers queries whose own worker straggles, as soon as that is
    noticed, wherever it is certain enough for the policy's `max_disagreement` or `tolerance`. It
    answers nothing until it is calibrated, which takes 384 answers, or 128 for a surrogate that
    does not learn, and has shown that it is right about stragglers' queries, which may be harder
    than others (14 of them for a `max_disagreement` of 0.1, 28 for 0.05, 138 for 0.01). It learns
    beside the batcher, in a twentieth of the time at most, later in a hundredth.

    Example:
        >>> import numpy as np
        >>> from nercc_jax import Uncoded
        >>> from nercc_jax.testing import SimulatedPool
        >>> from nercc_jax.serving import BatchingPolicy, CodedBatcher, Coder, Predictor
        >>> pool = SimulatedPool(np.tanh, 4, seconds=lambda size: 0.05)
        >>> policy = BatchingPolicy(max_disagreement=0.1)
        >>> predictor = Predictor()
        >>> batcher = CodedBatcher(
        ...     pool, Coder(Uncoded(1)), (3,), (3,), policy=policy, predictor=predictor
        ... )
        >>> predictor.state
        'learning'
        >>> batcher.close()
    """

    def __init__(
        self,
        surrogate: Model | AbstractSurrogate | None = None,
        *,
        features: Callable[[Any], Any] | None = None,
        capacity: int = 1024,
    ):
        """Create a predictor for one batcher.

        Args:
            surrogate: a cheap model with the served model's outputs (a student), or a learner; by
                default a learner that is made from the first 256 answers.
            features: the features of queries by which such a learner measures similarity; by
                default their 64 principal components.
            capacity: the number of latest answers that such a learner keeps, 256 or more.

        Raises:
            ValueError: for a surrogate that is not callable, or a smaller capacity.
        """
        check_count("capacity", capacity, FIRST)
        if surrogate is not None and not isinstance(surrogate, AbstractSurrogate):
            surrogate = Surrogate(surrogate)
        self._surrogate = surrogate
        self._options = {"features": features, "capacity": capacity}
        self._inbox: collections.deque[tuple[np.ndarray, np.ndarray]] = collections.deque(
            maxlen=_WAITING
        )
        self._drift_detected = False
        self._attached = False

    def attach(
        self,
        accuracy: Accuracy,
        width: int,
        form: Form | None,
        observe: Observe,
        clock: AbstractClock,
        wake: Callable[[], Any],
        check_rate: float | None = None,
    ) -> None:
        """Attach the predictor to its batcher, whose learning thread calls `turn` after a `wake`.

        Answers are given out by the accuracy promised; `form` are their parts that have a label
        each. Programs are compiled for `width` queries. `check_rate` of the model's right answers
        may look wrong to it, if they are checked.

        Raises:
            ValueError: where it has a batcher already, or nothing says what may be given out.
        """
        if self._attached:
            raise ValueError("this predictor is another batcher's: make one for each")
        if not accuracy.promises:
            raise ValueError(
                "to answer from what is known needs a policy with max_disagreement, or with a "
                "tolerance for outputs that are values"
            )
        self._calibration = OnlineCalibration(
            self._surrogate, accuracy, form=form, check_rate=check_rate, **self._options
        )
        self._attached = True
        self._risk = Risk(accuracy, needs_evidence=True)
        self._followed = 0  # the drifts of calibration that the risk knows
        self._width, self._observe, self._clock = width, observe, clock
        self._compiled = False
        self._time = TimeShare(clock, _SHARE, longest=_LONGEST)
        self._wake = wake

    @property
    def state(self) -> State:
        """The state: it answers, it still learns, or drift has reset it."""
        calibrated = self._calibration.calibrated is not None
        if calibrated and self._compiled and not self._drift_detected:
            return "answering"
        return "drifted" if self._calibration.drifts or self._drift_detected else "learning"

    @property
    def share(self) -> float:
        """The share of stragglers' queries that it would answer."""
        calibrated = self._calibration.calibrated
        if calibrated is None or self.state != "answering":
            return 0.0
        return min(calibrated.share, self._risk.share)

    def status(self) -> dict[str, Any]:
        """Return the predictor's part of a server's status."""
        known, needed = self.progress()
        calibrated = self._calibration.calibrated
        return {
            "state": self.state,
            "known": known,
            "needed": needed,
            "share": self.share,
            "drifts": self._calibration.drifts,
            "disagreement": None if calibrated is None else calibrated.disagreement,
            "stragglers": self._risk.status(),
        }

    def progress(self) -> tuple[int, int]:
        """Return the number of answers used so far, and the number that it needs to answer."""
        return self._calibration.progress()

    def hints(self) -> list[str]:
        """Return why it answers nothing, if so, and whether stragglers are harder."""
        known, needed = self.progress()
        harder = [] if self._risk.hint is None else [self._risk.hint]
        if self.state == "drifted":
            why = "predictions went wrong more often than promised"
            return [f"{why}: {known} of {needed} answers are known since; nothing is predicted"]
        if self.state == "learning":
            return [f"still learning: {known} of {needed} answers; nothing is predicted"]
        evidence = self._risk.status()
        if evidence["compared"] < evidence["needed"]:
            compared = f"{evidence['compared']} of {evidence['needed']} stragglers' answers"
            return [f"{compared} were compared with predictions; nothing is predicted", *harder]
        if self.share == 0:
            return ["the surrogate is sure of no query: nothing is predicted", *harder]
        return harder

    def predict(self, x: Shaped[np.ndarray, "queries ..."]) -> Predictions | None:
        """Return its answers to some queries; None while it is not calibrated."""
        calibrated = self._calibration.calibrated
        if calibrated is None or not self._compiled or self._drift_detected:
            return None
        parts = [x[begin : begin + self._width] for begin in range(0, len(x), self._width)]
        if not is_on_host(calibrated.surrogate):  # programs are compiled for one number of queries
            parts = [repeat_rows(part, self._width) for part in parts]
        found = [calibrated.predict(part) for part in parts]
        return Predictions(
            *(
                np.concatenate([getattr(each, name) for each in found])[: len(x)]
                for name in ("values", "disagreement", "error_bound", "sure")
            )
        )

    def expect(self, x: Sequence[np.ndarray]) -> list[Expectation]:
        """Return what to expect of the model's own answers to some queries.

        It returns before JAX has computed it. Empty while it is not calibrated.
        """
        calibrated = self._calibration.calibrated
        if calibrated is None or not self.checks_answers:
            return []
        found = []
        for begin in range(0, len(x), self._width):
            part = x[begin : begin + self._width]
            answers = calibrated.expect(part[0][None] if len(part) == 1 else np.stack(part))
            found += [Expectation(answers, row) for row in range(len(part))]
        return found

    @property
    def checks_answers(self) -> bool:
        """True once `expect` knows enough to find wrong answers."""
        calibrated = self._calibration.calibrated
        return calibrated is not None and calibrated.check is not None and self._compiled

    def add_answer(self, x: Shaped[np.ndarray, "..."], own: np.ndarray) -> None:
        """Take the model's own answer to a query, and return at once."""
        self._inbox.append((x, own.ravel()))
        if len(self._inbox) == BATCH:  # once: a turn that has to wait comes back by itself
            self._wake()

    @property
    def risk(self) -> Risk:
        """The evidence of stragglers on predictions, for the scheduler's thread.

        Where calibration began again, the evidence does, too.
        """
        if self._calibration.drifts != self._followed:
            self._followed = self._calibration.drifts
            self._risk.restart()
        return self._risk

    def discard(self) -> None:
        """Give nothing out until the surrogate is calibrated again: too many were wrong."""
        self._drift_detected = True
        self._wake()

    def turn(self) -> float:
        """Learn from what has come, and return when to be called again; on a thread of its own."""
        while len(self._inbox) >= BATCH:
            now = self._clock.now()
            if now < self._time.next:
                return self._time.next
            try:
                self._learn()
            except Exception:
                # Earlier results stay; the next answers may do better.
                _LOG.exception("learning from the traffic failed")
                self._observe("internal_error", 1)
            share = _LATER if self._calibration.settled else _SHARE
            self._observe("learn_seconds", self._time.spend(now, share))
        return math.inf

    def _learn(self) -> None:
        calibration = self._calibration
        pairs = [self._inbox.popleft() for _ in range(BATCH)]
        x, own = map(np.stack, zip(*pairs, strict=True))
        drifts = calibration.drifts
        if self._drift_detected:
            calibration.discard()
            self._drift_detected = False
        calibration.add(x, own)
        if calibration.drifts > drifts:
            self._observe("drift", 1)
            _LOG.warning("predictions went wrong more often than promised: they are not given out")
        calibrated = calibration.calibrated
        self._risk.usual = None if calibrated is None else calibrated.disagreement
        if calibrated is not None and not self._compiled:
            # Compile what the scheduler's thread calls.
            calibrated.predict(repeat_rows(x[: self._width], self._width))
            for power in range(self._width.bit_length()):
                size = 1 << power
                if calibrated.check is not None:
                    calibrated.expect(repeat_rows(x[:size], size)).suspicious([0], own[:1])
            self._compiled = True
