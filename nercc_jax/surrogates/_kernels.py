"""Covariance functions for regression over inputs.

This is our own code, since tinygp 0.3 and GPJax 1.0 factorize the whole window whenever they
condition, and have no mask and no ring of rows; what would be left of them is these formulas.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from ..evaluation._criteria import safe_sqrt
from ..splines.arrays import namespace, product

Shape: TypeAlias = Literal["squared_exponential", "matern32", "matern52"]
SHAPES: tuple[str, ...] = get_args(Shape)

# Inputs nearer than this, in widths of the kernel, are the same input: rounding of float32 moves
# inputs by less, and a kernel that takes them apart would judge itself on copies of its own pairs.
SAME = 1e-5
_MARKS = 8  # directions in which inputs are compared, where they have more features


class Kernel(eqx.Module):
    """A covariance function of features, in units of the process's variance.

        k(a, b) = shape(|a - b|) + linear (a . b),   features less `centre`, over `unit` and width

    `fit_learner` tunes the widths, `linear` and `noise`.

    Attributes:
        shape: "squared_exponential" (exp(-r^2/2)), "matern32" or "matern52".
        groups: Which of the widths each feature has.
        centre: What is subtracted from the features.
        unit: The distance in each feature that a width of 1 means.
        widths: The widths of the groups of features, in their units.
        linear: The weight of a straight line; 0 for none.
        noise: The variance of what the kernel does not explain.
    """

    shape: Shape = eqx.field(static=True)
    groups: Int[Array, " features"]
    centre: Float[Array, " features"]
    unit: Float[Array, " features"]
    widths: Float[Array, " widths"]
    linear: Float[Array, ""]
    noise: Float[Array, ""]

    def __init__(
        self,
        shape: Shape = "matern52",
        *,
        centre: Float[ArrayLike, " features"],
        unit: Float[ArrayLike, " features"] | float = 1.0,
        widths: Float[ArrayLike, " widths"] | Sequence[float] = (1.0,),
        groups: Int[ArrayLike, " features"] | Sequence[int] | None = None,
        linear: Float[ArrayLike, ""] = 0.0,
        noise: Float[ArrayLike, ""] = 1e-4,
    ):
        """Make a kernel.

        Without `groups` all features share one width, or each has its own where there are as many.

        Raises:
            ValueError: The shape is unknown, groups do not fit, units, widths or noise are not
                positive, or `linear` is negative.
        """
        self.shape = check_shape(shape)
        self.centre = _leaf(centre, float)
        if not isinstance(unit, jax.Array):
            unit = np.broadcast_to(np.asarray(unit, float), self.centre.shape)
        self.unit = jnp.broadcast_to(_leaf(unit, float), self.centre.shape)
        self.widths = _leaf(widths, float)
        features, number = len(self.centre), len(self.widths)
        if groups is None:
            groups = np.arange(features) if number == features else np.zeros(features, int)
        self.groups = _leaf(groups, int)
        self.linear, self.noise = _leaf(linear, float), _leaf(noise, float)
        if self.groups.shape != (features,):
            raise ValueError(
                f"groups must name a width for each of {features} features, not {groups}"
            )
        if not isinstance(self.groups, Tracer) and features:
            named = np.asarray(self.groups)
            least, most = int(named.min()), int(named.max())
            if least < 0 or most >= number:
                raise ValueError(
                    f"groups name widths {least} to {most}, of which there are {number}"
                )
        for name in ("unit", "widths", "noise"):
            _check(name, getattr(self, name), "positive", lambda value: value > 0)
        _check("linear", self.linear, "0 or positive", lambda value: value >= 0)

    def __call__(
        self, a: Float[Any, "p features"], b: Float[Any, "q features"]
    ) -> Float[Any, "p q"]:
        """Return the covariances of outputs at a with those at b, without noise.

        On the host, where the kernel's own arrays are NumPy's, this is computed in float64.
        """
        a, b = self.scaled(a), self.scaled(b)
        xp, inner = namespace(a, b), product(a, b.T)
        square = xp.sum(a**2, axis=1)[:, None] + xp.sum(b**2, axis=1) - 2 * inner
        return covariances(self.shape, xp.maximum(square, 0)) + self.linear * inner

    def variance(self, a: Float[Any, "p features"]) -> Float[Any, " p"]:
        """Return the variances of outputs at a, without noise."""
        a = self.scaled(a)
        return 1 + self.linear * namespace(a).sum(a**2, axis=1)

    def scaled(self, a: Float[Any, "p features"]) -> Float[Any, "p features"]:
        """Return features in units of the kernel's widths."""
        if namespace(a, self.centre) is np:
            a = a.astype(np.float64)
        return (a - self.centre) / (self.unit * self.widths[self.groups])

    def same(self, a: Float[Any, "p features"], b: Float[Any, "q features"]) -> Bool[Any, "p q"]:
        """Return which inputs differ by no more than rounding (1e-5 widths).

        Distances by products of matrices, as in covariances, are no exact 0 in float32. So inputs
        are compared in a few directions, of each its coordinate.
        """
        a, b = self.scaled(a), self.scaled(b)
        features = a.shape[1]
        if features > _MARKS:
            draws = np.random.default_rng(0).normal(size=(features, _MARKS)) / np.sqrt(features)
            draws = draws.astype(a.dtype)
            a, b = product(a, draws), product(b, draws)
        xp = namespace(a, b)
        alike = xp.ones((len(a), len(b)), bool)
        for one, other in zip(a.T, b.T, strict=True):
            alike &= xp.abs(one[:, None] - other) <= SAME
        return alike


def wide_kernel(
    shape: Shape, centre: Float[Any, " features"], unit: Float[Any, " features"]
) -> Kernel:
    """Return a kernel to start from, with one width, the square root of the number of features."""
    return Kernel(shape, centre=centre, unit=unit, widths=[float(np.sqrt(max(len(centre), 1)))])


def check_shape(shape: Shape) -> Shape:
    """Return the shape; raise ValueError for an unknown one."""
    if shape not in SHAPES:
        raise ValueError(f"a kernel's shape must be one of {', '.join(SHAPES)}, not {shape!r}")
    return shape


def _check(name: str, value: Array, wanted: str, sound: Callable[[np.ndarray], np.ndarray]) -> None:
    if isinstance(value, Tracer):
        return
    numbers = np.asarray(value)
    if not np.all(sound(numbers) & np.isfinite(numbers)):
        raise ValueError(f"{name} must be {wanted} and finite, not {value}")


def _leaf(value: Any, dtype: type) -> Array:
    """Return an array of JAX's, without a program where it is known."""
    if isinstance(value, jax.Array):
        return jnp.asarray(value, dtype)
    if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value)):
        return jnp.asarray(value, dtype)
    return jax.device_put(np.asarray(value, jax.dtypes.canonicalize_dtype(dtype)))


def covariances(shape: Shape, square: Float[Any, "..."]) -> Float[Any, "..."]:
    """Return a kernel's shape at squared distances in units of its widths."""
    xp = namespace(square)
    if shape == "squared_exponential":
        return xp.exp(-square / 2)
    r = safe_sqrt((3 if shape == "matern32" else 5) * square)
    return (1 + r if shape == "matern32" else 1 + r + r**2 / 3) * xp.exp(-r)


def slopes(
    shape: Shape, square: Float[np.ndarray, "..."], found: Float[np.ndarray, "..."]
) -> Float[np.ndarray, "..."]:
    """Return the derivatives of `covariances` by the squared distances, given its values."""
    if shape == "squared_exponential":
        return -found / 2
    r = np.sqrt((3 if shape == "matern32" else 5) * square)
    return np.exp(-r) * (-3 / 2 if shape == "matern32" else -5 / 6 * (1 + r))
