"""Answers from what is known: a surrogate's, where it is sure enough of a straggler's query."""

import collections
import logging
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped

from ..codes import Form, check_count
from ..inference import Model
from ..pools import AbstractClock
from ..surrogates import AbstractSurrogate, Surrogate
from ._known import Predictions
from ._request import Answer
from ._study import AT_ONCE, FIRST, Goal, Study, Watch

_LOG = logging.getLogger(__name__)

_WAITING = 512  # answers that wait to be learned from, at most: the latest
# Of the time, that learning may take: programs of JAX keep all cores of a CPU busy.
_SHARE, _LONGEST = 0.05, 1.0

State = Literal["learning", "answering", "drifted"]


class Predictor:
    """Predicts queries' answers, and learns from the model's own as they come.

    Given to a `CodedBatcher`, it answers queries whose own worker straggles, as soon as that is
    noticed, wherever it is sure enough for the policy's `max_disagreement` or `tolerance`.

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

    Until it knows enough (384 answers; 128 of a surrogate that learns nothing) nothing is answered
    by it. Learning takes a twentieth of the time at most, on a thread of its own.
    """

    def __init__(
        self,
        surrogate: Model | AbstractSurrogate | None = None,
        *,
        features: Callable[[Any], Any] | None = None,
        capacity: int = 1024,
    ):
        """Args:
            surrogate: a cheap model with the served model's outputs (a student), or a learner; None
                for a learner that is made of the first 256 answers.
            features: of queries, by which such a one tells how alike they are; unless given, their
                64 principal components.
            capacity: answers that it knows at most, 256 or more: the latest.

        Raises: ValueError for a surrogate that is not callable, and a smaller capacity.
        """
        check_count("capacity", capacity, FIRST)
        if surrogate is not None and not isinstance(surrogate, AbstractSurrogate):
            surrogate = Surrogate(surrogate)
        self._surrogate = surrogate
        self._options = {"features": features, "capacity": capacity}
        self._inbox: collections.deque[tuple[np.ndarray, np.ndarray]] = collections.deque(
            maxlen=_WAITING
        )
        self._audits = Watch()
        self._betrayed = False
        self._study: Study | None = None

    def attach(
        self,
        goal: Goal,
        width: int,
        form: Form | None,
        observe: Callable[[Any, float], Any],
        clock: AbstractClock,
    ) -> None:
        """To its batcher, which starts and closes it. It predicts `width` queries at once.

        `form`: of what answers are joined, where each part has a label of its own.

        Raises: ValueError where it has another already.
        """
        if self._study is not None:
            raise ValueError("this predictor is another batcher's: make one for each")
        self._study = Study(self._surrogate, goal, form=form, **self._options)
        self._width, self._observe, self._clock = width, observe, clock
        self._ready = False  # compiled, too
        self._rests_until = -math.inf
        self._turns = clock.turns("nercc-predictor", self._turn)
        self.start, self.close = self._turns.start, self._turns.close

    @property
    def state(self) -> State:
        """Nothing is given out while it learns, and after a drift until it knows anew."""
        assert self._study is not None
        if self._study.known is not None and self._ready and not self._betrayed:
            return "answering"
        return "drifted" if self._study.drifts or self._betrayed else "learning"

    @property
    def share(self) -> float:
        """Of the queries, those that it would answer, by the last exams."""
        assert self._study is not None
        known = self._study.known
        return known.share if known is not None and self.state == "answering" else 0.0

    def status(self) -> dict[str, Any]:
        """For a server's status."""
        assert self._study is not None
        known, needed = self.progress()
        told = {"state": self.state, "known": known, "needed": needed}
        return told | {"share": self.share, "drifts": self._study.drifts}

    def progress(self) -> tuple[int, int]:
        """Answers that it has learned from or been examined by, and how many it needs."""
        assert self._study is not None
        return self._study.progress()

    def predict(self, x: Shaped[np.ndarray, "queries ..."]) -> Predictions | None:
        """What it makes of some queries; None until it knows enough."""
        assert self._study is not None
        known = self._study.known
        if known is None or not self._ready or self._betrayed:
            return None
        parts = [x[begin : begin + self._width] for begin in range(0, len(x), self._width)]
        found = [known.predict(_wide(part, self._width)) for part in parts]
        return Predictions(
            *(
                np.concatenate([getattr(each, name) for each in found])[: len(x)]
                for name in ("values", "doubt", "bar", "sure")
            )
        )

    def hear(self, x: Shaped[np.ndarray, "..."], own: np.ndarray) -> None:
        """The model's own answer to a query. Comes back at once."""
        self._inbox.append((x, own.ravel()))
        if len(self._inbox) >= AT_ONCE:
            self._turns.wake()

    def audit(self, given: Answer, own: np.ndarray) -> bool:
        """What was given out, and the model's own answer, which came late: whether it was right.

        Where too few are, nothing more is given out from now on, until enough is known anew.
        """
        assert self._study is not None
        failed = self._study.fails(given, own.ravel())
        self._audits.take([failed])
        known = self._study.known
        if known is not None and self._audits.broken(known.promised):
            self._betrayed = True
        return not failed

    def _turn(self) -> float:
        while len(self._inbox) >= AT_ONCE:
            now = self._clock.now()
            if now < self._rests_until:
                return self._rests_until
            try:
                self._learn()
            except Exception:
                # What was known stays; the next answers may do better.
                _LOG.exception("learning from the traffic failed")
                self._observe("internal_error", 1)
            spent = self._clock.now() - now
            self._observe("learn_seconds", spent)
            self._rests_until = now + spent + min(spent * (1 / _SHARE - 1), _LONGEST)
        return math.inf

    def _learn(self) -> None:
        study = self._study
        assert study is not None
        pairs = [self._inbox.popleft() for _ in range(AT_ONCE)]
        x, own = map(np.stack, zip(*pairs, strict=True))
        drifts = study.drifts
        if self._betrayed:
            study.drift()
            self._audits.clear()
            self._betrayed = False
        study.take(x, own)
        if study.drifts > drifts:
            self._observe("drift", 1)
            _LOG.warning("predictions went wrong more often than promised: they are not given out")
        if study.known is not None and not self._ready:
            # Compiles what the batcher's thread calls.
            study.known.predict(_wide(x[: self._width], self._width))
            study.fails(Answer(own[0], "predicted", 1, 0), own[0])
            self._ready = True


def _wide(x: np.ndarray, width: int) -> np.ndarray:
    """With rows that come again, as many: one compiled program does for all."""
    return x if len(x) == width else x[np.arange(width) % len(x)]
