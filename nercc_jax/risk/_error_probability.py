"""The probability that a predicted label differs from the model's own.

A decoded prediction has a standard deviation (the code's or the surrogate's) and a margin, by which
its largest output leads the second. Their ratio ranks predictions by how sure their label is. How
sure a ratio makes them depends on the model, so it is measured on unlabelled data that are coded
under straggler sets: a logistic regression gives the probability (Platt 1999, "Probabilistic
outputs for support vector machines"), and isotonic regression on its bins corrects what does not
have that form (Zadrozny and Elkan 2002, "Transforming classifier scores into accurate multiclass
probability estimates"). The largest probability that may be given out is chosen on the same data,
by an upper bound of the risk (Bates et al. 2021, arXiv 2101.02703).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, PRNGKeyArray

from ..codes._trees import Form, to_device
from ..evaluation import Answers
from ..evaluation._criteria import agree_on_labels
from ..evaluation._objective import draw_sets
from ..inference.models import AbstractCalibrated, Conditions
from ..splines.arrays import namespace
from ..stragglers import AbstractStragglers
from ..surrogates import AbstractSurrogate
from ..surrogates.interface import AbstractGroupPrior
from ..surrogates.surrogate import decode_with_deviation
from ._calibration import correction, regression, risks
from ._straggler_risk import risk_cap

_RATIOS = (1, 2)  # features that must not raise the probability of an error
_NO_NUMBERS = ("form", "conditions")  # fields
_LEAST = 1e-30  # added to a margin and a deviation before their logarithms are taken


class ErrorProbability(AbstractCalibrated):
    """A calibrated probability that a label differs from the model's own.

    `calibrate_error_probability` makes one.

    Attributes:
        weights: The logistic regression's weights.
        knots: Log-odds at which a correction is known; it is linear between them.
        shifts: The correction that is added to the log-odds at each knot.
        levels: Probabilities in increasing order, from 0 on.
        risks: For each level, an upper bound of the share of all data points that differ from the
            model's own label if those up to the level are given out, and all others are answered by
            the model. It counts one more wrong label than there were, and two standard errors.
        shares: For each level, the share of data points that the model must answer itself.
        form: The structure of the outputs, where they are not vectors.
        conditions: The conditions of the calibration's answers. `coded_inference` and
            `pool_inference` warn (`CalibrationWarning`) where others hold.
    """

    weights: Float[Array, " features"]
    knots: Float[Array, " bins"]
    shifts: Float[Array, " bins"]
    levels: Float[Array, " levels"]
    risks: Float[Array, " levels"]
    shares: Float[Array, " levels"]
    form: Form | None = eqx.field(static=True, default=None)
    conditions: Conditions = eqx.field(static=True, default=Conditions())

    def calibrated_under(self) -> Conditions:
        return self.conditions

    def __call__(
        self,
        predictions: Float[Any, "*points m"],
        deviation: Float[Any, "*points"],
        cheap: Float[Any, "*points m"] | None = None,
    ) -> Float[Any, "*points"]:
        """Return the probability that each label differs from the model's own.

        Args:
            predictions: Predicted outputs as vectors. Where the outputs have several labels
                (`form`), the probability is that any of them differs.
            deviation: Standard deviations of the predictions.
            cheap: The surrogate's outputs, if the calibration had a surrogate.

        Returns:
            Probabilities: 0 where the deviation is 0 (a worker's answer to the data point itself),
            1 where a prediction is not finite.

        Raises:
            ValueError: `cheap` is missing, or was not part of the calibration.
        """
        xp = namespace(predictions, deviation)
        features = error_features(predictions, deviation, cheap, self.form)
        if features.shape[-1] != self.weights.shape[0]:
            wanted = "with" if cheap is None else "without"
            raise ValueError(f"the error probability was calibrated {wanted} a surrogate's outputs")
        probability = xp.where(deviation == 0, 0, self.of_features(features))
        return xp.where(xp.isfinite(predictions).all(axis=-1), probability, 1)

    def of_features(self, features: Float[Any, "*points features"]) -> Float[Any, "*points"]:
        """Return the probability for the regression's features (`error_features`)."""
        xp = namespace(features)
        weights, knots, shifts = (
            xp.asarray(each, features.dtype) for each in (self.weights, self.knots, self.shifts)
        )
        logit = features @ weights
        logit = logit + xp.interp(logit, knots, shifts)
        return xp.exp(-xp.logaddexp(0, -logit))

    def to_json(self) -> dict[str, list[float]]:
        """Return the numbers by name for JSON, which has no infinity; they are for vectors."""
        names = (each.name for each in dataclasses.fields(self))
        numbers = {name: getattr(self, name) for name in names if name not in _NO_NUMBERS}
        return {name: np.nan_to_num(each).tolist() for name, each in numbers.items()}

    @classmethod
    def from_json(
        cls, numbers: Mapping[str, list[float]], conditions: Conditions | None = None
    ) -> "ErrorProbability":
        """Return what `to_json` wrote; raise TypeError for other names."""
        arrays: Any = {name: jnp.asarray(each, float) for name, each in numbers.items()}
        return cls(**arrays, conditions=conditions or Conditions())

    def limit(self, max_disagreement: float) -> float:
        """Return the largest probability at which a prediction may be given out.

        Args:
            max_disagreement: The largest share of the labels given out that may differ from the
                model's, the exact ones not counted (Geifman and El-Yaniv 2017, "Selective
                classification for deep neural networks").

        Returns:
            The limit; 0 where only the model's own answers will do. No prediction may be wrong with
            more than five times the share that was asked for, nor with more than one half. The
            limit holds in the mean over data and stragglers like those of the calibration, for
            about 97 % of calibrations.

        Raises:
            ValueError: `max_disagreement` is outside [0, 1].
        """
        if not 0 <= max_disagreement <= 1:
            raise ValueError(f"max_disagreement must be in [0, 1], not {max_disagreement}")
        shares = np.asarray(self.shares)
        given = shares[:1] - shares  # the first level is that of exact answers
        kept = np.flatnonzero(np.asarray(self.risks) <= max_disagreement * given)
        if not kept.size:
            return 0.0
        return min(float(np.asarray(self.levels)[kept[-1]]), risk_cap(max_disagreement))

    def share(self, limit: float) -> float:
        """Return the share of the calibration's data points above a limit.

        Raises:
            ValueError: The limit is negative.
        """
        if not limit >= 0:
            raise ValueError(f"a limit of error probabilities must be 0 or positive, not {limit}")
        place = np.searchsorted(np.asarray(self.levels), limit, side="right") - 1
        return float(np.asarray(self.shares)[place])


def error_probability_from_answers(
    own: Answers,
    stragglers: Mapping[str, AbstractStragglers],
    key: PRNGKeyArray,
    num_sets: int,
    surrogate: AbstractSurrogate | None = None,
    prior: AbstractGroupPrior | None = None,
) -> ErrorProbability:
    """Calibrate an error probability on recorded answers.

    Args:
        own: Recorded answers of the code.
        stragglers: Named laws that straggler sets are drawn from.
        key: Random key of the draws.
        num_sets: Straggler sets for each law.
        surrogate: The surrogate that predictions are decoded with, if any.
        prior: The surrogate's outputs on the same groups.
    """
    check_labels(own.form)
    masks, _ = draw_sets(stragglers, key, own.code.num_workers, num_sets)
    observed = observe_errors(own, surrogate, prior, masks)
    form = None if own.form.is_vector else own.form
    features, sure, wrong = map(np.asarray, observed)
    fitted = fit_error_probability(features, sure, wrong, form)
    return dataclasses.replace(fitted, conditions=own.conditions)


def check_labels(form: Form) -> None:
    """Raise ValueError for outputs without labels: a single number is its own largest."""
    if not form.has_labels:
        raise ValueError(
            f"outputs of shapes {list(form.shapes)} have one number a row, which is no label: "
            "calibrate_error_bars and a tolerance are for values"
        )


def fit_error_probability_of_predictions(
    predictions: Float[ArrayLike, "points m"],
    deviation: Float[ArrayLike, " points"],
    own: Float[ArrayLike, "points m"],
    form: Form | None = None,
) -> ErrorProbability:
    """Calibrate an error probability of a surrogate's predictions by themselves.

    The result is called with the predictions as `cheap`, too.

    Args:
        predictions: The surrogate's outputs on data points whose answers are known.
        deviation: Their standard deviations.
        own: The model's answers.
        form: The structure of the outputs, where they are not vectors.
    """
    predictions, deviation, own = map(np.asarray, (predictions, deviation, own))
    features = error_features(predictions, deviation, predictions, form)
    wrong = ~agree_on_labels(predictions, own, form)
    return fit_error_probability_of_points(features, deviation == 0, wrong, form)


def fit_error_probability_of_points(
    features: Float[np.ndarray, "points features"],
    sure: Bool[np.ndarray, " points"],
    wrong: Bool[np.ndarray, " points"],
    form: Form | None = None,
) -> ErrorProbability:
    """Fit an error probability to single data points, each of which was seen once."""
    features, sure, wrong = (each[None, :, None] for each in (features, sure, wrong))
    return fit_error_probability(features, sure, wrong, form)


@eqx.filter_jit
def observe_errors(
    own: Answers,
    surrogate: AbstractSurrogate | None,
    prior: AbstractGroupPrior | None,
    masks: Bool[Array, "sets num_workers"],
) -> tuple[Array, Array, Array]:
    """Return features, exactness, and wrongness of each data point under each straggler set."""

    def of_set(mask):
        available = jnp.broadcast_to(mask, own.coded.shape[:2])
        decoded, deviation = decode_with_deviation(own.code, surrogate, own.coded, available, prior)
        cheap = None if prior is None else prior.condition_on_available(own.coded, available).own
        wrong = ~own.same_labels(decoded.predictions)
        features = error_features(decoded.predictions, deviation, cheap, own.form)
        return features, deviation == 0, wrong | ~decoded.recovered

    return jax.lax.map(of_set, masks)


def error_features(
    predictions: Float[Any, "*points m"],
    deviation: Float[Any, "*points"],
    cheap: Float[Any, "*points m"] | None,
    form: Form | None,
) -> Float[Any, "*points features"]:
    """Return what the logistic regression looks at, with the constant first.

    The features are the logarithm of margin over deviation (below and above 1 apart, neither of
    which may raise the probability), the logarithm of the margin, and of a surrogate whether it has
    the same label, and by how much.
    """
    xp = namespace(predictions, deviation)
    size = xp.log(margin(predictions, form) + _LEAST)
    ratio = xp.clip(size - xp.log(deviation + _LEAST), -10, 10)
    features = [xp.ones_like(ratio), xp.minimum(ratio, 0), xp.maximum(ratio, 0), size]
    if cheap is not None:
        lead = _least_of_labels(_lead, form, predictions, cheap)
        features += [xp.sign(lead), xp.arcsinh(lead)]
    return xp.nan_to_num(xp.stack(features, axis=-1))


def margin(predictions: Float[Any, "*points m"], form: Form | None = None) -> Float[Any, "*points"]:
    """Return by how much the largest output leads the second.

    A single output's margin is its size. Predictions with several labels (`form`) have the margin
    of their least certain one. On the host or in programs, by the array.
    """
    return _least_of_labels(_margin, form, predictions)


def _margin(outputs: Float[Any, "*labels m"]) -> Float[Any, "*labels"]:
    xp = namespace(outputs)
    if outputs.shape[-1] == 1:
        return xp.abs(outputs[..., 0])
    if xp is np:
        largest = np.partition(outputs, -2, axis=-1)[..., -2:]
        return largest[..., 1] - largest[..., 0]
    first, second = jnp.moveaxis(jax.lax.top_k(outputs, 2)[0], -1, 0)
    return first - second


def _lead(
    predictions: Float[Any, "*labels m"], cheap: Float[Any, "*labels m"]
) -> Float[Any, "*labels"]:
    """Return by how much the surrogate prefers the predicted label to all others."""
    xp = namespace(predictions, cheap)
    label = xp.argmax(predictions, axis=-1, keepdims=True)
    others = xp.where(xp.arange(cheap.shape[-1]) == label, -xp.inf, cheap)
    own = xp.take_along_axis(cheap, label, axis=-1)[..., 0]
    return own - xp.max(others, axis=-1)


def _least_of_labels(
    of_labels: Callable[..., Any], form: Form | None, *vectors: Float[Any, "*points m"]
) -> Float[Any, "*points"]:
    """Return the least value over all labels of a data point."""
    xp = namespace(*vectors)
    if form is None:
        return of_labels(*vectors)
    axes = vectors[0].ndim - 1
    least = []
    for parts in zip(*(jax.tree.leaves(form.split(each)) for each in vectors), strict=True):
        labelled = (part[..., None] if part.ndim == axes else part for part in parts)
        found = of_labels(*labelled)
        least.append(xp.min(found.reshape(*found.shape[:axes], -1), axis=-1))
    return xp.min(xp.stack(least), axis=0)


def fit_error_probability(
    features: Float[np.ndarray, "sets groups num_data features"],
    sure: Bool[np.ndarray, "sets groups num_data"],
    wrong: Bool[np.ndarray, "sets groups num_data"],
    form: Form | None = None,
) -> ErrorProbability:
    """Fit an error probability to observed errors, in the three steps of `_calibration.py`.

    Args:
        features: The features of each data point under each straggler set (`error_features`).
        sure: Whether a prediction is the model's own answer, whatever its features.
        wrong: Whether its label differs from the model's own.
        form: The structure of the outputs, where they are not vectors.
    """
    from scipy.special import expit  # late: a fifth of a worker's import time

    # A data point is much the same under all sets, so it counts once, not once in each.
    count = np.sum(~sure.all(axis=0)) / max(np.sum(~sure), 1)
    group = np.nonzero(~sure)[1]
    weights, fresh = regression(
        features[~sure].astype(np.float64), wrong[~sure], group, count, _RATIOS
    )
    knots, shifts = correction(fresh, wrong[~sure], count)
    logit = features @ weights
    probability = np.where(sure, 0, expit(logit + np.interp(logit, knots, shifts)))
    levels, found, shares = risks(probability, sure, wrong)
    numbers = (weights, knots, shifts, levels, found, shares)
    arrays: Any = to_device([np.asarray(each, float) for each in numbers])
    return ErrorProbability(*arrays, form=form)
