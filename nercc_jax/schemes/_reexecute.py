"""Predictions with how far to trust them, and the model itself where that is not enough."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PyTree, Shaped

from ..codes import Decoded
from ..inference import Model, check_model
from ..risk import ErrorBars, error_bars


class Assessed(eqx.Module):
    """Predictions of data points in the order in which they came, and how far to trust them.

    Of `decoded`, `heard` are the workers that were used, a row for each group as it was sent;
    predictions and `recovered` have a row for each data point. `deviation` is the standard
    deviation in units of the outputs, infinite where nothing is told. `doubt` is the probability
    that the label is not the model's own, NaN without a calibrated `Doubt`, 1 where nothing is
    recovered (the prediction is NaN there). Of data points in groups, all have an axis of groups.
    """

    decoded: Decoded
    deviation: Float[Array, "*points"]
    doubt: Float[Array, "*points"]


def doubtful(
    doubt: Float[ArrayLike, " points"], *, limit: float = 0.0, at_most: int | None = None
) -> Int[np.ndarray, " _"]:
    """The data points to answer by the model itself: those with more doubt than `limit`.

    The most doubtful first, and no more than `at_most` of them. `limit` is `Doubt.limit`'s for a
    wanted disagreement; 0 takes all that are not certain.

    Raises: ValueError for a doubt that is NaN, a negative limit or number.
    """
    doubt = np.asarray(doubt)
    if np.isnan(doubt).any():
        raise ValueError("doubt is NaN: calibrate the scheme's doubt with `calibrate_doubt`")
    if not limit >= 0 or (at_most is not None and at_most < 0):
        raise ValueError(f"limit {limit} and at_most {at_most} must be 0 or positive")
    order = np.argsort(-doubt, kind="stable")
    return order[: int(np.sum(doubt > limit))][:at_most]


def reexecute(
    model: Model,
    x: PyTree[Shaped[ArrayLike, "..."]],
    assessed: Assessed,
    *,
    limit: float = 0.0,
    share: float = 1.0,
    tolerance: float | None = None,
    bars: ErrorBars | None = None,
    coverage: float = 0.9,
) -> Assessed:
    """Answers what is doubtful by the model itself: no more than that `share` of the data points.

    Of labels it goes by their doubt and `limit`: see `doubtful`. Of functions, with a `tolerance`
    in units of the outputs, by their error bars: all whose bar is larger, the largest first. `bars`
    (`calibrate_bars`) make bars of deviations, which cover so many errors (`coverage`); without, a
    deviation is taken to be a normal distribution's.

    The predictions are then the model's own, recovered and without a doubt. The model runs on
    powers of two, so that few programs are compiled.

    Raises: ValueError as `doubtful` does, for a share outside [0, 1], a tolerance that is negative,
    bars or a limit that do not go with it, a model in training mode, and where x is not what was
    assessed.
    """
    check_model(model)
    lead = assessed.doubt.shape
    x = jax.tree.map(np.asarray, x)
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], not {share}")
    for leaf in jax.tree.leaves(x):
        if leaf.shape[: len(lead)] != lead:
            raise ValueError(f"x has shape {leaf.shape}; assessed are data points {lead}")
    points = assessed.doubt.size
    score, limit = _score(assessed, limit, tolerance, bars, coverage)
    chosen = doubtful(score.ravel(), limit=limit, at_most=int(share * points))
    if len(chosen) == 0:
        return assessed
    padded = np.resize(chosen, 1 << (len(chosen) - 1).bit_length())

    def few(leaf: np.ndarray) -> Array:
        return jnp.asarray(leaf.reshape(points, *leaf.shape[len(lead) :])[padded])

    own = eqx.filter_jit(model)(jax.tree.map(few, x))
    own = jax.tree.map(lambda leaf: leaf[: len(chosen)], own)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(own)):
        raise ValueError("the model's own outputs are not finite")
    places = np.unravel_index(chosen, lead)

    def fill(values: Array, new: ArrayLike) -> Array:
        return values.at[places].set(jnp.asarray(new).astype(values.dtype))

    decoded = assessed.decoded
    status = Decoded(
        jax.tree.map(fill, decoded.predictions, own),
        decoded.heard,
        fill(decoded.recovered, True),
    )
    return Assessed(status, fill(assessed.deviation, 0), fill(assessed.doubt, 0))


def _score(
    assessed: Assessed,
    limit: float,
    tolerance: float | None,
    bars: ErrorBars | None,
    coverage: float,
) -> tuple[Array, float]:
    """What data points are ranked by, and how much of it is too much."""
    if tolerance is None:
        if bars is not None:
            raise ValueError("error bars go with a tolerance: give one")
        return assessed.doubt, limit
    if limit != 0 or not tolerance >= 0:
        raise ValueError(f"tolerance must be 0 or positive, without a limit: {tolerance}, {limit}")
    score = error_bars(assessed.deviation, bars, coverage)
    return jnp.where(assessed.decoded.recovered, score, jnp.inf), tolerance
