"""Calibration of error probabilities and error bars; schemes made of past answers."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Bool, Float, PRNGKeyArray, PyTree, Shaped

from ..codes import AbstractCode, Decoded
from ..codes._checks import check_count
from ..codes._kept import CachedMatrices, known_encoder
from ..codes._trees import Form, join, points_of, to_device
from ..evaluation import record_answers
from ..evaluation._answers import cut_groups
from ..evaluation._criteria import root_mean_square
from ..evaluation._objective import draw_sets
from ..inference import cast_model
from ..inference.models import Model, call_model, check_model, current_conditions, run_workers
from ..risk import ErrorBars, ErrorProbability
from ..risk._error_bars import error_bars_from_ratios
from ..risk._error_probability import (
    ObservedErrors,
    check_labels,
    error_probability_from_answers,
    error_probability_of_predictions,
    error_probability_of_sets,
    observe_errors,
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
        own = eqx.filter_jit(call_model)(model, x)
        check_labels(join(own, 1)[1])
        seen, form = _observe(workers, code, x, own, masks)
        return error_probability_of_sets(seen, form, current_conditions(worker_dtype))
    options: Any = {"batch_size": batch_size}
    own, prior = record_answers(model, code, x, worker_dtype=worker_dtype, **options), None
    if surrogate is not None:
        prior = group_prior_of_points(surrogate, code, x, **options)
        check_like(prior.form, own.form)
    return error_probability_from_answers(own, stragglers, key, num_sets, surrogate, prior)


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
    seen, _ = _observe(workers, scheme, x, eqx.filter_jit(call_model)(served, x), masks)
    return error_bars_from_ratios(np.asarray(seen.ratio), current_conditions(worker_dtype))


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
        ratios.append(np.ravel(_observe(workers, summary, rows, own, masks)[0].ratio))
    return error_bars_from_ratios(np.concatenate(ratios), current_conditions(None))


class _DecodeScheme(eqx.Module):
    """Decodes a scheme's groups as they were sent, as `observe_errors` asks for."""

    scheme: Scheme
    x: PyTree
    prepared: PreparedInputs
    y: PyTree
    encoder: ArrayLike | None

    def __call__(
        self, available: Bool[Array, "groups num_workers"]
    ) -> tuple[Decoded, Array, Array | None]:
        known = CachedMatrices(self.encoder)
        return self.scheme.decode_sent(self.x, self.prepared, self.y, available, known)[0]


def _observe(
    workers: Any, scheme: Scheme, x: PyTree, own: PyTree, masks: Bool[Array, "sets num_workers"]
) -> tuple[ObservedErrors, Form]:
    """Return the errors of a scheme's predictions under each set, and the outputs' form."""
    # Three programs: the model's is the same for all schemes that send alike shapes.
    encoder = known_encoder(scheme.code)
    prepared, coded = eqx.filter_jit(scheme.encode)(x, encoder)
    y = eqx.filter_jit(run_workers)(workers, scheme.code, coded)
    vectors, form = join(scheme.groups(own, prepared), 2)
    decode = _DecodeScheme(scheme, x, prepared, y, encoder)
    return observe_errors(decode, vectors, form, masks), form


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
        error_probability = error_probability_of_predictions(mean, deviation, own)
    scheme = Scheme(
        code,
        surrogate=learner.update(x[held], y[held]),
        bars=bars,
        error_probability=error_probability,
        redundancy="uncertain",
    )
    return FittedScheme(scheme, len(x))
