"""Online calibration of a surrogate: every own answer of the model first tests it, then trains it.

A batch of the model's own answers is a validation batch: what the surrogate says of those queries,
against what the model said. The latest validation batches give an error probability and the limit
below which no more labels are wrong than allowed, or, for functions, error bounds. Then a learner
learns from the batch.

Validation goes on while answers are given out. If more of those that are certain enough are wrong
than promised, by a test that is valid at every time (`RiskMonitor`), the traffic or the model has
changed, and everything that was calibrated is discarded.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Shaped

from ...codes._trees import Form, join
from ...evaluation._criteria import agree_on_labels, root_mean_square, row_errors
from ...risk import Accuracy, ErrorProbability, RiskMonitor
from ...risk._accuracy import bar_factor, error_ratios
from ...risk._answer_check import AnswerCheck, fit_answer_check
from ...risk._error_probability import fit_error_probability
from ...risk._features import label_features
from ...splines.arrays import namespace
from ...surrogates import (
    AbstractSurrogate,
    Learner,
    LearnerTuning,
    init_learner,
    principal_components,
    tune_learner,
)
from ...surrogates.nearest import nearest_predictions
from ..core._adaptation import Predictions

# Answers that a learner takes at once, that it starts from, and after which the kernel found on
# those is tuned again.
BATCH, FIRST, RETUNE = 32, 256, 1024
_SETTLED = 1024  # validation answers after which little is left to learn
# Validation answers that calibration looks at, at most and at least, and the share by which their
# number grows until the next calibration.
_VALIDATION, LEAST, _MORE = 2048, 128, 0.25
_FEATURES = 64  # principal components, where queries have more numbers
# From a grid: with one width for all features, on LeNet5's answers, descent finds nothing better
# (93.1 % of labels from 1,024 of them either way).
_TUNING = LearnerTuning(widths="one", rows=FIRST, steps=0)


class Pending(NamedTuple):
    """Predictions that are asked for.

    Attributes:
        wait: Returns the means of answers as vectors, and their deviations.
        begun: Whether JAX computes them already. NumPy begins when it is waited for: at once it
            would compete with the thread that sends the queries to the model.
    """

    wait: Callable[[], tuple[np.ndarray, np.ndarray]]
    begun: bool


# A function that asks for the answers to queries.
HostPredictions: TypeAlias = Callable[[np.ndarray], Pending]


@dataclasses.dataclass(frozen=True)
class CalibratedSurrogate:
    """A surrogate and its calibration; immutable, so that one thread may make it for others.

    Attributes:
        surrogate: the surrogate.
        error_probability: the probability of a wrong label; None where labels do not matter.
        factor: what deviations are multiplied by to get error bounds.
        limit: the largest probability of a wrong label with which an answer is given out.
        tolerance: the largest error bound with which an answer is given out.
        share: the share of queries that are certain enough, by validation.
        disagreement: the share of all labels that were wrong in validation.
        check: the check of the model's own answers; None where they are not checked.
        expected: the predictions that it goes by.
    """

    surrogate: AbstractSurrogate
    error_probability: ErrorProbability | None
    factor: float
    limit: float
    tolerance: float
    share: float
    disagreement: float
    check: AnswerCheck | None = None
    expected: HostPredictions | None = None

    def expect(self, x: Shaped[np.ndarray, "queries ..."]) -> "ExpectedAnswers":
        """Return what the check expects of the model's own answers to some queries."""
        assert self.check is not None
        assert self.expected is not None
        return ExpectedAnswers(self.check, self.expected(x))

    def predict(self, x: Shaped[np.ndarray, "queries ..."]) -> Predictions:
        """Return the answers to some queries."""
        found = _predict(self.surrogate, self.error_probability, x)
        values, deviation, probability = map(np.asarray, found)
        bound = _bounds(self.factor, deviation)
        sure = self.is_sure(probability, bound) & np.isfinite(values).all(axis=1)
        return Predictions(values, probability, bound, sure)

    def is_sure(
        self, probability: Float[np.ndarray, " queries"], bound: Float[np.ndarray, " queries"]
    ) -> Bool[np.ndarray, " queries"]:
        within = bound <= self.tolerance
        return within if self.error_probability is None else within & (probability <= self.limit)


class ExpectedAnswers:
    """The answers that a check expects to some queries."""

    def __init__(self, check: AnswerCheck, predictions: Pending):
        """Keep predictions without waiting for them."""
        self._check, self._pending = check, predictions
        self.begun = predictions.begun

    def compute(self) -> None:
        """Compute what the answers are compared with, if it has not been yet."""
        _ = self._predictions

    @functools.cached_property
    def _predictions(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The means, the deviations, and the squares of residuals that look right at once."""
        mean, deviation = self._pending.wait()
        return mean, deviation, self._check.clear_squares(mean, deviation)

    def suspicious(
        self, rows: Sequence[int], own: Float[np.ndarray, "some m"]
    ) -> Bool[np.ndarray, " some"]:
        """Return which of the model's own answers to some of the queries look wrong."""
        mean, deviation, clear = self._predictions
        if list(rows) != list(range(len(mean))):
            mean, deviation, clear = mean[rows], deviation[rows], clear[rows]
        return self._check.suspicious(mean, deviation, own, clear)


@dataclasses.dataclass(frozen=True)
class ValidationBatch:
    """A surrogate's answers to some queries, compared with the model's own.

    `probability` is that of a wrong label, NaN before calibration. `mean` and `spread` are the
    answers that the check expects, and `own` the model's; empty where they are not checked.
    """

    features: Float[np.ndarray, "queries features"]
    deviation: Float[np.ndarray, " queries"]
    error: Float[np.ndarray, " queries"]
    wrong: Bool[np.ndarray, " queries"]
    probability: Float[np.ndarray, " queries"]
    mean: Float[np.ndarray, "checked m"]
    spread: Float[np.ndarray, " checked"]
    own: Float[np.ndarray, "checked m"]


class OnlineCalibration:
    """A surrogate that is validated, calibrated and trained batch by batch, by one thread.

    Other threads may read `calibrated`, the latest calibration, and `drifts`, how often drift was
    detected.
    """

    def __init__(
        self,
        surrogate: AbstractSurrogate | None,
        accuracy: Accuracy,
        *,
        features: Callable[[Any], Any] | None = None,
        capacity: int = 1024,
        form: Form | None = None,
        check_rate: float | None = None,
    ):
        """Start without data; arguments are those of `Predictor` and `Predictor.attach`."""
        self._check_rate = check_rate
        self._accuracy = accuracy
        self._set_surrogate(surrogate)
        self._features, self._capacity, self._form = features, capacity, form
        self._first: list[tuple[np.ndarray, np.ndarray]] = []
        self._learned = 0
        # The ratios of widths that were given stay.
        self._tuning = dataclasses.replace(_TUNING, widths="kept")
        self._validation: collections.deque[ValidationBatch] = collections.deque(
            maxlen=_VALIDATION // BATCH
        )
        self._count, self._due = 0, float(LEAST)
        self._monitor = RiskMonitor(accuracy.promised)
        self.calibrated: CalibratedSurrogate | None = None
        self._current = True  # whether `calibrated` has the latest surrogate
        self.drifts = 0

    @property
    def settled(self) -> bool:
        """True where calibration is current, and rests on a thousand answers."""
        return self.calibrated is not None and self._current and self._count >= _SETTLED

    def progress(self) -> tuple[int, int]:
        """Return the number of answers used so far, and the number that the first result needs."""
        learns = self._surrogate is None or isinstance(self._surrogate, Learner)
        needed = LEAST + FIRST * learns
        done = min(self._learned, FIRST) * learns + len(self._first) + self._count
        return needed if self.calibrated is not None else min(done, needed), needed

    def add(self, x: Shaped[np.ndarray, "pairs ..."], own: Float[np.ndarray, "pairs m"]) -> None:
        if self._surrogate is None:
            self._first += zip(x, own, strict=True)
            if len(self._first) >= FIRST:
                self._start_learner(*map(np.stack, zip(*self._first, strict=True)))
                self._first = []
            return
        self._validate(x, own)
        if isinstance(self._surrogate, Learner):
            self._learned += len(x)
            learner = self._surrogate.update(x, own)
            tuning = self._tuning
            if self._learned == RETUNE and (tuned := _tuned(learner, tuning)) is not learner:
                # Its deviations change, so earlier validation says nothing about them. Until there
                # is enough of it again, the learner as it was answers.
                self._set_surrogate(tuned)
                self._current = False
                self._restart_validation()
                return
            self._set_surrogate(learner)
            if self.calibrated is not None and self._current:
                self.calibrated = dataclasses.replace(
                    self.calibrated, surrogate=self._surrogate, expected=self._expected
                )

    def _set_surrogate(self, surrogate: AbstractSurrogate | None) -> None:
        self._surrogate, self._expected = surrogate, None
        if surrogate is not None and self._check_rate is not None:
            self._expected = predictions_on_host(surrogate)

    def discard(self) -> None:
        """Discard the calibration after a drift, until there is a new one."""
        self.calibrated, self._current = None, True
        self.drifts += 1
        self._restart_validation()

    def _start_learner(
        self, x: Shaped[np.ndarray, "pairs ..."], own: Float[np.ndarray, "pairs m"]
    ) -> None:
        features = self._features
        if features is None and x[0].size > _FEATURES:
            features = principal_components(x, _FEATURES)
        start = init_learner(
            x, own, features=features, capacity=self._capacity, kernel="squared_exponential"
        )
        # A width for each feature is found by descent. With one for all, 31 and 0 % of the answers
        # of an elliptic equation, with 10 parameters, were within a tenth of their spread, and now
        # 99 %.
        self._tuning = LearnerTuning(rows=FIRST)
        groups = self._tuning.groups(start.kernel)
        if len(groups) > 1 and not groups.any():
            self._tuning = _TUNING
        self._set_surrogate(tune_learner(start, self._tuning))
        self._learned = len(x)

    def _restart_validation(self) -> None:
        self._validation.clear()
        self._monitor.clear()
        self._count, self._due = 0, float(LEAST)

    def _validate(self, x: np.ndarray, own: np.ndarray) -> None:
        assert self._surrogate is not None
        calibrated = self.calibrated if self._current else None
        error_probability = None if calibrated is None else calibrated.error_probability
        found = _predict(self._surrogate, error_probability, x)
        values, deviation, probability = map(np.asarray, found)
        features = np.asarray(label_features(values, deviation, values, self._form))
        wrong = ~np.asarray(agree_on_labels(values, own, self._form))
        error = np.asarray(row_errors(values, own))
        mean, spread, checked = own[:0], own[:0, 0], own[:0]
        if self._expected is not None:
            (mean, spread), checked = self._expected(x).wait(), own
        if calibrated is not None:
            bound = _bounds(calibrated.factor, deviation)
            sure = calibrated.is_sure(probability, bound)
            failed = self._accuracy.missed(wrong, error_ratios(error, bound))
            if self._monitor.add(failed[sure].tolist()):
                self.discard()
        # Queries that come again are predicted better than new ones, whose bars they would shorten.
        # Where nothing is known of errors yet, there is nothing to calibrate.
        new = np.isfinite(deviation)
        if isinstance(self._surrogate, Learner):
            new &= ~self._surrogate.knows(x)
        fields = (features, deviation, error, wrong, probability, mean, spread, checked)
        batch = ValidationBatch(*(each[new[: len(each)]] for each in fields))
        self._validation.append(batch)
        self._count += int(new.sum())
        if self._count >= self._due:
            self._due = self._count + _MORE * min(self._count, _VALIDATION)
            self.calibrated, self._current = self._calibrate(), True

    def _calibrate(self) -> CalibratedSurrogate:
        assert self._surrogate is not None
        batches = list(self._validation)
        features, deviation, error, wrong, mean, spread, own = (
            np.concatenate([getattr(batch, part) for batch in batches])
            for part in ("features", "deviation", "error", "wrong", "mean", "spread", "own")
        )
        wanted, tolerance = self._accuracy.max_disagreement, self._accuracy.tolerance
        # It has to be right for those that are given out, not for all.
        looks = deviation[:, None], error[:, None]
        factor = bar_factor(*looks, self._accuracy, len(error))
        error_probability, limit, share = None, 1.0, 1.0
        if wanted is not None:
            error_probability = fit_error_probability(
                features[:, None], wrong[:, None], failure=0.25, form=self._form
            )
            limit = error_probability.limit(wanted)
            share = 1 - error_probability.share(limit)
        if tolerance is not None:
            share *= float(np.mean(factor * deviation <= tolerance))
        tolerance = math.inf if tolerance is None else tolerance
        disagreement = float(np.mean(wrong))
        check = None
        if self._check_rate is not None:
            labels = wanted is not None and (self._form is None or self._form.is_vector)
            check = fit_answer_check(mean, spread, own, self._check_rate, labels=labels)
        return CalibratedSurrogate(
            self._surrogate,
            error_probability,
            factor,
            limit,
            tolerance,
            share,
            disagreement,
            check,
            self._expected,
        )


def is_on_host(surrogate: AbstractSurrogate) -> TypeGuard[Learner]:
    """Return whether a surrogate predicts by NumPy, without programs."""
    return isinstance(surrogate, Learner) and surrogate.is_on_host


def predictions_on_host(surrogate: AbstractSurrogate, most_outputs: int = 256) -> HostPredictions:
    """Return a surrogate's predictions, by NumPy where it predicts by that.

    Programs are compiled for few sizes.

    Args:
        surrogate: The surrogate.
        most_outputs: The most outputs of a learner for `nearest_predictions`, which solve for each
            output at every update.
    """
    if is_on_host(surrogate):
        predict = surrogate.predict
        if surrogate.form.size <= most_outputs:
            predict = nearest_predictions(surrogate)

        def vectors(x: Shaped[np.ndarray, "queries ..."]) -> tuple[np.ndarray, np.ndarray]:
            mean, deviation = predict(x)
            return join(mean, 1)[0], deviation

        return lambda x: Pending(lambda: vectors(x), begun=False)
    arrays, rest = eqx.partition(surrogate, eqx.is_array)
    on_device = eqx.combine(jax.tree.map(jnp.asarray, arrays), rest)

    def begin(x: Shaped[np.ndarray, "queries ..."]) -> Pending:
        number = len(x)
        padded = repeat_rows(x, 1 << (number - 1).bit_length())
        mean, deviation, _ = _compiled_predicted(on_device, None, padded)
        return Pending(lambda: (np.asarray(mean)[:number], np.asarray(deviation)[:number]), True)

    return begin


def repeat_rows(x: Shaped[np.ndarray, "few ..."], number: int) -> Shaped[np.ndarray, "number ..."]:
    """Repeat rows up to this number, so that one compiled program serves all."""
    return x if len(x) == number else x[np.arange(number) % len(x)]


def _bounds(
    factor: float, deviation: Float[np.ndarray, " queries"]
) -> Float[np.ndarray, " queries"]:
    """Return error bounds; infinite where a deviation is, whatever the factor."""
    return np.where(np.isfinite(deviation), factor * np.nan_to_num(deviation), np.inf)


def _predict(
    surrogate: AbstractSurrogate,
    error_probability: ErrorProbability | None,
    x: Shaped[np.ndarray, "queries ..."],
) -> tuple[Any, Any, Any]:
    """Return outputs as vectors, deviations (1 if there are none), and error probabilities."""
    predict = _predicted if is_on_host(surrogate) else _compiled_predicted
    return predict(surrogate, error_probability, x)


def _predicted(
    surrogate: AbstractSurrogate,
    error_probability: ErrorProbability | None,
    x: Shaped[Any, "queries ..."],
) -> tuple[Any, Any, Any]:
    if isinstance(surrogate, Learner):
        mean, deviation = surrogate.predict(x)
    else:
        mean, deviation = surrogate.outputs(x), jnp.ones(len(x))
    values = join(mean, 1)[0]
    if error_probability is None:
        return values, deviation, namespace(values).full(len(values), np.nan)
    return values, deviation, error_probability(values, deviation, values)


_compiled_predicted = eqx.filter_jit(_predicted)


def _tuned(learner: Learner, tuning: LearnerTuning) -> Learner:
    """Tune the kernels on the learner's data.

    They are judged on some of the pairs. A kernel that does worse on all of them is not taken: one
    that is right for pairs four times as far apart may be.
    """
    return min(learner, tune_learner(learner, tuning), key=_log_loss)


def _log_loss(learner: Learner) -> float:
    """Return the mean log loss of leaving each pair of the window out."""
    errors, deviation, scatter = (
        np.asarray(each)[np.asarray(learner.filled)]
        for each in (*learner.left_out(), learner.window.scatter)
    )
    errors = np.stack([root_mean_square(errors, axis=1), scatter])
    square = 2 * root_mean_square(errors / deviation, axis=0) ** 2
    return float(np.mean(np.log(deviation) + square / 2))
