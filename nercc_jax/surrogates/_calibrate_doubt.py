"""The doubt of predictions, measured as they come about: of a code, or of a whole scheme."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Bool, PRNGKeyArray, PyTree, Shaped

from ..codes import AbstractCode, Form, Known, join, known_encoder, points_of
from ..evaluation import cut_groups, draw_sets, labels_of, record_answers, same_labels
from ..inference import Model, cast_model, check_model, current_conditions, run_workers
from ..stragglers import AbstractStragglers
from ._doubt import Doubt, doubt_from, doubt_of, features_of_doubt
from ._expected import AbstractSurrogate, check_like
from ._scheme import Scheme
from ._surrogate import expect_points


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
