"""Error bars of a whole scheme, measured as it is used."""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Bool, Float, PRNGKeyArray, PyTree, Shaped

from ..codes import AbstractCode, Known, known_encoder, points_of
from ..evaluation import cut_groups, draw_sets, row_errors
from ..inference import Model, cast_model, current_conditions, run_workers
from ..stragglers import AbstractStragglers
from ._bars import ErrorBars, bars_from
from ._scheme import Scheme


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
    Of a learner alone, `bars_of` needs no further data.

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
    ratios = _ratios(served, workers, scheme, x, masks, known_encoder(scheme.code))
    return bars_from(np.asarray(ratios), current_conditions(worker_dtype))


@eqx.filter_jit
def _ratios(
    served: Model,
    workers: Any,
    scheme: Scheme,
    x: PyTree,
    masks: Bool[Array, "sets num_workers"],
    encoder: ArrayLike | None,
) -> Float[Array, "sets points"]:
    """Errors by deviations; NaN where a prediction is exact, lost, or nothing is said of it."""
    prepared, coded = scheme.send(x, encoder)
    y = run_workers(workers, scheme.code, coded)
    own = served(x)

    def of_set(mask):
        available = jnp.broadcast_to(mask, (len(jax.tree.leaves(coded)[0]), len(mask)))
        assessed = scheme.conclude(x, prepared, y, available, Known(encoder))
        error, deviation = row_errors(assessed.decoded.predictions, own), assessed.deviation
        counts = (deviation > 0) & jnp.isfinite(deviation) & assessed.decoded.recovered
        return jnp.where(counts, error / jnp.where(counts, deviation, 1), jnp.nan)

    return jax.lax.map(of_set, masks)
