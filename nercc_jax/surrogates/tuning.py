"""Tuning of a kernel on a learner's window, by the errors of leaving each pair out.

The error at a pair that is left out, and its variance, have a closed form (Rasmussen and Williams
2006, equations 5.12):

    y_i - mean_i = (A^-1 (r - c))_i / (A^-1)_ii,     variance_i = 1 / (A^-1)_ii,

so one factor tests a kernel on all pairs. If y_i is the mean of n_i answers to one input, the
variance of a single answer is larger by noise (1 - 1 / n_i), and its squared error by that of the
answers about their mean. First a grid of widths and noises is searched for each shape, then
gradient descent starts from its best point, with derivatives in closed form. All of this uses NumPy
and LAPACK: a hundred pairs take less time than any compilation.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import numpy as np
from jaxtyping import ArrayLike, Float, Int, PyTree, Shaped

from ..arrays import check_fields, native, root_mean_square
from ..codes.trees import check_floats, join
from ._factor import whiten
from .kernel import (
    Function,
    Kernel,
    Shape,
    check_shape,
    covariances,
    features_of,
    first_kernel,
    length_of,
)
from .learner import DeviationScale, Learner

Widths: TypeAlias = Literal["auto", "one", "each"] | Sequence[int]


@dataclasses.dataclass(frozen=True)
class LearnerTuning:
    """Settings of the tuning of a learner's kernel on its own window.

    Attributes:
        shapes: The kernels to choose from.
        widths: "one" width for all features, "each" a width of its own, or for each feature the
            number of its width's group. Features in a group have their own spreads as units, or all
            the same unit, whichever is better. "auto" is "each" for at most 32 features, else
            "one".
        steps: Steps of gradient descent from the best point of the grid; 0 for none.
        rows: The most pairs on which a kernel is tested, evenly from the window. The time grows
            with their cube.

    Raises:
        ValueError: A shape or the name of widths is unknown, `steps` is negative, or `rows` is
            below three.
    """

    shapes: Sequence[Shape] = ("squared_exponential", "matern52")
    widths: Widths = "auto"
    steps: int = 60
    rows: int = 512

    def __post_init__(self):
        for shape in self.shapes:
            check_shape(shape)
        if isinstance(self.widths, str) and self.widths not in ("auto", "one", "each"):
            raise ValueError(f"widths must be 'auto', 'one', 'each' or groups, not {self.widths!r}")
        check_fields(self, "steps", least=0)
        check_fields(self, "rows", least=3)

    def groups(self, kernel: Kernel) -> Int[np.ndarray, " features"]:
        """Return the group of each feature; raise ValueError for groups that do not fit."""
        features, widths = len(kernel.centre), self.widths
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
    kernel: Kernel | Shape = "matern52",
    tuning: LearnerTuning | None = LearnerTuning(),
) -> Learner:
    """Fit a learner to pairs, with its kernel tuned on them (`tune_learner`).

    >>> import jax.numpy as jnp
    >>> from nercc_jax.surrogates import fit_learner
    >>> x = jnp.linspace(-1, 1, 40)[:, None]
    >>> learner = fit_learner(x, jnp.sin(3 * x), capacity=64)
    >>> mean, deviation = learner.predict(jnp.array([[0.33]]))
    >>> bool(abs(mean - jnp.sin(0.99)) < 0.01)
    True

    Args:
        x: Inputs. Without tuning there may be none (`x[:0]`), and then they only give the shapes.
        y: Answers. Pairs that are not finite are left out.
        capacity: The most pairs that the learner holds; after that, the oldest are replaced.
        features: A function of a batch, which JAX can trace, that returns the features by which
            inputs are compared (default: their floats).
        prior: A function of a batch, which JAX can trace, that returns the prior mean (default: 0).
        kernel: A kernel to start from, or a shape, for which `first_kernel` is the start.
        tuning: The settings of the tuning; None leaves the kernel unchanged.

    Raises:
        ValueError: The capacity is not a positive integer, x and y have different lengths, outputs
            are not floats, the prior has other outputs, or the kernel is for other features; and as
            `tune_learner` does.
    """
    x, y = jax.tree.map(np.asarray, native((x, y)))
    own = lambda leaf: leaf.astype(jax.dtypes.canonicalize_dtype(leaf.dtype))  # noqa: E731
    x, y = jax.tree.map(own, (x, y))
    check_floats("y", y)
    # A pair of zeros gives the shapes, since there may be no pairs.
    blank = jax.tree.map(lambda leaf: np.zeros((1, *leaf.shape[1:]), leaf.dtype), (x, y))
    form, pairs = join(blank[1], 1)[1], length_of("y", y)
    z = features_of(features, x if pairs else blank[0])[:pairs]
    kernel = kernel if isinstance(kernel, Kernel) else first_kernel(kernel, z)
    empty = Learner(kernel, form, capacity=capacity, features=features, prior=prior)
    learner = empty.update(x, y)
    return learner if tuning is None else tune_learner(learner, tuning)


def tune_learner(learner: Learner, tuning: LearnerTuning = LearnerTuning()) -> Learner:
    """Return the learner with the kernel that has the best predictive density on its window.

    Each pair is predicted from the others. The grid's widths are relative to those of the learner's
    kernel. Its `scale` is fitted so that squared errors equal squared deviations in the mean
    (`DeviationScale`). The choice is made on the host, so this does not run inside `jax.jit`.

    Raises:
        ValueError: The widths do not fit the features, or there are fewer than three pairs.
    """
    kernel, window = jax.device_get((learner.kernel, learner.window))
    pairs, groups = np.flatnonzero(window.counts), tuning.groups(kernel)
    if len(pairs) < 3:
        raise ValueError(f"{len(pairs)} pairs tell nothing of a kernel: three at least")
    number = min(tuning.rows, len(pairs))
    rows = pairs[np.linspace(0, len(pairs) - 1, number).round().astype(int)]
    inputs, residuals, scatter = (
        each[rows].astype(np.float64) for each in (window.inputs, window.residuals, window.scatter)
    )
    outputs, centred = residuals.shape[1], residuals - residuals.mean(axis=0)
    unit = float(root_mean_square(centred)) or 1.0
    if outputs > number:
        centred = np.asarray(np.linalg.qr(centred.T, mode="r")).T
    known = _Pairs(centred / unit, outputs, (scatter / unit) ** 2, window.counts[rows])
    # The least noise is the sum of the covariances' rounding errors, one unit in the last place for
    # each row. With less, predictions of a nearly exactly known function would be rounding errors.
    least_noise = float(learner.capacity * np.finfo(kernel.noise.dtype).eps)

    sizes = np.maximum(np.bincount(groups), 1)
    # In units of its own spread, a pixel at the edge that hardly varies counts as much as one in
    # the middle (64 pixels of digits, 138 pairs: error over spread .37, but .30 with one unit for
    # all features that share a width); features of different kinds need such units. Both are tried.
    unit = kernel.unit.astype(np.float64)
    units = [unit, np.sqrt(np.bincount(groups, unit**2) / sizes)[groups]]
    widths = np.log(kernel.widths.astype(np.float64))[kernel.groups]
    # Logarithms of widths, noise, and the straight line's weight.
    numbers = [math.log(kernel.noise), math.log(max(float(kernel.linear), 0.1))]
    first, found = np.append(np.bincount(groups, widths) / sizes, numbers), []
    for unit in units[: 1 if np.allclose(*units, rtol=1e-5) else 2]:
        z = (inputs - kernel.centre) / unit
        for shape in tuning.shapes:
            loss = functools.partial(_left_out_loss, known, shape, z, groups, least_noise)
            best = _descend(loss, first, tuning.steps)
            value, _, *errors = loss(best, slope=False)
            numbers = {"widths": np.exp(best[:-2]), "linear": np.exp(best[-1]), "groups": groups}
            noise = np.exp(best[-2]) + least_noise
            tuned = Kernel(shape, centre=kernel.centre, unit=unit, noise=noise, **numbers)
            found.append((value, tuned, *errors))
    _, kernel, squares, variance = min(found, key=lambda each: each[0])
    lengths = np.mean(np.sum(kernel.scaled(inputs) ** 2, axis=1))
    typical = float(1 + kernel.linear * lengths + kernel.noise)
    # The exponent by bisection: the mean ratio grows with it.
    ratios, rest = squares / variance * typical, np.minimum(variance / typical, 1)
    exponent, most = 0.0, 8.0 if 0 < np.mean(ratios) < 1 else 0.0
    while most - exponent > 1e-3:
        middle = (exponent + most) / 2
        enough = np.mean(ratios / rest**middle) > 1
        exponent, most = (exponent, middle) if enough else (middle, most)
    scale = math.sqrt(max(np.mean(ratios), 1) / typical)
    own = kernel.centre.dtype
    return learner.with_kernel(
        kernel, DeviationScale(*(np.asarray(each, own) for each in (scale, typical, exponent)))
    )


class _Pairs(NamedTuple):
    """Pairs on which kernels are compared, in float64.

    `residuals` are mean answers minus the prior and minus their mean, in units of their spread; for
    more `outputs` than pairs, a square root of their inner products. `squares` are mean squared
    distances of the answers to an input from their mean.
    """

    residuals: Float[np.ndarray, "rows mixed"]
    outputs: int
    squares: Float[np.ndarray, " rows"]
    counts: Int[np.ndarray, " rows"]


def _left_out_loss(
    known: _Pairs,
    shape: Shape,
    inputs: Float[np.ndarray, "rows features"],
    groups: Int[np.ndarray, " features"],
    least_noise: float,
    free: Float[np.ndarray, " free"],
    slope: bool = True,
) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """Return the leave-one-out loss, its gradient, and the pairs' squared errors and variances.

    The loss is minus the log predictive density up to constants, with the best process variance;
    infinite if there is none. The `free` numbers are the logarithms of widths, noise and `linear`.
    Errors are in units of the residuals' spread, variances in units of the process's.
    """
    rows = len(inputs)
    z = inputs / np.exp(free[:-2])[groups]
    noise, linear = math.exp(free[-2]) + least_noise, math.exp(free[-1])
    inner = z @ z.T
    length = np.diagonal(inner)
    square = np.maximum(length[:, None] + length - 2 * inner, 0)
    np.fill_diagonal(square, 0)
    shaped = covariances(shape, square)
    covariance = shaped + linear * inner
    covariance[np.diag_indices(rows)] += noise / known.counts
    whitening, _ = whiten(covariance, np.float64(noise) / known.counts.max())
    inverse = whitening.T @ whitening
    precision = np.diagonal(inverse)
    none = np.inf, np.zeros_like(free), np.zeros(rows), np.ones(rows)
    if not (np.isfinite(precision).all() and (precision > 0).all()):
        return none

    # Predictions minus mean answers, and squares and variances of the errors of single answers.
    weights = inverse @ known.residuals
    errors = -weights / precision[:, None]
    squares = np.sum(errors**2, axis=1) / known.outputs + known.squares
    variance = 1 / precision + noise * (1 - 1 / known.counts)
    ratios = squares / variance
    total = max(float(ratios.sum()), np.finfo(float).tiny)
    value = math.log(total / rows) + float(np.mean(np.log(variance)))
    # Differences of logarithms of widths are penalised, like a prior deviation of 0.7, so that
    # uninformative features do not get different widths by chance (diabetes, ten features, 100
    # pairs: error over spread .52 with a width each and no penalty, .48 with one width).
    unlike, price = free[:-2] - free[:-2].mean(), 1 / rows
    value += price * float(unlike @ unlike)
    if not np.isfinite(value):
        return none
    spread = np.sum(known.residuals**2) / rows / known.outputs + np.mean(known.squares)
    relative = squares / (spread or 1.0)
    if not slope:
        return value, free, relative, variance

    # errors = -P r / p and variance = 1 / p + ..., with P = A^-1 and p its diagonal.
    by_errors = 2 * errors / (known.outputs * total * variance[:, None])
    by_variance = 1 / (rows * variance) - ratios / (variance * total)
    by_precision = -np.sum(by_errors * errors, axis=1) / precision - by_variance / precision**2
    turned = inverse @ (by_errors / precision[:, None])
    by_covariance = turned @ weights.T - (inverse * by_precision) @ inverse
    by_covariance = (by_covariance + by_covariance.T) / 2
    by_noise = by_variance @ (1 - 1 / known.counts)
    by_noise += np.diagonal(by_covariance) @ (1 / known.counts)
    if shape == "squared_exponential":
        shape_slope = -shaped / 2
    else:
        r = np.sqrt(5 * square)
        shape_slope = -5 / 6 * (1 + r) * np.exp(-r)
    along, by_square = by_covariance @ z, by_covariance * shape_slope
    by_feature = -4 * (by_square.sum(axis=1) @ z**2 - np.sum(z * (by_square @ z), axis=0))
    by_feature -= 2 * linear * np.sum(z * along, axis=0)
    by_widths = np.bincount(groups, by_feature, minlength=len(unlike)) + 2 * price * unlike
    rest = [by_noise * math.exp(free[-2]), float(np.sum(z * along)) * linear]
    return value, np.append(by_widths, rest), relative, variance


def _descend(
    loss: Callable[..., tuple[float, np.ndarray, Any, Any]],
    first: Float[np.ndarray, " free"],
    steps: int,
) -> Float[np.ndarray, " free"]:
    """Return the best numbers along a descent by Adam (Kingma and Ba 2015) from the best of a grid.

    (The import of SciPy's optimizers takes longer than a first fit.)
    """
    grid = [first]  # included unchanged, so that an earlier tuning is not lost
    # From a width of 0.25, descent does not reach the small widths of outputs that oscillate: on
    # 180 pairs of sin(x^2) up to x = 10, errors were 0.45 without 0.06 and 0.12, and are 0.0001.
    for width in (0.06, 0.12, 0.25, 0.5, 1.0, 2.0, 4.0):
        for noise in (1e-6, 1e-4, 1e-2):
            grid.append(first.copy())
            grid[-1][:-2] += math.log(width)
            grid[-1][-2] = math.log(noise)
    values = [loss(each, slope=False)[0] for each in grid]
    best, value = grid[int(np.argmin(values))], min(values)
    here, mean, square = best, np.zeros_like(best), np.zeros_like(best)
    for step in range(steps if np.isfinite(value) else 0):
        found, slopes, *_ = loss(here)
        if found < value:
            best, value = here, found
        if not np.isfinite(slopes).all() or not np.isfinite(found):
            break
        mean, square = 0.9 * mean + 0.1 * slopes, 0.999 * square + 0.001 * slopes**2
        rate = 0.05 * (1 + math.cos(math.pi * step / steps))
        size = np.sqrt(square / (1 - 0.999 ** (step + 1))) + 1e-8
        here = here - rate * mean / (1 - 0.9 ** (step + 1)) / size
    return best
