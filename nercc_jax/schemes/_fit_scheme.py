"""A scheme that is made of past answers alone."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from ..codes import AbstractCode
from ..codes._checks import check_count
from ..evaluation._functions import row_errors
from ..risk import ErrorBars
from ..risk._error_bars import error_bars_from_ratios
from ..risk._error_probability import fit_error_probability_of_predictions
from ..surrogates import Learner, LearnerTuning, init_learner, tune_learner
from ..surrogates._kernels import Shape
from ..surrogates._tune_kernel import widths_of
from ._scheme import Scheme

_HELD_OUT = 4  # of so many pairs one is kept apart
_MOST_HELD_OUT = 256
# Pairs that kernels are judged on: their time grows with the cube of that.
_JUDGED = 128
SHAPE: Shape = "squared_exponential"  # to start from


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

    Every fourth pair is held out, 256 at most, so nothing should change along the pairs' order.
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
    held = np.zeros(len(x), bool)
    held[_HELD_OUT - 1 :: _HELD_OUT] = True
    held[np.flatnonzero(held)[_MOST_HELD_OUT:]] = False
    # All of one size, so compiled once, however many they are: what is not finite is no pair.
    most = max(capacity, len(x))
    first, second = ((filled(x[chosen], most), filled(y[chosen], most)) for chosen in (~held, held))
    if tuning is None:
        tuning = LearnerTuning(widths=widths_of(x.shape[1]), rows=_JUDGED)
    learner = tune_learner(
        eqx.filter_jit(init_learner)(*first, capacity=capacity, kernel=SHAPE), tuning
    )
    knows, mean, deviation = _tried(learner, *second)
    count = int(held.sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.asarray(row_errors(mean, second[1])) / np.asarray(deviation)
    bars: ErrorBars = error_bars_from_ratios(ratios[:count])
    error_probability = None
    if labels:
        mean, deviation, own = mean[:count], deviation[:count], second[1][:count]
        error_probability = fit_error_probability_of_predictions(mean, deviation, jnp.asarray(own))
    scheme = Scheme(
        code,
        surrogate=knows,
        bars=bars,
        error_probability=error_probability,
        redundancy="uncertain",
    )
    return FittedScheme(scheme, len(x))


def filled(rows: Float[np.ndarray, "few n"], number: int) -> Float[np.ndarray, "number n"]:
    """Return the finite rows, filled up with NaN to a fixed number."""
    filled = np.full((number, rows.shape[1]), np.nan, np.float32)
    filled[: len(rows)] = rows
    return filled


@eqx.filter_jit
def _tried(
    learner: Learner, x: Float[ArrayLike, "pairs features"], y: Float[ArrayLike, "pairs outputs"]
) -> tuple[Learner, Float[Array, "pairs outputs"], Float[Array, " pairs"]]:
    """Return the learner after it learned these pairs, and its predictions of them before."""
    known = jnp.isfinite(jnp.asarray(x))
    return learner.update(x, y), *learner.predict(jnp.where(known, x, 0))
