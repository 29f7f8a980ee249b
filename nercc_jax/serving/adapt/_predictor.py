"""Predicted answers: a surrogate's, where it is certain enough about a straggler's query."""

import collections
import logging
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Shaped

from ...codes._checks import check_count
from ...inference.models import Model
from ...pools.clock import TimeShare
from ...risk import Risk
from ...surrogates import AbstractSurrogate, Surrogate
from ..core._group import repeat_rows
from ..core._setup import Setup
from ._online_calibration import BATCH, FIRST, CalibratedSurrogate, OnlineCalibration, Predictions

_LOG = logging.getLogger(__name__)

_WAITING = 512  # answers that wait to be learned from; later ones replace the earliest
# The share of the time that learning may take, since programs of JAX keep all cores of a CPU busy,
# at first and where it has settled, and the longest pause that follows from it, in seconds.
_SHARE, _LATER, _LONGEST = 0.05, 0.01, 1.0


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
        self._surrogate, self._options = surrogate, {"features": features, "capacity": capacity}
        self._inbox: collections.deque[tuple[np.ndarray, np.ndarray]] = collections.deque(
            maxlen=_WAITING
        )
        self._calibration: OnlineCalibration | None = None  # until it is attached
        # The calibration that the deciding thread goes by, and whether that has discarded it.
        self._calibrated: CalibratedSurrogate | None = None
        self._discarded = False

    def attach(self, setup: Setup, wake: Callable[[], Any]) -> None:
        """Attach the predictor to its batcher, whose learning thread calls `turn` after a `wake`.

        Raises:
            ValueError: where it has a batcher already, or nothing says what may be given out.
        """
        policy, form = setup.policy, setup.coder.form
        if self._calibration is not None:
            raise ValueError("this predictor is another batcher's: make one for each")
        if not policy.accuracy.promises:
            raise ValueError(
                "to answer from what is known needs a policy with max_disagreement, or with a "
                "tolerance for outputs that are values"
            )
        options: Any = self._options | {"form": form, "check_rate": policy.check_answers}
        self._calibration = OnlineCalibration(self._surrogate, policy.accuracy, **options)
        self._risk = Risk(policy.accuracy, needs_evidence=True)
        self._followed = 0  # the drifts of calibration that the risk knows
        self._time = TimeShare(setup.clock, _SHARE, longest=_LONGEST)
        self._setup, self._wake = setup, wake

    @property
    def state(self) -> Literal["learning", "answering", "drifted"]:
        """The state: it answers, it still learns, or drift has reset it."""
        if self._calibrated is not None and not self._discarded:
            return "answering"
        drifted = self._discarded or (self._calibration is not None and self._calibration.drifts)
        return "drifted" if drifted else "learning"

    @property
    def share(self) -> float:
        """The share of stragglers' queries that it would answer."""
        calibrated = self._calibrated
        if calibrated is None or self.state != "answering":
            return 0.0
        return min(calibrated.share, self._risk.share)

    @property
    def risk(self) -> Risk:
        """The evidence of stragglers on predictions, for the deciding thread.

        Where calibration began again, the evidence does, too.
        """
        assert self._calibration is not None
        if self._calibration.drifts != self._followed:
            self._followed = self._calibration.drifts
            self._risk.restart()
        return self._risk

    def status(self) -> dict[str, Any]:
        """Return the predictor's part of a server's status."""
        assert self._calibration is not None
        known, needed = self._calibration.progress()
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

    def hints(self) -> list[str]:
        """Return why it answers nothing, if so, and whether stragglers are harder."""
        assert self._calibration is not None
        known, needed = self._calibration.progress()
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
        calibrated = self._calibrated
        if calibrated is None or self._discarded:
            return None
        return calibrated.predict(x, self._setup.policy.max_batch_size)

    @property
    def checks_answers(self) -> bool:
        """True once `suspicious` knows enough to find wrong answers."""
        return self._calibrated is not None and self._calibrated.check is not None

    def suspicious(
        self, x: Shaped[np.ndarray, "queries ..."], own: Shaped[np.ndarray, "queries ..."]
    ) -> Bool[np.ndarray, " queries"]:
        """Return which of the model's own answers look wrong; none while it is not calibrated."""
        calibrated, own = self._calibrated, own.reshape(len(own), -1)
        return np.zeros(len(x), bool) if calibrated is None else calibrated.suspicious(x, own)

    def add_answer(self, x: Shaped[np.ndarray, "..."], own: np.ndarray) -> None:
        """Take the model's own answer to a query, and return at once."""
        self._inbox.append((x, own.ravel()))
        if len(self._inbox) == BATCH:  # once: a turn that has to wait comes back by itself
            self._wake()

    def discard(self) -> None:
        """Give nothing out until the surrogate is calibrated again: too many were wrong."""
        self._discarded = True
        self._wake()

    def turn(self) -> float:
        """Learn from what has come, and return when to be called again; on a thread of its own."""
        calibration, clock = self._calibration, self._setup.clock
        assert calibration is not None
        while len(self._inbox) >= BATCH:
            begin = clock.now()
            if begin < self._time.next:
                return self._time.next
            try:
                self._learn(calibration)
            finally:
                share = _LATER if calibration.settled else _SHARE
                self._setup.observe("learn_seconds", self._time.spend(begin, share))
        return math.inf

    def _learn(self, calibration: OnlineCalibration) -> None:
        x, own = map(np.stack, zip(*(self._inbox.popleft() for _ in range(BATCH)), strict=True))
        drifts = calibration.drifts
        if self._discarded:
            calibration.discard()
            self._calibrated, self._discarded = None, False
        calibration.add(x, own)
        if calibration.drifts > drifts:
            self._setup.observe("drift", 1)
            _LOG.warning("predictions went wrong more often than promised: they are not given out")
        calibrated = calibration.calibrated
        self._risk.usual = None if calibrated is None else calibrated.disagreement
        if calibrated is not None and self._calibrated is None:
            # Compile what the deciding thread calls.
            calibrated.predict(x[:1], self._setup.policy.max_batch_size)
            for size in self._setup.policy.batch_sizes:
                calibrated.suspicious(repeat_rows(x[:size], size), repeat_rows(own[:size], size))
        self._calibrated = calibrated
