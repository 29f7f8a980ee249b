"""A scheme made of past answers alone: a learner of most of them, judged on the others."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from ..codes import AbstractCode, check_count
from ..evaluation import row_errors
from ..risk import ErrorBars, bars_from, doubt_of_predictions, error_bars
from ..surrogates import Learner, LearnerTuning, start_learner, tune_learner
from ..surrogates._kernels import Shape
from ._scheme import Scheme

_HELD_OUT = 4  # of so many pairs one is kept apart
_MOST_HELD_OUT = 256
_EACH = 32  # features that have a width of their own
# Pairs that kernels are judged on: their time grows with the cube of that.
_JUDGED = 128
_SHAPE: Shape = "squared_exponential"  # to start from


@dataclasses.dataclass(frozen=True)
class Lesson:
    """A scheme that learned, and how it does on pairs that it had not learned from.

    `pairs` is what it knows now, those included. `deviations` and `doubts` are of those.
    """

    scheme: Scheme
    pairs: int
    deviations: Float[np.ndarray, " held_out"]
    doubts: Float[np.ndarray, " held_out"] | None = None

    def within(self, tolerance: float, coverage: float = 0.9) -> float:
        """The share of such points whose error bar is no larger than the tolerance."""
        bars = error_bars(jnp.asarray(self.deviations), self.scheme.bars, coverage)
        return float(np.mean(np.asarray(bars) <= tolerance))

    def sure(self, limit: float) -> float:
        """The share of such points with no more doubt than the limit; 0 without a doubt."""
        return 0.0 if self.doubts is None else float(np.mean(self.doubts <= limit))


def fit_scheme(
    x: Float[np.ndarray, "pairs features"],
    y: Float[np.ndarray, "pairs outputs"],
    code: AbstractCode,
    *,
    capacity: int = 1024,
    labels: bool = False,
    tuning: LearnerTuning | None = None,
) -> Lesson:
    """A scheme whose learner was fitted on three quarters of the pairs, its bars on the others.

    Those are every fourth pair, 256 at most: in the order of the pairs nothing should change. Then
    the learner learns them, too. Redundant workers get copies of what is doubtful. With `labels`
    (the largest outputs' places) the scheme has a doubt as well. `tuning` as in
    `tune_learner`; unless given, on 128 pairs, with one width for all of more than 32 features.

    Raises: ValueError for fewer than 16 pairs, and where nothing can be calibrated: a function that
    is constant.
    """
    check_count("pairs", len(x), 16)
    held = np.zeros(len(x), bool)
    held[_HELD_OUT - 1 :: _HELD_OUT] = True
    held[np.flatnonzero(held)[_MOST_HELD_OUT:]] = False
    # All of one size, so compiled once, however many they are: what is not finite is no pair.
    most = max(capacity, len(x))
    first, second = (
        (_filled(x[chosen], most), _filled(y[chosen], most)) for chosen in (~held, held)
    )
    if tuning is None:
        tuning = LearnerTuning(widths="each" if x.shape[1] <= _EACH else "one", rows=_JUDGED)
    learner = tune_learner(_start(*first, capacity), tuning)
    knows, mean, deviation = _tried(learner, *second)
    count = int(held.sum())
    mean, deviation, own = mean[:count], deviation[:count], second[1][:count]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.asarray(row_errors(mean, own)) / np.asarray(deviation)
    bars: ErrorBars = bars_from(ratios)
    doubt, doubts = None, None
    if labels:
        doubt = doubt_of_predictions(mean, deviation, jnp.asarray(own))
        doubts = np.asarray(doubt(mean, deviation, mean))
    scheme = Scheme(code, surrogate=knows, bars=bars, doubt=doubt, redundancy="doubtful")
    return Lesson(scheme, len(x), np.asarray(deviation), doubts)


def _filled(rows: Float[np.ndarray, "few n"], number: int) -> Float[np.ndarray, "number n"]:
    """With rows that are not finite, up to so many."""
    filled = np.full((number, rows.shape[1]), np.nan, np.float32)
    filled[: len(rows)] = rows
    return filled


@eqx.filter_jit
def _start(
    x: Float[ArrayLike, "pairs features"], y: Float[ArrayLike, "pairs outputs"], capacity: int
) -> Learner:
    return start_learner(x, y, capacity=capacity, kernel=_SHAPE)


@eqx.filter_jit
def _tried(
    learner: Learner, x: Float[ArrayLike, "pairs features"], y: Float[ArrayLike, "pairs outputs"]
) -> tuple[Learner, Float[Array, "pairs outputs"], Float[Array, " pairs"]]:
    """The learner that knows these, too, and what it said of them before."""
    known = jnp.isfinite(jnp.asarray(x))
    return learner.update(x, y), *learner.predict(jnp.where(known, x, 0))
