"""Calibration of error probabilities and error bars."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Bool, Float, PRNGKeyArray, PyTree, Shaped

from ..arrays import root_mean_square
from ..codes import AbstractCode
from ..codes.kept import encoder_of
from ..codes.trees import Form, join, points_of, to_device
from ..codes.workers import run_workers
from ..evaluation.answers import batched, cut_groups, in_parts
from ..evaluation.criteria import agree_on_labels
from ..evaluation.objective import draw_sets
from ..inference import cast_model, current_conditions
from ..inference.models import Model
from ..risk import ErrorBars, ErrorProbability
from ..risk.error_bars import error_bars_from_ratios
from ..risk.error_probability import fit_error_probability
from ..risk.features import label_features
from ..stragglers import AbstractStragglers
from .scheme import Scheme

Models = Model | Sequence[Model]


def calibrate_error_probability(
    model: Models,
    scheme: Scheme | AbstractCode,
    x: PyTree[Shaped[ArrayLike, "points ..."]],
    stragglers: Mapping[str, AbstractStragglers],
    *,
    key: PRNGKeyArray,
    num_sets: int = 100,
    batch_size: int = 256,
    worker_dtype: DTypeLike | None = None,
) -> ErrorProbability:
    """Calibrate the probability of wrong labels of decoded predictions, on unlabelled data points.

    All groups are decoded under the straggler sets of all laws; the model runs only once. A
    thousand data points resolve a disagreement of 0.1 %.

    Args:
        model: The served model, a function of a batch, or one for each kind of worker, the served
            one first.
        scheme: A scheme, which is run with its order, its surrogate, its regression points and
            copies; or a code.
        x: Unlabelled data points like those in use; a remainder of less than K is left out. Data on
            which the code or the surrogate was tuned give probabilities that are too small.
        stragglers: Named laws from which straggler sets are drawn.
        key: The random key of the draws.
        num_sets: The number of straggler sets for each law.
        batch_size: The most data points in a call of the model, if it is at least K and N.
        worker_dtype: The dtype in which the workers compute. Their answers then differ by rounding
            from the model's own, with which predictions are compared.

    Raises:
        ValueError: There are no stragglers, `evaluate` would not accept the data, the model returns
            one number a row, which has no label, the code is not a regression, or `worker_dtype` is
            not a float.
    """
    sets = stragglers, key, num_sets
    seen, form = _observe(model, scheme, x, sets, batch_size, worker_dtype, labels=True)
    features, sure, wrong, _ = (np.asarray(each) for each in seen)
    owner = np.indices(wrong.shape).reshape(3, -1)
    return fit_error_probability(
        features.reshape(wrong.size, 1, -1),
        wrong.reshape(-1, 1),
        sure=sure.ravel(),
        owners=(owner[1], owner[0]),
        points=wrong[0].size,
        form=form,
        conditions=current_conditions(worker_dtype),
    )


def calibrate_error_bars(
    model: Models,
    scheme: Scheme | AbstractCode,
    x: PyTree[Shaped[ArrayLike, "points ..."]],
    stragglers: Mapping[str, AbstractStragglers],
    *,
    key: PRNGKeyArray,
    num_sets: int = 20,
    batch_size: int = 256,
    worker_dtype: DTypeLike | None = None,
) -> ErrorBars:
    """Calibrate the error bars of decoded predictions, on unlabelled data points.

    For a learner alone, `calibrate_learner_bars` needs no further data.

    Args:
        model: As for `calibrate_error_probability`, like all further arguments.
        scheme: A scheme or a code.
        x: Unlabelled data points like those in use. A learner must not have learned from them, and
            nothing may have been tuned on them.
        stragglers: Named laws from which straggler sets are drawn.
        key: The random key of the draws.
        num_sets: The number of straggler sets for each law.
        batch_size: The most data points in a call of the model.
        worker_dtype: The dtype in which the workers compute.

    Raises:
        ValueError: As `calibrate_error_probability`, or every prediction is exact.
    """
    sets = stragglers, key, num_sets
    (*_, ratios), _ = _observe(model, scheme, x, sets, batch_size, worker_dtype)
    return error_bars_from_ratios(np.asarray(ratios), current_conditions(worker_dtype))


def _observe(
    model: Models,
    scheme: Scheme | AbstractCode,
    x: PyTree,
    sets: tuple[Mapping[str, AbstractStragglers], PRNGKeyArray, int],
    batch_size: int,
    worker_dtype: DTypeLike | None,
    *,
    labels: bool = False,
) -> tuple[tuple[Array, ...], Form]:
    """Run a scheme once; return its errors under sets of each law, and the outputs' form.

    The errors are those of `_errors_of_sets`. With `labels`, outputs without labels are refused.
    """
    stragglers, key, num_sets = sets
    scheme = scheme if isinstance(scheme, Scheme) else Scheme(scheme)
    masks, _ = draw_sets(stragglers, key, scheme.code.num_workers, num_sets)
    served = model if callable(model) else model[0]
    x = to_device(points_of(cut_groups(x, scheme.code.num_data)))
    own = batched(served, batch_size)(x)
    if labels and not (form := join(own, 1)[1]).has_labels:
        raise ValueError(
            f"outputs of shapes {list(form.shapes)} have one number a row, which is no label: "
            "calibrate_error_bars and a tolerance are for values"
        )

    # The compiled programs: one encodes, one runs the model, and one decodes.
    encoder = encoder_of(scheme.code)
    prepared, coded = eqx.filter_jit(scheme.encode)(x, encoder)
    workers = cast_model(model if callable(model) else tuple(model), worker_dtype)
    run = functools.partial(eqx.filter_jit(run_workers), workers, scheme.code)
    groups = len(jax.tree.leaves(coded)[0])
    y = in_parts(run, coded, min(max(batch_size // scheme.code.num_workers, 1), groups))
    sent, (vectors, form) = scheme.groups(x, prepared), join(y, 2)
    expect = eqx.filter_jit(scheme.expect)
    prior = expect(sent, prepared, encoder, form)
    decode = eqx.Partial(Scheme.assess, scheme, prepared, vectors, prior)
    own = join(scheme.groups(own, prepared), 2)[0]
    return _errors_of_sets(decode, own, form, masks), form


@eqx.filter_jit
def _errors_of_sets(
    decode: Any,
    own: Float[Array, "groups num_data m"],
    form: Form,
    masks: Bool[Array, "sets num_workers"],
) -> tuple[Array, Array, Array, Array]:
    """Return the errors of decoded predictions, by straggler set, group and data point.

    The four arrays are: the features that rank predictions (`label_features`); whether a prediction
    is exact; whether its label differs from the model's `own`, or it is lost; and the ratio of its
    error to its deviation, NaN if it is exact, lost, or has no deviation.
    """

    def of_set(mask: Array) -> tuple[Array, Array, Array, Array]:
        decoded, cheap = decode(jnp.broadcast_to(mask, (len(own), len(mask))))
        deviation, of_parts = decoded.deviation, None if form.is_vector else form
        features = label_features(decoded.predictions, deviation, cheap, of_parts)
        wrong = ~agree_on_labels(decoded.predictions, own, form) | ~decoded.recovered
        error = root_mean_square(decoded.predictions - own, axis=-1)
        counts = (deviation > 0) & jnp.isfinite(deviation) & decoded.recovered
        ratio = jnp.where(counts, error / jnp.where(counts, deviation, 1), jnp.nan)
        return features, deviation == 0, wrong, ratio

    return jax.lax.map(of_set, masks)
