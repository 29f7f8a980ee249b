"""Tuning of a kernel on a learner's window, by the errors of leaving each pair out.

The error at a pair that is left out, and its variance, have a closed form (Rasmussen and Williams
2006, equations 5.12):

    y_i - mean_i = (A^-1 (r - c))_i / (A^-1)_ii,     variance_i = 1 / (A^-1)_ii,

so one factor judges a kernel on all pairs, and gradients run through it. A grid of widths and
noises for each shape comes first, then gradient descent from its best.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from ..codes._checks import check_count
from ..codes._products import multiply
from ..codes._trees import Form
from ..evaluation._criteria import labels_of
from ._kernels import Kernel, Shape, check_shape
from ._learner import Learner
from ._whitening import whiten

LearnerCriterion: TypeAlias = Literal["density", "mse", "labels"]
Widths: TypeAlias = Literal["one", "each", "kept"] | Sequence[int]

_EACH = 32  # features that have a width of their own, unless something else is asked for
_NOISES = (1e-6, 1e-4, 1e-2)
_WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # times those of the kernel that is there
_LEAST_LINEAR = 1e-6  # whose logarithm is walked on
_SHARPNESS = 4.0  # of labels: outputs' spreads that make one label e times as likely
_LEARNING_RATE = 0.1
# Of how unlike logarithms of widths are, by pair: as if their deviation were expected to be 0.7. So
# features that tell nothing by themselves are not set apart by chance (diabetes, ten features, 100
# pairs: error by spread .52 with a width each and no price, .48 with one width for all).
_PRICE = 1.0


class LeaveOneOut(eqx.Module):
    """Errors of a kernel at each pair when it is left out.

    Attributes:
        errors: Predictions less answers; 0 where the window is not filled.
        variance: Variances in units of the process's, noise included; 1 where it is not filled.
    """

    errors: Float[Array, "rows m"]
    variance: Float[Array, " rows"]


def leave_one_out(
    kernel: Kernel,
    inputs: Float[Array, "rows features"],
    residuals: Float[Array, "rows m"],
    filled: Bool[Array, " rows"],
) -> LeaveOneOut:
    """Return the errors of leaving each pair out; differentiable in the kernel."""
    count = jnp.maximum(jnp.sum(filled), 1)
    centred = jnp.where(filled[:, None], residuals - jnp.sum(residuals, axis=0) / count, 0)
    eye = jnp.eye(len(filled), dtype=bool)
    covariance = jnp.where(filled[:, None] & filled, kernel(inputs, inputs), 0)
    diagonal = jnp.where(filled, kernel.variance(inputs) + kernel.noise, 1)
    weights, precision = _weighed(jnp.where(eye, diagonal, covariance), centred)
    return LeaveOneOut(-weights / precision[:, None], 1 / precision)


@jax.custom_jvp
def _weighed(
    covariance: Float[Array, "rows rows"], residuals: Float[Array, "rows m"]
) -> tuple[Float[Array, "rows m"], Float[Array, " rows"]]:
    """Return A^-1 R, and the diagonal of A^-1."""
    whitening, _ = whiten(covariance)
    weights = multiply(whitening.T, multiply(whitening, residuals))
    return weights, jnp.sum(whitening**2, axis=0)


@_weighed.defjvp
def _(primals, tangents):
    """Return P (dR - dA P R) and the diagonal of -P dA P, with P = A^-1.

    Products do this; the derivative of the factor would take solutions one after the other.
    """
    whitening, _ = whiten(primals[0])
    inverse = multiply(whitening.T, whitening)
    weights = multiply(whitening.T, multiply(whitening, primals[1]))
    change, along = tangents
    step = multiply(inverse, along - multiply(change, weights))
    diagonal = -jnp.sum(multiply(inverse, change) * inverse, axis=1)
    return (weights, jnp.sum(whitening**2, axis=0)), (step, diagonal)


@dataclasses.dataclass(frozen=True)
class LearnerTuning:
    """Settings of the tuning of a learner's kernel on its own window.

    Attributes:
        criterion: "density", the log predictive density, which makes deviations right, too; "mse",
            the squared error; or "labels", the log loss of the largest output's place.
        shapes: The kernels to choose from.
        widths: "one" width for all features, "each" its own, or for each feature the group whose
            width it shares. Features that share one have their own spreads as units, or all the
            same unit, whichever is better. "kept" keeps the kernel's ratios of widths, for a
            learner that was tuned before.
        linear: Whether the kernel has a straight line, too.
        steps: Steps of gradient descent from the best of the grid; 0 leaves it at that.
        rows: The most pairs, evenly from the window, that a kernel is judged on. The time grows
            with their cube.
        least_noise: The least noise, in units of the process's variance. Default: a unit in the
            last place of 1 for each row of the window, which rounding of its covariances may add up
            to (1e-4 for 1,024 rows in float32). With less, predictions of a function that is known
            almost to rounding are rounding, and grow as the window turns.

    Raises:
        ValueError: The criterion, a shape, or the name of widths is unknown, there are fewer than
            three rows, or the least noise is not positive.
    """

    criterion: LearnerCriterion = "density"
    shapes: Sequence[Shape] = ("squared_exponential", "matern52")
    widths: Widths = "each"
    linear: bool = True
    steps: int = 60
    rows: int = 512
    least_noise: float | None = None

    def __post_init__(self):
        if self.criterion not in get_args(LearnerCriterion):
            known = ", ".join(get_args(LearnerCriterion))
            raise ValueError(f"criterion must be one of {known}, not {self.criterion!r}")
        for shape in self.shapes:
            check_shape(shape)
        if isinstance(self.widths, str) and self.widths not in ("one", "each", "kept"):
            raise ValueError(f"widths must be 'one', 'each', 'kept' or groups, not {self.widths!r}")
        check_count("steps", self.steps, 0)
        check_count("rows", self.rows, 3)
        if self.least_noise is not None and not 0 < self.least_noise < 1:
            raise ValueError(f"least_noise must be between 0 and 1, not {self.least_noise}")


def widths_of(features: int) -> Widths:
    """Return the widths of a kernel of so many features where nothing is asked for."""
    return "each" if features <= _EACH else "one"


def find_kernel(
    learner: Learner, start: Kernel, pairs: Int[np.ndarray, " pairs"], tuning: LearnerTuning
) -> tuple[Kernel, Float[Array, ""]]:
    """Return the kernel that does best on these rows of the window, and its scale (`tune_learner`).

    The grid's widths are relative to those of `start`.
    """
    known, least = _known(learner, pairs, tuning)
    starts = [
        _regrouped(kernel, shape, tuning)
        for kernel in _with_units(start, tuning.widths)
        for shape in tuning.shapes
    ]
    found = [_tuned(each, known, tuning.criterion, tuning.steps, least) for each in starts]
    best = int(np.argmin([float(jnp.nan_to_num(value, nan=np.inf)) for value, *_ in found]))
    return found[best][1:]


def _known(
    learner: Learner, pairs: Int[np.ndarray, " pairs"], tuning: LearnerTuning
) -> tuple["_Known", Float[Array, ""]]:
    """Return the pairs to tune on, and the least noise; raise ValueError for fewer than 3."""
    if len(pairs) < 3:
        raise ValueError(f"{len(pairs)} pairs tell nothing of a kernel: three at least")
    number = min(tuning.rows, len(pairs))
    chosen = pairs[np.linspace(0, len(pairs) - 1, number).round().astype(int)]
    size = min(tuning.rows, 1 << (number - 1).bit_length())
    order = np.resize(chosen, size)
    known = _Known(
        learner.inputs[order],
        learner.residuals[order],
        None if learner.priors is None else learner.priors[order],
        jnp.arange(size) < number,
        learner.form,
    )
    least = tuning.least_noise
    dtype = learner.kernel.noise.dtype
    if least is None:
        least = learner.capacity * jnp.finfo(dtype).eps
    return known, jnp.asarray(least, dtype)


class _Known(eqx.Module):
    """Pairs to tune on, as a learner's window has them."""

    inputs: Float[Array, "rows features"]
    residuals: Float[Array, "rows m"]
    priors: Float[Array, "rows m"] | None
    filled: Bool[Array, " rows"]
    form: Form = eqx.field(static=True)


def _with_units(kernel: Kernel, widths: Widths) -> list[Kernel]:
    """Return the kernel with its own units, and with one unit for all features that share a width.

    By the spread of each, a pixel at the edge that hardly ever varies counts as much as one in the
    middle (64 pixels of digits, 138 pairs: error by spread .37, .30 with one unit); numbers of
    different kinds need it. Both are tried.
    """
    groups, unit = _groups(kernel, widths), np.asarray(kernel.unit, np.float64)
    counts = np.maximum(np.bincount(groups), 1)
    one = np.sqrt(np.bincount(groups, unit**2) / counts)[groups]
    if np.allclose(one, unit, rtol=1e-5):
        return [kernel]
    return [kernel, eqx.tree_at(lambda k: k.unit, kernel, jnp.asarray(one, kernel.unit.dtype))]


def _groups(kernel: Kernel, widths: Widths) -> Int[np.ndarray, " features"]:
    """Return the group of each feature; raise ValueError for groups that do not fit."""
    features = len(kernel.centre)
    if widths == "kept":
        return np.asarray(kernel.groups)
    if isinstance(widths, str):
        return np.zeros(features, int) if widths == "one" else np.arange(features)
    groups = np.asarray(widths, int)
    if groups.shape != (features,) or (features and groups.min() < 0):
        raise ValueError(f"widths must group {features} features by 0, 1, ..., not {widths}")
    return groups


def _regrouped(kernel: Kernel, shape: Shape, tuning: LearnerTuning) -> Kernel:
    """Return the kernel to start from, with this shape and these groups of widths."""
    groups = _groups(kernel, tuning.widths)
    each = np.log(np.asarray(kernel.widths, np.float64))[np.asarray(kernel.groups)]
    number = int(groups.max(initial=0)) + 1
    counts = np.maximum(np.bincount(groups, minlength=number), 1)
    means = np.exp(np.bincount(groups, each, minlength=number) / counts)
    least = 0.0 if tuning.widths == "kept" else 0.1
    return Kernel(
        shape,
        centre=kernel.centre,
        unit=kernel.unit,
        widths=means,
        groups=groups,
        linear=max(float(kernel.linear), least) if tuning.linear else 0.0,
        noise=kernel.noise,
    )


@eqx.filter_jit
def _tuned(
    start: Kernel,
    known: _Known,
    criterion: LearnerCriterion,
    steps: int,
    least_noise: Float[Array, ""],
) -> tuple[Array, Kernel, Array]:
    """Return the best objective, its kernel, and the scale that its errors ask for."""
    inputs, residuals, mask = known.inputs, known.residuals, known.filled
    outputs = residuals if known.priors is None else residuals + known.priors

    def objective(free: dict[str, Array]) -> Array:
        out = leave_one_out(_kernel(start, free, least_noise), inputs, residuals, mask)
        unlike = jnp.sum((free["widths"] - jnp.mean(free["widths"])) ** 2)
        price = _PRICE * unlike / jnp.maximum(jnp.sum(mask), 1)
        if criterion == "labels":
            loss = _log_loss(out.errors, outputs, mask, known.form, jnp.exp(free["sharpness"]))
        else:
            mse = jnp.log(jnp.mean(jnp.mean(out.errors**2, axis=1), where=mask))
            loss = _density(out, residuals, mask) if criterion == "density" else mse
        return loss + price

    first = _free(start)
    grid = [
        first
        | {
            "widths": first["widths"] + np.log(width),
            "noise": jnp.full_like(first["noise"], np.log(noise)),
        }
        for width in _WIDTHS
        for noise in _NOISES
    ]
    grid.append(first)  # as it is: what was tuned before is not lost
    candidates = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grid)
    values = jax.lax.map(objective, candidates)
    place = jnp.argmin(jnp.where(jnp.isfinite(values), values, jnp.inf))
    state = jax.tree.map(lambda leaf: leaf[place], candidates), values[place]
    best, value = _descend(objective, *state, steps)
    kernel = _kernel(start, best, least_noise)
    out = leave_one_out(kernel, inputs, residuals, mask)
    spread = jnp.maximum(_variance(residuals, mask), jnp.finfo(inputs.dtype).tiny)
    square = jnp.mean(out.errors**2, axis=1) / out.variance
    return value, kernel, jnp.sqrt(jnp.mean(square, where=mask) / spread)


def _descend(objective: Any, start: PyTree, value: Array, steps: int) -> tuple[PyTree, Array]:
    """Return the best parameters along the descent, and their objective.

    `tuning`'s descent compiles its step for each call, and windows change, so their kernels are
    tuned again and again.
    """
    if steps == 0:
        return start, value
    import optax  # late: workers import this file, and tune nothing

    schedule = optax.cosine_decay_schedule(_LEARNING_RATE, steps)
    optimizer = optax.apply_if_finite(optax.adam(schedule), max_consecutive_errors=steps)

    def step(state, _):
        here, moments, best, least = state
        found, slopes = jax.value_and_grad(objective)(here)
        better = found < least
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), here, best)
        updates, moments = optimizer.update(slopes, moments, here)
        here = optax.apply_updates(here, updates)
        return (here, moments, best, jnp.where(better, found, least)), None

    state = (start, optimizer.init(start), start, value)
    (_, _, best, least), _ = jax.lax.scan(step, state, None, length=steps)
    return best, least


def _free(kernel: Kernel) -> dict[str, Array]:
    """Return the kernel's numbers as gradient descent walks on them."""
    return {
        "widths": jnp.log(kernel.widths),
        "noise": jnp.log(kernel.noise),
        "linear": jnp.log(kernel.linear + _LEAST_LINEAR),
        "sharpness": jnp.full((), np.log(_SHARPNESS), kernel.noise.dtype),
    }


def _kernel(start: Kernel, free: dict[str, Array], least_noise: Array) -> Kernel:
    """Return the kernel with these numbers; one without a linear part keeps none."""
    linear = jnp.where(start.linear > 0, jnp.exp(free["linear"]), 0)
    noise = jnp.exp(free["noise"]) + least_noise
    return eqx.tree_at(
        lambda kernel: (kernel.widths, kernel.linear, kernel.noise),
        start,
        (jnp.exp(free["widths"]), linear, noise),
    )


def _variance(residuals: Array, mask: Array) -> Array:
    """Return the variance of all residuals about their own outputs' means."""
    count = jnp.maximum(jnp.sum(mask), 1)
    mean = jnp.sum(residuals, axis=0, where=mask[:, None]) / count
    return jnp.sum(jnp.where(mask[:, None], (residuals - mean) ** 2, 0)) / residuals[0].size / count


def _density(out: LeaveOneOut, residuals: Array, mask: Array) -> Array:
    """Return minus the log predictive density but for constants, with the best process variance."""
    spread = jnp.maximum(_variance(residuals, mask), jnp.finfo(residuals.dtype).tiny)
    square = jnp.mean(out.errors**2, axis=1) / out.variance / spread
    return jnp.log(jnp.mean(square, where=mask)) + jnp.mean(jnp.log(out.variance), where=mask)


def _log_loss(
    errors: Array, outputs: Array, mask: Array, form: Form, sharpness: Array
) -> Float[Array, ""]:
    """Return the log loss of the answers' own labels under a softmax of the predictions."""
    spread = jnp.sqrt(_variance(outputs, mask))
    losses = []
    predicted, wanted = form.split((outputs + errors) / spread), form.split(outputs)
    labels = labels_of(wanted, 1)
    for part, label in zip(jax.tree.leaves(predicted), jax.tree.leaves(labels), strict=True):
        part = part if part.ndim > 1 else part[:, None]
        likely = jax.nn.log_softmax(sharpness * part, axis=-1)
        found = jnp.take_along_axis(likely, label[..., None], axis=-1)[..., 0]
        losses.append(-jnp.mean(found.reshape(len(found), -1), axis=1))
    return jnp.mean(jnp.mean(jnp.stack(losses), axis=0), where=mask)
