"""Tuning of a kernel on a learner's window, by the errors of leaving each pair out.

The error at a pair that is left out, and its variance, have a closed form (Rasmussen and Williams
2006, equations 5.12):

    y_i - mean_i = (A^-1 (r - c))_i / (A^-1)_ii,     variance_i = 1 / (A^-1)_ii,

so one factor judges a kernel on all pairs. Where y_i is the mean of n_i answers to one input, the
variance of a single answer is larger by noise (1 - 1 / n_i), and its square error by that of the
answers about their mean. A grid of widths and noises for each shape comes first, then gradient
descent from its best, by derivatives in closed form. All of it is NumPy's and LAPACK's: a
hundred pairs take less time than the compilation of any program.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Float, Int

from ..codes._checks import check_count
from ..codes._trees import Form, to_device
from ..evaluation._criteria import root_mean_square
from ._kernels import Kernel, Shape, check_shape, covariances, slopes
from ._learner import Learner
from ._whitening import whiten_on_host

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
) -> tuple[Kernel, float]:
    """Return the kernel that does best on these rows of the window, and its scale (`tune_learner`).

    The grid's widths are relative to those of `start`.

    Raises:
        ValueError: There are fewer than three pairs, or the widths do not fit the features.
    """
    known, least = _known(learner, pairs, tuning)
    starts = [
        _regrouped(kernel, shape, tuning)
        for kernel in _with_units(start, tuning.widths)
        for shape in tuning.shapes
    ]
    found = [_tuned(each, known, least, tuning) for each in starts]
    return min(found, key=lambda each: each[0])[1:]


def find_kernels(
    learners: Learner, starts: Kernel, pairs: Int[np.ndarray, " pairs"], tuning: LearnerTuning
) -> tuple[Kernel, Float[np.ndarray, " learners"]]:
    """Return the best kernels of learners of the same inputs, as `find_kernel` does.

    The learners' arrays have a first axis. Kernels have the shape and the groups of their `starts`.
    """
    learners, starts = jax.device_get((learners, starts))
    kernels, scales = [], []
    for place in range(len(learners.window.place)):
        one, start = jax.tree.map(lambda leaf: leaf[place], (learners, starts))  # noqa: B023
        _, kernel, scale = _tuned(start, *_known(one, pairs, tuning), tuning)
        kernels.append(jax.device_get(kernel))
        scales.append(scale)
    return to_device(jax.tree.map(lambda *leaves: np.stack(leaves), *kernels)), np.array(scales)


class KnownPairs(eqx.Module):
    """Pairs to compare kernels on, in float64.

    Attributes:
        inputs: Features.
        residuals: Mean answers less the prior, and less their mean, in units of their spread. Of
            more outputs than pairs, where labels do not matter, a square root of their products.
        outputs: The number of outputs.
        squares: The mean square distance of the answers to an input from their mean.
        counts: The number of answers.
        answers: The mean answers, where labels matter; all units are then their spread.
        form: The structure of the outputs.
    """

    inputs: Float[np.ndarray, "rows features"]
    residuals: Float[np.ndarray, "rows mixed"]
    outputs: int
    squares: Float[np.ndarray, " rows"]
    counts: Int[np.ndarray, " rows"]
    answers: Float[np.ndarray, "rows m"] | None
    form: Form


def _known(
    learner: Learner, pairs: Int[np.ndarray, " pairs"], tuning: LearnerTuning
) -> tuple[KnownPairs, float]:
    """Return the pairs to tune on, and the least noise; raise ValueError for fewer than 3."""
    if len(pairs) < 3:
        raise ValueError(f"{len(pairs)} pairs tell nothing of a kernel: three at least")
    number = min(tuning.rows, len(pairs))
    rows = pairs[np.linspace(0, len(pairs) - 1, number).round().astype(int)]
    least, window = tuning.least_noise, learner.window
    if least is None:
        least = float(learner.capacity * np.finfo(learner.kernel.noise.dtype).eps)
    inputs, residuals, scatter = (
        np.asarray(each)[rows].astype(np.float64)
        for each in (window.inputs, window.residuals, window.scatter)
    )
    outputs, answers = residuals.shape[1], None
    centred = residuals - residuals.mean(axis=0)
    unit = float(root_mean_square(centred)) or 1.0
    if tuning.criterion == "labels":
        answers = residuals
        if window.priors is not None:
            answers = residuals + np.asarray(window.priors)[rows]
        unit = float(root_mean_square(answers - answers.mean(axis=0))) or 1.0
        answers = answers / unit
    elif outputs > number:
        centred = np.asarray(np.linalg.qr(centred.T, mode="r")).T
    squares, counts = (scatter / unit) ** 2, np.asarray(window.counts)[rows]
    known = KnownPairs(inputs, centred / unit, outputs, squares, counts, answers, learner.form)
    return known, least


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
    return [kernel, eqx.tree_at(lambda k: k.unit, kernel, one.astype(kernel.unit.dtype))]


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
        centre=np.asarray(kernel.centre),
        unit=np.asarray(kernel.unit),
        widths=means,
        groups=groups,
        linear=max(float(kernel.linear), least) if tuning.linear else 0.0,
        noise=kernel.noise,
    )


def _tuned(
    start: Kernel, known: KnownPairs, least_noise: float, tuning: LearnerTuning
) -> tuple[float, Kernel, float]:
    """Return the best objective, its kernel, and the scale that its errors ask for."""
    dtype, start = start.noise.dtype, jax.device_get(start)
    widths = np.log(start.widths.astype(np.float64))
    few = len(widths)
    linear = float(start.linear)
    rest = [
        math.log(float(start.noise)), math.log(linear + _LEAST_LINEAR), math.log(_SHARPNESS)
    ]  # fmt: skip
    first = np.append(widths, rest)

    def kernel_of(free: Float[np.ndarray, " free"]) -> Kernel:
        numbers = (
            np.exp(free[:few]),
            np.exp(free[few + 1]) if linear > 0 else 0.0,  # one without a line keeps none
            np.exp(free[few]) + least_noise,
        )
        return eqx.tree_at(_numbers, start, numbers)

    def objective(
        free: Float[np.ndarray, " free"], slope: bool = True
    ) -> tuple[float, Float[np.ndarray, " free"]]:
        kernel = kernel_of(free)
        out = LeaveOneOut(kernel, known)
        if not out.sound:
            return np.inf, np.zeros_like(free)
        value, by_errors, by_variance, by_sharpness = _LOSSES[tuning.criterion](
            out, known, math.exp(free[-1])
        )
        # Of how unlike widths are.
        unlike = free[:few] - free[:few].mean()
        price = _PRICE / len(known.inputs)
        value += price * float(unlike @ unlike)
        if not np.isfinite(value):
            return np.inf, np.zeros_like(free)
        if not slope:
            return value, free
        by_widths, by_linear, by_noise = out.slopes(by_errors, by_variance)
        slopes = np.zeros_like(free)
        slopes[:few] = by_widths + 2 * price * unlike
        slopes[few] = by_noise * np.exp(free[few])
        slopes[few + 1] = by_linear * float(kernel.linear)
        slopes[few + 2] = by_sharpness
        return value, slopes

    grid = [first]  # as it is, too: what was tuned before is not lost
    for width in _WIDTHS:
        for noise in _NOISES:
            grid.append(first.copy())
            grid[-1][:few] += math.log(width)
            grid[-1][few] = math.log(noise)
    values = [objective(each, slope=False)[0] for each in grid]
    best, value = grid[int(np.argmin(values))], min(values)
    if np.isfinite(value):
        best, value = _descend(objective, best, value, tuning.steps)
    kernel = kernel_of(best)
    out = LeaveOneOut(kernel, known)
    square = np.sum(known.residuals**2) / known.residuals.shape[0] / known.outputs
    spread = math.sqrt(square + np.mean(known.squares))
    scale = float(np.sqrt(np.mean(out.squares / out.variance)))
    rounded = [np.asarray(each, dtype) for each in _numbers(kernel)]
    kernel = to_device(eqx.tree_at(_numbers, kernel, rounded))
    return value, kernel, scale / spread if scale > 0 < spread else 1.0


def _numbers(kernel: Kernel) -> tuple:
    """Return the numbers of a kernel that are tuned."""
    return kernel.widths, kernel.linear, kernel.noise


def _descend(
    objective: Callable[..., tuple[float, np.ndarray]], best: np.ndarray, value: float, steps: int
) -> tuple[np.ndarray, float]:
    """Return the best parameters along a descent by Adam (Kingma and Ba 2015), and their value.

    (The import of SciPy's optimizers takes longer than a first fit.)
    """
    here, first, second = best, np.zeros_like(best), np.zeros_like(best)
    for step in range(steps):
        found, slope = objective(here)
        if found < value:
            best, value = here, found
        if not np.isfinite(slope).all() or not np.isfinite(found):
            break
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        rate = _LEARNING_RATE * (1 + math.cos(math.pi * step / steps)) / 2
        size = np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8
        here = here - rate * first / (1 - 0.9 ** (step + 1)) / size
    return best, value


class LeaveOneOut:
    """A kernel's predictions of pairs by the others, and derivatives of functions of them.

    Attributes:
        sound: Whether there is a factor.
        errors: Predictions less mean answers.
        squares: Mean squares of the errors of single answers.
        variance: Variances of single answers, in units of the process's, noise included.
    """

    def __init__(self, kernel: Kernel, known: KnownPairs):
        """Predict the pairs."""
        self._kernel, self._known = kernel, known
        self._z = z = kernel.scaled(known.inputs)
        inner = z @ z.T
        length = np.diagonal(inner)
        self._square = np.maximum(length[:, None] + length - 2 * inner, 0)
        np.fill_diagonal(self._square, 0)
        self._shape = covariances(kernel.shape, self._square)
        covariance = self._shape + kernel.linear * inner
        covariance[np.diag_indices_from(covariance)] += kernel.noise / known.counts
        whitening = whiten_on_host(covariance)
        self._inverse = inverse = whitening.T @ whitening
        self._precision = np.diagonal(inverse).copy()
        self.sound = bool(np.isfinite(self._precision).all() and (self._precision > 0).all())
        self._weights = inverse @ known.residuals
        self.errors = -self._weights / self._precision[:, None]
        self.squares = np.sum(self.errors**2, axis=1) / known.outputs + known.squares
        self.variance = 1 / self._precision + kernel.noise * (1 - 1 / known.counts)

    def slopes(
        self,
        by_errors: Float[np.ndarray, "rows mixed"],
        by_variance: Float[np.ndarray, " rows"] | None,
    ) -> tuple[Float[np.ndarray, " widths"], float, float]:
        """Return derivatives by logarithms of widths, by the line and by the noise.

        Args:
            by_errors: Those by `errors`.
            by_variance: Those by `variance`; None for 0.
        """
        kernel, known, z = self._kernel, self._known, self._z
        p, inverse = self._precision, self._inverse
        # errors = -P r / p and variance = 1 / p + ..., with P = A^-1 and p its diagonal.
        by_precision = -np.sum(by_errors * self.errors, axis=1) / p
        by_noise = 0.0
        if by_variance is not None:
            by_precision -= by_variance / p**2
            by_noise = float(by_variance @ (1 - 1 / known.counts))
        turned = inverse @ (by_errors / p[:, None])
        by_covariance = turned @ self._weights.T - (inverse * by_precision) @ inverse
        by_covariance = (by_covariance + by_covariance.T) / 2
        by_noise += float(np.diagonal(by_covariance) @ (1 / known.counts))
        along = by_covariance @ z
        by_linear = float(np.sum(z * along))
        by_square = by_covariance * slopes(kernel.shape, self._square, self._shape)
        each = -4 * (by_square.sum(axis=1) @ z**2 - np.sum(z * (by_square @ z), axis=0))
        each -= 2 * float(kernel.linear) * np.sum(z * along, axis=0)
        by_widths = np.bincount(np.asarray(kernel.groups), each, minlength=len(kernel.widths))
        return by_widths, by_linear, by_noise


# A loss by the errors of leaving pairs out, and its derivatives by errors, variances and the
# logarithm of the sharpness of labels.
_Loss: TypeAlias = tuple[float, np.ndarray, np.ndarray | None, float]


def _density(out: LeaveOneOut, known: KnownPairs, sharpness: float) -> _Loss:
    """Return minus the log predictive density but for constants, with the best process variance."""
    square, variance = out.squares, out.variance
    rows, ratios = len(square), out.squares / out.variance
    total = max(float(ratios.sum()), np.finfo(float).tiny)
    value = math.log(total / rows) + float(np.mean(np.log(variance)))
    by_errors = 2 * out.errors / (known.outputs * total * variance[:, None])
    by_variance = 1 / (rows * variance) - ratios / (variance * total)
    return value, by_errors, by_variance, 0.0


def _mse(out: LeaveOneOut, known: KnownPairs, sharpness: float) -> _Loss:
    """Return the logarithm of the mean squared error."""
    total = max(float(out.squares.sum()), np.finfo(float).tiny)
    by_errors = 2 * out.errors / (known.outputs * total)
    return math.log(total / len(out.squares)), by_errors, None, 0.0


def _log_loss(out: LeaveOneOut, known: KnownPairs, sharpness: float) -> _Loss:
    """Return the log loss of the answers' own labels under a softmax of the predictions."""
    assert known.answers is not None
    predicted, value, by_sharpness, place = known.answers + out.errors, 0.0, 0.0, 0
    by_errors = np.empty_like(predicted)
    for shape in known.form.shapes:
        classes, size = (shape[-1] if shape else 1), math.prod(shape)
        part = slice(place, place + size)
        score = predicted[:, part].reshape(-1, classes)
        label = known.answers[:, part].reshape(-1, classes).argmax(axis=1)
        score = score - score.max(axis=1, keepdims=True)
        share = np.exp(sharpness * score)
        total = share.sum(axis=1, keepdims=True)
        share, own = share / total, score[(chosen := np.arange(len(score))), label]
        number = len(score) * len(known.form.shapes)
        value -= float(np.sum(sharpness * own - np.log(total[:, 0]))) / number
        share[chosen, label] -= 1
        by_sharpness += sharpness * float(np.sum(share * score)) / number
        by_errors[:, part] = (sharpness / number * share).reshape(len(predicted), -1)
        place += size
    return value, by_errors, None, by_sharpness


_LOSSES: dict[str, Callable[[LeaveOneOut, KnownPairs, float], _Loss]] = {
    "density": _density,
    "mse": _mse,
    "labels": _log_loss,
}
