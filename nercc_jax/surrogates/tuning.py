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
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import jax
import numpy as np
from jaxtyping import ArrayLike, Float, Int, PyTree, Shaped

from ..codes._checks import check_count
from ..codes._trees import Form
from ..evaluation._criteria import root_mean_square
from ._factor import whiten
from .kernel import Function, Kernel, Shape, check_shape, covariances
from .learner import Learner, init_learner

LearnerCriterion: TypeAlias = Literal["density", "mse", "labels"]
Widths: TypeAlias = Literal["auto", "one", "each", "kept"] | Sequence[int]


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
            learner that was tuned before. "auto" is "each" for at most 32 features, else "one".
        linear: Whether the kernel has a straight line, too.
        steps: Steps of gradient descent from the best of the grid; 0 leaves it at that.
        rows: The most pairs, evenly from the window, that a kernel is judged on. The time grows
            with their cube.
        least_noise: The least noise, in units of the process's variance. Default: a unit in the
            last place of 1 for each row of the window, which rounding of its covariances may add up
            to (1e-4 for 1,024 rows in float32). With less, predictions of a function that is known
            almost to rounding are rounding, and grow as the window turns.
        width_grid: The widths of the grid, times those of the kernel that is there.
        noise_grid: The noises of the grid.
        learning_rate: The length of the descent's first steps, in logarithms of the numbers.
        price: The weight of how unlike logarithms of widths are, by pair. 1 is as if their
            deviation were expected to be 0.7. So features that tell nothing by themselves are not
            set apart by chance (diabetes, ten features, 100 pairs: error by spread .52 with a width
            each and no price, .48 with one width for all).

    Raises:
        ValueError: The criterion, a shape, or the name of widths is unknown, there are fewer than
            three rows, or the least noise is not positive.
    """

    criterion: LearnerCriterion = "density"
    shapes: Sequence[Shape] = ("squared_exponential", "matern52")
    widths: Widths = "auto"
    linear: bool = True
    steps: int = 60
    rows: int = 512
    least_noise: float | None = None
    width_grid: Sequence[float] = (0.25, 0.5, 1.0, 2.0, 4.0)
    noise_grid: Sequence[float] = (1e-6, 1e-4, 1e-2)
    learning_rate: float = 0.1
    price: float = 1.0

    def __post_init__(self):
        if self.criterion not in get_args(LearnerCriterion):
            known = ", ".join(get_args(LearnerCriterion))
            raise ValueError(f"criterion must be one of {known}, not {self.criterion!r}")
        for shape in self.shapes:
            check_shape(shape)
        if isinstance(self.widths, str) and self.widths not in ("auto", "one", "each", "kept"):
            raise ValueError(
                f"widths must be 'auto', 'one', 'each', 'kept' or groups, not {self.widths!r}"
            )
        check_count("steps", self.steps, 0)
        check_count("rows", self.rows, 3)
        if self.least_noise is not None and not 0 < self.least_noise < 1:
            raise ValueError(f"least_noise must be between 0 and 1, not {self.least_noise}")

    def groups(self, kernel: Kernel) -> Int[np.ndarray, " features"]:
        """Return the group of each feature; raise ValueError for groups that do not fit."""
        features, widths = len(kernel.centre), self.widths
        if widths == "kept":
            return np.asarray(kernel.groups)
        if widths == "auto":
            widths = "each" if features <= 32 else "one"
        if isinstance(widths, str):
            return np.zeros(features, int) if widths == "one" else np.arange(features)
        groups = np.asarray(widths, int)
        if groups.shape != (features,) or (features and groups.min() < 0):
            raise ValueError(f"widths must group {features} features by 0, 1, ..., not {widths}")
        return groups


def fit_learner(
    x: PyTree[Shaped[ArrayLike, "pairs ..."]],
    y: PyTree[Float[ArrayLike, "pairs ..."]],
    *,
    capacity: int = 1024,
    features: Function | None = None,
    prior: Function | None = None,
    version: str = "",
    tuning: LearnerTuning = LearnerTuning(),
) -> Learner:
    """Make a learner of pairs, with its kernel tuned on them.

    This is `init_learner`, then `tune_learner`.

    >>> import jax.numpy as jnp
    >>> from nercc_jax.surrogates import fit_learner
    >>> x = jnp.linspace(-1, 1, 40)[:, None]
    >>> learner = fit_learner(x, jnp.sin(3 * x), capacity=64)
    >>> mean, deviation = learner.predict(jnp.array([[0.33]]))
    >>> bool(abs(mean - jnp.sin(0.99)) < 0.01)
    True

    Args:
        x: Inputs.
        y: Answers.
        capacity: The most pairs that the learner holds; then the oldest are replaced.
        features: A function of a batch, which JAX can trace, that returns what inputs are compared
            by. Default: their floats.
        prior: A function of a batch, which JAX can trace, that returns the mean before any answer.
            Default: none.
        version: The model version of the answers.
        tuning: How the kernel is tuned.

    Raises:
        ValueError: As `init_learner` and `tune_learner`.
    """
    learner = init_learner(x, y, capacity=capacity, features=features, prior=prior, version=version)
    return tune_learner(learner, tuning)


def tune_learner(learner: Learner, tuning: LearnerTuning = LearnerTuning()) -> Learner:
    """Return the same learner with the kernel that does best on its own window.

    Each pair is predicted by the others. The grid's widths are relative to those of the learner's
    kernel.

    Its `scale` becomes the one with which squared errors are, in the mean, what deviations say. The
    choice is made on the host, so this does not run inside jit.

    Raises:
        ValueError: The widths do not fit the features, or there are fewer than three pairs.
    """
    kernel: Kernel = jax.device_get(learner.kernel)
    known, groups = _known_pairs(learner, tuning), tuning.groups(kernel)
    least_noise = tuning.least_noise
    if least_noise is None:
        least_noise = float(learner.capacity * np.finfo(kernel.noise.dtype).eps)

    def mean_of_group(each: Float[np.ndarray, " features"]) -> Float[np.ndarray, " widths"]:
        return np.bincount(groups, each) / np.maximum(np.bincount(groups), 1)

    # By the spread of each, a pixel at the edge that hardly ever varies counts as much as one in
    # the middle (64 pixels of digits, 138 pairs: error by spread .37, .30 with one unit for all
    # features that share a width); numbers of different kinds need it. Both are tried.
    units = [unit := kernel.unit.astype(np.float64), np.sqrt(mean_of_group(unit**2))[groups]]
    widths = np.log(kernel.widths.astype(np.float64))[kernel.groups]
    line = float(kernel.linear) if tuning.widths == "kept" else max(float(kernel.linear), 0.1)
    line = math.log(line) if tuning.linear and line > 0 else -np.inf
    # Logarithms of widths, noise, the line's weight, and the sharpness of labels.
    first = np.append(mean_of_group(widths), [math.log(kernel.noise), line, math.log(4.0)])
    found = []
    for unit in units[: 1 if np.allclose(*units, rtol=1e-5) else 2]:
        inputs = (known.inputs - kernel.centre) / unit
        for shape in tuning.shapes:
            loss = _Loss(known, shape, inputs, groups, least_noise, tuning)
            best = _descend(loss, first, tuning)
            judged = loss(best, slope=False)
            tuned = Kernel(
                shape,
                centre=kernel.centre,
                unit=unit,
                widths=np.exp(best[:-3]),
                groups=groups,
                linear=np.exp(best[-2]),
                noise=np.exp(best[-3]) + least_noise,
            )
            found.append((judged.value, tuned, judged.scale))
    _, kernel, scale = min(found, key=lambda each: each[0])
    return learner.with_kernel(kernel, scale)


class _KnownPairs(NamedTuple):
    """Pairs to compare kernels on, in float64.

    `residuals` are mean answers less the prior and less their mean, in units of their spread; of
    more `outputs` than pairs, where labels do not matter, a square root of their products.
    `squares` are mean square distances of the answers to an input from their mean. `answers` are
    the mean answers, where labels matter; all units are then their spread.
    """

    inputs: Float[np.ndarray, "rows features"]
    residuals: Float[np.ndarray, "rows mixed"]
    outputs: int
    squares: Float[np.ndarray, " rows"]
    counts: Int[np.ndarray, " rows"]
    answers: Float[np.ndarray, "rows m"] | None
    form: Form


def _known_pairs(learner: Learner, tuning: LearnerTuning) -> _KnownPairs:
    """Return the pairs to tune on; raise ValueError for fewer than 3."""
    window = jax.device_get(learner.window)
    pairs = np.flatnonzero(window.counts)
    if len(pairs) < 3:
        raise ValueError(f"{len(pairs)} pairs tell nothing of a kernel: three at least")
    number = min(tuning.rows, len(pairs))
    rows = pairs[np.linspace(0, len(pairs) - 1, number).round().astype(int)]
    inputs, residuals, scatter = (
        each[rows].astype(np.float64) for each in (window.inputs, window.residuals, window.scatter)
    )
    outputs, answers = residuals.shape[1], None
    centred = residuals - residuals.mean(axis=0)
    unit = float(root_mean_square(centred)) or 1.0
    if tuning.criterion == "labels":
        answers = residuals if window.priors is None else residuals + window.priors[rows]
        unit = float(root_mean_square(answers - answers.mean(axis=0))) or 1.0
        answers = answers / unit
    elif outputs > number:
        centred = np.asarray(np.linalg.qr(centred.T, mode="r")).T
    squares = (scatter / unit) ** 2
    return _KnownPairs(
        inputs, centred / unit, outputs, squares, window.counts[rows], answers, learner.form
    )


class _Judgement(NamedTuple):
    """A kernel's loss, its derivatives by the free numbers, and the scale that its errors ask for.

    The scale is in units of the residuals' spread.
    """

    value: float
    slopes: Float[np.ndarray, " free"]
    scale: float


@dataclasses.dataclass(frozen=True)
class _Loss:
    """The loss of leaving pairs out, by logarithms of widths, noise, line and labels' sharpness.

    The sharpness is the number of outputs' spreads that makes one label e times as likely.
    """

    known: _KnownPairs
    shape: Shape
    inputs: Float[np.ndarray, "rows features"]
    groups: Int[np.ndarray, " features"]
    least_noise: float
    tuning: LearnerTuning

    def __call__(self, free: Float[np.ndarray, " free"], slope: bool = True) -> _Judgement:
        """Return the judgement of a kernel; infinite where there is none."""
        known, rows = self.known, len(self.inputs)
        z = self.inputs / np.exp(free[:-3])[self.groups]
        noise, linear = math.exp(free[-3]) + self.least_noise, math.exp(free[-2])
        inner = z @ z.T
        length = np.diagonal(inner)
        square = np.maximum(length[:, None] + length - 2 * inner, 0)
        np.fill_diagonal(square, 0)
        shaped = covariances(self.shape, square)
        covariance = shaped + linear * inner
        covariance[np.diag_indices(rows)] += noise / known.counts
        whitening, _ = whiten(covariance, np.float64(noise) / known.counts.max())
        inverse = whitening.T @ whitening
        precision = np.diagonal(inverse)
        none = _Judgement(np.inf, np.zeros_like(free), 1.0)
        if not (np.isfinite(precision).all() and (precision > 0).all()):
            return none

        # Predictions less mean answers, and squares and variances of the errors of single answers.
        weights = inverse @ known.residuals
        errors = -weights / precision[:, None]
        squares = np.sum(errors**2, axis=1) / known.outputs + known.squares
        variance = 1 / precision + noise * (1 - 1 / known.counts)
        ratios, by_variance, by_sharpness = squares / variance, np.zeros(rows), 0.0
        tiny = np.finfo(float).tiny
        if self.tuning.criterion == "density":
            # Minus the log predictive density but for constants, with the best process variance.
            total = max(float(ratios.sum()), tiny)
            value = math.log(total / rows) + float(np.mean(np.log(variance)))
            by_errors = 2 * errors / (known.outputs * total * variance[:, None])
            by_variance = 1 / (rows * variance) - ratios / (variance * total)
        elif self.tuning.criterion == "mse":
            total = max(float(squares.sum()), tiny)
            value, by_errors = math.log(total / rows), 2 * errors / (known.outputs * total)
        else:
            value, by_errors, by_sharpness = _log_loss(known, errors, math.exp(free[-1]))
        unlike, price = free[:-3] - free[:-3].mean(), self.tuning.price / rows
        value += price * float(unlike @ unlike)
        if not np.isfinite(value):
            return none
        spread = np.sum(known.residuals**2) / rows / known.outputs + np.mean(known.squares)
        scale = math.sqrt(np.mean(ratios) / spread) if spread > 0 else 0.0
        if not slope:
            return _Judgement(value, free, scale or 1.0)

        # errors = -P r / p and variance = 1 / p + ..., with P = A^-1 and p its diagonal.
        by_precision = -np.sum(by_errors * errors, axis=1) / precision - by_variance / precision**2
        turned = inverse @ (by_errors / precision[:, None])
        by_covariance = turned @ weights.T - (inverse * by_precision) @ inverse
        by_covariance = (by_covariance + by_covariance.T) / 2
        by_noise = by_variance @ (1 - 1 / known.counts)
        by_noise += np.diagonal(by_covariance) @ (1 / known.counts)
        if self.shape == "squared_exponential":
            shape_slope = -shaped / 2
        else:
            r = np.sqrt((3 if self.shape == "matern32" else 5) * square)
            shape_slope = np.exp(-r) * (-3 / 2 if self.shape == "matern32" else -5 / 6 * (1 + r))
        along, by_square = by_covariance @ z, by_covariance * shape_slope
        by_feature = -4 * (by_square.sum(axis=1) @ z**2 - np.sum(z * (by_square @ z), axis=0))
        by_feature -= 2 * linear * np.sum(z * along, axis=0)
        by_widths = np.bincount(self.groups, by_feature, minlength=len(unlike)) + 2 * price * unlike
        rest = [by_noise * math.exp(free[-3]), float(np.sum(z * along)) * linear, by_sharpness]
        return _Judgement(value, np.append(by_widths, rest), scale or 1.0)


def _log_loss(
    known: _KnownPairs, errors: Float[np.ndarray, "rows m"], sharpness: float
) -> tuple[float, Float[np.ndarray, "rows m"], float]:
    """Return the log loss of the answers' own labels under a softmax of the predictions.

    Its derivatives are by the errors, and by the logarithm of the sharpness.
    """
    assert known.answers is not None
    predicted, value, by_sharpness, place = known.answers + errors, 0.0, 0.0, 0
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
    return value, by_errors, by_sharpness


def _descend(
    loss: _Loss, first: Float[np.ndarray, " free"], tuning: LearnerTuning
) -> Float[np.ndarray, " free"]:
    """Return the best numbers along a descent by Adam (Kingma and Ba 2015) from the best of a grid.

    (The import of SciPy's optimizers takes longer than a first fit.)
    """
    grid = [first]  # as it is, too: what was tuned before is not lost
    for width in tuning.width_grid:
        for noise in tuning.noise_grid:
            grid.append(first.copy())
            grid[-1][:-3] += math.log(width)
            grid[-1][-3] = math.log(noise)
    values = [loss(each, slope=False).value for each in grid]
    best, value = grid[int(np.argmin(values))], min(values)
    here, mean, square = best, np.zeros_like(best), np.zeros_like(best)
    for step in range(tuning.steps if np.isfinite(value) else 0):
        found = loss(here)
        if found.value < value:
            best, value = here, found.value
        if not np.isfinite(found.slopes).all() or not np.isfinite(found.value):
            break
        mean, square = 0.9 * mean + 0.1 * found.slopes, 0.999 * square + 0.001 * found.slopes**2
        rate = tuning.learning_rate * (1 + math.cos(math.pi * step / tuning.steps)) / 2
        size = np.sqrt(square / (1 - 0.999 ** (step + 1))) + 1e-8
        here = here - rate * mean / (1 - 0.9 ** (step + 1)) / size
    return best
