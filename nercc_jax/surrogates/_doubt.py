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

from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray
from scipy.optimize import isotonic_regression, root_scalar
from scipy.special import expit
from scipy.special import logit as logit_of

from ..codes import AbstractCode, Decoded, decode_groups, variances
from ..codes import deviation as deviation_of
from ..evaluation import Forecast, draw_sets, make_forecast
from ..inference import Model
from ..stragglers import AbstractStragglers
from ._logistic import logistic_regression
from ._surrogate import Surrogate, decode_with_surrogate

_RATIOS = (1, 2)  # the features that must not raise the doubt
_LEVELS = 512
_LEAST = 1e-30
_FOLDS = 5  # parts of the groups, for what they tell of each other
_LEAST_SCALE = 0.1  # that is left of the regression's log-odds
_FAR = 1000.0  # in log-odds
# Bins of the correction, at most, and wrong labels that are expected in each, at least.
_BINS, _EXPECTED = 32, 10
_SUREST = 1 - 1e-6  # that something is wrong
_SLOPE = 0.05  # of the regression's log-odds, left where bins are alike
_DIGITS = 3  # of log-odds
_ROUNDING = 1e-5  # of doubts, which float32 and another program round otherwise
# Standard errors by which a risk may be more than what was counted.
_ERRORS = 2.0


class Doubt(eqx.Module):
    """A calibrated score of predictions, made by `calibrate_doubt`.

    `weights` are the logistic regression's, and `shifts` what is added to its log-odds, at `knots`
    and linearly between. `levels` are doubts in increasing order, from 0 on, and `risks` the share
    of all data points that differ from the model's own if those with no more doubt are answered at
    once, and all others by the model itself: counted on the calibration data, with one more wrong
    one than there were, and two standard errors more. `shares` are what the model must answer
    itself.
    """

    weights: Float[Array, " features"]
    knots: Float[Array, " bins"]
    shifts: Float[Array, " bins"]
    levels: Float[Array, " levels"]
    risks: Float[Array, " levels"]
    shares: Float[Array, " levels"]

    def __call__(
        self,
        predictions: Float[Array, "*points m"],
        deviation: Float[Array, "*points"],
        cheap: Float[Array, "*points m"] | None = None,
    ) -> Float[Array, "*points"]:
        """The probability that a label is not the model's own, for data points of any shape.

        0 where a prediction is a worker's answer to the data point itself, 1 where it is not
        finite. `cheap` are the surrogate's outputs, if it was calibrated with one.

        Raises: ValueError where `cheap` is missing, or is not wanted.
        """
        features = _features(predictions, deviation, cheap)
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


def calibrate_doubt(
    model: Model,
    code: AbstractCode,
    x: Float[ArrayLike, "points ..."],
    stragglers: Mapping[str, AbstractStragglers],
    *,
    key: PRNGKeyArray,
    surrogate: Surrogate | None = None,
    num_sets: int = 100,
    batch_size: int = 256,
) -> Doubt:
    """Measures, on unlabelled data points, how likely labels of decoded predictions are wrong.

    x: data points as they will come, in groups of K (if queries are put in order before they are
    coded, so must these be; and those that the code or the surrogate was tuned on will promise too
    much). All groups meet all laws' straggler sets, `num_sets` a law. A thousand data points tell
    disagreement down to 0.1 %.

    Raises: ValueError as `evaluate` does for the data, for a code that is no regression, and
    without stragglers.
    """
    if not stragglers:
        raise ValueError("there are no stragglers to calibrate the doubt under")
    own, beside = make_forecast(model, code, x, batch_size=batch_size), None
    if surrogate is not None:
        beside = make_forecast(surrogate.model, code, x, batch_size=batch_size)
    return doubt_of(own, stragglers, key, num_sets, surrogate, beside)


def doubt_of(
    own: Forecast,
    stragglers: Mapping[str, AbstractStragglers],
    key: PRNGKeyArray,
    num_sets: int,
    surrogate: Surrogate | None = None,
    beside: Forecast | None = None,
) -> Doubt:
    """`calibrate_doubt` on answers that are known: the model's, and beside them the surrogate's."""
    code = own.code
    cheap, cheap_coded = (None, None) if beside is None else (beside.originals, beside.answers)
    masks, _ = draw_sets(stragglers, key, code.num_workers, num_sets)
    seen = _observe(code, surrogate, masks, own.answers, own.originals, cheap, cheap_coded)
    return _calibrate(*map(np.asarray, seen))


def assess(
    code: AbstractCode,
    surrogate: Surrogate | None,
    y: Float[Array, "groups num_workers m"],
    available: Bool[Array, "groups num_workers"],
    cheap: Float[Array, "groups num_data m"] | None = None,
    cheap_coded: Float[Array, "groups num_workers m"] | None = None,
) -> tuple[Decoded, Float[Array, "groups num_data"]]:
    """Predictions of groups and their standard deviations, with a surrogate or without."""
    if surrogate is not None:
        assert cheap is not None
        assert cheap_coded is not None
        return decode_with_surrogate(code, surrogate, y, available, cheap, cheap_coded)
    decoded = decode_groups(code, y, available)
    return decoded, deviation_of(*variances(code, y, decoded.heard))


@eqx.filter_jit
def _observe(
    code: AbstractCode,
    surrogate: Surrogate | None,
    masks: Bool[Array, "sets num_workers"],
    answers: Float[Array, "groups num_workers m"],
    originals: Float[Array, "groups num_data m"],
    cheap: Float[Array, "groups num_data m"] | None,
    cheap_coded: Float[Array, "groups num_workers m"] | None,
) -> tuple[Array, Array, Array]:
    """Each data point under each set: its features, whether it is sure, and whether it is wrong."""

    def of_set(mask):
        available = jnp.broadcast_to(mask, answers.shape[:2])
        decoded, deviation = assess(code, surrogate, answers, available, cheap, cheap_coded)
        wrong = jnp.argmax(decoded.predictions, axis=-1) != jnp.argmax(originals, axis=-1)
        features = _features(decoded.predictions, deviation, cheap)
        return features, deviation == 0, wrong | ~decoded.recovered

    return jax.lax.map(of_set, masks)


def _features(
    predictions: Float[Array, "*points m"],
    deviation: Float[Array, "*points"],
    cheap: Float[Array, "*points m"] | None,
) -> Float[Array, "*points features"]:
    """What the logistic regression looks at, the constant first.

    The ratio of margin and deviation, in logarithms since either may be of any size: above and
    below one it counts differently, but never for more doubt. Then the margin's size; and of the
    surrogate, whether it is for the same label, and how far.
    """
    size = jnp.log(margin(predictions) + _LEAST)
    ratio = jnp.clip(size - jnp.log(deviation + _LEAST), -10, 10)
    features = [jnp.ones_like(ratio), jnp.minimum(ratio, 0), jnp.maximum(ratio, 0), size]
    if cheap is not None:
        label = jnp.argmax(predictions, axis=-1, keepdims=True)
        others = jnp.where(jnp.arange(cheap.shape[-1]) == label, -jnp.inf, cheap)
        own = jnp.take_along_axis(cheap, label, axis=-1)[..., 0]
        lead = own - jnp.max(others, axis=-1)
        features += [jnp.sign(lead), jnp.arcsinh(lead)]
    return jnp.nan_to_num(jnp.stack(features, axis=-1))


def margin(predictions: Float[Array, "*points m"]) -> Float[Array, "*points"]:
    """By how much the largest output leads the second; of a single output, how large it is."""
    if predictions.shape[-1] == 1:
        return jnp.abs(predictions[..., 0])
    first, second = jnp.moveaxis(jax.lax.top_k(predictions, 2)[0], -1, 0)
    return first - second


def _calibrate(
    features: Float[np.ndarray, "sets groups num_data features"],
    sure: Bool[np.ndarray, "sets groups num_data"],
    wrong: Bool[np.ndarray, "sets groups num_data"],
) -> Doubt:
    # A data point is much the same under all sets: it counts as one in all, not as one in each.
    count = np.sum(~sure.all(axis=0)) / max(np.sum(~sure), 1)
    group = np.nonzero(~sure)[1]
    weights, fresh = _regression(features[~sure].astype(np.float64), wrong[~sure], group, count)
    knots, shifts = _correction(fresh, wrong[~sure], count)
    logit = features @ weights
    doubt = np.where(sure, 0, expit(logit + np.interp(logit, knots, shifts)))
    order = np.sort(doubt, axis=None)
    known = int(np.sum(sure))
    # Beyond the sure ones, every so many a level, above all that are the same but for rounding.
    places = np.linspace(known, doubt.size - 1, _LEVELS).round().astype(int)
    above = np.minimum(order[places[places < doubt.size]] * (1 + _ROUNDING), _SUREST)
    levels = np.concatenate([[0.0], above])
    counts = np.searchsorted(order, levels, side="right")
    return Doubt(
        weights=jnp.asarray(weights, float),
        knots=jnp.asarray(knots, float),
        shifts=jnp.asarray(shifts, float),
        levels=jnp.asarray(levels, float),
        risks=jnp.asarray(_risks(doubt, wrong, levels, counts > known), float),
        shares=jnp.asarray(1 - counts / doubt.size, float),
    )


def _regression(
    features: Float[np.ndarray, "samples features"],
    wrong: Bool[np.ndarray, " samples"],
    group: Int[np.ndarray, " samples"],
    count: float,
) -> tuple[Float[np.ndarray, " features"], Float[np.ndarray, " samples"]]:
    """The regression's weights, and each sample's log-odds by what other groups tell.

    A regression on few is too sure of itself on others. How much so is seen where it is made
    without a part of the groups, and the log-odds are scaled by that (van Houwelingen and Le Cessie
    1990, "Predictive value of statistical models").
    """
    weights = logistic_regression(features, wrong, _RATIOS, count)
    logit = features @ weights
    for fold in range(_FOLDS):
        part = group % _FOLDS == fold
        if not part.all():
            others = logistic_regression(features[~part], wrong[~part], _RATIOS, count)
            logit[part] = features[part] @ others
    shift, scale = logistic_regression(np.stack([np.ones_like(logit), logit], axis=-1), wrong)
    if len(wrong) and scale < _LEAST_SCALE:
        # It tells hardly anything: some order is left, and the mean.
        scale = _LEAST_SCALE
        mean = (np.sum(wrong) + 0.5) / (len(wrong) + 1)
        found = root_scalar(
            lambda shift: np.mean(expit(scale * logit + shift)) - mean, bracket=(-_FAR, _FAR)
        )
        shift = found.root
    return scale * weights + shift * np.eye(1, len(weights))[0], scale * logit + shift


def _correction(
    logit: Float[np.ndarray, " samples"], wrong: Bool[np.ndarray, " samples"], count: float
) -> tuple[Float[np.ndarray, " bins"], Float[np.ndarray, " bins"]]:
    """What to add to log-odds, where: so that as many are wrong as are said to be, bin by bin.

    In each bin of the log-odds as many wrong ones are expected; each sample counts as `count`. Bins
    in which fewer are wrong than in one below are given the share of both, but for a slope that
    hardly matters: the order stays. There are always `_BINS` places, the last one several times.
    """
    # Those that are alike are in one bin, so that knots are never too close together.
    logit = np.round(logit, _DIGITS)
    order = np.argsort(logit, kind="stable")
    logit, wrong = logit[order], wrong[order]
    expected = expit(logit)
    total = float(np.sum(expected))
    number = int(np.clip(count * total / _EXPECTED, 1, _BINS))
    place = np.minimum(np.cumsum(expected) / max(total, _LEAST) * number, number - 1).astype(int)
    place = place[np.searchsorted(logit, logit)]
    counts = np.bincount(place, minlength=number)
    sums = [np.bincount(place, each, minlength=number) for each in (expected, wrong)]
    counts, expected, seen = (each[counts > 0] for each in (counts, *sums))
    if counts.size == 0:
        return np.zeros(_BINS), np.zeros(_BINS)
    # One more is expected, and seen: it weighs where there are hardly any.
    more = (count * seen + 1) / (count * expected + 1)
    share = np.minimum(more * expected / counts, _SUREST)
    share = isotonic_regression(share, weights=counts).x
    knots = logit_of(np.clip(expected / counts, _LEAST, _SUREST))
    shifts = (1 - _SLOPE) * (logit_of(share) - knots)
    fill = _BINS - len(knots)
    return np.append(knots, knots[-1] + 1 + np.arange(fill)), np.pad(shifts, (0, fill), "edge")


def _risks(
    doubt: Float[np.ndarray, "sets groups num_data"],
    wrong: Bool[np.ndarray, "sets groups num_data"],
    levels: Float[np.ndarray, " levels"],
    guesses: Bool[np.ndarray, " levels"],
) -> Float[np.ndarray, " levels"]:
    """An upper bound of the share that is wrong and has no more doubt than each level.

    Groups are independent of each other, and straggler sets are; what is counted of one group under
    all sets, and of one set in all groups, is not. `guesses` are levels with more than what is sure
    below them: of those, one more is counted than was wrong.
    """
    sets, groups, _ = wrong.shape
    of_set, of_group, _ = np.nonzero(wrong)
    level = np.searchsorted(levels, doubt[wrong])
    error = np.zeros(len(levels))
    for owner, number in ((of_set, sets), (of_group, groups)):
        counts = np.zeros((len(levels) + 1, number))
        np.add.at(counts, (level, owner), number / wrong.size)
        means = np.cumsum(counts[:-1], axis=0)
        error += np.var(means, axis=1) / number
    points = wrong.size / sets
    total = np.cumsum(np.bincount(level, minlength=len(levels) + 1))[:-1] / sets
    counted = (total + guesses) / (points + guesses)
    return np.minimum(np.maximum.accumulate(counted + _ERRORS * np.sqrt(error)), 1)
