"""Calibration of error probabilities and error bars; schemes made of past answers."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Bool, Float, PRNGKeyArray, PyTree, Shaped

from ..codes import AbstractCode
from ..codes._checks import check_count
from ..codes._kept import CachedMatrices, known_encoder
from ..codes._trees import Form, join, points_of, to_device
from ..evaluation import record_answers
from ..evaluation._answers import cut_groups
from ..evaluation._criteria import agree_on_labels, root_mean_square, row_errors
from ..evaluation._objective import draw_sets
from ..inference import cast_model
from ..inference.models import Model, call_model, check_model, current_conditions, run_workers
from ..risk import ErrorBars, ErrorProbability
from ..risk._error_bars import error_bars_from_ratios
from ..risk._error_probability import (
    check_labels,
    error_features,
    error_probability_from_answers,
    fit_error_probability,
    fit_error_probability_of_predictions,
)
from ..stragglers import AbstractStragglers
from ..surrogates import AbstractSurrogate, LearnerTuning, init_learner, tune_learner
from ..surrogates.interface import check_like
from ..surrogates.kernel import Shape, features_of, first_kernel, length_of
from ..surrogates.surrogate import group_prior_of_points
from ._scheme import PreparedInputs, Scheme

SHAPE: Shape = "squared_exponential"  # to start from


def calibrate_error_probability(
    model: Model,
    code: AbstractCode | Scheme,
    x: PyTree[Shaped[ArrayLike, "points ..."]],
    stragglers: Mapping[str, AbstractStragglers],
    *,
    key: PRNGKeyArray,
    surrogate: AbstractSurrogate | None = None,
    num_sets: int = 100,
    batch_size: int = 256,
    worker_dtype: DTypeLike | None = None,
) -> ErrorProbability:
    """Measure, on unlabelled data points, how likely labels of decoded predictions are wrong.

    All groups meet the straggler sets of all laws. A thousand data points resolve a disagreement of
    0.1 %.

    Args:
        model: The served model, a function of a batch.
        code: A code, or a scheme, which is run as it will be: with its order, its surrogate, its
            regression points and copies.
        x: Data points as they will come, whole groups of K. For a code they are in the order in
            which they are coded; for a scheme in any. Data that the code or the surrogate was tuned
            on give probabilities that are too small.
        stragglers: Named laws that straggler sets are drawn from.
        key: Random key of the draws.
        surrogate: The surrogate that a code's predictions are decoded with. A scheme has its own.
        num_sets: Straggler sets for each law.
        batch_size: The most data points in a call of the model, where `code` is a code.
        worker_dtype: The dtype that the workers compute in. Their answers then differ by rounding
            from the model's own, which are what predictions are compared with.

    Raises:
        ValueError: There are no stragglers, the data are not what `evaluate` accepts, the model
            returns one number a row, which has no label, the code is no regression, a surrogate is
            given with a scheme, or `worker_dtype` is no float.
    """
    if not stragglers:
        raise ValueError("there are no stragglers to calibrate the error probability under")
    if isinstance(code, Scheme):
        if surrogate is not None:
            raise ValueError("a scheme has its own surrogate: Scheme(code, surrogate=...)")
        check_model(model)
        x = to_device(points_of(cut_groups(x, code.code.num_data)))
        masks, _ = draw_sets(stragglers, key, code.code.num_workers, num_sets)
        workers = cast_model(model, worker_dtype)
        form, seen = _observe_errors(model, workers, code, x, masks, known_encoder(code.code))
        check_labels(form)
        features, sure, wrong = map(np.asarray, seen)
        conditions = current_conditions(worker_dtype)
        return fit_error_probability(features, sure, wrong, form, conditions)
    options: Any = {"batch_size": batch_size}
    own, prior = record_answers(model, code, x, worker_dtype=worker_dtype, **options), None
    if surrogate is not None:
        prior = group_prior_of_points(surrogate, code, x, **options)
        check_like(prior.form, own.form)
    return error_probability_from_answers(own, stragglers, key, num_sets, surrogate, prior)


@eqx.filter_jit
def _observe_errors(
    model: Model,
    workers: Any,
    scheme: Scheme,
    x: PyTree,
    masks: Bool[Array, "sets num_workers"],
    encoder: ArrayLike | None,
) -> tuple[Form, tuple[Array, Array, Array]]:
    """Return the outputs' form, and what `risk.observe_errors` does, of a scheme."""
    prepared, coded = scheme.encode(x, encoder)
    y = run_workers(workers, scheme.code, coded)
    own, form = join(scheme.groups(call_model(model, x), prepared), 2)

    def of_set(mask: Array) -> tuple[Array, Array, Array]:
        available = jnp.broadcast_to(mask, (len(own), len(mask)))
        judged = scheme.decode_sent(x, prepared, y, available, CachedMatrices(encoder))
        decoded, deviation = judged.decoded, judged.deviation
        vectors = None if form.is_vector else form
        features = error_features(decoded.predictions, deviation, judged.cheap, vectors)
        same = agree_on_labels(decoded.predictions, own, form)
        return features, deviation == 0, ~same | ~decoded.recovered

    return form, jax.lax.map(of_set, masks)


def calibrate_error_bars(
    model: Model | Sequence[Model],
    scheme: Scheme | AbstractCode,
    x: PyTree[Shaped[ArrayLike, "points ..."]],
    stragglers: Mapping[str, AbstractStragglers],
    *,
    key: PRNGKeyArray,
    num_sets: int = 20,
    worker_dtype: DTypeLike | None = None,
) -> ErrorBars:
    """Measure, on unlabelled data points, errors of decoded outputs in units of their deviations.

    All groups meet the straggler sets of all laws; each is answered once. For a learner,
    `calibrate_learner_bars` and `cross_validate_error_bars` need no further data.

    Args:
        model: The served model, or one for each worker, the served one first.
        scheme: A scheme or a code.
        x: Data points as they will come. A learner must not have learned from them, and nothing may
            have been tuned on them.
        stragglers: Named laws that straggler sets are drawn from.
        key: Random key of the draws.
        num_sets: Straggler sets for each law.
        worker_dtype: The dtype that the workers compute in.

    Raises:
        ValueError: There are no stragglers, x fills no group or is not finite floats, the code is
            no regression, or every prediction is exact.
    """
    if not stragglers:
        raise ValueError("there are no stragglers to calibrate the error bars under")
    scheme = Scheme(scheme) if isinstance(scheme, AbstractCode) else scheme
    x = to_device(points_of(cut_groups(x, scheme.code.num_data)))
    masks, _ = draw_sets(stragglers, key, scheme.code.num_workers, num_sets)
    served = model if callable(model) else model[0]
    workers = cast_model(model if callable(model) else tuple(model), worker_dtype)
    ratios = _ratios(workers, scheme, x, eqx.filter_jit(call_model)(served, x), masks)
    return error_bars_from_ratios(np.asarray(ratios), current_conditions(worker_dtype))


def cross_validate_error_bars(
    model: Model | Sequence[Model],
    scheme: Scheme,
    x: PyTree[Shaped[ArrayLike, "pairs ..."]],
    y: PyTree[Float[ArrayLike, "pairs ..."]],
    stragglers: Mapping[str, AbstractStragglers],
    fit: Callable[[PyTree, PyTree], AbstractSurrogate],
    *,
    key: PRNGKeyArray,
    num_sets: int = 20,
    folds: int = 10,
) -> ErrorBars:
    """Calibrate the error bars of a scheme with a learner on the pairs that taught it.

    Decoding with a group's own answers, and copies of uncertain data points, change the ratios of
    errors to deviations that `calibrate_learner_bars` measures. So the pairs are cut into groups of
    K, and these into folds. For each fold `fit(x, y)` makes a learner of all pairs of other inputs,
    and the scheme with that learner decodes the fold's groups. The model runs on the groups' coded
    data points: N - K queries a group or more, none where they are copies.

    Args:
        model: The served model, or one for each worker, the served one first.
        scheme: A scheme with a learner.
        x: Inputs of the pairs, in the order in which the scheme will send them.
        y: Answers of the pairs.
        stragglers: Named laws that straggler sets are drawn from.
        fit: Makes a learner of pairs.
        key: Random key of the draws.
        num_sets: Straggler sets for each law.
        folds: The number of folds, 2 or more.

    Raises:
        ValueError: As `calibrate_error_bars`; and there are fewer than two groups or folds.
    """
    if not stragglers:
        raise ValueError("there are no stragglers to calibrate the error bars under")
    x, y = to_device((x, y))
    size = scheme.code.num_data
    groups = len(jax.tree.leaves(cut_groups(x, size))[0])
    folds = min(check_count("folds", folds, 2), groups)
    if folds < 2:
        raise ValueError(
            f"one group of {size} cannot be calibrated on others: give two groups at least"
        )
    masks, _ = draw_sets(stragglers, key, scheme.code.num_workers, num_sets)
    workers = model if callable(model) else tuple(model)
    z, ratios = np.asarray(features_of(None, x)), []
    same = first_kernel(SHAPE, z).same(z, z)
    for part in np.array_split(np.arange(groups), folds):
        held = np.concatenate([np.arange(size) + size * group for group in part])
        others = np.setdiff1d(np.arange(length_of("y", y)), held)
        others = others[~same[np.ix_(others, held)].any(axis=1)]
        fitted = fit(*jax.tree.map(lambda leaf: leaf[others], (x, y)))  # noqa: B023
        if scheme.surrogate is not None:
            numbers = scheme.surrogate.theta, scheme.surrogate.kappa
            fitted = eqx.tree_at(lambda one: (one.theta, one.kappa), fitted, numbers)
        summary = eqx.tree_at(
            lambda one: one.surrogate, scheme, fitted, is_leaf=lambda n: n is None
        )
        rows, own = jax.tree.map(lambda leaf: leaf[held], (x, y))  # noqa: B023
        ratios.append(np.ravel(_ratios(workers, summary, rows, own, masks)))
    return error_bars_from_ratios(np.concatenate(ratios), current_conditions(None))


def _ratios(
    workers: Any,
    scheme: Scheme,
    x: PyTree,
    own: PyTree,
    masks: Bool[Array, "sets num_workers"],
) -> Float[Array, "sets points"]:
    """Return errors over deviations; NaN where a prediction is exact, lost, or has no deviation."""
    # Three programs: the model's is the same for all schemes that send alike shapes.
    encoder = known_encoder(scheme.code)
    prepared, coded = eqx.filter_jit(scheme.encode)(x, encoder)
    y = eqx.filter_jit(run_workers)(workers, scheme.code, coded)
    return _judged(scheme, x, prepared, y, own, masks, encoder)


@eqx.filter_jit
def _judged(
    scheme: Scheme,
    x: PyTree,
    prepared: PreparedInputs,
    y: PyTree,
    own: PyTree,
    masks: Bool[Array, "sets num_workers"],
    encoder: ArrayLike | None,
) -> Float[Array, "sets points"]:
    groups = len(jax.tree.leaves(y)[0])

    def of_set(mask):
        available = jnp.broadcast_to(mask, (groups, len(mask)))
        assessed = scheme.decode(x, prepared, y, available, CachedMatrices(encoder))
        error, deviation = row_errors(assessed.decoded.predictions, own), assessed.deviation
        counts = (deviation > 0) & jnp.isfinite(deviation) & assessed.decoded.recovered
        return jnp.where(counts, error / jnp.where(counts, deviation, 1), jnp.nan)

    return jax.lax.map(of_set, masks)


@dataclasses.dataclass(frozen=True)
class FittedScheme:
    """A scheme with a learner, calibrated on pairs that it had not learned from.

    Attributes:
        scheme: The scheme.
        pairs: The number of pairs that its learner knows now, the held-out ones included.
    """

    scheme: Scheme
    pairs: int


def fit_scheme(
    x: Float[np.ndarray, "pairs features"],
    y: Float[np.ndarray, "pairs outputs"],
    code: AbstractCode,
    *,
    capacity: int = 1024,
    labels: bool = False,
    tuning: LearnerTuning | None = None,
) -> FittedScheme:
    """Fit a learner to three quarters of the pairs, and calibrate it on the others.

    Every fourth input is held out, with all answers to it, 256 at most, so nothing should change
    along the pairs' order.
    Afterwards the learner learns the held-out pairs, too. Redundant workers get copies of uncertain
    data points.

    Args:
        x: Inputs.
        y: The function's outputs.
        code: The code of the scheme.
        capacity: The most pairs that the learner holds.
        labels: Whether the largest output is a label, so that the scheme needs an error
            probability.
        tuning: How the kernel is tuned (`tune_learner`). Default: on 128 pairs, with one width for
            all features where there are more than 32.

    Raises:
        ValueError: There are fewer than 16 pairs, or the function is constant, so that nothing can
            be calibrated.
    """
    check_count("pairs", len(x), 16)
    first = np.argmax(first_kernel(SHAPE, x).same(x, x), axis=1)
    held = np.isin(first, np.unique(first)[3::4][:256])
    if tuning is None:
        tuning = LearnerTuning(rows=128)  # the time grows with the cube of that
    learner = init_learner(x[~held], y[~held], capacity=capacity, kernel=SHAPE)
    learner = tune_learner(learner, tuning)
    own = y[held].astype(np.float32)
    mean, deviation = learner.predict(x[held])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = root_mean_square(mean - own, axis=1) / deviation
    bars: ErrorBars = error_bars_from_ratios(np.where(np.isfinite(deviation), ratios, np.nan))
    error_probability = None
    if labels:
        error_probability = fit_error_probability_of_predictions(mean, deviation, own)
    scheme = Scheme(
        code,
        surrogate=learner.update(x[held], y[held]),
        bars=bars,
        error_probability=error_probability,
        redundancy="uncertain",
    )
    return FittedScheme(scheme, len(x))
