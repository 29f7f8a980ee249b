"""The error probability and the error bars of a code or a scheme, measured as it is used."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Bool, Float, PRNGKeyArray, PyTree, Shaped

from ..codes import AbstractCode, Form, Known, check_count, join, known_encoder, points_of
from ..evaluation import cut_groups, draw_sets, labels_of, record_answers, row_errors, same_labels
from ..inference import Model, cast_model, check_model, current_conditions, run_workers
from ..risk import Doubt, ErrorBars, bars_from, doubt_from, doubt_of, features_of_doubt
from ..stragglers import AbstractStragglers
from ..surrogates import AbstractSurrogate, expect_points
from ..surrogates._interface import check_like
from ..surrogates._window import length_of
from ._scheme import Prepared, Scheme


def calibrate_doubt(
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
) -> Doubt:
    """Measures, on unlabelled data points, how likely labels of decoded predictions are wrong.

    x: data points as they will come, in groups of K (if queries are put in order before they are
    coded, so must these be; and those that the code or the surrogate was tuned on will promise too
    much). All groups meet all laws' straggler sets, `num_sets` a law. A thousand data points tell
    disagreement down to 0.1 %.

    A `Scheme` in the code's place is carried out as it will be, all groups at once: its order, its
    surrogate, points that follow the data, copies of what is doubtful. Then x comes in no order.

    `worker_dtype` as workers will have it: their answers then differ from the model's own, which
    they are compared with, by rounding, too, even where a prediction is an answer itself.

    Raises: ValueError as `evaluate` does for the data, for a code that is no regression, without
    stragglers, for a surrogate beside a scheme, and for a `worker_dtype` that is none.
    """
    if not stragglers:
        raise ValueError("there are no stragglers to calibrate the doubt under")
    if isinstance(code, Scheme):
        if surrogate is not None:
            raise ValueError("a scheme has its own surrogate: Scheme(code, surrogate=...)")
        return _of_scheme(model, code, x, stragglers, key, num_sets, worker_dtype)
    options: Any = {"batch_size": batch_size}
    own, beside = record_answers(model, code, x, worker_dtype=worker_dtype, **options), None
    if surrogate is not None:
        beside = expect_points(surrogate, code, x, **options)
        check_like(beside.form, own.form)
    return doubt_of(own, stragglers, key, num_sets, surrogate, beside)


def _of_scheme(
    model: Model,
    scheme: Scheme,
    x: PyTree,
    stragglers: Mapping[str, AbstractStragglers],
    key: PRNGKeyArray,
    num_sets: int,
    worker_dtype: DTypeLike | None,
) -> Doubt:
    check_model(model)
    x = jax.tree.map(jnp.asarray, points_of(cut_groups(x, scheme.code.num_data)))
    masks, _ = draw_sets(stragglers, key, scheme.code.num_workers, num_sets)
    workers = cast_model(model, worker_dtype)
    form, seen = _observe(model, workers, scheme, x, masks, known_encoder(scheme.code))
    features, sure, wrong = map(np.asarray, seen)
    doubt = doubt_from(features, sure, wrong, None if form.is_vector else form)
    return dataclasses.replace(doubt, conditions=current_conditions(worker_dtype))


@eqx.filter_jit
def _observe(
    model: Model,
    workers: Any,
    scheme: Scheme,
    x: PyTree,
    masks: Bool[Array, "sets num_workers"],
    encoder: ArrayLike | None,
) -> tuple[Form, tuple[Array, Array, Array]]:
    """As `observe`, of a scheme as it is carried out, and the outputs' form."""
    prepared, coded = scheme.send(x, encoder)
    y = run_workers(workers, scheme.code, coded)
    own, form = join(scheme.groups(model(x), prepared), 2)
    wanted = labels_of(form.split(own), 2)

    def of_set(mask: Array) -> tuple[Array, Array, Array]:
        available = jnp.broadcast_to(mask, (len(own), len(mask)))
        judged = scheme.judge(x, prepared, y, available, Known(encoder))
        decoded, deviation = judged.decoded, judged.deviation
        vectors = None if form.is_vector else form
        features = features_of_doubt(decoded.predictions, deviation, judged.cheap, vectors)
        same = same_labels(labels_of(form.split(decoded.predictions), 2), wanted, 2)
        return features, deviation == 0, ~same | ~decoded.recovered

    return form, jax.lax.map(of_set, masks)


def calibrate_bars(
    model: Model | Sequence[Model],
    scheme: Scheme | AbstractCode,
    x: PyTree[Shaped[ArrayLike, "points ..."]],
    stragglers: Mapping[str, AbstractStragglers],
    *,
    key: PRNGKeyArray,
    num_sets: int = 20,
    worker_dtype: DTypeLike | None = None,
) -> ErrorBars:
    """Measures, on unlabelled data points, how far decoded outputs are off by their deviations.

    x: data points as they will come; a learner must not have learned from them, nor anything be
    tuned on them. All groups meet all laws' straggler sets, `num_sets` a law, each answered once.
    Of a learner, `bars_of` and `bars_of_scheme` need no further data.

    Raises: ValueError without stragglers, where x fills no group, is no floats or not finite, for a
    code that is no regression, and where under all straggler sets all is exact.
    """
    if not stragglers:
        raise ValueError("there are no stragglers to calibrate the error bars under")
    scheme = Scheme(scheme) if isinstance(scheme, AbstractCode) else scheme
    x = jax.tree.map(jnp.asarray, points_of(cut_groups(x, scheme.code.num_data)))
    masks, _ = draw_sets(stragglers, key, scheme.code.num_workers, num_sets)
    served = model if callable(model) else model[0]
    workers = cast_model(model if callable(model) else tuple(model), worker_dtype)
    ratios = _ratios(workers, scheme, x, _served(served, x), masks)
    return bars_from(np.asarray(ratios), current_conditions(worker_dtype))


def bars_of_scheme(
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
    """The error bars of a scheme with a learner, by the very pairs that taught it.

    What is decoded with a group's own answers, and what is left when the most doubtful are copied,
    has other errors by its deviations than what a learner says by itself, which is what `bars_of`
    goes by. So the pairs are cut into groups of K, in the order given (as the scheme will send
    them), these into `folds`; for each fold `fit(x, y)` makes a learner of all other pairs, and the
    scheme with that learner in place of its own decodes the fold's groups under all laws' straggler
    sets, `num_sets` a law. The model runs on the groups' coded data points: where they are copies,
    nothing new is asked of it, else N - K queries a group or more.

    Raises: ValueError as `calibrate_bars` does, for fewer than two groups or folds.
    """
    if not stragglers:
        raise ValueError("there are no stragglers to calibrate the error bars under")
    x, y = jax.tree.map(jnp.asarray, (x, y))
    size = scheme.code.num_data
    groups = len(jax.tree.leaves(cut_groups(x, size))[0])
    folds = min(check_count("folds", folds, 2), groups)
    if folds < 2:
        raise ValueError(f"one group of {size} cannot be told by others: give two groups at least")
    masks, _ = draw_sets(stragglers, key, scheme.code.num_workers, num_sets)
    workers = model if callable(model) else tuple(model)
    ratios = []
    for part in np.array_split(np.arange(groups), folds):
        held = np.concatenate([np.arange(size) + size * group for group in part])
        others = np.setdiff1d(np.arange(length_of("y", y)), held)
        fitted = fit(*jax.tree.map(lambda leaf: leaf[others], (x, y)))  # noqa: B023
        if scheme.surrogate is not None:
            numbers = scheme.surrogate.theta, scheme.surrogate.kappa
            fitted = eqx.tree_at(lambda one: (one.theta, one.kappa), fitted, numbers)
        told = eqx.tree_at(lambda one: one.surrogate, scheme, fitted, is_leaf=lambda n: n is None)
        rows, own = jax.tree.map(lambda leaf: leaf[held], (x, y))  # noqa: B023
        ratios.append(np.ravel(_ratios(workers, told, rows, own, masks)))
    return bars_from(np.concatenate(ratios), current_conditions(None))


def _ratios(
    workers: Any,
    scheme: Scheme,
    x: PyTree,
    own: PyTree,
    masks: Bool[Array, "sets num_workers"],
) -> Float[Array, "sets points"]:
    """Errors by deviations; NaN where a prediction is exact, lost, or nothing is said of it."""
    encoder = known_encoder(scheme.code)
    # Three programs: the model's is the same for all schemes that send alike shapes.
    prepared, coded = eqx.filter_jit(scheme.send)(x, encoder)
    y = _answers(workers, scheme.code, coded)
    return _judged(scheme, x, prepared, y, own, masks, encoder)


@eqx.filter_jit
def _served(model: Model, x: PyTree) -> PyTree:
    return model(x)


@eqx.filter_jit
def _answers(workers: Any, code: AbstractCode, coded: PyTree) -> PyTree:
    return run_workers(workers, code, coded)


@eqx.filter_jit
def _judged(
    scheme: Scheme,
    x: PyTree,
    prepared: Prepared,
    y: PyTree,
    own: PyTree,
    masks: Bool[Array, "sets num_workers"],
    encoder: ArrayLike | None,
) -> Float[Array, "sets points"]:
    groups = len(jax.tree.leaves(y)[0])

    def of_set(mask):
        available = jnp.broadcast_to(mask, (groups, len(mask)))
        assessed = scheme.conclude(x, prepared, y, available, Known(encoder))
        error, deviation = row_errors(assessed.decoded.predictions, own), assessed.deviation
        counts = (deviation > 0) & jnp.isfinite(deviation) & assessed.decoded.recovered
        return jnp.where(counts, error / jnp.where(counts, deviation, 1), jnp.nan)

    return jax.lax.map(of_set, masks)
