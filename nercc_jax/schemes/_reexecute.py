"""Predictions with a measure of trust, and the model's own answers where it is too small."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PyTree, Shaped

from ..codes import Decoded
from ..inference._models import Model, call_model, check_model
from ..risk import ErrorBars
from ..risk._error_bars import error_bars


class AssessedPredictions(eqx.Module):
    """Predictions in the order in which the data points came, with a measure of trust.

    Data points in groups have an axis of groups in all fields.

    Attributes:
        decoded: Predictions and `recovered`, a row for each data point; `responded` are the workers
            that were used, a row for each group as it was sent.
        deviation: Standard deviations in units of the outputs; infinite where nothing is known.
        error_probability: The probability that the label differs from the model's own; NaN without
            a calibrated `ErrorProbability`, 1 where nothing is recovered (the prediction is NaN
            there).
    """

    decoded: Decoded
    deviation: Float[Array, "*points"]
    error_probability: Float[Array, "*points"]


def select_uncertain(
    error_probability: Float[ArrayLike, " points"],
    *,
    limit: float = 0.0,
    at_most: int | None = None,
) -> Int[np.ndarray, " _"]:
    """Return the data points that the model must answer itself, the most uncertain first.

    Args:
        error_probability: Probabilities of a wrong label.
        limit: Data points above it are selected (`ErrorProbability.limit`). 0 selects all that are
            not certain.
        at_most: The most data points to select.

    Raises:
        ValueError: A probability is NaN, or the limit or the number is negative.
    """
    error_probability = np.asarray(error_probability)
    if np.isnan(error_probability).any():
        raise ValueError(
            "the error probability is NaN: calibrate the scheme with `calibrate_error_probability`"
        )
    if not limit >= 0 or (at_most is not None and at_most < 0):
        raise ValueError(f"limit {limit} and at_most {at_most} must be 0 or positive")
    order = np.argsort(-error_probability, kind="stable")
    return order[: int(np.sum(error_probability > limit))][:at_most]


def reexecute(
    model: Model,
    x: PyTree[Shaped[ArrayLike, "..."]],
    assessed: AssessedPredictions,
    *,
    limit: float = 0.0,
    share: float = 1.0,
    tolerance: float | None = None,
    bars: ErrorBars | None = None,
    coverage: float = 0.9,
) -> AssessedPredictions:
    """Replace uncertain predictions by the model's own answers.

    The replaced predictions are recovered, with an error probability and a deviation of 0. The
    model runs on powers of two of data points, so that few programs are compiled.

    Args:
        model: The served model, a function of a batch.
        x: The data points that were assessed.
        assessed: Their predictions.
        limit: The largest error probability that is left as it is (`select_uncertain`).
        share: The largest share of the data points that the model may answer.
        tolerance: For functions instead of labels: the largest error bar that is left as it is, in
            units of the outputs. The largest bars go first.
        bars: Calibrated error bars (`calibrate_error_bars`). Without, errors are taken as normally
            distributed.
        coverage: The share of errors that a bar covers.

    Raises:
        ValueError: As `select_uncertain`; or the share is outside [0, 1], the tolerance is negative
            or given with a limit, bars are given without a tolerance, the model is in training
            mode, or x is not what was assessed.
    """
    check_model(model)
    lead = assessed.error_probability.shape
    x = jax.tree.map(np.asarray, x)
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], not {share}")
    for leaf in jax.tree.leaves(x):
        if leaf.shape[: len(lead)] != lead:
            raise ValueError(f"x has shape {leaf.shape}; assessed are data points {lead}")
    points = assessed.error_probability.size
    score, limit = _score(assessed, limit, tolerance, bars, coverage)
    chosen = select_uncertain(score.ravel(), limit=limit, at_most=int(share * points))
    if len(chosen) == 0:
        return assessed
    padded = np.resize(chosen, 1 << (len(chosen) - 1).bit_length())

    def few(leaf: np.ndarray) -> Array:
        return jnp.asarray(leaf.reshape(points, *leaf.shape[len(lead) :])[padded])

    own = eqx.filter_jit(call_model)(model, jax.tree.map(few, x))
    own = jax.tree.map(lambda leaf: leaf[: len(chosen)], own)
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(own)):
        raise ValueError("the model's own outputs are not finite")
    places = np.unravel_index(chosen, lead)

    def fill(values: Array, new: ArrayLike) -> Array:
        return values.at[places].set(jnp.asarray(new).astype(values.dtype))

    decoded = assessed.decoded
    status = Decoded(
        jax.tree.map(fill, decoded.predictions, own),
        decoded.responded,
        fill(decoded.recovered, True),
    )
    return AssessedPredictions(
        status, fill(assessed.deviation, 0), fill(assessed.error_probability, 0)
    )


def _score(
    assessed: AssessedPredictions,
    limit: float,
    tolerance: float | None,
    bars: ErrorBars | None,
    coverage: float,
) -> tuple[Array, float]:
    """Return what data points are ranked by, and the limit of it."""
    if tolerance is None:
        if bars is not None:
            raise ValueError("error bars go with a tolerance: give one")
        return assessed.error_probability, limit
    if limit != 0 or not tolerance >= 0:
        raise ValueError(f"tolerance must be 0 or positive, without a limit: {tolerance}, {limit}")
    score = error_bars(assessed.deviation, bars, coverage)
    return jnp.where(assessed.decoded.recovered, score, jnp.inf), tolerance
