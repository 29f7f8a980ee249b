"""Knowing which predictions to doubt: how likely a label is not the model's own.

A decoded prediction has a standard deviation (`AbstractCode.decode`, or the surrogate's) and a
margin, by which its largest output leads the second. Their ratio ranks predictions by how sure
their label is; how sure that makes them depends on the model, and is measured: a logistic
regression on unlabelled data, coded, under straggler sets, tells the probability. Platt 1999,
"Probabilistic outputs for support vector machines". The limit below which answers are given at once
is chosen on the same data by conformal risk control (Angelopoulos et al. 2022, arXiv 2208.02814).
"""

from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, PRNGKeyArray
from scipy.optimize import minimize
from scipy.special import expit

from ._codes import AbstractCode, Decoded, decode_groups
from ._codes import deviation as deviation_of
from ._evaluation import all_answers, batched, cut_groups, own_outputs
from ._stragglers import AbstractStragglers
from ._surrogate import Surrogate, decode_with_surrogate, path_variance
from ._trial import draw_sets
from ._workers import Model

_RATIOS = (1, 2)  # the features that must not raise the doubt
_LEVELS = 512
_LEAST = 1e-30


class Doubt(eqx.Module):
    """A calibrated score of predictions, made by `calibrate_doubt`.

    `weights` are the logistic regression's. `levels` are doubts in increasing order, from 0 on, and
    `risks` the share of all data points that differ from the model's own if those with no more
    doubt are answered at once, and all others by the model itself: counted on the calibration data,
    with one more wrong one than there were. `shares` are what the model must answer itself.
    """

    weights: Float[Array, " features"]
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
        doubt = jax.nn.sigmoid(features @ self.weights.astype(features.dtype))
        doubt = jnp.where(deviation == 0, 0, doubt)
        return jnp.where(jnp.isfinite(predictions).all(axis=-1), doubt, 1)

    def limit(self, max_disagreement: float) -> float:
        """The largest doubt to answer at once, so that no more than so much disagrees in all.

        That holds in the mean over data like those of the calibration, and stragglers like theirs.
        0: nothing but the model's own answers will do.

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
    groups = cut_groups(x, code.num_data)
    run = batched(model, batch_size)
    originals = own_outputs(run, groups).reshape(*groups.shape[:2], -1)
    answers, cheap, cheap_coded = all_answers((run,), code, groups), None, None
    if surrogate is not None:
        run = batched(surrogate.model, batch_size)
        cheap = own_outputs(run, groups).reshape(*groups.shape[:2], -1)
        cheap_coded = all_answers((run,), code, groups)
    masks, _ = draw_sets(stragglers, key, code.num_workers, num_sets)
    seen = _observe(code, surrogate, masks, answers, originals, cheap, cheap_coded)
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
    variance = jax.vmap(code.posterior_variance)(decoded.heard)
    process = path_variance(code, y, decoded.heard)[:, None]
    return decoded, deviation_of(variance, process)


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
    margin = _margin(predictions)
    size = jnp.log(margin + _LEAST)
    ratio = jnp.clip(size - jnp.log(deviation + _LEAST), -10, 10)
    features = [jnp.ones_like(ratio), jnp.minimum(ratio, 0), jnp.maximum(ratio, 0), size]
    if cheap is not None:
        label = jnp.argmax(predictions, axis=-1, keepdims=True)
        others = jnp.where(jnp.arange(cheap.shape[-1]) == label, -jnp.inf, cheap)
        own = jnp.take_along_axis(cheap, label, axis=-1)[..., 0]
        lead = own - jnp.max(others, axis=-1)
        features += [jnp.sign(lead), jnp.arcsinh(lead)]
    return jnp.nan_to_num(jnp.stack(features, axis=-1))


def _margin(predictions: Float[Array, "*points m"]) -> Float[Array, "*points"]:
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
    width, points = features.shape[-1], sure[0].size
    weights = _logistic_regression(features[~sure].astype(np.float64), wrong[~sure])
    logit = features.reshape(-1, width) @ weights
    doubt = np.where(sure.ravel(), 0, expit(logit))
    order = np.argsort(doubt, kind="stable")
    doubt, wrong = doubt[order], wrong.ravel()[order]
    known = int(np.sum(sure))
    # Beyond the sure ones, every so many a level: the last of those with the same doubt.
    places = np.linspace(known - 1, doubt.size - 1, _LEVELS).round().astype(int)
    places = np.searchsorted(doubt, doubt[places], side="right") - 1
    levels = np.concatenate([[0.0], doubt[places[places >= known]]])
    counts = np.searchsorted(doubt, levels, side="right")
    total = np.concatenate([[0], np.cumsum(wrong)])[counts] / len(sure)
    extra = np.where(counts > known, 1, 0)  # a sure one is not a guess
    return Doubt(
        weights=jnp.asarray(weights, float),
        levels=jnp.asarray(levels, float),
        risks=jnp.asarray((total + extra) / (points + extra), float),
        shares=jnp.asarray(1 - counts / doubt.size, float),
    )


def _logistic_regression(
    features: Float[np.ndarray, "samples features"], wrong: Bool[np.ndarray, " samples"]
) -> Float[np.ndarray, " features"]:
    """The most likely weights, of standardised features with a unit ridge, the constant's free.

    Those of the ratio are negative or zero. Half a wrong and half a right one are added at the
    mean, so that there is a result where none was wrong, or all were.
    """
    if len(features) == 0:
        return np.zeros(features.shape[1])
    mean, scale = features.mean(axis=0), features.std(axis=0)
    scale = np.where(scale > 1e-6, scale, 1)
    mean[0], scale[0] = 0, 1
    z = np.concatenate([(features - mean) / scale, np.eye(1, features.shape[1])])
    target = np.append(wrong.astype(float), 0.5)

    def loss(weights):
        logit = z @ weights
        likelihood = np.sum(np.logaddexp(0, logit) - target * logit)
        slope = z.T @ (expit(logit) - target)
        slope[1:] += weights[1:]
        return likelihood + np.sum(weights[1:] ** 2) / 2, slope

    bounds = [(None, 0) if place in _RATIOS else (None, None) for place in range(z.shape[1])]
    found = minimize(
        loss, np.zeros(z.shape[1]), jac=True, bounds=bounds, options={"ftol": 1e-14, "gtol": 1e-8}
    )
    weights = found.x / scale
    weights[0] -= weights[1:] @ mean[1:]
    return weights
