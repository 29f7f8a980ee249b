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
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Shaped

from ...codes._trees import Form, join
from ...evaluation._criteria import agree_on_labels, row_errors
from ...risk import Accuracy, ErrorProbability, RiskMonitor
from ...risk._accuracy import bar_factor, error_ratios
from ...risk._answer_check import AnswerCheck, fit_answer_check
from ...risk._error_probability import fit_error_probability
from ...risk._features import label_features
from ...surrogates import (
    AbstractSurrogate,
    Learner,
    LearnerTuning,
    init_learner,
    principal_components,
    tune_learner,
)
from ...surrogates.nearest import nearest_predictions
from ..core._group import repeat_rows

# Answers that a learner takes at once, and that it starts from.
BATCH, FIRST = 32, 256
_SETTLED = 1024  # validation answers after which little is left to learn
# Validation answers that calibration looks at, at most and at least, and the share by which their
# number grows until the next calibration.
_VALIDATION, LEAST, _MORE = 2048, 128, 0.25
_FEATURES = 64  # principal components, where queries have more numbers


# Returns the answers to queries as vectors, and their deviations. Arrays of JAX may be longer than
# asked for, and may not be computed yet.
HostPredictions: TypeAlias = Callable[[np.ndarray], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Predictions:
    """A surrogate's answers to some queries, and which may be given out.

    Disagreement is the probability of another label, NaN where labels do not matter. The error
    bound, in units of the outputs, covers the error of a share `coverage` of the answers.
    """

    values: Float[np.ndarray, "queries m"]
    disagreement: Float[np.ndarray, " queries"]
    error_bound: Float[np.ndarray, " queries"]
    sure: Bool[np.ndarray, " queries"]


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

    def suspicious(
        self, x: Shaped[np.ndarray, "queries ..."], own: Float[np.ndarray, "queries m"]
    ) -> Bool[np.ndarray, " queries"]:
        """Return which of the model's own answers look wrong; none where there is no check."""
        if self.check is None or self.expected is None:
            return np.zeros(len(x), bool)
        mean, deviation = (np.asarray(each)[: len(x)] for each in self.expected(x))
        return self.check.suspicious(mean, deviation, own)

    def predict(self, x: Shaped[np.ndarray, "queries ..."], width: int = BATCH) -> Predictions:
        """Return the answers to some queries; programs are compiled for `width` queries."""
        return self.assess(*host_outputs(self.surrogate, x, width))

    def assess(
        self, values: Float[np.ndarray, "queries m"], deviation: Float[np.ndarray, " queries"]
    ) -> Predictions:
        """Return the surrogate's answers with what calibration says of them."""
        # Infinite where a deviation is, whatever the factor.
        finite = np.isfinite(deviation)
        bound = np.where(finite, self.factor * np.where(finite, deviation, 0), np.inf)
        probability = np.full(len(values), np.nan)
        sure = (bound <= self.tolerance) & np.isfinite(values).all(axis=1)
        if self.error_probability is not None:
            probability = self.error_probability(values, deviation, values)
            sure &= probability <= self.limit
        return Predictions(values, probability, bound, sure)


class ValidationBatch(NamedTuple):
    """A surrogate's answers to some queries, compared with the model's own, which may be large.

    `mean` and `spread` are the answers that the check expects, and `own` the model's; empty where
    they are not checked.
    """

    features: Float[np.ndarray, "queries features"]
    deviation: Float[np.ndarray, " queries"]
    error: Float[np.ndarray, " queries"]
    wrong: Bool[np.ndarray, " queries"]
    mean: Float[np.ndarray, "checked m"]
    spread: Float[np.ndarray, " checked"]
    own: Float[np.ndarray, "checked m"]


class _Options(NamedTuple):
    """The arguments of a calibration."""

    accuracy: Accuracy
    features: Callable[[Any], Any] | None
    capacity: int
    form: Form | None
    check_rate: float | None


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
        """Start without data; arguments are those of `Predictor`.

        `form` are the parts of answers that have a label each, and `check_rate` the share of right
        answers that may look wrong, if they are checked.
        """
        self._options = _Options(accuracy, features, capacity, form, check_rate)
        # Pairs that a learner is made of; None where there is a surrogate from the first.
        self._first: list[tuple[np.ndarray, np.ndarray]] | None = [] if surrogate is None else None
        self._surrogate, self._expected = surrogate, self._expectations(surrogate)
        self._validation: collections.deque[ValidationBatch] = collections.deque(
            maxlen=_VALIDATION // BATCH
        )
        self._count, self._due = 0, float(LEAST)
        self._monitor = RiskMonitor(accuracy.promised)
        self.calibrated: CalibratedSurrogate | None = None
        self.drifts = 0

    @property
    def settled(self) -> bool:
        """True where calibration rests on a thousand answers."""
        return self.calibrated is not None and self._count >= _SETTLED

    def progress(self) -> tuple[int, int]:
        """Return the number of answers used so far, and the number that the first result needs."""
        needed, done = LEAST, self._count
        if self._first is not None:
            needed, done = LEAST + FIRST, done + len(self._first)
        return needed if self.calibrated is not None else min(done, needed), needed

    def add(self, x: Shaped[np.ndarray, "pairs ..."], own: Float[np.ndarray, "pairs m"]) -> None:
        """Validate, calibrate and train the surrogate; of the first pairs, make a learner."""
        if self._surrogate is not None:
            self._validate(self._surrogate, x, own)
            if not isinstance(self._surrogate, Learner):
                return
            learner = self._surrogate.update(x, own)
        else:
            assert self._first is not None
            self._first += zip(x, own, strict=True)
            if len(self._first) < FIRST:
                return
            x, own = map(np.stack, zip(*self._first, strict=True))
            features, capacity = self._options.features, self._options.capacity
            if features is None and x[0].size > _FEATURES:
                features = principal_components(x, _FEATURES)
            learner = init_learner(
                x, own, features=features, capacity=capacity, kernel="squared_exponential"
            )
            # A width for each feature is found by descent. With one for all, 31 and 0 % of the
            # answers of an elliptic equation, with 10 parameters, were within a tenth of their
            # spread, and now 99 %. Where all have one anyway, it is from a grid: on LeNet5's
            # answers descent finds nothing better (93.1 % of labels from 1,024 of them either way).
            tuning = LearnerTuning(rows=FIRST)
            groups = tuning.groups(learner.kernel)
            if len(groups) > 1 and not groups.any():
                tuning = LearnerTuning(widths="one", rows=FIRST, steps=0)
            learner = tune_learner(learner, tuning)
        self._surrogate, self._expected = learner, self._expectations(learner)
        if self.calibrated is not None:
            self.calibrated = dataclasses.replace(
                self.calibrated, surrogate=learner, expected=self._expected
            )

    def _expectations(self, surrogate: AbstractSurrogate | None) -> HostPredictions | None:
        if surrogate is None or self._options.check_rate is None:
            return None
        return predictions_on_host(surrogate)

    def discard(self) -> None:
        """Discard the calibration after a drift, until there is a new one."""
        self.calibrated = None
        self.drifts += 1
        self._validation.clear()
        self._monitor.clear()
        self._count, self._due = 0, float(LEAST)

    def _validate(self, surrogate: AbstractSurrogate, x: np.ndarray, own: np.ndarray) -> None:
        """Compare the surrogate's answers with the model's own, and calibrate now and then."""
        accuracy, _, _, form, check_rate = self._options
        values, deviation = host_outputs(surrogate, x, BATCH)
        features = np.asarray(label_features(values, deviation, values, form))
        wrong = ~np.asarray(agree_on_labels(values, own, form))
        error = np.asarray(row_errors(values, own))
        checked: tuple[np.ndarray, ...] = own[:0], own[:0, 0], own[:0]
        if self._expected is not None:
            mean, spread = (np.asarray(each)[: len(x)] for each in self._expected(x))
            checked = mean, spread, own
        if self.calibrated is not None:
            found = self.calibrated.assess(values, deviation)
            excess = error_ratios(error, found.error_bound)
            if self._monitor.add(accuracy.missed(wrong, excess)[found.sure].tolist()):
                self.discard()
        # Queries that come again are predicted better than new ones, whose bars they would shorten.
        # Where nothing is known of errors yet, there is nothing to calibrate.
        new = np.isfinite(deviation)
        if isinstance(surrogate, Learner):
            new &= ~surrogate.knows(x)
        fields = (features, deviation, error, wrong, *checked)
        self._validation.append(ValidationBatch(*(each[new[: len(each)]] for each in fields)))
        self._count += int(new.sum())
        if self._count < self._due:
            return
        self._due = self._count + _MORE * min(self._count, _VALIDATION)

        parts = map(np.concatenate, zip(*self._validation, strict=True))
        features, deviation, error, wrong, mean, spread, own = parts
        wanted, tolerance = accuracy.max_disagreement, accuracy.tolerance
        # It has to be right for those that are given out, not for all.
        factor = bar_factor(deviation[:, None], error[:, None], accuracy, len(error))
        error_probability, limit, share, check = None, 1.0, 1.0, None
        if wanted is not None:
            error_probability = fit_error_probability(
                features[:, None], wrong[:, None], failure=0.25, form=form
            )
            error_probability = jax.tree.map(np.asarray, error_probability)
            limit = error_probability.limit(wanted)
            share = 1 - error_probability.share(limit)
        if tolerance is not None:
            share *= float(np.mean(factor * deviation <= tolerance))
        if check_rate is not None:
            labels = wanted is not None and (form is None or form.is_vector)
            check = fit_answer_check(mean, spread, own, check_rate, labels=labels)
        self.calibrated = CalibratedSurrogate(
            surrogate,
            error_probability,
            factor,
            limit,
            math.inf if tolerance is None else tolerance,
            share,
            float(np.mean(wrong)),
            check,
            self._expected,
        )


def host_outputs(
    surrogate: AbstractSurrogate, x: Shaped[np.ndarray, "queries ..."], width: int
) -> tuple[Float[np.ndarray, "queries m"], Float[np.ndarray, " queries"]]:
    """Return a surrogate's outputs as vectors, and deviations, 1 where it has none, on the host.

    Where it is not NumPy that predicts, a program is compiled for `width` queries.
    """
    if isinstance(surrogate, Learner) and surrogate.is_on_host:
        return _outputs(surrogate, x)
    parts = [x[begin : begin + width] for begin in range(0, len(x), width)]
    found = [_compiled_outputs(surrogate, repeat_rows(part, width)) for part in parts]
    values, deviation = (np.concatenate(each)[: len(x)] for each in zip(*found, strict=True))
    return values, deviation


def predictions_on_host(surrogate: AbstractSurrogate, most_outputs: int = 256) -> HostPredictions:
    """Return a surrogate's predictions, by NumPy where it predicts by that.

    Programs are compiled for few sizes.

    Args:
        surrogate: The surrogate.
        most_outputs: The most outputs of a learner for `nearest_predictions`, which solve for each
            output at every update.
    """
    if isinstance(surrogate, Learner) and surrogate.is_on_host:
        if surrogate.form.size > most_outputs:
            return lambda x: _outputs(surrogate, x)
        predict = nearest_predictions(surrogate)

        def nearest(x: Shaped[np.ndarray, "queries ..."]) -> tuple[Any, Any]:
            mean, deviation = predict(x)
            return join(mean, 1)[0], deviation

        return nearest
    arrays, rest = eqx.partition(surrogate, eqx.is_array)
    on_device = eqx.combine(jax.tree.map(jnp.asarray, arrays), rest)
    return lambda x: _compiled_outputs(on_device, repeat_rows(x, 1 << (len(x) - 1).bit_length()))


def _outputs(surrogate: AbstractSurrogate, x: Shaped[Any, "queries ..."]) -> tuple[Any, Any]:
    if isinstance(surrogate, Learner):
        mean, deviation = surrogate.predict(x)
    else:
        mean, deviation = surrogate.outputs(x), jnp.ones(len(x))
    return join(mean, 1)[0], deviation


_compiled_outputs = eqx.filter_jit(_outputs)
