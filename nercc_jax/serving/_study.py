"""How a surrogate comes to be known: lessons, and before each an exam.

Every own answer of the model is an exam of the surrogate: what would have been said of that query,
held against what the model said. From the last exams come a doubt and the limit below which no more
labels are wrong than may be, or, for functions, the error bars. Then a learner learns from it.

Exams go on while answers are given out: where more of them fail than was promised, beyond chance,
the world has changed, and all that was calibrated is forgotten.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float, Shaped

from ..codes import Form
from ..evaluation import agree_on_labels
from ..risk import fit_error_probability_of_points
from ..surrogates import (
    AbstractLearner,
    AbstractSurrogate,
    ComponentLearner,
    Learner,
    LearnerTuning,
    init_learner,
    principal_components,
    tune_learner,
)
from ._known import Exam, Known, examine
from ._request import Answer

# Answers that are learned from at once, that a learner begins with, and from which on a kernel that
# was found on those is looked for anew.
AT_ONCE, FIRST, AGAIN = 32, 256, 1024
# Exams that calibration looks at, at most and at least, and by what share more there are next time.
_EXAMS, LEAST, _MORE = 2048, 128, 0.25
_FEATURES = 64  # principal components, where there are more floats
_COVERAGE = 0.9  # of error bars
# What is watched for drift: so many at most, and by how many standard deviations of their number
# more may fail than was promised before it is none of chance: a normal distribution passes that
# once in 300,000 times.
_WATCHED, _CHANCE = 512, 4.5


@dataclasses.dataclass(frozen=True)
class Goal:
    """What may be given out: this share of other labels, or answers whose bar is no larger.

    Raises: ValueError where it says neither.
    """

    max_disagreement: float | None
    tolerance: float | None

    def __post_init__(self):
        if self.max_disagreement is None and self.tolerance is None:
            raise ValueError(
                "to answer from what is known needs a policy with max_disagreement or tolerance"
            )


class Watch:
    """Whether things go wrong more often than was promised."""

    def __init__(self):
        self._failed: collections.deque[bool] = collections.deque(maxlen=_WATCHED)

    def take(self, failed: Iterable[bool]) -> None:
        self._failed.extend(failed)

    def broken(self, promised: float) -> bool:
        """Whether that is no chance."""
        number = len(self._failed)
        usual = promised * number
        return sum(self._failed) > usual + _CHANCE * math.sqrt(max(usual, 1.0))

    def clear(self) -> None:
        self._failed.clear()


class Study:
    """Of one thread. `known` is what others may read: None until enough is known.

    `surrogate` None: a learner made of the first answers, by `features` of the queries; unless
    given, their principal components. `drifts`: how often what was promised was not kept.
    """

    def __init__(
        self,
        surrogate: AbstractSurrogate | None,
        goal: Goal,
        *,
        features: Callable[[Any], Any] | None = None,
        capacity: int = 1024,
        form: Form | None = None,
    ):
        self._surrogate, self._goal = surrogate, goal
        self._features, self._capacity, self._form = features, capacity, form
        self._first: list[tuple[np.ndarray, np.ndarray]] = []
        self._learned = 0
        self._exams: collections.deque[Exam] = collections.deque(maxlen=_EXAMS // AT_ONCE)
        self._count, self._due = 0, float(LEAST)
        self._watch = Watch()
        self.known: Known | None = None
        self._in_step = True  # what is known knows the surrogate as it is
        self.drifts = 0

    def progress(self) -> tuple[int, int]:
        """Answers that it has learned from or been examined by, and how many it needs."""
        begins = self._surrogate is None or isinstance(self._surrogate, AbstractLearner)
        needed = LEAST + FIRST * begins
        done = min(self._learned, FIRST) * begins + len(self._first) + self._count
        return needed if self.known is not None else min(done, needed), needed

    def take(self, x: Shaped[np.ndarray, "pairs ..."], own: Float[np.ndarray, "pairs m"]) -> None:
        """The model's own answers to some queries, `AT_ONCE` of them."""
        if self._surrogate is None:
            self._first += zip(x, own, strict=True)
            if len(self._first) >= FIRST:
                self._begin(*map(np.stack, zip(*self._first, strict=True)))
                self._first = []
            return
        self._examine(x, own)
        if isinstance(self._surrogate, AbstractLearner):
            self._surrogate = _updated(self._surrogate, x, own)
            self._learned += len(x)
            if self._learned == AGAIN:
                # Its deviations are others now: exams by the old ones tell nothing of them. Until
                # there are enough, the learner as it was answers.
                self._surrogate, self._in_step = _tuned(self._surrogate), False
                self._start_anew()
            elif self.known is not None and self._in_step:
                self.known = dataclasses.replace(self.known, surrogate=self._surrogate)

    def drift(self) -> None:
        """What was promised is not kept: nothing is known until it is calibrated anew."""
        self.known, self._in_step = None, True
        self.drifts += 1
        self._start_anew()

    def _begin(self, x: Shaped[np.ndarray, "pairs ..."], own: Float[np.ndarray, "pairs m"]) -> None:
        features = self._features
        if features is None and x[0].size > _FEATURES:
            features = principal_components(x, _FEATURES)
        start = init_learner(
            x, own, features=features, capacity=self._capacity, kernel="squared_exponential"
        )
        self._surrogate, self._learned = tune_learner(start, _TUNING), len(x)

    def _start_anew(self) -> None:
        self._exams.clear()
        self._watch.clear()
        self._count, self._due = 0, float(LEAST)

    def _examine(self, x: np.ndarray, own: np.ndarray) -> None:
        assert self._surrogate is not None
        known = self.known if self._in_step else None
        doubt = None if known is None else known.doubt
        exam = examine(self._surrogate, doubt, x, own, self._form)
        if known is not None:
            bar = known.factor * exam.deviation
            failed = known.sure(exam.doubt, bar) & self._fails(exam.other, exam.error, bar)
            self._watch.take(failed.tolist())
            if self._watch.broken(known.promised * known.share):
                self.drift()
        self._exams.append(exam)
        self._count += len(own)
        if self._count >= self._due:
            self._due = self._count + _MORE * min(self._count, _EXAMS)
            self.known, self._in_step = self._calibrated(), True

    def fails(self, given: Answer, own: Float[np.ndarray, " m"]) -> bool:
        """Whether what was given out is not what it should be: another label, or off by more."""
        value = given.value.ravel()
        other = not bool(_agree(value, own, self._form))
        error = float(np.sqrt(np.mean((value - own) ** 2)))
        return bool(self._fails(np.array(other), np.array(error), np.array(given.error)))

    def _fails(self, other: np.ndarray, error: np.ndarray, bar: np.ndarray) -> np.ndarray:
        failed = np.zeros(other.shape, bool)
        if self._goal.max_disagreement is not None:
            failed |= other
        if self._goal.tolerance is not None:
            failed |= error > bar
        return failed

    def _calibrated(self) -> Known | None:
        """What the last exams tell; None where they tell nothing."""
        assert self._surrogate is not None
        exams = list(self._exams)
        features, deviation, error, other = (
            np.concatenate([getattr(exam, part) for exam in exams])
            for part in ("features", "deviation", "error", "other")
        )
        # The k-th of n ratios covers k / (n + 1) of others: see `ErrorBars`.
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.sort(np.where(error > 0, error / deviation, 0))
        factor = float(ratios[min(math.ceil(_COVERAGE * (len(ratios) + 1)), len(ratios)) - 1])
        wanted, tolerance = self._goal.max_disagreement, self._goal.tolerance
        doubt, limit, share, promised = None, 1.0, 1.0, 0.0
        if wanted is not None:
            doubt = fit_error_probability_of_points(
                features, np.zeros_like(other), other, self._form
            )
            limit = doubt.limit(wanted)
            share = 1 - doubt.share(limit)
            promised = wanted / share if share > 0 else 0.0
        if tolerance is not None:
            share *= float(np.mean(factor * deviation <= tolerance))
            promised += 1 - _COVERAGE
        tolerance = math.inf if tolerance is None else tolerance
        promised = min(promised, 1.0)
        return Known(self._surrogate, doubt, factor, limit, tolerance, share, promised)


@eqx.filter_jit
def _updated(
    learner: AbstractLearner, x: Shaped[ArrayLike, "pairs ..."], own: Float[ArrayLike, "pairs m"]
) -> AbstractLearner:
    return learner.update(jnp.asarray(x), jnp.asarray(own))


def _tuned(learner: AbstractLearner) -> AbstractLearner:
    """Its kernels found anew on what it knows by now; the widths that somebody gave it stay as
    wide beside each other as they are."""
    kept = dataclasses.replace(_TUNING, widths="kept")
    own = isinstance(learner, Learner | ComponentLearner)
    return tune_learner(learner, kept) if own else learner


_agree = eqx.filter_jit(agree_on_labels)
# One width for all features, from a grid: of 256 pairs, many widths tell nothing, and on LeNet5's
# answers descent finds nothing better (93.1 % of labels from 1,024 of them either way).
_TUNING = LearnerTuning(widths="one", rows=FIRST, steps=0)
