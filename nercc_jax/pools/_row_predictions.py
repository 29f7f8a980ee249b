"""What a learner that is fitted to computed rows says of them and of others, by NumPy's arrays."""

import dataclasses
import logging
from typing import NamedTuple

import equinox as eqx
import numpy as np
from jaxtyping import Bool, Float, Int

from ..evaluation._criteria import root_mean_square
from ..risk import Accuracy
from ..schemes import fit_scheme
from ..schemes._calibrate import SHAPE, FittedScheme
from ..surrogates import Learner, LearnerTuning
from ._row_files import row_code

_LOG = logging.getLogger(__name__)

CAPACITY = 1024  # rows that the learner holds at most
FEW = 512  # rows up to which a smaller learner is fitted, in a third of the time
# Rows that a larger one's kernel is judged on. By 128, which takes a third of the time, 246 and 250
# of the 250 largest rows of Lotka-Volterra had to be computed, by these 176 and 170 (two draws).
_JUDGED = 256
NEWS = 32  # rows that are learned together between two fits
_CHUNK = 1024  # rows that are predicted together
_NEIGHBOURS = 8  # computed rows that a row is compared with
_UNSURE = 256  # of the least certain rows, from which those that tell most are picked
_TELLING = 64  # that are picked


class LeftOut(NamedTuple):
    """Predictions of rows that have come, each by a learner that does not know that row.

    `y` are the rows' own values, and `plain` the learner's own deviations (`predict`).
    """

    mean: Float[np.ndarray, "rows outputs"]
    deviation: Float[np.ndarray, " rows"]
    y: Float[np.ndarray, "rows outputs"]
    plain: Float[np.ndarray, " rows"]


class Window(NamedTuple):
    """A learner's pairs, each predicted from the others.

    `plain` are the learner's own deviations, `ratios` errors in units of these, and `scale` the
    ratios of the nearest other pairs (`predict`).
    """

    inputs: Float[np.ndarray, "pairs inputs"]
    mean: Float[np.ndarray, "pairs outputs"]
    plain: Float[np.ndarray, " pairs"]
    ratios: Float[np.ndarray, " pairs"]
    scale: Float[np.ndarray, " pairs"]


class Neighbours(NamedTuple):
    """Rows of which it is known whether they are late, by their inputs or their outputs."""

    places: Float[np.ndarray, "others coordinates"]
    late: Bool[np.ndarray, " others"]


def fit_rows(
    x: Float[np.ndarray, "pairs inputs"],
    y: Float[np.ndarray, "pairs outputs"],
    target: Accuracy,
) -> FittedScheme | None:
    """Fit a learner; return None where nothing could be learned."""
    labels = target.max_disagreement is not None
    capacity, tuning = CAPACITY, LearnerTuning(rows=_JUDGED)
    if len(x) < FEW:
        capacity = FEW
        tuning = LearnerTuning(shapes=(SHAPE,), steps=40, rows=64)
    try:
        return fit_scheme(x, y, row_code(), capacity=capacity, labels=labels, tuning=tuning)
    except ValueError as error:  # a function that is constant, for example
        _LOG.warning("nothing could be learned from %d rows: %s", len(x), error)
        return None


def update(
    fitted: FittedScheme,
    x: Float[np.ndarray, "news inputs"],
    y: Float[np.ndarray, "news outputs"],
) -> FittedScheme:
    """Return the learner after these rows."""
    learner = _learner_of(fitted).update(x, y)
    scheme = eqx.tree_at(lambda scheme: scheme.surrogate, fitted.scheme, learner)
    return dataclasses.replace(fitted, scheme=scheme)


def _learner_of(fitted: FittedScheme) -> Learner:
    learner = fitted.scheme.surrogate
    assert isinstance(learner, Learner)
    return learner


def window_of(fitted: FittedScheme, local: bool = True) -> Window:
    """Return what the learner predicts of its pairs.

    Deviations go by errors nearby where they are `local`. If not, or where outputs are labels,
    whose error probabilities are calibrated for the learner's own deviations, ratios are 1.
    """
    learner = _learner_of(fitted)
    filled, window = learner.filled, learner.window
    inputs, residuals, scatter = (
        each[filled] for each in (window.inputs, window.residuals, window.scatter)
    )
    errors, plain = (each[filled] for each in learner.left_out())
    off = np.stack([root_mean_square(errors, axis=1), scatter])
    ratios = np.sqrt(2) * root_mean_square(off, axis=0) / plain
    if not local or fitted.scheme.error_probability is not None:
        ratios = np.ones_like(ratios)
    scale = _local_scale(learner, ratios, inputs, inputs, np.arange(len(inputs)))
    return Window(inputs, (residuals + errors).astype(np.float32), plain, ratios, scale)


def predict(
    fitted: FittedScheme, window: Window, features: Float[np.ndarray, "rows inputs"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean and deviation of rows, and the learner's own deviation.

    A learner's own deviation depends on where pairs are, and not on their values, so that errors
    may be several of it where the function varies most. So it is multiplied by the root mean square
    ratio of error to deviation of the nearest pairs.
    """
    learner = _learner_of(fitted)
    means, deviations = [], []
    for place in range(0, len(features), _CHUNK):
        mean, deviation = learner.predict(features[place : place + _CHUNK])
        means.append(mean.astype(np.float32))
        deviations.append(deviation)
    if not means:
        return np.zeros((0, learner.form.size), np.float32), np.zeros(0), np.zeros(0)
    scale = _local_scale(learner, window.ratios, window.inputs, features)
    plain = np.concatenate(deviations)
    return np.concatenate(means), plain * scale, plain


def _local_scale(
    learner: Learner,
    ratios: Float[np.ndarray, " pairs"],
    inputs: Float[np.ndarray, "pairs inputs"],
    features: Float[np.ndarray, "rows inputs"],
    own: Int[np.ndarray, " rows"] | None = None,
) -> Float[np.ndarray, " rows"]:
    """Return the root mean square ratio of the pairs nearest to each row, by the kernel's widths.

    A row that is a pair of its `own` is not among them.
    """
    kernel = learner.kernel
    unit = np.asarray(kernel.unit * kernel.widths[kernel.groups])
    nearest = _nearest(features, inputs, unit, own)
    return root_mean_square(ratios[nearest], axis=1)


def leave_out(
    fitted: FittedScheme,
    window: Window,
    rows: Float[np.ndarray, "rows inputs"],
    y: Float[np.ndarray, "rows outputs"],
) -> LeftOut | None:
    """Return the predictions of these rows, each without any answer to the same input."""
    if not len(rows):
        return None
    same = _learner_of(fitted).kernel.same(rows, window.inputs)
    place = np.where(same.any(axis=1), same.argmax(axis=1), -1)
    unknown, mean, plain = place < 0, window.mean[place], window.plain[place]
    deviation = plain * window.scale[place]
    mean[unknown], deviation[unknown], plain[unknown] = predict(fitted, window, rows[unknown])
    return LeftOut(mean, deviation, y.astype(np.float32), plain)


def part_of(left_out: LeftOut, places: Int[np.ndarray, " few"]) -> LeftOut:
    """Return the predictions of some of the rows."""
    return LeftOut(*(each[places] for each in left_out))


def most_telling(
    fitted: FittedScheme,
    features: Float[np.ndarray, "rows inputs"],
    deviation: Float[np.ndarray, " rows"],
) -> Int[np.ndarray, " few"]:
    """Return the places of rows each of which is the least certain one given those before it.

    That is a Cholesky factorization with pivots of their posterior covariance, which makes the
    determinant of the first ones' covariance large (Harbrecht et al. 2012).
    """
    places = np.argsort(-deviation, kind="stable")[:_UNSURE]
    if len(places) < _UNSURE:
        return places
    posterior = _learner_of(fitted).window_posterior(features[places][None])
    covariance = posterior[1][0]
    chosen, left = [], np.diag(covariance).copy()
    least = 1e-4 * left.max()  # what is left then is float32's rounding
    factor = np.zeros((_UNSURE, _TELLING))
    for step in range(_TELLING):
        best = int(np.argmax(left))
        if not left[best] > least:
            break
        chosen.append(best)
        column = covariance[:, best] - factor[:, :step] @ factor[best, :step]
        factor[:, step] = column / np.sqrt(left[best])
        left = np.maximum(left - factor[:, step] ** 2, 0)
        left[chosen] = 0
    return places[chosen]


def like_late(
    inputs: Float[np.ndarray, "rows inputs"],
    outputs: Float[np.ndarray, "rows outputs"],
    by_input: Neighbours,
    by_output: Neighbours,
) -> Bool[np.ndarray, " rows"]:
    """Return which rows have a late one among their nearest neighbours, by input or by output."""
    found = np.zeros(len(inputs), bool)
    for places, known in ((inputs, by_input), (outputs, by_output)):
        if known.late.any() and len(known.late) >= _NEIGHBOURS:
            spread = known.places.std(axis=0)
            nearest = _nearest(places, known.places, np.where(spread > 0, spread, 1))
            found |= known.late[nearest].any(axis=1)
    return found


def _nearest(
    places: Float[np.ndarray, "rows coordinates"],
    others: Float[np.ndarray, "others coordinates"],
    unit: Float[np.ndarray, " coordinates"],
    own: Int[np.ndarray, " rows"] | None = None,
) -> Int[np.ndarray, "rows neighbours"]:
    """Return the nearest of the others to each row, without its own if these are given."""
    others = others / unit
    squares = np.sum(others**2, axis=1)
    found = np.empty((len(places), _NEIGHBOURS), int)
    for place in range(0, len(places), _CHUNK):
        part = slice(place, place + _CHUNK)
        distance = squares - 2 * (places[part] / unit) @ others.T
        if own is not None:
            distance[np.arange(len(distance)), own[part]] = np.inf
        found[part] = np.argpartition(distance, _NEIGHBOURS - 1, axis=1)[:, :_NEIGHBOURS]
    return found
