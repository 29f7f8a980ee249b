"""Knowing which predictions to doubt: how likely a label is not the model's own.

A decoded prediction has a standard deviation (`AbstractCode.decode`, or the surrogate's) and a
margin, by which its largest output leads the second. Their ratio ranks predictions by how sure
their label is; how sure that makes them depends on the model, and is measured: a logistic
regression on unlabelled data, coded, under straggler sets, tells the probability (Platt 1999,
"Probabilistic outputs for support vector machines"), and isotonic regression on its bins corrects
what does not have that form (Zadrozny and Elkan 2002, "Transforming classifier scores into accurate
multiclass probability estimates"). The limit below which answers are given at once is chosen on the
same data, by an upper bound of the risk (Bates et al. 2021, arXiv 2101.02703).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, PRNGKeyArray

from ..codes import Form
from ..evaluation import Answers, agree_on_labels, draw_sets
from ..inference import AbstractCalibrated, Conditions
from ..stragglers import AbstractStragglers
from ..surrogates import AbstractExpectation, AbstractSurrogate, assess
from ._calibration import correction, regression, risks

_RATIOS = (1, 2)  # the features that must not raise the doubt
_LEAST = 1e-30  # beside a margin and a deviation, whose logarithms are taken


class Doubt(AbstractCalibrated):
    """A calibrated score of predictions, made by `calibrate_doubt`.

    `weights` are the logistic regression's, and `shifts` what is added to its log-odds, at `knots`
    and linearly between. `levels` are doubts in increasing order, from 0 on, and `risks` the share
    of all data points that differ from the model's own if those with no more doubt are answered at
    once, and all others by the model itself: counted on the calibration data, with one more wrong
    one than there were, and two standard errors more. `shares` are what the model must answer
    itself. `conditions` are those of the answers, unknown where none were recorded: used under
    others, `coded_inference` and `pool_inference` warn (`CalibrationWarning`).
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
        predictions: Float[Array, "*points m"],
        deviation: Float[Array, "*points"],
        cheap: Float[Array, "*points m"] | None = None,
    ) -> Float[Array, "*points"]:
        """The probability that a label is not the model's own, for data points of any shape.

        Predictions are vectors; outputs of another shape, or several, are joined to such (`form`),
        and then the doubt is whether any of their labels differs.

        0 where a prediction is a worker's answer to the data point itself, 1 where it is not
        finite. `cheap` are the surrogate's outputs, if it was calibrated with one.

        Raises: ValueError where `cheap` is missing, or is not wanted.
        """
        features = features_of_doubt(predictions, deviation, cheap, self.form)
        if features.shape[-1] != self.weights.shape[0]:
            wanted = "with" if cheap is None else "without"
            raise ValueError(f"this doubt was calibrated {wanted} a surrogate's outputs")
        doubt = jnp.where(deviation == 0, 0, self.of_features(features))
        return jnp.where(jnp.isfinite(predictions).all(axis=-1), doubt, 1)

    def of_features(self, features: Float[Array, "*points features"]) -> Float[Array, "*points"]:
        """The probability by what the regression looks at."""
        weights, knots, shifts = (
            each.astype(features.dtype) for each in (self.weights, self.knots, self.shifts)
        )
        logit = features @ weights
        return jax.nn.sigmoid(logit + jnp.interp(logit, knots, shifts))

    def limit(self, max_disagreement: float) -> float:
        """The largest doubt to answer at once, so that no more than so much disagrees in all.

        That holds in the mean over data like those of the calibration, and stragglers like theirs,
        for some 97 % of calibrations. 0: nothing but the model's own answers will do.

        Raises: ValueError for a `max_disagreement` outside [0, 1].
        """
        if not 0 <= max_disagreement <= 1:
            raise ValueError(f"max_disagreement must be in [0, 1], not {max_disagreement}")
        kept = np.flatnonzero(np.asarray(self.risks) <= max_disagreement)
        return float(self.levels[kept[-1]]) if kept.size else 0.0

    def share(self, limit: float) -> float:
        """The share of data points with more doubt than `limit`, as it was in calibration.

        Raises: ValueError for a negative limit.
        """
        if not limit >= 0:
            raise ValueError(f"a limit of doubt must be 0 or positive, not {limit}")
        place = np.searchsorted(np.asarray(self.levels), limit, side="right") - 1
        return float(self.shares[place])


def doubt_of(
    own: Answers,
    stragglers: Mapping[str, AbstractStragglers],
    key: PRNGKeyArray,
    num_sets: int,
    surrogate: AbstractSurrogate | None = None,
    beside: AbstractExpectation | None = None,
) -> Doubt:
    """`calibrate_doubt` on recorded answers, and beside them what the surrogate expects."""
    masks, _ = draw_sets(stragglers, key, own.code.num_workers, num_sets)
    seen = observe(own, surrogate, beside, masks)
    form = None if own.form.is_vector else own.form
    features, sure, wrong = map(np.asarray, seen)
    doubt = doubt_from(features, sure, wrong, form)
    return dataclasses.replace(doubt, conditions=own.conditions)


def doubt_of_predictions(
    predictions: Float[ArrayLike, "points m"],
    deviation: Float[ArrayLike, " points"],
    own: Float[ArrayLike, "points m"],
    form: Form | None = None,
) -> Doubt:
    """The doubt of a surrogate's predictions by themselves, on points whose answers are known.

    Called with them as `cheap`, too. Raises: ValueError for too few points to tell anything."""
    predictions, deviation, own = map(jnp.asarray, (predictions, deviation, own))
    told = features_of_doubt(predictions, deviation, predictions, form)
    differ = ~agree_on_labels(predictions, own, form)
    features, sure, wrong = map(np.asarray, (told, deviation == 0, differ))
    return doubt_of_points(features, sure, wrong, form)


def doubt_of_points(
    features: Float[np.ndarray, "points features"],
    sure: Bool[np.ndarray, " points"],
    wrong: Bool[np.ndarray, " points"],
    form: Form | None = None,
) -> Doubt:
    """`doubt_from` of data points that are no groups, each seen once."""
    features, sure, wrong = (each[None, :, None] for each in (features, sure, wrong))
    return doubt_from(features, sure, wrong, form)


@eqx.filter_jit
def observe(
    own: Answers,
    surrogate: AbstractSurrogate | None,
    beside: AbstractExpectation | None,
    masks: Bool[Array, "sets num_workers"],
) -> tuple[Array, Array, Array]:
    """Each data point under each set: its features, whether it is sure, and whether it is wrong."""

    def of_set(mask):
        available = jnp.broadcast_to(mask, own.coded.shape[:2])
        decoded, deviation = assess(own.code, surrogate, own.coded, available, beside)
        cheap = None if beside is None else beside.after(own.coded, available).own
        wrong = ~own.same_labels(decoded.predictions)
        features = features_of_doubt(decoded.predictions, deviation, cheap, own.form)
        return features, deviation == 0, wrong | ~decoded.recovered

    return jax.lax.map(of_set, masks)


def features_of_doubt(
    predictions: Float[Array, "*points m"],
    deviation: Float[Array, "*points"],
    cheap: Float[Array, "*points m"] | None,
    form: Form | None,
) -> Float[Array, "*points features"]:
    """What the logistic regression looks at, the constant first.

    The ratio of margin and deviation, in logarithms since either may be of any size: above and
    below one it counts differently, but never for more doubt. Then the margin's size; and of the
    surrogate, whether it is for the same label, and how far.
    """
    size = jnp.log(margin(predictions, form) + _LEAST)
    ratio = jnp.clip(size - jnp.log(deviation + _LEAST), -10, 10)
    features = [jnp.ones_like(ratio), jnp.minimum(ratio, 0), jnp.maximum(ratio, 0), size]
    if cheap is not None:
        lead = _least_of_labels(_lead, form, predictions, cheap)
        features += [jnp.sign(lead), jnp.arcsinh(lead)]
    return jnp.nan_to_num(jnp.stack(features, axis=-1))


def margin(
    predictions: Float[Array, "*points m"], form: Form | None = None
) -> Float[Array, "*points"]:
    """By how much the largest output leads the second; of a single output, how large it is.

    Of predictions with several labels (`form`), the least.
    """
    return _least_of_labels(_margin, form, predictions)


def _margin(outputs: Float[Array, "*labels m"]) -> Float[Array, "*labels"]:
    if outputs.shape[-1] == 1:
        return jnp.abs(outputs[..., 0])
    first, second = jnp.moveaxis(jax.lax.top_k(outputs, 2)[0], -1, 0)
    return first - second


def _lead(
    predictions: Float[Array, "*labels m"], cheap: Float[Array, "*labels m"]
) -> Float[Array, "*labels"]:
    """By how much the surrogate is for the predicted label."""
    label = jnp.argmax(predictions, axis=-1, keepdims=True)
    others = jnp.where(jnp.arange(cheap.shape[-1]) == label, -jnp.inf, cheap)
    own = jnp.take_along_axis(cheap, label, axis=-1)[..., 0]
    return own - jnp.max(others, axis=-1)


def _least_of_labels(
    of_labels: Callable[..., Array], form: Form | None, *vectors: Float[Array, "*points m"]
) -> Float[Array, "*points"]:
    """The least over all labels of a data point: one along the last axis of every part."""
    if form is None:
        return of_labels(*vectors)
    axes = vectors[0].ndim - 1
    least = []
    for parts in zip(*(jax.tree.leaves(form.split(each)) for each in vectors), strict=True):
        labelled = (part[..., None] if part.ndim == axes else part for part in parts)
        found = of_labels(*labelled)
        least.append(jnp.min(found.reshape(*found.shape[:axes], -1), axis=-1))
    return jnp.min(jnp.stack(least), axis=0)


def doubt_from(
    features: Float[np.ndarray, "sets groups num_data features"],
    sure: Bool[np.ndarray, "sets groups num_data"],
    wrong: Bool[np.ndarray, "sets groups num_data"],
    form: Form | None = None,
) -> Doubt:
    """The doubt that is right about these data points, by what it looks at (`features_of_doubt`).

    Whether they are `sure`, whatever it looks at, and whether the label was wrong. Three steps, see
    `_calibration.py`."""
    from scipy.special import expit  # late: a fifth of a worker's import time

    # A data point is much the same under all sets: it counts as one in all, not as one in each.
    count = np.sum(~sure.all(axis=0)) / max(np.sum(~sure), 1)
    group = np.nonzero(~sure)[1]
    weights, fresh = regression(
        features[~sure].astype(np.float64), wrong[~sure], group, count, _RATIOS
    )
    knots, shifts = correction(fresh, wrong[~sure], count)
    logit = features @ weights
    doubt = np.where(sure, 0, expit(logit + np.interp(logit, knots, shifts)))
    levels, found, shares = risks(doubt, sure, wrong)
    numbers = (weights, knots, shifts, levels, found, shares)
    arrays: Any = (jnp.asarray(each, float) for each in numbers)
    return Doubt(*arrays, form=form)
